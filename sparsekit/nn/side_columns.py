"""A side branch inside a packed weight: columns behind those of W, so that one kernel runs both, in every format.

    x' = [ x | z0 z1 0 0 | z2 z3 0 0 | … ]        z = x @ X.T, times a power of two
    W' = [ W | S0 S1 0 0 | S2 S3 0 0 | … ]        S, divided by it
    y  = x' @ W'.T + bias

Two columns of S in every four obey 2:4, and their zeros cost what the zeros of W cost: nothing but the index. W is
first filled up to a multiple of 8 columns, which the formats do anyway. With one column of S for each 16 of W, the
weight grows by an eighth, and so do its bytes.

The power of two is for formats that round on scales for a whole row: W and S then share the grid, and S, which is
smaller than W, is brought to where the grid is used best. Multiplying by it costs no accuracy.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from sparsekit_kernels.quant import GRIDS
from torch import Tensor

from sparsekit.errors import CheckpointError, NonFiniteError, Unsupported
from sparsekit.formats import Format, PackedWeight
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


@dataclass(frozen=True)
class SideColumns:
    """Where the branch lies in a packed weight.

    Attributes:
        in_features: K, columns of W.
        rank: r, columns of S.
        group: features in one sum, see `SideBranch`.
        has_X: whether X is a matrix of its own, [r, K].
    """

    in_features: int
    rank: int
    group: int
    has_X: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Return what `from_dict` needs beside K; fit for JSON."""
        return {"rank": self.rank, "group": self.group, "has_X": self.has_X}

    @classmethod
    def from_dict(cls, K: int, described: Any) -> "SideColumns":
        """Return the columns of a stored weight.

        Raises:
            CheckpointError: they are described as no such columns can be.
        """
        try:
            columns = cls(K, int(described["rank"]), int(described["group"]), bool(described["has_X"]))
        except (TypeError, KeyError, ValueError):
            columns = None
        legal = columns is not None and columns.rank > 0 and columns.group > 0
        if columns is None or not legal or not (columns.has_X or columns.rank == -(-K // columns.group)):
            raise CheckpointError(f"side={described!r} describes no branch of {K} features: fetch the checkpoint again")
        return columns

    @property
    def first(self) -> int:
        """Column where the branch begins."""
        return -(-self.in_features // 8) * 8

    @property
    def packed_features(self) -> int:
        """Columns of W', a multiple of 8: rows of x' then begin where vectors do."""
        return self.first + -(-self.rank // 4) * 8

    def parts_beside(self, dtype: torch.dtype, lossless: bool) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return name -> (shape, dtype) of what the branch has beside W': X, and what z is multiplied by.

        Args:
            dtype: of the weight.
            lossless: whether the format rounds nothing; else X has 8 bits, too.
        """
        parts: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        if self.has_X:
            parts["side_X"] = (self.rank, self.in_features), dtype if lossless else torch.int8
        if self.has_X and not lossless:
            parts["side_X_scale"] = (self.rank,), dtype
        if not lossless:
            parts["side_scale"] = (), dtype
        return parts

    def num_numbers(self, N: int) -> int:
        """How many numbers the branch of a weight with N rows stores, its zeros apart."""
        return N * self.rank + (self.rank * self.in_features if self.has_X else 0)

    def join(self, w_NK: Tensor, S: Tensor, scale: float = 1.0) -> Tensor:
        """Return W' [N, K'] of W and S / scale."""
        return torch.cat((w_NK, self._columns(S / scale)), -1)

    def split(self, w: Tensor, scale: float | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return (W [N, K], S [N, r]) of W', each in memory of its own; `scale` as in `join`."""
        columns = self.packed_features - self.first
        S = w[:, self.first :].unflatten(1, (columns // 4, 4))[..., :2].flatten(1)[:, : self.rank]
        S = S.clone(memory_format=torch.contiguous_format) if scale is None else S * scale
        return w[:, : self.in_features].clone(memory_format=torch.contiguous_format), S

    def extend(self, x: Tensor, X: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
        """Return x' [..., K'] of x [..., K].

        Raises:
            ValueError: x has other features.
        """
        if not x.dim() or x.shape[-1] != self.in_features:
            found = f"{x.shape[-1]} features" if x.dim() else "no features"
            raise ValueError(f"x has {found}, W has {self.in_features}: pass x of shape [..., {self.in_features}]")
        z = group_sums(x, self.group) if X is None else F.linear(x, X)
        return torch.cat((x, self._columns(z if scale is None else z * scale)), -1)

    def _columns(self, z: Tensor) -> Tensor:
        """Return z [..., r] as it lies behind column K: pairs, two zeros after each, and what fills up to eights."""
        if self.rank % 2:
            z = F.pad(z, (0, 1))
        columns = F.pad(z.unflatten(-1, (-(-self.rank // 2), 2)), (0, 2)).flatten(-2)
        before, after = self.first - self.in_features, self.packed_features - self.first - columns.shape[-1]
        return F.pad(columns, (before, after)) if before or after else columns


def X_of(beside: Mapping[str, Tensor | None]) -> Tensor | None:
    """Return X in the weight's dtype, from `parts_beside`; None for the block indicator."""
    X, scale = beside.get("side_X"), beside.get("side_X_scale")
    return X if X is None or scale is None else X.to(scale.dtype) * scale[:, None]


def round_X(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return X [r, K] as int8 numbers and a power of two for each row, [r] in X's dtype.

    What they stand for is exact in 16 bits, and comes out of this the same again. 127 is half used at worst.
    """
    exponent = (X.float().abs().amax(1) / 127).log2().ceil().clamp_(min=-24).to(torch.int32)
    scale = torch.ldexp(torch.ones_like(exponent, dtype=torch.float32), exponent)
    numbers = (X.float() / scale[:, None]).round().clamp_(-127, 127)
    return numbers.to(torch.int8), scale.to(X.dtype)


def pack_with_side(
    format: Format, w_NK: Tensor, branch: SideBranch, scales: Tensor | None = None
) -> tuple[PackedWeight, SideColumns, dict[str, Tensor]]:
    """Return W' in a packed format, where the branch lies in it, and what it has beside it, see `parts_beside`.

    Args:
        format: one that `holds_side`.
        w_NK: the sparse weight [N, K].
        branch: in the weight's dtype and on its device.
        scales: the grid to round to, of a weight [N, K] or of the whole [N, K']; see `Format.pack`.
    Raises:
        Unsupported: the format holds no branch.
        ValueError: the branch does not fit the weight.
        NonFiniteError: the branch holds NaN or infinity.
    """
    if not format.holds_side:
        raise Unsupported(f"{format.name} holds no side branch: use a format of 2:4 weights, as 'semi24'")
    if reason := branch.why_not(*w_NK.shape):
        raise ValueError(f"the side branch does not fit the weight: {reason}")
    if not all(bool(factor.isfinite().all()) for factor in (branch.S, branch.X) if factor is not None):
        raise NonFiniteError("the side branch holds NaN or infinity: mend it before packing")
    columns = SideColumns(w_NK.shape[1], branch.rank, branch.group, branch.X is not None)
    scale = 1.0 if format.lossless else _best_scale(format, columns, w_NK, branch, scales)
    packed = _pack(format, columns, w_NK, branch.S, scale, scales)
    if format.lossless:
        return packed, columns, {} if branch.X is None else {"side_X": branch.X.clone()}
    rounded = {} if branch.X is None else dict(zip(("side_X", "side_X_scale"), round_X(branch.X), strict=True))
    return packed, columns, {**rounded, "side_scale": w_NK.new_tensor(scale)}


def _pack(
    format: Format, columns: SideColumns, w_NK: Tensor, S: Tensor, scale: float, scales: Tensor | None
) -> PackedWeight:
    whole = columns.join(w_NK, S, scale)
    if scales is not None and scales.dim() == 2:
        own = format.pack(whole).tensors.get("scales")
        if own is not None and own.dim() == 2:  # given for W alone: the columns behind it get scales of their own
            scales = torch.cat((scales.to(own.dtype), own[:, scales.shape[1] :]), 1)
    return format.pack(whole, scales)


def _best_scale(format: Format, columns: SideColumns, w_NK: Tensor, branch: SideBranch, scales: Tensor | None) -> float:
    """Return the power of two for z with the least error of y, were x white: |W - W_q|^2 + |S - S_q|^2 * var(z).

    W is left out as far as it does not depend on the choice; where all of it does, some of the rows stand for the rest.
    """
    K, size = columns.in_features, GRIDS[format.name].columns
    var_z = branch.group if branch.X is None else float(branch.X.float().square().sum(1).mean())
    largest_w, largest_S = (
        float(part.float().abs().amax(1).mean()) if part.numel() else 0.0 for part in (w_NK, branch.S)
    )
    if not largest_w or not largest_S:
        return 1.0
    first, step = (K if size is None else K // size * size), 1
    if size is None and scales is None:
        first, step = 0, -(-len(w_NK) // _SAMPLED_ROWS)
    elif size is not None and scales is not None:
        scales = scales[:, first // size :] if scales.dim() == 2 and scales.shape[1] > first // size else None
    w, S = w_NK[::step, first:], branch.S[::step]
    tail = replace(columns, in_features=K - first)
    best, least = 1.0, math.inf
    middle, as_x = round(math.log2(largest_w / largest_S)), 0.5 * math.log2(var_z or 1.0)
    # The powers of S that could be best; of equals, the one that makes z as large as x, for kernels that round x
    for exponent in sorted(range(middle - 4, middle + 5), key=lambda power: abs(power - as_x)):
        scale = 2.0**-exponent
        rounded_w, rounded_S = tail.split(format.unpack(_pack(format, tail, w, S, scale, scales)), scale)
        error = (rounded_w.float() - w.float()).square().sum() + var_z * (rounded_S.float() - S.float()).square().sum()
        if float(error) < least:
            best, least = scale, float(error)
    return best


_SAMPLED_ROWS = 256
