"""Weights on the grid of a quantised format: numbers q that the format can store, times scales that columns share.

`semi24_int4` has a scale for each row and 128 columns, the 8-bit formats one for each row, see
`sparsekit_kernels.quant`. Here a weight is held as [K, N], as a walk over its columns has it.
"""

from dataclasses import dataclass
from typing import Self, TypeGuard

import torch
from sparsekit_kernels.quant import GRIDS
from torch import Tensor


def is_quantised(format: str | None) -> TypeGuard[str]:
    """Return whether this format rounds what it packs."""
    return format in GRIDS


def scale_spans(format: str | None, K: int) -> list[slice]:
    """Return the columns that share a scale, span by span; one span of all where the format rounds nothing."""
    size = (GRIDS[format].columns if is_quantised(format) else None) or K
    return [slice(first, min(first + size, K)) for first in range(0, K, size)]


_SHARES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4)
"""Of the grid that holds every weight. Trying them takes 3 % off the error at 4 bits where inputs differ 30 times."""


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
    def fitted(cls, format: str, w_KN: Tensor, costs_K: Tensor) -> Self:
        """Return, for each row, the grid with the least sum of costs_k * error_k^2; it may cut off the largest weights.

        Args:
            w_KN: the span's weights.
            costs_K: of an error in each column.
        """
        widest = cls.around(format, w_KN)
        best, least = widest.scales, torch.full_like(widest.scales, torch.inf)
        for share in _SHARES:
            grid = cls.of(format, widest.scales * share)
            cost = (grid.nearest(w_KN).sub_(w_KN).square_().mul_(costs_K[:, None])).sum(dim=0)
            best = torch.where(cost < least, grid.scales, best)
            least = torch.minimum(cost, least)
        return cls(format, best)

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


def refit_(w_KN: Tensor, grids: list[Grid], original_KN: Tensor, H: Tensor) -> list[Grid]:
    """Choose the scales of a rounded weight anew, its numbers q as they are, and return the new grids.

    In each row, w = sum over spans of f_span * w_span is brought nearest to the original in the layer's output, |.|_H:
    (A + ridge) (f - 1) = b, with A_ij = w_i^T H w_j and b_i = w_i^T H (original - w). The original is that from before
    pruning, so this makes up for a part of what was removed, too.

    Args:
        w_KN: the rounded weight; changed in place.
        grids: of its spans.
        original_KN: the weight that it stands for.
        H: Hessian [K, K].
    """
    K, N = w_KN.shape
    spans = scale_spans(grids[0].format, K)
    factors = torch.ones(N, len(spans), device=w_KN.device)
    for first in range(0, N, _REFIT_ROWS):
        rows = slice(first, first + _REFIT_ROWS)
        w = w_KN[:, rows]
        missing = (H @ (original_KN[:, rows] - w)).mul_(w)
        b = torch.stack([missing[span].sum(dim=0) for span in spans], dim=1).double()
        A = b.new_empty(len(b), len(spans), len(spans))
        for i, span in enumerate(spans):
            product = (H[:, span] @ w[span]).mul_(w)
            A[:, i] = torch.stack([product[other].sum(dim=0) for other in spans], dim=1)
        ridge = 1e-4 * A.diagonal(dim1=1, dim2=2).mean(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        A.diagonal(dim1=1, dim2=2).add_(ridge[:, None])
        factors[rows] += torch.linalg.solve(A, b).float()
    factors.nan_to_num_(1).clamp_(0.5, 2)  # beyond lies a row that is nearly nothing but rounding errors
    refitted = []
    for i, (grid, span) in enumerate(zip(grids, spans, strict=True)):
        refitted.append(Grid.of(grid.format, grid.scales * factors[:, i]))
        w_KN[span] = grid.numbers(w_KN[span]).mul_(refitted[-1].scales)
    return refitted


_REFIT_ROWS = 2048
"""Rows that are refitted together; bounds the memory, 4 KB a row for each 32 spans squared."""


def round_to_nearest(
    w_NK: Tensor, keep_NK: Tensor, format: str, costs_K: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the kept weights [N, K] rounded, each for itself, and the scales.

    Args:
        costs_K: of an error in each column, for scales with the least sum of costs_k * error_k^2; without them, scales
            just hold the largest weight.
    """
    w_KN = w_NK.T * keep_NK.T
    spans = scale_spans(format, w_KN.shape[0])
    grids = [
        Grid.around(format, w_KN[span]) if costs_K is None else Grid.fitted(format, w_KN[span], costs_K[span])
        for span in spans
    ]
    rounded = torch.cat([grid.nearest(w_KN[span]) for grid, span in zip(grids, spans, strict=True)])
    return rounded.T.contiguous(), stored_scales(grids)
