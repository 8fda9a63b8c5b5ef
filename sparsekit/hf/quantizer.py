"""The transformers quantizer behind `from_pretrained` of a checkpoint that is packed, or cut unevenly.

Only the methods that are the same in transformers 5.17 to 5.23 are overridden.

A packed checkpoint opened *without* sparsekit must fail. transformers only warns of an unknown `quant_method` and
would go on with random weights, so the checkpoint also carries one empty tensor under the name of a dense weight: its
shape fits nothing, and stock transformers refuses to load it. Layers that are cut have shapes that do not fit anyway.
"""

from typing import Any, NoReturn

import torch
import torch.nn as nn
from torch import Tensor
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsekit.errors import CheckpointError, Unsupported
from sparsekit.formats import FORMATS, LAYOUT_VERSION
from sparsekit.hf import QUANT_METHOD
from sparsekit.hf.branches import StoredBranch, describe_branches, install_stored_, with_stored_names
from sparsekit.hf.describe import describe_layers, forget_packed_
from sparsekit.nn import (
    SIZES,
    SparseLinear,
    dense_layer,
    linear_size,
    replace_layer_,
    resize_,
    side_layers,
    sparse_layers,
    warn_of_fallbacks,
)
from sparsekit.nn.side_columns import SideColumns
from sparsekit.registry import unknown


@register_quantization_config(QUANT_METHOD)
class SparsekitConfig(QuantizationConfigMixin):
    """What `config.json` says of a packed checkpoint.

    Args:
        layers: qualified name -> {format, shape, source, bias, and what else the format asks for}.
        layout_version: of the canonical layouts; a later one than this package knows is refused. The default is
            that of layers without a side branch.
        backend: who shall run the layers; not stored.
        widths: qualified name -> [out_features, in_features] of the layers whose sizes the rest of the config cannot
            say.
        sizes: qualified name of a module -> attributes that must agree with them, as {"num_heads": 3}.
        branches: qualified name -> {shape, source, bias, side}, of layers with a side branch that are not packed.
    """

    def __init__(
        self,
        layers: dict[str, dict[str, Any]] | None = None,
        layout_version: int = 1,
        backend: str = "auto",
        widths: dict[str, list[int]] | None = None,
        sizes: dict[str, dict[str, int]] | None = None,
        branches: dict[str, dict[str, Any]] | None = None,
        **kwargs: Any,
    ) -> None:
        self.quant_method: Any = QUANT_METHOD  # transformers' own enum cannot be extended
        self.layers = layers or {}
        self.layout_version = layout_version
        self.backend = backend
        self.widths = widths or {}
        self.sizes = sizes or {}
        self.branches = branches or {}

    def to_dict(self) -> dict[str, Any]:
        described = {"quant_method": QUANT_METHOD, "layout_version": self.layout_version, "layers": self.layers}
        described |= {"widths": self.widths, "sizes": self.sizes} if self.widths else {}
        return described | ({"branches": self.branches} if self.branches else {})

    def of_widths_alone(self) -> "SparsekitConfig | None":
        """Return what is to be said of the model without packed layers; None where that is nothing."""
        return SparsekitConfig({}, 3, widths=self.widths, sizes=self.sizes) if self.widths else None


@register_quantizer(QUANT_METHOD)
class SparsekitQuantizer(HfQuantizer):
    """Gives layers their sizes, and swaps the named ones for empty ones, before loading; prepares them after.

    Attributes:
        state_dict: what to save in place of the model's own, which may be sharded.
    """

    requires_calibration = True
    quantization_config: SparsekitConfig
    state_dict: dict[str, Tensor] | None = None

    def __init__(self, quantization_config: SparsekitConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        if not isinstance(quantization_config.layout_version, int):
            raise CheckpointError(
                f"config.json gives layout_version {quantization_config.layout_version!r}, which is no number: it was "
                "altered, fetch the checkpoint again"
            )
        if quantization_config.layout_version > LAYOUT_VERSION:
            raise CheckpointError(
                f"the checkpoint has layout version {quantization_config.layout_version}, this sparsekit reads up to "
                f"{LAYOUT_VERSION}: upgrade sparsekit"
            )
        if quantization_config.widths or quantization_config.sizes:
            check_widths(quantization_config.widths, quantization_config.sizes)
        if quantization_config.layers or quantization_config.branches or not quantization_config.widths:
            check_described(quantization_config.layers, quantization_config.branches)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        config = self.quantization_config
        if config.widths:
            config.widths, config.sizes = resize_layers_(model, config.widths, config.sizes)
        if not config.layers | config.branches:
            return model
        tripwire = tripwire_name(config.layers | config.branches)
        if config.layers:
            config.layers = swap_in_empty_(model, config.layers, config.backend)
        if config.branches:
            config.branches = swap_in_stored_(model, config.branches)
        # Else transformers would draw, and throw away, a random weight for each.
        for name in config.layers | config.branches:
            model.get_submodule(name)._is_hf_initialized = True
        ignored = set(getattr(model, "_keys_to_ignore_on_load_unexpected", None) or [])
        model._keys_to_ignore_on_load_unexpected = ignored | {tripwire.replace(".", r"\.")}
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        layers, branches = self.quantization_config.layers, self.quantization_config.branches
        if self.quantization_config.widths:
            refuse_other_sizes(model)
        refuse_missing(model, layers | branches)
        prepare_layers_(model, layers)
        install_stored_(model, branches)
        if not layers:  # nothing is quantised, and the model can be cast, and trained, as any other
            forget_packed_(model)
        return model

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
        # Layers may have been renamed since they were described, as adapters do.
        config = self.quantization_config
        config.layers = describe_layers(sparse_layers(model)) or config.layers
        branches = describe_branches(side_layers(model))
        own = model.state_dict() if self.state_dict is None else self.state_dict
        state_dict = with_stored_names(own, branches)
        state_dict[tripwire_name(config.layers | branches)] = torch.empty(0)
        version = config.layout_version
        return state_dict, {"sparsekit": f"packed, layout version {version}: import sparsekit before loading"}

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        for name, layer in sparse_layers(model).items():
            replace_layer_(model, name, dense_layer(layer))
        return model if dtype is None else model.to(dtype)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True  # adapters on top; the packed weights themselves stay

    @property
    def is_compileable(self) -> bool:
        return True


def tripwire_name(layers: dict[str, dict[str, Any]]) -> str:
    """Return the key of the empty tensor that makes a load without sparsekit fail."""
    return f"{min(layers)}.weight"  # not the first: config.json sorts its keys


def check_widths(widths: Any, sizes: Any) -> None:
    """Raise CheckpointError unless widths and sizes are what `describe_widths_` writes."""
    again = "it was altered, fetch the checkpoint again"
    for name, value in widths.items() if isinstance(widths, dict) else [("widths", widths)]:
        if not (isinstance(value, list) and len(value) == 2 and all(type(n) is int and n > 0 for n in value)):
            raise CheckpointError(f"config.json gives {value!r} as the width of {name}: {again}")
    for name, found in sizes.items() if isinstance(sizes, dict) else [("sizes", sizes)]:
        if not (isinstance(found, dict) and all(k in SIZES and type(n) is int and n > 0 for k, n in found.items())):
            raise CheckpointError(f"config.json gives {found!r} as the sizes of {name}: {again}")


def resize_layers_(
    model: nn.Module, widths: dict[str, list[int]], sizes: dict[str, dict[str, int]]
) -> tuple[dict[str, list[int]], dict[str, dict[str, int]]]:
    """Give the named layers their sizes, and tell the modules around them.

    Returns:
        `widths` and `sizes` by the names they have in this model, as `swap_in_empty_` does.
    Raises:
        CheckpointError: the model has none of the layers, or they are no linear layers.
    """
    found: dict[str, list[int]] = {}
    told: dict[str, dict[str, int]] = {}
    for stored_name, size in widths.items():
        if (name := _name_in(model, stored_name)) is None:
            continue
        layer = model.get_submodule(name)
        if linear_size(layer) is None:
            raise CheckpointError(f"{name} has a width in config.json, and is a {type(layer).__name__} here")
        resize_(layer, *size)
        found[name] = size
    if not found:
        raise CheckpointError(
            f"the checkpoint gives the sizes of {next(iter(widths))} and others, {type(model).__name__} has none of "
            "them: load it with the class that saved it"
        )
    for stored_name, attributes in sizes.items():
        if (name := _name_in(model, stored_name)) is not None:
            for attribute, value in attributes.items():
                setattr(model.get_submodule(name), attribute, value)
            told[name] = attributes
    return found, told


def refuse_other_sizes(model: nn.Module) -> None:
    """Raise CheckpointError if a weight has not the size that its layer was given; not all transformers look."""
    for name, module in model.named_modules():
        weight, size = module._parameters.get("weight"), linear_size(module)
        if weight is None or size is None:
            continue
        shape = tuple(weight.shape)
        if shape != (size[::-1] if hasattr(module, "nf") else size):
            raise CheckpointError(f"{name}.weight has other shapes than its config.json says: {shape} for {size}")


def check_described(layers: dict[str, dict[str, Any]], branches: dict[str, dict[str, Any]] | None = None) -> None:
    """Raise CheckpointError unless each layer is described as `describe_layers`, or `describe_branches`, does."""
    branches = branches or {}
    if not isinstance(layers, dict) or not isinstance(branches, dict) or not layers | branches:
        raise CheckpointError("config.json names no packed layer: it was altered, fetch the checkpoint again")
    for name, described in (layers | branches).items():
        if not isinstance(described, dict):
            raise CheckpointError(f"config.json describes {name} as {described!r}: fetch the checkpoint again")
        own = "side" if name in branches else "format"
        missing = [key for key in (own, "shape", "source", "bias") if key not in described]
        if missing:
            raise CheckpointError(f"config.json does not give the {missing[0]} of {name}: fetch the checkpoint again")
        if name in layers and described["format"] not in FORMATS:
            raise CheckpointError(
                unknown(f"format of {name}", described["format"], list(FORMATS)) + " Upgrade sparsekit"
            )


def refuse_missing(model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """Raise CheckpointError if the checkpoint lacks a tensor of a packed layer: it would hold random memory."""
    for name in layers:
        for part, tensor in model.get_submodule(name).state_dict(keep_vars=True).items():
            # transformers marks what it read from a file.
            if tensor.device.type != "meta" and not getattr(tensor, "_is_hf_initialized", False):
                raise CheckpointError(f"{name}.{part} is missing from the checkpoint: fetch it again")


def swap_in_empty_(
    model: nn.Module, layers: dict[str, dict[str, Any]], backend: str = "auto"
) -> dict[str, dict[str, Any]]:
    """Replace the named dense layers by empty packed ones on the device where the dense weight is.

    Returns:
        `layers` by the names they have in this model: a checkpoint of a model with a head also loads into its base
        model, and the other way round, as everywhere in transformers.
    Raises:
        CheckpointError: the model has no such layer, or one of another shape.
    """
    found: dict[str, dict[str, Any]] = {}
    for stored_name, described in layers.items():
        name = _name_in(model, stored_name)
        if name is None:
            continue
        dense: Any = model.get_submodule(name)
        shape = _shape_of(name, dense, described)
        format = FORMATS.get(described["format"])
        if dense.weight.dtype not in format.dtypes:
            raise Unsupported(
                f"{described['format']} does not hold {dense.weight.dtype}: load with dtype='auto' or 'bfloat16'"
            )
        try:
            side = SideColumns.from_dict(shape[1], described["side"]) if "side" in described else None
            if side is not None and not format.holds_side:
                raise CheckpointError(f"{format.name} holds no side branch: fetch the checkpoint again")
            K = shape[1] if side is None else side.packed_features
            spec = format.spec(shape[0], K, dense.weight.dtype, described)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
        sparse = SparseLinear(
            spec,
            bias=described["bias"],
            backend=backend,
            source=described["source"],
            side=side,
            device=dense.weight.device,
        )
        parent, _, attribute = name.rpartition(".")
        model.get_submodule(parent)._modules[attribute] = sparse.train(dense.training)
        found[name] = described
    return found or _none_found(model, layers)


def swap_in_stored_(model: nn.Module, branches: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Replace the named dense layers by empty ones with a side branch; returns and raises as `swap_in_empty_`."""
    found: dict[str, dict[str, Any]] = {}
    for stored_name, described in branches.items():
        if (name := _name_in(model, stored_name)) is None:
            continue
        dense: Any = model.get_submodule(name)
        _shape_of(name, dense, described)
        replace_layer_(model, name, StoredBranch(described, dense.weight).train(dense.training))
        found[name] = described
    return found or _none_found(model, branches)


def _shape_of(name: str, dense: Any, described: dict[str, Any]) -> list[int]:
    """Return [N, K] of a layer of the model, which the checkpoint must have, too."""
    shape = list(dense.weight.shape)
    if described["source"] == "Conv1D":
        shape.reverse()
    if shape != list(described["shape"]):
        raise CheckpointError(f"{name} is packed as {described['shape']}, the model's config makes it {shape}")
    return shape


def _none_found(model: nn.Module, layers: dict[str, dict[str, Any]]) -> NoReturn:
    raise CheckpointError(
        f"the checkpoint packs {next(iter(layers), 'nothing')} and others, {type(model).__name__} has none of them: "
        "load it with the class that saved it"
    )


def _name_in(model: nn.Module, stored_name: str) -> str | None:
    """Return the stored name with the base model's prefix added or taken away, whichever the model has."""
    prefix = getattr(model, "base_model_prefix", "") + "."
    modules = dict(model.named_modules())
    for name in (stored_name, stored_name.removeprefix(prefix), prefix + stored_name):
        if name in modules:
            return name
    return None


def prepare_layers_(model: nn.Module, layers: dict[str, dict[str, Any]]) -> None:
    """Validate and prepare the packed layers; a damaged one is named."""
    for name in layers:
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        if layer.bias is not None and layer.bias.shape != (layer.out_features,):
            raise CheckpointError(f"{name}: the bias has shape {tuple(layer.bias.shape)}, not ({layer.out_features},)")
        try:
            layer.prepare_()
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from None
    warn_of_fallbacks(model)
