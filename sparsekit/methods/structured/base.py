"""What a structured method is: a frozen config that says which heads and channels go, and what the layers that read
them do about it.

Three questions, in this order, each answered by a method of the config: what is each unit worth (`unit_scores`), how
many stay where (`values`: the solver of budgets does the rest), and what becomes of a reader (`decide`). The engine,
`sparsekit.prune_structured`, asks them, with the data that they ask for.
"""

import dataclasses
from abc import ABC
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, Self

from torch import Tensor, nn

from sparsekit.archs import Width
from sparsekit.budgets import Budget, values_of
from sparsekit.calibration.samples import Batch
from sparsekit.methods.structured.allocation import best_units, normalised
from sparsekit.methods.structured.inputs import InputSums, input_sums
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.recover import Recovered, columns_of, only_columns
from sparsekit.patterns import Pattern, Structured, check_sparsity, parse_pattern
from sparsekit.plan import Plan
from sparsekit.progress import Progress
from sparsekit.registry import unknown
from sparsekit.snapshot import Snapshot
from sparsekit.targets import weight_NK

ALLOCATIONS = ("uniform", "global", "sensitivity")


class Solver(Protocol):
    """What may stay, as the engine works it out.

    Attributes:
        least: width -> units that it keeps whatever the budget.
    """

    least: dict[str, int]

    def choose(self, values: dict[str, Tensor], *, eased: bool = False) -> dict[str, int]:
        """Return how many units of each width stay, of the largest total value that the budget pays for.

        Args:
            values: width -> worth of n units, [num_units + 1].
            eased: of half the way to the budget, in ratio: the square root of the share that may stay.
        """

    def above_threshold(self, scores: dict[str, Tensor]) -> dict[str, int]:
        """Return how many units of each width stay if one threshold is laid across the scores of all, whatever they
        cost."""

    def evenly(self) -> dict[str, int]:
        """Return how many units of each width stay if each loses the same share."""

    def choose_stream(
        self, model: nn.Module, values: dict[str, Tensor], losses: dict[int, float], size: int, untied: int
    ) -> tuple[int, dict[str, int]]:
        """Return how many hidden dimensions and how many units of each width stay, of the largest total value."""


class ThinStream(Protocol):
    """A residual stream that can be made thinner; see `sparsekit.thin_stream.Thinner`."""

    size: int
    num_kept: int
    untied: int
    losses: dict[int, float]

    def thin_(self, plan: Plan, snapshot: Snapshot) -> dict[str, Tensor]:
        """Make it so thin, and return the weights of the model as it was."""


@dataclass
class Job:
    """What a method works on.

    Attributes:
        model: in its full shapes.
        widths: what can go, in the order in which it runs.
        batches: calibration data; empty where the method takes none.
        solver: what may stay.
        bar: to show progress on.
        seed: of random choices.
        labelled: the same data with "labels", where the method needs them.
        scores: width -> what each unit is worth, [num_units], where the method scores units.
        inputs: width -> what its reader is fed in the dense model, where the method asked.
        gradients: width -> gradient of each batch's loss by its mask, [batches, num_units], where the method asked.
        first_only: widths of which the model's head reads the first token alone.
        joins: reader -> where its output joins the residual stream, as far as that was looked for; see `Watcher`.
        sensitivity: width -> how much the answers suffer with n of its units, for the plan, where that was measured.
        notes: for the plan.
        thinner: the residual stream, where it may lose dimensions, too.
        failure: why the rest of the readers are left as they are; "" while all is well.
    """

    model: nn.Module
    widths: list[Width]
    batches: list[Batch]
    solver: Solver
    bar: Progress
    seed: int = 0
    labelled: list[Batch] = field(default_factory=list)
    scores: dict[str, Tensor] = field(default_factory=dict)
    inputs: dict[str, InputSums] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    first_only: frozenset[str] = frozenset()
    joins: dict[str, str | None] = field(default_factory=dict)
    sensitivity: dict[str, Tensor] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    thinner: ThinStream | None = None
    failure: str = ""

    def reader(self, width: Width) -> "Reader":
        """Return the layer that reads a width."""
        return Reader(width, self.model.get_submodule(width.name))


@dataclass(frozen=True)
class Reader:
    """The layer that reads a width."""

    width: Width
    layer: nn.Module

    @property
    def w_NK(self) -> Tensor:
        """Its weight, fp32 [N, K]."""
        return weight_NK(self.layer).float()

    @property
    def bias(self) -> Tensor | None:
        """Its bias, [N], detached."""
        bias = getattr(self.layer, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    def columns_of(self, units: Tensor) -> Tensor:
        """Return the columns of some units, int64."""
        return columns_of(units, self.width.columns)

    def per_unit(self, columns: Tensor) -> Tensor:
        """Return a vector [K] as [units, columns of each]."""
        return columns.unflatten(0, (-1, self.width.columns))


@dataclass(frozen=True)
class Decided:
    """What becomes of a reader: the units that stay, int64 ascending, and its new weight and bias."""

    kept: Tensor
    reader: Recovered


@dataclass(frozen=True, kw_only=True)
class StructuredMethod(ABC):
    """Config of a method that makes a model smaller.

    Attributes:
        sparsity: share of the weights of the blocks to remove.
        constraints: a budget in place of a sparsity: {"flops": "60%"}, {"params": 5e9}, {"latency_ms": 12.0} or
            {"speedup": 1.5}; see `sparsekit.budgets`.
        length: tokens of a sequence, for budgets in FLOPs or time; None for the mean of the calibration data.
        batch: sequences in a batch, for budgets in time.
    """

    pattern: str = "structured"
    sparsity: float = 0.5
    constraints: dict[str, Any] | None = None
    length: float | None = None
    batch: int = 1

    name: ClassVar[str]
    needs_data: ClassVar[bool] = True
    needs_labels: ClassVar[bool] = False
    updates_weights: ClassVar[bool] = False
    """Whether kept weights change too."""
    kind: ClassVar[Pattern] = Structured()
    format: ClassVar[None] = None
    """Packed format that the result is meant for: none, it is dense."""

    def __post_init__(self) -> None:
        if self.parsed_pattern != self.kind:
            raise ValueError(f"{self.name} makes the pattern {self.kind}, and pattern={self.pattern!r} was asked for")
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float):
            raise ValueError(f"sparsity={self.sparsity!r} is not a number: use a share of the weights, as 0.5")
        check_sparsity(self.sparsity)
        if self.constraints is not None and self.sparsity != 0.5:
            raise ValueError(
                f"sparsity={self.sparsity} and constraints={self.constraints!r} are two budgets: give one of them"
            )
        Budget.parse(self.budget)
        if self.length is not None:
            check_positive(self, "length")
        check_counts(self, "batch")

    @property
    def parsed_pattern(self) -> Pattern:
        return parse_pattern(self.pattern)

    @property
    def budget(self) -> float | dict[str, Any]:
        """What may stay, as `Budget.parse` takes it."""
        return self.sparsity if self.constraints is None else self.constraints

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Return the config that `to_dict` described."""
        known = [each.name for each in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(unknown(f"field of {cls.__name__}", name, known))
        return cls(**fields)


@dataclass(frozen=True, kw_only=True)
class WidthMethod(StructuredMethod):
    """Config of a method that takes heads and channels out of a model.

    Attributes:
        round_to: what is left of each dimension is a multiple of this.
        tensor_parallel: over how many devices each layer must be possible to split.
        uniform: leave as many in each layer, so that a plain config of transformers describes the result.
        min_heads, min_channels: what each layer keeps at least.
    """

    round_to: int = 1
    tensor_parallel: int = 1
    uniform: bool = False
    min_heads: int = 1
    min_channels: int = 8

    kinds: ClassVar[tuple[str, ...]] = ("heads", "channels")
    """What it takes out."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(self, "round_to", "tensor_parallel", "min_heads", "min_channels")
        if not isinstance(self.uniform, bool):
            raise ValueError(f"uniform={self.uniform!r} is neither True nor False")

    @property
    def wants_biases(self) -> bool:
        """Whether readers without a bias are to be given one, where the model's config can ask for it."""
        return False

    @property
    def thins(self) -> bool | None:
        """Whether hidden dimensions are to go, too; None: where that costs nothing else."""
        return False

    @property
    def turns(self) -> bool:
        """Whether the residual stream is turned to its principal directions before it is made thinner."""
        return True

    @property
    def second_pass(self) -> type[InputSums] | type[Moments] | None:
        """What `decide` wants to see of a reader, in the model as it is by then; None where it needs not look."""
        return None

    def fits_first_only(self, width: Width) -> bool:
        """Return whether a reader whose output the model's head reads at the first token alone is fitted to that."""
        return True

    def unit_scores(self, reader: Reader, inputs: InputSums | None) -> Tensor:
        """Return what each unit of a width is worth, [num_units], comparable within the width.

        Args:
            reader: the layer that reads it.
            inputs: what it was fed in the dense model; None for a method without data.
        """
        raise NotImplementedError(f"{self.name} scores no units by themselves")

    def score(self, job: Job) -> dict[str, Tensor]:
        """Return width -> what each unit is worth."""
        if self.needs_data:
            job.inputs = input_sums(job.model, [width.name for width in job.widths], job.batches)
        return {
            width.name: self.unit_scores(job.reader(width), job.inputs.get(width.name)).double().cpu()
            for width in job.widths
        }

    def count(self, job: Job) -> dict[str, int]:
        """Return width -> how many of its units stay; `job.scores` is there."""
        return job.solver.evenly()

    def teacher(self, job: Job) -> dict[str, int] | None:
        """Return width -> units left in the model whose outputs are the targets of `decide`; None: the dense model."""
        return None

    def decide(self, job: Job, reader: Reader, num: int, seen: InputSums | Moments | None) -> Decided:
        """Return what becomes of a reader.

        Args:
            job: with scores.
            reader: as it is in the dense model.
            num: units to keep.
            seen: what `second_pass` asks for: of inputs in the model as pruned so far, and of targets such that the
                sum that the reader writes to would come out as the teacher has it.
        """
        kept = best_units(job.scores[reader.width.name], num)
        return Decided(kept, Recovered(only_columns(reader.w_NK, reader.columns_of(kept))))


def check_counts(config: Any, *names: str) -> None:
    """Raise ValueError unless fields of a config are whole numbers of at least 1."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_positive(config: Any, *names: str) -> None:
    """Raise ValueError unless fields of a config are positive numbers."""
    for name in names:
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise ValueError(f"{name}={value!r} must be a positive number")


def check_choice(config: Any, name: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless a field of a config is one of these words."""
    if getattr(config, name) not in known:
        raise ValueError(unknown(name, getattr(config, name), list(known)))


def global_values(scores: dict[str, Tensor], normalise: str = "none") -> dict[str, Tensor]:
    """Return width -> worth of its n best units, [num_units + 1], their scores added up."""
    return {name: values_of(normalised(each, normalise)) for name, each in scores.items()}
