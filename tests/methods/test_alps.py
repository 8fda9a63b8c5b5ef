"""ALPS against exact masked least squares in float64, and against the other methods on its own objective."""

import pytest
import torch

from sparsekit.calibration import Hessian
from sparsekit.methods import ALPS, RIA, Magnitude, SparseGPT, Wanda, alps
from sparsekit.methods.alps import fitted
from sparsekit.patterns import parse_pattern


def hessian_of(x_MK):
    statistics = Hessian(x_MK.shape[1], torch.device("cpu"))
    statistics.add(x_MK)
    return statistics


def correlated(M, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    scales = torch.rand(K, generator=generator) * 3 + 0.1
    return torch.randn(M, K, generator=generator) @ mix * scales


def least_squares(w_NK, keep, H):
    """The best kept weights of each row, solved for by themselves."""
    w, H, out = w_NK.double(), H.double(), torch.zeros(w_NK.shape, dtype=torch.float64)
    for n in range(len(w)):
        at = keep[n].nonzero()[:, 0]
        out[n, at] = torch.linalg.solve(H[at][:, at], (H @ w[n])[at])
    return out


def damped(x_MK, share=0.01):
    H = x_MK.double().T @ x_MK.double()
    return H + share * H.diagonal().mean() * torch.eye(len(H))


@pytest.mark.parametrize("N,K", [(1, 4), (5, 18), (17, 63), (8, 128)])
def test_the_fit_is_that_of_each_row_alone(N, K):
    generator = torch.Generator().manual_seed(K)
    w = torch.randn(N, K, generator=generator)
    keep = torch.rand(N, K, generator=generator) < 0.5
    keep[0] = False
    if N > 1:
        keep[1] = True
    H = damped(correlated(256, K, seed=K))
    norms = H.diagonal().sqrt()
    H = H / norms / norms[:, None]
    found = fitted(w, keep, H.float(), max_steps=400)
    exact = least_squares(w, keep, H)
    assert not found[~keep].any()
    assert (found - exact).abs().max() <= 1e-4 * exact.abs().max()


def test_the_whole_weight_fits_itself():
    w, keep = torch.randn(4, 12), torch.ones(4, 12, dtype=torch.bool)
    assert torch.equal(fitted(w, keep, torch.eye(12), 10), w)


@pytest.mark.parametrize("pattern,sparsity", [("2:4", 0.5), ("1:4", 0.75), ("unstructured", 0.7), ("3x4", 0.4)])
def test_kept_weights_are_the_best_for_the_mask(pattern, sparsity):
    x, w = correlated(256, 42), torch.randn(9, 42, generator=torch.Generator().manual_seed(1))
    decision = ALPS(pattern=pattern, sparsity=sparsity, max_fit_steps=400).decide(w, hessian_of(x))
    exact = least_squares(w, decision.keep, damped(x))
    assert parse_pattern(pattern).count_violations(decision.keep) == 0
    assert (decision.weight - exact).abs().max() <= 1e-4 * exact.abs().max()


@pytest.mark.parametrize("pattern,sparsity", [("2:4", 0.5), ("unstructured", 0.6), ("2x2", 0.5)])
def test_uncorrelated_inputs_leave_magnitudes_mask_and_the_weights(pattern, sparsity):
    w = torch.randn(7, 20, generator=torch.Generator().manual_seed(0))
    decision = ALPS(pattern=pattern, sparsity=sparsity).decide(w, hessian_of(torch.eye(20)))
    keep = Magnitude(pattern=pattern, sparsity=sparsity).decide(w).keep
    if pattern == "2x2":  # what a block is worth is the sum of its squares
        keep = ALPS(pattern=pattern).project(w.square())
    assert torch.equal(decision.keep, keep)
    torch.testing.assert_close(decision.weight, w * decision.keep, rtol=1e-6, atol=1e-6)


def output_error(w_NK, decision, x_MK):
    kept = w_NK * decision.keep if decision.weight is None else decision.weight
    change = x_MK.double() @ (w_NK - kept).double().T
    return float(change.square().mean())


@pytest.mark.parametrize("pattern,sparsity", [("2:4", 0.5), ("1:4", 0.75), ("4:8", 0.5), ("unstructured", 0.6)])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_output_changes_less_than_with_the_others(pattern, sparsity, seed):
    x, w = correlated(512, 96, seed), torch.randn(48, 96, generator=torch.Generator().manual_seed(seed))
    errors = {
        config.name: output_error(w, config(pattern=pattern, sparsity=sparsity).decide(w, hessian_of(x)), x)
        for config in (ALPS, SparseGPT, Wanda, RIA, Magnitude)
    }
    assert errors["alps"] < 0.95 * errors["sparsegpt"]
    assert errors["sparsegpt"] < min(errors["wanda"], errors["magnitude"], errors["ria"])


def test_a_mask_from_fewer_steps_is_worse():
    """It is ADMM that finds the mask: without it the first one, Wanda's, is only fitted."""
    x, w = correlated(512, 96), torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    one, many = (ALPS(max_steps=steps).decide(w, hessian_of(x)) for steps in (1, 300))
    assert output_error(w, many, x) < 0.95 * output_error(w, one, x)


def test_inverses_are_exact_whatever_the_condition():
    x = correlated(8, 40).repeat(30, 1)  # rank 8
    problem = alps._problem(hessian_of(x), 1e-6)
    assert torch.linalg.cond(problem.H.double()) > 1e5
    exact = torch.linalg.inv(problem.H.double() + 0.1 * torch.eye(40))
    assert (problem.inverse(0.1) - exact).abs().max() <= 1e-5 * exact.abs().max()


def test_dead_inputs_lose_their_weights():
    x, w = correlated(64, 18), torch.randn(5, 18, generator=torch.Generator().manual_seed(0))
    x[:, [1, 7]] = 0
    decision = ALPS().decide(w, hessian_of(x))
    assert not decision.weight[:, [1, 7]].any()
    assert decision.notes == ("2 of 18 input features were always zero: their weights are now 0",)


@pytest.mark.parametrize("broken", ["indefinite", "silent"])
def test_what_is_no_hessian_is_left_to_wanda(broken):
    statistics, w = hessian_of(correlated(64, 16)), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    if broken == "indefinite":
        statistics.matrix[0, 1] = statistics.matrix[1, 0] = 1e6
    else:
        statistics.matrix.zero_()
    decision = ALPS().decide(w, statistics)
    reason = {"indefinite": "its Hessian could not be factored", "silent": "its inputs were always zero"}[broken]
    assert decision.weight is None and decision.notes == (f"{reason}: pruned by Wanda, without an update",)
    assert torch.equal(decision.keep, Wanda().decide(w, statistics).keep)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_weights_of_any_size(scale):
    x, w = correlated(64, 16), torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    plain, scaled = ALPS().decide(w, hessian_of(x)), ALPS().decide(w * scale, hessian_of(x))
    assert torch.equal(plain.keep, scaled.keep)
    torch.testing.assert_close(scaled.weight / scale, plain.weight)


@pytest.mark.parametrize("common", [0.0, 1.0])
def test_the_exchange_never_loses(common):
    """Of the rows in which ADMM's mask would change, about half would be worse off."""
    x, w = correlated(256, 16), torch.randn(400, 16, generator=torch.Generator().manual_seed(0))
    problem = alps._problem(hessian_of(x + common * x[:, :1]), 0.01)
    w0 = w * problem.norms
    for pattern in ("2:4", "unstructured", "4x4"):
        config = ALPS(pattern=pattern)
        for keep in (config.project(torch.rand(400, 16)), config._keep(w0, problem)):
            fit = fitted(w0, keep, problem.H, 100)
            before_loss = alps._losses(w0 - fit, problem.H)
            config._exchange_(keep, fit, w0, problem.H)
            assert parse_pattern(pattern).count_violations(keep) == 0 and not fit[~keep].any()
            loss = alps._losses(w0 - fit, problem.H)
            assert loss.sum() <= before_loss.sum() * (1 + 1e-6)
            if pattern == "2:4":
                assert bool((loss <= before_loss * (1 + 1e-6)).all())


@pytest.mark.parametrize("format", ["semi24_int4", "semi24_int8"])
def test_rounding_is_made_up_for(format):
    x, w = correlated(512, 96), torch.randn(32, 96, generator=torch.Generator().manual_seed(0))
    plain, rounded = ALPS().decide(w, hessian_of(x)), ALPS(format=format).decide(w, hessian_of(x))
    to_nearest = ALPS(format=format).rounded(w, plain)
    assert rounded.scales is not None and not rounded.notes
    assert torch.equal(rounded.keep, plain.keep)
    assert output_error(w, rounded, x) < output_error(w, to_nearest, x)


@pytest.mark.parametrize(
    "fields",
    [{"dampening_frac": 0}, {"dampening_frac": float("nan")}, {"max_steps": 0}, {"max_fit_steps": 1.5}],
    ids=str,
)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        ALPS(**fields)


def test_the_weight_and_the_statistics_are_not_changed():
    statistics, w = hessian_of(correlated(64, 16)), torch.randn(4, 16)
    before, H = w.clone(), statistics.matrix.clone()
    ALPS().decide(w, statistics)
    assert torch.equal(w, before) and torch.equal(statistics.matrix, H)
