"""Put packed layers in the places of dense ones, and dense ones back."""

import warnings
from dataclasses import replace

import torch
import torch.nn as nn
from sparsekit_kernels.quant import GRIDS
from torch import Tensor

from sparsekit.backends import BACKENDS, resolve
from sparsekit.formats import FORMATS
from sparsekit.nn.places import plain_layer
from sparsekit.nn.side import SideLinear
from sparsekit.nn.side_columns import pack_with_side
from sparsekit.nn.sparse_linear import SparseLinear


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Return qualified name -> packed layer."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SparseLinear)}


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


def remember_grid_(layer: nn.Module, format: str, scales: Tensor) -> None:
    """Note on a dense layer that its weight lies on a grid: `format` on `scales`; `grid_of` reads it."""
    vars(layer)["_sparsekit_grid"] = (format, scales.detach())


def grid_of(layer: nn.Module, w_NK: Tensor) -> tuple[str, Tensor] | None:
    """Return (format, scales) if the layer's weight still lies where `remember_grid_` found it, else None.

    Packing to this format on these scales loses nothing; of a layer with a side branch, nothing of the branch either
    if that lies on the grid, too, and else nothing of the weight.
    """
    found: tuple[str, Tensor] | None = vars(layer).get("_sparsekit_grid")
    if found is None:
        return None
    format, scales = found
    kind = FORMATS.get(format)
    if kind.count_violations(w_NK)[0]:
        return None
    scales = scales.to(w_NK.device)
    own = scales[:, : GRIDS[format].num_scales(w_NK.shape[1])] if scales.dim() == 2 else scales
    try:
        on_grid = kind.unpack(kind.pack(w_NK, own))
        if not torch.equal(on_grid, w_NK):
            return None
        if not isinstance(layer, SideLinear):
            return format, own
        packed, columns, beside = pack_with_side(kind, w_NK, layer.branch, scales)
    except ValueError:  # of another shape: the layer has been resized since
        return None
    _, S = columns.split(kind.unpack(packed), beside["side_scale"])
    return format, scales if torch.equal(S, layer.side_S) else own


def dense_layer(layer: SparseLinear) -> nn.Module:
    """Return the dense layer that a packed one stands for: `nn.Linear`, `SideLinear`, or `Conv1D`, whose weight is
    transposed."""
    weight = nn.Parameter(layer.to_dense(), requires_grad=layer.dense_requires_grad)
    branch = layer.side_branch()
    if branch is None:
        dense = plain_layer(weight, layer.bias, layer.source)
    else:
        dense = SideLinear.from_linear(plain_layer(weight, layer.bias, "Linear"), branch, layer.source)
    if not FORMATS.get(layer.format).lossless:
        remember_grid_(dense, layer.format, layer.packed().tensors["scales"].clone())
    return dense.train(layer.training)
