"""Closed forms for what the units that stay can do for those that go. All of them read `Moments`, and change a reader.

From least to most: a new bias (FLAP), a scale for each unit (KCM, Kwon et al.), new columns (`refit`).
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.methods.structured.lsmr import Stop, lsmr
from sparsekit.methods.structured.moments import Moments, NormalEquations

LARGEST_SCALE = 10.0
"""Beyond this a tuned scale is taken for the sign of a failed fit (section 4.3 and the official code)."""


@dataclass(frozen=True)
class Recovered:
    """A reader as it is to be.

    Attributes:
        weight: [N, K], zero in the columns of units that go.
        bias: [N]; None where it stays as it is.
    """

    weight: Tensor
    bias: Tensor | None = None


def columns_of(units: Tensor, columns: int) -> Tensor:
    """Return the columns, `columns` for each unit, int64 [n * columns]."""
    return (units[:, None] * columns + torch.arange(columns, device=units.device)).flatten()


def only_columns(w_NK: Tensor, kept: Tensor) -> Tensor:
    """Return the weight with zeros in all columns but `kept` (int64 [n])."""
    out = torch.zeros_like(w_NK)
    out[:, kept] = w_NK[:, kept]
    return out


def mean_bias(w_NK: Tensor, bias: Tensor, kept: Tensor, mean_inputs: Tensor) -> Recovered:
    """Let the bias take over what the columns that go gave on average (FLAP, arXiv 2312.11983, eq. 6).

    Args:
        w_NK, bias: of the reader.
        kept: int64 [n], columns.
        mean_inputs: mean of a over the tokens, [K].
    """
    weight = only_columns(w_NK, kept)
    lost = (w_NK - weight).to(mean_inputs) @ mean_inputs
    return Recovered(weight, (bias.to(lost) + lost).to(bias.dtype))


def refit(moments: Moments, w_NK: Tensor, bias: Tensor | None, kept: Tensor, damping: float) -> Recovered:
    """Return the columns (and the bias, if there is one) that come nearest to the targets, by ridge regression:

        mean over tokens of |t - W a - b|² + λ|W - w|²,  λ = damping * mean diagonal of the mean of a aᵀ

    over W with columns `kept` only. With a bias, λ is relative to the variance of a instead. The ridge pulls to the old
    weight w, so an infinite one changes nothing.

    Args:
        moments: of inputs and targets.
        w_NK, bias: of the reader.
        kept: int64 [n], columns.
        damping: relative to the inputs, as 0.01.
    """
    equations = moments.normal_equations(bias, intercept=bias is not None).damped_(w_NK, damping)
    columns = kept.to(equations.H.device)
    weight = torch.zeros_like(equations.C)
    weight[:, columns] = solve(equations.H[columns][:, columns], equations.C[:, columns].T).T
    return finished(weight, bias, equations)


def finished(weight: Tensor, bias: Tensor | None, equations: NormalEquations) -> Recovered:
    """Return the reader with this weight, and the bias that belongs to it."""
    new_bias = equations.bias_for(weight)
    return Recovered(weight, None if bias is None or new_bias is None else new_bias.to(bias.dtype))


def solve(H: Tensor, B: Tensor) -> Tensor:
    """Return H⁻¹ B for a symmetric H that should be positive definite; by eigenvalues where rounding made it less."""
    factor, failed = torch.linalg.cholesky_ex(H)
    if not bool(failed):
        return torch.cholesky_solve(B, factor)
    values, vectors = torch.linalg.eigh(H)
    floor = values.abs().max() * H.shape[0] * torch.finfo(H.dtype).eps
    return vectors @ ((vectors.T @ B) / values.clamp_min(floor)[:, None])


@dataclass(frozen=True)
class Tuned:
    """Scales for the kept units, or why there are none.

    Attributes:
        scales: float64 [n]; ones where `failure` says why.
        failure: "" where the tuning held.
    """

    scales: Tensor
    failure: str = ""


def tune_scales(
    moments: Moments,
    w_NK: Tensor,
    bias: Tensor | None,
    kept: Tensor,
    columns: int,
    *,
    offset: bool = False,
    damp: float = 1.0,
) -> Tuned:
    """Return a scale m for each kept unit: the least squares of |t - b - Σ_u m_u W_u a_u|² over all tokens
    (Kwon et al., arXiv 2204.09656, section 4.3).

    The normal equations M m = v have M = (WᵀW) ⊙ Σ a aᵀ and v_j = Σ a_j ⟨w_j, t - b⟩, summed over the columns of a
    unit. With m = 1 + r, LSMR minimises |M r - (v - M 1)|² + damp²|r|², as the official code has it.

    Args:
        moments: of the inputs, and of the targets that the teacher gives.
        w_NK, bias: of the reader.
        kept: int64 [n], units.
        columns: columns of a unit.
        offset: let one more number, added to all outputs alike, take part in the fit, and forget it (for heads).
        damp: of the change r.
    """
    w = w_NK.double().cpu()[:, columns_of(kept.cpu(), columns)]
    chosen = columns_of(kept.cpu(), columns)
    gram, cross = moments.gram.double().cpu()[chosen][:, chosen], moments.cross.double().cpu()[:, chosen]
    inputs, targets = moments.inputs.double().cpu()[chosen], moments.targets.double().cpu()
    if bias is not None:
        b = bias.double().cpu()
        cross, targets = cross - torch.outer(b, inputs), targets - b * moments.weight
    M = ((w.T @ w) * gram).unflatten(1, (-1, columns)).sum(2).unflatten(0, (-1, columns)).sum(1)
    v = (w * cross).sum(0).unflatten(0, (-1, columns)).sum(1)
    if offset:
        edge = (w.sum(0) * inputs).unflatten(0, (-1, columns)).sum(1)
        corner = moments.weight * len(w)
        M = torch.cat((torch.cat((M, edge[:, None]), 1), torch.cat((edge, edge.new_tensor([corner])))[None]))
        v = torch.cat((v, targets.sum()[None]))
    rest = v - M.sum(dim=1)
    none = torch.ones(len(kept), dtype=torch.float64)
    if len(v) == 1:
        change, stop = rest / M[0, 0] if float(M[0, 0]) else torch.zeros_like(rest), Stop.SOLVED
    else:
        change, stop = lsmr(M, rest, damp=damp)
    if stop >= Stop.ILL_CONDITIONED:
        return Tuned(none, f"LSMR stopped: {stop.name.lower().replace('_', ' ')}")
    scales = (1 + change)[: len(kept)]
    if len(scales) and float(scales.abs().max()) > LARGEST_SCALE:
        return Tuned(none, f"a scale came out at {float(scales.abs().max()):.3g}, beyond {LARGEST_SCALE:g}")
    return Tuned(scales)
