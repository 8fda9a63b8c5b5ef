"""Write on a transformers model what is packed in it, so that `save_pretrained` stores it and stock code sees it.

Nothing here imports transformers, or does anything to a model that is not one of its own.
"""

import sys
from typing import Any

import torch.nn as nn

from sparsekit.formats import FORMATS
from sparsekit.hf import QUANT_METHOD
from sparsekit.nn import SparseLinear, sparse_layers


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


def layout_version(layers: dict[str, dict[str, Any]], branches: dict[str, dict[str, Any]] | None = None) -> int:
    """Return the version that a reader of layers so described must know, see `LAYOUT_VERSION`."""
    return 3 if branches else 2 if any("side" in described for described in layers.values()) else 1


def describe_packed_(model: nn.Module) -> None:
    """Set the quantizer and its config on every transformers model that holds packed layers, wrapped ones included."""
    for owner in _outermost_pretrained(model):
        layers = sparse_layers(owner)
        if not layers:
            forget_packed_(owner)
            continue
        from sparsekit.hf.quantizer import SparsekitConfig, SparsekitQuantizer

        described = describe_layers(layers)
        config = SparsekitConfig(described, layout_version(described))
        owner.config.quantization_config = config
        owner.hf_quantizer = SparsekitQuantizer(config, pre_quantized=True)
        owner.quantization_method = QUANT_METHOD
        owner.is_quantized = True


def _outermost_pretrained(model: nn.Module) -> list[Any]:
    """Return the model itself, or those inside a wrapper (peft's, a compiler's) that no other one holds."""
    if is_pretrained(model):
        return [model]
    return [owner for child in model.children() for owner in _outermost_pretrained(child)]


def forget_packed_(model: nn.Module) -> None:
    """Undo `describe_packed_`; a model that another quantizer described is left alone."""
    if not is_pretrained(model):
        return
    from sparsekit.hf.quantizer import SparsekitQuantizer

    quantizer = getattr(model, "hf_quantizer", None)
    if isinstance(quantizer, SparsekitQuantizer):
        quantizer.remove_quantization_config(model)
        for module in model.modules():
            if is_pretrained(module) and hasattr(module.config, "_is_quantized"):
                del module.config._is_quantized
