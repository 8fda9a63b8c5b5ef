"""`reference`: decompress and multiply, in plain torch. Runs anywhere; the truth for the other backends."""

import torch
from torch import Tensor

from sparsekit import ops
from sparsekit.backends.base import BACKENDS, Backend
from sparsekit.formats import PackedWeight, WeightSpec


class ReferenceBackend(Backend):
    name = "reference"
    is_fallback = True

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        return None if spec.format == "semi24" else f"it has no path for format {spec.format!r}"

    def prepare(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        return packed.tensors["values"], packed.tensors["meta"]

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        return PackedWeight(spec, {"values": prepared[0], "meta": prepared[1]})

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, spec: WeightSpec) -> Tensor:
        values, meta = prepared
        return ops.linear24_reference(x, values, meta, bias, spec.out_features, spec.in_features)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        return "decompress24, then torch's dense product"

    def to_dense(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> Tensor:
        first, second = prepared
        return ops.dense24_reference(first, second, spec.out_features, spec.in_features)


BACKENDS.register("reference", ReferenceBackend())
