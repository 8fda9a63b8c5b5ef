"""Units taken out one after the other, each time the one that the others can make up for best.

Optimal brain surgery on whole columns (ZipLM, arXiv 2302.04089; SlimGPT, arXiv 2412.18110). With W the least-squares
answer for the columns that are left and P = H⁻¹ of them, to lose the columns S of a unit costs

    tr(W_S M⁻¹ W_Sᵀ),  M = P_SS,

and leaves W - W_S M⁻¹ P_S and P - P_:S M⁻¹ P_S: the least-squares answer for the columns that are left then. So what is
small and what is redundant goes alike, and the refit of what stays comes along. The ridge pulls columns to their old
weights w, and no longer pulls one that is gone, so λ|w_S|² comes off its cost.

Single columns are many, so they go in batches: those that are cheapest now form a pool four times the batch, inside of
which the greedy order is exact; the large matrices see one product for each batch.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import Recovered, columns_of, finished, solve

_SHARE = 1 / 64
"""Of the columns that are left, how many go in one batch."""
_POOL = 4
"""Columns looked at for each that goes."""
_CROWDED = 7 / 8
"""The matrices shrink once fewer of their columns than this are left: a copy costs as much as a batch."""


@dataclass(frozen=True)
class Removal:
    """A reader with some of its units gone.

    Attributes:
        kept: units, int64 [n], ascending.
        reader: its weight and bias, refitted to the units that are left.
        cost: by how much the error, with the pull of the ridge on what is left, grew from that of all units.
    """

    kept: Tensor
    reader: Recovered
    cost: float


@torch.no_grad()
def removals(
    moments: Moments, w_NK: Tensor, bias: Tensor | None, columns: int, stops: Iterable[int], damping: float
) -> Iterator[Removal]:
    """Yield the reader as it is when so many units are left, for each number in `stops`, from most to fewest.

    Args:
        moments: of inputs and targets.
        w_NK, bias: of the reader.
        columns: columns of a unit.
        stops: numbers of units.
        damping: of the ridge, as for `refit`; it pulls to `w_NK`.
    """
    equations = moments.normal_equations(bias, intercept=bias is not None).damped_(w_NK, damping)
    pulls = equations.strength * w_NK.to(equations.H).square().sum(dim=0).unflatten(0, (-1, columns)).sum(dim=1)
    P = _inverse(equations.H)
    state = _Reader(equations.C @ P, P, pulls, columns)
    cost = 0.0
    for stop in sorted(set(stops), reverse=True):
        while (num := state.num_left - stop) > 0:
            if columns == 1:
                gone, added = state.cheapest_columns(min(num, max(1, int(state.num_left * _SHARE))))
            else:
                gone, added = state.cheapest_unit()
            state.remove_(gone)
            cost += added
        kept = state.units[state.is_left].cpu()
        weight = torch.zeros_like(w_NK, dtype=P.dtype)
        weight[:, columns_of(kept, columns)] = state.W[:, state.is_left.repeat_interleave(columns)]
        yield Removal(kept, finished(weight, bias, equations), cost)


def _inverse(H: Tensor) -> Tensor:
    """Return H⁻¹ of a positive definite H; see `solve` for where rounding made it less."""
    factor, failed = torch.linalg.cholesky_ex(H)
    if bool(failed):
        return solve(H, torch.eye(len(H), dtype=H.dtype, device=H.device))
    return torch.cholesky_inverse(factor)


class _Reader:
    """W and P of the units that are left, and rows and columns of a few that are gone: those are zero."""

    def __init__(self, W: Tensor, P: Tensor, pulls: Tensor, columns: int) -> None:
        self.W, self.P, self.pulls, self.columns = W, P, pulls, columns
        self.units = torch.arange(len(pulls), device=P.device)
        self.is_left = torch.ones_like(self.units, dtype=torch.bool)

    @property
    def num_left(self) -> int:
        return int(self.is_left.sum())

    def remove_(self, gone: Tensor) -> None:
        """Take out units, by their places here."""
        S = columns_of(gone, self.columns)
        across = self.P[S]
        share = solve(across[:, S], across)
        self.W.addmm_(self.W[:, S], share, alpha=-1)
        self.P.addmm_(across.T, share, alpha=-1)
        self.is_left[gone] = False
        if self.num_left < _CROWDED * len(self.units):
            rest = self.is_left.nonzero().flatten()
            places = columns_of(rest, self.columns)
            self.W, self.P = self.W[:, places], self.P[places][:, places]
            self.units, self.pulls, self.is_left = self.units[rest], self.pulls[rest], self.is_left[rest]

    def cheapest_columns(self, num: int) -> tuple[Tensor, float]:
        """Return `num` columns that go one after the other, and what they cost together."""
        costs = (self.W.square().sum(dim=0) / self.P.diagonal() - self.pulls).masked_fill(~self.is_left, torch.inf)
        pool = costs.sort(stable=True).indices[: min(_POOL * num, self.num_left)]
        # Of the weights, no more than their products is needed to see what becomes of the costs.
        Q, P, pulls = self.W[:, pool].T @ self.W[:, pool], self.P[pool][:, pool], self.pulls[pool]
        gone: list[int] = []
        total = 0.0
        for _ in range(num):
            costs = Q.diagonal() / P.diagonal() - pulls
            costs[gone] = torch.inf
            index = int(costs.argmin())
            total += float(costs[index])
            share = P[index] / P[index, index]
            along = torch.outer(Q[index], share)
            Q = Q - along - along.T + Q[index, index] * torch.outer(share, share)
            P = P - torch.outer(P[:, index], share)
            gone.append(index)
        return pool[gone], total

    def cheapest_unit(self) -> tuple[Tensor, float]:
        """Return the unit that goes, int64 [1], and what it costs."""
        places = self.is_left.nonzero().flatten()
        c = self.columns
        blocks = self.P.unflatten(1, (-1, c)).unflatten(0, (-1, c)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        w = self.W.unflatten(1, (-1, c)).permute(1, 2, 0)[places]  # [units, c, N]
        costs = (w * torch.linalg.solve(blocks[places], w)).sum(dim=(1, 2)) - self.pulls[places]
        best = costs.argmin()
        return places[best][None], float(costs[best])
