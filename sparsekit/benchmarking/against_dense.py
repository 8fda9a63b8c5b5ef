"""A model that was made smaller against the one that it came from, at several batch sizes."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from sparsekit.archs import max_positions
from sparsekit.benchmarking.forward import example_inputs
from sparsekit.benchmarking.machine import device_of, environment
from sparsekit.benchmarking.models import _phases, _run_rounds, is_causal, verdict
from sparsekit.benchmarking.timing import NOISY, noise_notes
from sparsekit.report import Report

BATCH_SIZES = (1, 8, 32)
LONGEST_SECONDS = 10.0
"""A batch size is left out where one pass of the dense model would take longer."""


def against_dense(
    dense: nn.Module,
    smaller: nn.Module,
    *,
    batch_sizes: Sequence[int] = BATCH_SIZES,
    length: int = 128,
    new_tokens: int = 32,
    rounds: int = 5,
    progress: bool = True,
) -> Report:
    """Return how fast a smaller model is here, against the dense one; both take turns on the same inputs.

    Args:
        dense, smaller: models that read the same, tokens or images, on one device. They answer differently, since
            parts of one are gone.
        batch_sizes: sequences, or images, at a time; one after the other.
        length: tokens of each; of a decoder's prompt. Fewer where the model has fewer positions.
        new_tokens: decoding steps of a decoder.
        rounds: passes of each side, more where they are short.
        progress: show bars.
    Returns:
        A row for each phase at each batch size; the summary has the verdict, "stay dense" where nothing is won.
    Raises:
        ValueError: a size is out of range, or it is not known what the models read.
    """
    sizes = sorted(set(batch_sizes))
    if not sizes or min(*sizes, length, rounds) < 1 or new_tokens < 0:
        raise ValueError(f"{batch_sizes=}, {length=}, {rounds=}, {new_tokens=}: numbers of at least 1")
    report = Report("dense against smaller on this machine", summary={"verdict": ""})
    device, limit = device_of(smaller), max_positions(smaller)
    has_tokens = getattr(smaller, "main_input_name", "") != "pixel_values"
    if limit is not None and has_tokens:
        new_tokens = min(new_tokens, limit // 4) if is_causal(smaller) else 0
        length = min(length, limit - new_tokens)
    speedups, best, noises, last = dict[str, float](), dict[str, float](), list[float](), 0.0
    was_training = {model: model.training for model in (dense, smaller)}
    try:
        for model in was_training:
            model.eval()
        for index, batch_size in enumerate(sizes):
            if index and last * batch_size / sizes[index - 1] > LONGEST_SECONDS:
                report.notes.append(f"batch {batch_size} and more: not timed, for one pass takes too long here")
                break
            inputs = None if has_tokens else example_inputs(smaller, batch_size, length)
            phases = _phases(smaller, batch_size, length, new_tokens, inputs)
            found = _run_rounds({"dense": dense, "smaller": smaller}, phases, rounds, device, progress)
            last = sum(timings["dense"].median for timings in found.values())
            noises += [timings.noise for timings in found.values()]
            for phase, timings in found.items():
                steps = new_tokens if phase == "decode" else 1
                row: dict[str, Any] = {"what": phase, "batch": batch_size}
                row |= {f"{side} ms": 1e3 * timing.median / steps for side, timing in timings.timings.items()}
                row["speedup"] = round(timings.ratio("dense", "smaller"), 3)
                report.rows.append(row)
                name = f"{phase} at batch {batch_size}"
                speedups[name] = timings.ratio("dense", "smaller")
                best[name] = timings["dense"].min / timings["smaller"].min
    finally:
        for model, training in was_training.items():
            model.train(training)
    report.numbers["speedup"] = speedups
    report.numbers["noise"] = dict(zip(speedups, noises, strict=True))
    report.notes += noise_notes(noises)
    reason = _reason(dense, smaller)
    report.summary["verdict"] = verdict(speedups, reason)
    if max(noises) > NOISY:
        by_best = verdict(best, reason)
        report.summary["verdict"] = f"disturbed by other work, run again; by the best times alone: {by_best}"
    if has_tokens:
        report.summary["tokens"] = f"{length}" + (f", and {new_tokens} decoded" if is_causal(smaller) else "")
    facts = environment(device)
    names = (facts["gpu"] or facts["cpu"], f"{facts['threads']} threads", f"torch {torch.__version__}")
    report.summary["machine"] = ", ".join(map(str, names))
    return report


def _reason(dense: nn.Module, smaller: nn.Module) -> str:
    """Say why less work may take no less time."""
    share = _numbers(smaller) / max(_numbers(dense), 1)
    return f"{share:.0%} of the parameters are left, and what else a pass costs here weighs more"


def _numbers(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
