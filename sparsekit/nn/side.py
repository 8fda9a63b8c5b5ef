"""A linear layer with a low-rank branch beside it (SLoRB): y = x @ W.T + bias + z @ S.T, z = x @ X.T.

X is the block indicator, X_ij = 1 where input j lies in group i of `group` consecutive ones, unless it is given as a
matrix of its own. The indicator is never formed: its z are the sums of the groups, a reshape and a sum. The branch
gives back a part of what a mask took: the same S_ni for every input of group i. See `sparsekit.train.lowrank` for S.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from sparsekit.nn.replace import replace_layer_
from sparsekit.nn.sparse_linear import SparseLinear
from sparsekit.plan import SideBranch


def group_sums(x: Tensor, group: int) -> Tensor:
    """Return the sums of `group` consecutive features each, x @ X.T for the block indicator X.

    Args:
        x: floating [..., K].
    Returns:
        [..., ceil(K / group)] in x's dtype, summed in fp32 at least; the last group may be shorter.
    """
    ragged = -x.shape[-1] % group
    if ragged:
        x = F.pad(x, (0, ragged))
    return x.unflatten(-1, (x.shape[-1] // group, group)).sum(-1)  # torch sums 16-bit numbers in fp32


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
    def from_linear(cls, linear: nn.Module, branch: SideBranch) -> "SideLinear":
        """Return the layer with this branch; the parameters of an `nn.Linear` are taken over, not copied.

        Args:
            linear: `nn.Linear`, transformers' `Conv1D`, or a `SideLinear`, whose branch is then replaced.
            branch: brought to the device and dtype of the weight.
        Raises:
            ValueError: the branch does not fit the weight, or the layer is of a class that cannot take one.
        """
        if reason := _why_no_branch(linear):
            raise ValueError(f"a {type(linear).__name__} cannot take a side branch: {reason}")
        weight = linear.get_parameter("weight")
        source = getattr(linear, "source", "Linear")
        if not isinstance(linear, nn.Linear):
            weight, source = nn.Parameter(weight.detach().T.contiguous(), weight.requires_grad), "Conv1D"
        N, K = weight.shape
        if reason := branch.why_not(N, K):
            raise ValueError(f"the side branch does not fit the layer: {reason}")
        rank = None if branch.X is None else branch.rank
        layer = cls(K, N, bias=False, group=branch.group, rank=rank, source=source, device="meta")
        layer.weight = weight
        layer.register_parameter("bias", linear._parameters["bias"])
        layer.side_S = nn.Parameter(branch.S.detach().to(weight.device, weight.dtype, copy=True))
        if branch.X is not None:
            layer.side_X = nn.Parameter(branch.X.detach().to(weight.device, weight.dtype, copy=True))
        return layer.train(linear.training)

    @property
    def rank(self) -> int:
        """Columns of S."""
        return self.side_S.shape[1]

    @property
    def branch(self) -> SideBranch:
        """A copy of the branch as it is now."""
        X = None if self.side_X is None else self.side_X.detach().clone()
        return SideBranch(self.side_S.detach().clone(), X, self.group)

    def reduce(self, x: Tensor) -> Tensor:
        """Return z [..., r], what the branch multiplies by S, for x [..., K]."""
        return group_sums(x, self.group) if self.side_X is None else F.linear(x, self.side_X)

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight, self.bias) + F.linear(self.reduce(input), self.side_S)

    def merged_weight(self) -> Tensor:
        """Return W + S X [N, K] in the weight's dtype, summed in fp32: one dense matrix that does what both do."""
        S = self.side_S.detach().float()
        if self.side_X is None:
            product = S.repeat_interleave(self.group, dim=1)[:, : self.in_features]
        else:
            product = S @ self.side_X.detach().float()
        return (self.weight.detach().float() + product).to(self.weight.dtype)

    def extra_repr(self) -> str:
        X = "trained" if self.side_X is not None else f"sums of {self.group}"
        return f"{super().extra_repr()}, side rank={self.rank}, X={X}"


def _why_no_branch(layer: nn.Module) -> str | None:
    """Return why no branch can stand beside this layer's weight, or None if one can."""
    if isinstance(layer, SparseLinear):
        return "it is packed, call sparsekit.unpack_(model) first"
    if hasattr(layer, "parametrizations"):
        return "its weight is parametrized"
    if "NonDynamically" in type(layer).__name__:
        return "the attention around it reads its weight without calling it"
    if isinstance(layer, nn.Linear):
        own = type(layer).forward not in (nn.Linear.forward, SideLinear.forward)
        return "its class has a forward of its own" if own else None
    return None if type(layer).__name__ == "Conv1D" else "it is no linear layer"


def side_layers(model: nn.Module) -> dict[str, SideLinear]:
    """Return qualified name -> layer with a side branch that is not packed."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SideLinear)}


def side_branches(model: nn.Module) -> dict[str, SideBranch]:
    """Return qualified name -> copy of the branch as it is now, for `Plan.side` after training."""
    return {name: layer.branch for name, layer in side_layers(model).items()}


def install_side_(model: nn.Module, name: str, branch: SideBranch) -> SideLinear:
    """Put a branch beside the linear layer `name`, in the place of one that it may have; return the new layer.

    Weight and bias stay the same parameters, those of a `Conv1D` apart, whose weight is turned.

    Raises:
        ValueError: the branch does not fit the layer.
    """
    try:
        layer = SideLinear.from_linear(model.get_submodule(name), branch)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    replace_layer_(model, name, layer)
    return layer
