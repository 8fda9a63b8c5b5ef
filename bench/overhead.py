"""Host time of one call of a small packed layer: what the way to the kernel costs, apart from the kernel.

    python bench/overhead.py [--device cpu] [--rounds 400] [--json FILE]

One thread, 64x64, M=1, no gradients: the multiplication itself is a fraction of a microsecond. Turns of 100 calls, of
which the fastest counts: `nn.Linear`, the packed layer, and on the CPU the bare C function with the very arguments that
the layer gave it, through ctypes. `host_us` is the layer less that function. On a GPU nothing waits for the device
inside a turn, so `host_us` is the launch alone, kernel queue included. Ends with 1 unless each is under 10 us.
"""

import argparse
import sys
import timeit
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from record import record
from sparsekit_kernels import cpu
from torch import nn

import sparsekit as sk
from sparsekit.backends import resolve
from sparsekit.errors import Unsupported
from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.report import Report

SIZE, CALLS, LIMIT_US = 64, 100, 10.0


def layers(device: torch.device, dtype: torch.dtype) -> dict[str, tuple[nn.Linear, sk.SparseLinear]]:
    """Return format -> (dense layer, packed one) for the formats that a real kernel runs here."""
    found = {}
    for format in FORMATS:
        if not format.startswith("semi24"):
            continue
        try:
            backend, _ = resolve("auto", WeightSpec(format, SIZE, SIZE, dtype), device)
        except Unsupported:
            continue
        if not backend.is_fallback:
            torch.manual_seed(0)
            dense = nn.Linear(SIZE, SIZE, bias=False, device=device, dtype=dtype).requires_grad_(False)
            dense.weight.mul_(sk.NM(2, 4).project(dense.weight.abs()))
            found[format] = dense, sk.SparseLinear.from_linear(dense, format)
    return found


def bare_call(layer: sk.SparseLinear, x: torch.Tensor) -> Callable[[], Any]:
    """Return a call of the C function behind `layer(x)`, with all arguments made."""
    functions, seen = cpu._functions(), []

    def watched(function: Callable[..., int]) -> Callable[..., int]:
        def call(*arguments: Any) -> int:
            seen.append((function, arguments))
            return function(*arguments)

        return call

    before = dict(functions)
    functions.update({name: watched(function) for name, function in before.items()})
    cpu._spmm24.cache_clear()
    try:
        y = layer(x)
    finally:
        functions.update(before)
        cpu._spmm24.cache_clear()
    ((function, arguments),) = seen
    assert y.data_ptr() in arguments and x.data_ptr() in arguments, "not the product of this call"
    return partial(_call_keeping, (x, y), function, arguments)


def _call_keeping(_tensors: tuple[torch.Tensor, ...], function: Callable[..., int], arguments: tuple[Any, ...]) -> int:
    """Call with addresses of tensors that must live as long."""
    return function(*arguments)


def least_us(calls: dict[str, Callable[[], Any]], rounds: int, device: torch.device) -> dict[str, float]:
    """Return microseconds a call, of the fastest turn of each."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        timeit.timeit(call, number=CALLS)
    for _ in range(rounds):
        for name, call in calls.items():
            if device.type == "cuda":
                torch.cuda.synchronize()  # with an empty queue, which 100 launches do not fill
            times[name].append(timeit.timeit(call, number=CALLS) / CALLS * 1e6)
    return {name: min(found) for name, found in times.items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=400)
    parser.add_argument("--json", type=Path, help="append the rows to this file, not to bench/results")
    options = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device(options.device)
    rows: list[dict[str, Any]] = []
    with torch.no_grad():
        for dtype in (torch.bfloat16, torch.float32) if device.type == "cpu" else (torch.bfloat16,):
            x = torch.randn(1, 1, SIZE, device=device).to(dtype)
            for format, (dense, packed) in layers(device, dtype).items():
                calls: dict[str, Callable[[], Any]] = {
                    "dense_us": partial(dense, x),
                    "packed_us": partial(packed, x),
                }
                if device.type == "cpu":
                    calls["kernel_us"] = bare_call(packed, x)
                times = least_us(calls, options.rounds, device)
                host = times["packed_us"] - times.get("kernel_us", 0.0)
                name = str(dtype).removeprefix("torch.")
                rows.append({"format": format, "dtype": name, "backend": packed.backend, **times, "host_us": host})
    ok = bool(rows) and all(row["host_us"] < LIMIT_US for row in rows)
    Report(f"host time of a call, {SIZE}x{SIZE}, M=1, on {device}", rows, ok=ok).print()
    for row in rows:
        result = {"M": 1, "N": SIZE, "K": SIZE, "rounds": options.rounds, "ok": row["host_us"] < LIMIT_US}
        record("overhead", {**row, **result}, options.json)
    return 0 if ok else 1


if __name__ == "__main__":
    sys.exit(main())
