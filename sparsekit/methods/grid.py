"""Weights on the grid of a quantised format: numbers q that the format can store, times scales that columns share.

`semi24_int4` has a scale for each row and 128 columns, the 8-bit formats one for each row, see
`sparsekit_kernels.quant`. Here a weight is held as [K, N], as a walk over its columns has it.
"""

from dataclasses import dataclass
from typing import Self

import torch
from sparsekit_kernels.quant import GRIDS
from torch import Tensor


def is_quantised(format: str | None) -> bool:
    """Return whether this format rounds what it packs."""
    return format in GRIDS


def scale_columns(format: str) -> int | None:
    """Return how many columns share a scale; None for all of a row."""
    return GRIDS[format].columns


def scale_spans(format: str, K: int) -> list[slice]:
    """Return the columns that share a scale, span by span."""
    size = scale_columns(format) or K
    return [slice(first, min(first + size, K)) for first in range(0, K, size)]


@dataclass(frozen=True)
class Grid:
    """What one span of columns can hold.

    Attributes:
        format: a quantised one.
        scales: fp32 [N], numbers that the format can store.
    """

    format: str
    scales: Tensor

    @classmethod
    def around(cls, format: str, w_KN: Tensor) -> Self:
        """Return the grid that just holds the largest weight of each row."""
        return cls.of(format, w_KN.abs().amax(dim=0) / GRIDS[format].largest)

    @classmethod
    def of(cls, format: str, scales: Tensor) -> Self:
        """Return the grid of these scales [N] as the format stores them; 1 stands for those that are not positive."""
        stored = scales.to(GRIDS[format].scale_dtype).float()
        return cls(format, torch.where(stored > 0, stored, 1.0))

    def numbers(self, w: Tensor) -> Tensor:
        """Return the q, fp32, nearest to w / scales; ties to even, beyond the end the end, and zero is +0.0."""
        kind = GRIDS[self.format]
        q = (w / self.scales).clamp_(-kind.largest, kind.largest)
        return (q.to(kind.storage).float() if kind.storage.is_floating_point else q.round_()).add_(0.0)

    def nearest(self, w: Tensor) -> Tensor:
        """Return q * scales for each of w: what the packed weight unpacks to, in fp32."""
        return self.numbers(w).mul_(self.scales)


def stored_scales(grids: list[Grid]) -> Tensor:
    """Return the scales of all spans of a weight in the shape and dtype of the format, [N] or [N, spans]."""
    kind = GRIDS[grids[0].format]
    scales = grids[0].scales if kind.columns is None else torch.stack([grid.scales for grid in grids], dim=1)
    return scales.to(kind.scale_dtype)


def round_to_nearest(w_NK: Tensor, keep_NK: Tensor, format: str) -> tuple[Tensor, Tensor]:
    """Return the kept weights [N, K] rounded, each for itself, and the scales."""
    w_KN = w_NK.T * keep_NK.T
    spans = scale_spans(format, w_KN.shape[0])
    grids = [Grid.around(format, w_KN[span]) for span in spans]
    rounded = torch.cat([grid.nearest(w_KN[span]) for grid, span in zip(grids, spans, strict=True)])
    return rounded.T.contiguous(), stored_scales(grids)
