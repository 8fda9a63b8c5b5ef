"""What a one-shot method is: a frozen config that looks at one layer at a time."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self, TypeGuard

import torch
from torch import Tensor, nn

from sparsekit.calibration.statistics import Statistics
from sparsekit.formats import FORMATS
from sparsekit.methods.grid import is_quantised, round_to_nearest
from sparsekit.patterns import NM, Depth, Pattern, Structured, check_sparsity, parse_pattern
from sparsekit.registry import Registry, unknown

if TYPE_CHECKING:
    from sparsekit.methods.structured.base import StructuredMethod


@dataclass(frozen=True)
class Decision:
    """What a method makes of one layer.

    Attributes:
        keep: boolean [N, K], True = kept.
        weight: new weight, fp32 [N, K], zero where not kept; None where the kept entries stay as they are.
        scales: where the weight lies on the grid of a quantised format, the scales of that grid, as it stores them.
        notes: what happened that a reader must know, without the layer's name.
    """

    keep: Tensor
    weight: Tensor | None = None
    scales: Tensor | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OneShot(ABC):
    """Config of a method that prunes a layer from its weight and statistics of its inputs.

    With a quantised `format` the kept weights end on its grid, and packing then changes nothing. A method that does
    not know of it decides as ever, and its result is rounded to nearest (`rounded`).

    Attributes:
        pattern: which zeros are legal: "2:4", any "N:M", "64x64" (blocks) or "unstructured".
        sparsity: share of each layer's weights to remove. N:M fixes it, and takes the
            default, 0.5, for what it says.
        permute: put the inputs of down and output projections into the order that keeps the largest scores. What
            produces them is rewritten to give them in that order, so it costs nothing at run time. For N:M only.
        format: packed format that the result is meant for, as "semi24_int4"; None for any that rounds nothing.
    """

    pattern: str = "2:4"
    sparsity: float = 0.5
    permute: bool = False
    format: str | None = None

    name: ClassVar[str]
    statistics: ClassVar[type[Statistics] | None] = None
    """What the method must know about a layer's inputs; None where it needs no data."""
    updates_weights: ClassVar[bool] = False
    """Whether kept weights change too."""

    def __post_init__(self) -> None:
        parsed = parse_pattern(self.pattern)
        if isinstance(parsed, Structured | Depth):
            remedy = "depth" if isinstance(parsed, Depth) else "contribution"
            raise ValueError(
                f"{self.name} zeroes weights, and pattern='{parsed}' takes whole parts of a model out: use a method "
                f"that does, as method='{remedy}'"
            )
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float):
            raise ValueError(
                f"sparsity={self.sparsity!r} is not a number: use a share of the weights to remove, as 0.5"
            )
        check_sparsity(self.sparsity)
        fixed = parsed.fixed_sparsity()
        if fixed is not None and self.sparsity != 0.5 and abs(self.sparsity - fixed) > 5e-4:
            raise ValueError(
                f"pattern {parsed} removes {fixed:.3g} of the weights, and sparsity={self.sparsity} was asked for: "
                "leave sparsity out, or choose another pattern"
            )
        if not isinstance(self.permute, bool):
            raise ValueError(f"permute={self.permute!r} is neither True nor False")
        if self.permute and not isinstance(parsed, NM):
            raise ValueError(f"permute=True is for N:M: leave it out, or take another pattern than {parsed}, as 2:4")
        if self.format is not None:
            _check_format(self.format, parsed)
        object.__setattr__(self, "pattern", str(parsed))
        object.__setattr__(self, "sparsity", float(self.sparsity if fixed is None else fixed))

    @abstractmethod
    def decide(self, w_NK: Tensor, statistics: Statistics | None) -> Decision:
        """Return what to keep of a weight.

        Args:
            w_NK: the weight, fp32 [N, K]; not to be changed.
            statistics: of the layer's inputs, of the kind that `statistics` names.
        """

    def scores(self, w_NK: Tensor, statistics: Statistics | None) -> Tensor:
        """Return what it is worth to keep each weight, fp32 [N, K], not negative: |W_nk| * ||x_k||, or |W_nk| without
        data. The order of channels is chosen by these; `decide` may judge otherwise."""
        magnitudes = w_NK.abs()
        return magnitudes if statistics is None else magnitudes * statistics.column_norms.to(w_NK.device)

    def rounded(self, w_NK: Tensor, decision: Decision) -> Decision:
        """Return the decision about `w_NK` with the kept weights on the grid of `format`: to nearest, if not yet so."""
        if is_quantised(self.format) and decision.scales is None:
            kept = w_NK if decision.weight is None else decision.weight
            weight, scales = round_to_nearest(kept.float(), decision.keep, self.format)
            said = ("its weights were rounded to nearest, without compensation",) if self.updates_weights else ()
            return Decision(decision.keep, weight, scales, decision.notes + said)
        return decision

    @property
    def parsed_pattern(self) -> Pattern:
        return parse_pattern(self.pattern)

    def project(self, scores: Tensor) -> Tensor:
        """Return the legal `keep` [N, K] with the largest total score, at this config's sparsity."""
        pattern = self.parsed_pattern
        return (
            pattern.project(scores) if pattern.fixed_sparsity() is not None else pattern.project(scores, self.sparsity)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, fit for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Return the config that `to_dict` described."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in fields:
            if name not in known:
                raise ValueError(unknown(f"field of {cls.__name__}", name, known))
        return cls(**fields)


def holds_pattern(format: str, pattern: Pattern) -> bool:
    """Return whether a packed format holds whatever the pattern allows.

    A format judges weights, not patterns, so it is shown the one whose kept entries crowd along the diagonal.
    """
    kind, index = FORMATS.get(format), torch.arange(256)
    crowded = pattern.project(-(index[:, None] - index).abs().float())
    return kind.count_violations(crowded.to(kind.dtypes[0]))[0] == 0


def _check_format(format: str, pattern: Pattern) -> None:
    if not holds_pattern(format, pattern):
        raise ValueError(
            f"format={format!r} does not hold the pattern {pattern}: leave format out, or take another pattern (2:4 "
            "fits every semi24 format)"
        )


METHODS: Registry["type[OneShot] | type[StructuredMethod]"] = Registry("method")
"""Name of a method that does not train -> config class."""

TRAINED = {
    "ast": "sparsekit.train:ASTConfig",
    "maskllm": "sparsekit.train:MaskLLMConfig",
    "nuteprune": "sparsekit.train:NutePruneConfig",
}
"""Name of a trained method -> where its config class is; they need transformers, so each is imported when asked for."""


class Trained(Protocol):
    """Config of a method that trains: a `transformers.TrainingArguments` with what to prune."""

    method: ClassVar[str]
    pattern: str
    format: str | None

    @property
    def parsed_pattern(self) -> Pattern: ...

    def train_(
        self, model: nn.Module, dataset: Any, tokenizer: Any = None, *, targets: Any, ignore: Any, progress: bool
    ) -> Any:
        """Train the model in place, and return the `Plan`. Whatever ends it early, the model is as it was."""


def is_trained(method: object) -> TypeGuard[Trained]:
    """Return whether this is the config of a method that trains."""
    return not isinstance(method, type) and callable(getattr(method, "train_", None))


def is_one_shot(method: object) -> bool:
    """Return whether this is the config of a method that does not train."""
    from sparsekit.methods.structured.base import StructuredMethod  # which stands on this module

    return isinstance(method, OneShot | StructuredMethod)


def trained_config(name: str) -> type[Trained]:
    """Return the config class of a trained method."""
    module, _, attribute = TRAINED[name].partition(":")
    return getattr(import_module(module), attribute)


def method_config(method: Any, **fields: Any) -> Any:
    """Return the config that a name stands for, or the config itself: a `OneShot`, a `StructuredMethod`, a `Trained`.

    Raises:
        ValueError: no method has this name, or `method` is neither.
    """
    if isinstance(method, str):
        name = method.strip().lower()
        if name in TRAINED:
            return trained_config(name)(**fields)
        if name not in METHODS:
            raise ValueError(unknown("method", method, [*METHODS, *TRAINED]))
        return METHODS.get(name).from_dict(fields)
    if is_one_shot(method) or is_trained(method):
        return method
    given = f"{method.__name__} itself" if isinstance(method, type) else f"a {type(method).__name__}"
    raise ValueError(
        f"method is {given}: pass a name ({', '.join(map(repr, METHODS))}) "
        "or a config object, as SparseGPT(pattern='2:4')"
    )
