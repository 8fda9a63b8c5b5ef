"""`triton`: our kernels on NVIDIA GPUs, straight from the canonical layout."""

import torch
from sparsekit_kernels import target
from torch import Tensor

from sparsekit import ops
from sparsekit.backends.base import BACKENDS, Backend
from sparsekit.formats import PackedWeight, WeightSpec


class TritonBackend(Backend):
    name = "triton"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if spec.format != "semi24":
            return f"it has no path for format {spec.format!r}"
        return target.why_not(device)

    def prepare(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        return packed.tensors["values"].contiguous(), packed.tensors["meta"].contiguous()

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        return PackedWeight(spec, {"values": prepared[0], "meta": prepared[1]})

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, spec: WeightSpec) -> Tensor:
        values, meta = prepared
        return ops.linear24_triton(x, values, meta, bias, spec.out_features, spec.in_features)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        from sparsekit_kernels.spmm24 import DENSE_ABOVE

        return "spmm24" if num_tokens <= DENSE_ABOVE else "decompress24, then torch's dense product"

    def to_dense(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> Tensor:
        first, second = prepared
        return ops.dense24_triton(first, second, spec.out_features, spec.in_features)


BACKENDS.register("triton", TritonBackend())
