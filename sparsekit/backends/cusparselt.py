"""`cusparselt`: NVIDIA's 2:4 tensor cores through torch, for many tokens at a time.

By name only in practice: `auto` asks `triton` first, which serves small and large M from one copy of the weight.
"""

import torch
from sparsekit_kernels import cusparselt
from torch import Tensor

from sparsekit import ops
from sparsekit.backends.base import BACKENDS, Backend
from sparsekit.formats import PackedWeight, WeightSpec


class CusparseltBackend(Backend):
    name = "cusparselt"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        if spec.format != "semi24":
            return f"it has no path for format {spec.format!r}"
        return cusparselt.why_not(spec.dtype, spec.out_features, spec.in_features, device)

    def prepare(self, packed: PackedWeight) -> tuple[Tensor, ...]:
        return cusparselt.prepare(packed.tensors["values"], packed.tensors["meta"], packed.spec.in_features)

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        values, meta = cusparselt.restore(prepared[0], spec.out_features, spec.in_features)
        return PackedWeight(spec, {"values": values, "meta": meta})

    def linear(self, x: Tensor, prepared: tuple[Tensor, ...], bias: Tensor | None, spec: WeightSpec) -> Tensor:
        return ops.linear24_cusparselt(x, prepared[0], None, bias, spec.out_features, spec.in_features)

    def kernel(self, spec: WeightSpec, num_tokens: int) -> str:
        return "cuSPARSELt"

    def to_dense(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> Tensor:
        return ops.dense24_cusparselt(prepared[0], None, spec.out_features, spec.in_features)


BACKENDS.register("cusparselt", CusparseltBackend())
