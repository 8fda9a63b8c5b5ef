"""What all trained methods share: a `transformers.TrainingArguments` that says what to prune as well."""

import copy
import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from types import NoneType
from typing import Any, ClassVar, Self, get_args

import torch
from transformers import TrainingArguments

from sparsekit.patterns import NM, parse_pattern
from sparsekit.plan import Plan
from sparsekit.registry import nearest

DIGEST_FIELDS = (
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "warmup_steps",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "lr_scheduler_kwargs",
    "seed",
    "data_seed",
    "dataloader_drop_last",
    "average_tokens_across_devices",
    "bf16",
    "fp16",
    "neftune_noise_alpha",
)
"""Fields of `TrainingArguments` that change the result of a run."""


@dataclass
class SparseTrainingArguments(TrainingArguments):
    """Arguments of a trained method; all of `TrainingArguments` is there as well.

    Attributes:
        pattern: which zeros are legal, N:M.
        max_seq_length: tokens of a training sample, where the dataset is text.
        targets: which layers, see `sparsekit.prune_`.
        ignore: which of them not.
        ddp_find_unused_parameters: look, in every step, for weights that DDP need not wait for. For models of which a
            batch may leave out a part, as experts.
    """

    method: ClassVar[str] = ""

    pattern: str = "2:4"
    max_seq_length: int = 2048
    targets: list[str] = field(default_factory=lambda: ["Linear"])
    ignore: list[str] = field(default_factory=lambda: ["lm_head"])
    learning_rate: float = field(default=2e-4)
    lr_scheduler_type: str = field(default="cosine")
    warmup_steps: float = field(default=0.05)
    adam_beta2: float = field(default=0.95)
    remove_unused_columns: bool = field(default=False)
    report_to: Any = field(default="none")
    ddp_find_unused_parameters: bool | None = field(default=False)

    def __new__(cls, *_: Any, **fields: Any) -> Self:
        _refuse_unknown(cls, fields)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        self._refuse_wrong_types()
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it bf16 is refused, even where the processor has it
        super().__post_init__()
        self._refuse_what_is_not_done()
        self._check_pattern()
        self.pattern = str(parse_pattern(self.pattern))
        check_whole("max_seq_length", self.max_seq_length, at_least=2)
        for name in ("targets", "ignore"):
            value = getattr(self, name)
            setattr(self, name, [value] if isinstance(value, str) or callable(value) else list(value or ()))

    def _check_pattern(self) -> None:
        if not isinstance(parse_pattern(self.pattern), NM):
            raise ValueError(f"pattern={self.pattern!r}: masks are trained for N:M patterns, as '2:4'")

    def _refuse_wrong_types(self) -> None:
        """Raise ValueError where a switch is neither True nor False, as "no" is not, which would count as True."""
        for known in dataclasses.fields(self):
            value, kinds = getattr(self, known.name), set(get_args(known.type) or (known.type,))
            if kinds <= {bool, NoneType} and not isinstance(value, bool) and value is not known.default:
                raise ValueError(f"{known.name}={value!r} must be True or False")

    def _refuse_what_is_not_done(self) -> None:
        if self.load_best_model_at_end or self.save_only_model:
            name = "load_best_model_at_end" if self.load_best_model_at_end else "save_only_model"
            raise ValueError(
                f"{name}=True: masks and dense weights are in the optimizer's state, which would be left behind. Take "
                "the checkpoint you want as a whole, with resume_from_checkpoint"
            )
        check_not_negative("learning_rate", self.learning_rate)
        if self.learning_rate == 0:
            raise ValueError(f"learning_rate={self.learning_rate} must be greater than 0, as 2e-4")
        if self.max_steps == 0:
            raise ValueError("max_steps=0: at least 1, or -1 for num_train_epochs")
        if self.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.label_smoothing_factor}: the loss here has none; leave it out"
            )
        if self.max_grad_norm is None:
            raise ValueError("max_grad_norm=None: a number, or 0 to leave gradients as they are")
        if str(getattr(self.optim, "value", self.optim)) not in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(f"optim={self.optim!r}: masked weights are trained by an AdamW of their own; leave it out")

    @property
    def parsed_pattern(self) -> NM:
        parsed = parse_pattern(self.pattern)
        assert isinstance(parsed, NM)
        return parsed

    @property
    def device(self) -> torch.device:
        """Device of this process. CPUs have no index here: `torch.load`, on resuming, knows no "cpu:0"."""
        device = super().device
        return torch.device("cpu") if device.type == "cpu" else device

    @property
    def autocast_dtype(self) -> torch.dtype | None:
        """Dtype that linear layers multiply in where weights have more bits; None for that of the weights."""
        return torch.bfloat16 if self.bf16 else torch.float16 if self.fp16 else None

    def own_fields(self) -> dict[str, Any]:
        """Return what says how the result comes about: the method's own fields, and those of the run; fit for JSON."""
        inherited = {known.name for known in dataclasses.fields(TrainingArguments)}
        own = [known.name for known in dataclasses.fields(self) if known.name not in inherited]
        return {name: _plain(getattr(self, name)) for name in (*own, *DIGEST_FIELDS)}

    def to_dict(self) -> dict[str, Any]:
        """Return all fields, fit for JSON; loggers write them down."""
        return super().to_dict() | self.own_fields()

    def for_layers(self, targets: Any, ignore: Any) -> Self:
        """Return a copy that prunes these layers, where they are others than the default ones."""
        config = copy.copy(self)
        for name, given, default in (("targets", targets, ["Linear"]), ("ignore", ignore, ["lm_head"])):
            listed = [given] if isinstance(given, str) or callable(given) else list(given or ())
            if listed != default:
                setattr(config, name, listed)
        return config

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Self:
        """Return the config with these fields."""
        return cls(**fields)


def _refuse_unknown(cls: type[SparseTrainingArguments], fields: dict[str, Any]) -> None:
    known = [each.name for each in dataclasses.fields(cls) if each.init]
    inherited = {each.name for each in dataclasses.fields(TrainingArguments)}
    for name in fields:
        if name not in known:
            near = nearest(name, known)
            raise ValueError(
                f"unknown field of {cls.__name__} {name!r}: {f'did you mean {near!r}? ' if near else ''}Its own are "
                f"{', '.join(each for each in known if each not in inherited)}; all of TrainingArguments are there, too"
            )


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, dict):
        return {str(key): _plain(each) for key, each in value.items()}
    if value is None or isinstance(value, bool | int | float | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Plan):
        return f"Plan {value.digest()}"
    return str(value) if isinstance(value, Path) else getattr(value, "__name__", type(value).__name__)


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless 0 <= value <= 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{name}={value!r} is a share: use a number from 0 to 1")


def check_not_negative(name: str, value: float) -> None:
    """Raise ValueError unless the value is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value!r} must be a number of at least 0")


def check_whole(name: str, value: int, at_least: int = 1) -> None:
    """Raise ValueError unless the value is a whole number of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise ValueError(f"{name}={value!r} must be a whole number of at least {at_least}")
