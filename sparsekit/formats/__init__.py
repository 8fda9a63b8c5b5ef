"""How a weight lies on disk and crosses between backends: one canonical layout a format, exact both ways."""

from sparsekit.formats.base import FORMATS, LAYOUT_VERSION, Format, PackedWeight, WeightSpec
from sparsekit.formats.semi24 import Semi24

__all__ = ["FORMATS", "LAYOUT_VERSION", "Format", "PackedWeight", "Semi24", "WeightSpec"]
