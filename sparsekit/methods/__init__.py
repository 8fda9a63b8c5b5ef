"""One-shot pruning methods: each a config that decides which weights of a layer go, or (`structured`) which parts of a
model. Trained ones: `sparsekit.train`."""

from sparsekit.methods.alps import ALPS
from sparsekit.methods.awq import AWQ
from sparsekit.methods.base import METHODS, TRAINED, Decision, OneShot, Trained, is_trained, method_config
from sparsekit.methods.magnitude import Magnitude
from sparsekit.methods.ria import RIA
from sparsekit.methods.sparsegpt import SparseGPT
from sparsekit.methods.structured import (
    FLAP,
    KCM,
    Contribution,
    Depth,
    Fisher,
    MagnitudeSP,
    SliceGPT,
    StructuredMethod,
    WandaSP,
)
from sparsekit.methods.wanda import Wanda

__all__ = [
    "ALPS",
    "AWQ",
    "Contribution",
    "Decision",
    "Depth",
    "FLAP",
    "Fisher",
    "KCM",
    "METHODS",
    "Magnitude",
    "MagnitudeSP",
    "OneShot",
    "RIA",
    "SliceGPT",
    "SparseGPT",
    "StructuredMethod",
    "TRAINED",
    "Trained",
    "Wanda",
    "WandaSP",
    "is_trained",
    "method_config",
]
