"""How much a model may cost, what its widths cost, and how many units each keeps so that the most is had for it.

Costs are whole numbers, so that sums are exact: parameters, floating-point operations, or nanoseconds.

FLOPs are those of one sequence of `length` tokens, two for each multiply-add, in the linear layers of the widths and
in the attention between them; biases, norms, softmax, embeddings and task heads are left out, as Kwon et al. (arXiv
2204.09656) have it: a head of a BERT costs 2 (4 s d d_h + 2 s^2 d_h), a channel 2 (2 s d). In causal attention a token
looks at half as many others.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit import knapsack
from sparsekit.archs import Width
from sparsekit.registry import unknown
from sparsekit.shapes import LegalWidths
from sparsekit.targets import weight_NK

MEASURES = {"sparsity": "params", "params": "params", "flops": "flops", "latency_ms": "ns", "speedup": "ns"}
"""Kind of budget -> what costs are counted in."""


@dataclass(frozen=True)
class Costs:
    """What the widths of a model cost.

    Attributes:
        measure: "params", "flops" or "ns".
        curves: name of a width -> int64 [num_units + 1], the cost of keeping 0, 1, … units; not falling.
        fixed: what the rest of the model costs, whatever is cut.
        added: what a method gave the widths' layers on top of that, and no choice takes back.
        before: what all widths cost before the method added anything; None for what they cost now.
    """

    measure: str
    curves: dict[str, np.ndarray]
    fixed: int = 0
    added: int = 0
    before: int | None = None

    @property
    def dense(self) -> int:
        """The cost of all widths as they were, without the rest of the model."""
        return sum(int(curve[-1]) for curve in self.curves.values()) if self.before is None else self.before

    def of(self, num_kept: Mapping[str, int]) -> int:
        """Return the cost of the widths where these keep so many units, and all others stay whole."""
        return sum(int(curve[num_kept.get(name, -1)]) for name, curve in self.curves.items())


@dataclass(frozen=True)
class StreamSize:
    """How many dimensions the residual stream has, and how many of them are to be left."""

    size: int
    kept: int

    def of(self, number: int) -> int:
        """Return what is left of a number of weights that goes with the dimensions."""
        return number * self.kept // self.size


WHOLE = StreamSize(1, 1)


def count_params(model: nn.Module, widths: Sequence[Width], stream: StreamSize = WHOLE) -> Costs:
    """Return the parameters that go with the units, biases too; `fixed` is all others of the model.

    Args:
        stream: counts as if only so much of it were left. What is fixed goes with it, all of it.
    """
    curves = {}
    for width in widths:
        unit = stream.of(width.columns * weight_NK(model.get_submodule(width.name)).shape[0])
        for rows in width.producers:
            layer = model.get_submodule(rows.name)
            unit += stream.of(rows.per_unit * weight_NK(layer).shape[1])
            unit += rows.per_unit * (getattr(layer, "bias", None) is not None)
        curves[width.name] = unit * np.arange(width.num_units + 1, dtype=np.int64)
    whole = Costs("params", curves).dense if stream is WHOLE else count_params(model, widths).dense
    return Costs("params", curves, stream.of(sum(parameter.numel() for parameter in model.parameters()) - whole))


def count_flops(model: nn.Module, widths: Sequence[Width], length: float, stream: StreamSize = WHOLE) -> Costs:
    """Return the floating-point operations of the units for one sequence; see the module's text for what counts.

    Args:
        length: tokens of a sequence, which may be an average.
        stream: counts as if only so much of it were left.
    """
    if not length > 0:
        raise ValueError(f"length={length} is no number of tokens: give that of the sequences the model is made for")
    curves = {}
    for width in widths:
        macs = length * stream.of(width.columns * weight_NK(model.get_submodule(width.name)).shape[0])
        for rows in width.producers:
            macs += length * stream.of(rows.per_unit * weight_NK(model.get_submodule(rows.name)).shape[1])
        if width.kind == "heads":
            seen = (length + 1) / 2 if _is_causal(model, width) else length
            macs += 2 * length * seen * width.columns
        curves[width.name] = round(2 * macs) * np.arange(width.num_units + 1, dtype=np.int64)
    return Costs("flops", curves)


def _is_causal(model: nn.Module, width: Width) -> bool:
    """Whether an attention says of itself that a token looks back only."""
    attention = model.get_submodule(width.producers[0].name.rpartition(".")[0])
    return bool(getattr(attention, "is_causal", False))


@dataclass(frozen=True)
class Budget:
    """What a model may cost.

    Attributes:
        kind: "sparsity" (the share of the widths' parameters that goes), "flops", "params", "latency_ms", "speedup".
        amount: where `is_share`, a share of what the widths cost now, without embeddings and task heads. Otherwise the
            widths' FLOPs for one sequence, the parameters of the whole model, the milliseconds of its forward, or how
            many times faster that becomes.
        is_share: see `amount`.
        tolerance: the budget counts as reached from this share of it below.
    """

    kind: str
    amount: float
    is_share: bool = False
    tolerance: float = 0.005

    @classmethod
    def parse(cls, given: float | Mapping[str, Any]) -> "Budget":
        """Return the budget that a sparsity stands for, or a dict of one entry, as {"flops": "60%"}.

        Raises:
            ValueError: there is not one entry, its name is unknown, or its amount out of range.
        """
        constraints = given if isinstance(given, Mapping) else {"sparsity": given}
        if len(constraints) != 1:
            raise ValueError(f"constraints={dict(constraints)!r}: give one budget, as {{'flops': '60%'}}")
        kind, entry = next(iter(constraints.items()))
        if kind not in MEASURES:
            raise ValueError(unknown("budget", kind, list(MEASURES)))
        amount, is_share = _read(kind, entry)
        if kind in ("flops", "params"):
            is_share = is_share or amount <= 1
            legal, example = 0 < amount and (amount <= 1 or not is_share), "'60%' or 5e9"
        elif kind == "sparsity":
            legal, example, is_share = 0 <= amount < 1, "0.5", True
        else:
            legal, example = amount >= 1 if kind == "speedup" else amount > 0, "1.5" if kind == "speedup" else "12.0"
            legal = legal and not is_share
        if kind in ("flops", "params") and not is_share and 1 < amount <= 100:
            raise ValueError(f"{kind}={entry!r} is a number of {kind}, and no share: write '{amount:g}%' for one")
        if not legal:
            within = "a share of up to 100% or a number" if kind in ("flops", "params") else "a number"
            raise ValueError(f"{kind}={entry!r} is no budget: give {within}, as {example}")
        return cls(kind, amount, is_share)

    @property
    def measure(self) -> str:
        """What costs are counted in: "params", "flops" or "ns"."""
        return MEASURES[self.kind]

    def limits(self, costs: Costs) -> tuple[int, int]:
        """Return the least and the most that the widths may cost, for the budget to be reached and not broken."""
        if costs.measure != self.measure:
            raise ValueError(f"{self} needs costs in {self.measure}, these are in {costs.measure}")
        if self.kind == "speedup":
            most = (costs.dense + costs.fixed) / self.amount
        elif self.is_share:
            most = costs.dense * (1 - self.amount if self.kind == "sparsity" else self.amount)
        else:
            most = self.amount * (1e6 if self.kind == "latency_ms" else 1)
        fixed = 0 if self.is_share else costs.fixed
        most *= 1 + 1e-12  # 0.29 * 100 is 28.999999999999996
        taken = fixed + costs.added
        return math.ceil(most * (1 - self.tolerance)) - taken, math.floor(most) - taken

    def entry(self, cost: int, costs: Costs) -> dict[str, str | float]:
        """Return the budget of this kind that widths of this cost just keep, as `parse` takes it; four digits."""
        cost += costs.added
        total = cost + costs.fixed
        if self.kind == "sparsity":
            return {self.kind: _down(1 - cost / max(costs.dense, 1))}
        if self.kind == "speedup":
            return {self.kind: _down((costs.dense + costs.fixed) / max(total, 1))}
        if self.kind == "latency_ms":
            return {self.kind: _up(total / 1e6)}
        return {self.kind: f"{100 * _up(cost / max(costs.dense, 1)):.4g}%" if self.is_share else total}

    def met(self, cost: int, costs: Costs) -> str:
        """Return a sentence on what widths of this cost leave, and on how far that is from the budget."""
        if costs.measure == "ns":
            now, before = (f"{(each + costs.fixed) / 1e6:.4g}" for each in (cost, costs.dense))
            said = f"{now} of {before} ms are left, by the latency table"
        else:
            said = f"{(cost + costs.added) / max(costs.dense, 1):.1%} of the {costs.measure} of the blocks are left"
        return f"{said}; what goes here goes in steps too large for {self}" if cost < self.limits(costs)[0] else said

    def __str__(self) -> str:
        share = self.is_share and self.kind != "sparsity"
        return f"{self.kind}={f'{100 * self.amount:g}%' if share else f'{self.amount:g}'}"


@dataclass(frozen=True)
class Allocation:
    """How many units each width keeps.

    Attributes:
        num_kept: by name of the width.
        cost: what the widths then cost.
        value: what they are then worth.
        gap: no legal allocation is worth more than this beyond it; 0 for the best one.
    """

    num_kept: dict[str, int]
    cost: int
    value: float
    gap: float


def allocate(values: Mapping[str, Tensor], costs: Costs, budget: Budget, legal: LegalWidths) -> Allocation:
    """Return the legal numbers of units that are worth the most within the budget.

    Of numbers worth the same, those that use more of the budget are taken. Where the best ones leave more than the
    budget's tolerance unused, the best of those that do not are taken instead.

    Args:
        values: name of a width -> [num_units + 1], what it is worth to keep 0, 1, … units, in one currency for all; see
            `values_of` for scores of units. A width that has no choice needs none.
        costs: of the widths, in the budget's measure.
        legal: what each may keep.

    Raises:
        ValueError: values are missing or not finite, or no legal numbers reach the budget; the nearest that are reached
            are named.
    """
    widths = {width.name: width for width in legal.widths}
    tables = []
    for names in legal.groups:
        numbers = np.array(legal.numbers[names[0]])
        worth = sum(_curve(values, widths[name], len(numbers) == 1)[numbers] for name in names)
        tables.append((names, numbers, worth, sum(costs.curves[name][numbers] for name in names)))
    worths, prices = [table[2] for table in tables], [table[3] for table in tables]
    least, most = budget.limits(costs)
    found = knapsack.solve(worths, prices, most)
    if found is not None and found.cost < least:
        found = knapsack.solve(worths, prices, most, floor=least)
    if found is None:
        raise ValueError(_unreached(prices, budget, costs))
    num_kept = {
        name: int(numbers[pick])
        for (names, numbers, _, _), pick in zip(tables, found.picks, strict=True)
        for name in names
    }
    return Allocation(num_kept, found.cost, found.value, found.gap)


def values_of(scores: Tensor) -> Tensor:
    """Return what it is worth to keep the best 0, 1, … of units with these scores [n]: their sum, float64 [n + 1]."""
    best = scores.detach().double().cpu().sort(descending=True).values
    return torch.cat([best.new_zeros(1), best.cumsum(0)])


def even_values(costs: Costs) -> dict[str, Tensor]:
    """Return values by which all widths keep the same share of their units, where costs are linear in units.

    They fall by C (1 - share)^2, so that a share is worth the same for its cost in each of them; C is the whole cost.
    """
    values = {}
    for name, curve in costs.curves.items():
        gone = 1 - torch.arange(len(curve), dtype=torch.float64) / (len(curve) - 1)
        values[name] = -gone.square() * float(curve[-1])
    return values


def _curve(values: Mapping[str, Tensor], width: Width, has_no_choice: bool) -> np.ndarray:
    """Return the values of one width, float64 [num_units + 1]."""
    size = width.num_units + 1
    if has_no_choice:
        return np.zeros(size)
    if width.name not in values:
        raise ValueError(f"{width.name} has no values: give [{size}] for keeping 0 to {width.num_units} of its units")
    curve = values[width.name].detach().double().cpu()
    if curve.shape != (size,) or not bool(curve.isfinite().all()):
        raise ValueError(f"the values of {width.name} must be {size} finite numbers, got shape {tuple(curve.shape)}")
    return curve.numpy()


def _unreached(prices: list[np.ndarray], budget: Budget, costs: Costs) -> str:
    """Say what legal costs lie next to the budget, below and above."""
    least, most = budget.limits(costs)
    dearest = [int(price[-1]) for price in prices]
    if sum(dearest) < least:
        return f"{budget} is more than the model costs: {budget.entry(sum(dearest), costs)} is what it has, nothing cut"
    below = knapsack.solve(prices, prices, most)
    # What is cut by no more than this is what costs more than the budget.
    cuts = [price[-1] - price[::-1] for price in prices]
    above = knapsack.solve(cuts, cuts, sum(dearest) - most - 1)
    near = [below.cost] if below else []
    near += [sum(dearest) - above.cost] if above else []
    return (
        f"no legal widths reach {budget} within {budget.tolerance:.1%}: "
        f"{' and '.join(str(budget.entry(cost, costs)) for cost in near)} can be had. Less is left with a smaller "
        "min_heads or min_channels, and steps are finer with a smaller round_to or tensor_parallel, or uniform=False"
    )


def _read(kind: str, entry: Any) -> tuple[float, bool]:
    """Return the number of an entry, and whether it is written in per cent."""
    is_share = isinstance(entry, str) and entry.strip().endswith("%")
    try:
        if isinstance(entry, bool):
            raise TypeError
        amount = float(entry.strip().removesuffix("%")) / 100 if is_share else float(entry)
    except (TypeError, ValueError):
        amount = math.nan
    if not math.isfinite(amount):
        raise ValueError(f"{kind}={entry!r} is no budget: give a number, or a share as '60%'")
    return amount, is_share


def _up(number: float) -> float:
    """Return the number to four digits, rounded up."""
    step = 10.0 ** (math.floor(math.log10(number)) - 3) if number > 0 else 1.0
    return float(f"{math.ceil(number / step - 1e-9) * step:.4g}")


def _down(number: float) -> float:
    """Return the number to four digits, rounded down."""
    step = 10.0 ** (math.floor(math.log10(number)) - 3) if number > 0 else 1.0
    return float(f"{math.floor(number / step + 1e-9) * step:.4g}")
