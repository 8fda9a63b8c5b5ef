"""2:4 against dense on one NVIDIA GPU: the Triton kernel and cuSPARSELt beside torch's own matmul.

    python bench/gpu_spmm24.py                  # correctness, then all shapes; under 8 minutes
    python bench/gpu_spmm24.py --tune           # and other launches of the Triton kernel, on two shapes
    OUT=/tmp/rows python bench/gpu_spmm24.py    # rows go to $OUT/<gpu>.jsonl instead of bench/results/<gpu>.jsonl

Answers are checked against float64 before anything is timed; a wrong one ends the run. Each sample is one replay of a
CUDA graph that holds many calls and walks over copies of the weight larger together than three times the L2, so that
every call reads its weight from memory and no launch is waited for. Variants take turns.
"""

import argparse
import itertools
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median, quantiles

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "kernels"))

from sparsekit_kernels import cusparselt, layout24, spmm24, target  # noqa: E402

SHAPES = {  # N, K
    "8B qkv": (6144, 4096),
    "8B o": (4096, 4096),
    "8B gate_up": (28672, 4096),
    "8B down": (4096, 14336),
    "70B qkv": (10240, 8192),
    "70B down": (8192, 28672),
}
TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
ROUNDS = 30
LINE = "{:10} {:>6} {:>6} {:>5} {:9} {:11} {:>10} {:>9} {:>9} {:>9} {:>6} {:>8} {:>8} {:>8} {}"

Call = Callable[[], torch.Tensor]


def weight24(N: int, K: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """A random weight that keeps two random entries of each group of four, a few of them zero."""
    w = torch.randn(N, K, device=device).to(dtype)
    for start in range(0, N, 4096):  # the sort is larger than the weight
        rows = w[start : start + 4096]
        scores = torch.rand(rows.shape[0], math.ceil(K / 4), 4, device=device)
        keep = (scores.argsort(-1).argsort(-1) >= 2).view(rows.shape[0], -1)[:, :K]
        rows *= keep & (torch.rand(rows.shape, device=device) > 0.01)
    return w + 0.0  # -0.0 would not come back


def error_of(name: str, out: torch.Tensor, dense: torch.Tensor, ref64: torch.Tensor) -> float:
    """Return how many times further from float64 `out` is than torch's dense result; above 2 the run ends."""
    error, own = ((y.double() - ref64).abs().max().item() for y in (out, dense))
    limit = 2 * own + 1e-5 * ref64.abs().max().item()
    if not error <= limit:
        sys.exit(f"WRONG: {name}: error {error:.3g}, dense has {own:.3g}, {limit:.3g} is allowed")
    return error / max(own, 1e-30)


def check(device: str) -> None:
    """Compare every path with float64, on ragged and real shapes."""
    shapes = ((17, 8), (63, 257), (48, 80), (4096, 4096), (1024, 14336))
    worst: dict[str, float] = {}
    for dtype, (N, K) in itertools.product((torch.bfloat16, torch.float16, torch.float32), shapes):
        torch.manual_seed(N + K)
        w = weight24(N, K, dtype, device)
        values, meta = layout24.compress24(w)
        if not torch.equal(spmm24.decompress24(values, meta, K), w):
            sys.exit(f"WRONG: decompress24 {N}x{K} {dtype} is not exact")
        paths: dict[str, Callable] = {"triton": partial(spmm24.spmm24, values=values, meta=meta)}
        if cusparselt.why_not(dtype, N, K, device) is None:
            (packed,) = cusparselt.prepare(values, meta, K)
            if not all(map(torch.equal, cusparselt.restore(packed, N, K), (values, meta))):
                sys.exit(f"WRONG: cusparselt.restore {N}x{K} {dtype} is not exact")
            paths["cusparselt"] = partial(cusparselt.spmm24, packed=packed, N=N, K=K)
        for M in (1, 3, 16, 17, 33, 64, 65, 128, 1000, 4096):
            x, bias = torch.randn(M, K, device=device).to(dtype), torch.randn(N, device=device).to(dtype)
            for b in (None, bias) if M in (3, 65) else (bias,):
                ref64 = F.linear(x.double(), w.double(), None if b is None else b.double())
                for name, path in paths.items():
                    label = f"{name} M={M} N={N} K={K} {dtype} bias={b is not None}"
                    error = error_of(label, path(x, bias=b), F.linear(x, w, b), ref64)
                    key = f"{name} {str(dtype).removeprefix('torch.')}"
                    worst[key] = max(worst.get(key, 0.0), error if N * K > 4096 else 0.0)
    ratios = ", ".join(f"{key} {value:.2f}x" for key, value in worst.items())
    print(f"correct against float64; largest error over that of dense torch: {ratios}", flush=True)


def capture(calls: list[Call]) -> Callable[[], None]:
    """Return a function that runs all `calls` on the GPU, as one CUDA graph."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def time_turns(variants: dict[str, list[Call]]) -> dict[str, list[float]]:
    """Return seconds a call, one sample a round, of variants that take turns."""
    runs = {name: capture(calls) for name, calls in variants.items()}
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-3, ROUNDS):
        for name in runs if turn % 2 else reversed(runs):
            start.record()
            runs[name]()
            end.record()
            end.synchronize()
            if turn >= 0:
                samples[name].append(start.elapsed_time(end) / 1e3 / len(variants[name]))
    return samples


def facts(device: str) -> dict[str, object]:
    """What a reader needs to judge a number."""
    gpu = torch.cuda.get_device_properties(device)
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,temperature.gpu"
    sha = ["git", "-C", str(ROOT), "describe", "--always", "--dirty"]
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader", "-i", "0"]
    answers = {}
    for name, command in (("git_sha", sha), ("nvidia_smi", smi)):
        try:
            answers[name] = subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
        except OSError:
            answers[name] = None
    import triton

    return {
        "gpu": gpu.name, "sm": f"{gpu.major}{gpu.minor}", "sms": gpu.multi_processor_count,
        "l2_mib": gpu.L2_cache_size >> 20, "torch": torch.__version__, "cuda": torch.version.cuda,
        "triton": triton.__version__, "cusparselt": torch.backends.cusparselt.version(),
        "python": sys.version.split()[0], "nvidia_smi_fields": query, **answers,
    }  # fmt: skip


def ceilings(device: str) -> tuple[float, float]:
    """Return this GPU's GB/s of a large copy and TFLOP/s of a large bf16 product."""
    source = torch.empty(1 << 30, dtype=torch.int32, device=device)
    sink = torch.empty_like(source)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    samples = time_turns({"copy": [lambda: sink.copy_(source)], "matmul": [lambda: a @ b] * 3})
    return 2 * source.nbytes / 1e9 / min(samples["copy"]), 2 * 8192**3 / 1e12 / min(samples["matmul"])


def measure(layer: str, dtype: torch.dtype, tokens: list[int], device: str, l2_bytes: int) -> Iterator[dict]:
    """Yield a row for each number of tokens and backend."""
    N, K = SHAPES[layer]
    w = weight24(N, K, dtype, device)
    values, meta = layout24.compress24(w)
    sparse_bytes = values.nbytes + meta.nbytes
    copies = max(2, math.ceil(3 * l2_bytes / sparse_bytes))
    dense_copies = [w] + [w.clone() for _ in range(copies - 1)]
    sparse_copies = [(values, meta)] + [(values.clone(), meta.clone()) for _ in range(copies - 1)]
    cslt_copies, reason = [], cusparselt.why_not(dtype, N, K, device)
    if reason is None:
        (packed,) = cusparselt.prepare(values, meta, K)
        cslt_copies = [packed] + [packed.clone() for _ in range(copies - 1)]
    else:
        print(f"cusparselt does not run {layer} in {dtype}: {reason}")
    for M in tokens:
        x = torch.randn(M, K, device=device).to(dtype)
        variants: dict[str, list[Call]] = {
            "dense": [partial(F.linear, x, copy) for copy in dense_copies],
            "triton": [partial(spmm24.spmm24, x, *copy) for copy in sparse_copies],
        }
        if cslt_copies:
            variants["cusparselt"] = [partial(cusparselt.spmm24, x, copy, N, K) for copy in cslt_copies]
        samples = time_turns(variants)
        base = median(samples["dense"])
        for name, seconds in samples.items():
            fifths, middle = quantiles(seconds, n=5, method="inclusive"), median(seconds)
            read = (w.nbytes if name == "dense" else sparse_bytes) + (M * K + M * N) * w.element_size()
            yield {
                "layer": layer, "N": N, "K": K, "M": M, "dtype": str(dtype).removeprefix("torch."),
                "format": "dense" if name == "dense" else "semi24", "backend": name, "kernel": kernel_of(name, M),
                "min_us": min(seconds) * 1e6, "median_us": middle * 1e6, "p20_us": fifths[0] * 1e6,
                "p80_us": fifths[3] * 1e6, "gb_s": read / 1e9 / middle, "tflop_s": 2 * M * N * K / 1e12 / middle,
                "speedup": base / middle,
            }  # fmt: skip


def kernel_of(backend: str, M: int) -> str:
    if backend != "triton":
        return "F.linear" if backend == "dense" else "cslt_sparse_mm"
    return "spmm24_small" if M <= spmm24.DENSE_ABOVE else "decompress24 + F.linear"


def tune(device: str, l2_bytes: int, deadline: float) -> None:
    """Print other launches of the Triton kernel beside the shipped one, and beside dense."""
    print("\ntune: BLOCK_M BLOCK_N BLOCK_G warps stages SPLIT_K")
    blocks = ((64, 32, 4, 3), (64, 32, 4, 4), (64, 32, 4, 5), (64, 64, 4, 3), (128, 32, 8, 4), (32, 32, 2, 4))
    for (N, K), M in itertools.product((SHAPES["8B o"], SHAPES["8B gate_up"]), (1, 16)):
        w = weight24(N, K, torch.bfloat16, device)
        packed = layout24.compress24(w)
        count = max(2, math.ceil(3 * l2_bytes / (packed[0].nbytes + packed[1].nbytes)))
        copies = [packed] + [(packed[0].clone(), packed[1].clone()) for _ in range(count - 1)]
        x = torch.randn(M, K, device=device).bfloat16()
        ref64 = x.double() @ w.double().T
        shipped = spmm24.pick_config(M, N, K, torch.bfloat16, target.num_sms(x.device))
        configs = [shipped]
        for (BN, BG, warps, stages), split in itertools.product(blocks, (1, 2, 4, 8)):
            configs.append(spmm24.Config(
                BLOCK_M=16, BLOCK_N=BN, BLOCK_G=BG, num_warps=warps, num_stages=stages, SPLIT_K=split
            ))  # fmt: skip
        dense: list[Call] = [partial(F.linear, x, copy) for copy in [w] + [w.clone() for _ in range(count - 1)]]
        rows = []
        for config in dict.fromkeys(configs):
            if time.monotonic() > deadline:
                print("tune: out of time")
                break
            sparse: list[Call] = [partial(spmm24.spmm24_small, x, v, m, config=config) for v, m in copies]
            error_of(str(config), sparse[0](), F.linear(x, w), ref64)
            samples = time_turns({"dense": dense, "triton": sparse})
            rows.append((median(samples["triton"]), median(samples["dense"]), config))
        rows.sort(key=lambda row: row[0])
        for seconds, base, config in [row for i, row in enumerate(rows) if i < 8 or row[2] == shipped]:
            mark = "<- shipped" if config == shipped else ""
            launch = " ".join(map(str, vars(config).values()))
            print(f"N={N} K={K} M={M}: {seconds * 1e6:8.2f} us {base / seconds:5.2f}x  {launch} {mark}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", action="store_true", help="time other launches of the Triton kernel too")
    parser.add_argument("--seconds", type=float, default=440, help="start nothing new after this many seconds")
    parser.add_argument("--layers", nargs="*", default=list(SHAPES), choices=list(SHAPES))
    options = parser.parse_args()
    device, deadline = "cuda:0", time.monotonic() + options.seconds
    reason = target.why_not(device) or (target.INTERPRETED and "TRITON_INTERPRET is set") or None
    if reason:
        sys.exit(f"nothing to measure: {reason}")
    machine = facts(device)
    print(json.dumps(machine), flush=True)
    check(device)
    copy_gb_s, matmul_tflop_s = ceilings(device)
    machine |= {"copy_gb_s": copy_gb_s, "matmul_tflop_s": matmul_tflop_s}
    print(f"ceilings: copy {copy_gb_s:.0f} GB/s, bf16 matmul {matmul_tflop_s:.0f} TFLOP/s", flush=True)

    out_dir = Path(os.environ.get("OUT") or ROOT / "bench" / "results")
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / f"{str(machine['gpu']).replace(' ', '-').lower()}.jsonl"
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    plan: list[tuple[str, torch.dtype, tuple[int, ...]]] = [(layer, torch.bfloat16, TOKENS) for layer in options.layers]
    plan += [("8B o", dtype, (1, 16, 64, 1024)) for dtype in (torch.float16, torch.float32)]
    columns = ("layer", "N", "K", "M", "dtype", "backend", "median us", "min", "p20", "p80", "GB/s", "TFLOP/s")
    print(LINE.format(*columns, "ceiling", "speedup", ""))
    wins: dict[str, list[str]] = {}
    with path.open("a") as file:
        for layer, dtype, tokens in plan:
            if time.monotonic() > deadline:
                print(f"out of time: {layer} in {dtype} not measured")
                continue
            for row in measure(layer, dtype, list(tokens), device, l2_bytes):
                share = max(row["gb_s"] / copy_gb_s, row["tflop_s"] / matmul_tflop_s)
                if row["dtype"] != "float32":
                    row["ceiling_share"] = share
                file.write(json.dumps({**row, **machine}) + "\n")
                file.flush()
                loss = "" if row["backend"] == "dense" or row["speedup"] >= 1 else "  dense wins"
                if row["backend"] != "dense" and row["dtype"] == "bfloat16":
                    wins.setdefault(f"{row['backend']} M={row['M']}", []).append(f"{row['speedup']:.2f}")
                names = ("layer", "N", "K", "M", "dtype", "backend", "median_us", "min_us", "p20_us", "p80_us")
                numbers = [f"{row['gb_s']:.0f}", f"{row['tflop_s']:.1f}", f"{share:.2f}", f"{row['speedup']:.2f}"]
                cells = [f"{row[name]:.2f}" if name.endswith("_us") else row[name] for name in names]
                print(LINE.format(*cells, *numbers, loss), flush=True)
            torch.cuda.empty_cache()
    if options.tune:
        tune(device, l2_bytes, deadline)
    print(f"\nspeed-up over dense, bf16, layers in the order {', '.join(options.layers)}")
    for key, ratios in wins.items():
        print(f"  {key:20} {' '.join(ratios)}")
    after = facts(device)["nvidia_smi"]
    print(json.dumps({**machine, "nvidia_smi_after": after, "rows": str(path), "speedups": wins}))


if __name__ == "__main__":
    main()
