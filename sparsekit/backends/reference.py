"""`reference`: unpack and multiply, in plain torch. Runs every format anywhere; the truth for the other backends."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsekit.backends.base import BACKENDS, Backend, Runner
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec


class ReferenceRunner(Runner):
    """The prepared tensors are the canonical ones."""

    def __init__(self, format: str) -> None:
        self.format = format

    def why_not(self, spec: WeightSpec, device: torch.device) -> str | None:
        return None

    def prepare(self, packed: PackedWeight, prefill: str = "dense") -> tuple[Tensor, ...]:
        return tuple(packed.tensors.values())

    def restore(self, spec: WeightSpec, prepared: tuple[Tensor, ...]) -> PackedWeight:
        return PackedWeight(spec, dict(zip(FORMATS.get(spec.format).names, prepared, strict=True)))

    def linear(self, x: Tensor, prepared: Sequence[Tensor], bias: Tensor | None, N: int, K: int) -> Tensor:
        return F.linear(x, self.dense(prepared, N, K, x.dtype), bias)

    def dense(self, prepared: Sequence[Tensor], N: int, K: int, dtype: torch.dtype) -> Tensor:
        spec = WeightSpec(self.format, N, K, dtype)
        return FORMATS.get(self.format).unpack(self.restore(spec, tuple(prepared)))

    def kernel(
        self, spec: WeightSpec, num_tokens: int, device: torch.device | None = None, prepared: Sequence[Tensor] = ()
    ) -> str:
        return "unpack, then torch's dense product"


BACKENDS.register("reference", Backend("reference", [ReferenceRunner(name) for name in FORMATS], is_fallback=True))
