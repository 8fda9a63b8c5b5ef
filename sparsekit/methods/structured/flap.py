"""FLAP (arXiv 2312.11983): remove what fluctuates least, and let a bias stand for what it gave on average.

Score Var(a_j) · ‖W_:j‖² of a channel (eq. 5, "WIFV"). To compare layers, scores are standardised within each; those of
attentions are squared before that, and then averaged over the columns of a head. One threshold across all layers leaves
what the budget allows ("AL-AM"). The output loses W_:S a_S, of which the bias takes over the mean (eq. 6).

Scores and means are those of the dense model, whatever goes before a layer.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.methods.base import METHODS
from sparsekit.methods.structured.allocation import best_units, normalised
from sparsekit.methods.structured.base import Decided, Job, Reader, WidthMethod, check_choice
from sparsekit.methods.structured.inputs import InputSums
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import Recovered, mean_bias, only_columns


@dataclass(frozen=True, kw_only=True)
class FLAP(WidthMethod):
    """Structured pruning by fluctuation, with a bias.

    Attributes:
        allocation: "global" for one threshold across layers (the paper's AL-AM); "uniform" for the same share of each.
    """

    allocation: str = "global"

    name = "flap"
    updates_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "allocation", ("global", "uniform"))

    @property
    def wants_biases(self) -> bool:
        return True

    def unit_scores(self, reader: Reader, inputs: InputSums | None) -> Tensor:
        assert inputs is not None
        scores = inputs.variance * reader.w_NK.double().square().sum(dim=0).to(inputs.variance)
        if reader.width.kind == "heads":
            scores = scores.square()
        return reader.per_unit(normalised(scores, "zscore")).mean(dim=1)

    def count(self, job: Job) -> dict[str, int]:
        return job.solver.above_threshold(job.scores) if self.allocation == "global" else job.solver.evenly()

    def decide(self, job: Job, reader: Reader, num: int, seen: InputSums | Moments | None) -> Decided:
        kept, inputs = best_units(job.scores[reader.width.name], num), job.inputs[reader.width.name]
        columns = reader.columns_of(kept)
        if reader.bias is None:
            return Decided(kept, Recovered(only_columns(reader.w_NK, columns)))
        return Decided(kept, mean_bias(reader.w_NK, reader.bias, columns, inputs.mean))


METHODS.register("flap", FLAP)
