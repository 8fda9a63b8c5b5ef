"""From masked `nn.Linear` layers to packed ones that run fast, and back: bit for bit where the format is lossless."""

import warnings
import weakref
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.backends import BACKENDS, PREFILLS, resolve
from sparsekit.errors import NonFiniteError, PatternError, Unsupported
from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.hf.describe import describe_packed_
from sparsekit.interrupt import uninterrupted
from sparsekit.nn import (
    SideLinear,
    SparseLinear,
    dense_layer,
    disband_broken_groups_,
    fuse_,
    grid_of,
    replace_layer_,
    sparse_layers,
    unwrapped,
    warn_of_fallbacks,
)
from sparsekit.progress import progress_bar
from sparsekit.registry import unknown
from sparsekit.targets import is_conv1d
from sparsekit.targets import weight_NK as weight_of

DAMAGED_SHARE = 0.05
MOST_ZEROS_OF_24 = 0.55
"""A weight with about half zeros that breaks 2:4 in fewer than 5 % of its groups was 2:4 once and has been damaged:
that is an error. A dense weight, or one with half zeros anywhere, breaks it in 31 to 100 %; a sparser one in fewer."""


def pack_(
    model: nn.Module,
    format: str = "auto",
    backend: str = "auto",
    *,
    layers: Collection[str] | None = None,
    scales: Mapping[str, Tensor] | None = None,
    fuse: bool = False,
    prefill: str = "dense",
    progress: bool = False,
) -> nn.Module:
    """Replace every `nn.Linear` whose weight obeys a packed format by a `SparseLinear`; return the same model.

    Needs no plan: the weights themselves say whether they fit. Each layer's dense weight is freed before the next
    one is packed. A side branch is packed with the weight that it stands beside, in the same format, and run by the
    same kernel. If anything fails, the layers packed so far are turned back.

    Args:
        model: any module; layers inside are replaced, and a bare `nn.Linear` cannot be.
        format: a name in `FORMATS`, which every sparse layer must then obey; or "auto", which packs the layers that
            fit a lossless one and leaves the others dense. The quantised ones round the weights, and are never taken
            unasked; but a weight that `prune_` or `unpack_` left on the grid of one is packed to that, which is exact.
        backend: a name in `BACKENDS`, or "auto" for the best that runs on the layer's device.
        layers: qualified names of the only layers to pack; None for all that fit.
        scales: layer name -> the grid to round its weight to, for a quantised format. The layers not in it stay on the
            grid that they lie on since they were pruned or unpacked; others are rounded to nearest on scales of their
            own.
        fuse: run q, k and v of an attention, and gate and up of an MLP, as one product each, where the model is of a
            family that we know (`sparsekit.nn.fused.SAME_INPUT`): fewer launches, the same numbers. The layers keep
            their names and their places in the state dict. `explain` says which layers stay apart, and why.
        prefill: what serves many tokens at a time. "dense": the one copy of the weight, which the kernels expand as
            they need it. "cusparselt": a second copy of the weight, in cuSPARSELt's layout. "auto": a second copy
            where it was measured to be faster on this machine (`bash bench/gpu.sh tune`), else none. What second
            copies cost in bytes is said in a warning, and in `check`.
        progress: show a bar.
    `fuse=True` and a `prefill` other than "dense" also count for layers that are packed already, as after `load`.
    With `format` and `backend` both "auto", a layer stays dense where dense was measured to be faster on this GPU, by
    itself and not fused, for every number of tokens that was measured, few among them; `explain` has the times.
    Warns of such layers, where layers with many zeros fit no format, where nothing faster than the reference runs,
    where `fuse` finds nothing to fuse, where `prefill="auto"` finds nothing measured, and of second copies.

    Raises:
        ValueError: unknown format, backend or prefill, or there is no layer to pack.
        PatternError: no layer fits; or one breaks the format it was meant for, by name and number of groups.
        NonFiniteError: a weight holds NaN or infinity.
        Unsupported: the named backend cannot run on this machine, or no backend has this prefill.
    """
    if prefill not in PREFILLS:
        raise ValueError(f"prefill={prefill!r} is none of {', '.join(map(repr, PREFILLS))}")
    FORMATS.check(format)
    BACKENDS.check(backend)
    if isinstance(model, nn.Linear):
        raise ValueError("pack_ replaces layers inside a model: for a single layer use SparseLinear.from_linear(layer)")
    whole, model = model, unwrapped(model)
    packed_before = sparse_layers(model)
    _check_names(model, layers, scales, packed_before)
    _refuse_to_repack(packed_before, format, backend)
    chosen, refused = _choose(model, format, layers)
    prefills = {name: layer.prefill for name, layer in packed_before.items()}
    slower = _slower_than_dense(model, chosen, prefill) if format == backend == "auto" else {}
    if not chosen and not packed_before:
        detail = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:5])
        if refused:
            raise PatternError(f"no layer fits a packed format: dense ones want sparsekit.prune_ first. {detail}")
        raise ValueError("the model has no nn.Linear layer to pack")
    if chosen:
        _speak_of_sparse_layers_left_dense(model, refused, asked=format != "auto")
    if slower:
        _warn_of_layers_faster_dense(slower)
        chosen = {name: layer_format for name, layer_format in chosen.items() if name not in slower}
    replaced: list[_Replaced] = []
    try:
        with progress_bar("packing", len(chosen), progress) as bar:
            for name, layer_format in chosen.items():
                bar.advance(0, name)
                _pack_layer(model, name, layer_format, backend, prefill, (scales or {}).get(name), replaced)
                bar.advance()
        if chosen:
            describe_packed_(model)
        if prefill != "dense":
            _set_prefill_(packed_before, prefill)
        apart = fuse_(model) if fuse else {}
    except BaseException:
        with uninterrupted():
            _put_back(model, replaced)
            for name, layer in packed_before.items():
                layer.set_prefill_(prefills[name])
        raise
    if fuse and not any(layer.is_fused for layer in sparse_layers(model).values()):
        _warn_of_nothing_fused(apart)
    if chosen:
        warn_of_fallbacks(model)
    if prefill == "auto":
        _warn_of_unmeasured_prefill(model)
    _warn_of_second_copies(model)
    return whole


def _check_names(
    model: nn.Module,
    layers: Collection[str] | None,
    scales: Mapping[str, Tensor] | None,
    packed: Mapping[str, SparseLinear],
) -> None:
    if isinstance(layers, str):
        raise ValueError(f"layers={layers!r} is a string: give a list of names, as layers=[{layers!r}]")
    known = {*packed, *(name for name, _, _ in _candidates(model))}
    for argument, names in (("layers", layers or ()), ("scales", scales or ())):
        for name in names:
            if name not in known:
                raise ValueError(f"{argument}: {unknown('layer', name, sorted(known))}")
    for name, grid in (scales or {}).items():
        if not isinstance(grid, Tensor):
            raise ValueError(f"scales[{name!r}] is a {type(grid).__name__}: give a tensor, as those of plan.scales")


def _refuse_to_repack(packed: Mapping[str, SparseLinear], format: str, backend: str) -> None:
    """What was asked for by name is done or refused: a packed layer keeps its format and its backend."""
    for name, layer in packed.items():
        if format not in ("auto", layer.format):
            raise ValueError(f"format={format!r}: {name} is packed as {layer.format} already. Call unpack_ first")
        if backend not in ("auto", layer.requested_backend, layer.backend):
            raise ValueError(f"backend={backend!r}: {name} runs on {layer.backend!r} already. Call unpack_ first")


@dataclass(frozen=True)
class _Replaced:
    """A layer whose place has been taken. Weak, so that its parameters are freed unless somebody else holds them."""

    name: str
    layer: weakref.ref[nn.Module]
    parameters: dict[str, weakref.ref[nn.Parameter]]
    sparse: SparseLinear


def _pack_layer(
    model: nn.Module,
    name: str,
    format: str,
    backend: str,
    prefill: str,
    scales: Tensor | None,
    replaced: list[_Replaced],
) -> None:
    layer = model.get_submodule(name)
    if scales is None and not FORMATS.get(format).lossless and (grid := grid_of(layer, weight_of(layer))):
        scales = grid[1] if grid[0] == format else None
    try:
        sparse = SparseLinear.from_linear(layer, format, backend, scales, prefill)
    except (ValueError, Unsupported) as error:
        raise type(error)(f"{name}: {error}") from None
    parameters = {key: weakref.ref(parameter) for key, parameter in layer.named_parameters(recurse=False)}
    replaced.append(_Replaced(name, weakref.ref(layer), parameters, sparse))
    replace_layer_(model, name, sparse)


def _set_prefill_(layers: Mapping[str, SparseLinear], prefill: str) -> None:
    for name, layer in layers.items():
        try:
            layer.set_prefill_(prefill)
        except Unsupported as error:
            raise Unsupported(f"{name}: {error}") from None


def _warn_of_nothing_fused(apart: Mapping[str, str]) -> None:
    why = next((f"{names} stay apart: {reason}" for names, reason in apart.items()), None)
    why = why or "no module of the model is of a class in sparsekit.nn.fused.SAME_INPUT"
    warnings.warn(f"fuse=True fused nothing: {why}", stacklevel=3)


def why_dense(w_NK: Tensor, format: str, prefill: str = "dense") -> str:
    """Return why a weight had better stay dense, by what was measured on its device; empty where it had not."""
    spec = WeightSpec(format, w_NK.shape[0], w_NK.shape[1], w_NK.dtype)
    try:
        chosen, _ = resolve("auto", spec, w_NK.device, prefill)
    except Unsupported:  # whoever packs it hears of that
        return ""
    return chosen.stays_dense(spec, w_NK.device, prefill)


def _slower_than_dense(model: nn.Module, chosen: Mapping[str, str], prefill: str) -> dict[str, str]:
    """Return name -> reason for the layers that had better stay dense."""
    reasons = {
        name: why_dense(weight_of(model.get_submodule(name)), format, prefill) for name, format in chosen.items()
    }
    return {name: reason for name, reason in reasons.items() if reason}


def _warn_of_layers_faster_dense(slower: Mapping[str, str]) -> None:
    name, reason = next(iter(slower.items()))
    warnings.warn(
        f"{len(slower)} sparse layers stay dense, which was measured to be faster; {name}: {reason}. Name the "
        "format to pack them all the same",
        stacklevel=3,
    )


def _warn_of_unmeasured_prefill(model: nn.Module) -> None:
    """Say where `prefill="auto"` had nothing to choose by."""
    whys = {
        name: BACKENDS.get(layer.backend).unmeasured(layer._prepared_spec, layer.device)
        for name, layer in sparse_layers(model).items()
        if layer.is_prepared
    }
    unmeasured = {name: why for name, why in whys.items() if why}
    if unmeasured:
        name, why = next(iter(unmeasured.items()))
        warnings.warn(
            f"prefill='auto' keeps one copy of {len(unmeasured)} layers, as 'dense' does, for want of times; {name}: "
            f"{why}",
            stacklevel=3,
        )


def _warn_of_second_copies(model: nn.Module) -> None:
    """Say what the second copies for prefill cost."""
    layers = sparse_layers(model).values()
    costs = [cost for layer in layers if (cost := layer.second_copy_bytes())]
    if costs:
        first = sum(layer.packed_bytes() for layer in layers) - sum(costs)
        warnings.warn(
            f"{len(costs)} packed layers keep a second copy of their weight for prefill: {sum(costs):,} bytes beside "
            f"{first:,}. prefill='dense' does without",
            stacklevel=3,
        )


def _put_back(model: nn.Module, replaced: list[_Replaced]) -> None:
    """Return the dense layers to their places: the very same modules and parameters where anybody still knows them."""
    for entry in replaced:
        layer = entry.layer()
        if layer is None:
            layer = dense_layer(entry.sparse)
            for key, known in entry.parameters.items():
                if (parameter := known()) is not None:
                    setattr(layer, key, parameter)
        if model.get_submodule(entry.name) is not layer:
            replace_layer_(model, entry.name, layer)
    disband_broken_groups_(model)
    describe_packed_(model)


def unpack_(model: nn.Module) -> nn.Module:
    """Replace every `SparseLinear` by the dense layer it stands for, zeros included; return the same model.

    All or nothing: if it is interrupted, the packed layers stay.
    """
    inner = unwrapped(model)
    replace_by_dense_(inner, list(sparse_layers(inner)))
    return model


def replace_by_dense_(model: nn.Module, names: list[str]) -> None:
    """Replace the named packed layers by dense ones; all or none."""
    packed = {name: model.get_submodule(name) for name in names}
    try:
        for name, layer in packed.items():
            assert isinstance(layer, SparseLinear)
            replace_layer_(model, name, dense_layer(layer))
    except BaseException:
        with uninterrupted():
            for name, layer in packed.items():
                replace_layer_(model, name, layer)
        raise
    describe_packed_(model)
    disband_broken_groups_(model)


def _choose(model: nn.Module, format: str, wanted: Collection[str] | None) -> tuple[dict[str, str], dict[str, str]]:
    """Return name -> format for the layers to pack, and name -> reason for those that do not fit."""
    chosen: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, layer, reason in _candidates(model):
        if wanted is not None and name not in wanted:
            continue
        if reason is not None:
            refused[name] = reason
            continue
        weight = weight_of(layer)
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"{name}: the weight holds NaN or infinity: mend it before packing")
        if format == "auto" and (grid := grid_of(layer, weight)):
            chosen[name] = grid[0]
            continue
        for format_name in _lossless() if format == "auto" else (format,):
            kind = FORMATS.get(format_name)
            if isinstance(layer, SideLinear) and not kind.holds_side:
                refused.setdefault(name, f"{format_name} holds no side branch")
                continue
            if weight.dtype not in kind.dtypes:
                refused[name] = f"no format holds {weight.dtype}: convert it, as with model.to(torch.bfloat16)"
                continue
            broken, groups = kind.count_violations(weight)
            if broken == 0:
                chosen[name] = format_name
                refused.pop(name, None)
                break
            reason = kind.describe_violations(broken, groups)
            refused[name] = f"{refused[name]}; {reason}" if name in refused else reason
            if broken < DAMAGED_SHARE * groups and share_of_zeros(weight) < MOST_ZEROS_OF_24:
                raise PatternError(
                    f"{name}: {broken:,} of {groups:,} groups of four break {format_name}, the others obey it: "
                    "something changed the weight after pruning. Apply the plan again with sparsekit.apply_, or prune "
                    "again"
                )
    return chosen, refused


def _lossless() -> list[str]:
    return [name for name, kind in FORMATS.items() if kind.lossless]


def _speak_of_sparse_layers_left_dense(model: nn.Module, refused: dict[str, str], asked: bool) -> None:
    """Name layers that have many zeros and yet are not packed: an error where the format was asked for by name."""
    shares = {name: share_of_zeros(cast(Tensor, model.get_submodule(name).weight)) for name in refused}
    sparse = [name for name, share in shares.items() if 0.25 <= share < 1]  # all zeros: an adapter yet to be trained
    if sparse and asked:
        raise PatternError(f"{sparse[0]}: {refused[sparse[0]]}. Prune it to the pattern, or use format='auto'")
    if sparse:
        warnings.warn(
            f"{len(sparse)} layers hold many zeros but stay dense, and are no faster for them; {sparse[0]}: "
            f"{refused[sparse[0]]}",
            stacklevel=3,
        )


def _candidates(model: nn.Module) -> Iterator[tuple[str, nn.Module, str | None]]:
    """Yield (name, layer, why it can never be packed) of every dense linear layer."""
    owners: Counter[int] = Counter(id(p) for module in model.modules() for p in module.parameters(recurse=False))
    places: Counter[int] = Counter(id(child) for module in model.modules() for child in module._modules.values())
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) or not name or not (isinstance(module, nn.Linear) or is_conv1d(module)):
            continue
        weight = cast(Tensor, module.weight)
        if hasattr(module, "parametrizations"):
            yield name, module, "its weight is parametrized"
        elif not is_conv1d(module) and type(module).forward not in (nn.Linear.forward, SideLinear.forward):
            yield name, module, f"its class {type(module).__name__} has a forward of its own"
        elif "NonDynamically" in type(module).__name__:
            yield name, module, "the attention around it reads its weight without calling it"
        elif weight.device.type == "meta":
            yield name, module, "its weight is on the meta device"
        elif owners[id(weight)] > 1:
            yield name, module, "its weight is shared with another module"
        elif places[id(module)] > 1:
            yield name, module, "it stands in several places of the model"
        elif not bool(weight.any()):
            yield name, module, "all its weights are zero, as in an untrained adapter, which packed could never learn"
        else:
            yield name, module, None


def share_of_zeros(weight: Tensor) -> float:
    """Return the share of exact zeros."""
    if weight.device.type == "meta":
        return 0.0
    return 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)
