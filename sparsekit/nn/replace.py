"""Put packed layers in the places of dense ones, and dense ones back."""

import warnings

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.backends import BACKENDS
from sparsekit.nn.sparse_linear import SparseLinear

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


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Return qualified name -> packed layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the module that `torch.compile` wraps, or the module itself."""
    inner = getattr(model, "_orig_mod", model)
    assert isinstance(inner, nn.Module)
    return inner


def warn_of_fallbacks(model: nn.Module) -> None:
    """Warn, once for all layers, where `auto` found nothing faster than decompressing at each call."""
    slow = {
        name: layer
        for name, layer in sparse_layers(model).items()
        if layer.requested_backend == "auto" and layer.backend and BACKENDS.get(layer.backend).is_fallback
    }
    if slow:
        name, layer = next(iter(slow.items()))
        why = "; ".join(f"{backend}: {reason}" for backend, reason in layer.reasons.items())
        warnings.warn(
            f"{len(slow)} packed layers run on {layer.backend!r}, which is right but slower than dense, as {name}: "
            f"{why}. Mend that, convert the model (bfloat16 and float32 run fast on CPUs), or keep it dense",
            stacklevel=3,
        )


def replace_layer_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name`, with the hooks of the one that stood there."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent.get_submodule(attribute)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))  # the same dict, so that the handles still remove them
    parent._modules[attribute] = new


def dense_layer(layer: SparseLinear, w_NK: Tensor | None = None) -> nn.Module:
    """Return the dense layer that a packed one stands for: `nn.Linear`, or `Conv1D` with its transposed weight."""
    weight = layer.to_dense() if w_NK is None else w_NK
    dense: nn.Module
    if layer.source == "Conv1D":
        from transformers.pytorch_utils import Conv1D

        with torch.device("meta"):
            dense = Conv1D(layer.out_features, layer.in_features)
        weight = weight.t().contiguous()
    else:
        dense = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None, device="meta")
    dense.weight = nn.Parameter(weight, requires_grad=layer.dense_requires_grad)
    if layer.bias is not None:
        dense.bias = layer.bias
    elif layer.source == "Conv1D":
        dense.bias = nn.Parameter(weight.new_zeros(layer.out_features))
    return dense.train(layer.training)
