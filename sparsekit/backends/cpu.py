"""`cpu`: our C++ kernel, compiled on first use; AVX-512 BF16 down to portable code."""

from collections.abc import Sequence

import torch
from sparsekit_kernels import cpu
from sparsekit_kernels.layout24 import decompress24
from torch import Tensor

from sparsekit.backends.base import BACKENDS, Backend, Runner
from sparsekit.formats import PackedWeight, WeightSpec


class Semi24Runner(Runner):
    format = "semi24"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if device.type != "cpu":
            return f"it runs on the CPU, the weight is on {device}"
        return cpu.why_not(spec.dtype)

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        return cpu.prepare(packed.tensors["values"], packed.tensors["meta"])

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        blocks, masks = prepared
        values, meta = cpu.restore(blocks, masks, spec.out_features)
        return PackedWeight(spec, {"values": values, "meta": meta})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        blocks, masks = prepared
        return cpu.spmm24(x, blocks, masks, N, bias)

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        blocks, masks = prepared
        return decompress24(*cpu.restore(blocks, masks, N), K)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        return f"spmm24, {cpu.isa()}"


BACKENDS.register("cpu", Backend("cpu", [Semi24Runner()]))
