"""Write on a transformers model what is packed in it, and what is cut, so that `save_pretrained` stores it and stock
code sees it.

Nothing here imports transformers, or does anything to a model that is not one of its own.
"""

import sys
from typing import Any

import torch.nn as nn

from sparsekit.formats import FORMATS
from sparsekit.hf import QUANT_METHOD
from sparsekit.nn import SparseLinear, side_layers, sparse_layers


def is_pretrained(model: nn.Module) -> bool:
    """Return whether `model` is a transformers `PreTrainedModel`."""
    modeling = sys.modules.get("transformers.modeling_utils")
    return modeling is not None and isinstance(model, modeling.PreTrainedModel)


def describe_layers(layers: dict[str, SparseLinear]) -> dict[str, dict[str, Any]]:
    """Return name -> {format, shape, source, bias, …}, what a loader needs to build the empty layers.

    Of a layer with a side branch also {side: {rank, group, has_X}}; `shape` is always that of the weight alone.
    """
    return {
        name: {
            "format": layer.format,
            "shape": [layer.out_features, layer.in_features],
            "source": layer.source,
            "bias": layer.bias is not None,
            **FORMATS.get(layer.format).details(layer.spec),
            **({} if layer.side is None else {"side": layer.side.to_dict()}),
        }
        for name, layer in layers.items()
    }


def layout_version(
    layers: dict[str, dict[str, Any]],
    widths: dict[str, list[int]] | None = None,
    branches: dict[str, dict[str, Any]] | None = None,
) -> int:
    """Return the version that a reader of what is so described must know, see `LAYOUT_VERSION`."""
    return 3 if widths or branches else 2 if any("side" in described for described in layers.values()) else 1


def widths_of(model: nn.Module) -> dict[str, list[int]]:
    """Return name -> [out_features, in_features] of the layers whose sizes a model's config cannot say."""
    return dict(getattr(_own_config(model), "widths", {}))


def mark_of_widths(model: nn.Module) -> Any:
    """Return the config that says only what is cut in a model, for its dense form; None where nothing need be said."""
    own = _own_config(model)
    return None if own is None else own.of_widths_alone()


def who_opens(model: nn.Module) -> str:
    """Return, in a sentence, what it takes to open a checkpoint of a transformers model."""
    needs = [f"{len(layers)} layers are packed"] if (layers := sparse_layers(model)) else []
    if branches := side_layers(model):
        needs.append(f"{len(branches)} layers have a side branch")
    if widths := widths_of(model):
        needs.append(f"{len(widths)} layers have sizes that its config cannot say, as {next(iter(widths))}")
    if needs:
        reasons = " and ".join(filter(None, (", ".join(needs[:-1]), needs[-1])))
        return f"opened by transformers after `import sparsekit`, and by sparsekit.load: {reasons}"
    return "opened by transformers, and by engines that read its config, without sparsekit: the config says all sizes"


def describe_packed_(model: nn.Module) -> None:
    """Set the quantizer and its config on every transformers model that holds packed layers, wrapped ones included.

    What the config says of widths stays.
    """
    for owner in outermost_pretrained(model).values():
        layers = sparse_layers(owner)
        if not layers:
            forget_packed_(owner)
            continue
        from sparsekit.hf.quantizer import SparsekitConfig, SparsekitQuantizer

        described, old = describe_layers(layers), _own_config(owner)
        widths, sizes = (old.widths, old.sizes) if old else ({}, {})
        config = SparsekitConfig(described, layout_version(described, widths), widths=widths, sizes=sizes)
        owner.config.quantization_config = config
        owner.hf_quantizer = SparsekitQuantizer(config, pre_quantized=True)
        owner.quantization_method = QUANT_METHOD
        owner.is_quantized = True


def describe_widths_(model: Any, widths: dict[str, list[int]], sizes: dict[str, dict[str, int]]) -> None:
    """Write into the config of a transformers model which of its layers have sizes that the config cannot say.

    A model without packed layers remains an ordinary one, that can be cast and trained: it gets no quantizer, and
    `save_pretrained` stores the mark with the config all the same.

    Args:
        model: a `PreTrainedModel`.
        widths: layer -> [out_features, in_features]; empty where the config says it all.
        sizes: module -> attributes that must agree with its layers, as {"num_heads": 3}.
    """
    from sparsekit.hf.quantizer import SparsekitConfig

    if _own_config(model) is not None:
        del model.config.quantization_config
    if widths:
        model.config.quantization_config = SparsekitConfig({}, 3, widths=widths, sizes=sizes)
    describe_packed_(model)


def outermost_pretrained(model: nn.Module, name: str = "") -> dict[str, Any]:
    """Return name -> the model itself, or those inside a wrapper (peft's, a compiler's) that no other one holds."""
    if is_pretrained(model):
        return {name: model}
    found: dict[str, Any] = {}
    for attribute, child in model.named_children():
        found |= outermost_pretrained(child, f"{name}.{attribute}" if name else attribute)
    return found


def forget_packed_(model: nn.Module) -> None:
    """Undo `describe_packed_`, but for widths; a model that another quantizer described is left alone."""
    if not is_pretrained(model):
        return
    from sparsekit.hf.quantizer import SparsekitQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SparsekitQuantizer):
        mark = mark_of_widths(model)
        quantizer.remove_quantization_config(model)
        if mark is not None:
            model.config.quantization_config = mark  # type: ignore[union-attr]
        for module in model.modules():
            if is_pretrained(module) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized


def _own_config(model: Any) -> Any:
    """Return the `SparsekitConfig` of a model, or None."""
    found = getattr(getattr(model, "config", None), "quantization_config", None)
    return found if getattr(found, "quant_method", None) == QUANT_METHOD else None
