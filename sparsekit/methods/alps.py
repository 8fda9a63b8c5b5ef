"""ALPS (arXiv 2406.07831): remove weights and move the others as one least-squares problem, not column by column.

Find the W that obeys the pattern and has the least |X (W0 - W)^T|^2 + l |W0 - W|^2 = tr((W0 - W) H (W0 - W)^T), with H
= X^T X + l I (section 3.1). ADMM splits that in two which are easy (section 3.2): W meets the data, D the pattern, and
V is the price of their difference:

    W <- (W0 H - V + rho D) (H + rho)^-1,    D <- what the pattern keeps of W + V / rho,    V <- V + rho (W - D)

rho grows while D still changes what it keeps, the faster the more it does; once D keeps the weights that it kept three
steps before, that is the mask. The weights in it are then fitted by conjugate gradients, all rows at a time (section
3.3).

ADMM ends where it ends; with uncorrelated inputs, for one, that need not be the largest weights. So, beyond the paper,
one exchange is tried at last: the mask of W + (W0 - W) H, a step down the gradient, is fitted too, and taken by the
rows that it brings nearer.

All this happens in coordinates in which H has a unit diagonal: weights are compared by what they do to the output, and
Jacobi's preconditioner is the identity.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.calibration.statistics import Hessian, Statistics
from sparsekit.methods.base import METHODS, Decision, OneShot
from sparsekit.methods.grid import is_quantised
from sparsekit.methods.sparsegpt import SparseGPT
from sparsekit.methods.wanda import pruned_by_wanda
from sparsekit.patterns import NM

_RHO = 0.1
"""To begin with."""

_EVERY = 3
"""Steps after which rho is looked at."""

_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
"""(share of the kept weights that changed, factor on rho where it was more than that)."""

_FITTED = 1e-5
"""Residual, relative to the right-hand side, at which the fit of a row is done; fp32 gets no further."""


@dataclass(frozen=True, kw_only=True)
class ALPS(OneShot):
    """Pruning and refitting by ADMM and conjugate gradients; kept weights change.

    With a quantised `format` the result is rounded by a pass of SparseGPT: later columns make up for each error.

    Attributes:
        dampening_frac: l, as a share of the mean diagonal of X^T X.
        max_steps: of ADMM; it mostly ends after 20 to 100, when the mask stays.
        max_fit_steps: of conjugate gradients.
    """

    dampening_frac: float = 0.01
    max_steps: int = 300
    max_fit_steps: int = 100

    name = "alps"
    statistics = Hessian
    updates_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.dampening_frac < float("inf"):
            raise ValueError(f"dampening_frac={self.dampening_frac} must be more than 0, as 0.01")
        for name in ("max_steps", "max_fit_steps"):
            steps = getattr(self, name)
            if not isinstance(steps, int) or steps < 1:
                raise ValueError(f"{name}={steps!r} must be a whole number of steps, as 100")

    def decide(self, w_NK: Tensor, statistics: Statistics | None) -> Decision:
        assert isinstance(statistics, Hessian), "ALPS needs the Hessian of the inputs"
        if not bool(statistics.column_norms.any()):
            return pruned_by_wanda(self, w_NK, statistics, "its inputs were always zero")
        problem = _problem(statistics, self.dampening_frac)
        size = w_NK.abs().max().clamp_min(torch.finfo(torch.float32).tiny)  # squares are to stay within fp32
        w0_NK = (w_NK / size).masked_fill(problem.dead, 0) * problem.norms
        try:
            keep = self._keep(w0_NK, problem)
        except torch.linalg.LinAlgError:
            return pruned_by_wanda(self, w_NK, statistics, "its Hessian could not be factored")
        fit = fitted(w0_NK, keep, problem.H, self.max_fit_steps)
        self._exchange_(keep, fit, w0_NK, problem.H)
        weight = fit / problem.norms * size
        notes = []
        if num_dead := int(problem.dead.sum()):
            notes.append(f"{num_dead} of {len(problem.dead)} input features were always zero: their weights are now 0")
        if is_quantised(self.format):
            rounding = SparseGPT(pattern=self.pattern, format=self.format, dampening_frac=self.dampening_frac)
            rounded = rounding.decide(weight, statistics)
            return Decision(rounded.keep, rounded.weight, rounded.scales, (*notes, *rounded.notes))
        return Decision(keep, weight, notes=tuple(notes))

    def _keep(self, w0_NK: Tensor, problem: "_Problem") -> Tensor:
        """Return the mask that ADMM arrives at."""
        target = w0_NK @ problem.H
        keep = before = self.project(w0_NK.square())
        D, V = w0_NK * keep, torch.zeros_like(w0_NK)
        rho, inverse = _RHO, problem.inverse(_RHO)
        for step in range(1, self.max_steps + 1):
            W = torch.add(target - V, D, alpha=rho) @ inverse
            D = torch.add(W, V, alpha=1 / rho)
            keep = self.project(D.square())
            D.masked_fill_(~keep, 0)
            V.add_(W - D, alpha=rho)
            if step % _EVERY == 0:
                changed = int((keep ^ before).sum()) / max(int(keep.sum()), 1)
                if changed == 0:
                    break
                rho *= next(factor for share, factor in _GROWTH if changed > share)
                before, inverse = keep, problem.inverse(rho)
        return keep

    def _exchange_(self, keep: Tensor, fit: Tensor, w0_NK: Tensor, H: Tensor) -> None:
        """Exchange kept weights for others, and fit anew, where that brings the output nearer; in place."""
        other = self.project(torch.addmm(fit, w0_NK - fit, H).square())
        rows, rows_are_free = (other ^ keep).any(dim=1), isinstance(self.parsed_pattern, NM)
        rows = rows.nonzero()[:, 0] if rows_are_free else torch.arange(len(rows), device=rows.device)
        refit = fitted(w0_NK[rows], other[rows], H, self.max_fit_steps)
        gains = _losses(w0_NK[rows] - fit[rows], H) - _losses(w0_NK[rows] - refit, H)
        better = gains > 0 if rows_are_free else (gains.sum() > 0).expand_as(gains)
        keep[rows[better]], fit[rows[better]] = other[rows[better]], refit[better]


@dataclass(frozen=True)
class _Problem:
    """H of a layer, damped, and scaled to a unit diagonal.

    Attributes:
        H: fp32 [K, K].
        norms: fp32 [K]; a weight times these is one in the scaled coordinates.
        dead: boolean [K], input features that were zero on every token.
    """

    H: Tensor
    norms: Tensor
    dead: Tensor

    def inverse(self, rho: float) -> Tensor:
        """Return (H + rho)^-1. No eigenvalue lies below rho, so fp32 is enough, whatever the condition of H.

        Cholesky, not the paper's eigendecomposition: that costs several of these, and each inverse then as much again.

        Raises:
            LinAlgError: H is no Hessian.
        """
        shifted = self.H.clone()
        shifted.diagonal().add_(rho)
        return torch.cholesky_inverse(torch.linalg.cholesky(shifted))


def _problem(hessian: Hessian, dampening_frac: float) -> _Problem:
    diagonal = hessian.matrix.diagonal()
    dead = diagonal == 0
    level = diagonal[~dead].mean()
    damped = hessian.matrix + torch.diag(torch.where(dead, level, dampening_frac * level))
    norms = damped.diagonal().sqrt()
    return _Problem(damped / norms / norms[:, None], norms, dead)


def fitted(w0_NK: Tensor, keep: Tensor, H: Tensor, max_steps: int) -> Tensor:
    """Return the W with zeros outside `keep` that has the least tr((W0 - W) H (W0 - W)^T), by conjugate gradients.

    Args:
        w0_NK: fp32 [N, K].
        keep: boolean [N, K].
        H: fp32 [K, K], positive definite, with a unit diagonal: elsewhere the steps are many.
        max_steps: at most.
    """
    W = w0_NK * keep
    residual = ((w0_NK - W) @ H).mul_(keep)
    direction, squares = residual.clone(), residual.square().sum(dim=1)
    enough = _FITTED**2 * (w0_NK @ H).mul_(keep).square().sum(dim=1)
    for _ in range(max_steps):
        if bool((squares <= enough).all()):
            break
        image = (direction @ H).mul_(keep)
        curvature = (direction * image).sum(dim=1)
        step = torch.where((curvature > 0) & (squares > enough), squares / curvature, 0.0)[:, None]
        W.addcmul_(direction, step)
        residual.addcmul_(image, step, value=-1)
        before, squares = squares, residual.square().sum(dim=1)
        direction.mul_((squares / before.clamp_min(torch.finfo(before.dtype).tiny))[:, None]).add_(residual)
    return W


def _losses(change_NK: Tensor, H: Tensor) -> Tensor:
    """Return how far a change of the weight moves the output of each row, [N]."""
    return (change_NK @ H).mul_(change_NK).sum(dim=1)


METHODS.register("alps", ALPS)
