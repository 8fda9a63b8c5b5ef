"""A linear layer with a low-rank branch beside it (SLoRB): y = x @ W.T + bias + z @ S.T, z = x @ X.T.

X is the block indicator, X_ij = 1 where input j lies in group i of `group` consecutive ones, unless it is given as a
matrix of its own. The indicator is never formed: its z are the sums of the groups, a reshape and a sum. The branch
gives back a part of what a mask took: the same S_ni for every input of group i. See `sparsekit.train.lowrank` for S.
"""

import copy
import warnings
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sparsekit.nn.places import plain_layer, replace_layer_
from sparsekit.nn.side_columns import group_sums
from sparsekit.plan import SideBranch

STORED_WEIGHT = "side_W"
"""Name of the weight beside a branch in a checkpoint of transformers, see `sparsekit.hf.branches`."""


def block_indicator(K: int, group: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return X [ceil(K / group), K]: 1 where a feature lies in the group, for an X that is to be trained."""
    groups = torch.arange(K) // group
    return (groups == torch.arange(-(-K // group))[:, None]).to(dtype)


class SideLinear(nn.Linear):
    """`nn.Linear` with a low-rank branch beside its weight; y = x @ W.T + bias + z @ S.T.

    Attributes:
        side_S: parameter [N, r].
        side_X: parameter [r, K]; None for the frozen block indicator, with r = ceil(K / group).
        group: features in one sum.
        source: class of the layer this one stands for, "Linear" or "Conv1D", which stores its weight transposed; here
            it is [N, K] always.
    """

    weight: nn.Parameter
    side_S: nn.Parameter
    side_X: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        group: int = 16,
        rank: int | None = None,
        source: str = "Linear",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        """Build a layer whose branch adds nothing yet.

        Args:
            rank: of a branch that has an X of its own; None for the frozen block indicator.
        """
        super().__init__(in_features, out_features, bias, device, dtype)
        if group < 1:
            raise ValueError(f"group={group} is no number of features: use 1 or more, as 16")
        self.group, self.source = group, source
        r = -(-in_features // group) if rank is None else rank
        self.side_S = nn.Parameter(torch.zeros(out_features, r, device=device, dtype=dtype))
        if rank is None:
            self.register_parameter("side_X", None)
        else:
            self.side_X = nn.Parameter(torch.zeros(r, in_features, device=device, dtype=dtype))

    @classmethod
    def from_linear(cls, linear: nn.Module, branch: SideBranch, source: str | None = None) -> "SideLinear":
        """Return the layer with this branch; the parameters of an `nn.Linear` are taken over, not copied.

        Args:
            linear: `nn.Linear`, transformers' `Conv1D`, or a `SideLinear`, whose branch is then replaced.
            branch: copied to the device and dtype of the weight.
            source: class of the layer that this one stands for, where that is not `linear`'s.
        Raises:
            ValueError: the branch does not fit the weight, or the layer is of a class that cannot take one.
        """
        if reason := why_no_branch(linear):
            raise ValueError(f"a {type(linear).__name__} cannot take a side branch: {reason}")
        weight = linear.get_parameter("weight")
        own_source = linear.source if isinstance(linear, SideLinear) else "Linear"
        if not isinstance(linear, nn.Linear):
            weight, own_source = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad), "Conv1D"
        N, K = weight.shape
        if reason := branch.why_not(N, K):
            raise ValueError(f"the side branch does not fit the layer: {reason}")
        rank = None if branch.X is None else branch.rank
        layer = cls(K, N, bias=False, group=branch.group, rank=rank, source=source or own_source, device="meta")
        layer.weight = weight
        layer.register_parameter("bias", linear._parameters["bias"])
        vars(layer).update({key: value for key, value in vars(linear).items() if key == "_sparsekit_grid"})
        layer.side_S = _copy_like(branch.S, weight)
        layer.side_X = None if branch.X is None else _copy_like(branch.X, weight)
        return layer.train(linear.training)

    @property
    def rank(self) -> int:
        """Columns of S."""
        return self.side_S.shape[1]

    @property
    def branch(self) -> SideBranch:
        """The branch as it is now; its tensors are the parameters'."""
        return SideBranch(self.side_S.detach(), None if self.side_X is None else self.side_X.detach(), self.group)

    def reduce(self, x: Tensor) -> Tensor:
        """Return z [..., r], what the branch multiplies by S, for x [..., K]."""
        return group_sums(x, self.group) if self.side_X is None else F.linear(x, self.side_X)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + F.linear(self.reduce(input), self.side_S)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Load, also from what `save_pretrained` wrote, as a trainer does that resumes."""
        if prefix + STORED_WEIGHT in state_dict:
            state_dict[prefix + "weight"] = state_dict.pop(prefix + STORED_WEIGHT)
        elif (found := state_dict.get(prefix + "weight")) is not None and not found.numel():  # it is in another file
            del state_dict[prefix + "weight"]
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        X = "trained" if self.side_X is not None else f"sums of {self.group}"
        return f"{super().extra_repr()}, side rank={self.rank}, X={X}"


def why_no_branch(layer: nn.Module) -> str | None:
    """Return why no branch can stand beside this layer's weight, or None if one can."""
    if any(base.__name__ == "SparseLinear" for base in type(layer).__mro__):
        return "it is packed, call sparsekit.unpack_(model) first"
    if hasattr(layer, "parametrizations"):
        return "its weight is parametrized"
    if "NonDynamically" in type(layer).__name__:
        return "the attention around it reads its weight without calling it"
    if isinstance(layer, nn.Linear):
        own = type(layer).forward not in (nn.Linear.forward, SideLinear.forward)
        return "its class has a forward of its own" if own else None
    return None if type(layer).__name__ == "Conv1D" else "it is no linear layer"


def _copy_like(factor: Tensor, weight: nn.Parameter) -> nn.Parameter:
    """Return a factor of the branch as a parameter of its own beside this weight."""
    return nn.Parameter(factor.detach().to(weight.device, weight.dtype, copy=True), weight.requires_grad)


def side_layers(model: nn.Module) -> dict[str, SideLinear]:
    """Return qualified name -> layer with a side branch that is not packed."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SideLinear)}


def side_branches(model: nn.Module) -> dict[str, SideBranch]:
    """Return qualified name -> copy of the branch as it is now, for `Plan.side` after training."""
    return {name: copy.deepcopy(layer.branch) for name, layer in side_layers(model).items()}


def install_side_(model: nn.Module, name: str, branch: SideBranch) -> SideLinear:
    """Put a branch beside the linear layer `name`, in the place of one that it may have; return the new layer.

    Weight and bias stay the same parameters, but for the weight of a `Conv1D`, which is turned.

    Raises:
        ValueError: the branch does not fit the layer, or the layer stands in several places of the model.
    """
    old = model.get_submodule(name)
    if sum(child is old for module in model.modules() for child in module._modules.values()) > 1:
        raise ValueError(f"{name}: the layer stands in several places of the model, a branch would stand in one")
    try:
        layer = SideLinear.from_linear(old, branch)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    replace_layer_(model, name, layer)
    return layer


def without_branch(layer: SideLinear) -> nn.Module:
    """Return the layer without its branch: an `nn.Linear` with the very same parameters, or a `Conv1D`."""
    return plain_layer(layer.weight, layer.bias, layer.source).train(layer.training)


def merged_layer(layer: SideLinear) -> nn.Module:
    """Return a plain layer that does what weight and branch do together: its weight is W + S X, summed in fp32."""
    S = layer.side_S.detach().float()
    if layer.side_X is None:
        product = S.repeat_interleave(layer.group, dim=1)[:, : layer.in_features]
    else:
        product = S @ layer.side_X.detach().float()
    merged = (layer.weight.detach().float() + product).to(layer.weight.dtype)
    return plain_layer(nn.Parameter(merged, layer.weight.requires_grad), layer.bias, layer.source).train(layer.training)


def merge_side_(model: nn.Module) -> list[str]:
    """Fold every side branch into the weight beside it, W + S X, and return the names of these layers.

    Their weights are dense again, as it warns: nothing is left to pack. For tools that know no branches; layers that
    are packed with a branch must be unpacked before.
    """
    layers = side_layers(model)
    for name, merged in {name: merged_layer(layer) for name, layer in layers.items()}.items():
        replace_layer_(model, name, merged)
    if layers:
        warnings.warn(f"{len(layers)} layers are dense again, their side branches in their weights", stacklevel=2)
    return list(layers)
