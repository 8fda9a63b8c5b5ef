"""Who can run a packed weight here, and why the others cannot.

`BACKENDS` is in the order in which `auto` asks, which is the order of registration: of the imports below.
"""

# isort: off
from sparsekit.backends.base import BACKENDS, Backend, resolve
from sparsekit.backends.triton import TritonBackend
from sparsekit.backends.cpu import CpuBackend
from sparsekit.backends.cusparselt import CusparseltBackend
from sparsekit.backends.reference import ReferenceBackend
# isort: on

__all__ = ["BACKENDS", "Backend", "CpuBackend", "CusparseltBackend", "ReferenceBackend", "TritonBackend", "resolve"]
