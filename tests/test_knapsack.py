"""The knapsack against brute force, and against the sweep of Kwon et al.; and how long it takes."""

import itertools
import time

import numpy as np
import pytest

from sparsekit import knapsack
from sparsekit.knapsack import solve


def brute_force(values, costs, budget, floor=0):
    """The largest value of a legal choice, and the largest cost at which it is had; None if there is none."""
    choices = itertools.product(*(range(len(cost)) for cost in costs))
    legal = [
        (sum(float(value[j]) for value, j in zip(values, picks, strict=True)), total)
        for picks in choices
        if floor <= (total := sum(int(cost[j]) for cost, j in zip(costs, picks, strict=True))) <= budget
    ]
    return max(legal, default=None)


def concave(rng, n):
    steps = np.arange(n + 1) * 7 * rng.integers(1, 4) + rng.integers(0, 3)
    return steps, np.concatenate(([0.0], np.cumsum(np.sort(rng.integers(0, 4, n))[::-1])))


def uneven(rng, n):
    return np.concatenate(([0], rng.choice([3, 3, 6], n).cumsum())), concave(rng, n)[1]


PARTS = {
    "concave, many ties": concave,
    "concave, uneven steps": uneven,
    "any values": lambda rng, n: (np.sort(rng.integers(0, 30, n + 1)), rng.normal(size=n + 1)),
    "few values, equal costs": lambda rng, n: (np.sort(rng.integers(0, 6, n + 1)), rng.integers(-2, 3, n + 1) * 1.0),
    "zeros": lambda rng, n: (np.arange(n + 1) * 5, np.zeros(n + 1)),
    "free": lambda rng, n: (np.zeros(n + 1, int), rng.integers(0, 3, n + 1) * 1.0),
    "worth what it costs": lambda rng, n: (cost := np.sort(rng.integers(0, 1000, n + 1)), cost * 0.5),
    "huge costs": lambda rng, n: (np.sort(rng.integers(0, 10**13, n + 1)), rng.lognormal(size=n + 1).cumsum() * 1e-9),
}


@pytest.mark.parametrize("kind", [*PARTS, "mixed"])
def test_is_the_best_of_all_choices(kind):
    rng = np.random.default_rng(0)
    for trial in range(120):
        kinds = [kind if kind != "mixed" else rng.choice(list(PARTS)) for _ in range(rng.integers(1, 5))]
        costs, values = zip(*(PARTS[each](rng, int(rng.integers(0, 6))) for each in kinds), strict=True)
        most = sum(int(cost[-1]) for cost in costs)
        budget = int(rng.integers(0, most + 2))
        floor = int(0.8 * budget) if trial % 3 == 0 else None
        best, found = brute_force(values, costs, budget, floor or 0), solve(values, costs, budget, floor)
        assert (found is None) == (best is None), (kind, trial)
        if found is None:
            continue
        spread = max(sum(float(np.ptp(value)) for value in values), 1e-12)
        assert found.value == pytest.approx(best[0], abs=1e-8 * spread), (kind, trial)
        assert (floor or 0) <= found.cost <= budget
        assert found.gap == 0
        assert found.cost == sum(int(cost[j]) for cost, j in zip(costs, found.picks, strict=True))
        assert found.value == pytest.approx(sum(value[j] for value, j in zip(values, found.picks, strict=True)))
        if kind == "zeros":
            assert found.cost == best[1], "of equal values the one that uses the budget"


def test_ties_are_shared_out():
    values, costs = [np.arange(11.0)] * 4, [np.arange(11) * 3] * 4
    assert solve(values, costs, 3 * 22).picks in ([5, 5, 6, 6], [6, 6, 5, 5], [5, 6, 5, 6], [6, 5, 6, 5])
    assert solve(values, costs, 3 * 20).picks == [5, 5, 5, 5]


def sweep(head_scores, filter_scores, head_cost, filter_cost, budget):
    """Algorithm 1 of Kwon et al., word for word: for each number of heads the filters that still fit."""
    heads, filters = np.sort(head_scores)[::-1].cumsum(), np.sort(filter_scores)[::-1].cumsum()
    best = 0.0
    for num_heads in range(len(heads) + 1):
        num_filters = min((budget - num_heads * head_cost) // filter_cost, len(filters))
        if num_filters >= 0:
            value = (heads[num_heads - 1] if num_heads else 0) + (filters[num_filters - 1] if num_filters else 0)
            best = max(best, value)
    return best


@pytest.mark.parametrize("share", [0.03, 0.37, 0.6, 0.95])
def test_the_mask_search_of_kwon_is_a_special_case(share):
    rng = np.random.default_rng(1)
    heads, filters = rng.lognormal(1, 2, (6, 12)), rng.lognormal(-3, 1, (6, 96))
    heads[2, 3:7], filters[:, 40:60] = 0.0, 0.01
    head_cost, filter_cost = 131, 7
    budget = int(share * (heads.size * head_cost + filters.size * filter_cost))
    values = [np.concatenate(([0.0], np.sort(row)[::-1].cumsum())) for row in (*heads, *filters)]
    costs = [np.arange(13) * head_cost] * 6 + [np.arange(97) * filter_cost] * 6
    found = solve(values, costs, budget)
    assert found.value == pytest.approx(sweep(heads.ravel(), filters.ravel(), head_cost, filter_cost, budget))
    assert budget - filter_cost < found.cost <= budget and found.gap == 0


def seven_b(kind):
    """Values and costs for 32 layers with 32 heads and 11,008 channels each."""
    rng = np.random.default_rng(2)
    parts = []
    latency = {n: np.round(1e6 * np.interp(np.arange(n + 1), *_noisy_grid(rng, n))).astype(int) for n in (32, 11008)}
    for n, unit, worth in [(32, 4 * 4096 * 128, 50), (11008, 3 * 4096, 1)] * 32:
        scores = np.sort(rng.lognormal(size=n))[::-1] * worth
        value = np.concatenate(([0.0], scores.cumsum()))
        if kind.startswith("errors"):  # what sensitivity curves look like: interpolated, and not concave
            grid, errors = np.linspace(0, n, 7), np.sort(rng.lognormal(0, 2, 7))[::-1] - 1
            value = -np.interp(np.arange(n + 1), grid, errors)
        step = 64 if kind.endswith("round_to") and n > 64 else 1
        cost = latency[n] if "latency" in kind else unit * np.arange(n + 1)
        parts.append((value[::step] * (0 if kind == "zeros" else 1), cost[::step]))
    return [value for value, _ in parts], [cost for _, cost in parts]


def _noisy_grid(rng, n):
    return np.linspace(1, n, 12), np.sort(rng.random(12)) * 0.1 + np.linspace(0.05, 1, 12)


@pytest.mark.parametrize(
    "kind", ["scores", "zeros", "scores, latency", "errors, round_to", "errors, latency, round_to"]
)
def test_seven_billion_parameters_take_seconds(kind):
    values, costs = seven_b(kind)
    budget = int(0.6 * sum(int(cost[-1]) for cost in costs))
    started = time.process_time()
    found = solve(values, costs, budget)
    assert time.process_time() - started < 10
    assert 0.9999 * budget < found.cost <= budget
    assert found.gap == 0


def test_what_had_to_be_thinned_says_how_far_it_may_be_from_the_best(monkeypatch):
    rng = np.random.default_rng(3)
    costs = [np.sort(rng.integers(0, 10**6, 40)) for _ in range(5)]
    values = [cost * 1.0 + rng.normal(size=40) for cost in costs]
    exact = solve(values, costs, 2_000_000)
    monkeypatch.setattr(knapsack, "MAX_PAIRS", 400)
    rough = solve(values, costs, 2_000_000)
    assert exact.gap == 0 < rough.gap < 100
    assert rough.value <= exact.value <= rough.value + rough.gap
    assert rough.cost <= 2_000_000
