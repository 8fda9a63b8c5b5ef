"""What gates cost, as a number with a gradient, and the multipliers that hold it at a target.

With P the chance of a unit to be open, the expected cost of widths w in layers l is

    E = sum_w P_l sum_j P_wj (h a_w + b_w),   h = mean of P over the residual stream,

a_w what a unit costs that goes with the dimensions of the stream, b_w what does not (biases; in FLOPs, attention). It is
exact where gates are 0 or 1: the count of what is left after slicing. Times are interpolated in a latency table, at the
expected number of units.

The multipliers l1 and l2 make l1 (s - t) + l2 (s - t)^2 of a sparsity s and its target t. Gates descend on it and the
multipliers climb (arXiv 2310.06694, 2402.09773).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.budgets import Budget, Costs
from sparsekit.shapes import LegalWidths
from sparsekit.train.gates import Gates, Masks

RAMPS = ("linear", "cubic")


@dataclass(frozen=True)
class ExpectedCost:
    """What a model's widths cost, of the chances of their units to be open.

    Attributes:
        costs: of the widths, in whole numbers, with the residual stream as it is.
        dense: cost where all is open.
    """

    costs: Costs
    dense: int

    @classmethod
    def of(
        cls,
        model: nn.Module,
        gates: Gates,
        measure: str = "params",
        *,
        length: float = 128,
        costs: Costs | None = None,
        whole: bool = False,
        untied: int = 0,
    ) -> "ExpectedCost":
        """Return the cost of all that has gates.

        Args:
            model: dense.
            gates: on its units.
            measure: "params", "flops" or "ns".
            length: tokens of a sequence, for FLOPs.
            costs: those of a latency table, for "ns".
            whole: count the rest of the model, too.
            untied: parameters that the head gets for itself, where the residual stream has gates.
        Raises:
            ValueError: the measure is unknown, or "ns" and there is no table, or it is to tell what layers or hidden
                dimensions cost.
        """
        raise NotImplementedError

    def of_gates(self, p_open: Mapping[str, Tensor]) -> Tensor:
        """Return the expected cost, float64 scalar, differentiable."""
        raise NotImplementedError

    def of_masks(self, masks: Masks) -> float:
        """Return the cost of what these masks leave: units that are multiplied by more than 0."""
        raise NotImplementedError

    def sparsity(self, p_open: Mapping[str, Tensor]) -> Tensor:
        """Return the share of the dense cost that is expected to go, float64 scalar, differentiable."""
        raise NotImplementedError


class AugmentedLagrangian(nn.Module):
    """Multipliers of constraints s = t, which are to climb: their optimizer has `maximize=True`.

    Attributes:
        multipliers: parameter, fp32 [2, num_constraints], both 0 at first.
    """

    multipliers: nn.Parameter

    def __init__(self, num_constraints: int = 1) -> None:
        super().__init__()
        self.multipliers = nn.Parameter(torch.zeros(2, num_constraints))

    def penalty(self, sparsity: Tensor, target: float | Tensor) -> Tensor:
        """Return sum l1 (s - t) + l2 (s - t)^2, differentiable.

        Args:
            sparsity: scalar or [num_constraints].
            target: a number for all, or [num_constraints].
        """
        raise NotImplementedError


def target_at(step: int, warmup_steps: int, target: float, ramp: str = "linear") -> float:
    """Return the target of a step: from 0 up to `target` at `warmup_steps`, and that from then on.

    Args:
        ramp: "linear"; or "cubic", target (1 - (1 - step / warmup_steps)^3), which is steep at first.
    """
    raise NotImplementedError


@dataclass(frozen=True)
class Projected:
    """What is left of each part, exactly within the budget.

    Attributes:
        masks: name -> bool [num_units], on the CPU, for every part that has gates.
        cost: of it, in the measure of the budget, with the rest of the model where the budget counts that.
        sparsity: share of the dense cost that is gone.
        notes: what a reader of the report must know.
    """

    masks: Masks
    cost: int
    sparsity: float
    notes: list[str]


class Constraint:
    """A budget for a model with gates: what they cost, where that should go, and which of them stay in the end.

    Made once, before adapters and training, by `Constraint.of`, which measures times and sees that the budget can be
    reached.

    Attributes:
        budget, legal: what may stay, and which numbers of units are possible.
        cost: of the gates; counts the whole model where the budget does.
        target: share of `cost.dense` that must go.
        uniform: every layer keeps as many.
        notes: what a reader of the report must know.
    """

    budget: Budget
    legal: LegalWidths
    cost: ExpectedCost
    target: float
    uniform: bool
    notes: list[str]

    @classmethod
    def of(
        cls,
        model: nn.Module,
        gates: Gates,
        budget: float | Mapping[str, Any] | Budget,
        *,
        round_to: int = 1,
        tensor_parallel: int = 1,
        uniform: bool = False,
        min_heads: int = 1,
        min_channels: int = 8,
        length: float | None = None,
        batch: int = 1,
        untied: int = 0,
    ) -> "Constraint":
        """Return the constraint of a budget.

        Args:
            model: dense.
            gates: on its units.
            budget: a sparsity, a dict of one entry as {"flops": "60%"}, or what `Budget.parse` made of either.
            round_to, tensor_parallel, uniform, min_heads, min_channels: as for `legal_widths`.
            length, batch: of sequences, for FLOPs and times; 128 tokens if None.
            untied: parameters that the head gets for itself once the residual stream is thinner.
        Raises:
            ValueError: an argument is out of range, or no legal numbers reach the budget; the nearest are named.
            Unsupported: the model's shape cannot be measured or cut so.
        """
        raise NotImplementedError

    @property
    def num_constraints(self) -> int:
        """How many pairs of multipliers `terms` needs: one, or one for each width where all layers keep as many."""
        raise NotImplementedError

    def terms(self, p_open: Mapping[str, Tensor], target: float) -> tuple[Tensor, Tensor]:
        """Return sparsities [num_constraints], differentiable, and the targets to hold them against.

        Args:
            p_open: of the gates.
            target: share of the dense cost that must go, at this step.
        """
        raise NotImplementedError

    def project(self, gates: Gates, scores: Mapping[str, Tensor] | None = None) -> Projected:
        """Return the units that stay: those with the largest chances to be open, for what the budget pays.

        Args:
            gates: on the model that the constraint is of.
            scores: name -> [num_units], which decide between units of equal chances; `gates.shadow()` if None.
        Raises:
            ValueError: no legal numbers reach the budget; the nearest are named.
        """
        raise NotImplementedError
