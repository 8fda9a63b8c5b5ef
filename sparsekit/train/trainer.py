"""What all trainers share: data checks, a stop at NaN, resuming only what was begun, one progress bar."""

import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from sparsekit.errors import CheckpointError, NonFiniteError, SparsekitError
from sparsekit.files import replace_file
from sparsekit.train.config import SparseTrainingArguments
from sparsekit.train.data import IGNORED, TokenSamples, collate, training_samples

CONFIG_FILE = "sparsekit_config.json"
"""In every checkpoint of a training run: the arguments that say what came out of it."""

DIVERGED_BY = 1.0
"""Nats per token above the loss of the first steps at which a run counts as diverged."""


class TrainingDiverged(SparsekitError, RuntimeError):
    """The loss rose far above where it began."""


class SparseTrainer(Trainer):
    """A `transformers.Trainer` for the methods of this package.

    Args:
        model: a causal language model.
        args: the method's arguments.
        train_dataset, eval_dataset: whatever `training_samples` takes, text included.
        processing_class: tokenizer, for text.
        **kwargs: of `Trainer`.
    Raises:
        ValueError: the data do not fit the model, or are too few for one batch.
    """

    args: SparseTrainingArguments

    def __init__(
        self,
        model: nn.Module,
        args: SparseTrainingArguments,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        **kwargs: Any,
    ) -> None:
        _refuse_unless_causal(model)
        read = {name: data for name, data in (("train", train_dataset), ("eval", eval_dataset)) if data is not None}
        samples = {
            name: training_samples(data, model, processing_class, args.max_seq_length) for name, data in read.items()
        }
        kwargs.setdefault("data_collator", collate)
        super().__init__(
            model=model,
            args=args,
            train_dataset=samples.get("train"),
            eval_dataset=samples.get("eval"),
            processing_class=processing_class,
            **kwargs,
        )
        # Whatever the model's class says of itself, `compute_loss` here averages over the tokens of a whole step.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.remove_callback(PrinterCallback)
        if "train" in samples:
            _refuse_too_few(len(samples["train"]), args)
        self.train_samples: TokenSamples | None = samples.get("train")
        self._first_losses: list[float] = []
        self._losses: dict[str, Tensor] = {}
        self._num_losses = 0

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; as `Trainer.train`.

        Raises:
            NonFiniteError: the loss became NaN or infinite. The message names the last good checkpoint.
            TrainingDiverged: the loss rose far above its beginning.
            CheckpointError: the checkpoint to resume from was made with other arguments; the message lists them.
        """
        folder = _checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if folder is not None:
            check_resumes(folder, self.args.own_fields())
        self._before_training(folder)
        return super().train(folder, *args, **kwargs)

    def _before_training(self, checkpoint: str | None) -> None:
        """Hook: the model is still whole, and on its device."""

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        value = float(loss)
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the loss is {value} at step {self.state.global_step + 1}: stopped before the weights changed. "
                f"{self._last_checkpoint()} Lower learning_rate={self.args.learning_rate}, train in bf16 rather than "
                "fp16, or look for NaN in the data"
            )
        self._refuse_divergence(value * max(self.args.gradient_accumulation_steps, 1))
        return loss

    def _refuse_divergence(self, loss: float) -> None:
        if len(self._first_losses) < 5:
            self._first_losses.append(loss)
            return
        start = max(self._first_losses)
        if loss > 2 * start + DIVERGED_BY:
            raise TrainingDiverged(
                f"the loss rose from {start:.3g} to {loss:.3g} at step {self.state.global_step + 1}: "
                f"{self.what_may_diverge()}. {self._last_checkpoint()}"
            )

    def what_may_diverge(self) -> str:
        """Return the arguments to blame, with their values."""
        return f"lower learning_rate={self.args.learning_rate}"

    def _last_checkpoint(self) -> str:
        found = last_checkpoint(self.args.output_dir)
        if found is None:
            return f"No checkpoint was written yet (save_steps={self.args.save_steps})."
        return f"The last good checkpoint is {found}: resume_from_checkpoint={str(found)!r}."

    def note_losses(self, **losses: Tensor) -> None:
        """Keep the parts of a loss for the next line of the log, where their means come."""
        self._num_losses += 1
        for name, loss in losses.items():
            self._losses[name] = self._losses.get(name, torch.zeros((), device=loss.device)) + loss.detach().float()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self._num_losses:
            for name, total in self._losses.items():
                logs[name] = float(total) / self._num_losses
            self._losses, self._num_losses = {}, 0
        if "eval_loss" in logs:
            logs["eval_perplexity"] = math.exp(min(logs["eval_loss"], 700))
        super().log(logs, start_time)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self.args.should_save:
            folder = Path(self.args.output_dir or ".") / f"checkpoint-{self.state.global_step}"
            with replace_file(folder / CONFIG_FILE) as file:
                file.write_text(json.dumps(self.args.own_fields(), indent=2) + "\n")


class Callback(TrainerCallback):
    """Calls a function before each optimizer step, and another after it."""

    def __init__(self, begin: Callable[[], None], before_step: Callable[[], None], after: Callable[[], None]) -> None:
        self._begin, self._before_step, self._after = begin, before_step, after

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begin()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before_step()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._after()


def shifted(labels: Tensor) -> Tensor:
    """Return labels [..., L] moved to the place that predicts them; nothing is predicted at the last one."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)


def last_checkpoint(output_dir: str | None) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    folders = Path(output_dir or ".").glob("checkpoint-*")
    complete = [folder for folder in folders if (folder / CONFIG_FILE).is_file()]
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def check_resumes(folder: str | os.PathLike[str], now: dict[str, Any]) -> None:
    """Raise CheckpointError unless the checkpoint was made with these arguments."""
    path = Path(folder) / CONFIG_FILE
    if not path.is_file():
        raise CheckpointError(f"{path} is missing: this is no complete checkpoint of a sparsekit run")
    then = json.loads(path.read_text())
    differences = [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differences:
        raise CheckpointError(
            f"{folder} was made with other arguments: {'; '.join(differences)}. Resume with those, or start anew in "
            "another output_dir"
        )


def _checkpoint_to_resume(asked: Any, output_dir: str | None) -> str | None:
    if not asked:
        return None
    if asked is True:
        found = last_checkpoint(output_dir)
        if found is None:
            raise CheckpointError(f"resume_from_checkpoint=True, and {output_dir} holds no complete checkpoint")
        return str(found)
    if not Path(asked).is_dir():
        raise FileNotFoundError(f"resume_from_checkpoint={str(asked)!r}: there is no such folder")
    return str(asked)


def _refuse_too_few(num_samples: int, args: SparseTrainingArguments) -> None:
    batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * max(args.world_size, 1)
    if num_samples < batch:
        raise ValueError(
            f"the dataset has {num_samples} samples, and one step takes {batch} (per_device_train_batch_size="
            f"{args.per_device_train_batch_size}, gradient_accumulation_steps={args.gradient_accumulation_steps}, "
            f"{max(args.world_size, 1)} processes): pass more data, or lower them or max_seq_length"
        )


def _refuse_unless_causal(model: nn.Module) -> None:
    get_head = getattr(model, "get_output_embeddings", None)
    if not type(model).__name__.endswith("ForCausalLM") and not (callable(get_head) and get_head() is not None):
        raise ValueError(
            f"{type(model).__name__} predicts no tokens: pass a causal language model, as AutoModelForCausalLM loads"
        )
