"""The default: units by what they contribute, readers refitted in closed form, widths by measured sensitivity.

Without labels and without gradients, in two passes over the data:

1. In the dense model, width by width: how much do the answers suffer when it shrinks (`sensitivity`)? From these curves
   the solver of budgets takes the widths that cost the answers least.
2. From the bottom up, with all units that went before: which units of a reader the others can make up for best
   (`removals`), or, with selection="score", which contribute least: rms(a_j) · ‖W_:j‖, which does not change when
   something moves between a filter's input and output weights. What stays is refitted by ridge regression such that the
   residual stream comes out as in the dense model, with what went before it made up for, too.
"""

from dataclasses import dataclass

from torch import Tensor

from sparsekit.methods.base import METHODS
from sparsekit.methods.structured.allocation import best_units
from sparsekit.methods.structured.base import (
    ALLOCATIONS,
    Decided,
    Job,
    Reader,
    WidthMethod,
    check_choice,
    check_positive,
    global_values,
)
from sparsekit.methods.structured.inputs import InputSums
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import columns_of, refit
from sparsekit.methods.structured.removal import removals
from sparsekit.methods.structured.sensitivity import sensitivity_curves


@dataclass(frozen=True, kw_only=True)
class Contribution(WidthMethod):
    """Label-free structured pruning with a refit.

    Attributes:
        selection: "removal" takes out, one after the other, the units that those left can stand in for; "score" keeps
            the largest rms(a_j) · ‖W_:j‖ (of a head: the root of the sum of squares over its columns).
        allocation: "sensitivity" as above; "global" compares scores of all layers; "uniform" takes the same share.
        hidden: whether dimensions of the residual stream may go as well, turned to its principal directions first (see
            `SliceGPT`), as many as cost the answers least together with heads and channels. None: where the model has
            RMSNorms, and a head with a weight of its own or a small one: one that is tied would need its own.
        turn: turn the residual stream before hidden dimensions go. False where it is turned already: then the last ones
            go, as they are.
        damping: of the ridge regression, relative to the mean square of the inputs.
        add_biases: give readers a bias, where the model's config can ask for one.
    """

    selection: str = "removal"
    allocation: str = "sensitivity"
    hidden: bool | None = None
    turn: bool = True
    damping: float = 0.01
    add_biases: bool = False

    name = "contribution"
    updates_weights = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice(self, "selection", ("removal", "score"))
        check_choice(self, "allocation", ALLOCATIONS)
        check_positive(self, "damping")
        if self.hidden is not None and not isinstance(self.hidden, bool):
            raise ValueError(f"hidden={self.hidden!r} is neither None nor True or False")
        if not isinstance(self.turn, bool):
            raise ValueError(f"turn={self.turn!r} is neither True nor False")
        if self.hidden and self.allocation != "sensitivity":
            raise ValueError(
                f"hidden=True goes with allocation='sensitivity', which weighs hidden dimensions against others, and "
                f"not with {self.allocation!r}"
            )

    @property
    def wants_biases(self) -> bool:
        return self.add_biases

    @property
    def thins(self) -> bool | None:
        return self.hidden if self.allocation == "sensitivity" else False

    @property
    def turns(self) -> bool:
        return self.turn

    @property
    def second_pass(self) -> type[Moments]:
        return Moments

    def unit_scores(self, reader: Reader, inputs: InputSums | None) -> Tensor:
        assert inputs is not None
        size = inputs.rms.square() * reader.w_NK.double().square().sum(dim=0).to(inputs.rms)
        return reader.per_unit(size).sum(dim=1).sqrt()

    def score(self, job: Job) -> dict[str, Tensor]:
        return super().score(job) if self.allocation == "global" else {}

    def count(self, job: Job) -> dict[str, int]:
        if self.allocation == "uniform":
            return job.solver.evenly()
        if self.allocation == "global":
            return job.solver.choose(global_values(job.scores))
        job.sensitivity = sensitivity_curves(job, job.solver.least, self.damping)
        values = {name: -curve for name, curve in job.sensitivity.items()}
        if (thinner := job.thinner) is None:
            return job.solver.choose(values)
        thinner.num_kept, counts = job.solver.choose_stream(
            job.model, values, thinner.losses, thinner.size, thinner.untied
        )
        return counts

    def decide(self, job: Job, reader: Reader, num: int, seen: InputSums | Moments | None) -> Decided:
        assert isinstance(seen, Moments)
        w_NK, bias, columns = reader.w_NK, reader.bias, reader.width.columns
        if self.selection == "removal":
            (removal,) = removals(seen, w_NK, bias, columns, [num], self.damping)
            return Decided(removal.kept, removal.reader)
        kept = best_units(self.unit_scores_of(reader, seen), num)
        return Decided(kept, refit(seen, w_NK, bias, columns_of(kept, columns), self.damping))

    def unit_scores_of(self, reader: Reader, seen: Moments) -> Tensor:
        """Return the scores of units from the inputs of the model as pruned so far, [num_units]."""
        square = seen.gram.diagonal().double() / seen.weight
        size = square * reader.w_NK.double().square().sum(dim=0).to(square)
        return reader.per_unit(size).sum(dim=1).sqrt().cpu()


METHODS.register("contribution", Contribution)
