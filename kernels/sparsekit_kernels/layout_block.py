"""The canonical block-sparse layout, bit by bit.

A weight W [N, K] is cut into blocks of BN x BK: NB = ceil(N / BN) block rows of KB = ceil(K / BK) blocks each.
The blocks that hold a non-zero are stored, the others are zero:

    values       [S, BN, BK]      the stored blocks in the dtype of W, block row by block row, ascending in k
    columns      [S]      int32   the block column of each, in 0 .. KB - 1
    row_pointers [NB + 1] int32   where each block row begins in the two above; the last entry is S

    W[BN * r + i, BK * columns[s] + j] = values[s, i, j]     for row_pointers[r] <= s < row_pointers[r + 1]

Blocks that reach beyond N or K are filled with +0.0 there. -0.0 counts as zero and is stored as +0.0, and a block of
zeros is never stored: the layout is a function of the dense weight and the block alone, and equal weights have equal
bytes. Any N, K, block of at least 1x1 and density fits; a weight without a non-zero has S = 0.

A stored block costs its dense bytes and 4 for its column.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIDES = (128, 64, 32, 16)
"""Sides of the blocks that `best_block` looks for."""


def block_grid(N: int, K: int, block: tuple[int, int]) -> tuple[int, int]:
    """Return (NB, KB), how many blocks an N x K weight has each way, the ones at the edges included.

    Raises:
        ValueError: a side of the block is less than 1.
    """
    BN, BK = block
    if BN < 1 or BK < 1:
        raise ValueError(f"block={BN}x{BK} has an empty side: both must be at least 1, as in (64, 64)")
    return -(-N // BN), -(-K // BK)


def occupied_blocks(w_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """Return a boolean [NB, KB]: which blocks hold a non-zero. NaN is one.

    Raises:
        ValueError: `w_NK` is not a matrix, or a side of the block is less than 1.
    """
    if w_NK.dim() != 2:
        raise ValueError(f"a weight is a matrix [N, K], got shape {tuple(w_NK.shape)}")
    return _tiles(w_NK != 0, block).flatten(2).any(-1)


def best_block(w_NK: Tensor) -> tuple[tuple[int, int], int]:
    """Return the block in which `w_NK` takes the fewest bytes, and how many blocks of that size are stored.

    Sides are those of `SIDES`. A weight pruned in blocks of such sides that divide N and K gets those: larger blocks
    store more zeros, smaller ones more columns. Of equals the taller, then the wider, is returned.
    """
    finest = occupied_blocks(w_NK, (SIDES[-1], SIDES[-1]))
    best, best_bytes, best_stored = (SIDES[0], SIDES[0]), -1, 0
    for BN in SIDES:
        for BK in SIDES:
            stored = int(occupied_blocks(finest, (BN // SIDES[-1], BK // SIDES[-1])).sum())
            nbytes = block_bytes(w_NK.shape[0], w_NK.shape[1], (BN, BK), stored, w_NK.element_size())
            if best_bytes < 0 or nbytes < best_bytes:
                best, best_bytes, best_stored = (BN, BK), nbytes, stored
    return best, best_stored


def block_bytes(N: int, K: int, block: tuple[int, int], num_blocks: int, itemsize: int) -> int:
    """Return the bytes of an N x K weight with `num_blocks` stored blocks of entries of `itemsize` bytes."""
    return num_blocks * (block[0] * block[1] * itemsize + 4) + 4 * (block_grid(N, K, block)[0] + 1)


def compress_block(w_NK: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """Return (values [S, BN, BK], columns [S] int32, row_pointers [NB + 1] int32); exact for any weight.

    Raises:
        ValueError: `w_NK` is not a matrix, or a side of the block is less than 1.
    """
    occupied = occupied_blocks(w_NK, block)
    rows, columns = occupied.nonzero(as_tuple=True)  # block row by block row, ascending in k
    # As integers, since some float paths of torch normalise NaN.
    bits = _bits(w_NK).masked_fill(w_NK == 0, 0)
    values = _tiles(bits, block)[rows, columns].view(w_NK.dtype)
    row_pointers = F.pad(occupied.sum(-1).cumsum(0), (1, 0)).to(torch.int32)
    return values, columns.to(torch.int32), row_pointers


def decompress_block(values: Tensor, columns: Tensor, row_pointers: Tensor, N: int, K: int) -> Tensor:
    """Return the dense weight [N, K], the exact inverse of `compress_block`."""
    S, BN, BK = values.shape
    NB, KB = block_grid(N, K, (BN, BK))
    bits = _bits(values)
    tiles = torch.zeros(NB, KB, BN, BK, dtype=bits.dtype, device=values.device)
    tiles[block_rows(row_pointers, S), columns.long()] = bits
    return tiles.transpose(1, 2).reshape(NB * BN, KB * BK)[:N, :K].contiguous().view(values.dtype)


def block_rows(row_pointers: Tensor, num_blocks: int) -> Tensor:
    """Return int64 [num_blocks]: the block row of each stored block."""
    counts = row_pointers.diff().long()
    rows = torch.arange(counts.numel(), device=row_pointers.device)
    return rows.repeat_interleave(counts, output_size=num_blocks)


def check_block(values: Tensor, columns: Tensor, row_pointers: Tensor, N: int, K: int) -> None:
    """Raise ValueError, in words, unless `compress_block` of some N x K weight could have returned these tensors."""
    if values.dim() != 3:
        raise ValueError(f"values have shape {tuple(values.shape)}: expected [blocks, rows, columns]")
    S, BN, BK = values.shape
    NB, KB = block_grid(N, K, (BN, BK))
    for name, tensor, length in (("columns", columns, S), ("row_pointers", row_pointers, NB + 1)):
        if tensor.shape != (length,) or tensor.dtype != torch.int32:
            found = f"{name} is {tensor.dtype} {tuple(tensor.shape)}"
            raise ValueError(f"{found}: {S} blocks of {BN}x{BK} of a {N}x{K} weight need torch.int32 ({length},)")
    if columns.device != values.device or row_pointers.device != values.device:
        found = f"columns on {columns.device}, row_pointers on {row_pointers.device}"
        raise ValueError(f"values are on {values.device}, {found}: move them to one device")
    if int(row_pointers[0]) != 0 or int(row_pointers[-1]) != S or bool((row_pointers.diff() < 0).any()):
        raise ValueError(f"row_pointers must ascend from 0 to {S}, the number of stored blocks")
    if bool(((columns < 0) | (columns >= KB)).any()):
        raise ValueError(f"columns must be in 0 .. {KB - 1}, found {int(columns.min())} to {int(columns.max())}")
    rows = block_rows(row_pointers, S)
    if bool((columns.diff()[rows.diff() == 0] <= 0).any()):
        raise ValueError("columns must ascend within a block row")
    if bool((values == 0).flatten(1).all(-1).any()):
        raise ValueError("a stored block holds nothing but zeros: compress the dense weight again")
    below, beyond = values[rows == NB - 1, N - (NB - 1) * BN :], values[columns == KB - 1, :, K - (KB - 1) * BK :]
    if bool(_bits(below).any()) or bool(_bits(beyond).any()):
        raise ValueError(f"a block holds non-zeros beyond the {N}x{K} weight")
    if bool(((values == 0) & (_bits(values) != 0)).any()):
        raise ValueError("values hold -0.0, which is stored as +0.0: compress the dense weight again")


def _bits(x: Tensor) -> Tensor:
    """View floats as the integers of their width."""
    return x.view({1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def _tiles(x_NK: Tensor, block: tuple[int, int]) -> Tensor:
    """View a matrix as its blocks [NB, KB, BN, BK], padding the edges with zeros where needed."""
    (N, K), (BN, BK) = x_NK.shape, block
    NB, KB = block_grid(N, K, block)
    if (NB * BN, KB * BK) != (N, K):
        x_NK = F.pad(x_NK, (0, KB * BK - K, 0, NB * BN - N))
    return x_NK.reshape(NB, BN, KB, BK).transpose(1, 2)
