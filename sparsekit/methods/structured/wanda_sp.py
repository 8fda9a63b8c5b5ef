"""Wanda-sp: the score of Wanda, summed up over whole columns (public code of FLAP, arXiv 2312.11983).

Score mean_i |W_ij| · ‖a_j‖₂ of a channel, the sum over its columns of a head. The same share goes in each layer, and
each layer is judged by what it is fed after those before it were pruned. Nothing makes up for what went.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.methods.base import METHODS
from sparsekit.methods.structured.allocation import best_units
from sparsekit.methods.structured.base import Decided, Job, Reader, WidthMethod
from sparsekit.methods.structured.inputs import InputSums
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import Recovered, only_columns


@dataclass(frozen=True, kw_only=True)
class WandaSP(WidthMethod):
    """Structured pruning by weight and activation. Fields as in `WidthMethod`."""

    name = "wanda_sp"

    @property
    def second_pass(self) -> type[InputSums]:
        return InputSums

    def unit_scores(self, reader: Reader, inputs: InputSums | None) -> Tensor:
        assert inputs is not None
        norms = inputs.rms * inputs.num_tokens**0.5
        return reader.per_unit(reader.w_NK.abs().mean(dim=0) * norms).sum(dim=1)

    def score(self, job: Job) -> dict[str, Tensor]:
        return {}  # each layer is judged when its turn comes

    def decide(self, job: Job, reader: Reader, num: int, seen: InputSums | Moments | None) -> Decided:
        assert isinstance(seen, InputSums)
        kept = best_units(self.unit_scores(reader, seen), num)
        return Decided(kept, Recovered(only_columns(reader.w_NK, reader.columns_of(kept))))


METHODS.register("wanda_sp", WandaSP)
