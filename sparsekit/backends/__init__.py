"""Who can run a packed weight here, and why the others cannot.

`BACKENDS` is in the order in which `auto` asks, which is the order of registration: of the imports below.
"""

# isort: off
from sparsekit.backends.base import BACKENDS, PREFILLS, Backend, Runner, resolve
from sparsekit.backends import triton, cpu, cusparselt, reference  # noqa: F401
# isort: on

__all__ = ["BACKENDS", "PREFILLS", "Backend", "Runner", "resolve"]
