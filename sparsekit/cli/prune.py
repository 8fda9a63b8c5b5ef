"""`sparsekit prune`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import sparsekit as sk
from sparsekit.backends import BACKENDS
from sparsekit.benchmarking.models import memory_summary
from sparsekit.cli.models import bytes_on_disk, load_model, load_tokenizer, need_file, tokenizer_if_any
from sparsekit.cli.output import Output
from sparsekit.evaluate import perplexity
from sparsekit.formats import FORMATS
from sparsekit.methods import METHODS, TRAINED, OneShot, StructuredMethod, method_config
from sparsekit.nn import sparse_layers
from sparsekit.patterns import parse_pattern
from sparsekit.report import Report, show
from sparsekit.sparsify import default_method


@dataclass(frozen=True, kw_only=True)
class PruneOptions:
    """The options of the command, by their names."""

    model: str
    out: str
    pattern: str
    method: str | None
    permute: bool
    dataset: str | None
    eval_dataset: str | None
    sparsity: float
    targets: tuple[str, ...]
    ignore: tuple[str, ...]
    num_calibration_samples: int
    max_seq_length: int
    batch_size: int
    format: str
    backend: str
    seed: int
    packed: bool
    dtype: str
    device: str | None
    bench: bool

    def config(self) -> OneShot | StructuredMethod:
        """Return the method's config, in which pattern, format and permute meet; the default method's if none is named.

        Raises:
            ValueError: they do not go together.
        """
        name = self.method or default_method(parse_pattern(self.pattern), self.dataset is not None)
        format = None if self.format == "auto" else self.format
        if issubclass(METHODS.get(name), StructuredMethod):
            return method_config(name, pattern=self.pattern, sparsity=self.sparsity)
        return method_config(name, pattern=self.pattern, sparsity=self.sparsity, permute=self.permute, format=format)

    def check(self) -> None:
        """Raise ValueError or FileNotFoundError for what can be seen to be wrong before a model is loaded."""
        parse_pattern(self.pattern)
        need_file(self.dataset, "--dataset")
        need_file(self.eval_dataset, "--eval-dataset")
        BACKENDS.check(self.backend)
        FORMATS.check(self.format)
        if self.method in TRAINED:
            raise ValueError(f"--method {self.method} trains: use `sparsekit train {self.method}`")
        config = self.config()
        needs_data = config.needs_data if isinstance(config, StructuredMethod) else config.statistics is not None
        if self.method is not None and needs_data and self.dataset is None:
            raise ValueError(
                f"--method {self.method} needs calibration text: pass --dataset FILE, or --method magnitude"
            )
        out = Path(self.out)
        if out.exists() and not out.is_dir():
            raise NotADirectoryError(f"OUT {out} is a file: name a folder")
        if Path(self.model).exists() and out.exists() and out.samefile(self.model):
            raise ValueError("OUT is MODEL: name another folder, so that the dense weights stay")


def run_prune(options: PruneOptions, output: Output) -> None:
    """Load, prune, check, save, and time against the dense model."""
    options.check()
    model, notes = load_model(options.model, options.dtype, options.device)
    needs_tokenizer = options.dataset or options.eval_dataset
    tokenizer = load_tokenizer(options.model) if needs_tokenizer else tokenizer_if_any(options.model)
    quality = Report("Perplexity on " + str(options.eval_dataset))
    if options.eval_dataset:
        quality.rows.append(_quality("dense", model, tokenizer, options, output))
    sk.sparsify(
        model,
        options.pattern,
        method=options.config() if options.permute else options.method,
        dataset=options.dataset,
        tokenizer=tokenizer,
        sparsity=options.sparsity,
        targets=options.targets,
        ignore=options.ignore,
        num_calibration_samples=options.num_calibration_samples,
        max_seq_length=options.max_seq_length,
        batch_size=options.batch_size,
        format=options.format,
        backend=options.backend,
        seed=options.seed,
        progress=output.progress,
    )
    if options.eval_dataset:
        quality.rows.append(_quality("sparse", model, tokenizer, options, output))
        output.add("quality", quality)
    report = sk.check(model)
    report.notes += notes
    output.add("check", report, shown=short_check(report))
    is_packed = options.packed and bool(sparse_layers(model))
    sk.save(model, options.out, packed=is_packed, tokenizer=tokenizer)
    output.add("saved", saved_report(model, options.model, options.out, is_packed))
    if options.packed and not is_packed:
        output.say("no layer could be packed, as the warning says: saved dense, with zeros, and no faster for them")
    if options.bench:
        output.add("benchmark", sk.benchmark(model, progress=output.progress, **fitting_lengths(model)))


def fitting_lengths(model: torch.nn.Module) -> dict[str, Any]:
    """Return prompt and decode lengths for a benchmark that the model can read; nothing where the defaults fit."""
    config = getattr(model, "config", None)
    limit = getattr(config.get_text_config(), "max_position_embeddings", None) if config is not None else None
    if not limit or limit >= 160:
        return {}
    return {"prompt_length": max(1, limit // 2), "new_tokens": limit // 4}


def saved_report(model: torch.nn.Module, source: str, out: str, packed: bool) -> Report:
    """Return the sizes on disk of what was saved and of what it came from."""
    memory = memory_summary(model)
    written, source_bytes = bytes_on_disk(out) or 0, bytes_on_disk(source)
    dense_bytes = memory["model, bytes dense"]
    summary = {
        "form": "packed: import sparsekit, then from_pretrained" if packed else "dense with zeros: opens anywhere",
        "on disk, bytes": written,
        "dense in the same dtype, bytes": dense_bytes,
        "ratio": round(written / dense_bytes, 4),
    }
    if source_bytes:
        summary["source on disk, bytes"] = source_bytes
    return Report(f"Saved in {out}", summary=summary)


def _quality(
    side: str, model: torch.nn.Module, tokenizer: object, options: PruneOptions, output: Output
) -> dict[str, object]:
    found = perplexity(model, options.eval_dataset, tokenizer, progress=output.progress)
    return {"model": side, "perplexity": found.value, "tokens": found.num_tokens, "chunk": found.max_seq_length}


def short_check(report: Report) -> Report:
    """The check for people: one line for each kind of layer, with a range where its layers differ in a number."""
    kinds: dict[tuple[object, ...], list[dict[str, Any]]] = {}
    for row in report.rows:
        named = {"name": str(row["layer"]).rpartition(".")[2], **row}
        kinds.setdefault(tuple(named.get(column) for column in _KIND), []).append(named)
    rows = [
        {"layers": len(alike)}
        | {column: alike[0].get(column) for column in _KIND}
        | {column: _range([row[column] for row in alike], digits) for column, digits in _RANGES.items()}
        for alike in kinds.values()
    ]
    return Report(report.title, rows, report.summary, report.notes, report.ok)


_KIND = ("name", "shape", "pattern", "format", "finite", "backend")
_RANGES = {"sparsity": 3, "dense bytes": 0, "bytes": 0, "bits a weight": 3}
"""Column -> decimals in which layers must differ to be shown as a range."""


def _range(values: list[float], digits: int) -> object:
    low, high = (round(value, digits) if digits else value for value in (min(values), max(values)))
    return low if low == high else f"{show(low)} to {show(high)}"
