"""Patterns project scores onto the best legal mask; checked by trying every mask."""

from itertools import combinations, product

import pytest
import torch

from sparsekit.patterns import NM, Block, Unstructured, parse_pattern


@pytest.mark.parametrize(
    "word,pattern", [("2:4", NM(2, 4)), (" 4:8 ", NM(4, 8)), ("64x32", Block(64, 32)), ("Unstructured", Unstructured())]
)
def test_parses_and_prints(word, pattern):
    assert parse_pattern(word) == pattern
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(pattern) is pattern


@pytest.mark.parametrize("word", ["2:5:3", "half", "", "4:2", "0:4", "4:4", "0x8", None, 24])
def test_refuses_what_is_no_pattern(word):
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(word)


def test_unknown_pattern_names_the_nearest():
    with pytest.raises(ValueError, match="Did you mean 'unstructured'"):
        parse_pattern("unstructered")


@pytest.mark.parametrize("n,m,K", [(2, 4, 8), (1, 4, 9), (2, 4, 7), (3, 5, 10), (4, 8, 12), (4, 9, 20)])
def test_nm_keeps_the_best_of_all_masks(n, m, K):
    scores = torch.rand(3, K, generator=torch.Generator().manual_seed(K))
    keep = NM(n, m).project(scores)
    assert NM(n, m).count_violations(keep) == 0
    for row in range(3):
        for start in range(0, K, m):
            group = scores[row, start : start + m]
            best = max(sum(c) for c in combinations(group.tolist(), min(n, len(group))))
            assert float((group * keep[row, start : start + m]).sum()) == pytest.approx(best)


def test_ties_go_to_the_lower_index():
    assert NM(2, 4).project(torch.ones(1, 6)).tolist() == [[True, True, False, False, True, True]]
    assert NM(2, 9).project(torch.ones(1, 9)).nonzero()[:, 1].tolist() == [0, 1]
    assert Unstructured().project(torch.zeros(2, 2), 0.5).tolist() == [[True, True], [False, False]]


def test_nm_keeps_exactly_n_even_of_zeros_and_infinities():
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, float("inf"), float("inf"), float("inf"), 1.0]])
    assert NM(2, 4).project(scores).view(2, 4).sum(-1).tolist() == [2, 2]


def test_nm_counts_groups_that_keep_too_many():
    for bits in product([False, True], repeat=4):
        assert NM(2, 4).count_violations(torch.tensor([bits])) == (sum(bits) > 2)


def test_unstructured_removes_the_smallest():
    scores = torch.rand(7, 13, generator=torch.Generator().manual_seed(0))
    keep = Unstructured().project(scores, 0.3)
    assert int((~keep).sum()) == round(0.3 * 91)
    assert scores[keep].min() > scores[~keep].max()


def test_block_keeps_whole_tiles_and_smaller_ones_at_the_edge():
    scores = torch.zeros(5, 7)
    scores[4, 6] = 1.0  # the corner tile of 1x1
    keep = Block(2, 3).project(scores, 1 - 1 / 9)
    assert keep.nonzero().tolist() == [[4, 6]]
    assert Block(2, 3).count_violations(keep) == 0
    keep[0, 0] = True
    assert Block(2, 3).count_violations(keep) == 1


def test_contradictions_and_bad_scores_are_refused():
    with pytest.raises(ValueError, match="sparsity=0.7"):
        NM(2, 4).project(torch.rand(2, 4), 0.7)
    with pytest.raises(ValueError, match="sparsity=1.5"):
        Unstructured().project(torch.rand(2, 4), 1.5)
    with pytest.raises(ValueError, match="NaN"):
        NM(2, 4).project(torch.tensor([[1.0, float("nan"), 0, 0]]))
    with pytest.raises(ValueError, match="matrix"):
        NM(2, 4).project(torch.rand(8))


@pytest.mark.parametrize("pattern", [NM(2, 4), Unstructured(), Block(2, 2)], ids=str)
def test_empty_weight(pattern):
    assert pattern.project(torch.zeros(0, 8)).shape == (0, 8)
