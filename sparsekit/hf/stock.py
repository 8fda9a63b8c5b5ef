"""What the class of a model makes of a config: whoever loads the checkpoint without us starts from that.

A model whose sizes its config can say needs no mark; stock code, and every engine that reads the config, loads it. So
after a cut the model is held against an empty one, built of the config on the meta device.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn as nn

from sparsekit.errors import Unsupported
from sparsekit.nn import SIZES, linear_size


def stock_model(model: Any, config: Any) -> nn.Module:
    """Return an empty model of the same class, as it would be made of `config` after a trip through JSON.

    Args:
        model: a `PreTrainedModel`.
        config: one for its class.
    Raises:
        Unsupported: the class refuses the config, in its own words.
    """
    from transformers.initialization import no_init_weights

    described = config.to_dict()
    described.pop("quantization_config", None)
    try:
        with torch.device("meta"), no_init_weights():
            stock: nn.Module = type(model)(type(config).from_dict(described))
    except Exception as error:
        # Configs and models raise what they like at values that do not go together.
        reason = " ".join(str(error).split())
        raise Unsupported(f"{type(model).__name__} cannot be made of its config: {reason}") from error
    return stock


def sizes_beside(model: nn.Module, stock: nn.Module) -> tuple[dict[str, list[int]], dict[str, dict[str, int]]]:
    """Return where the sizes of a model are not those of `stock`.

    Returns:
        Layer -> [out_features, in_features], and module -> {attribute: value} of those in `SIZES`, as in `model`.
    Raises:
        Unsupported: a layer or a bias of the one is missing in the other, or a parameter that is no linear layer's has
            another shape: no list of sizes turns the one into the other.
    """
    ours, theirs = dict(model.named_modules()), dict(stock.named_modules())
    widths: dict[str, list[int]] = {}
    sizes: dict[str, dict[str, int]] = {}
    for name in ours.keys() & theirs.keys():
        mine, plain = linear_size(ours[name]), linear_size(theirs[name])
        if mine is not None and plain is not None:
            if mine != plain:
                widths[name] = list(mine)
            if (getattr(ours[name], "bias", None) is None) != (getattr(theirs[name], "bias", None) is None):
                raise Unsupported(f"{name} has a bias in the model or in one made of the config, and not in the other")
            continue
        for key, parameter in theirs[name].named_parameters(recurse=False):
            found = ours[name]._parameters.get(key)
            if found is None or found.shape != parameter.shape:
                raise Unsupported(
                    f"{name}.{key} is {None if found is None else tuple(found.shape)}, and {tuple(parameter.shape)} in "
                    "a model made of the config: only linear layers may have other sizes"
                )
        differing = {
            key: value
            for key in SIZES
            if isinstance(value := getattr(ours[name], key, None), int) and value != getattr(theirs[name], key, value)
        }
        if differing:
            sizes[name] = differing
    absent = [name for name, module in theirs.items() if name not in ours and linear_size(module) is not None]
    if missing := [name for name in absent if not _left_out(ours, name)]:
        raise Unsupported(f"a model made of the config has {missing[0]}, which this model has not")
    return dict(sorted(widths.items())), dict(sorted(sizes.items()))


def _left_out(modules: Mapping[str, nn.Module], name: str) -> bool:
    """Return whether a model was made without a part, as with `add_pooling_layer=False`: its place is there, as None.

    The config knows nothing of that; who loads the checkpoint says it again, dense or not.
    """
    parent, _, last = name.rpartition(".")
    if parent in modules:
        return getattr(modules[parent], last, name) is None
    return _left_out(modules, parent)


def config_of(model: nn.Module, name: str) -> Any:
    """Return the config of the module that is nearest around `name`."""
    found = getattr(model, "config", None)
    for segment in name.split("."):
        model = model.get_submodule(segment)
        found = getattr(model, "config", None) or found
    return found


def names_in(config: Any, names: tuple[str, ...]) -> list[str]:
    """Return those of the names that a config has, as it stores them."""
    aliases: dict[str, str] = getattr(type(config), "attribute_map", {})
    stored = [aliases.get(name, name) for name in names]
    return [name for name in dict.fromkeys(stored) if name in vars(config)]


def changed(whole: Any, part: Any, changes: Mapping[str, Any]) -> Any:
    """Return a copy of a config with changes in that part of it which `part` is."""
    copies: dict[int, Any] = {}
    copied = copy.deepcopy(whole, copies)
    if id(part) not in copies:
        raise Unsupported("the config of the layers is no part of the model's")
    for key, value in changes.items():
        setattr(copies[id(part)], key, value)
    return copied
