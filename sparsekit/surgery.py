"""A plan made true in plain torch: the reference that everything faster is compared with."""

import warnings
from typing import TypeVar

import torch
from torch import nn

from sparsekit.errors import Unsupported
from sparsekit.nn import remember_grid_, unwrapped
from sparsekit.plan import Plan
from sparsekit.registry import unknown
from sparsekit.snapshot import restored_on_failure
from sparsekit.targets import is_linear, weight_NK

M = TypeVar("M", bound=nn.Module)


def apply_(model: M, plan: Plan) -> M:
    """Zero the weights that the plan removes, and return the model, the same object.

    Layers keep their class, dtype and device, and stay trainable. Applying twice changes nothing more; after training
    it brings the zeros back. All or nothing: whatever ends the call early leaves the model as it was.

    Warns when the method also updated kept weights (SparseGPT) and this model has non-zeros where the plan removes:
    that is as it should be after training, and means a lost update on a model that `prune_` did not run on.

    Raises:
        ValueError: the plan names layers that the model lacks, that are no linear layers or have another shape.
        Unsupported: the plan holds decisions that this version cannot apply.
    """
    for kind in ("cuts", "perms", "side"):
        if getattr(plan, kind):
            raise Unsupported(f"the plan holds {kind}, which this version does not apply: upgrade sparsekit")
    inner = unwrapped(model)
    layers = {name: _layer(inner, name, plan.masks[name].shape) for name in plan.masks}
    if plan.made_by.updates_weights:
        _warn_without_update(layers, plan)
    with torch.no_grad(), restored_on_failure(inner) as snapshot:
        for name, layer in layers.items():
            snapshot.remember(name)
            w_NK = weight_NK(layer)
            w_NK.masked_fill_(~plan.masks[name].to(w_NK.device).keep, 0)
            if name in plan.scales and plan.format is not None:
                remember_grid_(layer, plan.format, plan.scales[name])
    return model


def _layer(model: nn.Module, name: str, shape: tuple[int, int]) -> nn.Module:
    layers = dict(model.named_modules())
    if name not in layers:
        linears = [known for known, module in layers.items() if is_linear(module)]
        raise ValueError(f"the plan does not fit this model: {unknown('layer', name, linears[:20])}")
    layer = layers[name]
    if not is_linear(layer):
        raise ValueError(f"the plan's layer {name} is a {type(layer).__name__} here: unpack_ a packed model first")
    found = tuple(weight_NK(layer).shape)
    if found != shape:
        raise ValueError(f"the plan's layer {name} is {shape[0]}x{shape[1]}, and {found[0]}x{found[1]} in this model")
    return layer


def _warn_without_update(layers: dict[str, nn.Module], plan: Plan) -> None:
    for name, layer in layers.items():
        w_NK = weight_NK(layer)
        if bool((w_NK != 0).logical_and_(~plan.masks[name].to(w_NK.device).keep).any()):
            warnings.warn(
                f"{name} has non-zeros where the plan removes. Unless you trained it after prune_, the model lacks the "
                f"update that {plan.made_by.method} made to the kept weights, and will be worse: apply the plan to "
                "the model that prune_ ran on, or to one loaded from a save of it",
                stacklevel=3,
            )
            return
