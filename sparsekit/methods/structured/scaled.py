"""Methods that end with a scale for each unit that stays, tuned without labels (Kwon et al., arXiv 2204.09656, 4.3).

Layer by layer from the bottom, student and teacher each run on their own inputs. The teacher is not the dense model but
the same scores cut at the square root of the budget (a schedule of two steps, in the official code), untuned: nearer to
the student, so that scales alone can follow it. Where a fit fails, this and all later layers keep scales of one, which
is noted; the official code does so without a word.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.archs import Width
from sparsekit.methods.structured.allocation import best_units
from sparsekit.methods.structured.base import Decided, Job, Reader, WidthMethod, check_choice
from sparsekit.methods.structured.inputs import InputSums
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import Recovered, only_columns, refit, tune_scales


@dataclass(frozen=True, kw_only=True)
class ScaledMethod(WidthMethod):
    """A method with scores, and scales after them.

    Attributes:
        recovery: "scale" tunes a scale for each unit; "refit" fits new columns to the dense model's outputs, by ridge
            regression; "none" leaves what stays as it is.
        teacher_model: whose outputs the scales are fitted to: "sqrt" as in the official code, or "dense".
        damping: of "refit", relative to the mean square of the inputs.
    """

    recovery: str = "scale"
    teacher_model: str = "sqrt"
    damping: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "recovery", ("scale", "refit", "none"))
        check_choice(self, "teacher_model", ("sqrt", "dense"))
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping={self.damping} must be a positive number, as 0.01")

    updates_weights = True

    @property
    def second_pass(self) -> type[Moments] | None:
        return None if self.recovery == "none" else Moments

    def fits_first_only(self, width: Width) -> bool:
        # The official code does so for the MLP, and tunes the heads of the last attention on all tokens.
        return self.recovery != "scale" or width.kind == "channels"

    def teacher(self, job: Job) -> dict[str, int] | None:
        if self.recovery != "scale" or self.teacher_model == "dense":
            return None
        return job.solver.choose(self.values(job), eased=True)

    def values(self, job: Job) -> dict[str, Tensor]:
        """Return width -> worth of its n best units, [num_units + 1]."""
        raise NotImplementedError

    def count(self, job: Job) -> dict[str, int]:
        return job.solver.choose(self.values(job))

    def choose(self, job: Job, reader: Reader, num: int) -> Tensor:
        """Return the units of a reader that stay, int64 ascending."""
        return best_units(job.scores[reader.width.name], num)

    def is_tuned(self, job: Job, reader: Reader) -> bool:
        """Return whether a reader takes part in the tuning of scales."""
        return True

    def decide(self, job: Job, reader: Reader, num: int, seen: InputSums | Moments | None) -> Decided:
        kept = self.choose(job, reader, num)
        columns = reader.columns_of(kept)
        plain = Decided(kept, Recovered(only_columns(reader.w_NK, columns)))
        if not isinstance(seen, Moments):
            return plain
        if self.recovery == "refit":
            return Decided(kept, refit(seen, reader.w_NK, reader.bias, columns, self.damping))
        if job.failure or not self.is_tuned(job, reader):
            return plain
        width = reader.width
        tuned = tune_scales(seen, reader.w_NK, reader.bias, kept, width.columns, offset=width.kind == "heads")
        if tuned.failure:
            job.failure = (
                f"tuning of scales ended at {width.name}, for {tuned.failure}: this and all later layers keep 1"
            )
            job.notes.append(job.failure)
            return plain
        weight = plain.reader.weight.clone()
        scales = tuned.scales.to(weight).repeat_interleave(width.columns)
        weight[:, columns] *= scales
        return Decided(kept, Recovered(weight))
