"""2:4 weights as values and one nibble per group of four, see `sparsekit_kernels.layout24`; the values as they are
(`semi24`), or rounded to 8 or 4 bits (`semi24_int8`, `semi24_int4`, `semi24_fp8`), see `sparsekit_kernels.quant`."""

from collections.abc import Callable

import torch
from sparsekit_kernels import cpu, target
from sparsekit_kernels.layout24 import (
    compress24,
    count_illegal_nibbles,
    count_violations,
    decompress24,
    padded_features,
)
from sparsekit_kernels.quant import GRIDS, dequantize24, quantize24
from torch import Tensor

from sparsekit.errors import CheckpointError, PatternError, Unsupported
from sparsekit.formats.base import FORMATS, Format, PackedWeight, WeightSpec, with_dtype


class Semi24(Format):
    """At most two non-zeros in every four consecutive inputs; 9/16 of dense at 16 bits, 17/32 at 32."""

    name = "semi24"
    names: tuple[str, ...] = ("values", "meta")
    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    holds_side = True

    def parts(self, spec: WeightSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        N, Kp = spec.out_features, padded_features(spec.in_features)
        return {"values": ((N, Kp // 2), spec.dtype), "meta": ((N, Kp // 8), torch.uint8)}

    def count_violations(self, w_NK: Tensor) -> tuple[int, int]:
        return count_violations(w_NK), w_NK.shape[0] * -(-w_NK.shape[1] // 4)

    def pack(self, w_NK: Tensor, scales: Tensor | None = None) -> PackedWeight:
        if scales is not None:
            raise ValueError(f"{self.name} holds weights as they are: it takes no scales")
        values, meta = self._compress(w_NK)
        spec = WeightSpec(self.name, w_NK.shape[0], w_NK.shape[1], w_NK.dtype)
        return PackedWeight(spec, {"values": values, "meta": meta})

    def unpack(self, packed: PackedWeight) -> Tensor:
        return decompress24(packed.tensors["values"], packed.tensors["meta"], packed.spec.in_features)

    def cast(self, packed: PackedWeight, dtype: torch.dtype) -> PackedWeight:
        values = packed.tensors["values"]
        if values.is_meta:
            return PackedWeight(with_dtype(packed.spec, dtype), {**packed.tensors, "values": values.to(dtype)})
        return self.pack(self.unpack(packed).to(dtype))  # a narrower dtype may turn small values into zeros

    def validate(self, packed: PackedWeight) -> None:
        self.check_parts(packed)
        self._check_finite("values", packed.tensors["values"])
        self._check_meta(packed.tensors["meta"])

    def _compress(self, w_NK: Tensor) -> tuple[Tensor, Tensor]:
        if w_NK.dtype not in self.dtypes:
            raise Unsupported(
                f"{self.name} holds bfloat16, float16 and float32, not {w_NK.dtype}: convert the weight first"
            )
        try:
            return _compressor(w_NK.device)(w_NK)
        except ValueError:
            broken, groups = self.count_violations(w_NK)
            raise PatternError(
                f"{broken:,} of {groups:,} groups of four have more than two non-zeros: prune to 2:4 before packing"
            ) from None

    @staticmethod
    def _check_finite(name: str, tensor: Tensor) -> None:
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{name} hold NaN or infinity: the checkpoint is damaged, fetch it again")

    @staticmethod
    def _check_meta(meta: Tensor) -> None:
        if illegal := count_illegal_nibbles(meta):
            raise CheckpointError(
                f"meta holds {illegal:,} index pairs that no 2:4 weight has: the checkpoint is damaged, fetch it again"
            )


class QuantisedSemi24(Semi24):
    """2:4 with the kept weights on a grid of 8 or 4 bits: 5 or 3.125 bits for each dense weight, scales included."""

    names = ("values", "meta", "scales")
    lossless = False

    def __init__(self, name: str) -> None:
        self.name, self.grid = name, GRIDS[name]

    def parts(self, spec: WeightSpec) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        N, K = spec.out_features, spec.in_features
        return {
            "values": (self.grid.value_shape(N, K), self.grid.storage),
            "meta": ((N, padded_features(K) // 8), torch.uint8),
            "scales": (self.grid.scale_shape(N, K), self.grid.scale_dtype),
        }

    def pack(self, w_NK: Tensor, scales: Tensor | None = None) -> PackedWeight:
        values, meta = self._compress(w_NK)
        q, scales = quantize24(values, self.name, w_NK.shape[1], scales)
        spec = WeightSpec(self.name, w_NK.shape[0], w_NK.shape[1], w_NK.dtype)
        return PackedWeight(spec, {"values": q, "meta": meta, "scales": scales})

    def unpack(self, packed: PackedWeight) -> Tensor:
        K, parts = packed.spec.in_features, packed.tensors
        values = dequantize24(parts["values"], parts["scales"], self.name, K, packed.spec.dtype)
        return decompress24(values, parts["meta"], K)

    def cast(self, packed: PackedWeight, dtype: torch.dtype) -> PackedWeight:
        return PackedWeight(with_dtype(packed.spec, dtype), packed.tensors)

    def validate(self, packed: PackedWeight) -> None:
        self.check_parts(packed)
        scales, values = packed.tensors["scales"], packed.tensors["values"]
        self._check_finite("scales", scales)
        if not bool((scales > 0).all()):
            raise CheckpointError("scales are not all positive: the checkpoint is damaged, fetch it again")
        if values.dtype == torch.float8_e4m3fn:
            self._check_finite("values", values.float())
        elif bool((values == -128).any() if values.dtype == torch.int8 else _any_nibble_is_8(values)):
            raise CheckpointError(
                f"values hold numbers below -{self.grid.largest:.0f}: the checkpoint is damaged, fetch it again"
            )
        self._check_meta(packed.tensors["meta"])


def _compressor(device: torch.device) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """The fastest `compress24` here; all give the same bytes."""
    if device.type == "cpu" and cpu.why_not() is None:
        return cpu.compress24
    if device.type == "cuda" and target.why_not(device) is None:
        from sparsekit_kernels import compress24 as on_gpu  # not above: it imports Triton

        return on_gpu.compress24
    return compress24


def _any_nibble_is_8(packed: Tensor) -> Tensor:
    return ((packed & 15 == 8) | (packed >> 4 == 8)).any()


FORMATS.register("semi24", Semi24())
for _name in GRIDS:
    FORMATS.register(_name, QuantisedSemi24(_name))
