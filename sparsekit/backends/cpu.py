"""`cpu`: our C++ kernel, compiled on first use; AVX-512 BF16 down to portable code."""

import torch
from sparsekit_kernels import cpu
from torch import Tensor

from sparsekit import ops
from sparsekit.backends.base import BACKENDS, Backend
from sparsekit.formats import PackedWeight, WeightSpec


class CpuBackend(Backend):
    name = "cpu"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if spec.format != "semi24":
            return f"it has no path for format {spec.format!r}"
        if device.type != "cpu":
            return f"it runs on the CPU, the weight is on {device}"
        return cpu.why_not(spec.dtype)

    def prepare(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        return cpu.prepare(packed.tensors["values"], packed.tensors["meta"])

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        blocks, masks = prepared
        values, meta = cpu.restore(blocks, masks, spec.out_features)
        return PackedWeight(spec, {"values": values, "meta": meta})

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, spec: WeightSpec) -> Tensor:
        blocks, masks = prepared
        return ops.linear24_cpu(x, blocks, masks, bias, spec.out_features, spec.in_features)

    def to_dense(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> Tensor:
        first, second = prepared
        return ops.dense24_cpu(first, second, spec.out_features, spec.in_features)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        return f"spmm24, {cpu.isa()}"


BACKENDS.register("cpu", CpuBackend())
