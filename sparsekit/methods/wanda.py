"""Wanda (arXiv 2306.11695): keep the weights that move the output most.

Score |W_nk| * ||x_k||, eq. 1: a small weight on a loud input feature counts as much as a large one on a quiet feature.
Weights are compared within each row, which is where they add up; N:M groups lie within rows already, and blocks span
rows, so they are compared over the whole weight.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparsekit.calibration.statistics import ColumnNorms, Statistics
from sparsekit.methods.base import METHODS, Decision, OneShot
from sparsekit.patterns import Unstructured


@dataclass(frozen=True, kw_only=True)
class Wanda(OneShot):
    """Pruning by weight and activation; kept weights stay as they are. Fields as in `OneShot`."""

    name = "wanda"
    statistics = ColumnNorms

    def decide(self, w_NK: Tensor, statistics: Statistics | None) -> Decision:
        assert statistics is not None, "Wanda scores need the inputs' norms"
        scores = self.scores(w_NK, statistics)
        if isinstance(self.parsed_pattern, Unstructured):
            return Decision(_keep_largest_of_rows(scores, self.sparsity))
        return Decision(self.project(scores))


def _keep_largest_of_rows(scores: Tensor, sparsity: float) -> Tensor:
    num_kept = scores.shape[1] - round(sparsity * scores.shape[1])
    order = scores.sort(dim=1, descending=True, stable=True).indices[:, :num_kept]
    return torch.zeros(scores.shape, dtype=torch.bool, device=scores.device).scatter_(1, order, True)


def pruned_by_wanda(config: OneShot, w_NK: Tensor, statistics: Statistics, reason: str) -> Decision:
    """Return what Wanda decides in place of a method that cannot, with a note that says why."""
    wanda = Wanda(pattern=config.pattern, sparsity=config.sparsity).decide(w_NK, statistics)
    return Decision(wanda.keep, notes=(f"{reason}: pruned by Wanda, without an update",))


METHODS.register("wanda", Wanda)
