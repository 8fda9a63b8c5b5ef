"""Cuts made true: layers, heads, channels and hidden dimensions leave the model, and its config says what is left.

Rows of the layers that make a unit and columns of the one that reads it go together, so the smaller model computes what
the larger one does with those columns zero. What else counts on the sizes goes along: attributes of the attentions, the
places of layers in the cache, and the config, as far as it can say it. See `sparsekit.hf.stock` for how that is known.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.archs import Width, find_widths
from sparsekit.errors import Unsupported
from sparsekit.hf.describe import describe_widths_, outermost_pretrained
from sparsekit.hf.stock import changed, config_of, names_in, sizes_beside, stock_model
from sparsekit.nn import SIZES, SideLinear, SparseLinear
from sparsekit.plan import Cut
from sparsekit.registry import unknown
from sparsekit.residual import thin_
from sparsekit.snapshot import Snapshot
from sparsekit.targets import is_conv1d, weight_NK

_QUERY_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads")
_QUERY_WIDTHS = ("all_head_size", "split_size")

_CONFIG_LAYERS = ("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers")
_CONFIG_CHANNELS = (
    "intermediate_size",
    "ffn_dim",
    "hidden_dim",
    "n_inner",
    "d_ff",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
)
_CONFIG_OF_EACH_LAYER = ("layer_types", "mlp_layer_types", "no_rope_layers", "attention_layers", "layers_block_type")


def cut_(model: nn.Module, cuts: Mapping[str, Cut], snapshot: Snapshot) -> list[str]:
    """Cut layers, hidden dimensions, and then heads and channels; what has the size that a cut leaves is left as it is.

    Args:
        model: dense where it is cut.
        cuts: those of a plan.
        snapshot: of the model; it takes everything back if the caller fails.
    Returns:
        Layers that had other weights than zero for what went: on the model that a method made the plan of, none.
    Raises:
        ValueError: a cut is of a part that the model lacks, or that has another size.
        Unsupported: the model's family, or the class of a layer, cannot be cut there.
    """
    done = [_drop_(model, name, cut, snapshot) for name, cut in cuts.items() if cut.kind == "layers"]
    alive = []
    for name, cut in cuts.items():
        if cut.kind == "hidden" and (writer := thin_(model, name, cut, snapshot)) is not None:
            done.append(True)
            alive += [writer] if writer else []
    wanted = {name: cut for name, cut in cuts.items() if cut.kind in ("heads", "channels")}
    if wanted:
        _refuse_uncuttable(model, wanted)
        widths = {width.name: width for width in find_widths(model)}
        for name, cut in wanted.items():
            if name not in widths:
                raise ValueError(
                    f"the plan does not fit this model: {unknown(f'part with {cut.kind}', name, list(widths))}"
                )
            if _is_cut(widths[name], cut):
                continue
            if _reads(model, widths[name], cut.removed):
                alive.append(name)
            _slice_(model, widths[name], cut, snapshot)
            done.append(True)
    if any(done):
        for prefix, owner in outermost_pretrained(model).items():
            _describe_(model, prefix, owner, snapshot)
    return alive


def _is_cut(width: Width, cut: Cut) -> bool:
    """Return whether a width has the size that the cut leaves.

    Raises:
        ValueError: it has neither that size nor the one that the cut is of.
    """
    if width.kind != cut.kind or width.num_units not in (cut.num, len(cut.kept)):
        raise ValueError(
            f"the plan leaves {len(cut.kept)} of {cut.num} {cut.kind} that {width.name} reads; in this model it reads "
            f"{width.num_units} {width.kind}"
        )
    return width.num_units == len(cut.kept)


def _reads(model: nn.Module, width: Width, units: Tensor) -> bool:
    """Return whether any weight that reads these units is not zero."""
    reader = model.get_submodule(width.name)
    w_NK = weight_NK(reader)
    columns = width.columns_of(units).to(w_NK.device)
    if isinstance(reader, SideLinear) and reader.side_X is not None and bool(reader.side_X[:, columns].any()):
        return True
    return bool(w_NK[:, columns].any())


def _slice_(model: nn.Module, width: Width, cut: Cut, snapshot: Snapshot) -> None:
    """Cut one width."""
    rows: dict[str, list[Tensor]] = defaultdict(list)
    kept = cut.kept.cpu()
    for each in width.producers:
        rows[each.name].append(each.of(kept))
    _refuse_uncuttable(model, rows)
    _tell_(model, width, len(kept), snapshot)
    for name, parts in rows.items():
        layer = model.get_submodule(name)
        own = torch.cat(parts).sort().values.to(weight_NK(layer).device)
        bias = layer._parameters.get("bias")
        new_bias = None if bias is None else nn.Parameter(bias.detach()[own], bias.requires_grad)
        snapshot.set_parameters_(name, _parameter(layer, weight_NK(layer)[own]), new_bias)
        if isinstance(layer, SideLinear):
            snapshot.set_branch_(name, layer.side_S.detach()[own], layer.side_X)
    reader = model.get_submodule(width.name)
    columns = width.columns_of(kept).to(weight_NK(reader).device)
    new_weight = _parameter(reader, weight_NK(reader)[:, columns])
    snapshot.set_parameters_(width.name, new_weight, reader._parameters.get("bias"))
    if isinstance(reader, SideLinear) and reader.side_X is not None:
        snapshot.set_branch_(width.name, reader.side_S, reader.side_X.detach()[:, columns])


def _parameter(layer: nn.Module, w_NK: Tensor) -> nn.Parameter:
    """Return a weight [N, K] as a parameter that the layer can have."""
    weight = w_NK.T.contiguous() if is_conv1d(layer) else w_NK.contiguous()
    return nn.Parameter(weight, layer.get_parameter("weight").requires_grad)


def _refuse_uncuttable(model: nn.Module, names: Iterable[str]) -> None:
    """Raise where the weight of a layer, if there is one, cannot be given another size."""
    owners = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    places = Counter(id(child) for module in model.modules() for child in module._modules.values())
    modules = dict(model.named_modules())
    for name in names:
        layer = modules.get(name)
        if isinstance(layer, SparseLinear):
            raise ValueError(f"{name} is packed: unpack_ the model before it is cut")
        if isinstance(layer, SideLinear) and layer.side_X is None:
            raise ValueError(
                f"{name} has a side branch that sums its inputs in groups, which cannot be cut: fold it in with "
                "sparsekit.nn.merge_side_"
            )
        if hasattr(layer, "parametrizations"):
            raise Unsupported(f"the weight of {name} is computed from other tensors: remove its parametrization first")
        weight = None if layer is None else layer._parameters.get("weight")
        if weight is not None and weight.is_meta:
            raise ValueError(
                f"the weight of {name} is on the meta device, so it holds no numbers: load the model first"
            )
        if weight is not None and (owners[id(weight)] > 1 or places[id(layer)] > 1):
            raise Unsupported(f"the weight of {name} is also that of another module: a cut here would be one there")


def _tell_(model: nn.Module, width: Width, num_units: int, snapshot: Snapshot) -> None:
    """Set the attributes by which the modules around a width know how wide it is."""
    prefix = _common([width.name, *(rows.name for rows in width.producers)])
    if width.kind == "heads":
        head = width.producers[-1].per_unit
        told = {
            **dict.fromkeys(_QUERY_HEADS, width.columns // head),
            **dict.fromkeys(_KEY_HEADS, 1),
            **dict.fromkeys(_QUERY_WIDTHS, width.columns),
        }
    else:
        told = {"intermediate_size": 1}
    for name, module in model.get_submodule(prefix).named_modules():
        for attribute, per_unit in told.items():
            found = vars(module).get(attribute)
            if not isinstance(found, int):
                continue
            if found != per_unit * width.num_units:
                raise Unsupported(
                    f"{prefix}{'.' if name else ''}{name} says {attribute} = {found}, and its layers are made for "
                    f"{per_unit * width.num_units}: it cannot be cut"
                )
            snapshot.keep_(module, attribute)
            setattr(module, attribute, per_unit * num_units)


def _drop_(model: nn.Module, name: str, cut: Cut, snapshot: Snapshot) -> bool:
    """Take layers out of a list; return whether there was something to take."""
    blocks = dict(model.named_modules()).get(name)
    if not isinstance(blocks, nn.ModuleList | nn.Sequential):
        lists = [known for known, module in model.named_modules() if isinstance(module, nn.ModuleList)]
        raise ValueError(f"the plan does not fit this model: {unknown('list of layers', name, lists)}")
    if len(blocks) == len(cut.kept):
        return False
    if len(blocks) != cut.num:
        raise ValueError(f"the plan leaves {len(cut.kept)} of {cut.num} layers in {name}, which has {len(blocks)} here")
    before = _attributes(blocks)
    snapshot.choose_children_(name, cut.kept.tolist())
    for (path, attribute), values in before.items():
        if values == list(range(cut.num)) and all(
            type(value) is int for value in values
        ):  # its place, as the cache of keys and values knows it
            for place, block in enumerate(blocks):
                module = block.get_submodule(path)
                snapshot.keep_(module, attribute)
                setattr(module, attribute, place)
    for prefix, owner in outermost_pretrained(model).items():
        if f"{name}.".startswith(f"{prefix}." if prefix else ""):
            _say_layers_(model, prefix, owner, name, cut, before, snapshot)
    return True


def _attributes(blocks: nn.Module) -> dict[tuple[str, str], list[Any]]:
    """Return (module within a block, attribute) -> its value in each block, for plain values that are no sizes."""
    found: dict[tuple[str, str], list[Any]] = defaultdict(list)
    left_out = {*SIZES, "out_features", "in_features", "nf", "nx", "training"}
    for block in blocks.children():
        for path, module in block.named_modules():
            for attribute, value in vars(module).items():
                plain = isinstance(value, bool | int | float | str) and not attribute.startswith("_")
                if plain and attribute not in left_out and "drop" not in attribute:
                    found[path, attribute].append(value)
    return found


def _say_layers_(
    model: nn.Module,
    prefix: str,
    owner: Any,
    name: str,
    cut: Cut,
    before: dict[tuple[str, str], list[Any]],
    snapshot: Snapshot,
) -> None:
    """Let the config say how many layers there are, and of what type each is."""
    inside = name.removeprefix(f"{prefix}.") if prefix else name
    config = config_of(model, name)
    blocks = model.get_submodule(name)
    lists = {
        attribute: [value[index] for index in cut.kept.tolist()]
        for attribute in _CONFIG_OF_EACH_LAYER
        if isinstance(value := vars(config).get(attribute), list | tuple) and len(value) == cut.num
    }
    reason = "it has no number of layers that is the list's"
    for attribute in names_in(config, _CONFIG_LAYERS):
        if getattr(config, attribute) != cut.num:
            continue
        changes = {attribute: len(cut.kept), **lists}
        try:
            stock = stock_model(owner, changed(owner.config, config, changes))
        except Unsupported as error:
            reason = str(error)
            continue
        others = dict(stock.named_modules())
        if len(list(others[inside].children())) != len(cut.kept):
            continue
        depends = _differing(before, _attributes(blocks), _attributes(others[inside]))
        if depends:
            raise Unsupported(
                f"layers of {name} cannot be taken out: {depends} is not the same in all of them, and what the config "
                "makes of the layers that are left is something else"
            )
        for key, value in changes.items():
            snapshot.keep_(config, key)
            setattr(config, key, value)
        return
    raise Unsupported(f"layers of {name} cannot be taken out: its config cannot say so ({reason})")


def _differing(before: Mapping[Any, list[Any]], ours: Mapping[Any, list[Any]], stock: Mapping[Any, list[Any]]) -> str:
    """Return an attribute that depends on the layer and is not in `stock` what it is in `ours`; empty if none is."""
    for key, values in ours.items():
        varies = any(len(set(found.get(key, []))) > 1 for found in (before, stock))
        if varies and stock.get(key) != values:
            return ".".join(part for part in key if part)
    return ""


def _describe_(model: nn.Module, prefix: str, owner: Any, snapshot: Snapshot) -> None:
    """Let the config say what it can of the widths, and mark the model with the rest."""
    snapshot.keep_(owner.config, "quantization_config")
    left = sizes_beside(owner, stock_model(owner, owner.config))
    inside = [width for width in _widths(model) if f"{width.name}.".startswith(f"{prefix}." if prefix else "")]
    for config, changes in _ways_to_say(model, inside):
        if not left[0]:
            break
        try:
            now = sizes_beside(owner, stock_model(owner, changed(owner.config, config, changes)))
        except Unsupported:  # the class has no model of these sizes: the mark says them
            continue
        if now[0].keys() < left[0].keys():
            left = now
            for key, value in changes.items():
                snapshot.keep_(config, key)
                setattr(config, key, value)
    describe_widths_(owner, *left)


def _ways_to_say(model: nn.Module, widths: list[Width]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """Yield configs and what to set there, for widths that are everywhere the same."""
    configs = {id(config): config for width in widths if (config := config_of(model, width.name)) is not None}
    for config in configs.values():
        own = [width for width in widths if config_of(model, width.name) is config]
        for kind in ("channels", "heads"):
            alike = {(w.num_units, w.columns, w.producers[-1].per_unit) for w in own if w.kind == kind}
            if len(alike) != 1:
                continue
            num_units, columns, head = alike.pop()
            if kind == "channels":
                for attribute in names_in(config, _CONFIG_CHANNELS):
                    yield config, {attribute: num_units}
            else:
                (heads,) = names_in(config, ("num_attention_heads",)) or ("num_attention_heads",)
                keys = {key: num_units for key in names_in(config, ("num_key_value_heads",))}
                yield config, {heads: num_units * columns // head, **keys, "head_dim": head}


def _widths(model: nn.Module) -> list[Width]:
    try:
        return find_widths(model)
    except Unsupported:  # layers alone can be cut where no width is known
        return []


def _common(names: list[str]) -> str:
    """Return the module that all the named ones lie in."""
    paths = [name.split(".")[:-1] for name in names]
    shared = []
    for segments in zip(*paths, strict=False):
        if len(set(segments)) > 1:
            break
        shared.append(segments[0])
    return ".".join(shared)
