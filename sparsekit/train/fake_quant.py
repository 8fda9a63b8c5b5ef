"""Weights that learn on the grid of a quantised format: what the last phase of a training run rounds to.

The forward multiplies by Q(W * m), what the packed layer will hold, and the gradient reaches the dense W unchanged
(straight-through): `FakeQuant` is the `rewrite` of a `MaskedAdamW`, which steps a dense W and writes the parameter from
it. So the weights settle where rounding them costs least, and packing them to the format changes none.

Scales are chosen anew at each write, for the least sum of squared errors, and from the dense weights alone: a resumed
run needs no others, and a rank that holds some of the rows no others either. A branch beside the weight is packed as
further columns of it (`sparsekit.nn.side_columns`), and rounded here as just these.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from sparsekit_kernels.quant import GRIDS
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from sparsekit.errors import Unsupported
from sparsekit.formats import FORMATS
from sparsekit.methods.grid import is_quantised, round_to_nearest
from sparsekit.nn.side import SideLinear
from sparsekit.nn.side_columns import SideColumns, pack_with_side, round_X
from sparsekit.plan import SideBranch
from sparsekit.train.optimizer import MaskedAdamW, local_part, whole


@dataclass(frozen=True)
class BranchGrid:
    """Where a branch lies in the packed weight, which says on what grid.

    Attributes:
        columns: behind those of the weight.
        z_scale: power of two that S is divided by before it is rounded. It stays what it was in the beginning.
    """

    columns: SideColumns
    z_scale: float

    @classmethod
    def of(cls, format: str, kept_NK: Tensor, branch: SideBranch) -> "BranchGrid":
        """Return what packing would choose for a weight and its branch, all of their rows."""
        _, columns, beside = pack_with_side(FORMATS.get(format), kept_NK, branch)
        return cls(columns, float(beside["side_scale"]))


class FakeQuant:
    """Rounds kept weights, and the branches beside them, to nearest on the grid of a format; a `Rewrite`.

    Attributes:
        format: a quantised one.
        branches: layer name -> grid of its branch, of the layers that have one.
        scales: layer name -> scales of its weight, with those of its branch, as the format stores them; from the last
            call.
    """

    def __init__(self, format: str, branches: Mapping[str, BranchGrid] | None = None) -> None:
        """Begin with no scales.

        Raises:
            ValueError: the format rounds nothing.
        """
        FORMATS.check(format)
        if not is_quantised(format):
            raise ValueError(f"format={format!r} rounds nothing: use a quantised one, as 'semi24_int4'")
        self.format, self.branches = format, dict(branches or {})
        self.scales: dict[str, Tensor] = {}

    def whole_scales(self, optimizer: MaskedAdamW) -> dict[str, Tensor]:
        """Return `scales` put together from all ranks, on the CPU; where weights are sharded, all must call this."""
        found = {}
        for name, parameter, _ in optimizer.masked():
            scales = self.scales.get(name)
            if isinstance(parameter, DTensor):
                N, K = parameter.shape
                if name in self.branches:
                    K = self.branches[name].columns.packed_features
                shape = GRIDS[self.format].scale_shape(N, K)
                if scales is None:  # none of the rows is here
                    dtype = GRIDS[self.format].scale_dtype
                    scales = torch.empty((0, *shape[1:]), dtype=dtype, device=parameter.device)
                stride = (1,) if len(shape) == 1 else (shape[1], 1)
                mesh, placements = parameter.device_mesh, parameter.placements
                size = torch.Size(shape)
                scales = DTensor.from_local(scales, mesh, placements, run_check=False, shape=size, stride=stride)
                scales = scales.full_tensor()
            assert scales is not None
            found[name] = scales.cpu()
        return found

    def __call__(
        self, name: str, kept_NK: Tensor, keep_NK: Tensor, branch: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the weight and the branch, rounded.

        Args:
            name: of the layer.
            kept_NK: W * m, fp32 [N, K]; all rows, or those of one rank.
            keep_NK: m, boolean.
            branch: `side_S` [N, r], and `side_X` [r, K] unless it is the block indicator, fp32; rows as of the weight.
        """
        K = kept_NK.shape[1]
        if name not in self.branches:
            rounded, self.scales[name] = round_to_nearest(kept_NK, keep_NK, self.format, kept_NK.new_ones(K))
            return rounded, {}
        columns, z_scale = self.branches[name].columns, self.branches[name].z_scale
        whole = columns.join(kept_NK, branch["side_S"], z_scale)
        of_z = kept_NK.new_full((1, columns.rank), columns.group * z_scale**2)  # z sums that many features
        costs = columns.join(kept_NK.new_ones(1, K), of_z)[0]
        rounded, self.scales[name] = round_to_nearest(whole, whole != 0, self.format, costs)
        w_NK, S = columns.split(rounded, z_scale)
        written = {"side_S": S}
        if "side_X" in branch:
            written["side_X"] = _rounded(branch["side_X"])
        return w_NK, written


def begin_rounding_(
    optimizer: MaskedAdamW,
    format: str,
    layers: Mapping[str, SideLinear],
    z_scales: Mapping[str, float] | None = None,
) -> FakeQuant:
    """Let the optimizer write weights and branches on the grid of a format from now on; return what rounds them.

    Where they are sharded, every rank must call this.

    Args:
        layers: those with a branch, by name. An X that is not trained is rounded here, once.
        z_scales: of a run that is resumed, `BranchGrid.z_scale` by name of the layer.
    Raises:
        Unsupported: a weight is sharded along its input features, and scales are for whole rows.
    """
    for name, parameter, transposed in optimizer.masked():
        if isinstance(parameter, DTensor) and Shard(0 if transposed else 1) in parameter.placements:
            raise Unsupported(
                f"{name} is sharded along in_features, and {format} has scales for whole rows: use DDP, or leave "
                "format out"
            )
    branches = {}
    for name, layer in layers.items():
        X = layer.side_X
        branch = SideBranch(whole(layer.side_S.detach()), None if X is None else whole(X.detach()), layer.group)
        grid = BranchGrid.of(format, whole(layer.weight.detach()), branch)
        branches[name] = grid if z_scales is None else replace(grid, z_scale=z_scales[name])
        if X is not None and not X.requires_grad:
            held = local_part(X.detach())
            held.copy_(_rounded(held))
    if z_scales is None:
        optimizer.catch_up_()
    optimizer.rewrite = rounding = FakeQuant(format, branches)
    optimizer.write_()
    return rounding


def _rounded(X: Tensor) -> Tensor:
    """Return X [r, K] as it is packed."""
    numbers, scale = round_X(X)
    return numbers.to(scale.dtype) * scale[:, None]
