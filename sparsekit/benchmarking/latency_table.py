"""What each width of a model costs in milliseconds, on this device and for this batch: a table to plan cuts with.

A block is timed as it runs in the model, on the inputs that it has there, in copies that are really sliced: all of its
widths at the least that they may keep, and each by itself at some larger numbers. What a width adds to the time of the
smallest block is its curve; between the numbers that were measured it is interpolated. Blocks of one shape are measured
once. What remains of the model is timed with its blocks left out, and the blocks' times are scaled so that with it they
make the time of the whole model, which takes turns with all the copies: these, run again and again, may find more in
the caches than blocks do in their places.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from sparsekit.archs import Width, find_blocks
from sparsekit.benchmarking.forward import ROUNDS, as_timed, example_inputs, time_forward
from sparsekit.benchmarking.machine import device_of
from sparsekit.benchmarking.timing import Call, compare, noise_notes
from sparsekit.budgets import Costs
from sparsekit.errors import SparsekitError
from sparsekit.plan import Cut
from sparsekit.shapes import LegalWidths
from sparsekit.slicing import cut_
from sparsekit.snapshot import Snapshot


@dataclass(frozen=True)
class LatencyTable:
    """The milliseconds of one forward, apart for each width.

    Attributes:
        batch_size, length: of the input.
        points: name of a width -> ((units, ms), …), rising: what keeping so many adds to the least that was measured.
        num_units: name of a width -> how many units it has.
        fixed_ms: the model with all widths at the least that was measured.
        notes: sentences about disturbed measurements.
    """

    batch_size: int
    length: int
    points: dict[str, tuple[tuple[int, float], ...]]
    num_units: dict[str, int]
    fixed_ms: float
    notes: tuple[str, ...] = ()

    def costs(self) -> Costs:
        """Return the table as costs in nanoseconds, for budgets in time."""
        curves = {}
        for name, points in self.points.items():
            numbers, times = zip(*points, strict=True)
            curve = np.interp(np.arange(self.num_units[name] + 1), numbers, times)
            curves[name] = np.round(1e6 * curve).astype(np.int64)
        return Costs("ns", curves, round(1e6 * self.fixed_ms))

    def predict(self, num_kept: Mapping[str, int]) -> float:
        """Return the milliseconds of the model where these widths keep so many units, and all others stay whole."""
        costs = self.costs()
        return (costs.of(num_kept) + costs.fixed) / 1e6


@dataclass(frozen=True)
class LatencyCheck:
    """What a table said of a cut, and what came of it.

    Attributes:
        predicted, measured: how many times faster the sliced model is than the dense one.
        dense_ms, sliced_ms: medians of the measurement, in which both took turns.
    """

    predicted: float
    measured: float
    dense_ms: float
    sliced_ms: float

    @property
    def error(self) -> float:
        """How much longer the sliced model takes than was predicted, relative: 0.05 is 5 % longer."""
        return self.predicted / self.measured - 1


def measure_latency(
    model: nn.Module,
    legal: LegalWidths,
    *,
    batch_size: int = 1,
    length: int = 128,
    inputs: Mapping[str, Any] | None = None,
    num_points: int = 8,
    max_seconds: float = 20.0,
) -> LatencyTable:
    """Return the latency table of a model on the device that it is on.

    Args:
        model: dense; it is left as it was.
        legal: what each width may keep; such numbers are measured, and those of now.
        batch_size: sequences, or images, in one forward.
        length: tokens of each; for a decoder, of the prompt.
        inputs: keyword arguments of `forward`, where the model reads neither tokens nor images.
        num_points: how many numbers of units are measured for each width of a block.
        max_seconds: how long timing may take, but for three rounds.

    Raises:
        ValueError: no such input fits the model, or it is not known what the model reads.
        SparsekitError: the measurements contradict one another; other work disturbed them.
    """
    inputs = example_inputs(model, batch_size, length) if inputs is None else inputs
    with as_timed(model):
        shapes = _shapes_of_blocks(model, legal)
        _watch(model, shapes, inputs)
        calls: dict[Any, Call] = {
            "model": lambda: model(**inputs),
            "rest": lambda: _run_rest(model, shapes, inputs),
        }
        for index, shape in enumerate(shapes):
            for place, number in shape.points(num_points):
                calls[index, place, number] = shape.sliced(model, place, number)
        timings = compare(calls, rounds=ROUNDS, max_seconds=max_seconds, device=device_of(model))
    # Medians also where other work disturbs: of short calls the best times are undisturbed ones, of long calls none is.
    milliseconds = {key: 1e3 * timing.median for key, timing in timings.timings.items()}
    notes = tuple(noise_notes([timings.noise]))
    return _table(shapes, milliseconds, batch_size, length, notes)


def check_prediction(
    table: LatencyTable,
    dense: nn.Module,
    sliced: nn.Module,
    num_kept: Mapping[str, int],
    inputs: Mapping[str, Any] | None = None,
) -> LatencyCheck:
    """Return how near a table's prediction comes to the time of the sliced model, both against the dense one.

    Args:
        table: of `dense`.
        dense, sliced: the model before and after the cut.
        num_kept: what the cut left in each width.
        inputs: those that the table was measured with, where they were given.
    """
    timings = time_forward(
        {"dense": dense, "sliced": sliced}, batch_size=table.batch_size, length=table.length, inputs=inputs
    )
    return LatencyCheck(
        table.predict({}) / table.predict(num_kept),
        timings.ratio("dense", "sliced"),
        1e3 * timings["dense"].median,
        1e3 * timings["sliced"].median,
    )


@dataclass
class _BlockShape:
    """Blocks that are made alike, of which one is measured.

    Attributes:
        blocks: their names.
        widths: place in a block -> the widths there, one of each block.
        legal: place in a block -> the numbers of units that any of them may keep, and what they have now; ascending.
        num_runs: how often the blocks run in one forward, in all.
        args, kwargs, output: of the one that is measured.
    """

    blocks: list[str] = field(default_factory=list)
    widths: dict[str, list[Width]] = field(default_factory=dict)
    legal: dict[str, list[int]] = field(default_factory=dict)
    num_runs: int = 0
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)
    output: Any = None

    def points(self, num_points: int) -> list[tuple[str, int]]:
        """Return the (place, number) to measure; the first is the smallest block, with place ""."""
        found = [("", 0)]
        for place, numbers in self.legal.items():
            picked = np.unique(np.linspace(0, len(numbers) - 1, num_points).round().astype(int))
            found += [(place, numbers[index]) for index in picked[1:]]
        return found

    def sliced(self, model: nn.Module, place: str, number: int) -> Callable[[], Any]:
        """Return a call of a copy of the block with so many units in one place, and the least in all others."""
        holder = nn.Module()
        holder.blocks = nn.ModuleList([copy.deepcopy(model.get_submodule(self.blocks[0]))])
        cuts = {}
        for other, (width, *_) in self.widths.items():
            kept = number if other == place else self.legal[other][0]
            cuts[f"blocks.0.{other}"] = Cut(torch.arange(kept), width.num_units, width.kind)
        cut_(holder, cuts, Snapshot(holder))
        block = holder.blocks[0]
        return lambda: block(*self.args, **self.kwargs)


def _shapes_of_blocks(model: nn.Module, legal: LegalWidths) -> list[_BlockShape]:
    """Return the blocks that hold widths, alike ones together."""
    chains = find_blocks(model, [width.name for width in legal.widths])
    shapes: dict[Any, _BlockShape] = {}
    for block in (block for blocks in chains.values() for block in blocks):
        inside = {w.name.removeprefix(f"{block}."): w for w in legal.widths if w.name.startswith(f"{block}.")}
        if not inside:
            continue
        module = model.get_submodule(block)
        sizes = tuple((name, parameter.shape) for name, parameter in module.named_parameters())
        units = tuple((place, width.num_units) for place, width in inside.items())
        shape = shapes.setdefault((type(module), sizes, units), _BlockShape())
        shape.blocks.append(block)
        for place, width in inside.items():
            shape.widths.setdefault(place, []).append(width)
    for shape in shapes.values():
        for place, widths in shape.widths.items():
            numbers = {number for width in widths for number in legal.numbers[width.name]}
            shape.legal[place] = sorted(numbers | {widths[0].num_units})
    return list(shapes.values())


def _watch(model: nn.Module, shapes: Sequence[_BlockShape], inputs: Mapping[str, Any]) -> None:
    """Run the model once, to see what blocks are given, what they give, and how often they run."""

    def keep(shape: _BlockShape) -> Callable[..., None]:
        def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            shape.num_runs += 1
            shape.args, shape.kwargs, shape.output = args, kwargs, output

        return hook

    with ExitStack() as hooks:
        for shape in shapes:
            for block in shape.blocks:
                handle = model.get_submodule(block).register_forward_hook(keep(shape), with_kwargs=True)
                hooks.callback(handle.remove)
        model(**inputs)
    for shape in shapes:
        if not shape.num_runs:
            raise ValueError(f"{shape.blocks[0]} does not run on these inputs: pass inputs= on which it does")


def _run_rest(model: nn.Module, shapes: Sequence[_BlockShape], inputs: Mapping[str, Any]) -> None:
    """Run the model with its blocks left out: each returns what one of its shape did."""
    blocks = [(model.get_submodule(name), shape.output) for shape in shapes for name in shape.blocks]
    before = [block.__dict__.get("forward") for block, _ in blocks]
    try:
        for block, output in blocks:
            block.__dict__["forward"] = lambda *args, output=output, **kwargs: output
        model(**inputs)
    finally:
        for (block, _), forward in zip(blocks, before, strict=True):
            del block.__dict__["forward"]
            if forward is not None:
                block.__dict__["forward"] = forward


def _table(
    shapes: Sequence[_BlockShape],
    milliseconds: Mapping[Any, float],
    batch_size: int,
    length: int,
    notes: tuple[str, ...],
) -> LatencyTable:
    curves: list[dict[str, list[tuple[int, float]]]] = []
    for index, shape in enumerate(shapes):
        least = milliseconds[index, "", 0]
        curves.append({})
        for place, numbers in shape.legal.items():
            measured = [key[2] for key in milliseconds if key[:2] == (index, place)]
            added = [max(milliseconds[index, place, number] - least, 0.0) for number in measured]
            curves[-1][place] = list(zip([numbers[0], *measured], _rising([0.0, *added]), strict=True))
    smallest = sum(shape.num_runs * milliseconds[index, "", 0] for index, shape in enumerate(shapes))
    whole = smallest + sum(
        shape.num_runs * points[-1][1] for shape, own in zip(shapes, curves, strict=True) for points in own.values()
    )
    scale = (milliseconds["model"] - milliseconds["rest"]) / whole
    if scale <= 0:
        raise SparsekitError(
            f"the model took {milliseconds['model']:.3g} ms, and {milliseconds['rest']:.3g} ms without its blocks: "
            "other work disturbs the measurement, so run again when the machine is quiet"
        )
    points, num_units = {}, {}
    for shape, own in zip(shapes, curves, strict=True):
        runs = shape.num_runs / len(shape.blocks)
        for place, widths in shape.widths.items():
            for width in widths:
                points[width.name] = tuple((number, scale * runs * time) for number, time in own[place])
                num_units[width.name] = width.num_units
    return LatencyTable(batch_size, length, points, num_units, milliseconds["rest"] + scale * smallest, notes)


def _rising(values: Sequence[float]) -> list[float]:
    """Return the rising numbers nearest to `values` in squares: what falls is pooled with what it fell from."""
    pools: list[tuple[float, int]] = []
    for value in values:
        pools.append((value, 1))
        while len(pools) > 1 and pools[-2][0] > pools[-1][0]:
            (last, many), (before, few) = pools.pop(), pools.pop()
            pools.append(((last * many + before * few) / (many + few), many + few))
    return [mean for mean, size in pools for _ in range(size)]
