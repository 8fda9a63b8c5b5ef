"""What goes through a block: the inputs of its readers, and the sums that their outputs become part of.

A reader (o_proj, down_proj, output.dense) writes to the residual stream, r + y. To bring the whole sum to where that of
the dense model is, and not y alone, makes up for what units removed further down have done to r. Where the sum is found
is not a matter of names: it is the input of a norm that runs after the reader, or what the block returns. Whether it is
r + y one can try: it must move by what y is moved by.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from sparsekit.calibration import Walk
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.calibration.recorder import padding_masks, without_padding
from sparsekit.calibration.samples import Batch
from sparsekit.calibration.walk import Step
from sparsekit.methods.structured.inputs import run

_TOLERANCE = 0.05
"""A sum that moved by what it should up to this share of it did; bfloat16 rounds by a few hundredths at most."""


@dataclass(frozen=True)
class Seen:
    """What one reader did on one batch.

    Attributes:
        inputs: a, [..., K].
        outputs: y, [..., N].
        sums: r + y; y itself where it goes into no sum that could be found.
    """

    inputs: Tensor
    outputs: Tensor
    sums: Tensor


@dataclass(frozen=True)
class Tokens:
    """Which rows of an activation count.

    Attributes:
        masks: attention masks of a batch with padding in it; see `padding_masks`.
        first_only: the first token of each sample alone, which is all that the model's head reads.
    """

    masks: list[Tensor]
    first_only: bool = False

    @classmethod
    def of(cls, batch: Batch, first_only: bool = False) -> "Tokens":
        return cls(padding_masks(batch), first_only)

    def pick(self, x: Tensor) -> Tensor:
        """Return the rows of x [..., K] that count, [M, K]."""
        if self.first_only and x.dim() == 3:
            return x[:, 0]
        return without_padding(x, self.masks)


class Watcher:
    """Looks into one block of a walk.

    Args:
        walk: inside of its `with`.
        step: the block.
        readers: names of the layers to look at.
    """

    def __init__(self, walk: Walk, step: Step, readers: Iterable[str]) -> None:
        self.walk, self.step, self.readers = walk, step, list(readers)
        self.joins = {name: self._find_join(name) for name in self.readers}

    def look(self, index: int, readers: Iterable[str] | None = None) -> tuple[Any, dict[str, Seen]]:
        """Run the block on one batch; return its output, and what some of the readers (or all) did."""
        names = self.readers if readers is None else list(readers)
        inputs: dict[str, Tensor] = {}
        outputs: dict[str, Tensor] = {}
        sums: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            for name in names:
                hooks.enter_context(_before(self._module(name), _keep(inputs, name)))
                # A copy, for some models add the residual to it in place.
                hooks.enter_context(_after(self._module(name), _keep(outputs, name, copy=True)))
                if self.joins[name]:
                    hooks.enter_context(_before(self._module(self.joins[name] or ""), _keep(sums, name)))
            output = self.walk.output_of(self.step.block, index)
        for name in names:
            if self.joins[name] is None:
                sums[name] = outputs[name]
            elif not self.joins[name]:
                sums[name] = first_tensor(output)
        return output, {name: Seen(inputs[name], outputs[name], sums[name]) for name in names}

    def _module(self, name: str) -> nn.Module:
        return self.walk.model.get_submodule(name)

    def _find_join(self, reader: str) -> str | None:
        """Return the norm whose input is the sum, "" for the block's output, None where there is no sum."""
        after: list[str] = []
        has_run = False
        outputs: list[Tensor] = []

        def note_reader(output: Tensor) -> None:
            nonlocal has_run
            has_run = True
            outputs.append(output)

        def note_norm(name: str) -> Callable[[Tensor], None]:
            return lambda x: after.append(name) if has_run and x.shape == outputs[0].shape else None

        block = self._module(self.step.block)
        norms = [f"{self.step.block}.{name}" for name, module in block.named_modules() if _is_norm(module)]
        with ExitStack() as hooks:
            hooks.enter_context(_after(self._module(reader), note_reader))
            for name in norms:
                hooks.enter_context(_before(self._module(name), note_norm(name)))
            self.walk.output_of(self.step.block, 0)
        if not outputs:
            return None
        places = [*dict.fromkeys(after), ""]
        generator = torch.Generator(outputs[0].device).manual_seed(0)
        push = torch.randn(outputs[0].shape, generator=generator, device=outputs[0].device, dtype=torch.float32)
        push = (push * outputs[0].float().std()).to(outputs[0].dtype)
        before, moved = self._at(places, reader, None), self._at(places, reader, push)
        for place in places:
            if place in before and before[place].shape == push.shape:
                change = moved[place].float() - before[place].float()
                if float((change - push.float()).norm()) <= _TOLERANCE * float(push.float().norm()):
                    return place
        return None

    def _at(self, places: list[str], reader: str, push: Tensor | None) -> dict[str, Tensor]:
        """Return what comes to some places when the reader's output is pushed."""
        found: dict[str, Tensor] = {}
        with ExitStack() as hooks:
            if push is not None:
                pushed = self._module(reader).register_forward_hook(lambda module, args, output: output + push)
                hooks.callback(pushed.remove)
            for place in places:
                if place:
                    hooks.enter_context(_before(self._module(place), _keep(found, place)))
            found[""] = first_tensor(self.walk.output_of(self.step.block, 0))
        return found


def first_only_readers(model: nn.Module, readers: Iterable[str], batch: Batch) -> frozenset[str]:
    """Return the readers at which only the first token of a sample has a say in the model's answer.

    There are some where the answer is one for each sample, as in classification; the gradient of the answers tells.
    """
    with as_in_inference(model):
        answer = getattr(run(model, batch), "logits", None)
    if not isinstance(answer, Tensor) or answer.dim() != 2:
        return frozenset()
    pushes: dict[str, Tensor] = {}

    def push(name: str) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            pushes[name] = torch.zeros_like(output, requires_grad=True)
            return output + pushes[name]

        return hook

    with as_in_inference(model), torch.enable_grad(), ExitStack() as hooks:
        for name in readers:
            hooks.callback(model.get_submodule(name).register_forward_hook(push(name)).remove)
        logits: Tensor = run(model, batch).logits
    generator = torch.Generator().manual_seed(0)
    along = torch.randn(logits.shape, generator=generator).to(logits)
    gradients = torch.autograd.grad(logits, list(pushes.values()), along, allow_unused=True)
    return frozenset(
        name
        for name, gradient in zip(pushes, gradients, strict=True)
        if gradient is not None and gradient.dim() == 3 and gradient.shape[1] > 1 and not bool(gradient[:, 1:].any())
    )


def first_tensor(output: Any) -> Tensor:
    """Return the activations out of what a block gives: the first tensor, as the tuples of transformers have it."""
    return next(leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor))


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _keep(found: dict[str, Tensor], name: str, copy: bool = False) -> Callable[[Tensor], None]:
    return lambda x: found.__setitem__(name, x.clone() if copy else x)


@contextmanager
def _before(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show the module's first input to `see` whenever it runs."""
    handle = module.register_forward_pre_hook(
        lambda module, args, kwargs: see(args[0] if args else next(iter(kwargs.values()))), with_kwargs=True
    )
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _after(module: nn.Module, see: Callable[[Tensor], None]) -> Iterator[None]:
    """Show the module's output to `see` whenever it runs."""
    handle = module.register_forward_hook(lambda module, args, output: see(output))
    try:
        yield
    finally:
        handle.remove()
