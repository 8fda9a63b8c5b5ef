"""What the stages of `bench/gpu.sh` share: the machine, its rows of results, a budget of time, and timing.

A stage is one script, run as one process. It prints as it goes, and appends each result to `<gpu>.jsonl` at once, in
$OUT if that is set and else in `bench/results`, so that a run that is cut short loses little. With `--dry-run` a stage
runs whole on the CPU, at a small size and with stand-ins for what needs a GPU: to find a slip before a GPU is at hand.
"""

import argparse
import json
import math
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path
from statistics import median
from typing import Any

import torch

from sparsekit.benchmarking import environment

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"
COLD_BYTES = 200 << 20  # weights that a measurement walks over: more than three times the L2 of any GPU so far
MIN_GRAPH_BYTES = 1 << 30  # a graph reads about this much, so that its start and end do not matter
MAX_CALLS = 160  # in one graph

Call = Callable[[], Any]


@dataclass
class Machine:
    """Where a stage runs, for how long, and where its rows go.

    Attributes:
        device: the GPU, or the CPU in a dry run.
        dry_run: stand-ins and small sizes.
        deadline: of `time.monotonic()`; nothing new is started after it.
    """

    device: torch.device
    dry_run: bool
    deadline: float

    @cached_property
    def facts(self) -> dict[str, Any]:
        """What a reader needs to judge a number."""
        facts = environment(self.device) | {"gpu": self.name, "dry_run": self.dry_run}
        if facts["git_sha"] is None:  # a copy of the tree without .git: whoever sent it knows
            facts["git_sha"] = os.environ.get("COMMIT")
        if self.device.type == "cuda":
            properties = torch.cuda.get_device_properties(self.device)
            facts |= {"sms": properties.multi_processor_count, "l2_mib": properties.L2_cache_size >> 20}
            facts |= {"cusparselt": torch.backends.cusparselt.version()}
        return facts

    @cached_property
    def started(self) -> str:
        """When this process began to record, as rows have it."""
        return datetime.now(UTC).isoformat(timespec="seconds")

    @cached_property
    def name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "dry run"

    @property
    def slug(self) -> str:
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")

    @cached_property
    def out_dir(self) -> Path:
        """Where files go; a dry run leaves nothing in the repository."""
        asked = os.environ.get("OUT")
        path = Path(asked) if asked else Path(tempfile.mkdtemp()) if self.dry_run else RESULTS
        path.mkdir(parents=True, exist_ok=True)
        return path

    def seconds_left(self) -> float:
        return self.deadline - time.monotonic()

    def is_late(self, what: str, needed: float = 0.0) -> bool:
        """Return whether fewer than `needed` seconds are left; if so say that `what` is left out."""
        late = self.seconds_left() < needed
        if late:
            say(f"out of time: {what} left out")
        return late

    def size(self, full: int, small: int) -> int:
        """Return `full`, or `small` in a dry run."""
        return small if self.dry_run else full

    def record(self, benchmark: str, result: Mapping[str, Any]) -> None:
        """Append one row, with the command, hardware, versions and commit."""
        row = {
            "benchmark": benchmark,
            **result,
            "command": shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
            **self.facts,
        }
        with (self.out_dir / f"{self.slug}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=str) + "\n")

    def free_memory(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


def say(text: str) -> None:
    print(text, flush=True)


def open_machine(description: str, parser: argparse.ArgumentParser | None = None) -> tuple[Machine, argparse.Namespace]:
    """Read the command line of a stage and return its machine; exit where there is no GPU to run on."""
    parser = parser or argparse.ArgumentParser()
    parser.description = description
    parser.add_argument("--dry-run", action="store_true", help="on the CPU, small, with stand-ins")
    parser.add_argument("--seconds", type=float, default=540, help="start nothing new after this many")
    options = parser.parse_args()
    deadline = time.monotonic() + options.seconds
    if not options.dry_run:
        if not torch.cuda.is_available():
            sys.exit("no CUDA device is visible to torch: --dry-run tries the script without one")
        torch.cuda.set_device(0)
    machine = Machine(torch.device("cpu" if options.dry_run else "cuda:0"), options.dry_run, deadline)
    assert machine.started  # remembered from here on
    return machine, options


def nvidia_smi() -> str | None:
    """Return driver, clocks, power and temperature as nvidia-smi tells them."""
    query = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.draw,power.limit,temperature.gpu"
    command = ["nvidia-smi", f"--query-gpu={query}", "--format=csv", "-i", "0"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except OSError:
        return None


def capture(calls: Sequence[Call], device: torch.device) -> Call:
    """Return a function that runs all `calls` once, on a GPU as one CUDA graph."""
    if device.type != "cuda":
        return lambda: [call() for call in calls]
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph.replay


def num_copies(num_bytes: int, machine: Machine) -> int:
    """Return how many copies of a weight of `num_bytes` to rotate over, so that none is found in the L2."""
    return 2 if machine.dry_run else max(2, math.ceil(COLD_BYTES / max(num_bytes, 1)))


@dataclass(frozen=True)
class Variant:
    """One thing to time: calls that do the same to copies of a weight.

    Attributes:
        calls: one for each copy.
        num_bytes: that one call must move at least.
    """

    calls: Sequence[Call]
    num_bytes: int


@dataclass(frozen=True)
class Times:
    """Seconds a call, one sample a round."""

    seconds: tuple[float, ...]

    @property
    def median_us(self) -> float:
        return median(self.seconds) * 1e6

    @property
    def min_us(self) -> float:
        return min(self.seconds) * 1e6


def time_turns(variants: Mapping[str, Variant], machine: Machine, rounds: int = 15) -> dict[str, Times]:
    """Return the times of variants that take turns, forwards and backwards, after three untimed rounds.

    One sample is one replay of a CUDA graph of many calls, which walk over the copies: every call reads its weight from
    memory, and no launch is waited for.
    """
    graphs: dict[str, tuple[Call, int]] = {}
    for name, variant in variants.items():
        count = len(variant.calls)
        if not machine.dry_run:
            wanted = min(math.ceil(MIN_GRAPH_BYTES / variant.num_bytes), MAX_CALLS)
            count = max(math.ceil(wanted / count), 1) * count
        calls = [variant.calls[i % len(variant.calls)] for i in range(count)]
        graphs[name] = capture(calls, machine.device), count
    samples: dict[str, list[float]] = {name: [] for name in variants}
    time_call = stopwatch(machine.device)
    for turn in range(machine.size(-3, 0), machine.size(rounds, 1)):
        for name in variants if turn % 2 else reversed(variants):
            run, count = graphs[name]
            seconds = time_call(run) / count
            if turn >= 0:
                samples[name].append(seconds)
    return {name: Times(tuple(values)) for name, values in samples.items()}


def stopwatch(device: torch.device) -> Callable[[Call], float]:
    """Return what measures the seconds of a call: on the device by events, on the CPU by the clock."""
    if device.type != "cuda":
        return _clocked
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    return partial(_by_events, start=start, end=end)


def _clocked(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _by_events(call: Call, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def host_us(call: Call, machine: Machine, repeats: int = 200) -> float:
    """Return the microseconds of host time of one call: the least of five runs, which never wait for the device."""
    best = math.inf
    for _ in range(5):
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(machine.size(repeats, 2)):
            call()
        best = min(best, (time.perf_counter() - started) / machine.size(repeats, 2))
    return best * 1e6


def geometric_mean(values: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))
