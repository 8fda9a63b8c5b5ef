"""How much a model's answers suffer when one width shrinks: measured, one width at a time, without labels.

For a few numbers of units, units are removed and the reader refitted as they will be in the end (`removals`), in an
otherwise dense model; the answers on batches that were held back are compared with those of before. Between the numbers
that were tried the logarithm is interpolated. What several widths do together is taken to be the sum: that holds for
small errors, to second order, when they do not depend on each other.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from sparsekit.archs import find_widths
from sparsekit.calibration import Walk
from sparsekit.calibration.samples import Batch
from sparsekit.calibration.walk import Step
from sparsekit.methods.structured.base import Job, Reader
from sparsekit.methods.structured.divergence import Answers
from sparsekit.methods.structured.inputs import check_inputs
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.removal import removals
from sparsekit.methods.structured.watch import Tokens, Watcher, first_only_readers
from sparsekit.progress import progress_bar
from sparsekit.targets import is_conv1d

SHARES = (0.85, 0.65, 0.45, 0.3, 0.15)
"""Of the units of a width, where its curve is measured; and at the least that it keeps."""
_HELD_BACK = 8
"""One batch of so many is not fitted to, and judges, up to `_MOST_JUDGES` tokens; one always does."""
_MOST_JUDGES = 1024
_SMALLEST = 1e-12


def measure_sensitivity(
    model: nn.Module, batches: list[Batch], *, damping: float = 0.01, progress: bool = True
) -> dict[str, Tensor]:
    """Return `sensitivity_curves` of all widths of a dense model, down to one head and eight channels.

    Args:
        model: left as it was.
        batches: unlabelled calibration data, as `load_samples` makes them.
        damping: of the refit.
        progress: show a bar.
    """
    widths = find_widths(model)
    least = {width.name: 1 if width.kind == "heads" else min(8, width.num_units) for width in widths}
    with progress_bar("sensitivity", len(widths), progress) as bar:
        job = Job(model, widths, batches, cast(Any, None), bar)  # without a budget there is nothing to solve
        job.first_only = first_only_readers(model, least, batches[0])
        return sensitivity_curves(job, least, damping)


def sensitivity_curves(job: Job, least: dict[str, int], damping: float) -> dict[str, Tensor]:
    """Return width -> divergence of the answers with n units left, for n = 0 … num_units, float64.

    Args:
        job: what to measure.
        least: width -> units that it keeps at least; below, the curve is not known and goes on as it did.
        damping: of the refit.
    """
    names = {width.name: width for width in job.widths}
    layers = {name: job.model.get_submodule(name) for name in names}
    judging = judging_batches(job.batches)
    fitting = [index for index in range(len(job.batches)) if index not in judging] or judging
    curves: dict[str, Tensor] = {}
    with Walk(job.model, layers, job.batches) as walk:
        answers = Answers()
        for index in judging:
            answers.remember(index, job.batches[index], walk.run(index))
        for step in walk.steps:
            job.bar.advance(0, f"sensitivity of {step}")
            moments, outputs = _moments(job, walk, step, fitting)
            for name, seen in moments.items():
                reader = job.reader(names[name])
                curves[name] = _curve(walk, answers, reader, seen, least[name], damping)
            walk.finish(step, outputs)
            job.bar.advance(len(moments))
    return curves


def judging_batches(batches: Sequence[Batch]) -> list[int]:
    """Return which batches judge, and are not fitted to where there are others."""
    chosen: list[int] = []
    num_tokens = 0
    for index in range(0, len(batches), _HELD_BACK):
        num_tokens += batches[index].get("input_ids", next(iter(batches[index].values()))[:, :1]).numel()
        if chosen and num_tokens > _MOST_JUDGES:
            break
        chosen.append(index)
    return chosen


def _moments(job: Job, walk: Walk, step: Step, fitting: Sequence[int]) -> tuple[dict[str, Moments], list[Any] | None]:
    """Return the moments of the step's readers in the dense model, whose targets are the outputs that it has, and the
    block's outputs."""
    readers = {width.name: job.reader(width) for width in job.widths if width.name in step.layers}
    if not readers:
        return {}, None
    found: dict[str, Moments] = {}
    for name, reader in readers.items():
        N, K = reader.w_NK.shape
        found[name] = Moments(K, N, reader.w_NK.device)
    watcher = Watcher(walk, step, (), dict.fromkeys(readers))
    outputs = []
    for index, batch in enumerate(job.batches):
        output, seen = watcher.look(index, readers)
        outputs.append(output)
        for name, moments in found.items():
            if index in fitting:
                moments.add_inputs(Tokens.of(batch, name in job.first_only).pick(seen[name].inputs))
    for name, moments in found.items():
        check_inputs(name, moments.weight, moments.is_finite())
        moments.aim_at_(readers[name].w_NK, readers[name].bias)
    return found, outputs


def _curve(walk: Walk, answers: Answers, reader: Reader, moments: Moments, least: int, damping: float) -> Tensor:
    num_units, columns = reader.width.num_units, reader.width.columns
    stops = {max(least, round(share * num_units)) for share in SHARES} | {least}
    stops -= {num_units}
    measured = {num_units: 0.0}
    for removal in removals(moments, reader.w_NK, reader.bias, columns, stops, damping):
        weight, bias = removal.reader.weight, removal.reader.bias
        own = reader.layer.get_parameter("weight")
        walk.weights = {f"{reader.width.name}.weight": (weight.T if is_conv1d(reader.layer) else weight).to(own)}
        if bias is not None:
            walk.weights[f"{reader.width.name}.bias"] = bias.to(own)
        total, num = 0.0, 0
        for index in answers.indices:
            divergence, rows = answers.divergence(index, walk.run(index))
            total, num = total + divergence, num + rows
        measured[len(removal.kept)] = total / max(num, 1)
    walk.weights = {}
    return interpolated(measured, num_units)


def interpolated(measured: dict[int, float], num_units: int) -> Tensor:
    """Return a curve [num_units + 1] through what was measured, not rising with the units that are left.

    Between two points the logarithm is linear; towards all units, which cost nothing, the curve itself is. Below the
    fewest it goes on as between the last two.

    Args:
        measured: number of units -> divergence; that of all units is 0.
    """
    known = sorted(measured.items())
    numbers, levels = [n for n, _ in known], [max(level, _SMALLEST) for _, level in known]
    for place in range(len(levels) - 2, -1, -1):  # more units cannot be worse, but for noise
        levels[place] = max(levels[place], levels[place + 1])
    curve = torch.zeros(num_units + 1, dtype=torch.float64)
    for n in range(num_units):
        upper = next(place for place, number in enumerate(numbers) if number > n or number == num_units)
        low, high = max(upper - 1, 0), upper
        if low == high:
            low, high = 0, min(1, len(numbers) - 1)
        if numbers[high] == num_units:
            curve[n] = levels[low] * (num_units - n) / max(num_units - numbers[low], 1)
        else:
            slope = math.log(levels[high] / levels[low]) / (numbers[high] - numbers[low])
            curve[n] = levels[low] * math.exp(slope * (n - numbers[low]))
    return curve
