"""What all trainers share: data checks, a stop at NaN, resuming only what was begun, one progress bar."""

import copy
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback

from sparsekit.errors import CheckpointError, NonFiniteError, SparsekitError, Unsupported
from sparsekit.targets import find_targets
from sparsekit.train.config import SparseTrainingArguments
from sparsekit.train.data import IGNORED, TokenSamples, collate, training_samples
from sparsekit.train.schedules import from_the_first_step

CONFIG_FILE = "sparsekit_config.json"
"""In every checkpoint of a training run: the arguments that its result follows from, notes of the run so far, and what
the method needs to go on."""

DIVERGED_BY = 1.0
"""Nats per token above twice the loss of the first steps at which a run counts as diverged."""


LEFT_OUT_AT_MOST = 25
"""Steps in a row that fp16's loss scaler may leave out for their gradients; it halves its scale each time."""


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
        if any(map(callable, (*args.targets, *args.ignore))):  # which cannot be written into a checkpoint
            names = list(find_targets(model, args.targets, args.ignore))
            args = copy.copy(args)
            args.targets, args.ignore = names, []
        if kwargs.get("optimizers", (None, None)) != (None, None) or kwargs.get("compute_loss_func") is not None:
            raise ValueError("optimizers and compute_loss_func: this trainer has its own of both; leave them out")
        if args.n_gpu > 1:
            raise Unsupported(
                f"one process for {args.n_gpu} GPUs: start with `accelerate launch` or torchrun, a process for each, "
                "or show one with CUDA_VISIBLE_DEVICES=0"
            )
        read = {name: data for name, data in (("train", train_dataset), ("eval", eval_dataset)) if data is not None}
        samples = {
            name: _read(f"{name}_dataset", data, model, processing_class, args.max_seq_length)
            for name, data in read.items()
        }
        kwargs.setdefault("data_collator", collate)
        config = getattr(model, "config", None)
        caches = getattr(config, "use_cache", None)
        super().__init__(
            model=model,
            args=args,
            train_dataset=samples.get("train"),
            eval_dataset=samples.get("eval"),
            processing_class=processing_class,
            **kwargs,
        )
        if caches is not None:  # `Trainer` writes its own into the model's config; here every forward says it itself
            config.use_cache = caches  # type: ignore[union-attr]
        # Whatever the model's class says of itself, `compute_loss` here averages over the tokens of a whole step.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True
        self.remove_callback(PrinterCallback)
        if "train" in samples:
            _refuse_too_few(len(samples["train"]), args)
        same_on_all_ranks_(model, args)
        self.train_samples: TokenSamples | None = samples.get("train")
        self.notes: list[str] = []
        self._checkpoint: Path | None = None
        self._first_losses: list[float] = []
        self._step_losses: list[Tensor] = []
        self._num_left_out = 0
        self._losses: dict[str, Tensor] = {}
        self._num_losses = 0

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """Train; as `Trainer.train`.

        Raises:
            NonFiniteError: the loss or a gradient became NaN or infinite. The weights are those of the step before;
                the message names the last good checkpoint.
            TrainingDiverged: the loss rose far above its beginning.
            CheckpointError: the checkpoint to resume from is not complete, or was made with other arguments; the
                message lists them.
        """
        folder = _checkpoint_to_resume(resume_from_checkpoint, self.args.output_dir)
        if folder is not None:
            self.notes = check_resumes(folder, self._made_by())
            self._checkpoint = Path(folder)
            self._warn_if_finished(self._checkpoint)
        elif self.optimizer is not None:
            raise ValueError(
                "this trainer has trained already: resume_from_checkpoint goes on, a new trainer starts anew"
            )
        self._before_training(folder)
        with _own_forward(self.accelerator.unwrap_model(self.model)):
            return super().train(folder, *args, **kwargs)

    def _warn_if_finished(self, checkpoint: Path) -> None:
        state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())
        if state["global_step"] >= state["max_steps"] and self.is_world_process_zero():
            warnings.warn(
                f"{checkpoint} is already at step {state['global_step']} of {state['max_steps']}: nothing is left to "
                "train",
                stacklevel=3,
            )

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Warn as `Trainer` does, but not of a weight that is tied to one that came: a checkpoint holds both once."""
        known = dict(self.accelerator.unwrap_model(self.model).named_parameters(remove_duplicate=False))
        came = {id(parameter) for name, parameter in known.items() if name not in load_result.missing_keys}
        missing = [name for name in load_result.missing_keys if name not in known or id(known[name]) not in came]
        super()._issue_warnings_after_load(load_result._replace(missing_keys=missing))

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Return the schedule that `Trainer` makes, in which something is learnt from the first step on."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if isinstance(scheduler, LambdaLR) and scheduler.lr_lambdas[0](0) == 0:
            self.lr_scheduler = LambdaLR(scheduler.optimizer, from_the_first_step(scheduler.lr_lambdas[0]))
        return self.lr_scheduler

    def _before_training(self, checkpoint: str | None) -> None:
        """Hook: the model is still whole, and on its device."""

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Run what is left of an epoch; `Trainer` takes one step more where a run is resumed at its end."""
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **kwargs)

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self._step_losses.append(loss)
        if self.accelerator.sync_gradients:
            self._look_at_losses()
        return loss

    def _look_at_losses(self) -> None:
        """Stop where the loss of the whole step is bad; it is the same on all ranks, so that all stop or none."""
        total = self.mean_over_ranks(torch.stack(self._step_losses).sum())
        self._step_losses = []
        self._refuse_non_finite("loss", total)
        self._refuse_divergence(total)

    def mean_over_ranks(self, number: Tensor) -> float:
        """Return the mean of a number that each rank has, the same on all."""
        number = number.detach().double().clone()
        if self.args.world_size > 1:
            torch.distributed.all_reduce(number)
            number /= self.args.world_size
        return float(number)

    def calibration_samples(self, num_samples: int) -> list[dict[str, Tensor]]:
        """Return some of the training samples, each a batch of one, chosen by the seed.

        Raises:
            ValueError: there is no training data.
        """
        samples = self.train_samples
        if samples is None:
            raise ValueError("train_dataset is missing: training needs data")
        generator = torch.Generator().manual_seed(self.args.seed)
        chosen = torch.randperm(len(samples), generator=generator)[:num_samples].tolist()
        return [{key: value[None] for key, value in samples[index].items()} for index in chosen]

    def calibration_inputs(self, num_samples: int) -> list[dict[str, Tensor]]:
        """Return the same without labels, as calibration takes them."""
        samples = self.calibration_samples(num_samples)
        return [{key: value for key, value in sample.items() if key != "labels"} for sample in samples]

    def without_fp32_copies(self) -> None:
        """Leave autocast around the forward, without accelerate's copy of the logits in fp32."""
        model = self.accelerator.unwrap_model(self.model_wrapped)
        original = model.__dict__.get("_original_forward")
        if original is None:
            return

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            with self.accelerator.autocast():
                return original(*args, **kwargs)

        model.__dict__["forward"] = forward

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        """Return the norm, which is the same on all ranks, as `Trainer` does just before the optimizer's step."""
        norm = super()._get_grad_norm(model, grad_norm)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if norm is None:
            return norm
        left_out = self.accelerator.scaler is not None and not math.isfinite(float(norm))
        self._num_left_out = self._num_left_out + 1 if left_out else 0
        if not left_out or self._num_left_out > LEFT_OUT_AT_MOST:
            self._refuse_non_finite("norm of the gradients", float(norm))
        return norm

    def _refuse_non_finite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            raise NonFiniteError(
                f"the {what} is {value} at step {self.state.global_step + 1}: stopped before the weights changed. "
                f"{self._last_checkpoint()} Lower learning_rate={self.args.learning_rate}, train in bf16 rather than "
                "fp16, or look for NaN in the data"
            )

    def _refuse_divergence(self, loss: float) -> None:
        if len(self._first_losses) < 5:
            self._first_losses.append(loss)
            start = self._first_losses[0]
            limit = 10 * (start + DIVERGED_BY)  # batches differ, and one alone says little
        else:
            start = max(self._first_losses)
            limit = 2 * start + DIVERGED_BY
        if loss > limit:
            raise TrainingDiverged(
                f"the loss rose from {start:.3g} to {loss:.3g} at step {self.state.global_step + 1}: "
                f"{self.what_may_diverge()}. {self._last_checkpoint()}"
            )

    def what_may_diverge(self) -> str:
        """Return the arguments to blame, with their values."""
        return f"lower learning_rate={self.args.learning_rate}"

    def _last_checkpoint(self) -> str:
        found = self._checkpoint
        if found is None or not is_complete(found):
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
        """Save as `Trainer` does; a checkpoint that does not come about whole is taken away again."""
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            shutil.rmtree(folder, ignore_errors=True)  # of an earlier run
            folder.mkdir(parents=True)
            made_by = {"arguments": self._made_by(), "notes": self.notes, "state": self._own_state()}
            (folder / CONFIG_FILE).write_text(json.dumps(made_by, indent=2) + "\n")
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
        except BaseException:
            if self.args.should_save and not is_complete(folder):
                shutil.rmtree(folder, ignore_errors=True)
            raise
        self._checkpoint = folder

    def _own_state(self) -> dict[str, Any]:
        """Hook: what a resumed run needs beside a checkpoint of `Trainer`, fit for JSON; see `own_state_of`."""
        return {}

    def _made_by(self) -> dict[str, Any]:
        """Return all that the result of a run follows from."""
        data = self.train_samples.digest if self.train_samples is not None else ""
        return {**self.args.own_fields(), "num_processes": self.args.world_size, "data": data}


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


@contextmanager
def _own_forward(model: nn.Module) -> Iterator[None]:
    """Take off what accelerate puts around a model's forward: it would go on computing in bf16 after training."""
    before = model.__dict__.get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            model.__dict__.pop(name, None)
        if before is not None:
            model.__dict__["forward"] = before


def shifted(labels: Tensor) -> Tensor:
    """Return labels [..., L] moved to the place that predicts them; nothing is predicted at the last one."""
    return nn.functional.pad(labels[..., 1:], (0, 1), value=IGNORED)


def same_on_all_ranks_(model: nn.Module, args: SparseTrainingArguments) -> None:
    """Give all ranks the first one's values: the others may have loaded none, to save memory before sharding."""
    if args.world_size > 1:
        for value in (*model.parameters(), *model.buffers()):
            if not isinstance(value, DTensor):
                value.data.copy_(from_first_rank(value.data.to(args.device)))


def from_first_rank(x: Tensor) -> Tensor:
    """Return what the first rank holds; where there is one alone, `x` itself."""
    if torch.distributed.is_initialized():
        x = x.contiguous()
        torch.distributed.broadcast(x, src=0)
    return x


def is_complete(folder: Path) -> bool:
    """Return whether this is a whole checkpoint of a run: the state of the trainer is written last."""
    try:
        has_optimizer = any(folder.glob("*optim*"))
        return (
            has_optimizer
            and (folder / CONFIG_FILE).is_file()
            and bool(json.loads((folder / TRAINER_STATE_NAME).read_text()))
        )
    except (OSError, ValueError):
        return False


def last_checkpoint(output_dir: str | None) -> Path | None:
    """Return the newest complete checkpoint of a run."""
    complete = [folder for folder in Path(output_dir or ".").glob("checkpoint-*") if is_complete(folder)]
    return max(complete, key=lambda folder: int(folder.name.rpartition("-")[2]), default=None)


def own_state_of(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what `_own_state` gave when the checkpoint was written."""
    return dict(json.loads((Path(folder) / CONFIG_FILE).read_text())["state"])


def check_resumes(folder: str | os.PathLike[str], now: dict[str, Any]) -> list[str]:
    """Return the notes of the run so far.

    Raises:
        CheckpointError: the checkpoint is not complete, or was made with other arguments.
    """
    if not is_complete(Path(folder)):
        raise CheckpointError(
            f"{folder} is no complete checkpoint of a sparsekit run: resume from another, or from the newest complete "
            "one with resume_from_checkpoint=True"
        )
    made_by = json.loads((Path(folder) / CONFIG_FILE).read_text())
    then = made_by["arguments"]
    differences = [
        f"{name} was {then.get(name)!r}, is {now.get(name)!r}"
        for name in sorted(then.keys() | now.keys())
        if then.get(name) != now.get(name)
    ]
    if differences:
        longer = ""
        if then.get("max_steps") != now.get("max_steps"):
            longer = (
                ". A run has the steps that it began with, over which its learning rate, lambda and freezing of masks "
                "are laid out; to train its result further, see docs/training.md"
            )
        raise CheckpointError(
            f"{folder} was made with other arguments: {'; '.join(differences)}. Resume with those, or start anew in "
            f"another output_dir{longer}"
        )
    return list(made_by["notes"])


def _read(name: str, data: Any, *how: Any) -> TokenSamples:
    """Return the samples of an argument, which a complaint about them names."""
    try:
        return training_samples(data, *how)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


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
