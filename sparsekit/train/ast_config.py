"""Arguments of AST: adaptive sparse training with annealed decay and distillation (arXiv 2407.20584)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from sparsekit.errors import Unsupported
from sparsekit.formats import FORMATS
from sparsekit.methods.grid import is_quantised
from sparsekit.nn import remember_grid_
from sparsekit.plan import Plan
from sparsekit.registry import unknown
from sparsekit.train.config import SparseTrainingArguments, check_not_negative, check_share, check_whole
from sparsekit.train.optimizer import MASKED_DECAY_KINDS
from sparsekit.train.start import check_start

KD_KINDS = ("forward_kl", "reverse_kl")
SLORB_INITS = ("mean", "data", "svd")


@dataclass
class ASTConfig(SparseTrainingArguments):
    """Arguments of `ASTTrainer`; all of `transformers.TrainingArguments` is there as well.

    Attributes:
        start: first mask: the name of a one-shot method, or a `Plan`. A method that updates the kept weights gives
            those too; what it removes starts from its dense value, cut to the smallest kept one of its group, and
            comes back when it outgrows one.
        mask_update_steps: optimizer steps between two choices of the mask (section 3.1: 10). 0 keeps the first mask.
        masked_decay_kind: how removed weights are pulled to zero, see `sparsekit.train.optimizer`.
        masked_decay: lambda at its peak (eq. 4). "auto" needs no search: in the decoupled form it is chosen so that
            what stays removed has decayed to 2 % when the masks freeze; in the two others it follows, for each weight,
            the size of its gradients.
        masked_decay_warmup: share of all steps in which lambda rises from 0 (section 3.2: 0.25).
        hysteresis: share by which a removed weight must exceed a kept one to take its place.
        mask_freeze_ratio: share of all steps, at the end, in which masks stay as they are (the paper: 0).
        kd_weight: weight of the KL divergence from the dense original (section 3.3: 2/3); 0 trains without a teacher.
        ce_weight: weight of the cross entropy with the text; None for 1 - kd_weight.
        temperature: of the KL divergence; the loss is multiplied by its square.
        kd_kind: "forward_kl" or "reverse_kl".
        square_head_weight: weight of the distance between hidden states, layer by layer (arXiv 2310.06927).
        teacher_cache: folder that `write_teacher_cache` (sparsekit.train.teacher_cache) wrote; there is then no teacher
            in memory.
        slorb_group: k of SLoRB: inputs that share a column of the low-rank branch, 2 or more (the paper: 16, 32 or 64;
            the fewer, the larger and better the branch); None for no branch.
        slorb_init: S from the "mean" of the removed weights (section 3.4), the closed form with the inputs' second
            moments ("data"), or a truncated SVD of the same size ("svd").
        slorb_train_x: train X too (the paper); otherwise it is a reshape and a sum, and takes no storage.
        slorb_refit: fit S once more when the masks freeze, to what the layer then lacks; kept where the loss falls.
        format: quantised format to train for in the last phase, as "semi24_int4"; None for none.
        quantise_ratio: share of all steps, at the end, in which the forward sees weights on the format's grid.
        num_calibration_samples: samples of the training data for the first mask, S, and grids.
    """

    method: ClassVar[str] = "ast"

    start: Any = "sparsegpt"
    mask_update_steps: int = 10
    masked_decay_kind: str = "decoupled"
    masked_decay: Any = "auto"
    masked_decay_warmup: float = 0.25
    hysteresis: float = 0.3
    mask_freeze_ratio: float = 0.15
    kd_weight: float = 2 / 3
    ce_weight: float | None = None
    temperature: float = 2.0
    kd_kind: str = "forward_kl"
    square_head_weight: float = 0.0
    teacher_cache: str | None = None
    slorb_group: int | None = None
    slorb_init: str = "data"
    slorb_train_x: bool = False
    slorb_refit: bool = True
    format: str | None = None
    quantise_ratio: float = 0.15
    num_calibration_samples: int = 128
    output_dir: str | None = field(default="ast-output")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("masked_decay_warmup", "mask_freeze_ratio", "kd_weight", "quantise_ratio"):
            check_share(name, getattr(self, name))
        if self.ce_weight is None:
            self.ce_weight = 1 - self.kd_weight
        for name in ("hysteresis", "ce_weight", "square_head_weight", "temperature"):
            check_not_negative(name, getattr(self, name))
        assert self.ce_weight is not None
        if self.kd_weight + self.ce_weight + self.square_head_weight == 0:
            raise ValueError("kd_weight, ce_weight and square_head_weight are all 0: there is nothing to learn from")
        if self.temperature == 0:
            raise ValueError(f"temperature={self.temperature!r} must be greater than 0, as 2.0")
        _choose("masked_decay_kind", self.masked_decay_kind, MASKED_DECAY_KINDS)
        _choose("kd_kind", self.kd_kind, KD_KINDS)
        _choose("slorb_init", self.slorb_init, SLORB_INITS)
        check_start("start", self.start)
        if self.masked_decay != "auto":
            check_not_negative("masked_decay", self.masked_decay)
        check_whole("mask_update_steps", self.mask_update_steps, at_least=0)
        check_whole("num_calibration_samples", self.num_calibration_samples)
        if self.slorb_group is not None:
            check_whole("slorb_group", self.slorb_group, at_least=2)
        if self.format is not None:
            FORMATS.get(self.format)
            if not is_quantised(self.format) or self.pattern != "2:4":
                raise ValueError(f"format={self.format!r}: training rounds for the quantised formats of 2:4 weights")
            if self.quantise_ratio > self.mask_freeze_ratio:
                raise ValueError(
                    f"quantise_ratio={self.quantise_ratio} is above mask_freeze_ratio={self.mask_freeze_ratio}, and "
                    "weights are rounded once their masks stay: lower the one or raise the other"
                )
        if self.square_head_weight and self.teacher_cache:
            raise ValueError("square_head_weight needs the teacher's hidden states, which teacher_cache does not hold")

    @property
    def needs_teacher(self) -> bool:
        return (self.kd_weight > 0 or self.square_head_weight > 0) and self.teacher_cache is None

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
        """Train `model` in place on `dataset`, and return the plan; what `sparsekit.prune_` calls.

        Whatever ends it early, the model is as it was; checkpoints stay in `output_dir`.
        """
        from sparsekit.train.ast_trainer import ASTTrainer
        from sparsekit.train.restore import restored_whole_on_failure
        from sparsekit.train.teachers import teaching_copy

        config = self.for_layers(targets, ignore)
        config.disable_tqdm = config.disable_tqdm or not progress
        # On the CPU what a smaller teacher saves would be lost twice over, on a copy of the weights to go back to.
        autocast = None if config.device.type == "cpu" else config.autocast_dtype
        teacher = teaching_copy(model, autocast) if config.needs_teacher else None
        with restored_whole_on_failure(model, twin=teacher):
            trainer = ASTTrainer(model, config, dataset, processing_class=tokenizer, teacher=teacher)
            if trainer.is_fsdp_enabled:
                raise Unsupported(
                    "prune_ gives the model itself back, and FSDP leaves it in shards: use sparsekit.ASTTrainer, and "
                    "its plan() and trained_model()"
                )
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
            plan = trainer.plan()
            for name, scales in plan.scales.items():
                remember_grid_(model.get_submodule(name), str(config.format), scales)
            return plan


def _choose(name: str, value: Any, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(unknown(name, value, list(known)))
