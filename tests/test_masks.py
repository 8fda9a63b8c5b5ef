"""A mask holds what it was given, and refuses what breaks its pattern."""

import pytest
import torch

from sparsekit.errors import PatternError
from sparsekit.masks import Mask
from sparsekit.patterns import NM, Unstructured


@pytest.mark.parametrize("N,K", [(1, 1), (3, 7), (5, 8), (2, 65), (0, 4)])
def test_bits_hold_every_entry(N, K):
    keep = torch.rand(N, K, generator=torch.Generator().manual_seed(0)) < 0.4
    mask = Mask("unstructured", keep)
    assert torch.equal(mask.keep, keep)
    assert mask.bits.numel() == N * ((K + 7) // 8)
    assert Mask.from_bits("unstructured", mask.bits, (N, K)) == mask


def test_sparsity_is_the_share_removed():
    assert Mask("2:4", NM(2, 4).project(torch.rand(8, 64))).sparsity == 0.5


def test_a_broken_pattern_is_refused_with_the_number_of_places():
    keep = NM(2, 4).project(torch.rand(4, 16))
    keep[0, :3] = keep[2, 4:7] = True
    with pytest.raises(PatternError, match="2:4 in 2 places"):
        Mask("2:4", keep)


def test_only_boolean_matrices():
    with pytest.raises(ValueError, match="boolean"):
        Mask("2:4", torch.ones(4, 4))
    with pytest.raises(ValueError, match="boolean"):
        Mask("2:4", torch.ones(4, dtype=torch.bool))


def test_equality_looks_at_pattern_and_entries():
    keep = NM(2, 4).project(torch.rand(4, 8))
    assert Mask("2:4", keep) == Mask(NM(2, 4), keep)
    assert Mask("2:4", keep) != Mask(Unstructured(), keep)
    assert Mask("2:4", keep) != Mask("2:4", keep.flip(1))
    assert Mask("2:4", keep) != "2:4"
