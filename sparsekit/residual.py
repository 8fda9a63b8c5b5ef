"""Cuts of the residual stream: the same hidden dimensions leave everything that writes to it or reads it.

Which axes those are, the model's class says: it is built twice on the meta device, of its config and of one with fewer
hidden dimensions, and every axis that differs is one of them. So there is no table of layers here.

A dimension that is dead is zero in the embeddings and in the rows of all that write. An RMSNorm still counts it: with d
dimensions of which d' are left, the mean of squares grows by d / d' when the others go, and

    x / sqrt(ms + eps) = sqrt(d / d') x / sqrt(ms d / d' + eps d / d')

So its weight is multiplied by sqrt(d / d'), and its eps by d / d'. A LayerNorm subtracts the mean over all dimensions
and cannot be cut this way; nor can a model that scales its embeddings by sqrt(d), as Gemma does.
"""

from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.errors import Unsupported
from sparsekit.hf.describe import outermost_pretrained
from sparsekit.hf.stock import changed, config_of, names_in, stock_model
from sparsekit.nn import SideLinear, SparseLinear
from sparsekit.plan import Cut
from sparsekit.snapshot import Snapshot

_BLOCKS = {
    "LlamaDecoderLayer",
    "MistralDecoderLayer",
    "Qwen2DecoderLayer",
    "Qwen3DecoderLayer",
    "Phi3DecoderLayer",
    "SmolLM3DecoderLayer",
}
"""Classes of blocks whose models do nothing to the residual stream but read it through an RMSNorm, and add to it."""

_EPS = ("variance_epsilon", "eps")


@torch.no_grad()
def thin_(model: nn.Module, name: str, cut: Cut, snapshot: Snapshot) -> str | None:
    """Take hidden dimensions out of a model.

    Args:
        model: holds the transformers model that is cut.
        name: its input embedding.
        cut: of kind "hidden".
        snapshot: takes it back if the caller fails.
    Returns:
        None where the model has the size that is left already; else the name of a layer that wrote to what went, or
        "" if none did, and the model computes what it did before.
    Raises:
        ValueError: the name is that of no embedding, or the model has another size.
        Unsupported: the family cannot be cut there, or has no model of that size; in the words of its class.
    """
    embedding = dict(model.named_modules()).get(name)
    if not isinstance(embedding, nn.Embedding):
        raise ValueError(f"the plan cuts hidden dimensions of {name!r}, which is no embedding of this model")
    d, left = embedding.embedding_dim, len(cut.kept)
    if d == left:
        return None
    if d != cut.num:
        raise ValueError(f"the plan leaves {left} of {cut.num} hidden dimensions, and {name} has {d} in this model")
    prefix, owner = owner_of_stream(model, name)
    before, after, changes, config = _stocks(model, name, owner, d, left)
    _refuse(owner, before, after, d, left)
    kept, removed = cut.kept.cpu(), cut.removed
    renewed: dict[int, nn.Parameter] = {}
    writer = ""
    for path, module in owner.named_modules():
        plain, small = before.get(path), after.get(path)
        if plain is None or small is None:
            continue
        own: dict[str, nn.Parameter | None] = {}
        for key, parameter in module.named_parameters(recurse=False):
            axes = _axes(plain, small, key)
            if not axes:
                continue
            if id(parameter) not in renewed:
                gone = parameter.index_select(axes[0], removed.to(parameter.device))
                if not writer and _writes(module, axes) and bool(gone.any()):
                    writer = f"{prefix}{path}"
                renewed[id(parameter)] = _cut(module, parameter, axes, kept, d / left)
                snapshot.hold(parameter)
            own[key] = renewed[id(parameter)]
        if own:
            weight = own.get("weight", module._parameters["weight"])
            assert weight is not None
            snapshot.set_parameters_(f"{prefix}{path}", weight, own.get("bias", module._parameters.get("bias")))
        for attribute, value in vars(small).items():
            if isinstance(value, int | float | tuple) and vars(plain).get(attribute, value) != value:
                if vars(module).get(attribute) == vars(plain)[attribute]:
                    snapshot.keep_(module, attribute)
                    setattr(module, attribute, value)
    for key, value in changes.items():
        snapshot.keep_(config, key)
        setattr(config, key, value)
    return writer


def check_thin(model: nn.Module, name: str, left: int) -> None:
    """Raise Unsupported where the hidden dimensions of a model, whose input embedding has this name, cannot be cut to
    so many."""
    _, owner = owner_of_stream(model, name)
    d = model.get_submodule(name).get_parameter("weight").shape[1]
    before, after, _, _ = _stocks(model, name, owner, d, left)
    _refuse(owner, before, after, d, left)


def owner_of_stream(model: nn.Module, name: str) -> tuple[str, Any]:
    """Return the transformers model whose input embedding has this name, and the prefix of its modules.

    Raises:
        Unsupported: there is none, or hidden dimensions cannot be cut in its family.
    """
    for prefix, owner in outermost_pretrained(model).items():
        if f"{name}.".startswith(f"{prefix}." if prefix else ""):
            classes = {type(module).__name__ for module in owner.modules()}
            if not classes & _BLOCKS:
                known = ", ".join(sorted(_BLOCKS))
                raise Unsupported(
                    f"hidden dimensions of {type(owner).__name__} cannot be cut: what its norms make of fewer is known "
                    f"for models of {known}"
                )
            return f"{prefix}." if prefix else "", owner
    raise Unsupported(f"hidden dimensions can be cut in a transformers model only, and {name} is in none")


def _stocks(
    model: nn.Module, name: str, owner: Any, d: int, left: int
) -> tuple[dict[str, nn.Module], dict[str, nn.Module], dict[str, Any], Any]:
    """Return the modules of the class's models before and after, what changes in the config, and that config."""
    config = config_of(model, name)
    (hidden,) = names_in(config, ("hidden_size",))
    head = getattr(config, "head_dim", None) or d // config.num_attention_heads
    changes = {hidden: left, "head_dim": head}
    changes |= {key: getattr(config, key) * d / left for key in names_in(config, ("rms_norm_eps",))}
    plain = stock_model(owner, changed(owner.config, config, {"head_dim": head}))
    small = stock_model(owner, changed(owner.config, config, changes))
    return dict(plain.named_modules()), dict(small.named_modules()), changes, config


def _refuse(owner: nn.Module, before: dict[str, nn.Module], after: dict[str, nn.Module], d: int, left: int) -> None:
    """Raise where a module cannot be made what a smaller one is."""
    for path, module in owner.named_modules():
        plain, small = before.get(path), after.get(path)
        if plain is None or small is None:
            continue
        axes = {key: _axes(plain, small, key) for key, _ in plain.named_parameters(recurse=False)}
        if any(axes.values()) and isinstance(module, SideLinear | SparseLinear):
            raise ValueError(f"{path} is packed or has a side branch: unpack_ and merge_side_ before it is cut")
        eps = next((key for key in _EPS if key in vars(plain)), None)
        if eps is not None and vars(plain)[eps] != vars(small)[eps] and not any(axes.values()):
            raise Unsupported(
                f"{path} has its eps from where the norms of the residual stream have theirs, which must change from "
                f"{vars(plain)[eps]:.3g} with {d} to {left} dimensions: the hidden dimensions cannot be cut"
            )
        if any(axes.values()) and not isinstance(module, nn.Linear | nn.Embedding) and not _is_norm(module):
            raise Unsupported(f"{path} is a {type(module).__name__}, of which {left} of {d} dimensions are no part")


def _axes(plain: nn.Module, small: nn.Module, key: str) -> list[int]:
    """Return the axes of a parameter that run over hidden dimensions."""
    one, other = plain._parameters.get(key), small._parameters.get(key)
    if one is None or other is None:
        return []
    return [axis for axis, (n, m) in enumerate(zip(one.shape, other.shape, strict=True)) if n != m]


def _writes(module: nn.Module, axes: list[int]) -> bool:
    """Whether what a layer gives is added to the residual stream."""
    return isinstance(module, nn.Embedding) or (isinstance(module, nn.Linear) and 0 in axes)


def _is_norm(module: nn.Module) -> bool:
    return "RMSNorm" in type(module).__name__


def _cut(module: nn.Module, parameter: nn.Parameter, axes: list[int], kept: Tensor, ratio: float) -> nn.Parameter:
    value = parameter.detach()
    for axis in axes:
        value = value.index_select(axis, kept.to(value.device))
    if _is_norm(module):
        value = (value.double() * ratio**0.5).to(value.dtype)
    return nn.Parameter(value.contiguous(), parameter.requires_grad)
