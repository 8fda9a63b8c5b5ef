"""SparseGPT (arXiv 2301.00774): remove weights, and let those that stay make up for it.

Column by column: the removed entries of column k leave the error e = w_k / U_kk in each row, and the columns after it
take W[:, k+1:] -= e U[k, k+1:], the exact least-squares answer for the columns not yet fixed (eq. 3 and algorithm 1).
U is from `inverse_factor`. What to remove is chosen as the columns come, from the weights as updated so far, by
w^2 / U_kk^2: for N:M in each group as it is reached, for the unstructured pattern in each block of `block_size`
columns, across all rows. Blocks of weights are chosen before the walk, by the joint error of a whole tile.

The weight is held as [K, N], so that a column is contiguous, and updates are lazy on two levels: a column at once
reaches only the columns of its strip; a strip then reaches its block, and a block the rest, as matrix products.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from sparsekit.calibration.statistics import Hessian, Statistics
from sparsekit.methods.base import METHODS, Decision, OneShot
from sparsekit.methods.grid import Grid, is_quantised, scale_spans, stored_scales
from sparsekit.methods.inverse_factor import inverse_factor
from sparsekit.methods.wanda import Wanda
from sparsekit.patterns import NM, Block, Unstructured

_STRIP = 8
"""Columns that a single removed column reaches at once. 8: 4.4 s for a 4096x4096 layer on two cores; 32: 10.4 s."""


@dataclass(frozen=True, kw_only=True)
class SparseGPT(OneShot):
    """Pruning with compensation by the layer's Hessian; kept weights change.

    Attributes:
        dampening_frac: share of the mean diagonal of H that is added to it (section 3.4 and the official code: 0.01).
        block_size: columns that are updated together, and, for "unstructured", chosen together (table 7: 128).
    """

    dampening_frac: float = 0.01
    block_size: int = 128

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
        factor = None if bool((statistics.column_norms == 0).all()) else inverse_factor(statistics, self.dampening_frac)
        if factor is None:
            return self._fall_back(w_NK, statistics, "its Hessian could not be factored")
        w_KN = w_NK.T.clone(memory_format=torch.contiguous_format)
        w_KN[factor.dead] = 0
        keep_KN, grids = self._prune_(w_KN, factor.U, self._known_keep(w_NK, w_KN, factor.U))
        if not w_KN.isfinite().all():
            return self._fall_back(w_NK, statistics, "its update overflowed")
        notes = [factor.note] if factor.note else []
        if num_dead := int(factor.dead.sum()):
            notes.append(
                f"{num_dead} of {factor.dead.numel()} input features were always zero: their weights are now 0"
            )
        scales = stored_scales(grids) if grids else None
        return Decision(keep_KN.T.contiguous(), w_KN.T, scales, tuple(notes))

    def _fall_back(self, w_NK: Tensor, statistics: Statistics, reason: str) -> Decision:
        wanda = Wanda(pattern=self.pattern, sparsity=self.sparsity).decide(w_NK, statistics)
        return Decision(wanda.keep, notes=(f"{reason}: pruned by Wanda, without an update",))

    def _known_keep(self, w_NK: Tensor, w_KN: Tensor, U: Tensor) -> Tensor | None:
        """Return what is known of `keep` [K, N] before the walk; None where the walk is to choose.

        A weight that is only rounded, having obeyed the pattern when it came, keeps its zeros.
        """
        pattern = self.parsed_pattern
        if isinstance(pattern, Block):
            return self._choose_tiles(w_KN, U)
        if is_quantised(self.format) and pattern.count_violations(w_NK != 0) == 0:
            return self.project(w_NK.abs()).T.contiguous()
        return None

    def _prune_(self, w_KN: Tensor, U: Tensor, known: Tensor | None) -> tuple[Tensor, list[Grid]]:
        """Remove, round and compensate in place; return `keep` as [K, N], and the grid of each span of columns.

        Where weights are rounded, a span of columns that shares scales is first walked without rounding: its kept
        weights grow on the way, and only at the end show how wide the grid must be.
        """
        K, N = w_KN.shape
        keep_KN = torch.ones_like(w_KN, dtype=torch.bool) if known is None else known.clone()
        if self.format is None or not is_quantised(self.format):
            self._walk_(w_KN, U, keep_KN, slice(0, K), known is None, None)
            return keep_KN, []
        grids = []
        for span in scale_spans(self.format, K):
            ahead = w_KN[span].clone()
            replace(self, format=None)._prune_(ahead, U[span, span], None if known is None else known[span])
            grids.append(Grid.around(self.format, ahead))
            self._walk_(w_KN, U, keep_KN, span, known is None, grids[-1])
        return keep_KN, grids

    def _walk_(self, w_KN: Tensor, U: Tensor, keep_KN: Tensor, span: slice, choose: bool, grid: Grid | None) -> None:
        """Walk over the columns of `span`, and bring what they leave to all columns behind it."""
        pattern = self.parsed_pattern
        group = pattern.m if isinstance(pattern, NM) else 1
        N = w_KN.shape[1]
        for block in _spans(span.start, span.stop, self.block_size, group):
            errors = w_KN.new_empty(block.stop - block.start, N)
            if isinstance(pattern, Unstructured):
                due = round(self.sparsity * block.stop * N) - int((~keep_KN[: block.start]).sum())
                scores_NK = (w_KN[block] / U.diagonal()[block, None]).square().T
                keep_KN[block] = pattern.project(scores_NK, due / scores_NK.numel()).T
            for strip in _spans(block.start, block.stop, _STRIP, group):
                error = errors[strip.start - block.start : strip.stop - block.start]
                self._prune_strip_(w_KN[strip], U[strip, strip], keep_KN[strip], error, choose, grid)
                w_KN[strip.stop : block.stop].addmm_(U[strip, strip.stop : block.stop].T, error, alpha=-1)
            w_KN[block.stop :].addmm_(U[block, block.stop :].T, errors, alpha=-1)

    def _prune_strip_(
        self, w_KN: Tensor, U: Tensor, keep_KN: Tensor, errors: Tensor, choose: bool, grid: Grid | None
    ) -> None:
        pattern = self.parsed_pattern
        diagonal = U.diagonal().tolist()
        for k, pivot in enumerate(diagonal):
            if choose and isinstance(pattern, NM) and k % pattern.m == 0:
                group = slice(k, k + pattern.m)
                keep_KN[group] = _keep_largest_of_columns((w_KN[group] / U.diagonal()[group, None]).square(), pattern.n)
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
