"""What rounding costs a 2:4 model, with a side branch or without: perplexity, and bits for each weight of its layers.

    python bench/quantise.py --data DIR [--models wikilm,…] [--formats semi24_int4,…] [--side 16] [--split test]
    python bench/quantise.py --data DIR --models wikilm --trained OUT

The start is SparseGPT 2:4, from the strongest input on; with `--side`, a branch beside each layer then, fitted to what
the layer lacks of the dense one, block by block. With `--trained`, the start is a model as `sparsekit train` saves it,
2:4 already, with branches or without. Then each format by each of the ways:

    nearest       on scales that hold the largest weight: `sk.pack_` alone
    awq, nearest  on scales with the least error, inputs scaled: `sk.AWQ(compensate=False)`
    gptq          with compensation by what is yet to be rounded, the branch last: `sk.SparseGPT(format=…)`
    awq           the same with inputs scaled: `sk.AWQ(format=…)`

Branches are rounded with their weights, and counted. DIR is as for `bench/quality.py`. Prints a table, then one JSON
line for each row; `--chunks N` takes N of the held-out chunks, evenly spaced, for a quick look.
"""

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from quality import CASES, NUM_SAMPLES, Case, load_ids, load_model, model_in, random_chunks, round_to_nearest_, text_in
from torch import Tensor

import sparsekit as sk
from sparsekit.calibration import Hessian, Walk, load_samples
from sparsekit.evaluate import perplexity
from sparsekit.nn import install_side_
from sparsekit.report import Report
from sparsekit.targets import find_targets, weight_NK
from sparsekit.train.lowrank import fit_side

WAYS = ("nearest", "awq, nearest", "gptq", "awq")


def add_branches_(model: Any, dense: dict[str, Tensor], chunks: list[Tensor], group: int) -> None:
    """Put a branch beside every layer, fitted to what it lacks of the dense weight, on its inputs as they are then."""
    layers = find_targets(model)
    samples = load_samples(chunks, model, num_samples=NUM_SAMPLES, seed=0)
    with Walk(model, layers, samples.batches) as walk:
        for step in walk.steps:
            for name, seen in walk.measure(step, Hessian).items():
                assert isinstance(seen, Hessian)
                lack = dense[f"{name}.weight"] - weight_NK(layers[name])
                nothing = torch.zeros_like(lack, dtype=torch.bool)
                install_side_(model, name, fit_side(lack, nothing, group, "data", seen.matrix))
            walk.finish(step)


def round_(model: Any, format: str, way: str, chunks: list[Tensor]) -> None:
    if way == "nearest":
        round_to_nearest_(model, format)
        return
    config = sk.SparseGPT(format=format) if way == "gptq" else sk.AWQ(format=format, compensate=way == "awq")
    sk.prune_(model, config, dataset=chunks, progress=False)


def bits(model: Any, format: str | None) -> float:
    """Return the bits that the packed layers take for each weight of the dense matrices, branches included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # who would run it does not matter here
        report = sk.check(sk.pack_(model, format or "semi24", "reference"))
        rows = [row for row in report.rows if row["format"] != "dense"]
        sk.unpack_(model)
    weights = [row["shape"].split("x") for row in rows]
    return sum(8 * row["bytes"] for row in rows) / sum(int(N) * int(K) for N, K in weights)


def evenly(ids: Tensor, length: int, num: int | None) -> Tensor:
    """Return `num` chunks of the stream, evenly spaced, as one stream; all of it for None."""
    chunks = ids[: len(ids) // length * length].view(-1, length)
    return ids if num is None else chunks[:: max(len(chunks) // num, 1)][:num].flatten()


def measure(case: Case, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield a row for the start, and one for each format and way."""
    model_dir, held_out = model_in(options.data, case), case.held_out(options.split)
    train, text = (load_ids(text_in(options.data, file), model_dir) for file in (case.train, held_out))
    text, chunks = evenly(text, case.chunk, options.chunks), random_chunks(train, case.chunk, options.seed)
    started = time.perf_counter()
    if options.trained is not None:
        model: Any = sk.unpack_(sk.load(options.trained)).float()
    else:
        model = load_model(model_dir)
        dense = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        sk.prune_(model, sk.SparseGPT(strongest_first=True), dataset=chunks, progress=False)
        if options.side:
            add_branches_(model, dense, chunks, options.side)

    def row(format: str | None, way: str) -> dict[str, Any]:
        value = perplexity(model, text, max_seq_length=case.chunk, progress=False).value
        return {
            "model": case.model,
            "side": options.side,
            "format": format,
            "way": way,
            "seed": options.seed,
            "text": held_out,
            "perplexity": value,
            "over 2:4": None if way == "start" else value / start - 1,
            "bits": bits(model, format),
            "seconds": time.perf_counter() - started,
        }

    first = row(None, "start")
    start = first["perplexity"]
    yield first
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for format in options.formats:
        for way in options.ways:
            model.load_state_dict(held)
            started = time.perf_counter()
            round_(model, format, way, chunks)
            yield row(format, way)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--data", type=Path, required=True, help="folder with models/ and data/, or demo")
    parser.add_argument("--models", type=names, default=[case.model for case in CASES])
    parser.add_argument("--formats", type=names, default=["semi24_int4"])
    parser.add_argument("--ways", type=lambda text: text.split(";"), default=list(WAYS), help="apart by ;")
    parser.add_argument("--side", type=int, help="features that share a column of the branch, as 16")
    parser.add_argument("--trained", type=Path, help="a 2:4 model to start from")
    parser.add_argument("--split", choices=["valid", "test"], default="valid", help="text of the perplexity")
    parser.add_argument("--chunks", type=int, help="of the held-out text")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of calibration samples")
    parser.add_argument("--json", type=Path, help="append the rows to this file")
    options = parser.parse_args()
    report = Report("Perplexity of rounded 2:4 models")
    for case in CASES:
        if case.model in options.models:
            for row in measure(case, options):
                print(json.dumps(row), file=sys.stderr, flush=True)
                report.rows.append(row)
    report.print()
    lines = [json.dumps(row) for row in report.rows]
    print("\n".join(lines))
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        with options.json.open("a") as file:
            file.writelines(line + "\n" for line in lines)


if __name__ == "__main__":
    main()
