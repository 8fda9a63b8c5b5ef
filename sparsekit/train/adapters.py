"""LoRA through peft, as pruning trains it: put on, and at the end merged into the weights or kept as side branches."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from sparsekit.plan import Plan

ADAPTER = "default"
"""Name of the adapter that `add_lora` makes."""


class LoraArguments(Protocol):
    """What `add_lora` reads of a config.

    Attributes:
        lora_rank: r.
        lora_alpha: what the branch adds is multiplied by lora_alpha / lora_rank.
        lora_targets: "all-linear" for all linear layers inside blocks, or entries as of `targets` (a name, its last
            segment, "re:…"), as ["q_proj", "v_proj"], also one string with commas.
        seed: of the factors' first values.
    """

    lora_rank: int
    lora_alpha: float
    lora_targets: str | Sequence[str]
    seed: int


def add_lora(model: nn.Module, args: LoraArguments) -> Any:
    """Return a `PeftModel` around the model, whose LoRA alone trains, in fp32; it adds nothing yet.

    Raises:
        ValueError: the model has adapters already or is quantised or packed, or an argument does not fit it.
        Unsupported: peft is not installed.
    """
    raise NotImplementedError


def merge_(model: Any) -> nn.Module:
    """Return the model that `add_lora` got, the same object, with the LoRA in its weights: summed in fp32, rounded once.

    Its parameters are the same objects, and require a gradient where they did before.

    Raises:
        ValueError: this is no model with LoRA.
        NonFiniteError: the LoRA holds NaN or infinity. Nothing was changed.
    """
    raise NotImplementedError


def as_side_(model: Any, plan: Plan) -> nn.Module:
    """Return the model that `add_lora` got, the same object, with the LoRA as side branches (`SideLinear`).

    Shapes stay full; `apply_(model, plan)` cuts weights and branches alike. Columns of what the plan cuts are zeroed in
    the weight and in the branch of the layer that reads them.

    Raises:
        ValueError: this is no model with LoRA, or the plan is of another one.
        NonFiniteError: the LoRA holds NaN or infinity. Nothing was changed.
    """
    raise NotImplementedError
