"""Make transformers smaller and really faster: from a mask to a measured speed-up."""

from sparsekit.check import check, explain
from sparsekit.checkpoint import load, save
from sparsekit.hf.register import register as _register_with_transformers
from sparsekit.nn import SparseLinear
from sparsekit.pack import pack_, unpack_
from sparsekit.version import __version__

_register_with_transformers()

__all__ = ["SparseLinear", "__version__", "check", "explain", "load", "pack_", "save", "unpack_"]
