"""Runs compiled PTX on the CPU, so that a kernel can be tested as ptxas gets it where there is no GPU.

`run` executes PTX text on CPU tensors; `launch` compiles a Triton kernel and runs it; inside `emulated`, every launch
of every Triton kernel goes this way, so that the functions around the kernels run unchanged.

What it shows: addresses, orders of lanes and registers, metadata, masks, barriers, epilogues, bit for bit. What it does
not: speed, and the order in which a tensor core adds (here: float32, in some order).
"""

from tests.kernels.ptx.launch import emulated, launch, run
from tests.kernels.ptx.program import PtxError

__all__ = ["PtxError", "emulated", "launch", "run"]
