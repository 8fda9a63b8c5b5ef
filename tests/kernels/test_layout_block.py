"""The canonical block layout, against a reference that goes block by block in plain Python."""

import pytest
import torch
from sparsekit_kernels.layout_block import (
    best_block,
    block_bytes,
    block_grid,
    check_block,
    compress_block,
    decompress_block,
    occupied_blocks,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}
SHAPES = [
    # N, K, block
    (1, 1, (1, 1)),
    (1, 1, (64, 64)),
    (5, 7, (2, 3)),
    (64, 64, (16, 32)),
    (65, 63, (16, 16)),
    (130, 100, (64, 64)),
    (129, 257, (128, 128)),
    (33, 200, (8, 48)),
    (0, 8, (4, 4)),
    (8, 0, (4, 4)),
]


def block_weight(N, K, block, dtype, density=0.3, seed=0):
    """Normals in random blocks; inside a block one in five is zero, every other zero of the weight is -0.0."""
    generator = torch.Generator().manual_seed(seed)
    NB, KB = block_grid(N, K, block)
    kept = torch.rand(NB, KB, generator=generator) < density
    kept[1:2] = False
    keep = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    keep = keep & (torch.rand(N, K, generator=generator) < 0.8)
    zeros = torch.where(torch.rand(N, K, generator=generator) < 0.5, -0.0, 0.0)
    return torch.where(keep, torch.randn(N, K, generator=generator), zeros).to(dtype)


def slow_compress(w, block):
    (N, K), (BN, BK) = w.shape, block
    values, columns, row_pointers = [], [], [0]
    for r in range(-(-N // BN)):
        for c in range(-(-K // BK)):
            tile = torch.zeros(BN, BK, dtype=w.dtype)
            found = False
            for i in range(BN):
                for j in range(BK):
                    n, k = r * BN + i, c * BK + j
                    if n < N and k < K and w[n, k] != 0:
                        tile[i, j], found = w[n, k], True
            if found:
                values.append(tile)
                columns.append(c)
        row_pointers.append(len(columns))
    return values, columns, row_pointers


def assert_same_bits(a, b):
    assert torch.equal(a.view(BITS[a.dtype]), b.view(BITS[b.dtype]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,K,block", SHAPES)
def test_equals_block_by_block(N, K, block, dtype):
    w = block_weight(N, K, block, dtype)
    values, columns, row_pointers = compress_block(w, block)
    slow_values, slow_columns, slow_pointers = slow_compress(w, block)
    assert columns.tolist() == slow_columns and row_pointers.tolist() == slow_pointers
    assert values.shape == (len(slow_columns), *block) and values.dtype == dtype and values.is_contiguous()
    for stored, slow in zip(values, slow_values, strict=True):
        assert_same_bits(stored, slow)
    check_block(values, columns, row_pointers, N, K)
    assert_same_bits(decompress_block(values, columns, row_pointers, N, K), torch.where(w == 0, 0, w))


@pytest.mark.parametrize("density", [0.0, 0.05, 0.5, 1.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_density(dtype, density):
    w = block_weight(200, 333, (64, 32), dtype, density)
    packed = compress_block(w, (64, 32))
    assert packed[0].shape[0] == int(occupied_blocks(w, (64, 32)).sum())
    assert (packed[0].shape[0] == 0) == (density == 0.0)
    check_block(*packed, 200, 333)
    assert torch.equal(decompress_block(*packed, 200, 333), w)


def test_equal_weights_have_equal_bytes_whatever_the_sign_of_their_zeros():
    w = block_weight(70, 90, (16, 32), torch.float32)
    positive = torch.where(w == 0, 0.0, w)
    assert torch.signbit(w).sum() > torch.signbit(positive).sum()
    for a, b in zip(compress_block(w, (16, 32)), compress_block(positive, (16, 32)), strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_special_values_survive_to_the_bit(dtype):
    w = torch.zeros(4, 9, dtype=dtype)
    w[0, :3] = torch.tensor([float("inf"), float("nan"), -float("inf")])
    w.view(BITS[dtype])[3, 7:9] = torch.tensor([1, -3], dtype=BITS[dtype])  # a subnormal, and a NaN with a payload
    packed = compress_block(w, (2, 4))
    assert packed[0].shape[0] == 3
    assert_same_bits(decompress_block(*packed, 4, 9), w)


def test_non_contiguous_weight():
    w = block_weight(64, 32, (16, 16), torch.float32)
    wide = torch.zeros(64, 64)
    wide[:, ::2] = w
    for view in (wide[:, ::2], w.t().contiguous().t()):
        assert torch.equal(decompress_block(*compress_block(view, (16, 16)), 64, 32), w)


@pytest.mark.parametrize("block", [(16, 16), (16, 128), (32, 64), (64, 64), (128, 128), (128, 32)])
def test_best_block_is_the_one_a_weight_was_pruned_in(block):
    w = block_weight(512, 768, block, torch.bfloat16)
    found, stored = best_block(w)
    assert found == block and stored == int(occupied_blocks(w, block).sum())


def test_best_block_is_the_smallest_of_all():
    for seed, density in enumerate((0.0, 0.02, 0.2, 1.0)):
        w = block_weight(200, 300, (8, 40), torch.float16, density, seed)
        sizes = {}
        for BN in (16, 32, 64, 128):
            for BK in (16, 32, 64, 128):
                sizes[BN, BK] = sum(tensor.nbytes for tensor in compress_block(w, (BN, BK)))
        found, stored = best_block(w)
        assert sizes[found] == min(sizes.values()) == block_bytes(200, 300, found, stored, 2)


def test_damaged_tensors_are_refused_in_words():
    N, K, block = 130, 100, (64, 32)
    w = block_weight(N, K, block, torch.float32, density=0.8)
    values, columns, row_pointers = compress_block(w, block)

    def refused(match, values=values, columns=columns, row_pointers=row_pointers, N=N, K=K):
        with pytest.raises(ValueError, match=match):
            check_block(values, columns, row_pointers, N, K)

    def changed(tensor, *changes):
        tensor = tensor.clone()
        for index, value in changes:
            tensor[index] = value
        return tensor

    check_block(values, columns, row_pointers, N, K)
    assert row_pointers.tolist()[1] >= 2 and row_pointers.tolist()[-1] > row_pointers.tolist()[-2]
    refused("values have shape", values=values[0])
    refused(r"row_pointers is torch.int32 \(4,\).* need torch.int32 \(5,\)", N=N + 64)
    refused("columns is torch.int64", columns=columns.long())
    refused("columns is torch.int32", columns=columns[1:])
    refused("ascend from 0 to", row_pointers=changed(row_pointers, (0, 1)))
    refused("ascend from 0 to", row_pointers=changed(row_pointers, (-1, len(columns) + 1)))
    refused("ascend from 0 to", row_pointers=changed(row_pointers, (1, len(columns)), (2, 0)))
    refused(r"in 0 \.\. 3, found -1", columns=changed(columns, (0, -1)))
    refused(r"in 0 \.\. 3, found .* to 4", columns=changed(columns, (-1, 4)))
    refused("ascend within", columns=changed(columns, (1, columns[0])))
    refused("nothing but zeros", values=changed(values, (0, 0.0)))
    refused("beyond the 130x100", values=changed(values, ((-1, 2, 0), 1.0)))
    assert columns[-1] == 3 or (columns == 3).any()
    last = int((columns == 3).nonzero()[0])
    refused("beyond the 130x100", values=changed(values, ((last, 0, 4), -0.0)))
    refused("-0.0", values=changed(values, ((0, 0, 0), -0.0)))


def test_wrong_arguments_are_refused_in_words():
    with pytest.raises(ValueError, match=r"matrix \[N, K\], got shape \(4,\)"):
        compress_block(torch.zeros(4), (2, 2))
    with pytest.raises(ValueError, match="block=0x64 has an empty side"):
        compress_block(torch.zeros(4, 4), (0, 64))
