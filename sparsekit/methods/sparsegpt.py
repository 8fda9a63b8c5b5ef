"""SparseGPT (arXiv 2301.00774): remove weights, and let those that stay make up for it.

Column by column: the removed entries of column k leave the error e = w_k / U_kk in each row, and the columns after it
take W[:, k+1:] -= e U[k, k+1:], the exact least-squares answer for the columns not yet fixed (eq. 3 and algorithm 1).
U is from `inverse_factor`. What to remove is chosen as the columns come, from the weights as updated so far, by
w^2 / U_kk^2: for N:M in each group as it is reached, for the unstructured pattern in each block of `block_size`
columns, across all rows. Blocks of weights are chosen before the walk, by the joint error of a whole tile.

Where the result goes into a quantised format, kept weights are rounded in the same walk: column k then leaves the error
e = (w_k - q_k * scale) / U_kk, with q_k = 0 where it was removed, and the columns after it make up for both. The scales
must be known by then; they are chosen from a walk ahead that rounds nothing, and once more when all is done (`refit_`).

The weight is held as [K, N], so that a column is contiguous, and updates are lazy on two levels: a column at once
reaches only the columns of its strip; a strip then reaches its block, and a block the rest, as matrix products.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.calibration.statistics import Hessian, Statistics
from sparsekit.methods.base import METHODS, Decision, OneShot
from sparsekit.methods.grid import Grid, is_quantised, refit_, scale_spans, stored_scales
from sparsekit.methods.inverse_factor import inverse_factor
from sparsekit.methods.wanda import pruned_by_wanda
from sparsekit.patterns import NM, Block, Unstructured

_STRIP = 8
"""Columns that a single removed column reaches at once. 8: 4.4 s for a 4096x4096 layer on two cores; 32: 10.4 s."""


@dataclass(frozen=True, kw_only=True)
class SparseGPT(OneShot):
    """Pruning with compensation by the layer's Hessian; kept weights change.

    Attributes:
        dampening_frac: share of the mean diagonal of H that is added to it (section 3.4 and the official code: 0.01).
        block_size: columns that are updated together, and, for "unstructured", chosen together (table 7: 128).
        strongest_first: walk over the columns (groups of them, for N:M) from the strongest input to the weakest, which
            leaves the most columns to make up for the errors that matter most. False is the order of the paper. None:
            True with a quantised format, else False.
    """

    dampening_frac: float = 0.01
    block_size: int = 128
    strongest_first: bool | None = None

    name = "sparsegpt"
    statistics = Hessian
    updates_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.dampening_frac < float("inf"):
            raise ValueError(f"dampening_frac={self.dampening_frac} must be at least 0, as 0.01")
        if not isinstance(self.block_size, int) or self.block_size < 1:
            raise ValueError(f"block_size={self.block_size!r} must be a whole number of columns, as 128")

    def decide(self, w_NK: Tensor, statistics: Statistics | None) -> Decision:
        assert isinstance(statistics, Hessian), "SparseGPT needs the Hessian of the inputs"
        order = self._order(statistics)
        silent = bool((statistics.column_norms == 0).all())
        factor = None if silent else inverse_factor(statistics, self.dampening_frac, order)
        if factor is None:
            return pruned_by_wanda(self, w_NK, statistics, "its Hessian could not be factored")
        w_KN = (w_NK.T if order is None else w_NK.T[order]).clone(memory_format=torch.contiguous_format)
        w_KN[factor.dead] = 0
        known = self._known_keep(w_KN, factor.U)
        grids = self._find_grids(w_KN, factor.U, known, order)
        keep_KN = self._prune_(w_KN, factor.U, known, _grid_of_each_column(grids, order, len(w_KN)))
        if order is not None:
            back = order.argsort()
            w_KN, keep_KN = w_KN[back], keep_KN[back]
        if not w_KN.isfinite().all():
            return pruned_by_wanda(self, w_NK, statistics, "its update overflowed")
        if grids:
            grids = refit_(w_KN, grids, w_NK.T, statistics.matrix)
        notes = [factor.note] if factor.note else []
        dead = factor.dead if order is None else factor.dead[back]
        if num_dead := int((dead & w_NK.any(dim=0)).sum()):
            notes.append(f"{num_dead} of {dead.numel()} input features were always zero: their weights are now 0")
        scales = stored_scales(grids) if grids else None
        return Decision(keep_KN.T.contiguous(), w_KN.T, scales, tuple(notes))

    def _order(self, statistics: Hessian) -> Tensor | None:
        """Return the input features [K] in the order of the walk; None for the order that they have."""
        sorts = is_quantised(self.format) if self.strongest_first is None else self.strongest_first
        if not sorts:
            return None
        pattern, diagonal = self.parsed_pattern, statistics.matrix.diagonal()
        unit = pattern.m if isinstance(pattern, NM) else pattern.columns if isinstance(pattern, Block) else 1
        index = torch.arange(len(diagonal), device=diagonal.device)
        whole = (len(diagonal) - statistics.num_last) // unit * unit
        by_strength = diagonal[:whole].view(-1, unit).sum(dim=1).argsort(descending=True, stable=True)
        return torch.cat((index[:whole].view(-1, unit)[by_strength].flatten(), index[whole:]))

    def _known_keep(self, w_KN: Tensor, U: Tensor) -> Tensor | None:
        """Return what is known of `keep` [K, N] before the walk; None where the walk is to choose.

        A weight that is only rounded, having obeyed the pattern when it came, keeps its zeros.
        """
        pattern = self.parsed_pattern
        if isinstance(pattern, Block):
            return self._choose_tiles(w_KN, U)
        if is_quantised(self.format) and pattern.count_violations(w_KN.T != 0) == 0:
            return self.project(w_KN.T.abs()).T.contiguous()
        return None

    def _find_grids(self, w_KN: Tensor, U: Tensor, known: Tensor | None, order: Tensor | None) -> list[Grid]:
        """Return the grid of each span of columns that share a scale; none where nothing is rounded.

        Kept weights grow on the way, and only at the end show how wide a grid must be: so a copy is walked ahead,
        without rounding.
        """
        if not is_quantised(self.format):
            return []
        ahead, costs_K = w_KN.clone(), U.diagonal().square().reciprocal()
        self._prune_(ahead, U, known)
        if order is not None:
            back = order.argsort()
            ahead, costs_K = ahead[back], costs_K[back]
        spans = scale_spans(self.format, len(ahead))
        return [Grid.fitted(self.format, ahead[span], costs_K[span]) for span in spans]

    def _prune_(
        self, w_KN: Tensor, U: Tensor, known: Tensor | None, grids: Sequence[Grid | None] | None = None
    ) -> Tensor:
        """Remove, round and compensate in place; return `keep` as [K, N].

        Args:
            known: `keep`, where it has been chosen before.
            grids: of each column; None where nothing is rounded.
        """
        pattern = self.parsed_pattern
        K, N = w_KN.shape
        group = pattern.m if isinstance(pattern, NM) else 1
        choose = pattern if known is None and isinstance(pattern, NM) else None
        grids = grids or [None] * K
        keep_KN = torch.ones_like(w_KN, dtype=torch.bool) if known is None else known.clone()
        errors = torch.empty_like(w_KN)
        num_removed = 0
        for block in _spans(0, K, self.block_size, group):
            if isinstance(pattern, Unstructured):
                due = round(self.sparsity * block.stop * N) - num_removed
                scores_NK = (w_KN[block] / U.diagonal()[block, None]).square().T
                keep_KN[block] = pattern.project(scores_NK, due / scores_NK.numel()).T
                num_removed += due
            for strip in _spans(block.start, block.stop, _STRIP, group):
                self._prune_strip_(w_KN[strip], U[strip, strip], keep_KN[strip], errors[strip], choose, grids[strip])
                w_KN[strip.stop : block.stop].addmm_(U[strip, strip.stop : block.stop].T, errors[strip], alpha=-1)
            w_KN[block.stop :].addmm_(U[block, block.stop :].T, errors[block], alpha=-1)
        return keep_KN

    def _prune_strip_(
        self, w_KN: Tensor, U: Tensor, keep_KN: Tensor, errors: Tensor, choose: NM | None, grids: Sequence[Grid | None]
    ) -> None:
        diagonal = U.diagonal().tolist()
        for k, (pivot, grid) in enumerate(zip(diagonal, grids, strict=True)):
            if choose is not None and k % choose.m == 0:
                group = slice(k, k + choose.m)
                keep_KN[group] = _keep_largest_of_columns((w_KN[group] / U.diagonal()[group, None]).square(), choose.n)
            if grid is None:
                torch.div(w_KN[k], pivot, out=errors[k]).masked_fill_(keep_KN[k], 0)
                w_KN[k].masked_fill_(~keep_KN[k], 0)
            else:
                target = grid.nearest(w_KN[k]).masked_fill_(~keep_KN[k], 0)
                torch.div(w_KN[k] - target, pivot, out=errors[k])
                w_KN[k] = target
            w_KN[k + 1 :].addr_(U[k, k + 1 :], errors[k], alpha=-1)

    def _choose_tiles(self, w_KN: Tensor, U: Tensor) -> Tensor:
        """Return `keep` [K, N] without the tiles whose removal costs least: w (H^-1 of the tile)^-1 w^T, by row."""
        pattern = self.parsed_pattern
        assert isinstance(pattern, Block)
        costs = torch.zeros_like(w_KN)
        for span in _spans(0, w_KN.shape[0], pattern.columns, 1):
            factor = torch.linalg.cholesky(U[:, span].T @ U[:, span])
            costs[span] = torch.linalg.solve_triangular(factor, w_KN[span], upper=False).square()
        return pattern.project(costs.T, self.sparsity).T.contiguous()


def _grid_of_each_column(grids: list[Grid], order: Tensor | None, K: int) -> list[Grid] | None:
    """Return the grids column by column as the walk comes to them; None where there are none."""
    if not grids:
        return None
    spans = scale_spans(grids[0].format, K)
    each = [grid for grid, span in zip(grids, spans, strict=True) for _ in range(span.start, span.stop)]
    return each if order is None else [each[k] for k in order.tolist()]


def _spans(start: int, stop: int, size: int, multiple_of: int) -> Iterator[slice]:
    """Cut start..stop into spans of about `size`, each but the last a multiple of `multiple_of`."""
    size = max(size // multiple_of, 1) * multiple_of
    for first in range(start, stop, size):
        yield slice(first, min(first + size, stop))


def _keep_largest_of_columns(scores: Tensor, n: int) -> Tensor:
    """Return the `n` largest of each column of [m, N]; among equals the lower index."""
    rank = torch.zeros(scores.shape, dtype=torch.int16, device=scores.device)
    for k in range(scores.shape[0] - 1):
        beats = scores[k] >= scores[k + 1 :]
        rank[k + 1 :] += beats
        rank[k] += (~beats).sum(dim=0, dtype=torch.int16)
    return rank < n


METHODS.register("sparsegpt", SparseGPT)
