"""SparseGPT against the definition of optimal brain surgeon, in float64 and by brute force."""

import pytest
import torch

from sparsekit.calibration import Hessian
from sparsekit.methods import Magnitude, SparseGPT, Wanda
from sparsekit.methods.inverse_factor import inverse_factor
from sparsekit.methods.sparsegpt import _keep_largest_of_columns
from sparsekit.patterns import NM, Block, Unstructured, parse_pattern


def hessian_of(x_MK):
    statistics = Hessian(x_MK.shape[1], torch.device("cpu"))
    statistics.add(x_MK)
    return statistics


def correlated(M, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    scales = torch.rand(K, generator=generator) * 3 + 0.1
    return torch.randn(M, K, generator=generator) @ mix * scales


def reference(w_NK, x_MK, config):
    """Fix one column after another; each time the rest is moved by the explicit inverse of what is left of H.

    For column j and the columns F = j, j+1, …: with P = (H_FF)^-1, removing w_j costs w_j^2 / P_00 and moves the
    columns F by -w_j / P_00 * P_0. Returns keep and the new weight.
    """
    w = w_NK.double().clone()
    N, K = w.shape
    H = x_MK.double().T @ x_MK.double()
    live = H.diagonal() > 0
    level = H.diagonal()[live].mean()
    H += torch.diag(torch.where(live, config.dampening_frac * level, level))
    w[:, ~live] = 0
    pattern = parse_pattern(config.pattern)
    keep = torch.ones(N, K, dtype=torch.bool)

    def rest(j):
        return torch.linalg.inv(H[j:, j:])

    if isinstance(pattern, Block):
        inverse = rest(0)
        tiles = {}
        for row in range(0, N, pattern.rows):
            for column in range(0, K, pattern.columns):
                r, c = slice(row, row + pattern.rows), slice(column, column + pattern.columns)
                joint = torch.linalg.inv(inverse[c, c])
                tiles[r.start, c.start] = (torch.einsum("nk,kl,nl->", w[r, c], joint, w[r, c]).item(), r, c)
        order = sorted(tiles, key=lambda at: (tiles[at][0], -at[0], -at[1]))
        for at in order[: round(config.sparsity * len(tiles))]:
            keep[tiles[at][1], tiles[at][2]] = False
    removed = 0
    for j in range(K):
        if isinstance(pattern, NM) and j % pattern.m == 0:
            columns = list(range(j, min(j + pattern.m, K)))
            for n in range(N):
                costs = {k: (w[n, k] ** 2 / rest(k)[0, 0]).item() for k in columns}
                kept = sorted(columns, key=lambda k: (-costs[k], k))[: pattern.n]
                keep[n, columns] = torch.tensor([k in kept for k in columns])
        if isinstance(pattern, Unstructured) and j % config.block_size == 0:
            columns = list(range(j, min(j + config.block_size, K)))
            costs = {(n, k): (w[n, k] ** 2 / rest(k)[0, 0]).item() for n in range(N) for k in columns}
            due = round(config.sparsity * (columns[-1] + 1) * N) - removed
            removed += due
            for n, k in sorted(costs, key=lambda at: (costs[at], -at[0], -at[1]))[:due]:
                keep[n, k] = False
        P = rest(j)
        for n in range(N):
            if not keep[n, j]:
                w[n, j:] -= w[n, j] / P[0, 0] * P[0]
                w[n, j] = 0
    return keep, w


CASES = [
    ("2:4", 0.5, 16, 8),
    ("2:4", 0.5, 18, 8),  # K is no multiple of 4
    ("2:4", 0.5, 19, 6),  # nor block_size
    ("1:4", 0.75, 17, 128),
    ("4:8", 0.5, 44, 16),
    ("1:3", 2 / 3, 14, 7),
    ("unstructured", 0.5, 21, 128),
    ("unstructured", 0.7, 40, 16),
    ("3x4", 0.4, 18, 8),
    ("1x1", 0.5, 9, 4),
]


@pytest.mark.parametrize("dead", [False, True], ids=["live", "dead"])
@pytest.mark.parametrize("pattern,sparsity,K,block_size", CASES)
def test_matches_the_definition(pattern, sparsity, K, block_size, dead):
    x = correlated(64, K, seed=K)
    if dead:
        x[:, [1, K // 2]] = 0
    w = torch.randn(7, K, generator=torch.Generator().manual_seed(K + 1))
    config = SparseGPT(pattern=pattern, sparsity=sparsity, block_size=block_size)
    decision = config.decide(w, hessian_of(x))
    keep, expected = reference(w, x, config)
    assert torch.equal(decision.keep, keep)
    assert (decision.weight.double() - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert bool((decision.weight[~keep] == 0).all())
    assert parse_pattern(pattern).count_violations(decision.keep) == 0
    assert bool(decision.notes) == dead


def test_strips_and_blocks_change_only_rounding():
    x, w = correlated(256, 168), torch.randn(5, 168, generator=torch.Generator().manual_seed(3))
    one = SparseGPT(block_size=4).decide(w, hessian_of(x))
    other = SparseGPT(block_size=100).decide(w, hessian_of(x))
    assert torch.equal(one.keep, other.keep)
    assert (one.weight - other.weight).abs().max() < 1e-4


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "unstructured", "2x4"])
def test_white_inputs_give_magnitude_and_no_update(pattern):
    statistics = Hessian(24, torch.device("cpu"))
    statistics.add(torch.eye(24))
    w = torch.randn(8, 24, generator=torch.Generator().manual_seed(0))
    decision = SparseGPT(pattern=pattern, block_size=24).decide(w, statistics)
    if pattern != "2x4":  # tiles are compared by their sum of squares, not of absolutes
        assert torch.equal(decision.keep, Magnitude(pattern=pattern).decide(w).keep)
    assert torch.equal(decision.weight, w * decision.keep)


@pytest.mark.parametrize("pattern", ["2:4", "unstructured"])
def test_output_is_nearer_than_by_other_methods(pattern):
    x, w = correlated(512, 64), torch.randn(48, 64, generator=torch.Generator().manual_seed(5))
    statistics = hessian_of(x)

    def error(decision):
        new = w * decision.keep if decision.weight is None else decision.weight
        return ((w - new) @ x.T).square().mean().item()

    sparsegpt = error(SparseGPT(pattern=pattern).decide(w, statistics))
    wanda = error(Wanda(pattern=pattern).decide(w, statistics))
    magnitude = error(Magnitude(pattern=pattern).decide(w))
    assert sparsegpt < 0.8 * wanda < 0.8 * magnitude


def test_ties_go_to_the_lower_index():
    scores = torch.tensor([[1.0, 0], [1, 0], [1, 0], [1, 5]])
    assert _keep_largest_of_columns(scores, 2).T.tolist() == [[True, True, False, False], [True, False, False, True]]


def test_the_factor_is_that_of_the_inverse():
    x = correlated(900, 300)
    factor = inverse_factor(hessian_of(x), 0.01)
    H = x.double().T @ x.double()
    H += 0.01 * H.diagonal().mean() * torch.eye(300)
    U = factor.U.double()
    assert torch.equal(factor.U, factor.U.triu())
    assert ((U.T @ U) @ H - torch.eye(300)).abs().max() < 1e-3
    assert factor.note == ""


def test_layers_that_share_a_hessian_share_its_factor():
    statistics = hessian_of(correlated(64, 8))
    assert inverse_factor(statistics, 0.01) is inverse_factor(statistics, 0.01)
    assert inverse_factor(statistics, 0.01) is not inverse_factor(statistics, 0.02)


def test_a_hessian_of_few_tokens_climbs_the_ladder():
    statistics = hessian_of(correlated(2, 16))
    decision = SparseGPT(dampening_frac=0.0).decide(torch.randn(4, 16), statistics)
    assert decision.weight is not None and decision.weight.isfinite().all()
    assert any("the Hessian needed damping 0.01 in place of 0" in note for note in decision.notes)


def beyond_fp32():
    """Pairs [[a, 1], [1, h]] with h the next fp32 number above 1 / a: positive definite by less than fp32 can see.

    How the last pivot h - 1 / a rounds in fp32 is as good as chance; of thirty pairs some come out at zero or below.
    """
    pairs = []
    for a in torch.arange(3, 36, dtype=torch.float64):
        h = (1 / a).float()
        h = torch.nextafter(h, h + 1) if h.double() * a - 1 < 1e-10 else h
        if h.double() * a - 1 < 5e-8:
            pairs.append(torch.stack([torch.stack([h, h.new_ones(())]), torch.stack([h.new_ones(()), a.float()])]))
    return torch.block_diag(*pairs)


def coupled(excess):
    """Two features whose correlation is 1 + excess, so the least eigenvalue is -excess; and fourteen apart."""
    matrix = torch.eye(16)
    matrix[0, 1] = matrix[1, 0] = 1 + excess
    return matrix


RUNGS = {
    "as asked": (coupled(-0.5), 0.01, []),
    "fp64": (beyond_fp32(), 0.0, ["the Hessian needed fp64"]),
    "x10": (coupled(0.05), 0.01, ["the Hessian needed damping 0.1 in place of 0.01"]),
    "x100": (coupled(0.5), 0.01, ["the Hessian needed damping 1 in place of 0.01"]),
    "x10 of the least": (coupled(0.005), 0.0, ["the Hessian needed damping 0.01 in place of 0"]),
    "none": (coupled(2.0), 0.01, ["its Hessian could not be factored: pruned by Wanda, without an update"]),
}


@pytest.mark.parametrize("rung", RUNGS)
def test_every_rung_of_the_ladder(rung):
    matrix, frac, notes = RUNGS[rung]
    statistics = Hessian(len(matrix), torch.device("cpu"))
    statistics.matrix = matrix.clone()
    w = torch.randn(4, len(matrix), generator=torch.Generator().manual_seed(0))
    decision = SparseGPT(dampening_frac=frac).decide(w, statistics)
    assert list(decision.notes) == notes
    assert (decision.weight is None) == (rung == "none")
    if rung == "none":
        assert torch.equal(decision.keep, Wanda().decide(w, statistics).keep)


def test_the_factor_by_fp64_is_as_exact_as_any():
    matrix = beyond_fp32()
    statistics = Hessian(len(matrix), torch.device("cpu"))
    statistics.matrix = matrix
    exact = torch.linalg.inv(torch.linalg.cholesky(matrix.double().flip(0, 1)).flip(0, 1))
    assert torch.allclose(inverse_factor(statistics, 0.0).U.double(), exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("broken", ["indefinite", "silent"])
def test_a_hessian_that_cannot_be_factored_falls_back_to_wanda(broken):
    statistics = hessian_of(correlated(64, 16))
    if broken == "indefinite":
        statistics.matrix[0, 1] = statistics.matrix[1, 0] = 1e6
    else:
        statistics.matrix.zero_()
    w = torch.randn(4, 16, generator=torch.Generator().manual_seed(0))
    decision = SparseGPT().decide(w, statistics)
    assert decision.weight is None
    assert torch.equal(decision.keep, Wanda().decide(w, statistics).keep)
    assert "pruned by Wanda, without an update" in decision.notes[0]


@pytest.mark.parametrize("fields", [{"dampening_frac": -0.1}, {"block_size": 0}, {"block_size": 1.5}], ids=str)
def test_bad_fields_are_refused(fields):
    with pytest.raises(ValueError, match=next(iter(fields))):
        SparseGPT(**fields)


def test_the_weight_and_the_statistics_are_not_changed():
    statistics, w = hessian_of(correlated(64, 16)), torch.randn(4, 16)
    before, H = w.clone(), statistics.matrix.clone()
    SparseGPT().decide(w, statistics)
    assert torch.equal(w, before) and torch.equal(statistics.matrix, H)
