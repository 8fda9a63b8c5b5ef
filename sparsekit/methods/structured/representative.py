"""R2, the representative ranking of KCM (arXiv 2303.04185): which filters the others cannot stand for.

A filter that is no convex combination of others, in a kernel space, is a vertex of their hull and must stay. With the
kernel K_ij = exp(-f |x_i - x_j|²/σ²) and C of non-negative coefficients, multiplicative updates

    C <- C * sqrt(K / (K C)),  from C = 1/N

descend on |Φ(X) - Φ(X) C|² = tr(K - 2 CᵀK + CᵀKC), and the score of filter j is C_jj.

What that computes is less than it says. C = I is a minimum, with nothing lost and all filters equal: converged scores
say nothing, and what they say comes from stopping early. After the first update C_jj = k̄_j^(-1/2) / N with k̄_j the mean
of K_ij over i, so the score is one of isolation, an inverse density, and stays so in rank for as many updates as are
made. `density_scores` returns that at once, without iterations.
"""

import torch
from torch import Tensor

_SMALLEST = 1e-30


def kernel_matrix(x_Nd: Tensor, sigma: float, factor: float = 1.0) -> Tensor:
    """Return K_ij = exp(-factor |x_i - x_j|² / sigma²), [N, N], with ones on the diagonal.

    Args:
        x_Nd: a filter in each row.
        sigma: width of the kernel, in the units of x.
        factor: 1 as in the public code of KCM; 0.5 for the other usual form.
    """
    K = squared_distances(x_Nd).mul_(-factor / sigma**2).exp_()
    K.fill_diagonal_(1)
    return K


def squared_distances(x_Nd: Tensor) -> Tensor:
    """Return |x_i - x_j|², [N, N], symmetric, no less than zero."""
    size = x_Nd.square().sum(dim=1)
    distances = (size[:, None] + size - 2 * (x_Nd @ x_Nd.T)).clamp_min_(0)
    distances.fill_diagonal_(0)
    return (distances + distances.T) / 2


def median_sigma(x_Nd: Tensor) -> float:
    """Return the σ for which the median filter pair has K = exp(-1): its distance."""
    distances = squared_distances(x_Nd)
    upper = distances[torch.triu(torch.ones_like(distances, dtype=torch.bool), diagonal=1)]
    return max(float(upper.median()) ** 0.5, _SMALLEST) if len(upper) else 1.0


def representative_scores(K: Tensor, *, tolerance: float = 0.01, max_iterations: int = 200) -> tuple[Tensor, int]:
    """Return C_jj after the multiplicative updates, [N], and how many there were.

    Args:
        K: kernel matrix, [N, N].
        tolerance: the updates end once the sum of C changes by less than this share of itself, in one update.
        max_iterations: and after so many.
    """
    N = len(K)
    C = torch.full_like(K, 1 / N)
    total = float(N)
    num_updates = 0
    while num_updates < max_iterations:
        num_updates += 1
        C = C * (K / (K @ C).clamp_min_(_SMALLEST)).sqrt_()
        before, total = total, float(C.sum())
        if abs(total - before) < tolerance * before:
            break
    return C.diagonal().clone(), num_updates


def density_scores(K: Tensor) -> Tensor:
    """Return k̄_j^(-1/2), [N]: the ranking of R2, in the time that it takes to make K."""
    return K.mean(dim=0).rsqrt()


def principal_part(x_Nd: Tensor, rank_share: float) -> Tensor:
    """Return the coordinates of the filters along their strongest directions, [N, ⌊rank_share * d⌋]."""
    U, S, _ = torch.linalg.svd(x_Nd, full_matrices=False)
    rank = max(1, int(rank_share * x_Nd.shape[1]))
    return U[:, :rank] * S[:rank]
