"""`sparsekit prune --pattern structured`, and depth: a smaller dense model, and maybe 2:4 on what is left of it."""

import shutil
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import sparsekit as sk
from sparsekit.archs import find_blocks, find_widths
from sparsekit.benchmarking import BATCH_SIZES, against_dense, free_bytes
from sparsekit.benchmarking.machine import device_of
from sparsekit.benchmarking.models import is_causal
from sparsekit.budgets import MEASURES, Budget
from sparsekit.calibration import load_samples
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.samples import Batch
from sparsekit.cli.calibration_file import holds_tokens
from sparsekit.cli.models import bytes_on_disk, load_model, load_tokenizer, tokenizer_if_any
from sparsekit.cli.output import Output
from sparsekit.cli.quality import HeldOut
from sparsekit.cli.sensitivity_plot import draw_blocks, draw_widths, has_matplotlib, width_lines
from sparsekit.cli.sizes import Sizes, shown, sizes_report
from sparsekit.cli.structured_options import StructuredOptions
from sparsekit.errors import SparsekitError, Unsupported
from sparsekit.files import replace_file
from sparsekit.hf.describe import is_pretrained, who_opens
from sparsekit.methods import Depth, StructuredMethod, method_config
from sparsekit.methods.structured import WidthMethod
from sparsekit.methods.structured.depth import Judge, influences
from sparsekit.methods.structured.inputs import mean_length
from sparsekit.methods.structured.sensitivity import measure_sensitivity
from sparsekit.nn import sparse_layers
from sparsekit.patterns import NM, parse_pattern
from sparsekit.progress import progress_bar
from sparsekit.report import Report
from sparsekit.sparsify import for_packing
from sparsekit.targets import find_targets, is_linear
from sparsekit.thin_stream import Thinner
from sparsekit.width_solver import WidthSolver

PLAN, PLOT = "plan.safetensors", "sensitivity.png"
LENGTH = 128
"""Tokens of a sequence where nothing says how many."""
TEXTS, CHUNKS, IMAGES = 1024, 128, 256
"""Samples of a model that reads whole texts, of one that reads chunks of a stream, and of one that reads images."""
_COMPANIONS = (
    "preprocessor_config.json",
    "image_processor_config.json",
    "modules.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
    "1_Pooling/config.json",
    "2_Normalize/config.json",
)
"""Small files beside a model that other libraries open it with, and in which no size stands that a cut changes."""


def run_structured(options: StructuredOptions, output: Output) -> None:
    """Load, measure, prune, cut, check, save, and time against the dense model."""
    options.check()
    model, notes = load_model(options.model, options.dtype, options.device)
    _Run(options, output, model, notes).whole()


class _Run:
    """One run of the command.

    Attributes:
        data: what `prune_` takes as dataset.
        batches: the same without labels, ready for the model; empty without a dataset.
        length: tokens of a sequence, for FLOPs and budgets in time.
    """

    def __init__(self, options: StructuredOptions, output: Output, model: Any, notes: list[str]) -> None:
        self.options, self.output, self.model, self.notes = options, output, model, notes
        self.tokenizer = tokenizer_if_any(options.model)
        self.config = options.config
        num, size = options.num_calibration_samples, options.batch_size
        self.given: dict[str, Any] = {
            "num_calibration_samples": self._num_samples() if num is None else num,
            "max_seq_length": options.max_seq_length,
            "batch_size": (1 if is_causal(model) else 32) if size is None else size,
            "seed": options.seed,
        }
        self.batches: list[Batch] = []
        self.data: Any = self._read()
        if len(options.patterns) == 2 and parse_pattern(options.patterns[1]) == NM(2, 4):
            self.config = for_packing(self.config, find_targets(model))
        linears = [name for name, module in model.named_modules() if is_linear(module)]
        found = mean_length(model, next(iter(linears), ""), self.batches) if self.batches else None
        self.length = options.length or found or LENGTH

    def whole(self) -> None:
        """Do it all, and show it."""
        options, output = self.options, self.output
        self._check_budget()
        quality = Report("Quality on " + (options.eval_dataset.path if options.eval_dataset else ""))
        if options.eval_dataset:
            held_out = HeldOut(options.eval_dataset, options.model)
            quality.rows.append({"model": "dense"} | held_out.judge(self.model, self.tokenizer, output.progress))
        dense = Sizes.of(self.model, self.length)
        plan, picture = self._prune_()
        table = sizes_report(dense, Sizes.of(self.model, self.length), plan.cuts, self.length)
        output.add("layers", table, shown=shown(table))
        if len(options.patterns) == 2:
            self._mask_()
        if options.eval_dataset:
            quality.rows.append({"model": "pruned"} | held_out.judge(self.model, self.tokenizer, output.progress))
            output.add("quality", quality)
        report = sk.check(self.model, plan)
        report.notes += self.notes
        told = who_opens(self.model) if is_pretrained(self.model) else "opened by sparsekit.load"
        facts = {key: fact for key, fact in report.summary.items() if len(options.patterns) == 2 and " left" not in key}
        remarks = [note for note in report.notes if note != told]
        output.add("check", report, shown=Report(report.title, [], facts, remarks, report.ok))
        if not report.ok:
            raise SparsekitError(
                "the result does not hold what was asked for, as the notes above say: nothing was saved"
            )
        is_packed = options.packed and bool(sparse_layers(self.model))
        sk.save(self.model, options.out, packed=is_packed, tokenizer=self.tokenizer)
        try:
            self._save_beside(plan, picture, told)
            if options.bench:
                self._time()
        except BaseException as error:
            error.add_note(f"the pruned model is in {options.out}")
            raise

    def _check_budget(self) -> None:
        """Raise ValueError for a budget that no legal widths reach, before long work; one in time is measured later."""
        config, layers = self.config, find_targets(self.model, self.options.targets, self.options.ignore)
        measure = MEASURES[Budget.parse(config.budget).kind]
        if measure == "ns" or not isinstance(config, WidthMethod):
            return
        if Thinner.refusal(self.model, layers, config.thins, measure):
            sized = replace(config, length=config.length or self.length)
            WidthSolver(self.model, sized, find_widths(self.model), self.batches).check()

    def _num_samples(self) -> int:
        if getattr(self.model, "main_input_name", "") == "pixel_values":
            return IMAGES
        return CHUNKS if is_causal(self.model) else TEXTS

    def _read(self) -> Any:
        """Return the dataset; unless the method learns from labels, as batches that are ready."""
        file, config = self.options.dataset, self.model.config
        if file is None:
            return None
        num, size, seed = (self.given[key] for key in ("num_calibration_samples", "batch_size", "seed"))
        if file.holds_images:
            data: Any = file.images(self.options.model, config, num, size, seed)
        else:
            data = file.texts(config, needs_labels=self.config.needs_labels and not is_causal(self.model))
        limits = {"num_samples": num, "max_length": self.given["max_seq_length"], "batch_size": size}
        if self.tokenizer is None and not holds_tokens(data):
            load_tokenizer(self.options.model)  # says what is missing
        samples = load_samples(data, self.model, self.tokenizer, **limits, seed=seed)
        self.batches = samples.batches
        if self.config.needs_labels:
            return data
        if samples.note:
            warnings.warn(samples.note, stacklevel=2)
        return self.batches

    def _prune_(self) -> tuple[sk.Plan, bytes | None]:
        """Cut the model; return the plan, and the plot where there is one."""
        options, progress = self.options, self.output.progress
        if not options.methods and options.dataset is None and not isinstance(self.config, Depth):
            warnings.warn(
                f"no dataset: pruned to {self.config.pattern} by magnitude, which costs far more quality than a refit "
                "on as few as 128 samples of text. Pass --dataset FILE",
                stacklevel=2,
            )
        wants_plot = has_matplotlib() if options.plot is None else options.plot
        if options.plot is None and not wants_plot:
            self.notes.append("no plot: matplotlib is not installed")
        before = self._look() if wants_plot else {}
        widths = find_widths(self.model) if isinstance(self.config, WidthMethod) else []
        config: StructuredMethod = method_config(
            self.config.name, **{**self.config.to_dict(), "length": self.config.length or self.length}
        )
        plan = sk.prune_(
            self.model,
            config,
            dataset=self.data if config.needs_data else None,
            tokenizer=self.tokenizer,
            targets=options.targets,
            ignore=options.ignore,
            progress=progress,
            **self.given,
        )
        sk.apply_(self.model, plan)
        if not plan.cuts:
            self.notes.append("nothing was cut: the budget pays for the whole model")
        if not wants_plot:
            return plan, None
        title = f"{Path(options.model).name}: {config.name}, {_asked(options)}"
        if isinstance(config, Depth):
            gone = next((cut.removed.tolist() for cut in plan.cuts.values() if cut.kind == "layers"), [])
            return plan, draw_blocks(before["costs"], gone, title, before["what"])
        if isinstance(config, WidthMethod):
            return plan, draw_widths(width_lines(widths, plan.cuts, plan.sensitivity or before), title)
        self.notes.append(f"no plot: --method {config.name} takes the same from every layer")
        return plan, None

    def _look(self) -> dict[str, Any]:
        """Return what the plot needs to know of the dense model, and the method does not find out by itself."""
        measures_itself = getattr(self.config, "allocation", "") == "sensitivity"
        if isinstance(self.config, Depth):
            return self._look_at_blocks(self.config)
        if not isinstance(self.config, WidthMethod) or measures_itself or not self.batches:
            return {}
        try:
            return measure_sensitivity(self.model, self.batches, progress=self.output.progress)
        except Unsupported as error:
            self.notes.append(f"the plot has no curves: {error}")
            return {}

    def _look_at_blocks(self, config: Depth) -> dict[str, Any]:
        """Return what the model loses without each of its blocks, as the method judges."""
        linears = [name for name, module in self.model.named_modules() if is_linear(module)]
        blocks = next(iter(find_blocks(self.model, linears).values()), [])
        with as_in_inference(self.model), progress_bar("blocks", len(blocks) + 1, self.output.progress) as bar:
            if config.criterion == "influence":
                costs = influences(self.model, blocks, 1, self.batches)
                return {"costs": costs, "what": "influence, 1 - cosine"}
            judge = Judge(self.model, blocks, self.batches)
            dense = judge.cost([], bar)
            costs = [judge.cost([place], bar) - dense for place in range(len(blocks))]
            return {"costs": costs, "what": "loss more without it, nats" if judge.predicts else "divergence without it"}

    def _mask_(self) -> None:
        """Carry out the second pattern, on what is left."""
        options = self.options
        sk.sparsify(
            self.model,
            options.patterns[1],
            method=options.methods[1] if len(options.methods) == 2 else None,
            dataset=self.data,
            tokenizer=self.tokenizer,
            targets=options.targets,
            ignore=options.ignore,
            format=options.format,
            backend=options.backend,
            progress=self.output.progress,
            **self.given,
        )

    def _save_beside(self, plan: sk.Plan, picture: bytes | None, told: str) -> None:
        """Write what else belongs to the saved model, and say what is there."""
        options, out = self.options, Path(self.options.out)
        plan.save(out / PLAN)
        if picture is not None:
            with replace_file(out / PLOT) as file:
                file.write_bytes(picture)
        for name in _COMPANIONS:
            if (source := Path(options.model) / name).is_file() and not (out / name).exists():
                (out / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(source, out / name)
        summary: dict[str, Any] = {"on disk, bytes": bytes_on_disk(out) or 0}
        if source_bytes := bytes_on_disk(options.model):
            summary |= {
                "source on disk, bytes": source_bytes,
                "ratio": round(summary["on disk, bytes"] / source_bytes, 4),
            }
        summary["who can open it"] = told.removeprefix("opened by ")
        summary["plan"] = PLAN
        summary |= {"plot": PLOT} if picture is not None else {}
        self.output.add("saved", Report(f"Saved in {out}", summary=summary))

    def _time(self) -> None:
        """Time the model against the dense one, which is loaded again."""
        options = self.options
        needed = sum(parameter.nbytes for parameter in self.model.parameters())
        if (bytes_on_disk(options.model) or needed) > 0.8 * free_bytes(device_of(self.model)):
            self.output.say("not timed: memory does not hold the dense model beside this one")
            return
        dense, _ = load_model(options.model, options.dtype, options.device)
        kind = next(kind for kind, amount in options.budget.items() if amount is not None)
        in_time = MEASURES[kind] == "ns"
        batches = {*(options.bench_batches or BATCH_SIZES)} | ({self.config.batch} if in_time else set())
        length = options.length or (round(self.length) if in_time else LENGTH)
        report = against_dense(
            dense, self.model, batch_sizes=sorted(batches), length=length, progress=self.output.progress
        )
        if in_time:
            row = next((row for row in report.rows if row["batch"] == self.config.batch), None)
            measured = {"speedup": "speedup", "latency_ms": "smaller ms"}[kind]
            found = "nothing" if row is None else f"{row[measured]:.3g} {'times' if kind == 'speedup' else 'ms'}"
            report.notes.append(
                f"--{kind.replace('_', '-')} {options.budget[kind]} was asked for at batch {self.config.batch}, and "
                f"{found} was measured"
            )
        self.output.add("benchmark", report)


def _asked(options: StructuredOptions) -> str:
    """Return the budget, as it was given."""
    return " ".join(f"{kind} {amount}" for kind, amount in options.budget.items() if amount is not None)
