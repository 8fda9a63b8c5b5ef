"""Arguments of MaskLLM: N:M masks learnt end to end over frozen weights (arXiv 2409.17481)."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from sparsekit.plan import Plan
from sparsekit.registry import unknown
from sparsekit.train.config import SparseTrainingArguments, check_not_negative, check_share
from sparsekit.train.gumbel import candidates
from sparsekit.train.start import check_start

KD_KINDS = ("forward_kl", "reverse_kl")
COSINE_TO_A_TENTH = ("cosine_with_min_lr", {"min_lr_rate": 0.1})
PAPER_RATE, PAPER_STEPS = 5e-4, 2000


@dataclass
class MaskLLMConfig(SparseTrainingArguments):
    """Arguments of `MaskLLMTrainer`; all of `transformers.TrainingArguments` is there as well.

    Only logits of masks learn, 1.5 fp32 numbers a weight for 2:4; with their gradient and Adam's moments that is 24
    bytes a weight beside the frozen ones. While they learn there is no second copy of the model: a teacher has the very
    same weights, and these stay as they are.

    Where not said otherwise, defaults are those of the published code (NVlabs/MaskLLM, LLaMA2-7B).

    Attributes:
        prior: mask to lean to at first: the name of a one-shot method, or a `Plan`. Weights that the method would
            update stay as they are.
        prior_lean: how far a candidate's first logit stands above that of one which has one entry less in common with
            the prior; 0 for no prior.
        logit_std: standard deviation of noise in the first logits. The published code has 0.01, by which one group in
            18 leaves the prior before anything is learnt, and has to find back; the draws explore without it.
        kappa_start, kappa_end: factor of the logits, linear in the step.
        tau_start, tau_end: temperature of the soft masks, linear in the step.
        energy_weight: of -sum ||mask * W||^2 in the loss, which pulls towards large weights and so keeps gradients from
            vanishing; falls linearly to 0. What the log shows as loss leaves it out.
        kd_weight: weight of the KL divergence from the dense model, which tells more of a mask than the text does and
            costs one forward more; 0 (the published code) learns from the text alone.
        ce_weight: weight of the cross entropy with the text; None for 1 - kd_weight.
        temperature: of the KL divergence; the loss is multiplied by its square.
        kd_kind: "forward_kl" or "reverse_kl".
        num_calibration_samples: samples of the training data for the prior.
        learning_rate: of Adam, cosine to a tenth. "auto" is 5e-4 * sqrt(2000 / steps): the published one for the
            published 2000 steps; for any number of steps, as many that cancel one another carry a logit as far, which
            is about as far as the prior leans.
    """

    method: ClassVar[str] = "maskllm"

    prior: Any = "sparsegpt"
    prior_lean: float = 0.03
    logit_std: float = 0.0
    kappa_start: float = 100.0
    kappa_end: float = 500.0
    tau_start: float = 4.0
    tau_end: float = 0.05
    energy_weight: float = 1e-5
    kd_weight: float = 2 / 3
    ce_weight: float | None = None
    temperature: float = 2.0
    kd_kind: str = "forward_kl"
    num_calibration_samples: int = 128
    learning_rate: Any = field(default="auto")
    lr_scheduler_type: str = field(default=COSINE_TO_A_TENTH[0])
    warmup_steps: float = field(default=0)
    weight_decay: float = field(default=0.1)
    adam_epsilon: float = field(default=1e-5)
    output_dir: str | None = field(default="maskllm-output")

    def __post_init__(self) -> None:
        if (self.lr_scheduler_type, self.lr_scheduler_kwargs) == (COSINE_TO_A_TENTH[0], None):
            self.lr_scheduler_kwargs = dict(COSINE_TO_A_TENTH[1])
        is_auto = self.learning_rate == "auto"
        if is_auto:
            self.learning_rate = PAPER_RATE  # a number, for what all trained methods check
        check_not_negative("learning_rate", self.learning_rate)
        super().__post_init__()
        self.learning_rate = "auto" if is_auto else self.learning_rate
        candidates(self.parsed_pattern)
        for name in ("kappa_start", "kappa_end", "tau_start", "tau_end", "temperature"):
            value = getattr(self, name)
            check_not_negative(name, value)
            if value == 0:
                raise ValueError(f"{name}=0 must be greater than 0, as {type(self).__dataclass_fields__[name].default}")
        check_share("kd_weight", self.kd_weight)
        if self.ce_weight is None:
            self.ce_weight = 1 - self.kd_weight
        for name in ("prior_lean", "logit_std", "energy_weight", "ce_weight"):
            check_not_negative(name, getattr(self, name))
        if self.kd_weight + self.ce_weight == 0:
            raise ValueError("kd_weight and ce_weight are both 0: there is nothing to learn from")
        if self.kd_kind not in KD_KINDS:
            raise ValueError(unknown("kd_kind", self.kd_kind, list(KD_KINDS)))
        check_start("prior", self.prior)
        for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):  # its name of late
            kwargs = getattr(self, name, None)
            if isinstance(kwargs, dict) and kwargs.get("use_reentrant"):
                raise ValueError(
                    f"{name}: use_reentrant=True loses the gradient where weights are frozen: leave it out"
                )

    def learning_rate_for(self, num_steps: int) -> float:
        """Return the peak of the learning rate for a run of so many optimizer steps."""
        return PAPER_RATE * (PAPER_STEPS / num_steps) ** 0.5 if self.learning_rate == "auto" else self.learning_rate

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
        """Learn masks of `model` on `dataset`, zero what they remove, and return the plan; `sparsekit.prune_` calls it.

        Whatever ends it early, the model is as it was; checkpoints stay in `output_dir`.
        """
        from sparsekit.train.maskllm_trainer import MaskLLMTrainer
        from sparsekit.train.restore import restored_whole_on_failure

        config = self.for_layers(targets, ignore)
        config.disable_tqdm = config.disable_tqdm or not progress
        with restored_whole_on_failure(model, twin=model):
            trainer = MaskLLMTrainer(model, config, dataset, processing_class=tokenizer)
            trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
            return trainer.plan()
