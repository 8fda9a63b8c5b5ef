"""RIA (Zhang et al., ICLR 2024, "Plug-and-Play"): keep the weights that matter most among those they compete with.

Score (|W_nk| / sum_n |W_nk| + |W_nk| / sum_k |W_nk|) * ||x_k||^a: a weight counts by its share of what its input gives
and of what its output gets, so that no channel loses all that it has.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.calibration.statistics import ColumnNorms, Statistics
from sparsekit.methods.base import METHODS, Decision, OneShot


@dataclass(frozen=True, kw_only=True)
class RIA(OneShot):
    """Pruning by relative importance and activation; kept weights stay as they are.

    Attributes:
        activation_power: a, how much the inputs' norms count (0.5 in the paper; 0 for not at all).
    """

    activation_power: float = 0.5

    name = "ria"
    statistics = ColumnNorms

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.activation_power < float("inf"):
            raise ValueError(f"activation_power={self.activation_power} must be at least 0, as 0.5")

    def scores(self, w_NK: Tensor, statistics: Statistics | None) -> Tensor:
        assert statistics is not None, "RIA scores need the inputs' norms"
        magnitudes = w_NK.abs()
        shares = _shares(magnitudes, dim=0) + _shares(magnitudes, dim=1)
        return shares * statistics.column_norms.to(w_NK.device) ** self.activation_power

    def decide(self, w_NK: Tensor, statistics: Statistics | None) -> Decision:
        return Decision(self.project(self.scores(w_NK, statistics)))


def _shares(magnitudes: Tensor, dim: int) -> Tensor:
    """Return each entry's share of the sum along `dim`; 0 where that is 0."""
    return (magnitudes / magnitudes.sum(dim=dim, keepdim=True)).nan_to_num_(0)


METHODS.register("ria", RIA)
