"""Make a model shorter: how many blocks the budget pays for, which go, and what they are until they are cut out.

Blocks need not cost the same, as where widths went before: then as many go as it takes for the others to be within the
budget, or above it by no more than its tolerance.
"""

from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sparsekit.archs import find_blocks, find_widths
from sparsekit.benchmarking.forward import as_timed, example_inputs
from sparsekit.benchmarking.machine import device_of
from sparsekit.benchmarking.timing import compare
from sparsekit.budgets import Budget, Costs, count_flops
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.samples import Batch
from sparsekit.errors import Unsupported
from sparsekit.methods.structured.depth import Depth, skipped
from sparsekit.methods.structured.inputs import mean_length, run
from sparsekit.methods.structured.watch import first_tensor
from sparsekit.plan import Cut, Plan
from sparsekit.progress import Progress
from sparsekit.snapshot import Snapshot
from sparsekit.targets import is_linear
from sparsekit.width_solver import DEFAULT_LENGTH


def shorten_(
    model: nn.Module,
    config: Depth,
    plan: Plan,
    layers: Mapping[str, nn.Module],
    batches: list[Batch],
    snapshot: Snapshot,
    bar: Progress,
) -> None:
    """Write into the plan which blocks go; what these write to the residual stream becomes zero, where that makes a
    block pass on its input.

    Args:
        layers: the targets; a block with linear layers that are none stays.

    Raises:
        ValueError: the budget pays for no block, or too many would have to stay.
        Unsupported: the model has several lists of blocks, or none.
        NonFiniteError: activations hold NaN or infinity.
    """
    linears = [name for name, module in model.named_modules() if is_linear(module)]
    lists = find_blocks(model, linears)
    if len(lists) != 1:
        raise Unsupported(
            f"method='depth' takes blocks out of one list, and this model has {', '.join(lists) or 'none'}: load the "
            "part that is to be shortened by itself"
        )
    ((name, blocks),) = lists.items()
    others = [linear for linear in linears if linear not in layers]
    staying = [p for p, block in enumerate(blocks) if any(other.startswith(f"{block}.") for other in others)]
    budget, costs = Budget.parse(config.budget), _costs_of_blocks(model, config, blocks, batches)
    prices = [int(costs.curves[block][1]) for block in blocks]
    most = budget.limits(costs)[1]
    if len(set(prices)) > 1:  # by a channel more or less: another whole block is not worth that
        most += int(budget.tolerance * most)
    gone: list[int] = []
    left, num_gone = costs.dense, _fewest(prices, most)
    while left > most:
        if num_gone >= len(blocks):
            nearest = budget.entry(min(prices) if min(prices) > most else left, costs)
            raise ValueError(f"{budget} pays for no block: {nearest} pays for one of {len(blocks)}")
        gone = config.choose(model, blocks, num_gone, batches, bar, staying)
        left = costs.dense - sum(prices[place] for place in gone)
        num_gone += 1
    if not gone:
        return
    kept = torch.tensor([place for place in range(len(blocks)) if place not in gone])
    plan.cuts[name] = Cut(kept, len(blocks), "layers")
    plan.notes.append(f"{len(kept)} of {len(blocks)} blocks are left; without {', '.join(map(str, gone))}")
    plan.notes.append(budget.met(left, costs))
    alive = [blocks[place] for place in gone if not silence_(model, blocks[place], batches[0], snapshot)]
    if alive:
        plan.notes.append(
            f"{alive[0]} cannot pass on its input by zeros in its weights: it stays as it is until apply_ takes it out"
        )


def _fewest(prices: list[int], most: int) -> int:
    """Return how many blocks must go at the least for the others to cost no more than `most`."""
    left, num = sum(prices), 0
    for price in sorted(prices, reverse=True):
        if left <= most:
            break
        left, num = left - price, num + 1
    return num


def _costs_of_blocks(model: nn.Module, config: Depth, blocks: list[str], batches: list[Batch]) -> Costs:
    """Return what each block costs, in the measure of the budget; the time of all is dealt out by their parameters."""
    measure = Budget.parse(config.budget).measure
    prices = [sum(parameter.numel() for parameter in model.get_submodule(block).parameters()) for block in blocks]
    fixed = sum(parameter.numel() for parameter in model.parameters()) - sum(prices)
    if measure == "flops":
        widths = find_widths(model)
        length = config.length or mean_length(model, widths[0].name, batches) or DEFAULT_LENGTH
        curves = count_flops(model, widths, length).curves
        prices = [sum(int(c[-1]) for name, c in curves.items() if name.startswith(f"{block}.")) for block in blocks]
        fixed = 0
    elif measure == "ns":
        total, fixed = _time_of_blocks(model, config, blocks, batches)
        prices = [total * price // max(sum(prices), 1) for price in prices]
    return Costs(measure, {b: np.array([0, price], np.int64) for b, price in zip(blocks, prices, strict=True)}, fixed)


def _time_of_blocks(model: nn.Module, config: Depth, blocks: list[str], batches: list[Batch]) -> tuple[int, int]:
    """Return the nanoseconds of a model's blocks, and those of the rest."""
    length = config.length or mean_length(model, blocks[0], batches) or DEFAULT_LENGTH
    inputs = example_inputs(model, config.batch, round(length))
    examples: dict[str, Any] = {}

    def rest() -> None:
        with ExitStack() as stack:
            for block in blocks:
                stack.enter_context(skipped(model.get_submodule(block), examples[block]))
            model(**inputs)

    with as_timed(model):
        with ExitStack() as hooks:
            for block in blocks:
                keep = partial(_keep_output, examples, block)
                hooks.callback(model.get_submodule(block).register_forward_hook(keep).remove)
            model(**inputs)
        timings = compare({"model": lambda: model(**inputs), "rest": rest}, device=device_of(model)).timings
    whole, fixed = (round(1e9 * timings[name].median) for name in ("model", "rest"))
    return max(whole - fixed, len(blocks)), fixed


def _keep_output(found: dict[str, Any], name: str, module: nn.Module, args: Any, output: Any) -> None:
    found[name] = output


@torch.no_grad()
def silence_(model: nn.Module, block: str, batch: Batch, snapshot: Snapshot) -> bool:
    """Write zeros into what a block adds to the residual stream; return whether it passes on its input then.

    If it does not, as where norms come after the sums, it is left as it was.
    """
    try:
        readers = [width.name for width in find_widths(model) if width.name.startswith(f"{block}.")]
    except Unsupported:
        return False
    own = {name: list(model.get_submodule(name).parameters(recurse=False)) for name in readers}
    before = {name: [each.detach().clone() for each in parameters] for name, parameters in own.items()}
    for name, parameters in own.items():
        snapshot.remember(name)
        for parameter in parameters:
            parameter.zero_()
    states: list[Tensor] = []
    with as_in_inference(model), ExitStack() as hooks:
        module = model.get_submodule(block)
        note_input = module.register_forward_pre_hook(
            lambda module, args, kwargs: states.append(first_tensor((args, kwargs))), with_kwargs=True
        )
        hooks.callback(note_input.remove)
        hooks.callback(module.register_forward_hook(lambda m, args, output: states.append(first_tensor(output))).remove)
        run(model, batch)
    passes_on = torch.equal(states[0], states[1])
    if not passes_on:
        for name, parameters in own.items():
            for parameter, old in zip(parameters, before[name], strict=True):
                parameter.copy_(old)
    return passes_on
