"""The one matrix that optimal-brain-surgeon updates need: U, upper triangular, with U^T U = H^-1.

Removing weight k changes the weights after it along row k of U, and costs w_k^2 / U_kk^2 (SparseGPT, section 3.3).
U comes from one Cholesky factorisation: turn H round (last row and column first), factor it, turn the factor round:
H = R R^T with R upper triangular, so U = R^-1. H^-1 itself is never formed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.calibration.statistics import Hessian


@dataclass(frozen=True)
class InverseFactor:
    """U and how it was had.

    Attributes:
        U: fp32 [K, K], upper triangular.
        dead: boolean [K], input features that were zero on every token.
        note: what had to be done beyond the asked damping, or "".
    """

    U: Tensor
    dead: Tensor
    note: str = ""


def inverse_factor(hessian: Hessian, dampening_frac: float, order: Tensor | None = None) -> InverseFactor | None:
    """Return U for H + dampening_frac * mean(diag H) * I, or None where H cannot be factored.

    With an `order` of the input features [K], rows and columns of H are first put into it.

    Where the factorisation fails, fp64 is tried, then ten and a hundred times the damping. The result is kept with
    the Hessian, so layers that share inputs share the work.
    """
    key = (dampening_frac, None if order is None else tuple(order.tolist()))
    if key not in hessian.factors:
        matrix = hessian.matrix if order is None else hessian.matrix[order][:, order]
        hessian.factors[key] = _factor(matrix, dampening_frac)
    found = hessian.factors[key]
    assert found is None or isinstance(found, InverseFactor)
    return found


def _factor(matrix: Tensor, dampening_frac: float) -> InverseFactor | None:
    diagonal = matrix.diagonal()
    dead = diagonal == 0
    level = diagonal[~dead].mean()
    strong = max(dampening_frac, 1e-3)
    for damping in (dampening_frac, 10 * strong, 100 * strong):
        shift = torch.where(dead, level, damping * level)
        for dtype in (torch.float32, torch.float64):
            U = _inverse_of_factor(matrix.to(dtype) + torch.diag(shift.to(dtype)))
            if U is not None:
                changes = [f"damping {damping:g} in place of {dampening_frac:g}"] if damping != dampening_frac else []
                changes += ["fp64"] if dtype is torch.float64 else []
                return InverseFactor(U.float(), dead, f"the Hessian needed {' and '.join(changes)}" if changes else "")
    return None


def _inverse_of_factor(matrix: Tensor) -> Tensor | None:
    lower, failed = torch.linalg.cholesky_ex(matrix.flip(0, 1))
    if failed:
        return None
    U = _invert_upper(lower.flip(0, 1))
    return U if bool(U.isfinite().all()) and bool((U.diagonal() > 0).all()) else None


def _invert_upper(R: Tensor) -> Tensor:
    """Return the inverse of an upper triangular matrix; by halves, so that nearly all of it is matrix products."""
    K = R.shape[0]
    if K <= 256:
        return torch.linalg.solve_triangular(R, torch.eye(K, dtype=R.dtype, device=R.device), upper=True)
    half = K // 2
    inverse = torch.zeros_like(R)
    inverse[:half, :half] = _invert_upper(R[:half, :half])
    inverse[half:, half:] = _invert_upper(R[half:, half:])
    inverse[:half, half:] = -(inverse[:half, :half] @ R[:half, half:]) @ inverse[half:, half:]
    return inverse
