"""Biases for readers that have none, where the model's family knows them: a Llama without becomes one with.

A bias takes over the mean of what went. Stock code loads it only if the config can ask for it (`attention_bias`,
`mlp_bias`), and then asks for one in every layer of that part; those that need none get zeros.
"""

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from sparsekit.archs import Width
from sparsekit.errors import Unsupported
from sparsekit.hf.stock import stock_model
from sparsekit.snapshot import Snapshot
from sparsekit.targets import is_linear, weight_NK

_FLAGS = ("attention_bias", "mlp_bias")
"""Entries of configs that give biases to linear layers."""


def give_biases_(model: nn.Module, widths: Iterable[Width], snapshot: Snapshot) -> list[str]:
    """Give the readers of some widths biases of zero, with all else that the same entry of the config asks for.

    Returns:
        The readers that still have none: no entry of the model's config asks for them.
    """
    readers = [width.name for width in widths]
    config: Any = getattr(model, "config", None)
    for flag in _FLAGS if hasattr(config, "get_text_config") else ():
        if vars(config.get_text_config()).get(flag) is not False:
            continue
        names = _without_bias(model, flag)
        if not any(name in names for name in readers):
            continue
        for name in names:
            layer = model.get_submodule(name)
            weight = layer.get_parameter("weight")
            bias = torch.zeros(len(weight_NK(layer)), dtype=weight.dtype, device=weight.device)
            snapshot.set_parameters_(name, weight, nn.Parameter(bias, weight.requires_grad))
        snapshot.keep_(config.get_text_config(), flag)
        setattr(config.get_text_config(), flag, True)
    return [name for name in readers if getattr(model.get_submodule(name), "bias", None) is None]


def _without_bias(model: nn.Module, flag: str) -> list[str]:
    """Return the linear layers without a bias that would have one if a config's entry were True."""
    config: Any = copy.deepcopy(model.config)
    setattr(config.get_text_config(), flag, True)
    try:
        stock = dict(stock_model(model, config).named_modules())
    except Unsupported:
        return []
    return [
        name
        for name, layer in model.named_modules()
        if is_linear(layer)
        and getattr(layer, "bias", None) is None
        and name in stock
        and getattr(stock[name], "bias", None) is not None
    ]
