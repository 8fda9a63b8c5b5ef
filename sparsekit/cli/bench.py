"""`sparsekit bench`, and how tables by layer shape are shown."""

from typing import Any

import torch

import sparsekit as sk
from sparsekit.archs import vocabulary_size
from sparsekit.backends import BACKENDS
from sparsekit.benchmarking import against_dense, get_shapes, in_format, measure_ceilings, measure_shapes
from sparsekit.benchmarking.timing import noise_notes
from sparsekit.cli.models import load_model, parse_device
from sparsekit.cli.output import Output
from sparsekit.doctor import parse_dtype
from sparsekit.nn import sparse_layers
from sparsekit.progress import progress_bar
from sparsekit.report import Report


def bench_model(
    output: Output, name: str, backend: str, format: str, dtype: str, device: str | None, *, rounds: int, **sizes: Any
) -> Report:
    """Time a packed model against its dense twin; a dense one is pruned by magnitude first, in memory only.

    Raises:
        ValueError: `format` is another one than that of the packed model.
    """
    in_format([], format)
    BACKENDS.check(backend)
    if rounds < 1 or any(size < 1 for key, size in sizes.items() if key != "new_tokens") or sizes["new_tokens"] < 0:
        raise ValueError(f"rounds={rounds}, {', '.join(f'{k}={v}' for k, v in sizes.items())}: numbers of at least 1")
    model, notes = load_model(name, dtype, device)
    packed = {layer.format for layer in sparse_layers(model).values()}
    if packed and format != "auto" and packed != {format}:
        raise ValueError(f"--format {format}: {name} is packed as {', '.join(sorted(packed))}, leave --format out")
    if not packed:
        sk.sparsify(model, "2:4", method="magnitude", format=format, backend=backend, progress=output.progress)
        notes.append("the model was dense: pruned to 2:4 by magnitude for these timings, and nothing was saved")
    report = sk.benchmark(model, rounds=rounds, progress=output.progress, **sizes)
    report.title += f": {name}"
    report.notes += notes
    return output.add("benchmark", report)


def bench_against(
    output: Output, name: str, dense_name: str, dtype: str, device: str | None, *, rounds: int, **sizes: Any
) -> Report:
    """Time a model against the one that it was made from, where that has other shapes.

    Raises:
        ValueError: the two read different things.
    """
    batch_size, length = sizes["batch_size"], sizes["prompt_length"]
    model, notes = load_model(name, dtype, device)
    dense, _ = load_model(dense_name, dtype, device)
    sides = [(type(each).__name__, vocabulary_size(each)) for each in (dense, model)]
    if sides[0] != sides[1]:
        raise ValueError(
            f"--against {dense_name}: it is a {sides[0][0]} with {sides[0][1]} tokens, {name} a {sides[1][0]} "
            f"with {sides[1][1]}: name the model that it was made from"
        )
    report = against_dense(
        dense,
        model,
        batch_sizes=(batch_size,),
        length=length,
        new_tokens=sizes["new_tokens"],
        rounds=rounds,
        progress=output.progress,
    )
    report.title += f": {dense_name} against {name}"
    report.notes += notes
    return output.add("benchmark", report)


def bench_shapes(
    output: Output,
    shapes: str,
    num_tokens: tuple[int, ...],
    backend: str,
    format: str,
    dtype: str,
    device: str | None,
) -> Report:
    """Time the kernels at the layer shapes of a known model, on random weights."""
    if any(m < 1 for m in num_tokens):
        raise ValueError(f"--num-tokens {num_tokens}: numbers of at least 1")
    BACKENDS.check(backend)
    wanted = in_format(get_shapes(shapes), format)
    target = parse_device(device)
    weights = torch.bfloat16 if dtype == "auto" else parse_dtype(dtype)
    assert weights is not None
    name = f"{wanted[0].format} layers of {shapes} in {str(weights).removeprefix('torch.')}"
    report = Report(f"sparsekit bench: {name} on {target}")
    ceilings = measure_ceilings(target, (weights,))
    report.summary["memory read, GB/s"] = round(ceilings.read_gb_s, 1)
    report.summary["matmul, GFLOP/s"] = round(next(iter(ceilings.matmul_gflop_s.values())), 1)
    with progress_bar("measuring", len(wanted) * len(num_tokens), output.progress) as bar:
        for row in measure_shapes(wanted, num_tokens, weights, target, backend=backend):
            report.rows.append(row)
            bar.advance(1, f"{row['shape']} M={row['M']}")
    report.summary |= {f"speedup of one pass at M={m}": round(pass_speedup(report.rows, m), 3) for m in num_tokens}
    report.notes += noise_notes([row["noise"] for row in report.rows])
    return output.add("shapes", report)


def pass_speedup(rows: list[dict[str, Any]], num_tokens: int) -> float:
    """Return the speed-up of all linear layers of one pass through the model."""
    mine = [row for row in rows if row["M"] == num_tokens]
    return sum(row["dense ms"] * row["count"] for row in mine) / sum(row["sparse ms"] * row["count"] for row in mine)


def by_shape(report: Report) -> Report:
    """Return the report with one row a layer shape and the speed-ups at each M beside one another."""
    rows: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in report.rows:
        kind = {key: row[key] for key in ("layer", "shape", "count", "format", "backend")}
        line = rows.setdefault((row["shape"], row["format"], row["layer"]), kind)
        line[f"M={row['M']}"] = row["speedup"]
        if row["speedup"] >= 1.05:
            line["sparse pays at"] = ", ".join(filter(None, [line.get("sparse pays at"), f"M={row['M']}"]))
    for line in rows.values():
        line["sparse pays at"] = line.pop("sparse pays at", "nowhere: stay dense")
    notes = report.notes + (["columns M=…: how many times faster than dense with so many tokens"] if rows else [])
    return Report(report.title, list(rows.values()), report.summary, notes, report.ok)
