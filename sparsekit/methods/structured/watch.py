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
from sparsekit.calibration.walk import Step, Stop
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


class _Sight:
    """What hooks have brought of one reader so far."""

    def __init__(self) -> None:
        self.found: dict[str, Tensor] = {}
        self.has_sum = True

    def see(self, what: str) -> Callable[[Tensor], None]:
        """Return what keeps a tensor; of outputs a copy, for some models add the residual to them in place."""
        return lambda x: self.found.__setitem__(what, x.clone() if what == "outputs" else x)

    def seen(self, block_output: Tensor | None) -> Seen:
        outputs = self.found["outputs"]
        sums = self.found.get("sums", block_output) if self.has_sum else outputs
        assert sums is not None
        # Some models run their MLPs on [tokens, features], and their sums on [samples, tokens, features].
        return Seen(self.found["inputs"], outputs, sums.view_as(outputs))


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
            mask = next((mask for mask in self.masks if mask.shape == x.shape[:2]), None)
            return x[:, 0] if mask is None else x[:, 0][mask[:, 0].to(x.device)]
        return without_padding(x, self.masks)


class Watcher:
    """Looks into one block of a walk.

    Args:
        walk: inside of its `with`.
        step: the block.
        readers: names of the layers to look at.
        joins: reader -> where its sum is, as far as it has been found; what is found here is added. The norm whose
            input is the sum, "" for the block's output, None where there is no sum.
    """

    def __init__(self, walk: Walk, step: Step, readers: Iterable[str], joins: dict[str, str | None]) -> None:
        self.walk, self.step, self.joins = walk, step, joins
        for name in readers:
            if name not in joins:
                joins[name] = self._find_join(name)

    def look(self, index: int, readers: Iterable[str]) -> tuple[Any, dict[str, Seen]]:
        """Run the block on one batch; return its output, and what some of the readers did."""
        seen = {name: _Sight() for name in readers}
        with ExitStack() as hooks:
            self._watch(seen, hooks)
            output = self.walk.output_of(self.step.block, index)
        return output, {name: sight.seen(first_tensor(output)) for name, sight in seen.items()}

    def glance(self, index: int, reader: str) -> Seen:
        """Return what one of the readers did on one batch; what comes after its sum is not run."""
        sight = _Sight()
        with ExitStack() as hooks:
            self._watch({reader: sight}, hooks)
            if join := self.joins[reader]:
                hooks.enter_context(_before(self._module(join), _stop))
            elif join is None:
                hooks.enter_context(_after(self._module(reader), _stop))
            else:
                return sight.seen(first_tensor(self.walk.output_of(self.step.block, index)))
            self.walk.run(index)
        return sight.seen(None)

    def _watch(self, seen: dict[str, "_Sight"], hooks: ExitStack) -> None:
        for name, sight in seen.items():
            hooks.enter_context(_before(self._module(name), sight.see("inputs")))
            hooks.enter_context(_after(self._module(name), sight.see("outputs")))
            join = self.joins[name]
            if join:
                hooks.enter_context(_before(self._module(join), sight.see("sums")))
            sight.has_sum = join is not None

    def _module(self, name: str) -> nn.Module:
        return self.walk.model.get_submodule(name)

    def _find_join(self, reader: str) -> str | None:
        after: list[str] = []
        has_run = False
        outputs: list[Tensor] = []

        def note_reader(output: Tensor) -> None:
            nonlocal has_run
            has_run = True
            outputs.append(output)

        def note_norm(name: str) -> Callable[[Tensor], None]:
            return lambda x: after.append(name) if has_run and _is_like(x, outputs[0]) else None

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
            if place in before and _is_like(before[place], push):
                change = moved[place].float() - before[place].float()
                if float((change.view_as(push) - push.float()).norm()) <= _TOLERANCE * float(push.float().norm()):
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


def _is_like(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same tokens and features, in rows or in samples."""
    return x.shape[-1] == y.shape[-1] and x.numel() == y.numel()


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _keep(found: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    return lambda x: found.__setitem__(name, x)


def _stop(x: Tensor) -> None:
    raise Stop


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
