"""The canonical 2:4 layout, bit by bit.

A weight W [N, K] in which every group of four consecutive entries of a row has at most two non-zeros is stored as

    values [N, Kp/2]        the two slots of each group, in the dtype of W, ascending in k
    meta   [N, Kp/8] uint8  one nibble per group, the lower nibble is the earlier group

with Kp = K rounded up to a multiple of 8 (the padding is zeros). For the group g of row n, the nibble is

    nibble = idx0 | idx1 << 2,   0 <= idx0 < idx1 <= 3
    W[n, 4g + idx0] = values[n, 2g],   W[n, 4g + idx1] = values[n, 2g + 1],   zero elsewhere,

which is the order of NVIDIA's `mma.sp`; read as int16 [N, Kp/16] the same bytes are its 16-bit metadata.

Six nibbles are legal: 4 (0,1), 8 (0,2), 9 (1,2), 12 (0,3), 13 (1,3), 14 (2,3).

Filler. A group with fewer than two non-zeros fills its free slots with +0.0 at its *highest* free positions: an empty
group is (2,3), a lone non-zero at i < 3 is (i,3), a lone non-zero at 3 is (2,3). -0.0 counts as zero. So the layout
is a function of the dense weight alone, and equal weights have equal bytes.

16-bit values cost 9 bits per dense weight (9/16 of dense), 32-bit values 17 (17/32).
"""

import torch
from torch import Tensor

GROUP = 4
LEGAL_NIBBLES = (4, 8, 9, 12, 13, 14)


def padded_features(K: int) -> int:
    """Return Kp, the number of columns that are stored for K input features."""
    return (K + 7) // 8 * 8


def count_violations(w_NK: Tensor) -> int:
    """Return how many groups of four hold more than two non-zeros (a trailing partial group counts as one)."""
    nonzero = _groups(w_NK != 0).contiguous()
    # The four bytes 0/1 of a group, read as one int32 and multiplied by 0x01010101, have their sum in the top byte.
    sums = nonzero.view(torch.int32).mul_(0x01010101).bitwise_right_shift_(24)
    return int((sums > 2).sum())


def compress24(w_NK: Tensor) -> tuple[Tensor, Tensor]:
    """Return (values [N, Kp/2], meta [N, Kp/8]) of a weight that obeys 2:4; exact.

    Raises:
        ValueError: `w_NK` is not a matrix, or some group has more than two non-zeros.
    """
    if w_NK.dim() != 2:
        raise ValueError(f"compress24 takes a matrix [N, K], got shape {tuple(w_NK.shape)}")
    broken = count_violations(w_NK)
    if broken:
        raise ValueError(f"{broken} groups of four have more than two non-zeros: prune the weight to 2:4 first")
    N, K = w_NK.shape
    groups = _groups(w_NK)  # [N, G, 4]
    filled = _fill(groups != 0)
    first = _position(filled, 0)
    second = _position(filled, 1)
    slots = torch.stack((first, second), dim=-1)
    # As integers, since some float paths of torch normalise NaN. -0.0 is a zero like any other.
    values = _bits(groups).masked_fill(groups == 0, 0).gather(-1, slots.long()).view(w_NK.dtype)
    nibbles = (first | second << 2).view(N, padded_features(K) // 8, 2)
    meta = nibbles[..., 0] | nibbles[..., 1] << 4
    return values.reshape(N, padded_features(K) // 2).contiguous(), meta.contiguous()


def decompress24(values: Tensor, meta: Tensor, K: int | None = None) -> Tensor:
    """Return the dense weight [N, K]; the exact inverse of `compress24`. K defaults to all stored columns."""
    N, half = values.shape
    nibbles = torch.stack((meta & 15, meta >> 4), dim=-1).view(N, half // 2)
    slots = torch.stack((nibbles & 3, nibbles >> 2), dim=-1).long()
    bits = _bits(values.contiguous().view(N, half // 2, 2))
    dense = torch.zeros(N, half // 2, GROUP, dtype=bits.dtype, device=values.device)
    dense = dense.scatter_(-1, slots, bits).view(N, half * 2).view(values.dtype)
    return dense if K is None or K == half * 2 else dense[:, :K].contiguous()


def count_illegal_nibbles(meta: Tensor) -> int:
    """Return how many nibbles of `meta` are none of the six legal ones (a damaged or foreign file)."""
    legal = torch.zeros(16, dtype=torch.bool, device=meta.device)
    legal[list(LEGAL_NIBBLES)] = True
    both = legal[:, None] & legal[None, :]  # [high, low]
    bad_bytes = ~both.view(256)
    if not bool(bad_bytes[meta.int()].any()):
        return 0
    return int((~legal[(meta & 15).int()]).sum() + (~legal[(meta >> 4).int()]).sum())


def _bits(x: Tensor) -> Tensor:
    """View floats as the integers of their width."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _groups(w_NK: Tensor) -> Tensor:
    """View a matrix as [N, Kp/4, 4], padding the columns with zeros where needed."""
    N, K = w_NK.shape
    Kp = padded_features(K)
    if Kp != K:
        w_NK = torch.nn.functional.pad(w_NK, (0, Kp - K))
    return w_NK.reshape(N, Kp // GROUP, GROUP)


def _fill(nonzero: Tensor) -> Tensor:
    """Add the highest free positions of each group until exactly two are taken."""
    taken = nonzero.clone()
    count = nonzero.sum(-1, dtype=torch.int8)
    for position in (3, 2, 1, 0):
        add = (count < 2) & ~taken[..., position]
        taken[..., position] |= add
        count += add
    return taken


def _position(taken: Tensor, rank: int) -> Tensor:
    """Return, as uint8, the position of the rank-th taken entry of each group."""
    seen = taken.cumsum(-1, dtype=torch.int8)
    hit = taken & (seen == rank + 1)
    weights = torch.arange(GROUP, dtype=torch.uint8, device=taken.device)
    return (hit * weights).sum(-1, dtype=torch.uint8)
