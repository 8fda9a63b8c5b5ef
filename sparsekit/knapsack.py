"""The best choice for each of many parts under one budget, exactly: the multiple-choice knapsack.

Maximise sum_i v_i[x_i] where sum_i c_i[x_i] <= B; costs are whole numbers, values anything. In three steps:

1. Parts with concave values (the best unit first) whose costs grow by one and the same step add up greedily: together
   they are one concave part, whose first m steps are the m largest of theirs. Where the cost is linear in heads and in
   channels this leaves two parts, and what remains is the sweep of Kwon et al. (arXiv 2204.09656, algorithm 1).
2. A price p >= 0 of cost gives a bound U = sum_i max(v_i - p c_i) + p B, below which every choice x stays by a sum of
   terms none of which is negative:
        U - sum_i v_i[x_i] = sum_i loss_i[x_i] + p (B - sum_i c_i[x_i]),  loss_i = max(v_i - p c_i) - (v_i - p c_i).
3. So a choice that stays below U by no more than some gap is made of entries, and of partial sums, that lose no more
   than the gap. Dynamic programming over these alone, one part after the other, drops each partial sum that another
   one beats: worth no less and costing no more. Where nothing is found, the gap is doubled. What is found first is the
   optimum, after a look at some thousands of the partial sums.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

MAX_PAIRS = 2_000_000
"""Partial sums times choices in one step. Where there would be more, sums of nearly one cost are thinned to the best of
them, and the optimum is known up to `Solution.gap` only. It takes thousands of choices without any loss, in parts that
step 1 cannot join."""

_TILT = 1e-9
"""Share of the values' range that the use of the whole budget is worth: it decides between equals alone."""


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    Attributes:
        picks: the entry of each part.
        cost: sum of their costs.
        value: sum of their values.
        gap: no other choice is better by more than this; 0 for the optimum (up to 1e-9 of the values' range).
    """

    picks: list[int]
    cost: int
    value: float
    gap: float


def solve(
    values: Sequence[np.ndarray], costs: Sequence[np.ndarray], budget: int, floor: int | None = None
) -> Solution | None:
    """Return the choice of one entry a part with the largest value, or None if none is legal.

    Of choices of equal value the one that costs more is taken: it uses the budget.

    Args:
        values: for each part, floating [entries].
        costs: for each part, int64 [entries], not falling, below 2**53 in sum.
        budget: the cost may be this, not more.
        floor: the cost must be this at least.
    """
    spread = sum(float(np.ptp(value)) for value in values)
    tilt = (_TILT * spread or 1.0) / max(sum(int(cost[-1]) for cost in costs), 1)
    given = [_Part(cost, value + tilt * cost) for value, cost in zip(values, costs, strict=True)]
    parts, members = _join(given)
    if floor is None:
        parts = [part.frontier() for part in parts]
    search = _Search(parts, budget, floor)
    choices = search.run()
    if choices is None:
        return None
    picks = [0] * len(given)
    for part, indices, choice in zip(parts, members, choices, strict=True):
        for index, pick in zip(indices, part.picks(choice), strict=True):
            picks[index] = pick
    cost = sum(int(cost[pick]) for cost, pick in zip(costs, picks, strict=True))
    value = sum(float(value[pick]) for value, pick in zip(values, picks, strict=True))
    return Solution(picks, cost, value, search.gap)


@dataclass(frozen=True)
class _Part:
    """Choices by rising cost: int64 [n] and float64 [n].

    Attributes:
        entries: int64 [n], what each choice is in the part as it was given; None: its position.
        steps: of several parts in one, the one that takes each step, int64; None: a part by itself.
        num_members: how many parts this one stands for.
    """

    costs: np.ndarray
    values: np.ndarray
    entries: np.ndarray | None = None
    steps: np.ndarray | None = None
    num_members: int = 1

    def picks(self, choice: int) -> list[int]:
        """Return the entries of the parts that this one stands for."""
        entry = choice if self.entries is None else int(self.entries[choice])
        if self.steps is None:
            return [entry]
        return np.bincount(self.steps[:entry], minlength=self.num_members).tolist()

    def frontier(self) -> "_Part":
        """Return the part without the choices that another one beats."""
        keep = _best(self.costs, self.values)
        return _Part(self.costs[keep], self.values[keep], keep, self.steps, self.num_members)


def _best(costs: np.ndarray, values: np.ndarray, of_each_cost: bool = False) -> np.ndarray:
    """Return, by rising cost, the choices worth more than all that cost no more; or the best of each cost."""
    order = np.lexsort((-values, costs))
    costs, values = costs[order], values[order]
    better = costs[1:] > costs[:-1] if of_each_cost else values[1:] > np.maximum.accumulate(values)[:-1]
    return order[np.concatenate(([True], better))] if len(order) else order


def _join(parts: list[_Part]) -> tuple[list[_Part], list[list[int]]]:
    """Return the parts with concave ones of one step made one (step 1), and which of `parts` each stands for."""
    groups: dict[tuple[str, int], list[int]] = {}
    for index, part in enumerate(parts):
        step = _concave_step(part)
        groups.setdefault(("alone", index) if step is None else ("step", step), []).append(index)
    members = list(groups.values())
    return [_joined([parts[index] for index in indices]) for indices in members], members


def _concave_step(part: _Part) -> int | None:
    """Return what each step of a part costs whose steps cost the same and gain ever less; None if they do not."""
    steps, gains = np.diff(part.costs), np.diff(part.values)
    rounding = 1e-13 * float(np.abs(part.values).max())
    if not len(steps) or steps[0] <= 0 or (steps != steps[0]).any() or (np.diff(gains) > rounding).any():
        return None
    return int(steps[0])


def _joined(parts: list[_Part]) -> _Part:
    """Return the part whose steps are those of all `parts`, the best first; equal ones take turns."""
    if len(parts) == 1:
        return parts[0]
    gains = np.concatenate([np.diff(part.values) for part in parts])
    shares = np.concatenate([np.arange(1, len(part.costs)) / (len(part.costs) - 1) for part in parts])
    owners = np.repeat(np.arange(len(parts)), [len(part.costs) - 1 for part in parts])
    order = np.lexsort((shares, -gains))
    first, step = sum(int(part.costs[0]) for part in parts), int(parts[0].costs[1] - parts[0].costs[0])
    costs = first + step * np.arange(len(order) + 1, dtype=np.int64)
    values = np.cumsum(np.concatenate(([sum(part.values[0] for part in parts)], gains[order])))
    return _Part(costs, values, steps=owners[order], num_members=len(parts))


@dataclass
class _Sums:
    """Partial sums over some parts, by rising cost: int64 and float64 [sums]."""

    costs: np.ndarray
    losses: np.ndarray
    trail: list[tuple[int, np.ndarray, np.ndarray]]
    """(part, the sum before, its choice), the last part last; the arrays are int64 [sums]."""

    def choices(self, index: int) -> dict[int, int]:
        """Return part -> choice of one sum."""
        found = {}
        for part, before, choice in reversed(self.trail):
            found[part] = int(choice[index])
            index = int(before[index])
        return found


class _Search:
    """Steps 2 and 3.

    Attributes:
        gap: after `run`, what the optimum may be better by.
    """

    def __init__(self, parts: list[_Part], budget: int, floor: int | None) -> None:
        self.parts, self.budget, self.floor = parts, budget, floor
        self.price, self.gap, self.thinned = 0.0, 0.0, False
        self.losses: list[np.ndarray] = []

    def run(self) -> list[int] | None:
        """Return the choice of each part, or None where no sum of costs is within floor and budget."""
        least, most = (sum(int(part.costs[end]) for part in self.parts) for end in (0, -1))
        if least > self.budget or most < (self.floor or 0):
            return None
        self.price, feasible = self._find_price()
        worths = [part.values - self.price * part.costs for part in self.parts]
        self.losses = [worth.max() - worth for worth in worths]
        slack = self.budget - sum(int(part.costs[pick]) for part, pick in zip(self.parts, feasible, strict=True))
        known = sum(loss[pick] for loss, pick in zip(self.losses, feasible, strict=True)) + self.price * slack
        widest = known if self.floor is None else sum(loss.max() for loss in self.losses) + self.price * self.budget
        rounding = 1e-12 * (sum(np.abs(worth).max() for worth in worths) + self.price * self.budget)
        gap = known / 2**16 + rounding
        while (found := self._within(gap)) is None and gap < widest + rounding:
            gap = min(2 * gap, widest + rounding)
        return found

    def _find_price(self) -> tuple[float, list[int]]:
        """Return the lowest price (of some digits) at which the best of each part keep to the budget, and these."""

        def buy(price: float) -> tuple[list[int], bool]:
            picks = [int(np.argmax(part.values - price * part.costs)) for part in self.parts]
            return picks, sum(
                int(part.costs[pick]) for part, pick in zip(self.parts, picks, strict=True)
            ) <= self.budget

        picks, fits = buy(0.0)
        if fits:
            return 0.0, picks
        high = sum(float(np.ptp(part.values)) for part in self.parts) / sum(int(part.costs[-1]) for part in self.parts)
        while not (bought := buy(high))[1]:
            high *= 2
        low, picks = 0.0, bought[0]
        for _ in range(60):
            middle = (low + high) / 2
            bought = buy(middle)
            if bought[1]:
                high, picks = middle, bought[0]
            else:
                low = middle
        return high, picks

    def _within(self, gap: float) -> list[int] | None:
        """Return the best choice among those that stay below U by no more than `gap`, None if there is none."""
        self.thinned = False
        windows = [np.flatnonzero(loss <= gap) for loss in self.losses]
        by_size = sorted(range(len(self.parts)), key=lambda index: len(windows[index]))
        left, right = (self._sums(half, windows, gap) for half in (by_size[::2], by_size[1::2]))
        if not len(left.costs) or not len(right.costs):
            return None
        partners = self._partners(left, right)
        totals = left.losses + right.losses[partners]
        totals += self.price * (self.budget - left.costs - right.costs[partners])
        totals[partners < 0] = np.inf
        first = int(np.argmin(totals))
        if totals[first] > gap:
            return None
        self.gap = float(totals[first]) if self.thinned else 0.0
        found = left.choices(first) | right.choices(int(partners[first]))
        return [found[index] for index in range(len(self.parts))]

    def _sums(self, indices: list[int], windows: list[np.ndarray], gap: float) -> _Sums:
        """Return the sums over some parts that a choice within the gap can be made of."""
        cheapest = sum(int(part.costs[window[0]]) for part, window in zip(self.parts, windows, strict=True))
        dearest = sum(int(part.costs[window[-1]]) for part, window in zip(self.parts, windows, strict=True))
        sums = _Sums(np.zeros(1, np.int64), np.zeros(1), [])
        for index in indices:
            costs, losses = self.parts[index].costs[windows[index]], self.losses[index][windows[index]]
            cheapest, dearest = cheapest - int(costs[0]), dearest - int(costs[-1])
            before = self._thin(sums, MAX_PAIRS // len(costs))
            all_costs = (sums.costs[before, None] + costs).ravel()
            all_losses = (sums.losses[before, None] + losses).ravel()
            unused = np.maximum(self.budget - dearest - all_costs, 0)
            fits = (all_costs + cheapest <= self.budget) & (all_losses + self.price * unused <= gap)
            if self.floor is not None:
                fits &= all_costs + dearest >= self.floor
            pairs = np.flatnonzero(fits)
            pair_costs, pair_losses = all_costs[pairs], all_losses[pairs]
            kept = _best(pair_costs, self.price * pair_costs - pair_losses, self.floor is not None)
            step = (index, before[pairs[kept] // len(costs)], windows[index][pairs[kept] % len(costs)])
            sums = _Sums(pair_costs[kept], pair_losses[kept], [*sums.trail, step])
        return sums

    def _thin(self, sums: _Sums, room: int) -> np.ndarray:
        """Return the sums to go on with: all, or of each of `room` bands of cost the one that lost the least."""
        if len(sums.costs) <= max(room, 1):
            return np.arange(len(sums.costs))
        self.thinned = True
        band = (sums.costs - sums.costs[0]) * float(max(room, 1)) // (sums.costs[-1] - sums.costs[0] + 1)
        return _best(band, -sums.losses, of_each_cost=True)

    def _partners(self, left: _Sums, right: _Sums) -> np.ndarray:
        """Return for each sum on the left the best on the right that fits it, -1 where none does."""
        ends = np.searchsorted(right.costs, self.budget - left.costs, side="right")
        if self.floor is None:
            return ends - 1  # of sums that none beats, the one that costs the most is worth the most
        starts = np.searchsorted(right.costs, self.floor - left.costs, side="left")
        short = right.losses - self.price * right.costs
        best = [
            start + int(np.argmin(short[start:end])) if start < end else -1
            for start, end in zip(starts, ends, strict=True)
        ]
        return np.array(best, np.int64)
