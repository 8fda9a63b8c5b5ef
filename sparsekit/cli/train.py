"""`sparsekit train ast`, and what the commands that train share."""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparsekit.backends import BACKENDS, resolve
from sparsekit.cli.models import hush_warnings, load_model, load_tokenizer, need_file, need_model, need_writable
from sparsekit.cli.output import Output
from sparsekit.cli.settings import parse_tokens
from sparsekit.cli.trained import TrainedModel
from sparsekit.cli.training_view import TrainingView, refuse_without_matplotlib
from sparsekit.doctor import default_dtype, own_dtype_of, parse_dtype, read_config
from sparsekit.evaluate import perplexity
from sparsekit.formats import WeightSpec
from sparsekit.methods.base import holds_pattern
from sparsekit.nn.side_columns import SideColumns
from sparsekit.report import Report
from sparsekit.targets import find_targets, weight_NK
from sparsekit.train.trainer import last_checkpoint


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of the command, by their names; `fields` are those of the config, as they were given."""

    model: str
    out: str
    dataset: str
    eval_dataset: str | None
    tokens: str | None
    checkpoints: str
    resume: bool
    backend: str
    packed: bool
    dtype: str
    bench: bool
    plot: bool
    fields: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for what can be seen to be wrong before a model is loaded."""
        need_file(self.dataset, "--dataset")
        need_file(self.eval_dataset, "--eval-dataset")
        if (self.tokens is None) == ("max_steps" not in self.fields):
            raise ValueError("how long to train: give --tokens N (as 100M) or --steps N, one of the two")
        if not self.packed and self.fields.get("slorb_group") is not None:
            raise ValueError("--dense and --slorb-group: other tools read no branch; save packed, or train without one")
        BACKENDS.check(self.backend)
        parse_dtype(None if self.dtype == "auto" else self.dtype)
        if Path(self.model).exists() and Path(self.out).exists() and Path(self.out).samefile(self.model):
            raise ValueError("OUT is MODEL: name another folder, so that the dense weights stay")
        need_writable(self.out, "OUT")
        need_writable(self.checkpoints, "--checkpoints")
        earlier = last_checkpoint(self.checkpoints)
        if self.resume and earlier is None:
            raise ValueError(f"--resume: {self.checkpoints} holds no complete checkpoint; leave it out to start anew")
        if not self.resume and earlier is not None:
            raise ValueError(
                f"{self.checkpoints} holds checkpoints of an earlier run, the newest {earlier.name}: --resume goes on "
                "with that run; to start anew delete the folder, or name another with --checkpoints DIR"
            )
        if self.plot:
            refuse_without_matplotlib()
        need_model(self.model)


def run_train_ast(options: TrainOptions, output: Output) -> None:
    """Train to 2:4 from the dense original, pack, check, save, and time against the dense model."""
    from sparsekit.train import ASTTrainer

    options.check()
    if output.is_silent:
        hush_warnings()
    tokenizer = load_tokenizer(options.model)
    model, notes = load_model(options.model, "float32" if options.dtype == "auto" else options.dtype, None)
    config = make_config(options, model)
    dtype = deployed_dtype(options, config.device)
    packs = options.packed and holds_pattern(config.format or "semi24", config.parsed_pattern)
    if packs:
        refuse_unrunnable(model, config, options.backend, dtype)
    trainer = make_trainer(ASTTrainer, options, model, config, tokenizer)
    if not trainer.is_world_process_zero():
        output.be_silent()
        hush_warnings()
    for line in beginning(trainer, options, packs):
        output.say(line)
    lengths = {"max_seq_length": trainer.args.max_seq_length}
    quality = Report("Perplexity on " + str(options.eval_dataset))
    if options.eval_dataset and trainer.is_world_process_zero():
        found = perplexity(model, options.eval_dataset, tokenizer, progress=output.progress, **lengths)
        quality.rows.append({"model": "dense", "perplexity": found.value, "tokens": found.num_tokens})
    with TrainingView(trainer, output.console, output.progress) as view:
        trainer.add_callback(view)
        with said_how_to_go_on(options):
            trainer.train(resume_from_checkpoint=options.resume)
    trained = TrainedModel(trainer.trained_model(), trainer.plan(), Path(options.out), tokenizer, dtype)
    if not trainer.is_world_process_zero():
        return
    output.document["training"] = trained.history = trainer.state.log_history
    with trained.kept_on_failure():
        if options.eval_dataset:
            found = perplexity(trained.model, options.eval_dataset, tokenizer, progress=output.progress, **lengths)
            quality.rows.append({"model": "sparse", "perplexity": found.value, "tokens": found.num_tokens})
            output.add("quality", quality)
        trained.finish(output, options.model, notes, backend=options.backend if packs else None)
        if options.plot:
            trained.draw(trainer.freeze_step)
        if options.bench:
            trained.time(output)
    if last_checkpoint(options.checkpoints) is not None:
        output.say(f"{options.checkpoints} holds the run's checkpoints, for --resume; nothing else needs them")


@contextmanager
def said_how_to_go_on(options: TrainOptions) -> Iterator[None]:
    """Whatever ends training early, tell from where the run can go on."""
    try:
        yield
    except BaseException as error:
        if (newest := last_checkpoint(options.checkpoints)) is not None:
            error.add_note(f"the same command with --resume goes on from {newest}")
        raise


def make_config(options: TrainOptions, model: Any, make: Any = None) -> Any:
    """Return the config, with what the command chooses where it is not told: steps, precision, logs, evaluations.

    Args:
        make: makes it of its fields; None for `sk.AST`.
    """
    from sparsekit.train import ASTConfig

    fields = dict(options.fields)
    fields.setdefault("bf16", _has_fast_bf16())
    config = (make or ASTConfig)(**fields | {"output_dir": options.checkpoints})
    config.disable_tqdm = True
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    config.max_seq_length = min(config.max_seq_length, limit or config.max_seq_length)
    if options.tokens is not None:
        config.max_steps = math.ceil(parse_tokens(options.tokens) / (_batch(config) * config.max_seq_length))
    if config.max_steps < 1:
        raise ValueError(f"--steps {config.max_steps}: at least 1")
    if options.eval_dataset and config.eval_strategy == "no":
        config.eval_strategy, config.eval_steps = "steps", max(1, config.max_steps // 8)
        config.eval_on_start = not options.resume  # what the first mask costs
    if "logging_steps" not in fields:
        config.logging_steps = max(1, config.max_steps // 50)
    return config


def make_trainer(kind: Any, options: TrainOptions, model: Any, config: Any, tokenizer: Any) -> Any:
    """Return a trainer of this kind; where it refuses, the folder of checkpoints that it makes is gone again."""
    folder = Path(options.checkpoints)
    existed = folder.exists()
    try:
        return kind(model, config, options.dataset, options.eval_dataset, tokenizer)
    except BaseException:
        if not existed and folder.is_dir() and not any(folder.iterdir()):
            folder.rmdir()
        raise


def beginning(trainer: Any, options: TrainOptions, packs: bool) -> list[str]:
    """Return what people read before the first step: how much is trained on, what happens when, what comes out."""
    args = trainer.args
    freezes_at = round(args.max_steps * (1 - args.mask_freeze_ratio)) if args.mask_update_steps else 0
    saves = f"a checkpoint every {steps_said(args.save_steps)} in {args.output_dir}"
    lines = [
        how_much(trainer),
        f"on {args.device.type}{' in bf16' if args.bf16 else ''}; a line every {steps_said(args.logging_steps)}; "
        f"{evaluations_said(args)}; masks stay from step {freezes_at:,} on",
        saves if args.save_strategy == "steps" else f"checkpoints: {args.save_strategy}",
    ]
    if Path(options.out).is_dir() and any(Path(options.out).iterdir()):
        lines.append(f"{options.out} exists: the model there will be replaced at the end")
    if options.packed and not packs:
        lines.append(
            f"no packed format holds {args.pattern} weights: the result will be saved dense, with zeros, and be no "
            "faster for them. 2:4 has one"
        )
    return lines


def how_much(trainer: Any) -> str:
    """Return how much is trained on, in tokens."""
    args, samples = trainer.args, trainer.train_samples
    processes, length = max(args.world_size, 1), len(samples[0]["input_ids"])
    tokens = _batch(args) * length * args.max_steps
    return (
        f"{processes} {'process' if processes == 1 else 'processes'} × {args.per_device_train_batch_size} samples × "
        f"{args.gradient_accumulation_steps} accumulated × {length} tokens = {_batch(args) * length:,} tokens a step; "
        f"{args.max_steps:,} steps; {tokens:,} tokens, {tokens / samples.num_tokens:.3g} passes over the dataset"
    )


def evaluations_said(args: Any) -> str:
    if args.eval_strategy == "no":
        return "no evaluation (--eval-dataset)"
    return f"an evaluation every {'epoch' if args.eval_strategy == 'epoch' else steps_said(args.eval_steps)}"


def steps_said(number: float) -> str:
    return "step" if number == 1 else f"{number:,} steps"


def _batch(config: Any) -> int:
    """Samples of one optimizer step, on all devices."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * max(config.world_size, 1)


def refuse_unrunnable(model: Any, config: Any, backend: str, dtype: torch.dtype) -> None:
    """Raise Unsupported where the backend cannot run what training will give, before training."""
    for layer in find_targets(model, config.targets, config.ignore).values():
        N, K = weight_NK(layer).shape
        if config.slorb_group is not None:
            rank = -(-K // config.slorb_group)
            K = SideColumns(K, rank, config.slorb_group, config.slorb_train_x).packed_features
        resolve(backend, WeightSpec(config.format or "semi24", N, K, dtype), config.device)


def _has_fast_bf16() -> bool:
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()


def deployed_dtype(options: TrainOptions, device: torch.device) -> torch.dtype:
    """Return the dtype to pack in: fp32 is for training, the checkpoint's own for running."""
    named = parse_dtype(None if options.dtype == "auto" else options.dtype)
    own = own_dtype_of(read_config(options.model), options.model)
    return named or default_dtype(own, device)[0] or torch.float32
