"""What gates cost, as a number with a gradient.

With P the chance of a unit to be open, the expected cost of the units j of widths w in layers l is

    E = sum_w P_l(w) sum_j P_wj (h a_w + b_w),   h = mean of P over the residual stream.

a_w is what goes with the dimensions of the stream in the cost of a unit, b_w what does not: biases, and in FLOPs the
attention. It is exact where gates are 0 or 1: the count of what is left after slicing. Times are interpolated in a
latency table, at the expected number of units.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.archs import Width, find_widths
from sparsekit.budgets import Costs, StreamSize, count_flops, count_params
from sparsekit.registry import unknown
from sparsekit.train.gates import Gates, Masks
from sparsekit.width_solver import DEFAULT_LENGTH


@dataclass(frozen=True)
class ExpectedCost:
    """What a model's widths cost, of the chances of their units to be open.

    Attributes:
        costs: of the widths, in whole numbers, with the residual stream as it is.
        without_stream: name of a width -> what a unit costs that does not go with the stream.
        whole: whether the rest of the model is counted, too.
        hidden: name of the residual stream's gates, None where it has none.
        hidden_size: its dimensions.
        layer_of: name of a width -> (list of blocks, index) of the layer that it is in, where layers have gates.
    """

    costs: Costs
    without_stream: dict[str, int]
    whole: bool = False
    hidden: str | None = None
    hidden_size: int = 1
    layer_of: dict[str, tuple[str, int]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: nn.Module,
        gates: Gates,
        measure: str = "params",
        *,
        widths: Sequence[Width] | None = None,
        length: float = DEFAULT_LENGTH,
        table: Costs | None = None,
        whole: bool = False,
    ) -> "ExpectedCost":
        """Return the cost of a model with gates.

        Args:
            model: dense.
            gates: on its units.
            measure: "params", "flops" or "ns".
            widths: those that cost something, with gates or without; all of the model's if None.
            length: tokens of a sequence, for FLOPs.
            table: the costs of a latency table, for "ns".
            whole: count the rest of the model, too.
        Raises:
            ValueError: the measure is unknown, or is "ns" and there is no table, or gates of layers or of hidden
                dimensions, whose times no table has.
        """
        widths = find_widths(model) if widths is None else widths
        nothing = StreamSize(1, 0)
        if measure == "params":
            costs, constant = count_params(model, widths), count_params(model, widths, nothing)
        elif measure == "flops":
            costs, constant = count_flops(model, widths, length), count_flops(model, widths, length, nothing)
        elif measure == "ns" and table is not None:
            costs = constant = table
            if set(gates.kinds.values()) - {"heads", "channels"}:
                raise ValueError("a budget in time knows the cost of heads and channels only: leave out hidden, layers")
        elif measure == "ns":
            raise ValueError("measure='ns' needs table=, the costs of a latency table")
        else:
            raise ValueError(unknown("measure", measure, ["params", "flops", "ns"]))
        hidden = None if gates.stream is None else gates.stream.embedding
        layer_of = {
            width.name: (name, index)
            for name, blocks in gates.layers.items()
            for index, block in enumerate(blocks)
            for width in widths
            if width.name.startswith(f"{block}.")
        }
        return cls(
            costs,
            {name: int(curve[1]) for name, curve in constant.curves.items()},
            whole,
            hidden,
            gates.sizes[hidden] if hidden else 1,
            layer_of,
        )

    @property
    def dense(self) -> int:
        """The cost where all is open."""
        return self.costs.dense + (self.costs.fixed if self.whole else 0)

    def of_gates(self, p_open: Mapping[str, Tensor]) -> Tensor:
        """Return the expected cost, float64 scalar, differentiable.

        Args:
            p_open: name -> chance of each unit to be open, [num_units]; parts that are missing are open.
        """
        device = next(iter(p_open.values())).device
        total = torch.zeros((), dtype=torch.float64, device=device)
        stream: Tensor | float = 1.0
        if self.hidden is not None:
            stream = p_open[self.hidden].double().mean()
        for name, curve in self.costs.curves.items():
            number = p_open[name].double().sum() if name in p_open else total.new_tensor(len(curve) - 1.0)
            if self.costs.measure == "ns":
                cost = _interpolated(torch.from_numpy(curve).to(total), number)
            else:
                constant = self.without_stream[name]
                cost = number * ((int(curve[1]) - constant) * stream + constant)
            if name in self.layer_of:
                chain, index = self.layer_of[name]
                cost = cost * p_open[chain][index].double()
            total = total + cost
        return total + (self.costs.fixed * stream if self.whole else 0.0)

    def of_masks(self, masks: Masks) -> float:
        """Return the cost of what these masks leave: units that are multiplied by more than 0."""
        with torch.no_grad():
            return float(self.of_gates({name: (mask > 0).double() for name, mask in masks.items()}))

    def sparsity(self, p_open: Mapping[str, Tensor]) -> Tensor:
        """Return the share of the dense cost that is expected to be gone, float64 scalar, differentiable."""
        return 1 - self.of_gates(p_open) / self.dense

    def left(self, num_hidden: int, dropped: frozenset[tuple[str, int]]) -> Costs:
        """Return the costs of a model that has so many hidden dimensions, and not these layers."""
        if num_hidden == self.hidden_size and not dropped:
            return self.costs
        stream = StreamSize(self.hidden_size, num_hidden)
        curves = {}
        for name, curve in self.costs.curves.items():
            constant = self.without_stream[name]
            unit = stream.of(int(curve[1]) - constant) + constant
            is_dropped = self.layer_of.get(name) in dropped
            curves[name] = (0 if is_dropped else unit) * np.arange(len(curve), dtype=np.int64)
        return replace(self.costs, curves=curves, fixed=stream.of(self.costs.fixed), before=self.costs.dense)


def _interpolated(curve: Tensor, number: Tensor) -> Tensor:
    """Return the entry of a curve [num_units + 1] at an expected number of units.

    Its gradient is the mean slope over an eighth of the units to either side: times rise in steps, and on a step gates
    would not feel the constraint at all.
    """
    last = len(curve) - 1
    at = number.detach()

    def value(where: Tensor) -> Tensor:
        below = where.floor().clamp(max=last - 1).long()
        return torch.lerp(curve[below], curve[below + 1], where - below)

    reach = max(last / 8, 1.0)
    low, high = (at - reach).clamp_min(0), (at + reach).clamp_max(last)
    slope = (value(high) - value(low)) / (high - low)
    return value(at) + slope * (number - at)
