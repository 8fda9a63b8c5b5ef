"""`sparsekit demo`: one trained model, three methods, what is lost, what is gained, and where speed comes from."""

import tempfile
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsekit as sk
from sparsekit.benchmarking import get_shapes, measure_shapes
from sparsekit.benchmarking.models import is_causal
from sparsekit.benchmarking.timing import noise_notes
from sparsekit.cli.bench import by_shape, pass_speedup
from sparsekit.cli.models import load_model, load_tokenizer, need_file, parse_device
from sparsekit.cli.output import Output
from sparsekit.cli.prune import fitting_lengths, saved_report
from sparsekit.evaluate import DEFAULT_CHUNK, perplexity, read_documents
from sparsekit.progress import progress_bar
from sparsekit.report import Report

CHECKOUT = Path(__file__).resolve().parents[2] / "demo"
METHODS = ("magnitude", "wanda", "sparsegpt")
NUM_TOKENS = (1, 8, 64)
OWN_CHUNK = 256
"""Tokens of a chunk for the model of the checkout, as in its training."""


@dataclass(frozen=True, kw_only=True)
class DemoOptions:
    """The options of the command, by their names."""

    model: str | None
    dataset: str | None
    eval_dataset: str | None
    max_eval_tokens: int
    num_calibration_samples: int
    shapes: str | None
    out: str | None
    dtype: str
    device: str | None

    def resolved(self) -> "DemoOptions":
        """Return the options with the checkout's model and text filled in.

        Raises:
            FileNotFoundError: this is an installed package, and something it does not hold was left out.
        """
        defaults = {
            "model": CHECKOUT / "wikilm",
            "dataset": CHECKOUT / "text" / "train.txt",
            "eval_dataset": CHECKOUT / "text" / "valid.txt",
        }
        missing = [name for name, path in defaults.items() if getattr(self, name) is None and not path.exists()]
        if missing:
            words = {"model": "MODEL", "dataset": "--dataset FILE", "eval_dataset": "--eval-dataset FILE"}
            raise FileNotFoundError(
                "the demo's own model and text lie in the source checkout, and this is an installed package: pass "
                + ", ".join(words[name] for name in missing)
            )
        need_file(self.dataset, "--dataset")
        need_file(self.eval_dataset, "--eval-dataset")
        filled = {name: getattr(self, name) or str(path) for name, path in defaults.items()}
        return DemoOptions(**{**self.__dict__, **filled})


def run_demo(options: DemoOptions, output: Output) -> None:
    """Run all parts; each shows its table as it ends."""
    started = time.perf_counter()
    if options.shapes is not None:
        get_shapes(options.shapes)
    is_own = options.model is None
    options = options.resolved()
    tokenizer = load_tokenizer(str(options.model))
    with ExitStack() as stack:
        out = options.out or stack.enter_context(tempfile.TemporaryDirectory()) + "/packed"
        model = _three_methods(options, tokenizer, is_own, output)
        _save_and_reload(model, options, tokenizer, out, output)
        report = sk.benchmark(model, progress=output.progress, **fitting_lengths(model))
        report.notes.append(f"weights of {options.model}; the kernels at the shapes of a large model follow")
        output.add("benchmark", report)
    del model
    if options.shapes is not None:
        _kernels(options.shapes, options.device, output)
    output.document["seconds"] = round(time.perf_counter() - started, 1)
    output.say(f"demo: {output.document['seconds']:.0f} s")


def _three_methods(options: DemoOptions, tokenizer: Any, is_own: bool, output: Output) -> nn.Module:
    """Return the model that the last method made, packed; show quality and generated lines of all."""
    quality = Report(f"Quality of {options.model} at 2:4, held-out text {options.eval_dataset}")
    lines = Report("What they write")
    model: Any = None
    for method in ("dense", *METHODS):
        model, notes = load_model(str(options.model), options.dtype, options.device)
        chunk = OWN_CHUNK if is_own else min(DEFAULT_CHUNK, _positions(model))
        row: dict[str, Any] = {"method": method}
        if method != "dense":
            began = time.perf_counter()
            sk.sparsify(
                model,
                "2:4",
                method=method,
                dataset=options.dataset,
                tokenizer=tokenizer,
                num_calibration_samples=options.num_calibration_samples,
                max_seq_length=chunk,
                progress=output.progress,
            )
            row["pruned in s"] = round(time.perf_counter() - began, 1)
        else:
            row["pruned in s"] = None
            quality.notes += notes
        if is_causal(model):
            found = perplexity(
                model,
                options.eval_dataset,
                tokenizer,
                max_seq_length=chunk,
                max_tokens=options.max_eval_tokens,
                progress=output.progress,
            )
            row |= {"perplexity": found.value, "tokens": found.num_tokens, "chunk": found.max_seq_length}
            lines.rows.append({"method": method, "text": _continue(model, tokenizer, str(options.eval_dataset))})
        quality.rows.append(row)
    if not is_causal(model):
        quality.notes.append("the model does not predict text, so there is no perplexity and nothing generated")
    output.add("quality", quality)
    if lines.rows:
        output.add("generated", lines)
    return model


def _positions(model: Any) -> int:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return int(limit or DEFAULT_CHUNK)


def _continue(model: Any, tokenizer: Any, eval_dataset: str) -> str:
    """Return the greedy continuation of the first words of the first long document."""
    texts = (text for text in read_documents(eval_dataset) if isinstance(text, str) and len(text.split()) > 40)
    words = " ".join(next(texts, "The city of").split()[:14])
    prompt = tokenizer(words, return_tensors="pt", add_special_tokens=False)["input_ids"].to(model.device)
    with torch.inference_mode():
        ids = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32, do_sample=False, pad_token_id=0
        )
    return f"{words} | {tokenizer.decode(ids[0, prompt.shape[1] :], skip_special_tokens=True).strip()}"


def _save_and_reload(model: Any, options: DemoOptions, tokenizer: Any, out: str, output: Output) -> None:
    """Save packed, open with plain transformers, and compare the logits bit for bit."""
    sk.save(model, out, packed=True, tokenizer=tokenizer)
    reloaded = type(model).from_pretrained(out, dtype=model.dtype).to(model.device).eval()
    ids = torch.arange(64, device=model.device)[None] % model.config.get_text_config().vocab_size
    with torch.inference_mode():
        first, second = (next(iter(side(input_ids=ids).values())) for side in (model, reloaded))
    report = saved_report(model, str(options.model), out, packed=True)
    report.title = "Saved" + (f" in {out}" if options.out else " and reloaded with from_pretrained")
    report.summary["reloaded outputs equal, bit for bit"] = torch.equal(first, second)
    report.ok = torch.equal(first, second)
    output.add("saved", report)


def _kernels(shapes: str, device: str | None, output: Output) -> None:
    """The kernels where speed matters: the layers of a large model, on random weights."""
    target = parse_device(device)
    wanted = get_shapes(shapes)
    for dtype in (torch.bfloat16, torch.float16 if target.type == "cuda" else torch.float32):
        name = str(dtype).removeprefix("torch.")
        report = Report(f"The same kernels at the layer shapes of {shapes}, {name}, dense against sparse")
        with progress_bar(f"{shapes} {name}", len(wanted) * len(NUM_TOKENS), output.progress) as bar:
            for row in measure_shapes(wanted, NUM_TOKENS, dtype, target, max_seconds=0.8):
                report.rows.append(row)
                bar.advance(1, f"{row['shape']} M={row['M']}")
        report.summary |= {f"speedup of one pass at M={m}": round(pass_speedup(report.rows, m), 3) for m in NUM_TOKENS}
        report.notes += noise_notes([row["noise"] for row in report.rows])
        output.add(f"kernels_{name}", report, shown=by_shape(report))
