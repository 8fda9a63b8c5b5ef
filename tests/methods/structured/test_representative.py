"""R2: what the fixed point computes, on random filters and on those of a real model."""

import pytest
import torch
from scipy.stats import spearmanr

from sparsekit.methods.structured.representative import (
    density_scores,
    kernel_matrix,
    median_sigma,
    principal_part,
    representative_scores,
    squared_distances,
)


def filters(N=60, d=12, seed=0, dtype=torch.float64):
    return torch.randn(N, d, generator=torch.Generator().manual_seed(seed), dtype=dtype) / d**0.5


def test_the_kernel_is_symmetric_with_ones_on_its_diagonal():
    x = filters()
    K = kernel_matrix(x, 0.7)
    assert torch.equal(K, K.T) and torch.equal(K.diagonal(), torch.ones(60, dtype=torch.float64))
    torch.testing.assert_close(K, torch.exp(-torch.cdist(x, x).square() / 0.49), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(kernel_matrix(x, 0.7, 0.5), K.sqrt())
    assert bool((torch.linalg.eigvalsh(K) > -1e-9).all())


def test_distances_of_equal_rows_in_float32_are_not_below_zero():
    x = filters(dtype=torch.float32) * 1e3
    x[3] = x[7]
    assert squared_distances(x).min() >= 0 and kernel_matrix(x, 1.0).isfinite().all()


def updates(K, num):
    """The multiplicative updates, written out; yields C after each."""
    C = torch.full_like(K, 1 / len(K))
    for _ in range(num):
        C = C * torch.sqrt(K / (K @ C))
        yield C


def test_the_updates_never_raise_the_objective():
    K = kernel_matrix(filters(), 0.7)
    objectives = [float(torch.trace(K - 2 * C.T @ K + C.T @ K @ C)) for C in updates(K, 50)]
    assert all(after <= before + 1e-9 for before, after in zip(objectives, objectives[1:], strict=False))
    assert objectives[-1] < 0.5 * objectives[0]


@pytest.mark.parametrize("num", [1, 2, 9])
def test_the_scores_are_the_diagonal_after_so_many_updates(num):
    K = kernel_matrix(filters(), 0.7)
    *_, C = updates(K, num)
    scores, made = representative_scores(K, tolerance=1e-300, max_iterations=num)
    assert made == num
    torch.testing.assert_close(scores, C.diagonal(), rtol=1e-12, atol=0)


def test_they_end_when_the_sum_of_coefficients_settles():
    K = kernel_matrix(filters(), 0.7)
    _, made = representative_scores(K, tolerance=0.01)
    sums = [60.0, *(float(C.sum()) for C in updates(K, 200))]
    changes = [abs(after - before) / before for before, after in zip(sums, sums[1:], strict=False)]
    assert made == next(index for index, change in enumerate(changes, 1) if change < 0.01)


def test_after_one_update_it_is_the_density():
    K = kernel_matrix(filters(), 0.7)
    scores, _ = representative_scores(K, max_iterations=1)
    torch.testing.assert_close(60 * scores, density_scores(K), rtol=1e-5, atol=0)


def test_converged_scores_say_nothing():
    """C = I loses nothing, so all that R2 knows comes from stopping early."""
    K = kernel_matrix(filters(), 0.4)
    early, _ = representative_scores(K)
    late, _ = representative_scores(K, tolerance=1e-300, max_iterations=3000)
    assert late.min() > 0.9 and float(late.std() / late.mean()) < 0.3 * float(early.std() / early.mean())


def test_scales_of_filters_and_of_the_kernel_cancel():
    x = filters()
    plain, scaled = (representative_scores(kernel_matrix(c * x, 0.7 * c))[0] for c in (1, 31.0))
    torch.testing.assert_close(plain, scaled, rtol=1e-9, atol=0)
    assert median_sigma(31.0 * x) == pytest.approx(31.0 * median_sigma(x))


@pytest.mark.parametrize("score", [lambda K: representative_scores(K)[0], density_scores])
def test_twins_score_alike_and_below_a_loner(score):
    x = filters()
    x[5] = x[6] = x[7]
    x[40] = 3 * torch.ones(12)
    scores = score(kernel_matrix(x, 0.7))
    torch.testing.assert_close(scores[5], scores[6], rtol=1e-9, atol=0)
    assert scores[40] > 1.2 * scores[5] and scores.argmax() == 40


def test_a_kernel_too_narrow_to_see_anything_is_no_trouble():
    scores, _ = representative_scores(kernel_matrix(filters(dtype=torch.float32), 1e-4))
    assert scores.isfinite().all() and float(scores.max() - scores.min()) < 1e-5


def test_the_principal_part_keeps_the_longest_directions():
    x = filters()
    torch.testing.assert_close(squared_distances(principal_part(x, 1.0)), squared_distances(x), rtol=1e-8, atol=1e-9)
    part = principal_part(x, 0.5)
    assert part.shape == (60, 6)
    exact = torch.linalg.svdvals(x)[:6].square().sum()
    torch.testing.assert_close(part.square().sum(), exact)


def test_on_real_filters_it_is_the_density_and_nearly_the_norm(minilm):
    w = minilm.encoder.layer[2].output.dense.weight.detach().T.double()
    K = kernel_matrix(w, 1.0)
    scores, made = representative_scores(K)
    assert made <= 10
    assert spearmanr(scores, density_scores(K)).statistic > 0.99
    assert spearmanr(scores, w.norm(dim=1)).statistic > 0.95
