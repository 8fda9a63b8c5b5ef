"""Keep the largest weights. Needs no data.

Score |W_nk|. For the unstructured pattern the sparsity is met in each layer, over the whole weight.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.calibration.statistics import Statistics
from sparsekit.methods.base import METHODS, Decision, OneShot


@dataclass(frozen=True, kw_only=True)
class Magnitude(OneShot):
    """Magnitude pruning: remove the weights nearest to zero. Fields as in `OneShot`."""

    name = "magnitude"

    def decide(self, w_NK: Tensor, statistics: Statistics | None = None) -> Decision:
        return Decision(self.project(self.scores(w_NK, None)))


METHODS.register("magnitude", Magnitude)
