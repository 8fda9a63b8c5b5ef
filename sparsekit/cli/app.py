"""The commands and their options."""

from typing import Annotated, Any

import typer

from sparsekit.cli.options import (
    Backend,
    BatchSize,
    Debug,
    Device,
    Dtype,
    Ignore,
    JsonPath,
    Labels,
    NewTokens,
    NumTokens,
    PromptLength,
    Quiet,
    Rounds,
    Shapes,
    Targets,
    TextColumn,
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
    pattern: Annotated[
        str | None,
        typer.Option(
            help="2:4, any N:M, 64x64 (blocks) or unstructured: zeros. structured (heads and channels) or depth "
            "(blocks): a smaller dense model. structured,2:4: one after the other. [2:4, or what --method makes]"
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="For zeros: magnitude, wanda, ria, sparsegpt or alps. [sparsegpt with a dataset, else magnitude] "
            "Structured: contribution, kcm, fisher, flap, wanda-sp, magnitude-sp, slicegpt or depth. [contribution "
            "with a dataset, else magnitude-sp]"
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(help="Share removed, for patterns that do not fix it. [0.5; structured: see --flops]"),
    ] = None,
    flops: Annotated[
        str | None,
        typer.Option(
            help="Structured: FLOPs of the blocks that may stay, as 60% or 5e9. Give exactly one of --sparsity, "
            "--flops, --params, --latency-ms, --speedup."
        ),
    ] = None,
    params: Annotated[
        str | None,
        typer.Option(help="Structured: of the blocks' parameters a share, as 60%; of the model's all, as 5e9."),
    ] = None,
    latency_ms: Annotated[
        float | None, typer.Option(help="Structured: milliseconds of a forward pass on this machine.")
    ] = None,
    speedup: Annotated[float | None, typer.Option(help="Structured: times faster than now, as 1.5.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Structured: sequences in a batch, for --latency-ms and --speedup. [1]")
    ] = None,
    length: Annotated[
        int | None,
        typer.Option(help="Structured: tokens of a sequence, for FLOPs and time. [mean of the dataset, else 128]"),
    ] = None,
    round_to: Annotated[
        int | None, typer.Option(help="Structured: what is left of each dimension is a multiple of this. [1]")
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option("--uniform", help="Structured: as many in each layer, so that every engine opens the result."),
    ] = False,
    tensor_parallel: Annotated[
        int | None, typer.Option(help="Structured: devices that the layers can be dealt out to. [1]")
    ] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="FIELD=VALUE", help="Structured: any other field of the method, as add_biases=true."
        ),
    ] = None,
    permute: Annotated[
        bool, typer.Option("--permute", help="First put inputs into the order that keeps most; free at run time.")
    ] = False,
    dataset: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            help="Calibration text: .txt .jsonl .parquet; structured: .tsv and .csv, too, or a folder of images.",
        ),
    ] = None,
    eval_dataset: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Held-out text for perplexity before and after; labelled, for accuracy."),
    ] = None,
    labels: Labels = None,
    text_column: TextColumn = None,
    targets: Targets = None,
    ignore: Ignore = None,
    num_calibration_samples: Annotated[
        int | None,
        typer.Option(help="Samples used, at most. [128; structured: 1024 texts of an encoder, 256 images]"),
    ] = None,
    max_seq_length: Annotated[int, typer.Option(help="Tokens of a sample, at most.")] = 2048,
    batch_size: Annotated[
        int | None, typer.Option(help="Samples at a time. [1; structured: 32 texts of an encoder]")
    ] = None,
    format: Annotated[
        str, typer.Option(help="Of the packed weights: auto, semi24, semi24_int8, semi24_int4, semi24_fp8 or block.")
    ] = "auto",
    backend: Backend = "auto",
    seed: Annotated[int, typer.Option(help="Of every random choice.")] = 0,
    packed: Annotated[bool, typer.Option("--packed/--dense", help="Save packed, or dense with zeros.")] = True,
    dtype: Dtype = "auto",
    device: Device = None,
    bench: Annotated[bool, typer.Option(help="End with dense against sparse on this machine.")] = True,
    bench_batches: Annotated[
        str | None, typer.Option(help="Structured: batch sizes to time at the end. [1,8,32]")
    ] = None,
    plot: Annotated[
        bool | None,
        typer.Option(help="Structured: write sensitivity.png beside the model. [where matplotlib is installed]"),
    ] = None,
    json: JsonPath = None,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prune a trained model, check it, save it, and time it against the dense one."""
    from sparsekit.cli.output import running

    with running("prune", json, quiet, debug) as output:
        from sparsekit.cli.calibration_file import CalibrationFile
        from sparsekit.cli.prune import PruneOptions, run_prune
        from sparsekit.cli.settings import parse_settings
        from sparsekit.cli.structured import run_structured
        from sparsekit.cli.structured_options import StructuredOptions, default_pattern, is_structured, split

        patterns, methods = split(pattern), split(method)
        budget = {"flops": flops, "params": params, "latency_ms": latency_ms, "speedup": speedup}
        shapes = {"round_to": round_to, "tensor_parallel": tensor_parallel, "uniform": uniform or None}
        if is_structured(patterns, methods):
            refuse_given(
                "a structured pattern",
                {
                    "--permute": permute or None,
                    "--format": format if format != "auto" and len(patterns) < 2 else None,
                    "--backend": backend if backend != "auto" and len(patterns) < 2 else None,
                },
            )
            structured = StructuredOptions(
                model=model,
                out=out,
                patterns=patterns or (default_pattern(methods),),
                methods=methods,
                budget={"sparsity": sparsity, **budget},
                batch=batch,
                length=length,
                shapes={name: value for name, value in shapes.items() if value is not None},
                fields=parse_settings(set_ or []),
                dataset=CalibrationFile(dataset, "--dataset", text_column, labels) if dataset else None,
                eval_dataset=CalibrationFile(eval_dataset, "--eval-dataset", text_column, labels)
                if eval_dataset
                else None,
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
                bench_batches=parse_numbers(bench_batches, "--bench-batches") if bench_batches else None,
                plot=plot,
            )
            run_structured(structured, output)
            return
        others = {"batch": batch, "length": length, "set": set_, "labels": labels, "text_column": text_column}
        others |= {"bench_batches": bench_batches, "plot": plot}
        refuse_given(
            f"a pattern of zeros, as {pattern or '2:4'}",
            {f"--{name.replace('_', '-')}": value for name, value in (budget | shapes | others).items()},
        )
        options = PruneOptions(
            model=model,
            out=out,
            pattern="2:4" if pattern is None else pattern,
            method=None if method is None else method.replace("-", "_"),
            permute=permute,
            dataset=dataset,
            eval_dataset=eval_dataset,
            sparsity=0.5 if sparsity is None else sparsity,
            targets=tuple(targets or ("Linear",)),
            ignore=tuple(ignore if ignore is not None else ("lm_head",)),
            num_calibration_samples=128 if num_calibration_samples is None else num_calibration_samples,
            max_seq_length=max_seq_length,
            batch_size=1 if batch_size is None else batch_size,
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
    dataset: Annotated[
        str,
        typer.Option(
            metavar="FILE",
            help="Text: .txt .jsonl .parquet .tsv .csv; for a classifier labelled, or images in folders of classes.",
        ),
    ],
    labels: Labels = None,
    text_column: TextColumn = None,
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
    """Perplexity of a model on a text, and tokens per second; accuracy of a classifier."""
    from sparsekit.cli.output import running

    with running("eval", json, quiet, debug) as output:
        from sparsekit.cli.calibration_file import CalibrationFile, holds_tokens
        from sparsekit.cli.models import load_model, load_tokenizer, tokenizer_if_any
        from sparsekit.cli.quality import HeldOut, is_classifier
        from sparsekit.evaluate import perplexity
        from sparsekit.report import Report

        file = CalibrationFile(dataset, "--dataset", text_column, labels)
        file.check()
        loaded, notes = load_model(model, dtype, device)
        title = f"sparsekit eval: {model} on {dataset}"
        if is_classifier(loaded):
            refuse_given("a classifier", {"--max-tokens": max_tokens})
            held_out = HeldOut(file, model, max_seq_length, batch_size or 32)
            report = Report(title, summary=held_out.judge(loaded, tokenizer_if_any(model), output.progress))
        else:
            data = file.texts(loaded.config, needs_labels=False)
            report = perplexity(
                loaded,
                data,
                None if holds_tokens(data) else load_tokenizer(model),
                max_seq_length=max_seq_length,
                batch_size=batch_size,
                max_tokens=max_tokens,
                progress=output.progress,
            ).report(title)
        report.notes += notes
        output.add("evaluation", report)


@app.command()
def bench(
    model: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="Folder or hub name.")] = None,
    shapes: Shapes = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The dense model that it was made from, where its shapes are others."),
    ] = None,
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
        from sparsekit.cli.bench import bench_against, bench_model, bench_shapes

        if (model is None) == (shapes is None):
            raise ValueError("bench takes a MODEL or --shapes NAME, one of the two")
        sizes = {"batch_size": batch_size, "prompt_length": prompt_length, "new_tokens": new_tokens}
        if shapes is not None:
            refuse_given("--shapes", {"--against": against})
            bench_shapes(output, shapes, parse_numbers(num_tokens), backend, format, dtype, device)
        elif against is not None:
            refuse_given(
                "--against, which takes both models as they are",
                {"--format": None if format == "auto" else format, "--backend": None if backend == "auto" else backend},
            )
            bench_against(output, str(model), against, dtype, device, rounds=rounds, **sizes)
        else:
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


def refuse_given(what: str, options: dict[str, Any]) -> None:
    """Raise ValueError where an option was given that `what` has no use for; None is what was not given."""
    given = [f"{name} {value}" for name, value in options.items() if value is not None]
    if given:
        raise ValueError(f"{', '.join(given)}: not for {what}; leave it out")


def parse_numbers(text: str, option: str = "--num-tokens") -> tuple[int, ...]:
    """Return the whole numbers of "1,8,64".

    Raises:
        ValueError: something else stands there.
    """
    try:
        return tuple(int(word) for word in text.split(","))
    except ValueError as error:
        raise ValueError(f"{option} {text!r}: whole numbers with commas, as 1,8,64") from error
