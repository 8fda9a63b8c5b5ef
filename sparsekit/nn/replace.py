"""Put packed layers in the places of dense ones, and dense ones back."""

import warnings
from dataclasses import replace

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.backends import BACKENDS, resolve
from sparsekit.formats import FORMATS
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
            f"{len(slow)} packed layers run on {layer.backend!r}, which is right but much slower than dense, as "
            f"{name}: {why}. {_remedy(layer)}",
            stacklevel=3,
        )


def _remedy(layer: SparseLinear) -> str:
    """What to change so that a layer on the reference runs fast: its format where that is at fault, else its dtype."""
    device = next(iter(layer.prepared)).device
    usable = [
        name
        for name in FORMATS
        if name != layer.format
        and name.startswith("semi24")
        and layer.format.startswith("semi24")
        and not resolve("auto", replace(layer.spec, format=name), device)[0].is_fallback
    ]
    if usable:
        return f"On this machine {' and '.join(usable)} run fast in {str(layer.spec.dtype).removeprefix('torch.')}"
    if device.type == "cpu" and layer.spec.dtype == torch.float16:
        return "Convert it, as with model.to(torch.bfloat16), or keep it dense: CPUs are slow in float16"
    return "Mend that, or keep the model dense"


def replace_layer_(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` in the place of the module `name`, with the hooks of the one that stood there."""
    parent_name, _, attribute = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    old = parent.get_submodule(attribute)
    for hooks in _HOOKS:
        setattr(new, hooks, getattr(old, hooks))  # the same dict, so that the handles still remove them
    parent._modules[attribute] = new


def remember_grid_(layer: nn.Module, format: str, scales: Tensor) -> None:
    """Note on a dense layer that its weight lies on a grid: `format` on `scales`; `grid_of` reads it."""
    vars(layer)["_sparsekit_grid"] = (format, scales.detach())


def grid_of(layer: nn.Module, w_NK: Tensor) -> tuple[str, Tensor] | None:
    """Return (format, scales) if the layer's weight still lies where `remember_grid_` found it, else None.

    Packing to this format on these scales loses nothing.
    """
    found: tuple[str, Tensor] | None = vars(layer).get("_sparsekit_grid")
    if found is None:
        return None
    format, scales = found
    kind = FORMATS.get(format)
    if kind.count_violations(w_NK)[0]:
        return None
    scales = scales.to(w_NK.device)
    try:
        on_grid = kind.unpack(kind.pack(w_NK, scales))
    except ValueError:  # of another shape: the layer has been resized since
        return None
    return (format, scales) if torch.equal(on_grid, w_NK) else None


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
    if not FORMATS.get(layer.format).lossless:
        remember_grid_(dense, layer.format, layer.packed().tensors["scales"].clone())
    return dense.train(layer.training)
