"""`sparsekit train ast`."""

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import sparsekit as sk
from sparsekit.backends import BACKENDS
from sparsekit.cli.models import load_model, load_tokenizer, need_file
from sparsekit.cli.output import Output
from sparsekit.cli.prune import fitting_lengths, saved_report, short_check
from sparsekit.cli.training_view import TrainingView, plot_training, refuse_without_matplotlib
from sparsekit.doctor import default_dtype, own_dtype_of, read_config
from sparsekit.evaluate import perplexity
from sparsekit.files import replace_file
from sparsekit.nn import sparse_layers
from sparsekit.report import Report
from sparsekit.sparsify import has_packed_format

PLOT, LOG = "training.png", "training.jsonl"


@dataclass(frozen=True, kw_only=True)
class TrainOptions:
    """The options of the command, by their names; `fields` are those of `sk.AST`, as they were given."""

    model: str
    out: str
    dataset: str
    eval_dataset: str | None
    tokens: str | None
    checkpoints: str | None
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
        if self.backend != "auto":
            BACKENDS.check(self.backend)
        if "output_dir" in self.fields:
            raise ValueError("--set output_dir: use --checkpoints DIR")
        out = Path(self.out)
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"OUT {out} is a file: name a folder")
        if Path(self.model).exists() and out.exists() and out.samefile(self.model):
            raise ValueError("OUT is MODEL: name another folder, so that the dense weights stay")
        if self.plot:
            refuse_without_matplotlib()


def run_train_ast(options: TrainOptions, output: Output) -> None:
    """Train to 2:4 from the dense original, pack, check, save, and time against the dense model."""
    options.check()
    tokenizer = load_tokenizer(options.model)
    model, notes = load_model(options.model, "float32" if options.dtype == "auto" else options.dtype, None)
    trainer = _trainer(options, model, tokenizer)
    is_first, out = trainer.is_world_process_zero(), Path(options.out)
    lengths = {"max_seq_length": trainer.args.max_seq_length}
    quality = Report("Perplexity on " + str(options.eval_dataset))
    if options.eval_dataset and is_first:
        found = perplexity(model, options.eval_dataset, tokenizer, progress=output.progress, **lengths)
        quality.rows.append({"model": "dense", "perplexity": found.value, "tokens": found.num_tokens})
    with TrainingView(trainer, output.console if is_first else None, output.progress) as view:
        trainer.add_callback(view)
        trainer.train(resume_from_checkpoint=options.resume)
    plan, trained = trainer.plan(), trainer.trained_model()
    if not is_first:
        return
    history = trainer.state.log_history
    output.document["training"] = history
    if options.eval_dataset:
        found = perplexity(trained, options.eval_dataset, tokenizer, progress=output.progress, **lengths)
        quality.rows.append({"model": "sparse", "perplexity": found.value, "tokens": found.num_tokens})
        output.add("quality", quality)
    trained = trained.to(_deployed_dtype(options, trained)).eval()
    packs = options.packed and has_packed_format({name: trained.get_submodule(name) for name in plan.masks})
    if packs:
        sk.pack_(trained, plan.format or "auto", options.backend, scales=plan.scales or None, progress=output.progress)
    report = sk.check(trained, plan)
    report.notes += notes
    output.add("check", report, shown=short_check(report))
    is_packed = options.packed and bool(sparse_layers(trained))
    sk.save(trained, out, packed=is_packed, tokenizer=tokenizer)
    plan.save(out / "plan.safetensors")
    with replace_file(out / LOG) as file:
        file.write_text("".join(json.dumps(line) + "\n" for line in history))
    if options.plot:
        plot_training(history, trainer.freeze_step, out / PLOT)
    output.add("saved", saved_report(trained, options.model, options.out, is_packed))
    if options.packed and not is_packed:
        output.say(
            f"no packed format holds {trainer.args.pattern} weights: saved dense, with zeros, and no faster for them"
        )
    if options.bench:
        output.add("benchmark", sk.benchmark(trained, progress=output.progress, **fitting_lengths(trained)))


def _trainer(options: TrainOptions, model: Any, tokenizer: Any) -> Any:
    from sparsekit.train import ASTConfig, ASTTrainer

    fields = dict(options.fields)
    fields.setdefault("bf16", _has_fast_bf16())
    fields["output_dir"] = options.checkpoints or f"{options.out}-checkpoints"
    config = ASTConfig.from_dict(fields)
    config.disable_tqdm = True
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    config.max_seq_length = min(config.max_seq_length, limit or config.max_seq_length)
    if options.tokens is not None:
        batch = config.per_device_train_batch_size * config.gradient_accumulation_steps * max(config.world_size, 1)
        config.max_steps = math.ceil(parse_tokens(options.tokens) / (batch * config.max_seq_length))
    if options.eval_dataset and config.eval_strategy == "no":
        config.eval_strategy, config.eval_steps = "steps", max(1, config.max_steps // 8)
    if "logging_steps" not in fields:
        config.logging_steps = max(1, config.max_steps // 50)
    return ASTTrainer(model, config, options.dataset, options.eval_dataset, tokenizer)


def _has_fast_bf16() -> bool:
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else torch.cpu._is_avx512_bf16_supported()


def _deployed_dtype(options: TrainOptions, model: Any) -> torch.dtype:
    """Return the dtype to pack in: fp32 is for training, the checkpoint's own for running."""
    parameter = next(model.parameters())
    if options.dtype != "auto":
        return parameter.dtype
    own = own_dtype_of(read_config(options.model), options.model)
    return default_dtype(own, parameter.device)[0] or parameter.dtype


def parse_fields(settings: list[str]) -> dict[str, Any]:
    """Return {"hysteresis": 0.1} for ["hysteresis=0.1"]; values are read as JSON, or else as text.

    Raises:
        ValueError: one is no FIELD=VALUE.
    """
    fields: dict[str, Any] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name:
            raise ValueError(f"--set {setting!r}: FIELD=VALUE, as hysteresis=0.1")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


def parse_tokens(text: str) -> int:
    """Return the number of "250000", "1.5M" or "7B".

    Raises:
        ValueError: something else stands there.
    """
    units = {"k": 1e3, "m": 1e6, "b": 1e9}
    unit = units.get(text[-1:].lower())
    try:
        number = float(text[:-1]) * unit if unit else float(text)
    except ValueError as error:
        raise ValueError(f"--tokens {text!r}: a number, as 250000, 1.5M or 7B") from error
    if not 1 <= number < 1e15:
        raise ValueError(f"--tokens {text!r}: at least 1")
    return round(number)
