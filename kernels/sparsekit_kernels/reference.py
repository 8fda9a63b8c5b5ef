"""The plain torch version of every kernel: slow, obvious, and what the fast ones are compared with."""

import torch.nn.functional as F
from torch import Tensor

from sparsekit_kernels.layout24 import decompress24


def spmm24(x: Tensor, values: Tensor, meta: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x @ W.T + bias for a canonical 2:4 weight; x is [..., K], the result [..., N]."""
    return F.linear(x, decompress24(values, meta, x.shape[-1]), bias)
