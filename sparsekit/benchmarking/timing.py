"""Timing that can be trusted: variants take turns, warm up first, and weights come from memory.

Two variants timed one after the other see different machines (clocks drift, neighbours come and go); taking turns,
they see the same one. A weight that stays in the cache between two calls is read faster than it ever is inside a
model, so on a GPU the L2 is overwritten before each call, and on a CPU the caller rotates over several copies
(`rotate`). Time is read from CUDA events on a GPU and from `perf_counter` elsewhere.
"""

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import Any

import torch

Call = Callable[[], Any]


@dataclass(frozen=True)
class Timing:
    """The times of one variant, one a round, in seconds."""

    seconds: tuple[float, ...]

    @property
    def min(self) -> float:
        return min(self.seconds)

    @property
    def median(self) -> float:
        return median(self.seconds)

    @property
    def p20(self) -> float:
        return self._fifths()[0]

    @property
    def p80(self) -> float:
        return self._fifths()[3]

    def _fifths(self) -> list[float]:
        return quantiles(self.seconds, n=5, method="inclusive") if len(self.seconds) > 1 else [self.seconds[0]] * 4

    def to_dict(self) -> dict[str, float]:
        """Return minimum, median and quantiles, in seconds, and the number of rounds."""
        return {
            "min_s": self.min,
            "median_s": self.median,
            "p20_s": self.p20,
            "p80_s": self.p80,
            "rounds": len(self.seconds),
        }


@dataclass(frozen=True)
class Comparison:
    """The timings of variants that took turns."""

    timings: dict[str, Timing]

    def __getitem__(self, name: str) -> Timing:
        return self.timings[name]

    def ratio(self, base: str, other: str) -> float:
        """Return how many times faster `other` is than `base`: the ratio of their medians."""
        return self.timings[base].median / self.timings[other].median

    @property
    def noise(self) -> float:
        """How far the medians are from the best times, at worst: about 1.0 on a quiet machine."""
        return max(timing.median / timing.min for timing in self.timings.values())


def compare(
    calls: Mapping[str, Call],
    *,
    rounds: int = 20,
    warmup: int = 2,
    max_seconds: float | None = None,
    device: torch.device | str = "cpu",
) -> Comparison:
    """Return the timings of `calls`, which take turns; every second round runs in the opposite order.

    Args:
        calls: name -> what to time.
        rounds: timed calls of each variant.
        warmup: untimed calls of each variant, at least one.
        max_seconds: stop after the round that passes this, with three rounds at least.
        device: where the calls run; "cuda" times on the GPU with a cold L2.
    """
    if not calls:
        raise ValueError("nothing to time: pass at least one named call")
    if rounds < 1 or warmup < 1:
        raise ValueError(f"rounds={rounds}, warmup={warmup}: both must be at least 1")
    time_call = _cuda_timer(torch.device(device)) if torch.device(device).type == "cuda" else _cpu_time
    for _ in range(warmup):
        for call in calls.values():
            call()
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    started = time.perf_counter()
    for done in range(rounds):
        late = max_seconds is not None and time.perf_counter() - started > max_seconds
        if late and done >= 3:
            break
        for name in order if done % 2 == 0 else reversed(order):
            samples[name].append(time_call(calls[name]))
    return Comparison({name: Timing(tuple(values)) for name, values in samples.items()})


def time_pair(dense: Call, sparse: Call, **options: Any) -> Comparison:
    """Return `compare` of two calls under the names "dense" and "sparse"."""
    return compare({"dense": dense, "sparse": sparse}, **options)


def rotate(calls: Sequence[Call]) -> Call:
    """Return a call that runs the next of `calls` each time, round and round."""
    if not calls:
        raise ValueError("nothing to rotate over: pass at least one call")
    turns = itertools.cycle(calls)
    return lambda: next(turns)()


NOISY = 1.5
"""Medians this many times the best time mean that something else used the machine."""


def noise_notes(noises: Sequence[float]) -> list[str]:
    """Return a warning for readers where some measurement was disturbed."""
    disturbed = sum(noise > NOISY for noise in noises)
    if not disturbed:
        return []
    return [
        f"{disturbed} of {len(noises)} measurements were disturbed: medians up to {max(noises):.1f} times the best; "
        "other work runs on this machine, so run again when it is quiet"
    ]


def _cpu_time(call: Call) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _cuda_timer(device: torch.device) -> Callable[[Call], float]:
    """Return a timer whose calls find nothing of theirs in the L2.

    Overwriting the L2 takes longer than launching the call from Python, so launch cost is hidden, as in a CUDA graph.
    """
    size = max(4 * torch.cuda.get_device_properties(device).L2_cache_size, 256 << 20)
    scratch = torch.empty(size, dtype=torch.int8, device=device)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def time_call(call: Call) -> float:
        with torch.cuda.device(device):
            scratch.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) / 1e3

    return time_call


def synchronize(device: torch.device | str) -> None:
    """Wait until `device` has finished what it was given."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
