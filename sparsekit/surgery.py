"""A plan made true in plain torch: the reference that everything faster is compared with."""

import warnings
from typing import TypeVar

import torch
from torch import nn

from sparsekit.archs import find_couplings, fold_order_
from sparsekit.nn import install_side_, remember_grid_, side_layers, unwrapped
from sparsekit.plan import Plan, SideBranch
from sparsekit.registry import unknown
from sparsekit.slicing import cut_
from sparsekit.snapshot import Snapshot, restored_on_failure
from sparsekit.targets import is_linear, weight_NK

M = TypeVar("M", bound=nn.Module)


def apply_(model: M, plan: Plan) -> M:
    """Zero the weights that the plan removes, put its side branches beside them, and return the model, the same object.

    What the plan cuts goes first: layers, then heads and channels, with the rows that make them and the columns that
    read them; the config says what is left. Then, where the plan has an order of inputs, those are put into it, with
    what produces them.

    Layers keep their parameters, dtype and device, and stay trainable; those with a branch become `SideLinear`.
    Applying twice changes nothing more; after training it brings the zeros back, and leaves a branch as training made
    it. All or nothing: whatever ends the call early leaves the model as it was.

    Layers that are cut get new parameters, so cut before making an optimizer.

    Warns when the method also updated kept weights (SparseGPT) and this model has non-zeros where the plan removes:
    that is as it should be after training, and means a lost update on a model that `prune_` did not run on. Warns when
    a layer has another branch already, and keeps that.

    Raises:
        ValueError: the plan names layers that the model lacks, that are no linear layers or have another shape; or
            its branches do not fit.
        Unsupported: the plan cuts what cannot be cut in a model of this family.
    """
    plan.check_cuts()
    plan.check_side()
    plan.check_perms()
    inner = unwrapped(model)
    with torch.no_grad(), restored_on_failure(inner) as snapshot:
        alive = cut_(inner, plan.cuts, snapshot)
        if alive and plan.made_by.updates_weights:
            _warn_without_refit(alive[0], plan)
        layers = {name: _layer(inner, name, plan.masks[name].shape) for name in plan.masks}
        if plan.made_by.updates_weights:
            _warn_without_update(layers, plan)
        _put_in_order_(inner, plan, snapshot)
        for name, layer in layers.items():
            snapshot.remember(name)
            w_NK = weight_NK(layer)
            w_NK.masked_fill_(~plan.masks[name].to(w_NK.device).keep, 0)
            if name in plan.scales and plan.format is not None:
                remember_grid_(layer, plan.format, plan.scales[name])
        _install_branches_(inner, plan)
    return model


def reorder_(model: M, plan: Plan) -> M:
    """Put the inputs of layers into the order that the plan has them in, and return the model, the same object.

    What produces them is reordered, too, so that the model computes what it did, and no weight is removed: for training
    that is to start from the plan. All or nothing, as `apply_`, which does this first.

    Raises:
        ValueError: the plan is of another architecture.
    """
    plan.check_perms()
    inner = unwrapped(model)
    with torch.no_grad(), restored_on_failure(inner) as snapshot:
        _put_in_order_(inner, plan, snapshot)
    return model


def _put_in_order_(model: nn.Module, plan: Plan, snapshot: Snapshot) -> None:
    """Put the inputs of layers into the plan's order, where they are not yet in it."""
    if not plan.perms:
        return
    couplings = {name: coupling for coupling in find_couplings(model) for name in coupling.consumers}
    for name, perm in plan.perms.items():
        coupling = couplings.get(name)
        if coupling is not None and perm.is_in(weight_NK(model.get_submodule(name))):
            continue
        if coupling is None or not coupling.can_permute:  # a side branch that sums inputs in groups forbids it, too
            raise ValueError(
                f"the plan puts the inputs of {name} into another order, and what produces them cannot be found in "
                "this model: apply the plan to a model of the architecture that it was made for"
            )
        channels = coupling.channel_order(perm.order)
        for part in (*coupling.consumers, *(producer.name for producer in coupling.producers)):
            snapshot.remember(part)
        fold_order_(model, coupling, channels)


def _install_branches_(model: nn.Module, plan: Plan) -> None:
    """Put the plan's side branches beside the layers that have none yet."""
    present = side_layers(model)
    for name, branch in plan.side.items():
        if name not in present:
            install_side_(model, name, branch)
    trained = [name for name in present if name in plan.side and not _is_like(present[name].branch, plan.side[name])]
    if trained:
        warnings.warn(
            f"{len(trained)} layers keep the side branch that they have, which is not the plan's, as {trained[0]}: "
            "trained since, one hopes. sparsekit.nn.install_side_ puts the plan's in its place",
            stacklevel=3,
        )


def _is_like(found: SideBranch, planned: SideBranch) -> bool:
    """Whether a layer's branch is the planned one, in the layer's dtype and on its device."""
    X = None if planned.X is None else planned.X.to(found.S)
    return found == SideBranch(planned.S.to(found.S), X, planned.group)


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


def _warn_without_refit(name: str, plan: Plan) -> None:
    warnings.warn(
        f"{name} still reads or writes what the plan cuts. Unless you trained it after prune_, the model lacks the "
        f"refit that {plan.made_by.method} made of what is left, and will be worse: apply the plan to the model that "
        "prune_ ran on, or to one loaded from a save of it",
        stacklevel=3,
    )


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
