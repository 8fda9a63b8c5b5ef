"""Which layers of a model to work on, and their weights as [out_features, in_features].

Only linear layers can be targets. Embeddings, output and task heads, MoE routers, LoRA factors and layers that are
packed already are left alone; heads and routers can be had by naming them, the others cannot.
"""

import difflib
import re
import warnings
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from sparsekit.registry import unknown

Entry = str | Callable[[nn.Module, str], bool]
"""A class name, "re:…" on the qualified name, a qualified name or its last segment, or `(module, name) -> bool`."""

_ROUTER_SEGMENTS = {"gate", "router", "shared_expert_gate"}
_WEIGHT_DTYPES = {torch.float16, torch.bfloat16, torch.float32, torch.float64}


def find_targets(
    model: nn.Module, targets: Iterable[Entry] | Entry = ("Linear",), ignore: Iterable[Entry] | Entry = ("lm_head",)
) -> dict[str, nn.Module]:
    """Return the layers to prune, qualified name -> module, in the order of the model's definition.

    Args:
        model: any `nn.Module`.
        targets: entries, see `Entry`. "Linear" also stands for the `Conv1D` of GPT-2. An output head or an MoE
            router is taken only if an entry names it, that is, matches nothing but such layers.
        ignore: entries to leave out; wins over `targets`.
    Raises:
        ValueError: an entry is no pattern, an entry of `targets` matches nothing, nothing is left, or a weight is
            shared with another module. (One module that is used in two places is fine: it is one layer.)

    Warns when an entry of `ignore` matches nothing, but for the default "lm_head".
    """
    wanted, unwanted = _entries(targets, "targets"), _entries(ignore, "ignore")
    modules = {
        name: module for name, module in model.named_modules(remove_duplicate=True) if name or not _children(module)
    }
    linears = {name: module for name, module in modules.items() if is_linear(module)}
    guarded = guarded_layers(model, linears)
    found: set[str] = set()
    for entry in wanted:
        matches = {name for name, module in linears.items() if matches_entry(entry, module, name)}
        named = matches and matches <= guarded and not (isinstance(entry, str) and entry in _class_names(linears))
        found |= matches if named else matches - guarded
        if not matches:
            raise ValueError(_nothing_matches([entry], modules, linears, guarded))
    if not found:
        raise ValueError(_nothing_matches(wanted, modules, linears, guarded))
    _warn_of_idle(unwanted, modules, linears)
    kept = [name for name in found if not any(matches_entry(entry, linears[name], name) for entry in unwanted)]
    if not kept:
        raise ValueError(
            f"ignore={_show(unwanted)} leaves nothing of the {len(found)} layers that targets={_show(wanted)} matches "
            f"({_some(sorted(found))}): narrow ignore"
        )
    chosen = {name: linears[name] for name in linears if name in set(kept)}
    _refuse_unusable(chosen)
    _refuse_shared(model, chosen)
    return chosen


def is_linear(module: nn.Module) -> bool:
    """Return whether the module is a dense linear layer: `nn.Linear`, a subclass, or transformers' `Conv1D`."""
    if any(base.__name__ == "SparseLinear" for base in type(module).__mro__):
        return False
    return isinstance(module, nn.Linear) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Return whether this is transformers' `Conv1D`, a linear layer that stores its weight transposed."""
    weight = getattr(module, "weight", None)
    named = any(base.__name__ == "Conv1D" for base in type(module).__mro__)
    return named and hasattr(module, "nf") and isinstance(weight, Tensor) and weight.dim() == 2


def weight_NK(module: nn.Module) -> Tensor:
    """Return the weight as [out_features, in_features], detached, sharing the module's memory."""
    weight = module.get_parameter("weight").detach()
    return weight.T if is_conv1d(module) else weight


def set_weight_NK_(module: nn.Module, w_NK: Tensor) -> None:
    """Write a weight given as [out_features, in_features] into the module's own parameter, cast to its dtype."""
    with torch.no_grad():
        weight_NK(module).copy_(w_NK)


def matches_entry(entry: Entry, module: nn.Module, name: str) -> bool:
    """Return whether one entry of `targets` or `ignore` matches this module."""
    if not isinstance(entry, str):
        return bool(entry(module, name))
    if entry.startswith("re:"):
        return re.match(entry[3:], name) is not None
    return entry == name or entry == name.rpartition(".")[2] or entry in _names_of_class(module)


def guarded_layers(model: nn.Module, linears: dict[str, nn.Module]) -> set[str]:
    """Return the names of heads, MoE routers and LoRA factors, which only an explicit target reaches."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = get_head() if callable(get_head) else None
    guarded = set()
    for name, module in linears.items():
        segments = name.split(".")
        is_head = module is head or segments[-1] == "lm_head"
        is_lora = any(segment.startswith(("lora_", "modules_to_save")) for segment in segments)
        if is_head or is_lora or _is_router(model, segments) or _is_task_head(model, segments):
            guarded.add(name)
    return guarded


def _is_task_head(model: nn.Module, segments: list[str]) -> bool:
    """Whether a layer lies outside the base model of a transformers model: small, and what a task hangs on."""
    base = getattr(model, "base_model_prefix", "")
    return bool(base) and isinstance(getattr(model, base, None), nn.Module) and segments[0] != base


def _is_router(model: nn.Module, segments: list[str]) -> bool:
    for i, segment in enumerate(segments):
        if segment in _ROUTER_SEGMENTS:
            siblings = [child for child, _ in model.get_submodule(".".join(segments[:i])).named_children()]
            if any("expert" in sibling for sibling in siblings if sibling not in _ROUTER_SEGMENTS):
                return True
    return False


def _warn_of_idle(unwanted: list[Entry], modules: dict[str, nn.Module], linears: dict[str, nn.Module]) -> None:
    """Warn of entries of `ignore` that spare nothing: a typo, or the name of a container in place of its layers."""
    leaves = {name: module for name, module in modules.items() if not _children(module)}
    for entry in unwanted:
        if not isinstance(entry, str) or entry == "lm_head":
            continue
        if not any(matches_entry(entry, module, name) for name, module in leaves.items()):
            near = _near(entry, linears)
            inside = [name for name in linears if name.startswith(f"{entry}.")]
            hint = f" For all that is inside of it: 're:{re.escape(entry)}'." if inside else near and f" {near}"
            warnings.warn(f"ignore: {entry!r} matches no layer of this model.{hint}", stacklevel=3)


def _near(entry: str, linears: dict[str, nn.Module]) -> str:
    known = sorted({*_class_names(linears), *linears, *(name.rpartition(".")[2] for name in linears)} - {""})
    near = difflib.get_close_matches(entry.removeprefix("re:"), known, n=3, cutoff=0.5)
    return f"Near {entry!r}: {', '.join(map(repr, near))}." if near else ""


def show_entries(entries: Iterable[Entry] | Entry) -> list[str]:
    """Return entries as text, a callable by its name."""
    return [
        entry if isinstance(entry, str) else getattr(entry, "__name__", "callable")
        for entry in _entries(entries, "targets")
    ]


def _refuse_shared(model: nn.Module, chosen: dict[str, nn.Module]) -> None:
    """Raise where a target's weight is also the weight of another module: pruning one would prune the other."""
    owners: dict[int, list[str]] = {}
    for prefix, module in model.named_modules(remove_duplicate=True):
        for key, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(parameter), []).append(f"{prefix}.{key}" if prefix else key)
    for name, module in chosen.items():
        sharers = owners.get(id(module.get_parameter("weight")), [])
        others = [owner for owner in sharers if owner != (f"{name}.weight" if name else "weight")]
        if others:
            raise ValueError(
                f"the weight of {name} is the same tensor as {_some(others)}: pruning one changes the other. "
                f"Add {name!r} to ignore (and the others, if they are targets), or untie them first"
            )


def _refuse_unusable(chosen: dict[str, nn.Module]) -> None:
    for name, module in chosen.items():
        weight = dict(module.named_parameters(recurse=False)).get("weight")
        if weight is None:
            raise ValueError(f"the weight of {name} is computed from other tensors: remove its parametrization first")
        if weight.is_meta:
            raise ValueError(
                f"the weight of {name} is on the meta device, so it holds no numbers: load the model first"
            )
        if weight.dtype not in _WEIGHT_DTYPES:
            raise ValueError(
                f"the weight of {name} is {weight.dtype}: prune the model in float16, bfloat16 or float32, "
                "and quantise it afterwards"
            )


def _nothing_matches(
    wanted: list[Entry], modules: dict[str, nn.Module], linears: dict[str, nn.Module], guarded: set[str]
) -> str:
    lines = [f"targets={_show(wanted)} matches no layer that can be pruned."]
    for entry in wanted:
        if not isinstance(entry, str):
            continue
        hit = next((name for name, module in modules.items() if matches_entry(entry, module, name)), None)
        if hit is not None and hit in guarded:
            lines.append(f"{entry!r} matches {hit}, a head or router: name it exactly to prune it.")
        elif hit is not None:
            lines.append(f"{entry!r} matches {hit}, a {type(modules[hit]).__name__}, which is no dense linear layer.")
        elif near := _near(entry, linears):
            lines.append(near)
    if any(any(base.__name__ == "SparseLinear" for base in type(module).__mro__) for module in modules.values()):
        lines.append("Some layers are packed already: unpack_ the model to prune it again.")
    lines.append(f"Linear layers here: {_some(list(linears))}." if linears else "The model holds no linear layer.")
    return " ".join(lines)


def _entries(entries: Iterable[Entry] | Entry, what: str) -> list[Entry]:
    listed: list[Entry] = [entries] if isinstance(entries, str) or callable(entries) else list(entries or ())
    for entry in listed:
        if isinstance(entry, str) and entry.startswith("re:"):
            try:
                re.compile(entry[3:])
            except re.error as error:
                raise ValueError(f"{what}: {entry!r} is no regular expression ({error})") from error
        elif not isinstance(entry, str) and not callable(entry):
            raise ValueError(unknown(f"entry of {what}", entry, ["Linear", "re:.*mlp.*", "model.layers.0.mlp.up_proj"]))
    return listed


def _names_of_class(module: nn.Module) -> set[str]:
    names = {base.__name__ for base in type(module).__mro__} - {"Module", "object"}
    return names | {"Linear"} if is_conv1d(module) else names


def _class_names(modules: dict[str, nn.Module]) -> set[str]:
    return set().union(*(_names_of_class(module) for module in modules.values())) if modules else set()


def _children(module: nn.Module) -> bool:
    return next(module.children(), None) is not None


def _show(entries: list[Entry]) -> str:
    return repr(show_entries(entries))


def _some(names: list[str], limit: int = 6) -> str:
    more = f", … ({len(names)} in all)" if len(names) > limit else ""
    return ", ".join(name or "(the model itself)" for name in names[:limit]) + more
