"""The commands below `sparsekit train` and their options."""

import re
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from sparsekit.cli.options import Backend, Debug, Device, Dtype, Ignore, JsonPath, Targets

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show errors and nothing else.")]
Dataset = Annotated[str, typer.Option(metavar="FILE", help="Training text: .txt .jsonl .parquet")]
MaxSeqLength = Annotated[int, typer.Option(help="Tokens of a sample, at most.")]
Temperature = Annotated[float, typer.Option(help="Of distillation.")]

train_app = typer.Typer(
    help="Train masks and weights together: from a dense model to a sparse one that is packed, saved and timed.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_SHARE = re.compile(r"\d+(\.\d+)?%|0?\.\d+")

FIELDS = {
    "steps": "max_steps",
    "tokens": "max_steps",
    "batch_size": "per_device_train_batch_size",
}
"""Option -> field of the config that it sets, where their names differ."""


@train_app.command("ast")
def train_ast(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a trained causal model.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    dataset: Dataset,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, as 1.5M or 7B.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of --tokens.")] = None,
    eval_dataset: Annotated[str | None, typer.Option(metavar="FILE", help="Held-out text for perplexity.")] = None,
    pattern: Annotated[str, typer.Option(help="2:4 or any N:M.")] = "2:4",
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-4,
    batch_size: Annotated[int, typer.Option(help="Samples at a time, on each device.")] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches in a step.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    max_seq_length: MaxSeqLength = 2048,
    start: Annotated[
        str, typer.Option("--start-from", "--start", help="First mask: magnitude, wanda, sparsegpt, ria or alps.")
    ] = "sparsegpt",
    kd_weight: Annotated[float, typer.Option(help="Weight of distillation; 0 for no teacher.")] = 2 / 3,
    temperature: Temperature = 2.0,
    teacher_cache: Annotated[
        str | None, typer.Option(metavar="DIR", help="What `train cache` wrote, in place of a teacher in memory.")
    ] = None,
    slorb_group: Annotated[
        int | None,
        typer.Option(help="Add a low-rank branch: inputs that share a number, 2 or more, as 16, 32 or 64."),
    ] = None,
    format: Annotated[
        str | None, typer.Option(help="Train for this quantised format: semi24_int4, semi24_int8 or semi24_fp8.")
    ] = None,
    bf16: Annotated[bool | None, typer.Option("--bf16/--fp32", help="Compute in bf16. [where the device can]")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of sparsekit.AST or TrainingArguments."),
    ] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    checkpoints: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where checkpoints go. [OUT-checkpoints]")
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; the last two are kept.")] = 500,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    backend: Backend = "auto",
    packed: Annotated[bool, typer.Option("--packed/--dense", help="Save packed, or dense with zeros.")] = True,
    dtype: Annotated[str, typer.Option(help="Of the trained weights: auto is float32.")] = "auto",
    bench: Annotated[bool, typer.Option(help="End with dense against sparse on this machine.")] = True,
    plot: Annotated[bool, typer.Option(help="Write training.png beside the model.")] = True,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """AST: learn the mask while distilling from the dense model.

    On several devices: torchrun --nproc-per-node N -m sparsekit train ast ...
    """
    from sparsekit.cli.output import running

    with running("train ast", json, quiet, debug, errors_only=quiet) as output:
        from sparsekit.cli.settings import parse_settings, refuse_clashes
        from sparsekit.cli.train import TrainOptions, run_train_ast

        settings = parse_settings(set_ or [])
        refuse_clashes(settings, _typed(context))
        fields = {
            "pattern": pattern,
            "learning_rate": learning_rate,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_seq_length": max_seq_length,
            "start": start,
            "kd_weight": kd_weight,
            "temperature": temperature,
            "teacher_cache": teacher_cache,
            "slorb_group": slorb_group,
            "format": format,
            "targets": list(targets or ("Linear",)),
            "ignore": list(ignore if ignore is not None else ("lm_head",)),
            "save_steps": save_steps,
            "save_total_limit": 2,
            "seed": seed,
        }
        fields |= {"max_steps": steps} if steps is not None else {}
        fields |= {"bf16": bf16} if bf16 is not None else {}
        fields |= {"gradient_checkpointing": True} if gradient_checkpointing else {}
        options = TrainOptions(
            model=model,
            out=out,
            dataset=dataset,
            eval_dataset=eval_dataset,
            tokens=tokens,
            checkpoints=checkpoints or f"{out.rstrip('/')}-checkpoints",
            resume=resume,
            backend=backend,
            packed=packed,
            dtype=dtype,
            bench=bench,
            plot=plot,
            fields=fields | settings,
        )
        run_train_ast(options, output)


class _SeveralShares(TyperCommand):
    """Takes `--keep 10% 20% 50%` for `--keep 10% --keep 20% --keep 50%`, and so for `--stages`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        spread: list[str] = []
        option = ""
        for word in args:
            if not _SHARE.fullmatch(word):
                option = word if word in ("--keep", "--stages") else ""
            elif option and spread[-1] != option:
                spread.append(option)
            spread.append(word)
        return super().parse_args(ctx, spread)


@train_app.command("nuteprune", cls=_SeveralShares)
def train_nuteprune(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a trained causal model.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write; with --keep, one in it for each model.")],
    dataset: Dataset,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on, as 1.5M or 7B.")] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps, in place of --tokens.")] = None,
    eval_dataset: Annotated[str | None, typer.Option(metavar="FILE", help="Held-out text for perplexity.")] = None,
    sparsity: Annotated[
        str | None, typer.Option(help="Share of the blocks to remove, as 20%. [the largest of --keep, or 50%]")
    ] = None,
    keep: Annotated[
        list[str] | None,
        typer.Option(help="Sparsities to keep on the way, as 10% 20%: a family of models from one run."),
    ] = None,
    start: Annotated[
        str | None,
        typer.Option(help="A one-shot method that chooses what goes, or open: gates learn it. [contribution]"),
    ] = None,
    stages: Annotated[
        list[str] | None,
        typer.Option(help="Sparsities to halt at on the way, as 30%; the model there may teach the next."),
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Measured speed-up, in place of --sparsity.")] = None,
    latency_ms: Annotated[float | None, typer.Option(help="Milliseconds measured, in place of --sparsity.")] = None,
    uniform: Annotated[bool, typer.Option(help="As many units in each layer: a plain checkpoint.")] = False,
    hidden: Annotated[
        bool | None,
        typer.Option(
            help="Hidden dimensions may go, too; a tied head wants --set untie=true. [where the head is not tied]"
        ),
    ] = None,
    layers: Annotated[bool, typer.Option(help="Whole layers may go, too.")] = False,
    round_to: Annotated[int, typer.Option(help="What is left of each dimension is a multiple of this.")] = 1,
    teachers: Annotated[str, typer.Option(help="nearest, paper, intact or none.")] = "nearest",
    paper: Annotated[bool, typer.Option(help="The published recipe; other options go before it.")] = False,
    learning_rate: Annotated[float, typer.Option(help="Of LoRA, at its peak.")] = 1e-3,
    lora_rank: Annotated[int, typer.Option(help="Of LoRA.")] = 16,
    merge_lora: Annotated[bool, typer.Option(help="Add LoRA to the weights; or keep it beside them.")] = True,
    batch_size: Annotated[int, typer.Option(help="Samples at a time, on each device.")] = 8,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches in a step.")] = 1,
    gradient_checkpointing: Annotated[bool, typer.Option(help="Less memory, more time.")] = False,
    max_seq_length: MaxSeqLength = 2048,
    bf16: Annotated[bool | None, typer.Option("--bf16/--fp32", help="Compute in bf16. [where the device can]")] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="FIELD=VALUE", help="Any other field of NutePrune or TrainingArguments."),
    ] = None,
    targets: Targets = None,
    ignore: Ignore = None,
    checkpoints: Annotated[
        str | None, typer.Option(metavar="DIR", help="Where checkpoints go. [OUT-checkpoints]")
    ] = None,
    save_steps: Annotated[int, typer.Option(help="Steps between checkpoints; the last two are kept.")] = 500,
    resume: Annotated[bool, typer.Option(help="Go on from the newest checkpoint.")] = False,
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    dtype: Annotated[str, typer.Option(help="Of the weights: auto is float32.")] = "auto",
    bench: Annotated[bool, typer.Option(help="Time what comes out against the dense model.")] = True,
    plot: Annotated[bool, typer.Option(help="Write training.png, and family.png with --eval-dataset.")] = True,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """NutePrune: take heads and channels out while the model teaches itself; one run gives every sparsity on the way.

    On several devices: torchrun --nproc-per-node N -m sparsekit train nuteprune ...
    """
    from sparsekit.cli.output import running

    with running("train nuteprune", json, quiet, debug, errors_only=quiet) as output:
        from sparsekit.cli.settings import parse_settings, refuse_clashes
        from sparsekit.cli.train import TrainOptions
        from sparsekit.cli.train_nuteprune import budget_fields, run_train_nuteprune

        settings, typed = parse_settings(set_ or []), _typed(context)
        refuse_clashes(settings, typed)
        fields = {
            "teachers": teachers,
            "learning_rate": learning_rate,
            "lora_rank": lora_rank,
            "merge_lora": merge_lora,
            "hidden": hidden,
            "per_device_train_batch_size": batch_size,
            "per_device_eval_batch_size": batch_size,
            "gradient_accumulation_steps": gradient_accumulation_steps,
            "max_seq_length": max_seq_length,
            "uniform": uniform,
            "layers": layers,
            "round_to": round_to,
            "targets": list(targets or ("Linear",)),
            "ignore": list(ignore if ignore is not None else ("lm_head",)),
            "save_steps": save_steps,
            "save_total_limit": 2,
            "seed": seed,
        }
        if paper:  # what was not typed is the recipe's
            recipe = ("teachers", "learning_rate", "lora_rank", "hidden")
            fields = {name: value for name, value in fields.items() if name not in recipe or name in typed}
        fields |= budget_fields(sparsity, keep or [], speedup, latency_ms)
        fields |= {"start": start} if start is not None else {}
        fields |= {"stages": stages} if stages else {}
        fields |= {"max_steps": steps} if steps is not None else {}
        fields |= {"bf16": bf16} if bf16 is not None else {}
        fields |= {"gradient_checkpointing": True} if gradient_checkpointing else {}
        options = TrainOptions(
            model=model,
            out=out,
            dataset=dataset,
            eval_dataset=eval_dataset,
            tokens=tokens,
            checkpoints=checkpoints or f"{out.rstrip('/')}-checkpoints",
            resume=resume,
            backend="auto",
            packed=False,
            dtype=dtype,
            bench=bench,
            plot=plot,
            fields=fields | settings,
        )
        run_train_nuteprune(options, output, paper=paper)


@train_app.command("cache")
def train_cache(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of the teacher, the dense model.")],
    folder: Annotated[str, typer.Argument(metavar="DIR", help="Folder to write.")],
    dataset: Dataset,
    top_k: Annotated[int, typer.Option(help="Likeliest tokens kept for each place.")] = 64,
    temperature: Temperature = 2.0,
    max_seq_length: MaxSeqLength = 2048,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 8,
    dtype: Dtype = "auto",
    device: Device = None,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Write what the teacher says about the training text, for `train ast --teacher-cache DIR`.

    Dataset, sample length and temperature must be those of the training.
    """
    from sparsekit.cli.output import running

    with running("train cache", json, quiet, debug, errors_only=quiet) as output:
        from sparsekit.cli.train_cache import CacheOptions, run_train_cache

        options = CacheOptions(
            model=model,
            folder=folder,
            dataset=dataset,
            top_k=top_k,
            temperature=temperature,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            dtype=dtype,
            device=device,
        )
        run_train_cache(options, output)


def _typed(context: typer.Context) -> dict[str, str]:
    """Return field -> the option that was typed for it, with its value."""
    typed: dict[str, str] = {}
    for name, value in context.params.items():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            option = f"--{name.replace('_', '-')}"
            typed[FIELDS.get(name, name)] = f"{option} {value}"
    return typed
