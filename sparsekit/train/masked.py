"""Masks on a model: hooks that multiply what its units give, without a change to any weight.

A unit is masked once, where it is read: the inputs of the layer that reads heads or channels are multiplied, so that a
fractional mask could be folded into its columns. Masks of the residual stream multiply all that is written to it, and
norms go on counting all of its dimensions. The mask m of a layer, with input x and output f(x), makes it x + m (f(x) - x),
so that a closed one is as good as gone, whatever biases and norms are in it.
"""

from collections.abc import Mapping, Sequence

from torch import nn

from sparsekit.archs import Width
from sparsekit.methods.structured.slicegpt import Stream
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
        raise NotImplementedError

    @classmethod
    def of(cls, model: nn.Module, gates: Gates) -> "Masked":
        """Return hooks for all that has gates."""
        return cls(model, gates.widths, stream=gates.stream, layers=gates.layers)

    @property
    def masks(self) -> Masks | None:
        """What units are multiplied by; a part that is missing is open, and None is the model as it is, bit for bit.

        Of any dtype, also boolean; on the model's device, or the CPU. They are replaced, never changed in place.
        Setting them raises ValueError where a name is unknown or a size is another.
        """
        raise NotImplementedError

    @masks.setter
    def masks(self, masks: Masks | None) -> None:
        raise NotImplementedError

    def remove(self) -> None:
        """Take the hooks off; the model is as it was."""
        raise NotImplementedError


def leaves_of(masks: Masks) -> Masks:
    """Return copies of masks that gather their own gradients, for a draw that several forwards and backwards share.

    The graph of `masks` is used once, when `pass_gradients_` takes the gradients on; so one draw can serve all
    micro-batches of a step.
    """
    raise NotImplementedError


def pass_gradients_(masks: Masks, leaves: Masks) -> None:
    """Take the gradients of `leaves` on to what `masks` were made of; on all processes alike, if they are averaged
    there first."""
    raise NotImplementedError
