import pytest
import torch

from sparsekit.calibration import ColumnNorms, Hessian
from sparsekit.methods import Magnitude, Wanda


def norms_of(x_MK, kind=ColumnNorms):
    statistics = kind(x_MK.shape[1], torch.device("cpu"))
    for part in x_MK.split(5):
        statistics.add(part)
    return statistics


def test_worked_example():
    # Weights 1 2 3 4 on features of norm 8 3 1 1: scores 8 6 3 4, so the two smallest weights stay.
    x = torch.diag(torch.tensor([8.0, 3, 1, 1]))
    keep = Wanda().decide(torch.tensor([[1.0, -2, 3, 4]]), norms_of(x)).keep
    assert keep.tolist() == [[True, True, False, False]]


@pytest.mark.parametrize("kind", [ColumnNorms, Hessian])
@pytest.mark.parametrize("pattern,n,m", [("2:4", 2, 4), ("1:4", 1, 4), ("4:8", 4, 8), ("2:3", 2, 3)])
@pytest.mark.parametrize("K", [16, 17])
def test_groups_against_brute_force(pattern, n, m, K, kind):
    generator = torch.Generator().manual_seed(K)
    x, w = torch.randn(23, K, generator=generator), torch.randn(5, K, generator=generator)
    keep = Wanda(pattern=pattern).decide(w, norms_of(x, kind)).keep
    norms = x.double().norm(dim=0)
    for row in range(5):
        for start in range(0, K, m):
            group = range(start, min(start + m, K))
            order = sorted(group, key=lambda k: (-abs(w[row, k].item()) * norms[k].item(), k))
            assert {k for k in group if keep[row, k]} == set(order[:n])


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.9])
def test_unstructured_compares_within_rows(sparsity):
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(23, 20, generator=generator), torch.randn(5, 20, generator=generator)
    w[0] *= 100  # a loud row must not save itself at the cost of the others
    keep = Wanda(pattern="unstructured", sparsity=sparsity).decide(w, norms_of(x)).keep
    assert keep.sum(dim=1).tolist() == [20 - round(sparsity * 20)] * 5
    scores = w.double().abs() * x.double().norm(dim=0)
    for row in range(5):
        if (~keep[row]).any():
            assert scores[row][~keep[row]].max() <= scores[row][keep[row]].min()


@pytest.mark.parametrize("pattern", ["2:4", "4:8", "2x4"])
def test_equal_norms_give_magnitude(pattern):
    w = torch.randn(6, 24, generator=torch.Generator().manual_seed(0))
    x = torch.eye(24) * 7
    assert torch.equal(Wanda(pattern=pattern).decide(w, norms_of(x)).keep, Magnitude(pattern=pattern).decide(w).keep)


def test_half_precision_inputs_are_summed_in_fp32():
    x = torch.full((4096, 4), 100.0, dtype=torch.float16)  # squares overflow fp16
    assert norms_of(x).column_norms.tolist() == pytest.approx([6400.0] * 4)
