"""Runs compiled PTX on the CPU, so that a kernel can be tested as ptxas gets it where there is no GPU.

`run` executes PTX text on CPU tensors; inside `emulated`, every launch of every Triton kernel is compiled for the GPU
that is asked for and executed thus, so that the functions around the kernels run unchanged.

What it shows: addresses, orders of lanes and registers, metadata, masks, barriers, epilogues, bit for bit. What it does
not: speed, and the order in which a tensor core adds (here: float32, in some order).
"""

from tests.kernels.ptx.launch import emulated, run
from tests.kernels.ptx.program import PtxError

__all__ = ["PtxError", "emulated", "run"]
