"""The CPU kernels for 8- and 4-bit 2:4 weights against torch's dense products, layer by layer.

    python bench/cpu_spmm24_quantised.py [--tokens 1 4 16] [--shapes 4096x4096] [--seconds 3]

bf16 x. Six products take turns: torch's dense bf16, its int8 (`_weight_int8pack_mm`) and its int4 in groups of
128 (`_weight_int4pack_mm_for_cpu`), and ours on 2:4 weights in bf16, int8 and int4. Each rotates over as many copies of
its weight as make them three times the last cache, so weights come from memory, as they do when a model decodes. Ours
are checked against float64 on the very weights before they are timed. The tables show losses too, by medians and by
minima; the last line is JSON, which is also appended to results/ (or to --append FILE, or written to --json FILE).
"""

import argparse
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from record import record
from sparsekit_kernels import cpu
from sparsekit_kernels.layout24 import decompress24
from sparsekit_kernels.quant import dequantize24, quantize24
from torch import Tensor

from sparsekit.benchmarking import cache_bytes, compare, measure_ceilings, random24, rotate
from sparsekit.report import Report

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "6144x4096")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)
BF16 = torch.bfloat16
CHECKED = 17  # one row in so many is compared with float64: prime, so that every place in a block has its turn
DENSE = ("dense bf16", "dense int8", "dense int4")
OURS = ("2:4 bf16", "2:4 int8", "2:4 int4")
RIVALS = (
    ("2:4 int8", "dense bf16"),
    ("2:4 int8", "dense int8"),
    ("2:4 int4", "dense bf16"),
    ("2:4 int4", "dense int4"),
)

Product = Callable[[Tensor], Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=3.0, help="spent on one row of the table")
    parser.add_argument("--json", type=Path, help="write the result to this file instead of results/")
    parser.add_argument("--append", type=Path, help="append the result to this file instead of results/")
    options = parser.parse_args()
    reason = cpu.why_not(BF16)
    if reason is not None:
        raise SystemExit(reason)
    torch.set_num_threads(options.threads)
    read_gb_s = measure_ceilings("cpu", ()).read_gb_s
    rows = []
    for shape in options.shapes:
        N, K = map(int, shape.split("x"))
        rows += measure(N, K, options.tokens, options.seconds, read_gb_s)
    Report("x @ W.T on the CPU, median ms", [shown(row) for row in rows]).print()
    means = geometric_means(rows)
    Report("Times faster, geometric mean over the shapes; below 1 is a loss", means).print()
    if options.json is not None:
        options.json.unlink(missing_ok=True)
    record("cpu_spmm24_quantised", {"means": means, "rows": rows}, options.json or options.append)


def measure(N: int, K: int, tokens: Sequence[int], seconds: float, read_gb_s: float) -> list[dict]:
    """Return one row for each number of tokens."""
    values, meta = cpu.compress24(random24(N, K, torch.float32))
    products, num_bytes, weights64 = {}, {}, {}
    for name in (*DENSE, *OURS):
        build, num_bytes[name], weights64[name] = variants(name, values, meta, K)
        copies = max(2, math.ceil(3 * cache_bytes() / num_bytes[name]))
        products[name] = [build() for _ in range(copies)]
    rows = []
    for M in tokens:
        x = torch.randn(M, K).to(BF16)
        errors = {name: check(name, x, products, weights64) for name in OURS}
        calls = {name: rotate([partial(product, x) for product in copies]) for name, copies in products.items()}
        timings = compare(calls, rounds=1000, max_seconds=seconds)
        row = {"M": M, "N": N, "K": K, "errors_over_dense": errors}
        for name in products:
            time = timings[name].min
            row[name] = timings[name].to_dict()
            row[name] |= {"bytes": num_bytes[name], "of_read_ceiling": num_bytes[name] / 1e9 / time / read_gb_s}
        rows.append(row)
    return rows


def variants(name: str, values: Tensor, meta: Tensor, K: int) -> tuple[Callable[[], Product], int, Tensor]:
    """Return what makes another copy of a product, the bytes it reads of its weight, and the weight in float64."""
    N = meta.shape[0]
    if name.endswith("bf16"):
        values = values.to(BF16)
        dense = decompress24(values, meta, K)
        if name == "dense bf16":
            return lambda: partial(F.linear, weight=dense.clone()), dense.nbytes, dense[::CHECKED].double()
        prepared = cpu.prepare(values, meta)
        return lambda: _ours(cpu.spmm24, prepared, N), _bytes(prepared), dense[::CHECKED].double()
    bits = 8 if name.endswith("int8") else 4
    q, scales = quantize24(values, f"semi24_int{bits}", K)
    weight = decompress24(dequantize24(q, scales, f"semi24_int{bits}", K, torch.float32), meta, K)
    weight64 = weight[::CHECKED].double()
    if name == "2:4 int8":
        prepared = (*cpu.prepare_int8(q, meta), scales)
        return lambda: _ours(cpu.spmm24_int8, prepared, N), _bytes(prepared), weight64
    if name == "2:4 int4":
        prepared = cpu.prepare_int4(q, meta, scales)
        return lambda: _ours(cpu.spmm24_int4, prepared, N), _bytes(prepared), weight64
    if name == "dense int8":
        tensors = (decompress24(q, meta, K), scales.to(BF16))
        return lambda: _theirs(torch._weight_int8pack_mm, [t.clone() for t in tensors]), _bytes(tensors), weight64
    # torch's int4 has 16 levels above a zero point of its own: level 8 stands for 0.
    step = scales.float().repeat_interleave(128, 1)[:, :K]
    levels = (weight / step).round().add(8).to(torch.int32)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(levels, 1)
    scales_and_zeros = torch.stack((scales.T, torch.zeros_like(scales.T)), dim=-1).contiguous()
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu
    return (
        lambda: partial(_int4, multiply, packed.clone(), scales_and_zeros.clone()),
        packed.nbytes + scales_and_zeros.nbytes,
        weight64,
    )


def _ours(product: Callable[..., Tensor], prepared: tuple[Tensor, ...], N: int) -> Product:
    copy = [t.clone() for t in prepared]
    return lambda x: product(x, *copy, N)


def _theirs(product: Callable[..., Tensor], tensors: list[Tensor]) -> Product:
    return lambda x: product(x, *tensors)


def _int4(multiply: Callable[..., Tensor], packed: Tensor, scales_and_zeros: Tensor, x: Tensor) -> Tensor:
    return multiply(x, packed, 128, scales_and_zeros)


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.nbytes for t in tensors)


def check(name: str, x: Tensor, products: dict[str, list[Product]], weights64: dict[str, Tensor]) -> float:
    """Return the largest error of one of ours over that of dense bf16; stop if it is more than twice that.

    Each is compared with float64 on its own weight, every 17th row of it; torch's quantised products are held to a
    looser bound, so that it is the same product that is timed.
    """
    rows = x[: min(8, x.shape[0])].double()  # float64 of all of them takes longer than the measurement

    def error(of: str) -> tuple[float, float]:
        ref64 = rows @ weights64[of].T
        y = products[of][0](x)[: rows.shape[0], ::CHECKED]
        return (y.double() - ref64).abs().max().item(), ref64.abs().max().item()

    dense, _ = error("dense bf16")
    ours, largest = error(name)
    if not ours <= 2 * dense + 1e-5 * largest:
        raise SystemExit(f"{name} is wrong at M={x.shape[0]}: error {ours:.3g}, dense {dense:.3g}")
    rival = name.replace("2:4", "dense")
    theirs, largest = error(rival)
    if not theirs <= 0.02 * largest:
        raise SystemExit(f"{rival} is wrong at M={x.shape[0]}: error {theirs:.3g} of {largest:.3g}")
    return ours / dense


def shown(row: dict) -> dict:
    """Return the row as the table has it."""
    line = {"N x K": f"{row['N']}x{row['K']}", "M": row["M"]}
    line |= {name: round(row[name]["median_s"] * 1e3, 3) for name in (*DENSE, *OURS)}
    return line | {f"{name} of read": round(row[name]["of_read_ceiling"], 2) for name in OURS}


def geometric_means(rows: list[dict]) -> list[dict]:
    """Return, for each number of tokens, how many times faster ours are than each rival: by medians and by minima."""
    means = []
    for M in dict.fromkeys(row["M"] for row in rows):
        mean: dict[str, float] = {"M": M}
        for ours, rival in (("2:4 bf16", "dense bf16"), *RIVALS):
            for statistic in ("median", "min"):
                logs = [
                    math.log(row[rival][f"{statistic}_s"] / row[ours][f"{statistic}_s"])
                    for row in rows
                    if row["M"] == M
                ]
                mean[f"{ours} / {rival} {statistic}"] = round(math.exp(sum(logs) / len(logs)), 3)
        means.append(mean)
    return means


if __name__ == "__main__":
    main()
