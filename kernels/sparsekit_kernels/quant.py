"""Quantised values of a 2:4 weight: which grid each format rounds to, and how its numbers are stored.

`values` [N, Kp/2] are the kept weights of `layout24`, `meta` is untouched. Symmetric, round to nearest even:

    format       stored q                                       scales                           w
    semi24_int8  int8 [N, Kp/2], |q| <= 127                     float32 [N]                      q * scale[n]
    semi24_int4  uint8 [N, Kp/4], |q| <= 7, one byte a group:   bfloat16 [N, ceil(K/128)]        q * scale[n, k // 128]
                 slot 0 in the low nibble, slot 1 in the high
                 one, two's complement
    semi24_fp8   float8_e4m3fn [N, Kp/2], |q| <= 448            float32 [N]                      q * scale[n]

Bits per dense weight, metadata and scales included: 5, 3.125 and 5, against 9 for semi24 and 16 for dense bf16.
A scale is chosen before its weights are rounded, so that its own rounding (to bfloat16) costs no accuracy.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit_kernels.layout24 import padded_features

INT4_COLUMNS = 128
"""Columns of the dense weight that share a scale in `semi24_int4`."""


@dataclass(frozen=True)
class Grid:
    """The numbers a format can hold.

    Attributes:
        largest: the largest |q|.
        columns: of the dense weight that share a scale; None for the whole row.
        scale_dtype: of the scales.
        storage: dtype of the stored q.
        slots: kept weights in one stored element.
    """

    largest: float
    columns: int | None
    scale_dtype: torch.dtype
    storage: torch.dtype
    slots: int = 1

    def num_scales(self, K: int) -> int:
        """Return the scales of a row with K input features."""
        return 1 if self.columns is None else -(-K // self.columns)

    def scale_shape(self, N: int, K: int) -> tuple[int, ...]:
        return (N,) if self.columns is None else (N, self.num_scales(K))

    def value_shape(self, N: int, K: int) -> tuple[int, int]:
        return (N, padded_features(K) // 2 // self.slots)


GRIDS = {
    "semi24_int8": Grid(127, None, torch.float32, torch.int8),
    "semi24_int4": Grid(7, INT4_COLUMNS, torch.bfloat16, torch.uint8, slots=2),
    "semi24_fp8": Grid(448, None, torch.float32, torch.float8_e4m3fn),
}


def find_scales(values: Tensor, format: str, K: int) -> Tensor:
    """Return the scales that just hold the largest |value| of each row, or of each row and 128 columns.

    Args:
        values: [N, Kp/2] float, the kept weights.
        format: name in `GRIDS`.
        K: columns of the dense weight.
    """
    grid = _grid(format)
    if values.numel() == 0:
        return values.new_ones(grid.scale_shape(values.shape[0], K), dtype=grid.scale_dtype)
    largest = _by_scale(values.abs().float(), grid, K).amax(-1)
    return _legal((largest / grid.largest).to(grid.scale_dtype)).view(grid.scale_shape(values.shape[0], K))


def quantize24(values: Tensor, format: str, K: int, scales: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return (q, scales) of the kept weights; values beyond the grid are clipped to its end.

    Args:
        values: [N, Kp/2] float, as `layout24.compress24` returns them.
        format: name in `GRIDS`.
        K: columns of the dense weight.
        scales: the grid to round to, of the format's shape; None for `find_scales`.
    Raises:
        ValueError: `scales` has another shape, or is not positive and finite.
    """
    grid, N = _grid(format), values.shape[0]
    if values.dim() != 2 or values.shape[1] != padded_features(K) // 2:
        raise ValueError(f"values {tuple(values.shape)} are not [N, {padded_features(K) // 2}], the slots of K={K}")
    if scales is None:
        scales = find_scales(values, format, K)
    if scales.shape != grid.scale_shape(N, K):
        raise ValueError(f"scales are {tuple(scales.shape)}, {format} of [{N}, {K}] has {grid.scale_shape(N, K)}")
    scales = scales.to(grid.scale_dtype)
    if not bool(((scales > 0) & scales.isfinite()).all()):
        raise ValueError("scales must be positive and finite: leave them out to have them chosen")
    scaled = _by_scale(values.float(), grid, K) / scales.float().view(N, grid.num_scales(K), 1)
    scaled = _slots(scaled, values.shape[1]).clamp(-grid.largest, grid.largest)
    if grid.storage == torch.float8_e4m3fn:
        return scaled.to(grid.storage), scales
    q = scaled.round().to(torch.int8)
    return (_pack_int4(q) if grid.slots == 2 else q), scales


def dequantize24(q: Tensor, scales: Tensor, format: str, K: int, dtype: torch.dtype) -> Tensor:
    """Return the kept weights [N, Kp/2] in `dtype`: q times its scale in fp32, rounded once."""
    grid, N = _grid(format), q.shape[0]
    numbers = (_unpack_int4(q) if grid.slots == 2 else q).float()
    values = _by_scale(numbers, grid, K) * scales.float().view(N, grid.num_scales(K), 1)
    return _slots(values, numbers.shape[1]).to(dtype)


def _grid(format: str) -> Grid:
    if format not in GRIDS:
        raise ValueError(f"{format!r} is not quantised: expected one of {', '.join(GRIDS)}")
    return GRIDS[format]


def _by_scale(values: Tensor, grid: Grid, K: int) -> Tensor:
    """View [N, Kp/2] as [N, scales, slots that share one], padded with zeros at the end."""
    if grid.columns is None:
        return values.unsqueeze(1)
    count, slots = grid.num_scales(K), grid.columns // 2
    values = torch.nn.functional.pad(values, (0, count * slots - values.shape[1]))
    return values.view(values.shape[0], count, slots)


def _slots(by_scale: Tensor, slots: int) -> Tensor:
    """Undo `_by_scale`."""
    return by_scale.flatten(1)[:, :slots].contiguous()


def _legal(scales: Tensor) -> Tensor:
    """A scale of zero (no weights, or too small for the dtype) divides as well as any other."""
    return torch.where(scales > 0, scales, torch.ones_like(scales))


def _pack_int4(q: Tensor) -> Tensor:
    pairs = (q & 15).view(q.shape[0], q.shape[1] // 2, 2).to(torch.uint8)
    return pairs[..., 0] | pairs[..., 1] << 4


def _unpack_int4(packed: Tensor) -> Tensor:
    nibbles = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(1).to(torch.int8)
    return (nibbles ^ 8) - 8
