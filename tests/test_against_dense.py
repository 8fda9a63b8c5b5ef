"""Dense against smaller: who is faster is said of the right one, and nothing is timed that would take too long."""

import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from sparsekit.benchmarking import against_dense, models


class Sleeper(nn.Module):
    """Reads tokens, and takes so many seconds for each sequence."""

    def __init__(self, seconds, positions=64):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(10, round(1000 * seconds)))
        self.seconds, self.lengths = seconds, []
        self.config = SimpleNamespace(vocab_size=7, max_position_embeddings=positions, model_type="", text_config=None)
        self.config.get_text_config = lambda: self.config

    def forward(self, input_ids):
        assert not self.training and not torch.is_grad_enabled()
        self.lengths.append(tuple(input_ids.shape))
        time.sleep(self.seconds * len(input_ids))
        return SimpleNamespace(logits=torch.zeros(1))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(models, "SHORT_SECONDS", 0.0)


def test_the_faster_one_is_named():
    report = against_dense(Sleeper(0.05), Sleeper(0.005), batch_sizes=(2, 1), length=9, rounds=3, progress=False)
    assert [row["batch"] for row in report.rows] == [1, 2] and report.columns[:2] == ["what", "batch"]
    for row in report.rows:
        assert row["dense ms"] > 50 * row["batch"] and row["speedup"] == pytest.approx(
            row["dense ms"] / row["smaller ms"], rel=1e-3
        )
        assert row["speedup"] > 1.5
    assert "faster in forward at batch 1" in report.summary["verdict"]


def test_stay_dense_where_nothing_is_won():
    report = against_dense(Sleeper(0.01), Sleeper(0.05), batch_sizes=(1,), length=9, rounds=3, progress=False)
    assert "stay dense" in report.summary["verdict"] and "500% of the parameters" in report.summary["verdict"]


def test_what_takes_too_long_is_left_out(monkeypatch):
    import sys

    monkeypatch.setattr(sys.modules["sparsekit.benchmarking.against_dense"], "LONGEST_SECONDS", 0.05)
    dense, smaller = Sleeper(0.02), Sleeper(0.02)
    report = against_dense(dense, smaller, batch_sizes=(1, 64), length=9, rounds=1, progress=False)
    assert [row["batch"] for row in report.rows] == [1] and "batch 64 and more: not timed" in report.notes[0]
    assert max(rows for rows, _ in dense.lengths) == 1


def test_no_more_tokens_than_positions_and_modes_are_put_back():
    dense, smaller = Sleeper(0.001, positions=12), Sleeper(0.001, positions=12)
    dense.train()
    smaller.eval()
    against_dense(dense, smaller, batch_sizes=(1,), length=128, rounds=1, progress=False)
    assert {length for _, length in dense.lengths} == {12} and dense.lengths == smaller.lengths
    assert dense.training and not smaller.training


@pytest.mark.parametrize("sizes", [{"batch_sizes": ()}, {"batch_sizes": (0,)}, {"length": 0}, {"rounds": 0}])
def test_sizes_out_of_range(sizes):
    with pytest.raises(ValueError, match="numbers of at least 1"):
        against_dense(Sleeper(0.001), Sleeper(0.001), progress=False, **sizes)
