"""Arguments of NutePrune: structured pruning with numerous teachers in one model (arXiv 2402.09773)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

from torch import nn

from sparsekit.budgets import Budget
from sparsekit.patterns import Pattern, Structured, check_sparsity, parse_pattern
from sparsekit.plan import Plan
from sparsekit.registry import unknown
from sparsekit.train.config import SparseTrainingArguments, check_not_negative, check_share, check_whole
from sparsekit.train.constraint import RAMPS
from sparsekit.train.nuteprune_start import OPEN_GATES, check_start
from sparsekit.train.teacher_schedule import TEACHERS

GATES = ("hard_concrete", "deterministic")
HIDDEN_LOSSES = ("relative", "paper")
KD_REDUCTIONS = ("tokens", "sequences")
KD_KINDS = ("forward_kl", "reverse_kl")
ALL_LINEAR = "all-linear"
"""In place of names of layers: all linear layers of the blocks."""


@dataclass
class NutePruneConfig(SparseTrainingArguments):
    """Arguments of `NutePruneTrainer`; all of `transformers.TrainingArguments` is there as well.

    LoRA learns to make up for heads (under grouped queries key-value heads with their queries) and channels that go.
    What goes is chosen by a one-shot method, which also refits the layers that read them, or by gates that learn, too
    (see `start`). The teachers are the same model with earlier masks and earlier LoRA, or whole: where a one-shot start
    has no `stages` and nothing to `keep`, the whole model throughout. `paper` gives the published recipe.

    Attributes:
        sparsity: share of the parameters of heads and channels to remove. 0 removes none, and only trains LoRA; see
            `recovery`.
        constraints: a budget in place of a sparsity: {"params": 5e9}, {"flops": "60%"}, {"latency_ms": 12.0} or
            {"speedup": 1.5}; in the last two, measured milliseconds are what gates count.
        length: tokens of a sequence, for budgets in FLOPs or time; None for the mean of the training data.
        batch: sequences in a batch, for budgets in time.
        start: where the student begins: as what a one-shot method leaves, "contribution", with its repair; or
            "open", with all units there and a target that rises, as published. None is "contribution", and "open"
            where layers have gates, too.
        stages: of a one-shot start: smaller sparsities to halt at on the way, beside those of `keep`. All have as many
            steps; at the end of each the student becomes a teacher, and the method chooses anew what goes.
        num_calibration_samples: samples of the training data for the one-shot method.
        gates: "hard_concrete" draws in each step; "deterministic" takes the same soft gates without noise.
        hidden: whether dimensions of the residual stream may go, too. None: with start="contribution" and where the
            model has RMSNorms and a head with a weight of its own.
        untie: give a head that shares the embedding's weight its own, for `hidden`. The model then has one matrix
            more, which may weigh more than what goes.
        layers: whether blocks as a whole have gates, too.
        uniform: leave as many units in each layer, so that a plain config of transformers describes the result.
        round_to: what is left of each dimension is a multiple of this.
        tensor_parallel: over how many devices each layer must be possible to split.
        min_heads, min_channels: what each layer keeps at least.
        sparsity_warmup: share of all steps in which the target rises from 0. None is 0.3 for an open start, 0 for
            others.
        ramp: how it rises: "linear", or "cubic", which is fast at first.
        gate_learning_rate: of the gates, constant.
        multiplier_learning_rate: of the Lagrange multipliers, constant. The published 0.1 takes hundreds of steps to
            move gates.
        teachers: who teaches in a step: "nearest" takes the snapshot, or the intact model, that is measured to be the
            nearest to the student above a distance; "paper" the one that is ten marks of 1 % behind, and back from
            there once the target is reached; "intact" the dense model; "none" the text alone.
        teacher_steps: optimizer steps between two measurements of the distance to the teachers.
        teacher_spacing: of gates that learn: a snapshot is taken each time that this much more has gone.
        teacher_lag: of "paper": how many such marks the teacher is behind the student.
        lora_rank, lora_alpha: of the adapters; alpha None for the rank.
        lora_targets: "all-linear" for all linear layers of the blocks, or endings of their names, as ["q_proj",
            "v_proj"].
        kd_weight: weight of the KL divergence from the teacher.
        ce_weight: weight of the cross entropy with the text.
        hidden_weight: weight of the distance between the hidden states of student and teacher, block by block.
        hidden_loss: "relative" to the size of the teacher's, a mean over blocks; or "paper", the mean square over
            entries that are not zero in the student, a sum over blocks.
        temperature: of the KL divergence; the loss is multiplied by its square.
        kd_kind: "forward_kl" or "reverse_kl".
        kd_reduction: the KL is a mean over "tokens", or over "sequences", each the sum of its tokens, as published.
        frozen_share: share of all steps, at the end, in which gates are closed or open for good, within the budget
            exactly, and LoRA alone learns. With stages, gates learn in the last of them alone. None is 0.2 for an open
            start, and 1 for others: what their method chose stays.
        keep: smaller sparsities to keep on the way: a family of models from one run, see
            `NutePruneTrainer.family`.
        merge_lora: add LoRA to the weights at the end; otherwise it stays beside them, as a side branch, which cannot
            follow `hidden`.
        snapshots_on_disk: hold the teachers' gates and LoRA in files in `output_dir` rather than in memory. Either way
            LoRA is held in bf16, so a teacher is the earlier student up to that rounding.
    """

    method: ClassVar[str] = "nuteprune"
    format: ClassVar[None] = None
    """Packed format that the result is meant for: none, it is dense."""

    pattern: str = "structured"
    sparsity: float = 0.5
    constraints: dict[str, Any] | None = None
    length: float | None = None
    batch: int = 1
    start: str | None = None
    stages: Any = ()
    num_calibration_samples: int = 128
    gates: str = "hard_concrete"
    hidden: bool | None = None
    untie: bool = False
    layers: bool = False
    uniform: bool = False
    round_to: int = 1
    tensor_parallel: int = 1
    min_heads: int = 1
    min_channels: int = 8
    sparsity_warmup: Any = None
    ramp: str = "linear"
    gate_learning_rate: float = 0.1
    multiplier_learning_rate: float = 1.0
    teachers: str = "nearest"
    teacher_spacing: float = 0.01
    teacher_lag: int = 10
    teacher_steps: int = 10
    lora_rank: int = 16
    lora_alpha: Any = None
    lora_targets: Any = ALL_LINEAR
    kd_weight: float = 1.0
    ce_weight: float = 0.0
    hidden_weight: float = 1.0
    hidden_loss: str = "relative"
    temperature: float = 1.0
    kd_kind: str = "forward_kl"
    kd_reduction: str = "tokens"
    frozen_share: Any = None
    keep: Any = ()
    merge_lora: bool = True
    snapshots_on_disk: bool = False
    learning_rate: float = field(default=1e-3)
    lr_scheduler_type: str = field(default="linear")
    warmup_steps: float = field(default=0)
    adam_beta2: float = field(default=0.999)
    output_dir: str | None = field(default="nuteprune-output")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.sparsity, bool) or not isinstance(self.sparsity, int | float):
            raise ValueError(f"sparsity={self.sparsity!r} is not a number: use a share of the weights, as 0.5")
        check_sparsity(self.sparsity)
        if self.constraints is not None and self.sparsity != 0.5:
            raise ValueError(
                f"sparsity={self.sparsity} and constraints={self.constraints!r} are two budgets: give one of them"
            )
        measure = Budget.parse(self.budget).measure
        for name in (
            "batch",
            "round_to",
            "tensor_parallel",
            "min_heads",
            "min_channels",
            "lora_rank",
            "teacher_steps",
            "teacher_lag",
            "num_calibration_samples",
        ):
            check_whole(name, getattr(self, name))
        self._settle_start()
        for name in ("sparsity_warmup", "frozen_share"):
            check_share(name, getattr(self, name))
        if self.sparsity_warmup + self.frozen_share > 1 + 1e-9:
            raise ValueError(
                f"sparsity_warmup={self.sparsity_warmup:g} and frozen_share={self.frozen_share:g} are more than the "
                "whole of the training: gates are frozen once the target has stopped rising, so lower one of them"
            )
        if self.lora_alpha is None:
            self.lora_alpha = float(self.lora_rank)
        self._check_numbers()
        for name, known in (
            ("gates", GATES),
            ("teachers", TEACHERS),
            ("ramp", RAMPS),
            ("hidden_loss", HIDDEN_LOSSES),
            ("kd_kind", KD_KINDS),
            ("kd_reduction", KD_REDUCTIONS),
        ):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), list(known)))
        if self.is_one_shot and self.frozen_share == 1:
            self._refuse_what_gates_would_learn()
        self.lora_targets = _names("lora_targets", self.lora_targets)
        self.keep, self.stages = self._on_the_way("keep"), self._on_the_way("stages")
        if self.stages and self.start == OPEN_GATES:
            raise ValueError(
                f"stages={self.stages!r} is for a one-shot start: an open one passes all sparsities anyway"
            )
        if self.teachers != "none" and self.kd_weight == self.hidden_weight == 0:
            raise ValueError(
                f"teachers={self.teachers!r}, kd_weight=0 and hidden_weight=0: nobody listens to the teacher; use "
                "teachers='none' for the text alone"
            )
        if self.max_steps > 0:
            self.freeze_step(self.max_steps)
        if self.hidden and measure == "ns":
            raise ValueError(
                f"hidden=True and {self.constraints!r}: a budget in time knows the cost of heads and channels only"
            )
        if self.hidden and self.prunes and not self.merge_lora:
            raise ValueError(
                "hidden=True and merge_lora=False: LoRA that stays beside the weights cannot be cut with hidden "
                "dimensions; leave merge_lora at True, or hidden at False"
            )
        if self.untie and not self.hidden:
            raise ValueError("untie=True is for hidden=True, and hidden dimensions stay here: leave it out")

    def _check_numbers(self) -> None:
        positive = ("gate_learning_rate", "multiplier_learning_rate", "temperature", "lora_alpha")
        for name in (*positive, "kd_weight", "ce_weight", "hidden_weight"):
            check_not_negative(name, getattr(self, name))
        for name in (*positive, *(("length",) if self.length is not None else ())):
            check_not_negative(name, getattr(self, name))
            if getattr(self, name) == 0:
                raise ValueError(f"{name}=0 must be greater than 0")
        if not 0 < self.teacher_spacing < 1:
            raise ValueError(f"teacher_spacing={self.teacher_spacing!r} must lie between 0 and 1, as 0.01")
        if self.teachers == "none" and self.ce_weight == 0:
            raise ValueError("teachers='none' and ce_weight=0: there is nothing to learn from; set ce_weight=1")
        if self.kd_weight + self.ce_weight + self.hidden_weight == 0:
            raise ValueError("kd_weight, ce_weight and hidden_weight are all 0: there is nothing to learn from")

    def _settle_start(self) -> None:
        """Fill in what depends on the start, and check that its parts go together."""
        if self.start is None:
            self.start = OPEN_GATES if self.layers else "contribution"
        check_start(self.start)
        is_open = self.start == OPEN_GATES
        if self.hidden is None and (self.start != "contribution" or not self.prunes or not self.merge_lora):
            self.hidden = False
        if self.hidden is None and Budget.parse(self.budget).measure == "ns":
            self.hidden = False
        if self.sparsity_warmup is None:
            self.sparsity_warmup = 0.3 if is_open else 0.0
        if self.frozen_share is None:
            self.frozen_share = 0.2 if is_open else 1.0
        if is_open or not self.prunes:
            return
        if self.frozen_share == 1 and (self.layers or (self.hidden and self.start != "contribution")):
            kind = "layers" if self.layers else "hidden"
            raise ValueError(
                f"{kind}=True, start={self.start!r} and frozen_share=1: the method chooses among heads and channels, "
                "and nothing else could go; use start='open', or frozen_share=0.5, so that gates learn"
            )
        if self.teachers == "paper":
            raise ValueError(
                f"teachers='paper' and start={self.start!r}: those teachers stand every 1 % on the way of gates that "
                "close; use start='open', or teachers='nearest'"
            )

    def _refuse_what_gates_would_learn(self) -> None:
        for name, default in (("gates", "hard_concrete"), ("ramp", "linear"), ("sparsity_warmup", 0)):
            if getattr(self, name) != default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is for gates that learn, and with start={self.start!r} none do: "
                    "use start='open', or frozen_share=0.5"
                )

    def _on_the_way(self, name: str) -> list[float]:
        """Return the sparsities of `keep` or `stages`, rising."""
        given = getattr(self, name)
        asked = [given] if isinstance(given, str | int | float) else list(given or ())
        if asked and (self.constraints is not None or self.sparsity == 0):
            raise ValueError(f"{name}={asked!r} goes with a sparsity that is larger than those: give that")
        found = sorted({Budget.parse({"sparsity": each}).amount for each in asked})
        if found and not 0 < found[0] <= found[-1] < self.sparsity:
            raise ValueError(
                f"{name}={asked!r}: these are on the way to sparsity={self.sparsity}, so each must be between 0 and "
                "that"
            )
        return found

    def _check_pattern(self) -> None:
        if self.parsed_pattern != Structured():
            raise ValueError(f"{self.method} makes the pattern structured, and pattern={self.pattern!r} was asked for")

    def _refuse_what_is_not_done(self) -> None:
        super()._refuse_what_is_not_done()
        if self.fp16:
            raise ValueError("fp16=True: pruned models leave the range of fp16; use bf16=True, or leave both out")
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # its name of late
            kwargs = getattr(self, name, None)
            if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
                raise ValueError(
                    f"{name}: use_reentrant=True loses the gradient where weights are frozen: leave it out"
                )

    @property
    def parsed_pattern(self) -> Pattern:  # type: ignore[override]
        return parse_pattern(self.pattern)

    @property
    def name(self) -> str:
        return self.method

    @property
    def budget(self) -> float | dict[str, Any]:
        """What may stay, as `Budget.parse` takes it."""
        return self.sparsity if self.constraints is None else self.constraints

    @property
    def prunes(self) -> bool:
        """Whether anything is to go."""
        return self.constraints is not None or self.sparsity > 0

    @property
    def is_one_shot(self) -> bool:
        """Whether a one-shot method chooses what goes, or what gates start from."""
        return self.prunes and self.start != OPEN_GATES

    @property
    def kinds(self) -> tuple[str, ...]:
        """What has gates."""
        return ("heads", "channels", *(("hidden",) if self.hidden else ()), *(("layers",) if self.layers else ()))

    def stage_starts(self, num_steps: int) -> list[tuple[int, float | None]]:
        """Return the first step of each stage and its sparsity, None for that of the run; none of an open start.

        Raises:
            ValueError: the run is too short for them.
        """
        if not self.is_one_shot:
            return []
        stages = [*sorted({*self.keep, *self.stages}), None]
        if len(stages) > num_steps:
            raise ValueError(
                f"keep={self.keep!r} and stages={self.stages!r} make {len(stages)} stages, and there are {num_steps} "
                "steps: train longer, or halt less often"
            )
        return [(num_steps * index // len(stages), sparsity) for index, sparsity in enumerate(stages)]

    def freeze_step(self, num_steps: int) -> int:
        """Return the step from which on nothing more is chosen, and LoRA alone learns.

        Raises:
            ValueError: gates were to learn, and have no step for it.
        """
        last = max((start for start, _ in self.stage_starts(num_steps)), default=0)
        found = num_steps - round(num_steps * self.frozen_share)
        if self.is_one_shot and self.frozen_share < 1 and found <= last:
            raise ValueError(
                f"frozen_share={self.frozen_share:g} of {num_steps} steps begins at {found}, and the last stage, in "
                f"which gates were to learn, at {last}: lower frozen_share, or halt less often (stages, keep)"
            )
        return max(found, last)

    @classmethod
    def paper(cls, **fields: Any) -> Self:
        """Return the published recipe (that of the code at 50 %; up to 20 % with its longer ramp).

        What follows is ours all the same: the budget is met exactly, after the last step, and gates end at 0 or 1.

        Args:
            **fields: of this class; they go before those of the recipe.
        """
        sparsity, constraints = fields.get("sparsity", 0.5), fields.get("constraints")
        slow = isinstance(sparsity, int | float) and sparsity <= 0.2 and constraints is None
        in_time = constraints is not None and Budget.parse(constraints).measure == "ns"
        recipe: dict[str, Any] = {
            "start": OPEN_GATES,
            "hidden": not in_time,  # whose cost in milliseconds is not known
            "sparsity_warmup": 4 / 7 if slow else 1 / 7,
            "ramp": "linear",
            "multiplier_learning_rate": 0.1,
            "teachers": "paper",
            "lora_rank": 8,
            "lora_targets": ["q_proj", "v_proj"],
            "kd_weight": 0.1,
            "hidden_weight": 0.9,
            "hidden_loss": "paper",
            "temperature": 2 / 3,
            "kd_reduction": "sequences",
            "frozen_share": 0.0,
        }
        return cls(**recipe | fields)

    @classmethod
    def recovery(cls, **fields: Any) -> Self:
        """Return arguments by which a model that was cut learns from text alone, as the paper does after pruning.

        Nothing more is removed: LoRA on all linear layers, merged at the end. For instruction sets, labels of prompts
        are -100.

        Args:
            **fields: of this class; they go before those of the recipe.
        """
        recipe: dict[str, Any] = {
            "sparsity": 0.0,
            "teachers": "none",
            "kd_weight": 0.0,
            "ce_weight": 1.0,
            "hidden_weight": 0.0,
            "learning_rate": 1e-4,
            "lora_rank": 8,
        }
        return cls(**recipe | fields)

    def train_(
        self,
        model: nn.Module,
        dataset: Any,
        tokenizer: Any = None,
        *,
        targets: Any = ("Linear",),
        ignore: Any = ("lm_head",),
        progress: bool = True,
    ) -> Plan:
        """Train gates and LoRA of `model` on `dataset`, and return the plan; what `sparsekit.prune_` calls.

        The model keeps its shapes: what goes is made dead, and `sparsekit.apply_` cuts it out. Whatever ends the call
        early, the model is as it was; checkpoints stay in `output_dir`.
        """
        from sparsekit.train.nuteprune_trainer import NutePruneTrainer

        if self.keep:
            raise ValueError(
                f"keep={self.keep!r}: here one plan comes back, and the models kept on the way would be lost; use "
                "NutePruneTrainer and its family(), or stages to halt there only"
            )
        config = self.for_layers(targets, ignore)
        config.disable_tqdm = config.disable_tqdm or not progress
        trainer = NutePruneTrainer(model, config, dataset, processing_class=tokenizer)
        trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
        return trainer.plan()


def _names(name: str, given: Any) -> str | list[str]:
    """Return which layers get adapters: "all-linear", or endings of names."""
    if given == ALL_LINEAR:
        return ALL_LINEAR
    names = [given] if isinstance(given, str) else list(given or ()) if isinstance(given, list | tuple) else []
    if not names or not all(isinstance(each, str) and each for each in names):
        raise ValueError(f"{name}={given!r}: give {ALL_LINEAR!r}, or names of layers, as ['q_proj', 'v_proj']")
    return names
