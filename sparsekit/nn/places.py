"""Plain layers, and the places of layers in a model."""

import torch
import torch.nn as nn

_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wraps, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def replace_layer_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name`, with the hooks of the one that stood there."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent.get_submodule(attribute)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))  # the same dict, so that the handles still remove them
    parent._modules[attribute] = new


def plain_layer(weight: nn.Parameter, bias: nn.Parameter | None, source: str) -> nn.Module:
    """Return a dense layer.

    Args:
        weight: [N, K]; the very parameter of an `nn.Linear`, a turned copy of it in a `Conv1D`.
        bias: [N]; a `Conv1D` always has one, zeros if need be.
        source: "Linear" or "Conv1D".
    """
    N, K = weight.shape
    layer: nn.Module
    if source == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            layer = Conv1D(N, K)
        weight = nn.Parameter(weight.detach().t().contiguous(), weight.requires_grad)
        bias = nn.Parameter(weight.new_zeros(N)) if bias is None else bias
    else:
        layer = nn.Linear(K, N, bias=False, device="meta")
    layer.weight = weight
    layer.register_parameter("bias", bias)
    return layer
