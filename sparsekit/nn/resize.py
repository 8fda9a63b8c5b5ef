"""Other sizes for layers that stand in a model, in place: hooks, and whoever holds the layer, notice nothing."""

from typing import Any

import torch.nn as nn

SIZES = (
    "num_heads",
    "num_attention_heads",
    "n_heads",
    "n_head",
    "num_key_value_heads",
    "num_kv_heads",
    "n_kv_heads",
    "all_head_size",
    "split_size",
    "intermediate_size",
)
"""Names under which attentions and MLPs of transformers keep what must agree with the sizes of their layers."""


def linear_size(layer: nn.Module) -> tuple[int, int] | None:
    """Return (out_features, in_features) of a linear layer, dense or packed; None for other modules."""
    names = ("nf", "nx") if hasattr(layer, "nf") else ("out_features", "in_features")
    N, K = (getattr(layer, name, None) for name in names)
    return (N, K) if isinstance(N, int) and isinstance(K, int) else None


def set_parameters_(layer: Any, weight: nn.Parameter, bias: nn.Parameter | None) -> None:
    """Give a layer another weight and bias, of any sizes; an `nn.Linear` or a `Conv1D` then says so.

    Args:
        layer: a dense linear layer, or another with no parameters but these.
        weight: as the layer stores it: [N, K], and [K, N] in a `Conv1D`.
        bias: [N] or None.
    """
    layer.register_parameter("weight", weight)
    if bias is not None or "bias" in layer._parameters:
        layer.register_parameter("bias", bias)
    if hasattr(layer, "nf"):
        layer.nx, layer.nf = weight.shape
    elif isinstance(layer, nn.Linear):
        layer.out_features, layer.in_features = weight.shape


def resize_(layer: nn.Module, out_features: int, in_features: int) -> None:
    """Give a dense linear layer parameters of these sizes, their memory as it comes, for a loader to fill."""
    weight, bias = layer.get_parameter("weight"), layer._parameters.get("bias")
    shape = (in_features, out_features) if hasattr(layer, "nf") else (out_features, in_features)
    new_bias = None if bias is None else nn.Parameter(bias.detach().new_empty(out_features))
    set_parameters_(layer, nn.Parameter(weight.detach().new_empty(shape)), new_bias)
