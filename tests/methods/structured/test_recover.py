"""Closed forms against the explicit least squares, in float64."""

import numpy as np
import pytest
import scipy.sparse.linalg
import torch

from sparsekit.methods.structured import recover
from sparsekit.methods.structured.lsmr import Stop, lsmr
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import columns_of, mean_bias, only_columns, refit, tune_scales


def problem(tokens=90, K=12, N=7, seed=0, shift=0.7, biased=True):
    """Inputs with means and correlations, a reader, and targets that are not quite what it gives."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator, dtype=torch.float64)
    a = torch.randn(tokens, K, generator=generator, dtype=torch.float64) @ mix + shift
    w = torch.randn(N, K, generator=generator, dtype=torch.float64)
    b = torch.randn(N, generator=generator, dtype=torch.float64) if biased else None
    t = a @ w.T + (0 if b is None else b) + 0.3 * torch.randn(tokens, N, generator=generator, dtype=torch.float64)
    return a, w, b, t


def moments_of(a, t, weights=None):
    moments = Moments(a.shape[1], t.shape[1], torch.device("cpu"), torch.float64)
    for part in range(3):  # in uneven parts, one of them empty
        rows = slice(*[(0, 5), (5, 5), (5, len(a))][part])
        moments.add(a[rows], t[rows], None if weights is None else weights[rows])
    return moments


def squared_error(a, t, w, b):
    return float((t - a @ w.T - (0 if b is None else b)).square().sum(dim=1).mean())


@pytest.mark.parametrize("biased", [True, False])
def test_the_error_is_that_of_the_data(biased):
    a, w, b, t = problem(biased=biased)
    assert moments_of(a, t).error(w, b) == pytest.approx(squared_error(a, t, w, b), rel=1e-9)


def test_weights_of_tokens_count_as_repetitions():
    a, w, b, t = problem()
    weights = torch.randint(0, 4, (len(a),))
    repeated = moments_of(a.repeat_interleave(weights, 0), t.repeat_interleave(weights, 0))
    weighted = moments_of(a, t, weights.double())
    for name in ("inputs", "gram", "targets", "cross"):
        torch.testing.assert_close(getattr(weighted, name), getattr(repeated, name), rtol=1e-12, atol=1e-12)
    assert weighted.weight == repeated.weight and weighted.power == pytest.approx(repeated.power)


@pytest.mark.parametrize("biased", [True, False])
def test_targets_that_are_the_outputs_need_no_outputs(biased):
    a, w, b, _ = problem(biased=biased)
    seen, implied = moments_of(a, a @ w.T + (0 if b is None else b)), Moments(12, 7, torch.device("cpu"), torch.float64)
    implied.add_inputs(a)
    implied.aim_at_(w, b)
    for name in ("inputs", "gram", "targets", "cross"):
        torch.testing.assert_close(getattr(implied, name), getattr(seen, name), rtol=1e-10, atol=1e-10)
    assert implied.power == pytest.approx(seen.power) and implied.weight == seen.weight


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("kept", [[0, 1, 2, 3], [2, 5, 11], [7], list(range(12))])
def test_the_refit_is_the_least_squares_answer(biased, kept):
    a, w, b, t = problem(biased=biased)
    kept = torch.tensor(kept)
    found = refit(moments_of(a, t), w, b, kept, damping=1e-14)
    A = a[:, kept].numpy()
    A = np.concatenate([A, np.ones((len(A), 1))], axis=1) if biased else A
    answer = np.linalg.lstsq(A, t.numpy(), rcond=None)[0]
    np.testing.assert_allclose(found.weight[:, kept].numpy(), answer[: len(kept)].T, rtol=1e-6, atol=1e-8)
    assert not found.weight[:, [k for k in range(12) if k not in kept.tolist()]].any()
    if biased:
        np.testing.assert_allclose(found.bias.numpy(), answer[-1], rtol=1e-6, atol=1e-8)
    else:
        assert found.bias is None


@pytest.mark.parametrize("biased", [True, False])
def test_the_ridge_is_that_of_the_formula(biased):
    """As least squares with rows that pull to the old weight, on inputs less their mean where there is an intercept."""
    a, w, b, t = problem(biased=biased)
    kept, damping = torch.tensor([1, 4, 6, 9]), 0.05
    found = refit(moments_of(a, t), w, b, kept, damping)
    centred = a - a.mean(0) if biased else a
    aimed = t - t.mean(0) if biased else t
    strength = damping * float(centred.square().mean())
    rows = (strength * len(a)) ** 0.5 * torch.eye(4, dtype=torch.float64)
    A = torch.cat((centred[:, kept], rows))
    answer = torch.linalg.lstsq(A, torch.cat((aimed, rows @ w[:, kept].T))).solution
    torch.testing.assert_close(found.weight[:, kept], answer.T, rtol=1e-8, atol=1e-10)


def test_an_infinite_ridge_leaves_the_weights_and_none_does_best():
    a, w, b, t = problem()
    kept, moments = torch.tensor([0, 3, 4, 8, 10]), moments_of(a, t)
    firm = refit(moments, w, b, kept, damping=1e12)
    torch.testing.assert_close(firm.weight, only_columns(w, kept), rtol=1e-8, atol=1e-8)
    free = refit(moments, w, b, kept, damping=1e-12)
    tuned = tune_scales(moments, w, b, kept, 1)
    scaled = only_columns(w, kept)
    scaled[:, kept] *= tuned.scales
    errors = [moments.error(*each) for each in ((free.weight, free.bias), (scaled, b), (only_columns(w, kept), b))]
    assert errors[0] < 0.9 * errors[1] and errors[1] < 0.99 * errors[2]


def test_inputs_that_depend_on_each_other_are_no_trouble():
    a, w, b, t = problem()
    a[:, 5] = a[:, 4]
    a[:, 6] = 0
    found = refit(moments_of(a, t), w, b, torch.arange(12), damping=0.01)
    assert found.weight.isfinite().all()
    torch.testing.assert_close(found.weight[:, 6], w[:, 6])  # nothing is known of it, so the ridge decides


def explicit_scales(a, w, b, t, units, columns, offset, damp=1.0):
    """As in the paper: A holds what each unit adds to each output of each token."""
    parts = [a[:, c] @ w[:, c].T for c in (columns_of(torch.tensor([u]), columns) for u in units)]
    A = torch.stack([part.flatten() for part in parts] + ([torch.ones(t.numel()).double()] if offset else []), dim=1)
    target = (t - (0 if b is None else b)).flatten()
    M, v = A.T @ A, A.T @ target
    rest = v - M.sum(dim=1)
    damped = torch.cat((M, damp * torch.eye(len(M), dtype=torch.float64)))
    change = torch.linalg.lstsq(damped, torch.cat((rest, torch.zeros_like(rest)))[:, None]).solution[:, 0]
    return (1 + change)[: len(units)]


@pytest.mark.parametrize("columns,units,offset", [(1, [0, 2, 3, 7, 11], False), (3, [0, 2, 3], True), (4, [1], True)])
@pytest.mark.parametrize("biased", [True, False])
def test_scales_are_those_of_the_explicit_system(columns, units, offset, biased):
    a, w, b, t = problem(biased=biased)
    found = tune_scales(moments_of(a, t), w, b, torch.tensor(units), columns, offset=offset)
    assert not found.failure
    torch.testing.assert_close(found.scales, explicit_scales(a, w, b, t, units, columns, offset), rtol=1e-4, atol=1e-5)


def test_nothing_pruned_nothing_scaled():
    a, w, b, _ = problem()
    found = tune_scales(moments_of(a, a @ w.T + b), w, b, torch.arange(12), 1)
    torch.testing.assert_close(found.scales, torch.ones(12, dtype=torch.float64), rtol=1e-6, atol=1e-6)


def test_the_twin_of_a_pruned_filter_counts_twice():
    a, w, b, _ = problem()
    a[:, 3], w[:, 3] = a[:, 9], w[:, 9]
    kept = torch.tensor([k for k in range(12) if k != 3])
    found = tune_scales(moments_of(a, a @ w.T + b), w, b, kept, 1)
    expected = torch.ones(11, dtype=torch.float64)
    expected[8] = 2
    torch.testing.assert_close(found.scales, expected, rtol=1e-5, atol=1e-5)


def test_a_failed_tuning_says_why(monkeypatch):
    a, w, b, t = problem()
    moments = moments_of(a, t)
    wild = tune_scales(moments_of(a, 1000 * t), w, b, torch.arange(12), 1)
    assert "beyond 10" in wild.failure and wild.scales.tolist() == [1.0] * 12
    monkeypatch.setattr(recover, "lsmr", lambda A, b, damp: (torch.zeros_like(b), Stop.ITERATIONS))
    ill = tune_scales(moments, w, b, torch.arange(12), 1)
    assert ill.failure == "LSMR stopped: iterations" and ill.scales.tolist() == [1.0] * 12


def test_the_bias_takes_over_the_mean():
    a, w, b, _ = problem()
    found = mean_bias(w, b, torch.tensor([0, 5, 6]), a.mean(0))
    dense, pruned = a @ w.T + b, a @ found.weight.T + found.bias
    torch.testing.assert_close(pruned.mean(0), dense.mean(0), rtol=1e-12, atol=1e-12)
    assert (pruned - dense).abs().max() > 0.1


@pytest.mark.parametrize("size,damp,seed", [((6, 6), 1.0, 0), ((30, 8), 0.0, 1), ((30, 8), 3.0, 2), ((5, 9), 0.5, 3)])
def test_lsmr_is_that_of_scipy(size, damp, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(size, generator=generator, dtype=torch.float64)
    b = torch.randn(size[0], generator=generator, dtype=torch.float64)
    x, stop = lsmr(A, b, damp=damp)
    theirs = scipy.sparse.linalg.lsmr(A.numpy(), b.numpy(), damp=damp, maxiter=5 * min(size))
    np.testing.assert_allclose(x.numpy(), theirs[0], rtol=1e-9, atol=1e-11)
    assert stop == theirs[1]


@pytest.mark.parametrize(
    "case,expected", [("ill", Stop.ILL_CONDITIONED), ("limit", Stop.ITERATIONS), ("zero", Stop.ZERO)]
)
def test_lsmr_stops_where_scipy_does(case, expected):
    generator = torch.Generator().manual_seed(0)
    Q = torch.linalg.qr(torch.randn(12, 12, generator=generator, dtype=torch.float64))[0]
    A = Q @ torch.diag(torch.logspace(0, -12, 12, dtype=torch.float64)) @ Q.T
    b = A @ torch.randn(12, generator=generator, dtype=torch.float64)
    limit = {"limit": 3}.get(case, 60)
    b = torch.zeros_like(b) if case == "zero" else b
    _, stop = lsmr(A, b, tolerance=1e-12, max_iterations=limit)
    theirs = scipy.sparse.linalg.lsmr(A.numpy(), b.numpy(), atol=1e-12, btol=1e-12, maxiter=limit)
    assert stop == theirs[1] == expected
