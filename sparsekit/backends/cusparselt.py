"""`cusparselt`: NVIDIA's 2:4 tensor cores through torch, for many tokens at a time.

By name only in practice: `auto` asks `triton` first, which serves small and large M from one copy of the weight.
"""

from collections.abc import Sequence

import torch
from sparsekit_kernels import cusparselt
from sparsekit_kernels.layout24 import decompress24
from torch import Tensor

from sparsekit.backends.base import BACKENDS, Backend, Runner
from sparsekit.formats import PackedWeight, WeightSpec


class Semi24Runner(Runner):
    format = "semi24"

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        return cusparselt.why_not(spec.dtype, spec.out_features, spec.in_features, device)

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        return cusparselt.prepare(packed.tensors["values"], packed.tensors["meta"], packed.spec.in_features)

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        values, meta = cusparselt.restore(prepared[0], spec.out_features, spec.in_features)
        return PackedWeight(spec, {"values": values, "meta": meta})

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        return cusparselt.spmm24(x, prepared[0], N, K, bias)

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        return decompress24(*cusparselt.restore(prepared[0], N, K), K)

    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        return "cuSPARSELt"


BACKENDS.register("cusparselt", Backend("cusparselt", [Semi24Runner()]))
