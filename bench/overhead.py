"""Microseconds of one call of a small packed layer, beside `nn.Linear`: nearly all of it is the way to the kernel.

python bench/overhead.py          one thread, 64x64, M=1, the least of 9 repeats of 3000 calls
"""

import timeit

import torch
from torch import nn

import sparsekit as sk

torch.set_num_threads(1)
torch.manual_seed(0)
dense = nn.Linear(64, 64, bias=False)
with torch.no_grad():
    dense.weight.mul_(sk.NM(2, 4).project(dense.weight.abs()))
    packed, x = sk.SparseLinear.from_linear(dense), torch.randn(1, 1, 64)
    for name, layer in (("nn.Linear", dense), (f"SparseLinear on {packed.backend}", packed)):
        seconds = min(timeit.repeat(lambda layer=layer: layer(x), number=3000, repeat=9)) / 3000
        print(f"{name}: {seconds * 1e6:.1f} us")
