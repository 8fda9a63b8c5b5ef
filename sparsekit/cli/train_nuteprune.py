"""`sparsekit train nuteprune`: one run, and of it a smaller model, or one for each sparsity that was kept."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

import sparsekit as sk
from sparsekit.benchmarking import against_dense, free_bytes
from sparsekit.benchmarking.machine import device_of
from sparsekit.benchmarking.timing import noise_notes
from sparsekit.budgets import Budget
from sparsekit.checkpoint import STALE
from sparsekit.cli.family_plot import draw_family
from sparsekit.cli.models import hush_warnings, load_model, load_tokenizer
from sparsekit.cli.output import Output
from sparsekit.cli.prune import fitting_lengths, short_check
from sparsekit.cli.train import (
    TrainOptions,
    deployed_dtype,
    evaluations_said,
    how_much,
    make_config,
    make_trainer,
    said_how_to_go_on,
    steps_said,
)
from sparsekit.cli.trained import LOG, PLAN, PLOT
from sparsekit.cli.training_view import TrainingView, plot_training
from sparsekit.evaluate import perplexity
from sparsekit.files import replace_dir, replace_file
from sparsekit.hf.card import write_card
from sparsekit.hf.describe import who_opens
from sparsekit.nn import side_layers
from sparsekit.report import Report
from sparsekit.train.trainer import last_checkpoint

FAMILY_PLOT, FAMILY = "family.png", "family.json"
DENSE = "dense"


def budget_fields(
    sparsity: str | None, keep: list[str], speedup: float | None, latency_ms: float | None
) -> dict[str, Any]:
    """Return the fields of the config that options on the budget stand for.

    Raises:
        ValueError: they do not go together, or one is no share.
    """
    given = {"--sparsity": sparsity, "--speedup": speedup, "--latency-ms": latency_ms}
    named = [name for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(f"{' and '.join(named)}: two budgets, give one of them")
    if speedup is not None or latency_ms is not None:
        if keep:
            raise ValueError(f"--keep and {named[0]}: sparsities are kept on the way to one; give --sparsity")
        return {"constraints": {"speedup": speedup} if speedup is not None else {"latency_ms": latency_ms}}
    shares = sorted({_share(each) for each in keep})
    asked = Budget.parse({"sparsity": sparsity}).amount if sparsity is not None else shares[-1] if shares else 0.5
    return {"sparsity": asked, "keep": [share for share in shares if share != asked]}


def _share(text: str) -> float:
    """Return a sparsity of `--keep`.

    Raises:
        ValueError: it is none.
    """
    try:
        return Budget.parse({"sparsity": text}).amount
    except ValueError:
        raise ValueError(f"--keep {text}: give the share of the blocks that is to go, below 100%, as 20%") from None


def run_train_nuteprune(options: TrainOptions, output: Output, *, paper: bool = False) -> None:
    """Prune a model while it learns from itself; cut, check, save, judge and time what comes out.

    Args:
        paper: by the published recipe, where the options do not say otherwise.
    """
    from sparsekit.train import NutePruneConfig, NutePruneTrainer

    options.check()
    if output.is_silent:
        hush_warnings()
    tokenizer = load_tokenizer(options.model)
    model, notes = load_model(options.model, "float32" if options.dtype == "auto" else options.dtype, None)
    config = make_config(options, model, NutePruneConfig.paper if paper else NutePruneConfig)
    dtype = deployed_dtype(options, config.device)
    trainer = make_trainer(NutePruneTrainer, options, model, config, tokenizer)
    if not trainer.is_world_process_zero():
        output.be_silent()
        hush_warnings()
    for line in beginning(trainer, options):
        output.say(line)
    with TrainingView(trainer, output.console, output.progress) as view:
        trainer.add_callback(view)
        with said_how_to_go_on(options):
            trainer.train(resume_from_checkpoint=options.resume)
    if trainer.is_world_process_zero():
        output.document["training"] = trainer.state.log_history
        _Results(options, output, trainer, tokenizer, dtype, notes).whole()
        if last_checkpoint(options.checkpoints) is not None:
            output.say(f"{options.checkpoints} holds the run's checkpoints, for --resume; nothing else needs them")


def beginning(trainer: Any, options: TrainOptions) -> list[str]:
    """Return what people read before the first step."""
    args = trainer.args
    goal = f"a budget of {args.constraints}" if args.constraints else f"{args.sparsity:.0%} of the blocks to go"
    kept = f"; {', '.join(f'{each:.0%}' for each in args.keep)} kept on the way" if args.keep else ""
    lines = [
        how_much(trainer),
        f"{goal}{kept}; {_way(trainer)}; teachers: {args.teachers}",
        f"on {args.device.type}{' in bf16' if args.bf16 else ''}; a line every {steps_said(args.logging_steps)}; "
        f"{evaluations_said(args)}",
    ]
    if Path(options.out).is_dir() and any(Path(options.out).iterdir()):
        lines.append(f"{options.out} exists: what is there under the same names will be replaced")
    return lines


def _way(trainer: Any) -> str:
    """Say how a run comes to its sparsity."""
    args, settled = trainer.args, f"gates are settled from step {trainer.freeze_step:,} on"
    if not args.is_one_shot:
        return f"the target rises for {steps_said(round(args.max_steps * args.sparsity_warmup))}, {settled}"
    stages = [step for step, _ in args.stage_starts(args.max_steps)]
    at = f" at steps {', '.join(f'{step:,}' for step in stages)}" if len(stages) > 1 else ""
    return f"{args.start} chooses what goes{at}" + (f"; {settled}" if args.frozen_share < 1 else "")


class _Results:
    """What came out of a run, on its way to the disk."""

    def __init__(
        self, options: TrainOptions, output: Output, trainer: Any, tokenizer: Any, dtype: torch.dtype, notes: list[str]
    ) -> None:
        self.options, self.output, self.trainer = options, output, trainer
        self.tokenizer, self.dtype, self.notes = tokenizer, dtype, notes
        self.out = Path(options.out)
        self.saved: list[Path] = []
        self.rows: list[dict[str, Any]] = []

    def whole(self) -> None:
        """Save all models first, one after the other; then judge, time and draw."""
        with self._said_what_is_saved():
            self.out.mkdir(parents=True, exist_ok=True)
            for name, (plan, model) in self._models():
                self._save(name, plan, model)
            with replace_file(self.out / LOG) as file:
                file.write_text("".join(json.dumps(line) + "\n" for line in self.trainer.state.log_history))
            if self.options.plot:
                plot_training(self.trainer.state.log_history, self.trainer.freeze_step, self.out / PLOT)
            self._judge()
            report = Report("Smaller models of this run", self.rows, notes=list(self.notes))
            self.output.add("family", report)
            with replace_file(self.out / FAMILY) as file:
                file.write_text(json.dumps(self.rows, indent=2) + "\n")
            if self.options.plot and any("perplexity" in row for row in self.rows):
                with replace_file(self.out / FAMILY_PLOT) as file:
                    file.write_bytes(draw_family(self.rows, Path(self.options.model).name))

    def _models(self) -> Iterator[tuple[str, tuple[sk.Plan, nn.Module]]]:
        """Yield name of the folder -> plan and smaller model; "" for OUT itself, where there is one model only."""
        trainer = self.trainer
        if trainer.args.keep:
            for sparsity, found in trainer.family().items():
                yield f"sparsity-{100 * sparsity:g}", found
            return
        plan = trainer.plan()
        yield "", (plan, sk.apply_(trainer.trained_model(), plan))

    def _save(self, name: str, plan: sk.Plan, model: nn.Module) -> None:
        model, folder = model.to(self.dtype).eval(), self.out / name
        report = sk.check(model, plan)
        self.output.add(f"check {name}".strip(), report, shown=short_check(report))
        if side_layers(model):
            _save_with_branches(model, folder, self.tokenizer)
        else:
            sk.save(model, folder, packed=False, tokenizer=self.tokenizer)
        plan.save(folder / PLAN)
        self.saved.append(folder)
        self.output.say(f"{folder}: {who_opens(model)}")

    def _judge(self) -> None:
        """Fill the rows: the dense model first, then each that was saved, as it opens from there."""
        dense, _ = load_model(self.options.model, str(self.dtype).removeprefix("torch."), None)
        self.rows.append({"model": DENSE, "sparsity": 0.0, **self._numbers(dense, dense), **self._perplexity(dense)})
        times: dict[str, float] = {}
        for folder in self.saved:
            model, _ = load_model(str(folder), str(self.dtype).removeprefix("torch."), None)
            name = folder.name if folder != self.out else "smaller"
            row = {"model": name, **self._numbers(model, dense), **self._perplexity(model)}
            if self.options.bench and self._fits(dense, model):
                timed, there = self._time(dense, model)
                row, times = row | timed, times or there
            self.rows.append(row)
        self.rows[0] |= times

    def _numbers(self, model: nn.Module, dense: nn.Module) -> dict[str, Any]:
        sizes = [sum(parameter.numel() for parameter in each.parameters()) for each in (model, dense)]
        blocks = [sum(p.numel() for p in _blocks(each)) for each in (model, dense)]
        return {"sparsity": round(1 - blocks[0] / blocks[1], 4), "parameters": sizes[0]}

    def _perplexity(self, model: nn.Module) -> dict[str, float]:
        if self.options.eval_dataset is None:
            return {}
        length = self.trainer.args.max_seq_length
        return {
            "perplexity": perplexity(
                model,
                self.options.eval_dataset,
                self.tokenizer,
                max_seq_length=length,
                progress=self.output.progress,
            ).value
        }

    def _time(self, dense: nn.Module, model: nn.Module) -> tuple[dict[str, float], dict[str, float]]:
        """Return milliseconds of a model and of the dense one beside it, with speed-ups; and the latter by themselves.

        Those of the dense model are another with each model, timed in turns with it.
        """
        lengths: Mapping[str, Any] = fitting_lengths(model)
        length = int(lengths.get("prompt_length", 128))
        report = against_dense(dense, model, batch_sizes=[1], length=length, progress=self.output.progress)
        own: dict[str, float] = {}
        there: dict[str, float] = {}
        for row in report.rows:
            what = row["what"]
            own |= {f"{what} ms": row["smaller ms"], f"{what} dense ms": row["dense ms"]}
            own |= {f"{what} speedup": row["speedup"]}
            there |= {f"{what} ms": row["dense ms"]}
        own |= {"disturbed": True} if noise_notes(list(report.numbers["noise"].values())) else {}
        self.notes += [note for note in report.notes if note not in self.notes]
        return own, there

    def _fits(self, dense: nn.Module, model: nn.Module) -> bool:
        needed = sum(parameter.nbytes for parameter in model.parameters())
        fits = needed < 0.8 * free_bytes(device_of(dense))
        if not fits:
            self.output.say("not timed: memory does not hold the dense model beside the smaller one")
        return fits

    @contextmanager
    def _said_what_is_saved(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            if self.saved:
                error.add_note(f"saved until then: {', '.join(map(str, self.saved))}")
            elif last_checkpoint(self.options.checkpoints) is not None:
                error.add_note(f"the same command with --resume starts from the end of {self.options.checkpoints}")
            raise


def _save_with_branches(model: Any, folder: Path, tokenizer: Any) -> None:
    """Save a model whose LoRA stands beside its weights; `from_pretrained` opens it where sparsekit is imported."""
    bytes_needed = int(1.05 * sum(parameter.nbytes for parameter in model.parameters())) + 2**20
    with replace_dir(folder, bytes_needed, STALE) as made:
        model.save_pretrained(made)
        tokenizer.save_pretrained(made)
        write_card(model, made, {})


def _blocks(model: nn.Module) -> Iterator[nn.Parameter]:
    """Yield the weights of the linear layers in blocks."""
    from sparsekit.archs import find_blocks
    from sparsekit.targets import is_linear

    linears = {name: module for name, module in model.named_modules() if is_linear(module)}
    inside = tuple(f"{block}." for names in find_blocks(model, linears).values() for block in names)
    for name, module in linears.items():
        if name.startswith(inside):
            yield from module.parameters(recurse=False)
