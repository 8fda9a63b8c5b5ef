import torch

from sparsekit.methods import Magnitude


def test_worked_examples():
    w = torch.tensor([[1.0, -4, 3, -2, 5, 5, 5, 5], [0, 0, 0, 0, -1, 2, -3, 4]])
    assert Magnitude().decide(w).keep.int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1, 1]]
    few = Magnitude(pattern="unstructured", sparsity=0.75).decide(w).keep
    assert few.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1], [0] * 8]
    tiles = Magnitude(pattern="2x4", sparsity=0.5).decide(w).keep
    assert tiles.int().tolist() == [[0, 0, 0, 0, 1, 1, 1, 1]] * 2


def test_a_short_last_group_keeps_up_to_n():
    keep = Magnitude().decide(torch.tensor([[1.0, 2, 3, 4, 9, 8, 7]])).keep
    assert keep.int().tolist() == [[0, 0, 1, 1, 1, 1, 0]]
