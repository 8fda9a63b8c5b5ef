"""Methods that make a model narrower or shorter; what is left is dense."""

from sparsekit.methods.structured.base import StructuredMethod, WidthMethod
from sparsekit.methods.structured.contribution import Contribution
from sparsekit.methods.structured.depth import Depth
from sparsekit.methods.structured.fisher import Fisher
from sparsekit.methods.structured.flap import FLAP
from sparsekit.methods.structured.kcm import KCM
from sparsekit.methods.structured.magnitude_sp import MagnitudeSP
from sparsekit.methods.structured.slicegpt import SliceGPT
from sparsekit.methods.structured.wanda_sp import WandaSP

__all__ = [
    "Contribution",
    "Depth",
    "FLAP",
    "Fisher",
    "KCM",
    "MagnitudeSP",
    "SliceGPT",
    "StructuredMethod",
    "WandaSP",
    "WidthMethod",
]
