"""From masked `nn.Linear` layers to packed ones that run fast, and back, bit for bit."""

import warnings
from collections.abc import Iterator
from typing import cast

import torch
import torch.nn as nn
from torch import Tensor

from sparsekit.backends import BACKENDS
from sparsekit.errors import NonFiniteError, PatternError, Unsupported
from sparsekit.formats import FORMATS
from sparsekit.hf.describe import describe_packed_, forget_packed_
from sparsekit.nn import SparseLinear, dense_layer, replace_layer_, sparse_layers
from sparsekit.progress import progress_bar

DAMAGED_SHARE = 0.05
"""A weight that breaks its pattern in fewer groups than this was 2:4 once and has been damaged: that is an error.
A dense or unstructured weight breaks it in 31 to 100 % of them."""


def pack_(model: nn.Module, format: str = "auto", backend: str = "auto", *, progress: bool = False) -> nn.Module:
    """Replace every `nn.Linear` whose weight obeys a packed format by a `SparseLinear`; return the same model.

    Needs no plan: the weights themselves say whether they fit. Each layer's dense weight is freed before the next
    one is packed. If anything fails, the layers packed so far are turned back.

    Args:
        model: any module; layers inside are replaced, and a bare `nn.Linear` cannot be.
        format: a name in `FORMATS`, which every sparse layer must then obey; or "auto", which packs the layers that
            fit one and leaves the others dense.
        backend: a name in `BACKENDS`, or "auto" for the best that runs on the layer's device.
        progress: show a bar.
    Raises:
        ValueError: unknown format or backend, or there is no layer to pack.
        PatternError: no layer fits; or one breaks the format it was meant for, by name and number of groups.
        NonFiniteError: a weight holds NaN or infinity.
        Unsupported: the named backend cannot run on this machine.
    """
    if format != "auto":
        FORMATS.get(format)
    if backend != "auto":
        BACKENDS.get(backend)
    if isinstance(model, nn.Linear):
        raise ValueError("pack_ replaces layers inside a model: for a single layer use SparseLinear.from_linear(layer)")
    chosen, refused = _choose(model, format)
    if not chosen:
        if any(isinstance(module, SparseLinear) for module in model.modules()):
            return model
        detail = "; ".join(f"{name}: {why}" for name, why in list(refused.items())[:5])
        if refused:
            raise PatternError(f"no layer fits a packed format. Prune it first, with sparsekit.prune_. {detail}")
        raise ValueError("the model has no nn.Linear layer to pack")
    _speak_of_sparse_layers_left_dense(model, refused, asked=format != "auto")
    packed: list[str] = []
    try:
        with progress_bar("packing", len(chosen), progress) as bar:
            for name, layer_format in chosen.items():
                bar.advance(0, name)
                layer = model.get_submodule(name)
                try:
                    sparse = SparseLinear.from_linear(layer, layer_format, backend)
                except (PatternError, NonFiniteError, Unsupported) as error:
                    raise type(error)(f"{name}: {error}") from None
                packed.append(name)
                replace_layer_(model, name, sparse)
                bar.advance()
        describe_packed_(model, sparse_layers(model))
    except BaseException:
        replace_by_dense_(model, [name for name in packed if name in sparse_layers(model)])
        raise
    return model


def unpack_(model: nn.Module) -> nn.Module:
    """Replace every `SparseLinear` by the dense layer it stands for, zeros included; return the same model."""
    replace_by_dense_(model, list(sparse_layers(model)))
    return model


def replace_by_dense_(model: nn.Module, names: list[str]) -> None:
    """Replace the named packed layers by dense ones."""
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLinear)
        replace_layer_(model, name, dense_layer(layer))
    remaining = sparse_layers(model)
    if remaining:
        describe_packed_(model, remaining)
    else:
        forget_packed_(model)


def _choose(model: nn.Module, format: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return name -> format for the layers to pack, and name -> reason for those that do not fit."""
    chosen: dict[str, str] = {}
    refused: dict[str, str] = {}
    for name, weight in _candidates(model):
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError(f"{name}: the weight holds NaN or infinity: mend it before packing")
        for format_name in FORMATS if format == "auto" else (format,):
            kind = FORMATS.get(format_name)
            if weight.dtype not in kind.dtypes:
                refused[name] = f"{format_name} does not hold {weight.dtype}"
                continue
            broken, groups = kind.count_violations(weight)
            if broken == 0:
                chosen[name] = format_name
                refused.pop(name, None)
                break
            refused[name] = f"{broken:,} of {groups:,} groups break {format_name}"
            if broken < DAMAGED_SHARE * groups:
                raise PatternError(
                    f"{name}: {broken:,} of {groups:,} groups of four break {format_name}, the others obey it: "
                    "something changed the weight after pruning. Apply the plan again with sparsekit.apply_, or prune "
                    "again"
                )
    return chosen, refused


def _speak_of_sparse_layers_left_dense(model: nn.Module, refused: dict[str, str], asked: bool) -> None:
    """Name layers that have many zeros and yet fit no format: an error where the format was asked for by name."""
    sparse = [name for name in refused if _share_of_zeros(model.get_submodule(name)) >= 0.25]
    if sparse and asked:
        raise PatternError(f"{sparse[0]}: {refused[sparse[0]]}. Prune it to the pattern, or use format='auto'")
    if sparse:
        warnings.warn(
            f"{len(sparse)} layers hold many zeros but stay dense, and are no faster for them; {sparse[0]}: "
            f"{refused[sparse[0]]}",
            stacklevel=3,
        )


def _share_of_zeros(layer: nn.Module) -> float:
    weight = cast(Tensor, layer.weight)
    return 1 - int(torch.count_nonzero(weight)) / max(weight.numel(), 1)


def _candidates(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, weight [N, K]) of the layers that could be packed."""
    owners: dict[int, int] = {}
    places: dict[int, int] = {}
    for module in model.modules():
        for child in module._modules.values():
            places[id(child)] = places.get(id(child), 0) + 1
        for parameter in module.parameters(recurse=False):
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    for name, module in model.named_modules():
        if isinstance(module, SparseLinear) or not name:
            continue
        is_conv1d = type(module).__name__ == "Conv1D" and hasattr(module, "nf")
        # A subclass with a forward of its own does something else with its weight, and attention modules read the
        # weight of a NonDynamicallyQuantizableLinear without calling it.
        is_linear = type(module).forward is nn.Linear.forward and "NonDynamically" not in type(module).__name__
        if not (is_linear or is_conv1d) or hasattr(module, "parametrizations"):
            continue
        weight = cast(nn.Parameter, module.weight)
        if owners.get(id(weight), 0) > 1 or places[id(module)] > 1 or weight.device.type == "meta":
            continue  # tied: an embedding or another layer needs it dense
        if not bool(weight.any()):
            continue  # an untrained adapter is all zeros; packed it could never learn
        yield name, weight.detach().t() if is_conv1d else weight.detach()
