"""Masks on a model: hooks that multiply what its units give, without a change to any weight.

A unit is masked once, where it is read: the inputs of the layer that reads heads or channels are multiplied, so that a
fractional mask could be folded into its columns. Masks of the residual stream multiply all that is written to it, and
norms go on counting all of its dimensions. The mask m of a layer with input x and output f(x) makes it
x + m (f(x) - x), so that a closed one is as good as gone, whatever biases and norms are in it.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.archs import Width
from sparsekit.methods.structured.slicegpt import Stream
from sparsekit.registry import unknown
from sparsekit.train.gates import Gates, Masks


class Masked:
    """Hooks on a model that read `masks` whenever it runs.

    Put them on after adapters: they then sit on the adapter's layer, and what it adds is masked, too. With gradient
    checkpointing (non-reentrant) a forward is run again in the backward pass, and must see the masks that it saw: set
    others only when that is over.

    Args:
        model: plain, or a `PeftModel`; names are those of the plain model in either.
        widths: heads and channels that may be masked.
        stream: who writes to the residual stream, if its dimensions may be masked.
        layers: list of blocks -> names of its blocks, if layers may be masked.
    """

    def __init__(
        self,
        model: nn.Module,
        widths: Sequence[Width],
        *,
        stream: Stream | None = None,
        layers: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        unwrap: Any = getattr(model, "get_base_model", None)
        plain: nn.Module = model if unwrap is None else unwrap()
        self._masks: Masks | None = None
        self._sizes = {width.name: width.num_units for width in widths}
        self._hooks = []
        for width in widths:
            reader = plain.get_submodule(width.name)
            self._hooks.append(reader.register_forward_pre_hook(partial(self._read, width.name, width.columns)))
        if stream is not None:
            embedding = plain.get_submodule(stream.embedding)
            self._sizes[stream.embedding] = embedding.get_parameter("weight").shape[1]
            for writer in (embedding, *map(plain.get_submodule, stream.writers)):
                self._hooks.append(writer.register_forward_hook(partial(self._written, stream.embedding)))
        for name, blocks in (layers or {}).items():
            self._sizes[name] = len(blocks)
            for index, block in enumerate(map(plain.get_submodule, blocks)):
                hook = partial(self._passed, name, index)
                self._hooks.append(block.register_forward_hook(hook, with_kwargs=True))

    @classmethod
    def of(cls, model: nn.Module, gates: Gates) -> "Masked":
        """Return hooks for all that has gates."""
        return cls(model, gates.widths, stream=gates.stream, layers=gates.layers)

    @property
    def masks(self) -> Masks | None:
        """What units are multiplied by; a part that is missing is open, and None is the model as it is, bit for bit.

        Of any dtype, also boolean, and on any device. They are replaced, never changed in place. Setting them raises
        ValueError where a name is unknown or a size is another.
        """
        return self._masks

    @masks.setter
    def masks(self, masks: Masks | None) -> None:
        for name, mask in (masks or {}).items():
            if name not in self._sizes:
                raise ValueError(unknown("part with masks", name, list(self._sizes)))
            if mask.shape != (self._sizes[name],):
                raise ValueError(f"the mask of {name} must be [{self._sizes[name]}], got {tuple(mask.shape)}")
        self._masks = masks

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        for hook in self._hooks:
            hook.remove()

    def _mask(self, name: str, like: Tensor) -> Tensor | None:
        """Return the mask of a part in the dtype and on the device of `like`."""
        mask = (self._masks or {}).get(name)
        return None if mask is None else mask.to(like.device, like.dtype)

    def _read(self, name: str, columns: int, reader: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if (mask := self._mask(name, args[0])) is None:
            return None
        return (args[0] * mask.repeat_interleave(columns), *args[1:])

    def _written(self, name: str, writer: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        mask = self._mask(name, output)
        return None if mask is None else output * mask

    def _passed(
        self, name: str, index: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> Any:
        after: Tensor = output[0] if isinstance(output, tuple) else output
        if (mask := self._mask(name, after)) is None:
            return None
        before: Tensor = args[0] if args else kwargs["hidden_states"]
        mixed = torch.lerp(before.to(after.dtype), after, mask[index])
        return (mixed, *output[1:]) if isinstance(output, tuple) else mixed


def leaves_of(masks: Masks) -> Masks:
    """Return copies of masks that gather their own gradients, for a draw that several forwards and backwards share.

    The graph of `masks` is used once, when `pass_gradients_` takes the gradients on; so one draw can serve all
    micro-batches of a step.
    """
    return {name: mask.detach().requires_grad_() for name, mask in masks.items()}


def pass_gradients_(masks: Masks, leaves: Masks) -> None:
    """Take the gradients that `leaves` have gathered on to what `masks` were made of; once for each draw."""
    reached = [name for name, leaf in leaves.items() if leaf.grad is not None]
    torch.autograd.backward([masks[name] for name in reached], [leaves[name].grad for name in reached])
