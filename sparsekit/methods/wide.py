"""A layer with a side branch as one wider weight, which is what packing makes of it, and so what has to be rounded.

y = x @ W.T + z @ S.T = x' @ W'.T with W' = [W | S] and x' = [x | z], see `sparsekit.nn.side_columns`. A method that
rounds W' rounds both on the grid that they will share. And as z is made of x, their Hessian knows that S can make up
for what rounding does to W: a walk over the columns of W' comes to those of S last.
"""

from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from sparsekit.calibration.statistics import Statistics
from sparsekit.formats import FORMATS
from sparsekit.methods.base import Decision
from sparsekit.nn import SideLinear
from sparsekit.nn.side_columns import SideColumns, X_of, pack_with_side
from sparsekit.patterns import Pattern


@dataclass(frozen=True)
class WideWeight:
    """Weight and branch of a layer.

    Attributes:
        weight: W', fp32 [N, K'], with S divided by `z_scale`.
        columns: where the branch lies in it.
        z_scale: power of two that z is multiplied by.
        X: of the branch, as it is packed, [r, K]; None for sums of groups.
        dtype: of the layer.
    """

    weight: Tensor
    columns: SideColumns
    z_scale: float
    X: Tensor | None
    dtype: torch.dtype

    @classmethod
    def of(cls, layer: SideLinear, pattern: Pattern, format: str) -> Self:
        """Return the layer's weight and branch as `format` would pack them once the weight obeys `pattern`."""
        w_NK, branch = layer.weight.detach(), layer.branch
        sparse = w_NK.masked_fill(~pattern.project(w_NK.abs()), 0)
        _, columns, beside = pack_with_side(FORMATS.get(format), sparse, branch)
        z_scale = float(beside["side_scale"])
        whole = columns.join(w_NK.float(), branch.S.float(), z_scale)
        return cls(whole, columns, z_scale, X_of(beside), w_NK.dtype)

    def statistics(self, of_x: Statistics | None) -> Statistics | None:
        """Return the statistics of x' from those of x."""
        return None if of_x is None else of_x.extended(self.columns, self.X, self.z_scale)

    def split(self, decision: Decision) -> tuple[Decision, Tensor]:
        """Return a decision about W' as one about W, its scales still those of all columns, and S [N, r].

        S is in the layer's dtype, and rounded to it as unpacking does: before it is multiplied by `z_scale`.
        """
        keep, K = decision.keep, self.columns.in_features
        weight = self.weight.masked_fill(~keep, 0) if decision.weight is None else decision.weight
        _, S = self.columns.split(weight.to(self.dtype), self.z_scale)
        w_NK = None if decision.weight is None else weight[:, :K].contiguous()
        return replace(decision, keep=keep[:, :K].contiguous(), weight=w_NK), S
