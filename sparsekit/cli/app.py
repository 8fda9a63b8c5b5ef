"""The commands and their options."""

from typing import Annotated

import typer

from sparsekit.cli.options import (
    Backend,
    BatchSize,
    Debug,
    Device,
    Dtype,
    Ignore,
    JsonPath,
    NewTokens,
    NumTokens,
    PromptLength,
    Quiet,
    Rounds,
    Shapes,
    Targets,
    TimedFormat,
)
from sparsekit.cli.train_app import train_app

app = typer.Typer(
    name="sparsekit",
    help="Make transformers smaller and really faster: from a mask to a measured speed-up.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version and leave.")] = False,
) -> None:
    from sparsekit.version import __version__

    if version:
        print(f"sparsekit {__version__}")
        raise typer.Exit()


@app.command()
def prune(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name of a trained model.")],
    out: Annotated[str, typer.Argument(metavar="OUT", help="Folder to write.")],
    pattern: Annotated[str, typer.Option(help="2:4, any N:M, 64x64 (blocks) or unstructured.")] = "2:4",
    method: Annotated[
        str | None,
        typer.Option(help="magnitude, wanda, ria, sparsegpt or alps. [sparsegpt with a dataset, else magnitude]"),
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="First put inputs into the order that keeps most; free at run time.")
    ] = False,
    dataset: Annotated[str | None, typer.Option(metavar="FILE", help="Calibration text: .txt .jsonl .parquet")] = None,
    eval_dataset: Annotated[
        str | None, typer.Option(metavar="FILE", help="Text for perplexity before and after.")
    ] = None,
    sparsity: Annotated[float, typer.Option(help="Share removed, for patterns that do not fix it.")] = 0.5,
    targets: Targets = None,
    ignore: Ignore = None,
    num_calibration_samples: Annotated[int, typer.Option(help="Samples used, at most.")] = 128,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of a sample, at most.")] = 2048,
    batch_size: Annotated[int, typer.Option(help="Samples at a time.")] = 1,
    format: Annotated[
        str, typer.Option(help="Of the packed weights: auto, semi24, semi24_int8, semi24_int4, semi24_fp8 or block.")
    ] = "auto",
    backend: Backend = "auto",
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    packed: Annotated[bool, typer.Option("--packed/--dense", help="Save packed, or dense with zeros.")] = True,
    dtype: Dtype = "auto",
    device: Device = None,
    bench: Annotated[bool, typer.Option(help="End with dense against sparse on this machine.")] = True,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune a trained model, check it, save it, and time it against the dense one."""
    from sparsekit.cli.output import running
    from sparsekit.cli.prune import PruneOptions, run_prune

    with running("prune", json, quiet, debug) as output:
        options = PruneOptions(
            model=model,
            out=out,
            pattern=pattern,
            method=method,
            permute=permute,
            dataset=dataset,
            eval_dataset=eval_dataset,
            sparsity=sparsity,
            targets=tuple(targets or ("Linear",)),
            ignore=tuple(ignore if ignore is not None else ("lm_head",)),
            num_calibration_samples=num_calibration_samples,
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            format=format,
            backend=backend,
            seed=seed,
            packed=packed,
            dtype=dtype,
            device=device,
            bench=bench,
        )
        run_prune(options, output)


app.add_typer(train_app, name="train")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Folder or hub name, dense or packed.")],
    dataset: Annotated[str, typer.Option(metavar="FILE", help="Text: .txt .jsonl .parquet")],
    max_seq_length: Annotated[
        int | None, typer.Option(help="Tokens of a chunk. [2048, or what the model reads]")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(help="Chunks at a time. [what fits]")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Read no more than this. [all]")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Perplexity of a model on a text, and tokens per second."""
    from sparsekit.cli.output import running

    with running("eval", json, quiet, debug) as output:
        from sparsekit.cli.models import load_model, load_tokenizer, need_file
        from sparsekit.evaluate import perplexity

        need_file(dataset, "--dataset")
        loaded, notes = load_model(model, dtype, device)
        found = perplexity(
            loaded,
            dataset,
            load_tokenizer(model),
            max_seq_length=max_seq_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            progress=output.progress,
        )
        report = found.report(f"sparsekit eval: {model} on {dataset}")
        report.notes += notes
        output.add("evaluation", report)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub name.")] = None,
    shapes: Shapes = None,
    batch_size: BatchSize = 1,
    prompt_length: PromptLength = 128,
    new_tokens: NewTokens = 32,
    rounds: Rounds = 5,
    num_tokens: NumTokens = "1,8,64,512",
    backend: Backend = "auto",
    format: TimedFormat = "auto",
    dtype: Dtype = "auto",
    device: Device = None,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Dense against sparse on this machine: a model, or the layer shapes of a known one."""
    from sparsekit.cli.output import running

    with running("bench", json, quiet, debug) as output:
        from sparsekit.cli.bench import bench_model, bench_shapes

        if (model is None) == (shapes is None):
            raise ValueError("bench takes a MODEL or --shapes NAME, one of the two")
        if shapes is not None:
            bench_shapes(output, shapes, parse_numbers(num_tokens), backend, format, dtype, device)
        else:
            sizes = {"batch_size": batch_size, "prompt_length": prompt_length, "new_tokens": new_tokens}
            bench_model(output, str(model), backend, format, dtype, device, rounds=rounds, **sizes)


@app.command()
def doctor(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub name; only its config is read.")
    ] = None,
    shapes: Shapes = None,
    num_tokens: NumTokens = "1,8,64,512",
    backend: Backend = "auto",
    format: TimedFormat = "auto",
    dtype: Dtype = "auto",
    device: Device = None,
    targets: Targets = None,
    ignore: Ignore = None,
    max_seconds: Annotated[float, typer.Option(help="Bound on the measurements.")] = 120.0,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """What can run here, this machine's measured ceilings, and what each layer of a model would gain."""
    from sparsekit.cli.output import running

    with running("doctor", json, quiet, debug) as output:
        from sparsekit.cli.bench import by_shape
        from sparsekit.cli.models import parse_device
        from sparsekit.doctor import doctor as examine

        if model is not None and shapes is not None:
            raise ValueError("doctor takes a MODEL or --shapes NAME, not both")
        if shapes is not None:
            from sparsekit.benchmarking import get_shapes

            get_shapes(shapes)
        report = examine(
            model or shapes,
            dtype=None if dtype == "auto" else dtype,
            num_tokens=parse_numbers(num_tokens),
            device=parse_device(device),
            backend=backend,
            format=format,
            targets=tuple(targets or ("Linear",)),
            ignore=tuple(ignore if ignore is not None else ("lm_head",)),
            max_seconds=max_seconds,
            progress=output.progress,
        )
        output.add("doctor", report, shown=by_shape(report))


@app.command()
def demo(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub name. [the small Llama of the checkout]")
    ] = None,
    dataset: Annotated[str | None, typer.Option(metavar="FILE", help="Calibration text.")] = None,
    eval_dataset: Annotated[str | None, typer.Option(metavar="FILE", help="Held-out text.")] = None,
    max_eval_tokens: Annotated[int, typer.Option(help="Tokens of held-out text to read.")] = 32_768,
    num_calibration_samples: Annotated[int, typer.Option(help="Calibration samples.")] = 128,
    shapes: Annotated[
        str, typer.Option(help="Layer shapes to time the kernels at; none to leave it out.")
    ] = "llama-3-8b",
    out: Annotated[str | None, typer.Option(metavar="DIR", help="Keep the packed model here.")] = None,
    dtype: Dtype = "auto",
    device: Device = None,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Sparsify a small trained Llama three ways, and see what is lost and gained; or your own model."""
    from sparsekit.cli.output import running

    with running("demo", json, quiet, debug) as output:
        from sparsekit.cli.demo import DemoOptions, run_demo

        options = DemoOptions(
            model=model,
            dataset=dataset,
            eval_dataset=eval_dataset,
            max_eval_tokens=max_eval_tokens,
            num_calibration_samples=num_calibration_samples,
            shapes=None if shapes == "none" else shapes,
            out=out,
            dtype=dtype,
            device=device,
        )
        run_demo(options, output)


def parse_numbers(text: str) -> tuple[int, ...]:
    """Return the whole numbers of "1,8,64".

    Raises:
        ValueError: something else stands there.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(f"--num-tokens {text!r}: whole numbers with commas, as 1,8,64") from error
