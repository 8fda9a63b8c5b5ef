"""The CPU 2:4 kernel against torch's dense linear, layer by layer.

    python bench/cpu_spmm24.py [--dtype bfloat16 float32] [--tokens 1 4 8] [--shapes 4096x4096] [--seconds 1.5]

The two take turns. Both rotate over as many copies of the weight as make the packed ones three times the last cache,
so weights come from memory, as they do when a model decodes. Every answer is checked against float64 before it is
timed. The table shows losses too; below it the geometric means over shapes, then one JSON line, which is also appended
to results/ (or to --append FILE, or written to --json FILE).
"""

import argparse
import math
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from record import record
from sparsekit_kernels import cpu
from torch import Tensor

from sparsekit.benchmarking import cache_bytes, measure_ceilings, random24, rotate, time_pair
from sparsekit.report import Report

SHAPES = ("4096x4096", "14336x4096", "4096x14336", "6144x4096")
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--tokens", nargs="+", type=int, default=TOKENS, metavar="M")
    parser.add_argument("--shapes", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=1.5, help="spent on one row of the table")
    parser.add_argument("--json", type=Path, help="write the result to this file instead of results/")
    parser.add_argument("--append", type=Path, help="append the result to this file instead of results/")
    options = parser.parse_args()
    reason = cpu.why_not()
    if reason is not None:
        raise SystemExit(reason)
    torch.set_num_threads(options.threads)
    rows = []
    for dtype in (getattr(torch, name) for name in options.dtype):
        for shape in options.shapes:
            N, K = map(int, shape.split("x"))
            rows += measure(N, K, dtype, options.tokens, options.seconds)
    Report("x @ W.T on the CPU, 2:4 against dense; ratios below 1 are losses", [shown(row) for row in rows]).print()
    means = geometric_means(rows)
    Report("Geometric mean over the shapes", means).print()
    if options.json is not None:
        options.json.unlink(missing_ok=True)
    record("cpu_spmm24", {"means": means, "rows": rows}, options.json or options.append)


def measure(N: int, K: int, dtype: torch.dtype, tokens: list[int], seconds: float) -> list[dict]:
    """Return one row for each number of tokens."""
    packed_bytes = N * K * (dtype.itemsize * 4 + 1) // 8
    copies = max(2, math.ceil(3 * cache_bytes() / packed_bytes))
    weights = [random24(N, K, dtype)]
    weights += [weights[0].clone() for _ in range(copies - 1)]
    packed = [cpu.prepare(*cpu.compress24(w)) for w in weights]
    num_bytes = sum(t.nbytes for t in packed[0])
    ceilings = measure_ceilings("cpu", (dtype,))
    rows = []
    for M in tokens:
        x = torch.randn(M, K).to(dtype)
        error = check(x, weights[0], packed[0])
        pair = time_pair(
            rotate([partial(F.linear, x, w) for w in weights]),
            rotate([partial(cpu.spmm24, x, *p, N) for p in packed]),
            rounds=1000,
            max_seconds=seconds,
        )
        time = pair["sparse"].median
        rows.append(
            {
                "dtype": str(dtype).removeprefix("torch."),
                "M": M,
                "N": N,
                "K": K,
                "ratio": pair.ratio("dense", "sparse"),
                "dense": pair["dense"].to_dict(),
                "sparse": pair["sparse"].to_dict(),
                "copies": copies,
                "gb_s": num_bytes / 1e9 / time,
                "gflop_s": 2 * M * N * K / 1e9 / time,
                "of_read_ceiling": num_bytes / 1e9 / time / ceilings.read_gb_s,
                "of_matmul_ceiling": 2 * M * N * K / 1e9 / time / next(iter(ceilings.matmul_gflop_s.values())),
                "error_over_dense": error,
            }
        )
    return rows


def check(x: Tensor, w: Tensor, packed: tuple[Tensor, ...]) -> float:
    """Return the kernel's largest error over that of dense; stop if it is more than twice that."""
    rows = x[: min(8, x.shape[0])].double()  # float64 of all of them takes longer than the measurement
    ref64 = rows @ w.double().T
    dense = (F.linear(x, w)[: rows.shape[0]].double() - ref64).abs().max().item()
    ours = (cpu.spmm24(x, *packed, w.shape[0])[: rows.shape[0]].double() - ref64).abs().max().item()
    if not ours <= 2 * dense + 1e-5 * ref64.abs().max().item():
        raise SystemExit(f"wrong at M={x.shape[0]}, W {tuple(w.shape)} {w.dtype}: error {ours:.3g}, dense {dense:.3g}")
    return ours / dense


def shown(row: dict) -> dict:
    """Return the row as the table has it."""
    return {
        "dtype": row["dtype"],
        "N x K": f"{row['N']}x{row['K']}",
        "M": row["M"],
        "dense ms": round(row["dense"]["median_s"] * 1e3, 3),
        "2:4 ms": round(row["sparse"]["median_s"] * 1e3, 3),
        "p20-p80": f"{row['sparse']['p20_s'] * 1e3:.2f}-{row['sparse']['p80_s'] * 1e3:.2f}",
        "ratio": round(row["ratio"], 2),
        "GB/s": round(row["gb_s"], 1),
        "of read": round(row["of_read_ceiling"], 2),
        "GFLOP/s": round(row["gflop_s"]),
        "of matmul": round(row["of_matmul_ceiling"], 2),
    }


def geometric_means(rows: list[dict]) -> list[dict]:
    groups: dict[tuple[str, int], list[float]] = {}
    for row in rows:
        groups.setdefault((row["dtype"], row["M"]), []).append(row["ratio"])
    return [
        {"dtype": dtype, "M": M, "ratio": round(math.exp(sum(map(math.log, ratios)) / len(ratios)), 3)}
        for (dtype, M), ratios in groups.items()
    ]


if __name__ == "__main__":
    main()
