"""Orders of channels: never worse than the one given, near the best that there is, within heads."""

import builtins
import itertools

import pytest
import torch

from sparsekit.archs import Coupling, Producer
from sparsekit.errors import Unsupported
from sparsekit.methods import channel_order
from sparsekit.methods.channel_order import best_order, coupled_order, retained
from sparsekit.patterns import NM


def scores_of(R, C, seed=0):
    """Scores of channels of unlike strength, the strong ones side by side."""
    generator = torch.Generator().manual_seed(seed)
    strengths = (torch.rand(C, generator=generator) ** 3).sort().values
    return torch.rand(R, C, generator=generator) * strengths


def retained_reference(scores, n, m):
    """The same, group by group, in plain Python."""
    total = 0.0
    for row in scores.double().tolist():
        for first in range(0, len(row), m):
            total += sum(sorted(row[first : first + m])[-n:])
    return total


@pytest.mark.parametrize("R,C,n,m", [(1, 8, 2, 4), (5, 17, 2, 4), (3, 24, 4, 8), (7, 10, 1, 3), (4, 40, 3, 4)])
def test_keeps_no_less_than_before(R, C, n, m):
    for seed in range(5):
        scores = scores_of(R, C, seed)
        order = best_order(scores, NM(n, m))
        assert order.sort().values.tolist() == list(range(C))
        assert order[C // m * m :].tolist() == list(range(C // m * m, C)), "the last, shorter group stays"
        after = retained_reference(scores[:, order], n, m)
        assert after == pytest.approx(retained(scores[:, order], NM(n, m)))
        assert after >= retained_reference(scores, n, m)


def best_of_all(scores, n, m):
    """The most that any order of 8 channels keeps."""
    splits = ([0, *first] for first in itertools.combinations(range(1, 8), m - 1))
    return max(retained_reference(scores[:, [*a, *(c for c in range(8) if c not in a)]], n, m) for a in splits)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_eight_channels_by_brute_force(n):
    shares = []
    for seed in range(20):
        scores = scores_of(6, 8, seed)
        before, best = retained_reference(scores, n, 4), best_of_all(scores, n, 4)
        found = retained(scores[:, best_order(scores, NM(n, 4))], NM(n, 4))
        assert before - 1e-5 <= found <= best + 1e-5
        shares.append((found - before) / (best - before))
    assert sum(shares) / len(shares) > 0.9


def test_one_row_is_dealt_perfectly():
    """Half of the channels are weak: an order keeps every strong one."""
    scores = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2] + [0.1] * 8])
    order = best_order(scores, NM(2, 4))
    assert retained(scores, NM(2, 4)) == pytest.approx(9 + 8 + 5 + 4 + 0.4)
    assert retained(scores[:, order], NM(2, 4)) == pytest.approx(44)


def test_dealing_goes_there_and_back():
    """Channels 0 … 11 from the strongest to the weakest, dealt to three groups."""
    dealt = channel_order._dealt(torch.arange(12.0).flip(0), 4)
    assert dealt.tolist() == [[0, 5, 6, 11], [1, 4, 7, 10], [2, 3, 8, 9]]


def test_an_exchange_is_the_best_for_its_position():
    """Against all assignments of three channels to three groups, each tried out."""
    scores, pattern = scores_of(5, 12), NM(2, 4)
    groups = torch.arange(12).view(3, 4)
    after = channel_order._exchanged(scores, groups.clone(), pattern)
    for position in range(4):
        tried = []
        for assignment in itertools.permutations(range(3)):
            other = groups.clone()
            other[:, position] = groups[list(assignment), position]
            tried.append((retained_reference(scores[:, other.flatten()], 2, 4), other))
        groups = max(tried, key=lambda pair: pair[0])[1]
    assert torch.equal(after, groups)


def test_more_groups_than_are_exchanged_at_once(monkeypatch):
    monkeypatch.setattr(channel_order, "_GROUPS", 5)
    scores = scores_of(16, 4 * 23 + 2)
    order = best_order(scores, NM(2, 4))
    assert order.sort().values.tolist() == list(range(94))
    assert retained(scores[:, order], NM(2, 4)) > 1.05 * retained(scores, NM(2, 4))


@pytest.mark.parametrize("C", [1, 3, 4, 7])
def test_nothing_to_exchange(C):
    assert best_order(torch.rand(3, C), NM(2, 4)).tolist() == list(range(C))


def test_equal_scores_stay_in_order():
    assert best_order(torch.ones(3, 16), NM(2, 4)).tolist() == list(range(16))
    assert best_order(torch.zeros(3, 16), NM(2, 4)).tolist() == list(range(16))


def test_weights_that_obey_already_stay_in_order():
    scores = torch.rand(8, 32)
    scores = scores * NM(2, 4).project(scores)
    assert best_order(scores, NM(2, 4)).tolist() == list(range(32))


def test_heads_keep_their_channels_and_share_them_among_queries():
    value = Coupling("value", ("o",), (Producer("v"),), num_channels=16, head_size=8, repeats=3)
    scores = torch.cat([scores_of(4, 8, seed) for seed in range(6)], dim=1)
    order = coupled_order(value, scores, NM(2, 4))
    columns = value.input_order(order)
    assert torch.equal(value.channel_order(columns), order)
    assert retained(scores[:, columns], NM(2, 4)) > retained(scores, NM(2, 4))
    for g in range(2):  # each head is ordered as it would be by itself, its queries one below the other
        head = torch.cat([scores_of(4, 8, 3 * g + r) for r in range(3)])
        alone, within = best_order(head, NM(2, 4)), order[8 * g : 8 * g + 8] - 8 * g
        assert retained(head[:, within], NM(2, 4)) == pytest.approx(retained(head[:, alone], NM(2, 4)))


@pytest.mark.parametrize("repeats,heads", [(1, 2), (2, 1)])
def test_groups_across_heads_are_left_alone(repeats, heads):
    value = Coupling("value", ("o",), (Producer("v"),), num_channels=10 * heads, head_size=10, repeats=repeats)
    assert coupled_order(value, scores_of(4, 20), NM(2, 4)) is None


def test_without_scipy_it_says_what_to_install(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("scipy"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(Unsupported, match="pip install scipy"):
        best_order(scores_of(3, 16), NM(2, 4))
