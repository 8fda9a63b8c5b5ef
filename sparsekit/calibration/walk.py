"""Through a model one block at a time, in the order in which it runs.

A layer should be calibrated on what it will see once everything before it is pruned, and only one block's statistics
fit in memory. So each block is run twice over all samples: once to gather statistics, once, pruned, for the inputs of
the next. Blocks that are done are not run again: while a later one is visited they return the last output that was
kept, and all else (embeddings, masks, positions, whatever a model does between its blocks) is the model's own forward.
A dry run first checks that this gives every block its true input; where it does not, as with skips over blocks, whole
forwards are run instead, which is slower and as right.

Layers outside of any block form steps of their own, at the place where the model runs them.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from sparsekit.archs import find_blocks
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.recorder import Recorder
from sparsekit.calibration.samples import INPUT, Batch
from sparsekit.calibration.statistics import Statistics
from sparsekit.errors import NonFiniteError, Unsupported


@dataclass
class Step:
    """One stop of the walk.

    Attributes:
        block: name of the block, or "" for layers outside of blocks.
        chain: name of the list that the block is in.
        layers: qualified name -> layer to prune here; empty for a block that is only passed through.
    """

    block: str = ""
    chain: str = ""
    layers: dict[str, nn.Module] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.block or ", ".join(list(self.layers)[:2]) + ("…" if len(self.layers) > 2 else "")


class Stop(BaseException):
    """Ends a forward that has shown all it has to."""


class Walk:
    """Visits the steps of a model; use as `with Walk(model, layers, batches) as walk: for step in walk.steps: …`.

    Inside the `with`, the model is in eval mode, without cache and gradients; afterwards it is as it was.

    Args:
        model: any `nn.Module`.
        layers: the layers to gather statistics for, by qualified name.
        batches: what to run.

    Attributes:
        steps: in the order in which the model runs them.
        weights: parameters and buffers to run with in place of the model's own, by qualified name.
        calls: how often each layer and block ran in the dry run, by name.
        replays: whether blocks that are done stand in for themselves; if not, they run again each time.
    """

    def __init__(self, model: nn.Module, layers: dict[str, nn.Module], batches: list[Batch]) -> None:
        self.model, self.layers, self.batches = model, layers, batches
        self.steps: list[Step] = []
        self.weights: dict[str, Tensor] = {}
        self.calls: Counter[str] = Counter()
        self.replays = False
        self._done: list[Step] = []
        self._outputs: dict[str, list[Any]] = {}
        self._stack = ExitStack()
        first = next(model.parameters(), None)
        self._device = first.device if first is not None else torch.device("cpu")

    def __enter__(self) -> "Walk":
        self._stack.enter_context(as_in_inference(self.model))
        try:
            self.steps = self._plan_steps()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._outputs.clear()
        self._stack.close()

    def measure(self, step: Step, kind: type[Statistics]) -> dict[str, Statistics | None]:
        """Return the statistics of the step's layers, None for a layer that saw no token.

        Layers that are fed the same tensor share one object.

        Raises:
            NonFiniteError: a layer was fed NaN or infinity.
        """
        found = self._record(step, kind, share=True)
        gathered = found if found is not None else self._record(step, kind, share=False)
        assert gathered is not None
        for name, statistics in gathered.items():
            if statistics is not None and not statistics.is_finite():
                raise NonFiniteError(
                    f"the inputs of {name} hold NaN or infinity on the calibration data: check the model's weights, "
                    "and that its dtype can hold its activations (bfloat16 where float16 overflows)"
                )
        return gathered

    def finish(self, step: Step, outputs: list[Any] | None = None) -> None:
        """Run the step, as it is now, for the inputs of what follows; or take its outputs where they are known."""
        if step is self.steps[-1] or not step.block:
            return
        if self.replays and outputs is not None:
            self._outputs[step.chain] = outputs
        elif self.replays:
            latest = self._outputs.setdefault(step.chain, [None] * len(self.batches))
            for index in range(len(self.batches)):
                latest[index] = self.output_of(step.block, index)
        self._done.append(step)

    def output_of(self, name: str, index: int) -> Any:
        """Return what the block or layer `name` gives on one batch, as it is now, at its first call.

        Nothing after it is run. Gradients flow where they are enabled.
        """
        kept: list[Any] = []

        def keep(module: nn.Module, args: Any, output: Any) -> None:
            kept.append(output)
            raise Stop

        handle = self.model.get_submodule(name).register_forward_hook(keep)
        try:
            self.run(index)
        finally:
            handle.remove()
        return kept[0]

    @contextmanager
    def unchanged(self, step: Step, names: list[str], remedy: str = "permute=False") -> Iterator[None]:
        """Check that the body, which rewrites the step's layers, leaves the outputs of some of them as they were.

        Args:
            remedy: what to ask for where such layers must stay as they are.

        Raises:
            Unsupported: it did not, on the first batch.
        """
        before = self._outputs_of(step, names)
        yield
        for name, after in self._outputs_of(step, names).items():
            error = float((after - before[name]).norm() / before[name].norm().clamp_min(1e-30))
            if not error <= 0.1:  # rounding makes 0.02 in bfloat16, another order of what should be in one more than 1
                raise Unsupported(
                    f"{name} gave another output (by {error:.0%}) after its inputs and what produces them were put "
                    "into another order, or scaled, so this model computes it otherwise than its names suggest: use "
                    f"{remedy}"
                )

    def _outputs_of(self, step: Step, names: list[str]) -> dict[str, Tensor]:
        """Return the fp32 outputs of some of the step's layers on the first batch; of their last call each."""
        outputs: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                outputs[name] = output.float().clone()

            return hook

        with ExitStack() as hooks:
            for name in names:
                hooks.callback(self.model.get_submodule(name).register_forward_hook(keep(name)).remove)
            if step.block:
                hooks.callback(self.model.get_submodule(step.block).register_forward_hook(_stop).remove)
            if names:
                self.run(0)
        return outputs

    def _record(self, step: Step, kind: type[Statistics], share: bool) -> dict[str, Statistics | None] | None:
        recorder = Recorder(step.layers, kind, self._device, share)
        with recorder, ExitStack() as hooks:
            if step.block:
                hooks.callback(self.model.get_submodule(step.block).register_forward_hook(_stop).remove)
            for index in range(len(self.batches)):
                recorder.begin(self.batches[index])
                self.run(index)
        return recorder.result()

    def run(self, index: int) -> Any:
        """Run one batch, with the blocks that are done standing in for themselves, until a hook raises `Stop`.

        Returns:
            What the model gives; None if it was stopped.
        """
        batch = {key: value.to(self._device) for key, value in self.batches[index].items()}
        args = (batch.pop(INPUT),) if INPUT in batch else ()
        with ExitStack() as stack:
            if self.replays:
                for step in self._done:
                    output = self._outputs[step.chain][index]
                    stack.enter_context(_replaced(self.model.get_submodule(step.block), output))
            try:
                # Of a module that stands in two places, tie_weights=True would leave the replaced tensor behind.
                return functional_call(self.model, self.weights, args, batch, tie_weights=False)
            except Stop:
                return None

    def _plan_steps(self) -> list[Step]:
        """Run one batch to see what comes when; each block that runs just once is a step."""
        chains = find_blocks(self.model, self.layers)
        chain_of = {block: chain for chain, blocks in chains.items() for block in blocks}
        calls = self.calls
        inputs: dict[str, list[Tensor]] = {}
        outputs: dict[str, Any] = {}

        def before(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
                calls[name] += 1
                if name in chain_of:
                    inputs[name] = _tensors((args, kwargs))

            return hook

        def after(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                outputs[name] = output

            return hook

        with ExitStack() as hooks:
            for name in [*chain_of, *self.layers]:
                module = self.model.get_submodule(name)
                hooks.callback(module.register_forward_pre_hook(before(name), with_kwargs=True).remove)
                if name in chain_of:
                    hooks.callback(module.register_forward_hook(after(name)).remove)
            self.run(0)
        blocks = {name for name in chain_of if calls[name] == 1}
        steps = self._steps_in_order(list(calls), blocks, chain_of)
        self.replays = self._replay_holds([step for step in steps if step.block], inputs, outputs)
        return steps

    def _steps_in_order(self, order: list[str], blocks: set[str], chain_of: dict[str, str]) -> list[Step]:
        home = {name: next((block for block in blocks if name.startswith(f"{block}.")), "") for name in self.layers}
        steps: list[Step] = []
        for name in order:
            if name in blocks:
                inside = {layer: module for layer, module in self.layers.items() if home[layer] == name}
                steps.append(Step(name, chain_of[name], inside))
            elif name in self.layers and not home[name]:
                if not steps or steps[-1].block:
                    steps.append(Step())
                steps[-1].layers[name] = self.layers[name]
        placed = {name for step in steps for name in step.layers}
        if lost := {name: module for name, module in self.layers.items() if name not in placed}:
            steps.append(Step(layers=lost))  # never run by this batch; perhaps by another
        while not steps[-1].layers:
            steps.pop()
        return steps

    def _replay_holds(self, steps: list[Step], inputs: dict[str, list[Tensor]], outputs: dict[str, Any]) -> bool:
        """Return whether each block gets its true input when those before it only return the last output."""
        for position, step in enumerate(steps):
            latest = {done.chain: outputs[done.block] for done in steps[:position]}
            seen: list[Tensor] = []

            def look(module: nn.Module, args: Any, kwargs: Any, seen: list[Tensor] = seen) -> None:
                seen.extend(_tensors((args, kwargs)))
                raise Stop

            with ExitStack() as stack:
                for done in steps[:position]:
                    stack.enter_context(_replaced(self.model.get_submodule(done.block), latest[done.chain]))
                block = self.model.get_submodule(step.block)
                stack.callback(block.register_forward_pre_hook(look, with_kwargs=True).remove)
                self.run(0)
            true = inputs[step.block]
            if len(true) != len(seen) or not all(map(torch.equal, true, seen)):
                return False
        return True


def _stop(module: nn.Module, args: Any, output: Any) -> None:
    raise Stop


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


@contextmanager
def _replaced(block: nn.Module, output: Any) -> Iterator[None]:
    """Let the block return a copy of `output` (a copy, for some models add to it in place)."""

    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return pytree.tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, output)

    before = block.__dict__.get("forward")
    block.__dict__["forward"] = stand_in
    try:
        yield
    finally:
        if before is None:
            del block.__dict__["forward"]
        else:
            block.__dict__["forward"] = before
