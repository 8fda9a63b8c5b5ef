"""A budget for gates: the multipliers that lead them to it, and the choice of units that keeps it in the end.

The multipliers l1 and l2 make l1 (s - t) + l2 (s - t)^2 of a sparsity s and its target t. Gates descend on it and the
multipliers climb (arXiv 2310.06694, 2402.09773). Where all layers must keep as many units, each width has a pair of its
own, and as target the mean of its kind plus what the whole is short of: how the kinds share the budget stays free.

In the end, of all units that the budget pays for those stay that have the largest chances to be open, each counted by
what it costs: with the price of cost at its balance, a unit gains more than it costs where its chance is above a half,
so that a chance is worth per cost. The budget is then kept by the exact solver of all other methods.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.archs import Width, find_widths
from sparsekit.benchmarking.latency_table import LatencyTable, measure_latency
from sparsekit.budgets import Allocation, Budget, Costs, allocate, values_of
from sparsekit.errors import Unsupported
from sparsekit.methods.structured.allocation import best_units
from sparsekit.methods.structured.slicegpt import legal_hidden_sizes
from sparsekit.registry import unknown
from sparsekit.residual import check_thin
from sparsekit.shapes import LegalWidths, legal_widths
from sparsekit.train.expected_cost import ExpectedCost
from sparsekit.train.gates import LIMIT, Gates, Masks
from sparsekit.width_solver import DEFAULT_LENGTH

RAMPS = ("linear", "cubic")

_MISSED_BY = 0.001
"""Share of the dense cost by which the units that stay may be below the budget, where legal numbers come so near."""
_TIE = 1e-4
"""What the second score is worth at most, in chances to be open."""


class AugmentedLagrangian(nn.Module):
    """Multipliers of constraints s = t, which are to climb: their optimizer has `maximize=True`.

    Attributes:
        multipliers: parameter, fp32 [2, num_constraints], l1 and l2; 0 at first.
        weights: buffer, [num_constraints], what each constraint counts; they sum to 1.
    """

    multipliers: nn.Parameter
    weights: Tensor

    def __init__(self, weights: Sequence[float] = (1.0,)) -> None:
        super().__init__()
        self.multipliers = nn.Parameter(torch.zeros(2, len(weights)))
        self.register_buffer("weights", torch.tensor(weights) / sum(weights))

    def penalty(self, sparsity: Tensor, target: float | Tensor) -> Tensor:
        """Return the weighted sum of l1 (s - t) + l2 (s - t)^2, fp32 scalar, differentiable.

        Args:
            sparsity: scalar or [num_constraints].
            target: a number for all, or [num_constraints].
        """
        gap = (sparsity.reshape(-1) - target).to(self.multipliers)
        linear, square = self.multipliers
        return (self.weights * (linear * gap + square * gap.square())).sum()


def target_at(step: int, warmup_steps: int, target: float, ramp: str = "linear") -> float:
    """Return the target of a step: from 0 up to `target` at `warmup_steps`, and that from then on.

    Args:
        ramp: "linear"; or "cubic", target (1 - (1 - step / warmup_steps)^3), which is steep at first.
    """
    if ramp not in RAMPS:
        raise ValueError(unknown("ramp", ramp, list(RAMPS)))
    done = min(step / warmup_steps, 1.0) if warmup_steps > 0 else 1.0
    return target * (done if ramp == "linear" else 1 - (1 - done) ** 3)


@dataclass(frozen=True)
class Projected:
    """What is left of each part, exactly within the budget.

    Attributes:
        masks: name -> bool [num_units], on the CPU, for every part that has gates. Where a layer goes, its heads and
            channels are all gone.
        cost: of what is left, in the measure of the budget; with the rest of the model where the budget counts that.
        sparsity: share of the dense cost that is gone.
        notes: what a reader of the report must know.
    """

    masks: Masks
    cost: int
    sparsity: float
    notes: list[str]


@dataclass(frozen=True)
class Constraint:
    """A budget for a model with gates: what they cost, where that should go, and which of them stay in the end.

    Made once by `Constraint.of`, before adapters and training: times are measured then, and a budget that cannot be
    reached is refused.

    Attributes:
        budget: what may stay.
        legal: which numbers of units are possible.
        cost: of the gates; counts the whole model where the budget does.
        target: share of `cost.dense` that must go.
        uniform: every layer keeps as many.
        hidden_sizes: numbers of dimensions that the residual stream may have, ascending.
        notes: what a reader of the report must know.
        table: the times that the budget goes by, where it is one in time.
    """

    budget: Budget
    legal: LegalWidths
    cost: ExpectedCost
    target: float
    uniform: bool
    hidden_sizes: tuple[int, ...]
    notes: tuple[str, ...]
    table: LatencyTable | None = None

    @classmethod
    def of(
        cls,
        model: nn.Module,
        gates: Gates,
        budget: float | Mapping[str, Any],
        *,
        widths: Sequence[Width] | None = None,
        round_to: int = 1,
        tensor_parallel: int = 1,
        uniform: bool = False,
        min_heads: int = 1,
        min_channels: int = 8,
        length: float | None = None,
        batch: int = 1,
        table: LatencyTable | None = None,
        gates_learn: bool = True,
    ) -> "Constraint":
        """Return the constraint of a budget.

        Args:
            model: dense.
            gates: on its units.
            budget: a sparsity, or a dict of one entry as {"flops": "60%"}; see `Budget.parse`.
            widths: those that the budget is about, with gates or without; all of the model's if None.
            round_to, tensor_parallel, uniform, min_heads, min_channels: as for `legal_widths`.
            length, batch: of sequences, for FLOPs and times; 128 tokens if None.
            table: for a budget in time, what `measure_latency` returned for this model earlier, or on another process;
                None measures.
            gates_learn: whether it is for gates to close, whose chance to be open never is 0; or another chooses.
        Raises:
            ValueError: an argument is out of range, or the table is of another model, or no legal numbers, or no
                gates, reach the budget; the nearest are named.
            Unsupported: the residual stream cannot be cut.
        """
        parsed = Budget.parse(budget)
        widths = find_widths(model) if widths is None else widths
        gated = {width.name for width in gates.widths}
        legal = legal_widths(
            model,
            widths,
            round_to=round_to,
            tensor_parallel=tensor_parallel,
            uniform=uniform,
            min_units={"heads": min_heads, "channels": min_channels},
            whole=[width.name for width in widths if width.name not in gated],
        )
        length, notes, times = length or DEFAULT_LENGTH, list(legal.remarks), None
        if table is not None:
            _check_table(table, parsed, widths)
        if parsed.measure == "ns":
            table = table or measure_latency(model, legal, batch_size=batch, length=round(length))
            notes += [f"times are of {table.batch_size} x {table.length} tokens, on this device", *table.notes]
            times = table.costs()
        given: dict[str, Any] = {"widths": widths, "length": length, "table": times, "whole": not parsed.is_share}
        cost = ExpectedCost.of(model, gates, parsed.measure, **given)
        sizes: tuple[int, ...] = (cost.hidden_size,)
        if gates.stream is not None:
            sizes = tuple(legal_hidden_sizes(model, gates.stream, round_to))
            if len(sizes) > 1:
                sizes = _possible(model, gates.stream.embedding, sizes)
        most = parsed.limits(cost.costs)[1] + (cost.costs.fixed if cost.whole else 0)
        target = max(1 - most / cost.dense, 0.0)
        constraint = cls(parsed, legal, cost, target, uniform, sizes, tuple(notes), table)
        constraint._refuse_unreachable(gates, gates_learn)
        return constraint

    @property
    def num_constraints(self) -> int:
        """How many pairs of multipliers there are: one, or one for each width where all layers keep as many."""
        return len(self._widths_of_kinds()) if self.uniform else 1

    def lagrangian(self) -> AugmentedLagrangian:
        """Return the multipliers for `terms`, on the CPU."""
        if not self.uniform:
            return AugmentedLagrangian()
        return AugmentedLagrangian([float(self.cost.costs.curves[name][-1]) for name in self._widths_of_kinds()])

    def terms(self, p_open: Mapping[str, Tensor], target: float) -> tuple[Tensor, Tensor]:
        """Return sparsities [num_constraints], differentiable, and the targets to hold them against, without gradient.

        Args:
            p_open: of the gates.
            target: share of the dense cost that must go, at this step.
        """
        sparsity = self.cost.sparsity(p_open)
        if not self.uniform:
            return sparsity.reshape(1), sparsity.new_tensor([target])
        kinds = self._widths_of_kinds()
        shares = torch.stack([1 - p_open[name].double().mean() for name in kinds])
        kind_of = torch.tensor([sorted(set(kinds.values())).index(kind) for kind in kinds.values()]).to(shares.device)
        means = torch.stack([shares[kind_of == index].mean() for index in range(len(set(kinds.values())))])
        return shares, (means[kind_of] + target - sparsity).detach()

    def project(
        self, gates: Gates, scores: Mapping[str, Tensor] | None = None, *, sparsity: float | None = None
    ) -> Projected:
        """Return the units that stay: those with the largest chances to be open, for what the budget pays.

        Args:
            gates: those that the constraint is of.
            scores: name -> [num_units], which decide between equal chances; `gates.shadow()` if None.
            sparsity: share of the dense cost to remove, in place of the budget.
        Raises:
            ValueError: no legal numbers reach the budget; the nearest are named.
        """
        chances = {name: chance.detach().double().cpu() for name, chance in gates.p_open().items()}
        ranks = _ranks(gates.shadow() if scores is None else scores)
        ranked = {name: chance + _TIE * ranks.get(name, 0.0) for name, chance in chances.items()}
        budget, target = self.budget, self.target
        if sparsity is not None:
            budget, target = self._budget_of(sparsity), sparsity
        choice = self._choose(gates, chances, ranked, budget, target)
        masks = {}
        for name, kind in gates.kinds.items():
            masks[name] = torch.zeros(gates.sizes[name], dtype=torch.bool)
            if kind == "layers":
                kept = torch.tensor(
                    [index for index in range(gates.sizes[name]) if (name, index) not in choice.dropped]
                )
            else:
                kept = best_units(ranked[name], choice.num_hidden if kind == "hidden" else choice.num_kept[name])
            masks[name][kept] = True
        cost = choice.cost + (choice.costs.fixed if self.cost.whole else 0)
        notes = [budget.met(choice.cost, choice.costs), *self._at_least(chances, choice)]
        return Projected(masks, cost, 1 - cost / self.cost.dense, notes)

    def as_chosen(self, masks: Masks, notes: Sequence[str] = ()) -> Projected:
        """Return the choice of somebody else, who kept to the budget.

        Args:
            masks: name -> bool [num_units], on the CPU, for every part that has gates.
        """
        cost = round(self.cost.of_masks(masks))
        return Projected(dict(masks), cost, 1 - cost / self.cost.dense, list(notes))

    def _choose(self, gates: Gates, chances: Masks, ranked: Masks, budget: Budget, target: float) -> "_Choice":
        """Return the numbers to keep: of layers and hidden dimensions as many as gates expect, or the nearest with
        which heads and channels reach the budget."""
        refusal: ValueError | None = None
        for dropped in _layers_to_drop(gates, chances, ranked):
            for num_hidden in self._hidden_sizes_near(chances):
                costs = self.cost.left(num_hidden, dropped)
                try:
                    found = self._allocate(ranked, costs, budget, target, dropped)
                except ValueError as error:
                    refusal = refusal or error
                    continue
                return _Choice(found.num_kept, found.cost, costs, num_hidden, dropped)
        assert refusal is not None
        raise refusal

    def _allocate(
        self, ranked: Masks, costs: Costs, budget: Budget, target: float, dropped: frozenset[tuple[str, int]]
    ) -> Allocation:
        gone = {name for name, layer in self.cost.layer_of.items() if layer in dropped}
        numbers = {name: (0,) if name in gone else legal for name, legal in self.legal.numbers.items()}
        groups = [tuple(name for name in names if name not in gone) for names in self.legal.groups]
        groups += [(name,) for name in gone]
        legal = replace(self.legal, numbers=numbers, groups=tuple(names for names in groups if names))
        values = {
            name: values_of(scores) * (float(costs.curves[name][-1]) / len(scores))
            for name, scores in ranked.items()
            if name in costs.curves
        }
        near = min(budget.tolerance, _MISSED_BY / (1 - target))
        try:
            return allocate(values, costs, replace(budget, tolerance=near), legal)
        except ValueError:
            return allocate(values, costs, budget, legal)

    def _hidden_sizes_near(self, chances: Masks) -> Iterator[int]:
        """Yield numbers of hidden dimensions, the one that gates expect first."""
        expected = float(chances[self.cost.hidden].sum()) if self.cost.hidden else self.cost.hidden_size
        yield from sorted(self.hidden_sizes, key=lambda number: (abs(number - expected), -number))

    def _at_least(self, chances: Masks, choice: "_Choice") -> list[str]:
        """Say where gates left fewer units than must stay."""
        closed = []
        for width in self.legal.widths:
            least, num = self.legal.numbers[width.name][0], choice.num_kept[width.name]
            if width.name not in chances or not num or num > least:
                continue
            if (num_open := int((chances[width.name] > 0.5).sum())) < least:
                closed.append(f"{width.name} ({num_open} {width.kind} open, {num} stay)")
        if not closed:
            return []
        more = f" and {len(closed) - 3} more" if len(closed) > 3 else ""
        return [f"gates left fewer units than a layer must keep, and the least stays: {', '.join(closed[:3])}{more}"]

    def _budget_of(self, sparsity: float) -> Budget:
        """Return the budget that removes this share of the dense cost."""
        if not 0 <= sparsity < 1:
            raise ValueError(f"{sparsity=} is no share of what the blocks cost: use one such as 0.25")
        if self.cost.costs.measure == "ns":
            return Budget("speedup", 1 / (1 - sparsity))
        if self.cost.whole:
            return Budget(self.cost.costs.measure, (1 - sparsity) * self.cost.dense)
        return Budget(self.cost.costs.measure, 1 - sparsity, True)

    def _refuse_unreachable(self, gates: Gates, gates_learn: bool) -> None:
        """Raise ValueError where no legal widths meet the budget, or gates that learn cannot close so far."""
        even = {name: torch.full((size,), 0.5, dtype=torch.float64) for name, size in gates.sizes.items()}
        self._choose(gates, even, even, self.budget, self.target)
        least = gates.chance(torch.tensor(-LIMIT))
        most_gone = float(self.cost.sparsity(gates.split(least.expand(sum(gates.sizes.values())))))
        if gates_learn and self.target > most_gone:
            remedy = "ask for less, or give more kinds of units gates"
            if self.cost.costs.measure == "ns":
                remedy = "ask for less; what else a forward takes does not depend on heads and channels"
            raise ValueError(
                f"{self.budget} removes {self.target:.1%} of the {self.cost.costs.measure}, and gates, whose chance to "
                f"be open is {least:.1%} at least, {most_gone:.1%} at most: {remedy}"
            )

    def _widths_of_kinds(self) -> dict[str, str]:
        """Return width -> first width of those that must keep as many, for widths that have a choice."""
        return {name: names[0] for names in self.legal.groups for name in names if len(self.legal.numbers[name]) > 1}


def _check_table(table: LatencyTable, budget: Budget, widths: Sequence[Width]) -> None:
    """Raise ValueError unless a table of times is of these widths, and the budget goes by it."""
    if budget.measure != "ns":
        raise ValueError(f"table= holds times, and {budget} is no budget in time: leave it out")
    sizes = {width.name: width.num_units for width in widths}
    if odd := [name for name, num in table.num_units.items() if sizes.get(name) != num]:
        raise ValueError(
            f"table= is of another model: {odd[0]} has {table.num_units[odd[0]]} units there, and "
            f"{sizes.get(odd[0], 'none')} here; measure_latency(model, …) makes one of this"
        )


def _possible(model: nn.Module, embedding: str, sizes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the hidden sizes that the model's classes can be given.

    Raises:
        Unsupported: there is none but its own.
    """
    refusal, found = None, []
    for size in sizes[:-1]:
        try:
            check_thin(model, embedding, size)
            found.append(size)
        except Unsupported as error:
            refusal = error
    if refusal is not None and not found:
        raise Unsupported(f"{refusal}; leave hidden out, hidden=False")
    return (*found, sizes[-1])


@dataclass(frozen=True)
class _Choice:
    """Numbers of units that stay, what the widths then cost, and the costs that say so."""

    num_kept: dict[str, int]
    cost: int
    costs: Costs
    num_hidden: int
    dropped: frozenset[tuple[str, int]]


def _layers_to_drop(gates: Gates, chances: Masks, ranked: Masks) -> Iterator[frozenset[tuple[str, int]]]:
    """Yield sets of layers (list of blocks, index) that go, the one that gates expect first; one of each list stays."""
    layers = sorted(
        ((name, index) for name, blocks in gates.layers.items() for index in range(len(blocks))),
        key=lambda layer: float(ranked[layer[0]][layer[1]]),
    )
    best = {name: (name, int(ranked[name].argmax())) for name in gates.layers}
    may_go = [layer for layer in layers if layer != best[layer[0]]]
    expected = sum(float((1 - chances[name]).sum()) for name in gates.layers)
    for num in sorted(range(len(may_go) + 1), key=lambda num: (abs(num - expected), num)):
        yield frozenset(may_go[:num])


def _ranks(scores: Mapping[str, Tensor]) -> Masks:
    """Return the ranks of scores among those of all parts, from 0 to 1; equal scores have equal ranks."""
    values = torch.cat([each.detach().double().cpu() for each in scores.values()])
    distinct, order = values.unique(return_inverse=True)
    ranks = order.double() / max(len(distinct) - 1, 1)
    return dict(zip(scores, ranks.split([len(each) for each in scores.values()]), strict=True))
