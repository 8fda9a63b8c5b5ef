"""S, and X, of the low-rank branch beside a sparse weight (SLoRB, arXiv 2407.20584, section 3.3), fitted to what the
mask takes.

With P = (1 - m) * W the branch shall have S X close to P. Three ways to choose it:

    mean  X the block indicator, S the mean of P over each group: least |P - S X|_F. The error falls by exactly
          |S X|_F^2, which is group * |S|_F^2 for full groups. It knows nothing of the inputs, and where they are
          correlated it can make the layer's output worse.
    data  X the block indicator, S = P H X^T (X H X^T + eps I)^-1, H = sum of x x^T: least error of the output,
          sum over tokens of |(P - S X) x|^2.
    svd   X free, S X the best matrix of its rank for the same error, with no more numbers than the frozen-X branch
          stores, N ceil(K / group): rank r = N ceil(K / group) // (N + K).

With U the r leading left singular vectors of P L, L L^T = H, the best rank-r product is U U^T P: S = U and X = U^T P,
and no inverse of L is needed. Without H both errors are the same and L = I.
"""

import torch
from torch import Tensor

from sparsekit.errors import NonFiniteError
from sparsekit.nn.side import block_indicator
from sparsekit.nn.side_columns import group_sums
from sparsekit.plan import SideBranch
from sparsekit.registry import unknown

METHODS = ("mean", "data", "svd")


def fit_side(
    w_NK: Tensor,
    keep_NK: Tensor,
    group: int = 16,
    method: str = "mean",
    hessian: Tensor | None = None,
    damp: float = 1e-4,
) -> SideBranch:
    """Return the branch that stands in for the removed weights; fp32, fitted in fp64.

    Args:
        w_NK: dense weight [N, K], floating.
        keep_NK: boolean [N, K], True = kept.
        group: features that share a column of S; any positive number, the last group may be shorter.
        method: "mean", "data" or "svd", see above. The sum over a group (without the 1/k) is no method here: it makes
            the error (k - 2) times larger where the mean takes 1/k of it away.
        hessian: sum (or mean) over tokens of x x^T, [K, K]; "data" needs it, "svd" uses it, "mean" has no use for it.
        damp: ridge, in units of the mean diagonal of what is inverted; for "data" only, and "svd" where N > K.
    Raises:
        ValueError: unknown method, shapes that do not fit, a Hessian that is missing, not wanted, zero or singular, or
            a budget too small for one column.
        NonFiniteError: a weight or the Hessian holds NaN or infinity.
    """
    if method not in METHODS:
        raise ValueError(unknown("method", method, list(METHODS)))
    _check(w_NK, keep_NK, group, hessian, damp)
    if method == "data" and hessian is None:
        raise ValueError("method='data' needs hessian=, the sum of x x^T over the layer's inputs, [K, K]")
    if method == "mean" and hessian is not None:
        raise ValueError("method='mean' makes no use of a hessian: leave it out, or use method='data'")
    N, K = w_NK.shape
    P = torch.where(keep_NK, 0, w_NK.detach().double())
    if method == "svd":
        return _svd(P, group, None if hessian is None else hessian.double(), damp)
    if hessian is None:
        sizes = group_sums(P.new_ones(K), group)
        return SideBranch((group_sums(P, group) / sizes).float(), None, group)
    H = hessian.double()
    C = group_sums(P @ H, group)
    Z = group_sums(group_sums(H, group).T, group)
    return SideBranch(_solve(C, Z, damp), None, group)


def fit_residual(C: Tensor, Z: Tensor, damp: float = 1e-4) -> Tensor:
    """Return the change of S that brings a branch nearest to what its layer lacks: dS = C (Z + eps I)^-1, fp32 [N, r].

    Args:
        C: sum over tokens of r z^T, [N, r]; r is the output that is missing with the branch as it is.
        Z: sum over the same tokens of z z^T, [r, r]; z is the input of S, see `SideLinear.reduce`.
        damp: eps in units of the mean diagonal of Z. It pulls dS towards zero, S towards what it is.
    Raises:
        ValueError: shapes that do not fit, or Z is zero or singular.
        NonFiniteError: NaN or infinity in C or Z.
    """
    if C.dim() != 2 or Z.shape != (C.shape[1], C.shape[1]):
        raise ValueError(f"C is {tuple(C.shape)} and Z is {tuple(Z.shape)}: give C [N, r] and Z [r, r]")
    _check_damp(damp)
    if not bool(C.isfinite().all() & Z.isfinite().all()):
        raise NonFiniteError("C or Z holds NaN or infinity: leave out the tokens that make it")
    return _solve(C.double(), Z.double(), damp)


def output_error(w_NK: Tensor, keep_NK: Tensor, hessian: Tensor, branch: SideBranch | None = None) -> float:
    """Return sum over tokens of |(W - W*m - S X) x|^2 from H = sum of x x^T, in fp64; without a branch, S X = 0."""
    E = torch.where(keep_NK, 0, w_NK.detach().double())
    if branch is not None:
        X = block_indicator(E.shape[1], branch.group).to(E.device) if branch.X is None else branch.X
        E = E - branch.S.double() @ X.double()
    return float(((E @ hessian.double()) * E).sum())


def _svd(P: Tensor, group: int, H: Tensor | None, damp: float) -> SideBranch:
    N, K = P.shape
    rank = N * -(-K // group) // (N + K)
    if rank == 0:
        raise ValueError(
            f"group={group} leaves {N * -(-K // group)} numbers, and one column of S and row of X are {N + K}: "
            "use a smaller group, or method='data'"
        )
    if N <= K:
        gram = P @ P.T if H is None else P @ H @ P.T
        U = torch.linalg.eigh(gram).eigenvectors[:, -rank:]
    else:
        PL = P if H is None else P @ _factor(H, damp)
        V = torch.linalg.eigh(PL.T @ PL).eigenvectors[:, -rank:]
        U = torch.linalg.qr(PL @ V).Q
    X = U.T @ P
    # z as large as x, so that 16 bits hold it and one learning rate serves both factors
    energy_x, energy_z = (K, X.square().sum()) if H is None else (H.trace(), ((X @ H) * X).sum())
    size = (energy_z / rank / energy_x * K).sqrt()
    size = torch.where(size > 0, size, 1)  # nothing was removed
    return SideBranch((U * size).float(), (X / size).float(), group)


def _solve(C: Tensor, Z: Tensor, damp: float) -> Tensor:
    return torch.cholesky_solve(C.T, _factor(Z, damp)).T.float().contiguous()


def _factor(Z: Tensor, damp: float) -> Tensor:
    """Return the lower Cholesky factor of Z + damp * mean(diag Z) * I."""
    level = Z.diagonal().mean()
    if not float(level) > 0:
        raise ValueError("the sums of squares are zero: the layer saw no input, give it tokens that reach it")
    factor, failed = torch.linalg.cholesky_ex(Z + torch.diag(torch.full_like(Z.diagonal(), damp) * level))
    if failed:
        raise ValueError(f"the sums of squares are singular with damp={damp}: use a larger one, as 1e-2")
    return factor


def _check(w_NK: Tensor, keep_NK: Tensor, group: int, hessian: Tensor | None, damp: float) -> None:
    if w_NK.dim() != 2 or not w_NK.is_floating_point():
        raise ValueError(f"w_NK must be a floating matrix, got {w_NK.dtype} of shape {tuple(w_NK.shape)}")
    if keep_NK.dtype != torch.bool or keep_NK.shape != w_NK.shape:
        raise ValueError(
            f"keep_NK must be boolean {tuple(w_NK.shape)}, got {keep_NK.dtype} of shape {tuple(keep_NK.shape)}"
        )
    if not isinstance(group, int) or group < 1:
        raise ValueError(f"group={group!r} is no number of features: use 1 or more, as 16")
    _check_damp(damp)
    if not bool(w_NK.isfinite().all()):
        raise NonFiniteError("the weight holds NaN or infinity: mend it first")
    if hessian is None:
        return
    K = w_NK.shape[1]
    if hessian.shape != (K, K):
        raise ValueError(f"the hessian is {tuple(hessian.shape)}, the weight has {K} features: give [{K}, {K}]")
    if not bool(hessian.isfinite().all()):
        raise NonFiniteError("the hessian holds NaN or infinity: leave out the samples that make it")


def _check_damp(damp: float) -> None:
    if not 0 <= damp < float("inf"):
        raise ValueError(f"damp={damp} is no share of the diagonal: use 0 or more, as 1e-4")
