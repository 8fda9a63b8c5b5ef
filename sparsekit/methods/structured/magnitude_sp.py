"""Magnitude, structured: keep the units whose columns of the reader are largest. No data.

Score ‖W_:j‖₂ of a channel, the sum over its columns of a head; the same share goes in each layer (as in the public code
of FLAP, arXiv 2312.11983).
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.methods.base import METHODS
from sparsekit.methods.structured.base import Job, Reader, WidthMethod, check_choice, global_values
from sparsekit.methods.structured.inputs import InputSums


@dataclass(frozen=True, kw_only=True)
class MagnitudeSP(WidthMethod):
    """Structured magnitude pruning.

    Attributes:
        allocation: "uniform" takes the same share of each layer; "global" the largest norms of all layers.
    """

    allocation: str = "uniform"

    name = "magnitude_sp"
    needs_data = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "allocation", ("uniform", "global"))

    def unit_scores(self, reader: Reader, inputs: InputSums | None) -> Tensor:
        return reader.per_unit(reader.w_NK.norm(dim=0)).sum(dim=1)

    def count(self, job: Job) -> dict[str, int]:
        return job.solver.choose(global_values(job.scores)) if self.allocation == "global" else job.solver.evenly()


METHODS.register("magnitude_sp", MagnitudeSP)
