"""What NutePrune leaves: a plan of cuts, what goes made dead in the model, and the family of models of one run."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparsekit.interrupt import uninterrupted
from sparsekit.nn import SideLinear, replace_layer_, side_layers
from sparsekit.nn.side import without_branch
from sparsekit.plan import Plan
from sparsekit.shorten import silence_
from sparsekit.snapshot import Snapshot
from sparsekit.surgery import apply_
from sparsekit.targets import weight_NK
from sparsekit.train.adapters import add_lora, as_side_, merge_
from sparsekit.train.gates import Gates, Masks
from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_student import Member


@torch.no_grad()
def deaden_(model: nn.Module, gates: Gates, masks: Masks, batch: Mapping[str, Tensor]) -> list[str]:
    """Write zeros where the model reads what goes, and return what a reader of the plan must know.

    Args:
        model: plain, in its full shapes, LoRA in its weights.
        batch: to see whether layers that go pass on their input.
    """
    notes = []
    for name, blocks in gates.layers.items():
        dropped = [block for block, stays in zip(blocks, masks[name].tolist(), strict=True) if not stays]
        alive = [block for block in dropped if not silence_(model, block, dict(batch), Snapshot(model))]
        if alive:
            notes.append(f"{alive[0]} cannot pass on its input by zeros in its weights: apply_ takes it out")
    for width in gates.widths:
        columns = width.columns_of(_gone(masks[width.name]))
        reader = model.get_submodule(width.name)
        weight_NK(reader)[:, columns.to(weight_NK(reader).device)] = 0
        if isinstance(reader, SideLinear) and reader.side_X is not None:
            reader.side_X[:, columns.to(reader.side_X.device)] = 0
    if gates.stream is not None:
        gone = _gone(masks[gates.stream.embedding])
        table = model.get_submodule(gates.stream.embedding).get_parameter("weight")
        table[:, gone.to(table.device)] = 0
        for writer in gates.stream.writers:
            layer = model.get_submodule(writer)
            weight_NK(layer)[gone.to(weight_NK(layer).device)] = 0
            if isinstance(bias := layer._parameters.get("bias"), Tensor):
                bias[gone.to(bias.device)] = 0
    return notes


def settle_(
    adapted: Any, args: NutePruneConfig, gates: Gates | None, masks: Masks, plan: Plan, batch: Mapping[str, Tensor]
) -> nn.Module:
    """Return the plain model with its LoRA in the weights or beside them, and what goes dead; the same object.

    Raises:
        NonFiniteError: the LoRA holds NaN or infinity. Nothing was changed.
    """
    with uninterrupted():
        model = merge_(adapted) if args.merge_lora else as_side_(adapted, plan)
        if gates is not None:
            plan.notes += deaden_(model, gates, masks, batch)
    return model


class Family(Mapping[float, tuple[Plan, nn.Module]]):
    """The models of one run, by the sparsity that was asked for: each a plan, and a model that is cut to it.

    Each is made when it is asked for, from a copy of the dense model on the CPU, so only those that you hold take
    memory beside that.
    """

    def __init__(
        self,
        model: nn.Module,
        args: NutePruneConfig,
        gates: Gates | None,
        plan: Plan,
        members: Mapping[float, Member],
        dense: Mapping[str, Tensor],
        batch: Mapping[str, Tensor],
    ) -> None:
        self._args, self._gates, self._plan = args, gates, plan
        self._members, self._batch = members, batch
        self._device = next(model.parameters()).device
        self._dense = _copy_with(model, dense) if members else model

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[float]:
        return iter(self._members)

    def __getitem__(self, sparsity: float) -> tuple[Plan, nn.Module]:
        member, model = self._members[sparsity], copy.deepcopy(self._dense).to(self._device)
        adapted = add_lora(model, self._args)
        with torch.no_grad():
            parameters = dict(adapted.named_parameters(remove_duplicate=False))
            for name, value in member.lora.items():
                parameters[name].copy_(value)
        plan = self.plan(sparsity)
        model = settle_(adapted, self._args, self._gates, member.projected.masks, plan, self._batch)
        return plan, apply_(model, plan).eval()

    def plan(self, sparsity: float) -> Plan:
        """Return the plan of one of the models, which takes no memory to speak of."""
        member = self._members[sparsity]
        assert self._gates is not None
        made_by = replace(self._plan.made_by, config={**self._plan.made_by.config, "sparsity": sparsity})
        return Plan(
            made_by=made_by,
            notes=list(dict.fromkeys([*self._plan.notes, *member.projected.notes])),
            cuts=self._gates.cuts(member.projected.masks),
        )


def _copy_with(model: nn.Module, dense: Mapping[str, Tensor]) -> nn.Module:
    """Return a copy of a model on the CPU, with these parameters, and without side branches."""
    own: dict[int, Any] = {}
    for name, parameter in model.named_parameters():
        value = dense[name] if name in dense else parameter.detach().to("cpu", copy=True)
        own[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
    for buffer in model.buffers():
        own[id(buffer)] = buffer.detach().to("cpu", copy=True)
    copied = copy.deepcopy(model, own)  # what is in the memo is taken for the copy
    for name, layer in side_layers(copied).items():
        replace_layer_(copied, name, without_branch(layer))
    return copied


def _gone(mask: Tensor) -> Tensor:
    """Return the units that a boolean mask closes, int64, on the CPU."""
    return (~mask.cpu()).nonzero().flatten()
