"""The canonical layout, against a reference that goes group by group in plain Python."""

import pytest
import torch
from sparsekit_kernels.layout24 import (
    LEGAL_NIBBLES,
    compress24,
    count_illegal_nibbles,
    count_violations,
    decompress24,
    padded_features,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def random24(N, K, dtype, min_kept=0, seed=0):
    """A weight whose groups keep `min_kept` to 2 entries, at random places."""
    generator = torch.Generator().manual_seed(seed)
    Kp = padded_features(K)
    count = torch.randint(min_kept, 3, (N, Kp // 4, 1), generator=generator)
    rank = torch.rand(N, Kp // 4, 4, generator=generator).argsort(-1).argsort(-1)
    w = torch.randn(N, Kp // 4, 4, generator=generator).where(rank < count, 0)
    return w.view(N, Kp)[:, :K].to(dtype).contiguous()


def slow_compress24(w):
    """One group at a time: non-zeros first, filler from the highest free place."""
    N, K = w.shape
    Kp = padded_features(K)
    values, meta = torch.zeros(N, Kp // 2, dtype=w.dtype), torch.zeros(N, Kp // 8, dtype=torch.uint8)
    for n in range(N):
        for g in range(Kp // 4):
            group = [w[n, k].item() if k < K else 0.0 for k in range(4 * g, 4 * g + 4)]
            places = [i for i in range(4) if group[i] != 0]
            free = [i for i in (3, 2, 1, 0) if i not in places]
            places = sorted(places + free[: 2 - len(places)])
            for slot, place in enumerate(places):
                if group[place] != 0:
                    values[n, 2 * g + slot] = group[place]
            meta[n, g // 2] |= (places[0] | places[1] << 2) << (4 * (g % 2))
    return values, meta


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,K", [(1, 1), (1, 4), (3, 5), (2, 7), (5, 8), (3, 17), (4, 63), (2, 172), (0, 8), (3, 0)])
def test_equals_group_by_group(N, K, dtype):
    w = random24(N, K, dtype)
    values, meta = compress24(w)
    slow_values, slow_meta = slow_compress24(w)
    assert torch.equal(meta, slow_meta)
    assert torch.equal(values, slow_values)
    assert values.dtype == dtype and meta.dtype == torch.uint8
    assert torch.equal(decompress24(values, meta, K), w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_round_trip_keeps_every_bit(dtype):
    w = random24(64, 4096, dtype)
    values, meta = compress24(w)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(decompress24(values, meta).view(bits), w.view(bits))
    again = compress24(decompress24(values, meta))
    assert torch.equal(again[0].view(bits), values.view(bits)) and torch.equal(again[1], meta)


def test_equal_weights_have_equal_bytes_whatever_the_sign_of_their_zeros():
    w = random24(8, 64, torch.float32)
    negative = torch.where(w == 0, -torch.zeros_like(w), w)
    assert torch.signbit(negative).sum() > torch.signbit(w).sum()
    for a, b in zip(compress24(w), compress24(negative), strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_every_mask_of_a_group():
    for bits in range(16):
        w = torch.tensor([[float(i + 1) if bits >> i & 1 else 0.0 for i in range(4)]])
        if bits.bit_count() > 2:
            assert count_violations(w) == 1
            with pytest.raises(ValueError, match="1 groups of four have more than two non-zeros"):
                compress24(w)
        else:
            values, meta = compress24(w)
            assert int(meta[0, 0]) & 15 in LEGAL_NIBBLES
            assert torch.equal(decompress24(values, meta, 4), w)


def test_matches_the_metadata_that_torch_builds_for_its_own_2_4_tensors():
    from torch.sparse._semi_structured_conversions import (
        _calculate_meta_reordering_scatter_offsets,
        sparse_semi_structured_from_dense_cutlass,
    )

    w = random24(64, 128, torch.float16, min_kept=2)  # torch fills emptier groups its own way
    torch_values, torch_meta = sparse_semi_structured_from_dense_cutlass(w)
    values, meta = compress24(w)
    assert torch.equal(values, torch_values)
    ours = meta.view(torch.int16)  # [N, K/16]
    offsets = _calculate_meta_reordering_scatter_offsets(ours.shape[0], ours.shape[1], torch.int16, ours.device)
    assert torch.equal(torch_meta.view(-1)[offsets].view_as(ours), ours)


@pytest.mark.parametrize(
    "dtype,bits", [(torch.float32, torch.int32), (torch.bfloat16, torch.int16), (torch.float16, torch.int16)]
)
def test_special_values_survive_to_the_bit(dtype, bits):
    w = torch.zeros(1, 16, dtype=dtype)
    w[0, :6:2] = torch.tensor([float("inf"), float("nan"), -float("inf")])
    w.view(bits)[0, 8:10] = torch.tensor([1, -3], dtype=bits)  # the smallest subnormal, and a NaN with a payload
    values, meta = compress24(w)
    assert torch.equal(decompress24(values, meta).view(bits), w.view(bits))


def test_non_contiguous_weight():
    w = random24(64, 32, torch.float32)
    wide = torch.zeros(64, 64)
    wide[:, ::2] = w
    assert torch.equal(decompress24(*compress24(wide[:, ::2])), w)
    assert count_violations(wide[:, ::2]) == 0


def test_count_violations_is_exact():
    torch.manual_seed(0)
    w = (torch.rand(33, 37) < 0.6).float()
    groups = torch.nn.functional.pad(w, (0, 3)).view(33, 10, 4).sum(-1)
    assert count_violations(w) == int((groups > 2).sum()) > 0


def test_illegal_nibbles_are_counted():
    _, meta = compress24(random24(16, 64, torch.float32))
    assert count_illegal_nibbles(meta) == 0
    damaged = meta.clone()
    damaged[3, 2] = damaged[3, 2] & 0xF0 | 5  # both slots at place 1
    damaged[5, 1] = 0
    assert count_illegal_nibbles(damaged) == 3


def test_not_a_matrix():
    with pytest.raises(ValueError, match=r"matrix \[N, K\], got shape \(4,\)"):
        compress24(torch.zeros(4))
