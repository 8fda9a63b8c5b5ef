"""How a weight lies on disk and crosses between backends: one canonical layout a format, exact both ways.

`FORMATS` is in the order in which `pack_` tries them, which is the order of registration: of the imports below.
"""

# isort: off
from sparsekit.formats.base import FORMATS, LAYOUT_VERSION, Format, PackedWeight, WeightSpec
from sparsekit.formats.semi24 import Semi24
from sparsekit.formats.block import Block
# isort: on

__all__ = ["FORMATS", "LAYOUT_VERSION", "Block", "Format", "PackedWeight", "Semi24", "WeightSpec"]
