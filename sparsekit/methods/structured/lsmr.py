"""LSMR (Fong and Saunders, arXiv 1006.0758): the iterative least squares of the tuning of masks, with its stop rules.

The closed form of the same problem is a line. It is the rules that matter here: the official tuning gives up where
LSMR stops for its condition number or its limit of iterations, and to do as it does one must stop where it does.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor


class Stop(IntEnum):
    """Why the iteration ended; the numbers are those of the authors' code."""

    ZERO = 0
    SOLVED = 1
    LEAST_SQUARES = 2
    ILL_CONDITIONED = 3
    SOLVED_TO_PRECISION = 4
    LEAST_SQUARES_TO_PRECISION = 5
    SINGULAR_TO_PRECISION = 6
    ITERATIONS = 7


def lsmr(
    A: Tensor,
    b: Tensor,
    *,
    damp: float = 0.0,
    tolerance: float = 1e-6,
    max_condition: float = 1e8,
    max_iterations: int | None = None,
) -> tuple[Tensor, Stop]:
    """Return x that minimises |A x - b|² + damp² |x|², and why the iteration ended.

    Args:
        A: [m, n], float64.
        b: [m].
        damp: weight of the size of x.
        tolerance: relative precision of A and b.
        max_condition: condition number beyond which the iteration ends.
        max_iterations: the default is 5 * min(m, n).
    """
    limit = max_iterations or 5 * min(A.shape)
    norm_b = float(b.norm())
    x = A.new_zeros(A.shape[1])
    u, beta = _normalised(b)
    v, alpha = _normalised(A.T @ u)
    if alpha * beta == 0:
        return x, Stop.ZERO
    zeta_bar, alpha_bar = alpha * beta, alpha
    rho = rho_bar = cos_bar = 1.0
    sin_bar = 0.0
    h, h_bar = v.clone(), torch.zeros_like(v)
    # What the estimates of |r|, |A| and cond(A) go by.
    beta_dd, beta_d, rho_d = beta, 0.0, 1.0
    tau_tilde, theta_tilde, zeta, d = 0.0, 0.0, 0.0, 0.0
    norm_A2, largest, smallest = alpha**2, 0.0, math.inf

    for iteration in range(1, limit + 1):
        u, beta = _normalised(A @ v - alpha * u)
        v, alpha = _normalised(A.T @ u - beta * v)

        cos_hat, sin_hat, alpha_hat = _rotation(alpha_bar, damp)
        rho_old = rho
        cos, sin, rho = _rotation(alpha_hat, beta)
        theta = sin * alpha
        alpha_bar = cos * alpha

        rho_bar_old, zeta_old = rho_bar, zeta
        theta_bar, rho_temp = sin_bar * rho, cos_bar * rho
        cos_bar, sin_bar, rho_bar = _rotation(rho_temp, theta)
        zeta, zeta_bar = cos_bar * zeta_bar, -sin_bar * zeta_bar

        h_bar = h - (theta_bar * rho / (rho_old * rho_bar_old)) * h_bar
        x = x + (zeta / (rho * rho_bar)) * h_bar
        h = v - (theta / rho) * h

        beta_acute, beta_check = cos_hat * beta_dd, -sin_hat * beta_dd
        beta_hat, beta_dd = cos * beta_acute, -sin * beta_acute
        theta_tilde_old = theta_tilde
        cos_tilde, sin_tilde, rho_tilde = _rotation(rho_d, theta_bar)
        theta_tilde, rho_d = sin_tilde * rho_bar, cos_tilde * rho_bar
        beta_d = -sin_tilde * beta_d + cos_tilde * beta_hat
        tau_tilde = (zeta_old - theta_tilde_old * tau_tilde) / rho_tilde
        d += beta_check**2
        norm_r = math.sqrt(d + (beta_d - (zeta - theta_tilde * tau_tilde) / rho_d) ** 2 + beta_dd**2)

        norm_A2 += beta**2
        norm_A = math.sqrt(norm_A2)
        norm_A2 += alpha**2
        largest = max(largest, rho_bar_old)
        if iteration > 1:
            smallest = min(smallest, rho_bar_old)
        condition = max(largest, rho_temp) / min(smallest, rho_temp)

        norm_x = float(x.norm())
        residual = norm_r / norm_b
        gradient = abs(zeta_bar) / (norm_A * norm_r) if norm_A * norm_r else math.inf
        growth = norm_A * norm_x / norm_b
        if residual <= tolerance * (1 + growth):
            return x, Stop.SOLVED
        if gradient <= tolerance:
            return x, Stop.LEAST_SQUARES
        if 1 / condition <= 1 / max_condition:
            return x, Stop.ILL_CONDITIONED
        if 1 + residual / (1 + growth) <= 1:
            return x, Stop.SOLVED_TO_PRECISION
        if 1 + gradient <= 1:
            return x, Stop.LEAST_SQUARES_TO_PRECISION
        if 1 + 1 / condition <= 1:
            return x, Stop.SINGULAR_TO_PRECISION
    return x, Stop.ITERATIONS


def _normalised(vector: Tensor) -> tuple[Tensor, float]:
    length = float(vector.norm())
    return (vector / length if length else vector), length


def _rotation(a: float, b: float) -> tuple[float, float, float]:
    """Return cosine, sine and length r with [c s; s -c] [a; b] = [r; 0]."""
    r = math.hypot(a, b)
    return (a / r, b / r, r) if r else (1.0, 0.0, 0.0)
