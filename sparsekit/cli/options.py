"""Options that several commands have."""

from typing import Annotated

import typer

JsonPath = Annotated[str | None, typer.Option("--json", metavar="FILE", help="Also write all results; - for stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress bars.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Dtype = Annotated[str, typer.Option(help="auto, float32, bfloat16 or float16.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1; the GPU where there is one.")]
Targets = Annotated[
    list[str] | None, typer.Option(help="Layers to prune: class name, name, or re:REGEX; repeatable. [Linear]")
]
Ignore = Annotated[list[str] | None, typer.Option(help="Layers to leave alone, the same way. [lm_head]")]
Backend = Annotated[str, typer.Option(help="Who runs the packed layers: auto or a name that doctor lists.")]
TimedFormat = Annotated[
    str,
    typer.Option(
        "--format",
        help="Of the sparse side: semi24, semi24_int8, semi24_int4 or semi24_fp8; auto for the checkpoint's own, "
        "semi24 where it is dense.",
    ),
]
Shapes = Annotated[str | None, typer.Option(help="Layer shapes of a known model, as llama-3-8b; needs no weights.")]
NumTokens = Annotated[str, typer.Option(help="Numbers of tokens M to time, with commas.")]
BatchSize = Annotated[int, typer.Option(help="Sequences at a time.")]
PromptLength = Annotated[int, typer.Option(help="Tokens of the prompt.")]
NewTokens = Annotated[int, typer.Option(help="Tokens to decode.")]
Labels = Annotated[
    str | None,
    typer.Option(
        metavar="COLUMN",
        help="Column of a .tsv, .csv, .jsonl or .parquet that holds labels, for what learns from them or is judged "
        "by them. [label, labels, or the second one]",
    ),
]
TextColumn = Annotated[
    str | None,
    typer.Option(metavar="COLUMN", help="Column that holds the text. [text, sentence, question, or the first]"),
]
Rounds = Annotated[int, typer.Option(help="Timed passes of each side.")]
