"""Who can run a packed weight here, and why the others cannot.

`BACKENDS` is in the order in which `auto` asks.
"""

from sparsekit.backends.base import BACKENDS, Backend, resolve
from sparsekit.backends.triton import TritonBackend  # isort: skip
from sparsekit.backends.cpu import CpuBackend  # isort: skip
from sparsekit.backends.reference import ReferenceBackend  # isort: skip

__all__ = ["BACKENDS", "Backend", "CpuBackend", "ReferenceBackend", "TritonBackend", "resolve"]
