"""RIA against its formula, by hand."""

import pytest
import torch

from sparsekit.calibration.statistics import ColumnNorms
from sparsekit.methods import RIA, Magnitude


def norms_of(x_MK):
    statistics = ColumnNorms(x_MK.shape[1], torch.device("cpu"))
    statistics.add(x_MK)
    return statistics


def test_a_worked_example():
    """Sums of rows: 8 and 8; of columns: 4, 4, 3, 5. Norms: 4, 1, 9, 1, and their roots 2, 1, 3, 1."""
    w = torch.tensor([[3.0, -1, 1, 3], [-1, 3, 2, -2]])
    x = torch.diag(torch.tensor([4.0, 1, 9, 1]))
    expected = torch.tensor(
        [
            [2 * (3 / 4 + 3 / 8), 1 / 4 + 1 / 8, 3 * (1 / 3 + 1 / 8), 3 / 5 + 3 / 8],
            [2 * (1 / 4 + 1 / 8), 3 / 4 + 3 / 8, 3 * (2 / 3 + 2 / 8), 2 / 5 + 2 / 8],
        ]
    )
    torch.testing.assert_close(RIA().scores(w, norms_of(x)), expected)
    decision = RIA().decide(w, norms_of(x))
    assert decision.keep.tolist() == [[True, False, True, False], [False, True, True, False]]
    assert decision.weight is None


@pytest.mark.parametrize("pattern,sparsity", [("2:4", 0.5), ("1:4", 0.75), ("unstructured", 0.3), ("4x4", 0.5)])
def test_scaling_all_weights_changes_nothing(pattern, sparsity):
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(17, 40, generator=generator), torch.randn(64, 40, generator=generator)
    config = RIA(pattern=pattern, sparsity=sparsity)
    keep = config.decide(w, norms_of(x)).keep
    for scale in (4.0, -0.25, 2.0**-20):
        assert torch.equal(config.decide(w * scale, norms_of(x)).keep, keep)
    torch.testing.assert_close(config.scores(7 * w, norms_of(x)), config.scores(w, norms_of(x)))


def test_a_power_of_zero_leaves_out_the_inputs():
    w, x = torch.randn(4, 8), torch.randn(16, 8) * torch.arange(8)
    config = RIA(activation_power=0)
    assert torch.equal(config.scores(w, norms_of(x)), config.scores(w, norms_of(torch.ones(16, 8))))


def test_rows_and_columns_of_zeros_score_zero():
    w = torch.randn(5, 8)
    w[2], w[:, 3] = 0, 0
    scores = RIA().scores(w, norms_of(torch.randn(16, 8)))
    assert scores.isfinite().all() and not scores[2].any() and not scores[:, 3].any()
    assert RIA().scores(torch.zeros(2, 4), norms_of(torch.randn(4, 4))).tolist() == torch.zeros(2, 4).tolist()


def test_it_differs_from_magnitude_where_a_channel_is_weak():
    """The second input is weak everywhere, so what little it has counts."""
    w = torch.tensor([[4.0, 0.5, 3, 2], [4, 0.01, 3, 2], [4, 0.01, 3, 2]])
    keep = RIA(activation_power=0).decide(w, norms_of(torch.ones(4, 4))).keep
    assert keep[0].tolist() == [True, True, False, False]
    assert Magnitude().decide(w).keep[0].tolist() == [True, False, True, False]


@pytest.mark.parametrize("power", [-0.5, float("inf"), float("nan")])
def test_bad_powers_are_refused(power):
    with pytest.raises(ValueError, match="activation_power"):
        RIA(activation_power=power)
