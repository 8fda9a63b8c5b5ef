"""The solver of budgets, for methods that take heads and channels out: how many units may stay where."""

from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparsekit.archs import Width
from sparsekit.benchmarking.latency_table import LatencyTable, measure_latency
from sparsekit.budgets import Budget, Costs, StreamSize, allocate, count_flops, count_params, even_values, values_of
from sparsekit.calibration.samples import Batch
from sparsekit.methods.structured.base import WidthMethod
from sparsekit.methods.structured.inputs import mean_length
from sparsekit.shapes import legal_widths

DEFAULT_LENGTH = 128
"""Tokens of a sequence, for budgets in FLOPs or time, where neither the config nor the data say how many."""

_known: ContextVar[LatencyTable | None] = ContextVar("sparsekit_latency_table", default=None)


@contextmanager
def times_known(table: LatencyTable | None) -> Iterator[None]:
    """Let solvers that the body makes for this table's model go by its times; None: they measure."""
    token = _known.set(table)
    try:
        yield
    finally:
        _known.reset(token)


class WidthSolver:
    """The budget of a config, what widths are legal, and what they cost; the solver of a `Job`.

    Args:
        model: dense.
        config: with a budget.
        widths: those that the budget is about.
        batches: calibration data, whose mean length counts where the config gives none.
    Raises:
        ValueError: no number of units is legal for some width.
        SparsekitError: other work disturbed the measurement of times too much.
    """

    def __init__(self, model: nn.Module, config: WidthMethod, widths: list[Width], batches: list[Batch]) -> None:
        self.budget, self.config = Budget.parse(config.budget), config
        self.legal = legal_widths(
            model,
            widths,
            round_to=config.round_to,
            tensor_parallel=config.tensor_parallel,
            uniform=config.uniform,
            min_units={"heads": config.min_heads, "channels": config.min_channels},
            whole=[width.name for width in widths if width.kind not in config.kinds],
        )
        self.least = {name: numbers[0] for name, numbers in self.legal.numbers.items()}
        self.remarks = list(self.legal.remarks)
        self.length: float = DEFAULT_LENGTH
        if self.budget.measure != "params":
            self.length = config.length or mean_length(model, widths[0].name, batches) or DEFAULT_LENGTH
        self.costs = self._costs(model)

    def _costs(self, model: nn.Module) -> Costs:
        """Return what the widths cost, in the measure of the budget."""
        if self.budget.measure == "params":
            return count_params(model, self.legal.widths)
        if self.budget.measure == "flops":
            return count_flops(model, self.legal.widths, self.length)
        table = _known.get()
        if table is None:
            table = measure_latency(model, self.legal, batch_size=self.config.batch, length=round(self.length))
        self.remarks.append(f"times are of {table.batch_size} x {table.length} tokens, on this device")
        self.remarks += table.notes
        return table.costs()

    def recount(self, model: nn.Module) -> None:
        """Count the parameters again, where the budget is about these and biases were added."""
        if self.budget.measure != "params":
            return
        now, before = count_params(model, self.legal.widths), self.costs
        added = now.fixed - before.fixed if self.budget.is_share else 0  # in `fixed` it counts for the whole model
        self.costs = replace(now, added=added, before=before.dense)

    def check(self) -> None:
        """Raise ValueError if no legal widths reach the budget; nothing needs to be known of what units are worth."""
        remarks = list(self.remarks)
        self.evenly()
        self.remarks = remarks

    def choose_stream(
        self, model: nn.Module, values: Mapping[str, Tensor], losses: Mapping[int, float], size: int, untied: int
    ) -> tuple[int, dict[str, int]]:
        """Return how many dimensions of the residual stream and how many units of each width stay, of the largest
        total value that the budget pays for; from now on costs are those with so thin a stream.

        Args:
            model: dense.
            values: as for `choose`.
            losses: number of dimensions -> what is lost by it.
            size: of the stream as it is.
            untied: parameters that the model has more, at its size, once the stream is thinner.
        Raises:
            ValueError: as for `choose`.
        """
        whole, remarks = self.costs, self.remarks
        found: list[tuple[float, int, dict[str, int], Costs, list[str]]] = []
        refusal: ValueError | None = None
        for kept, loss in losses.items():
            self.remarks = list(remarks)
            self.costs = whole if kept == size else self._with_stream(model, whole, StreamSize(size, kept), untied)
            try:
                counts = self.choose(values)
            except ValueError as error:
                refusal = refusal or error
                continue
            worth = sum(float(curve[counts[name]]) for name, curve in values.items()) - loss
            found.append((worth, kept, counts, self.costs, self.remarks))
        self.costs, self.remarks = whole, remarks
        if not found:
            assert refusal is not None
            raise refusal
        _, kept, counts, self.costs, self.remarks = max(found, key=lambda each: each[0])
        return kept, counts

    def _with_stream(self, model: nn.Module, whole: Costs, stream: StreamSize, untied: int) -> Costs:
        if self.budget.measure == "flops":
            costs = count_flops(model, self.legal.widths, self.length, stream)
        else:
            costs = count_params(model, self.legal.widths, stream)
            costs = replace(costs, fixed=costs.fixed + stream.of(untied))
        return replace(costs, added=stream.of(whole.added), before=whole.dense)

    def choose(self, values: Mapping[str, Tensor], *, eased: bool = False) -> dict[str, int]:
        """Return how many units of each width stay; see `Solver`.

        Raises:
            ValueError: no legal widths reach the budget.
        """
        costs, budget = self.costs, self.budget
        if eased:
            share = max(budget.limits(costs)[1], 0) / costs.dense
            costs, budget = Costs("params", costs.curves), Budget("params", min(share**0.5, 1.0), True, tolerance=1.0)
        try:
            found = allocate(values, costs, budget, self.legal)
        except ValueError as error:
            left = {width.kind for width in self.legal.widths} - set(self.config.kinds)
            raise ValueError(f"{error}; {self.config.name} takes no {min(left)} out" if left else str(error)) from None
        if found.gap > 0 and not eased:
            self.remarks.append(
                f"not all widths were looked at: others may be worth {found.gap:.2g} more than these, {found.value:.4g}"
            )
        return found.num_kept

    def evenly(self) -> dict[str, int]:
        """Return how many units of each width stay if each loses the same share."""
        return self.choose(even_values(self.costs))

    def above_threshold(self, scores: Mapping[str, Tensor]) -> dict[str, int]:
        """Take units by falling score, whatever they cost, while the budget pays for them; one that it does not pay for
        is left out, and smaller ones after it are not.

        Where legal numbers are far apart, so much may be left out that the budget is not reached. Then the units of the
        largest total score that reach it are taken.

        Raises:
            ValueError: no legal widths reach the budget.
        """
        groups = [names for names in self.legal.groups if len(self.legal.numbers[names[0]]) > 1]
        counts = {name: numbers[0] for name, numbers in self.legal.numbers.items()}
        least, most = self.budget.limits(self.costs)
        left = most - self.costs.of(counts)
        if left < 0 or self.costs.dense < least:
            return self.evenly()  # which says what can be reached
        units = torch.cat([torch.cat([scores[name].double() for name in names]) for names in groups])
        owners = torch.repeat_interleave(torch.tensor([sum(len(scores[name]) for name in names) for names in groups]))
        above = [0] * len(groups)
        for unit in units.sort(descending=True, stable=True).indices.tolist():
            index = int(owners[unit])
            names, now = groups[index], counts[groups[index][0]]
            numbers = self.legal.numbers[names[0]]
            wanted = numbers[bisect_right(numbers, max((above[index] + 1) // len(names), numbers[0])) - 1]
            price = sum(int(self.costs.curves[name][wanted] - self.costs.curves[name][now]) for name in names)
            if price <= left:
                above[index] += 1
                left -= price
                counts |= dict.fromkeys(names, wanted)
        if self.costs.of(counts) >= least:
            return counts
        lowest = units.min()
        return self.choose({name: values_of(each.double() - lowest) for name, each in scores.items()})

    def notes(self, counts: Mapping[str, int]) -> list[str]:
        """Return what a reader of the report must know about the numbers."""
        at_least: dict[str, int] = defaultdict(int)
        for width in self.legal.widths:
            if counts[width.name] == self.least[width.name] < width.num_units:
                at_least[width.kind] += 1
        notes = [self.budget.met(self.costs.of(counts), self.costs)]
        for kind, num in at_least.items():
            notes.append(f"{num} {'layer keeps' if num == 1 else 'layers keep'} the least {kind} that were asked for")
        return notes + self.remarks
