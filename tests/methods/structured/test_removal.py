"""Units removed one after the other, against a refit from scratch and against every possible choice."""

import itertools

import pytest
import torch

from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import columns_of, refit
from sparsekit.methods.structured.removal import removals
from tests.methods.structured.test_recover import moments_of, problem


def error_of(moments, w, b, kept, damping):
    """The error with the pull of the ridge on the columns that are left."""
    reader = refit(moments, w, b, kept, damping)
    equations = moments.normal_equations(b, intercept=b is not None).damped_(w, damping)
    pull = equations.strength * (reader.weight - w)[:, kept].square().sum()
    return moments.error(reader.weight, reader.bias) + float(pull)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("columns", [1, 2, 3])
def test_what_is_left_is_the_refit_of_what_is_left(columns, biased):
    a, w, b, t = problem(biased=biased)
    moments = moments_of(a, t)
    num = 12 // columns
    found = list(removals(moments, w, b, columns, range(1, num + 1), 0.01))
    assert [len(each.kept) for each in found] == list(range(num, 0, -1))
    whole = error_of(moments, w, b, torch.arange(12), 0.01)
    for each in found:
        kept = columns_of(each.kept, columns)
        again = refit(moments, w, b, kept, 0.01)
        torch.testing.assert_close(each.reader.weight, again.weight, rtol=1e-6, atol=1e-8)
        if biased:
            torch.testing.assert_close(each.reader.bias, again.bias, rtol=1e-6, atol=1e-8)
        assert each.cost == pytest.approx(error_of(moments, w, b, kept, 0.01) - whole, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("columns", [1, 3])
def test_each_step_takes_the_cheapest(columns):
    a, w, b, t = problem(seed=3)
    moments = moments_of(a, t)
    left = list(range(12 // columns))
    for each in removals(moments, w, b, columns, range(1, 12 // columns), 0.01):
        choices = {
            unit: error_of(moments, w, b, columns_of(torch.tensor([u for u in left if u != unit]), columns), 0.01)
            for unit in left
        }
        left.remove(min(choices, key=choices.__getitem__))
        assert each.kept.tolist() == left


def test_batches_are_as_good_as_single_steps():
    """In 320 columns batches form; they must come near the exact greedy order, and far below the largest norms."""
    generator = torch.Generator().manual_seed(1)
    K, N = 320, 24
    a = torch.randn(900, 60, generator=generator) @ torch.randn(60, K, generator=generator)
    a = (a + 0.5 * torch.randn(900, K, generator=generator)).double()
    w = torch.randn(N, K, generator=generator).double()
    moments = moments_of(a, a @ w.T)
    (batched,) = removals(moments, w, None, 1, [100], 0.01)
    left, exact = torch.arange(K), None
    for exact in removals(moments, w, None, 1, range(319, 99, -1), 0.01):
        left = exact.kept
    contribution = (a.square().mean(0).sqrt() * w.norm(dim=0)).sort(descending=True).indices[:100].sort().values
    errors = [error_of(moments, w, None, kept, 0.01) for kept in (left, batched.kept, contribution)]
    assert errors[1] < 1.03 * errors[0] and errors[1] < 0.9 * errors[2]


def test_twins_do_not_go_together():
    a, w, b, _ = problem(K=8)
    a, w = torch.cat((a, a), 1), torch.cat((w, w), 1)
    moments = moments_of(a, a @ w.T + b)
    (half,) = removals(moments, w, b, 1, [8], 1e-6)
    assert sorted((half.kept % 8).tolist()) == list(range(8))
    assert moments.error(half.reader.weight, half.reader.bias) < 1e-6 * moments.power / moments.weight


def test_a_quiet_column_goes_before_a_loud_one_however_strong_the_ridge():
    """The pull of the ridge must not look like worth: nobody hears the first column, though its weight is large."""
    a, w, b, _ = problem()
    a[:, 0], w[:, 0] = 1e-3 * a[:, 0], 5.0
    (found,) = removals(moments_of(a, a @ w.T + b), w, b, 1, [11], 1.0)
    assert 0 not in found.kept


@pytest.mark.parametrize("columns", [1, 2])
def test_the_order_of_columns_does_not_matter(columns):
    a, w, b, t = problem(seed=5)
    units = torch.randperm(12 // columns, generator=torch.Generator().manual_seed(0))
    places = columns_of(units, columns)
    (plain,) = removals(moments_of(a, t), w, b, columns, [12 // columns // 2], 0.01)
    (moved,) = removals(moments_of(a[:, places], t), w[:, places], b, columns, [12 // columns // 2], 0.01)
    assert sorted(units[moved.kept].tolist()) == plain.kept.tolist()


def test_greedy_is_near_the_best_of_all_choices():
    a, w, b, t = problem(K=9, seed=7)
    moments = moments_of(a, t)
    best = min(error_of(moments, w, b, torch.tensor(kept), 0.01) for kept in itertools.combinations(range(9), 4))
    (found,) = removals(moments, w, b, 1, [4], 0.01)
    assert error_of(moments, w, b, found.kept, 0.01) <= 1.2 * best


def test_float32_and_float64_choose_alike():
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(500, 200, generator=generator) @ torch.randn(200, 200, generator=generator)
    w = torch.randn(30, 200, generator=generator)
    single, double = (Moments(200, 30, torch.device("cpu"), dtype) for dtype in (torch.float32, torch.float64))
    for moments in (single, double):
        moments.add(a, a @ w.T)
    kept = [next(removals(each, w, None, 1, [120], 0.01)).kept.tolist() for each in (single, double)]
    assert len(set(kept[0]) & set(kept[1])) >= 119


def test_inputs_that_are_silent_or_the_same_are_no_trouble():
    a, w, b, t = problem()
    a[:, 4], a[:, 7] = 0, a[:, 2]
    for each in removals(moments_of(a, t), w, b, 1, [10, 6, 1], 0.01):
        assert each.reader.weight.isfinite().all() and each.reader.bias.isfinite().all()
    assert 4 not in next(removals(moments_of(a, t), w, b, 1, [11], 0.01)).kept
