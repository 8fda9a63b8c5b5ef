"""The branch beside a mask: each fit against its closed form, brute force in float64, and what it promises to lower."""

import pytest
import torch

from sparsekit.errors import NonFiniteError
from sparsekit.nn.side import block_indicator
from sparsekit.patterns import NM
from sparsekit.plan import SideBranch
from sparsekit.train.lowrank import fit_residual, fit_side, output_error

SHAPES = [(24, 64, 16), (7, 172, 16), (40, 50, 32), (96, 20, 5), (3, 9, 64), (5, 12, 1)]
"""N, K, group: full groups, ragged ones, more rows than columns, fewer columns than one group, groups of one."""


def masked(N, K, seed=0, dtype=torch.float32):
    w = torch.randn(N, K, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return w, NM(2, 4).project(w.float().abs())


def inputs(K, tokens=400, seed=1):
    """Correlated, with channels of very different size."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(tokens, K, generator=generator) @ torch.randn(K, K, generator=generator) / K**0.5
    return mixed * torch.rand(K, generator=generator).mul(2).exp() + 0.5


def removed(w, keep):
    return torch.where(keep, 0, w.double())


@pytest.mark.parametrize("N,K,group", SHAPES)
def test_the_mean_takes_exactly_its_own_energy_off_the_error(N, K, group):
    w, keep = masked(N, K)
    P, branch = removed(w, keep), fit_side(w, keep, group)
    product = branch.S.double() @ block_indicator(K, group, torch.float64)
    energy = product.square().sum()
    if K % group == 0:
        assert energy.item() == pytest.approx(group * branch.S.double().square().sum().item(), rel=1e-12)
    error = (P - product).square().sum()
    assert error.item() == pytest.approx((P.square().sum() - energy).item(), rel=1e-6)
    assert error <= P.square().sum() and branch.X is None and branch.S.dtype == torch.float32


@pytest.mark.parametrize("N,K,group", SHAPES)
def test_the_mean_is_the_mean_over_all_slots(N, K, group):
    w, keep = masked(N, K)
    S = fit_side(w, keep, group).S
    for n in range(N):
        for j in range(-(-K // group)):
            slots = range(j * group, min((j + 1) * group, K))
            expected = sum(0.0 if keep[n, p] else w[n, p].item() for p in slots) / len(slots)
            assert S[n, j].item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("N,K,group", SHAPES)
def test_data_is_the_least_squares_fit_to_the_outputs(N, K, group):
    w, keep = masked(N, K)
    x = inputs(K).double()
    S = fit_side(w, keep, group, "data", x.T @ x, damp=0).S
    z = x @ block_indicator(K, group, torch.float64).T
    expected = torch.linalg.lstsq(z, x @ removed(w, keep).T, driver="gelsd").solution.T
    torch.testing.assert_close(S.double(), expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("N,K,group", SHAPES)
def test_data_never_makes_the_output_worse_and_beats_the_mean(N, K, group):
    w, keep = masked(N, K)
    x = inputs(K)
    H = x.T @ x
    zero, mean = output_error(w, keep, H), output_error(w, keep, H, fit_side(w, keep, group))
    data = output_error(w, keep, H, fit_side(w, keep, group, "data", H))
    assert data <= zero and data <= mean + 1e-4 * zero  # which the ridge may cost
    brute = ((x.double() @ removed(w, keep).T) ** 2).sum()
    assert zero == pytest.approx(brute.item(), rel=1e-5)


def test_the_mean_can_make_the_output_worse_and_data_cannot():
    w, keep = masked(64, 64, seed=3)
    x = inputs(64, seed=3) * torch.linspace(0, 3, 64).exp()
    keep = NM(2, 4).project(w.abs() * x.norm(dim=0))
    H = x.T @ x
    zero = output_error(w, keep, H)
    assert output_error(w, keep, H, fit_side(w, keep)) > zero
    assert output_error(w, keep, H, fit_side(w, keep, 16, "data", H)) < 0.95 * zero


@pytest.mark.parametrize("N,K,group", [(24, 64, 8), (96, 40, 5), (172, 30, 4), (30, 172, 16)])
@pytest.mark.parametrize("has_hessian", [True, False])
def test_svd_is_the_best_matrix_of_its_rank(N, K, group, has_hessian):
    w, keep = masked(N, K)
    x = inputs(K).double()
    H = x.T @ x if has_hessian else torch.eye(K, dtype=torch.float64)
    branch = fit_side(w, keep, group, "svd", H if has_hessian else None, damp=0)
    assert branch.num_numbers <= N * -(-K // group) < branch.num_numbers + N + K, "the whole budget, and not more"
    root = torch.linalg.cholesky(H)
    tail = torch.linalg.svdvals(removed(w, keep) @ root)[branch.rank :].square().sum()
    assert output_error(w, keep, H, branch) == pytest.approx(tail.item(), rel=1e-4)


def test_at_the_same_number_of_stored_numbers_svd_beats_data_beats_the_mean_on_correlated_inputs():
    """A low rank of inputs can turn it round, so this is a fact about these inputs, and not a promise."""
    w, keep = masked(128, 128)
    x = inputs(128)
    H = x.T @ x
    branches = [fit_side(w, keep), fit_side(w, keep, 16, "data", H), fit_side(w, keep, 16, "svd", H)]
    mean, data, svd = (output_error(w, keep, H, branch) / output_error(w, keep, H) for branch in branches)
    assert {branch.num_numbers for branch in branches} == {1024}
    assert svd < 0.95 * data and data < 0.95 * mean and mean < 1


def test_svd_gives_z_the_size_of_x():
    w, keep = masked(64, 96)
    x = 100 * inputs(96)
    branch = fit_side(w, keep, 8, "svd", x.T @ x)
    assert (x @ branch.X.T).square().mean().item() == pytest.approx(x.square().mean().item(), rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("method", ["mean", "data", "svd"])
def test_weights_of_any_dtype_and_stride(method, dtype):
    w, keep = masked(32, 48, dtype=dtype)
    x = inputs(48)
    H = None if method == "mean" else x.T @ x
    turned = fit_side(w.T.contiguous().T, keep.T.contiguous().T, 16, method, H)
    plain = fit_side(w, keep, 16, method, H)
    assert torch.equal(turned.S, plain.S) and plain.S.dtype == torch.float32
    assert turned == plain


@pytest.mark.parametrize("method", ["mean", "data", "svd"])
def test_nothing_removed_makes_a_branch_that_adds_nothing(method):
    w, keep = torch.randn(32, 48), torch.ones(32, 48, dtype=torch.bool)
    x = inputs(48)
    branch = fit_side(w, keep, 16, method, None if method == "mean" else x.T @ x)
    X = block_indicator(48, 16) if branch.X is None else branch.X
    assert bool((branch.S @ X == 0).all())


def test_features_that_were_never_fed_get_nothing():
    w, keep = masked(8, 64)
    x = inputs(64)
    x[:, 16:32] = 0
    S = fit_side(w, keep, 16, "data", x.T @ x).S
    assert bool((S[:, 1] == 0).all()) and bool((S[:, [0, 2, 3]] != 0).any())


def test_a_refit_finds_what_is_missing():
    generator = torch.Generator().manual_seed(0)
    z, truth = torch.randn(300, 12, generator=generator), torch.randn(20, 12, generator=generator)
    start = truth + 0.3 * torch.randn(20, 12, generator=generator)
    missing = z @ (truth - start).T
    S = start + fit_residual(missing.T @ z, z.T @ z, damp=1e-9)
    torch.testing.assert_close(S, truth, rtol=1e-4, atol=1e-5)
    noise = torch.randn(300, 20, generator=generator)
    changes = [fit_residual(noise.T @ z, z.T @ z, damp=damp).norm().item() for damp in (0.0, 0.1, 10.0)]
    assert changes[0] > changes[1] > changes[2] > 0, "the ridge pulls S towards what it is"
    reference = torch.linalg.lstsq(z.double(), noise.double()).solution.T
    torch.testing.assert_close(fit_residual(noise.T @ z, z.T @ z, damp=0.0).double(), reference, rtol=1e-4, atol=1e-6)


def test_bad_input():
    w, keep = masked(8, 32)
    H = torch.eye(32)
    for message, call in {
        "unknown method 'sum': known are 'data', 'mean', 'svd'": lambda: fit_side(w, keep, 16, "sum"),
        "keep_NK must be boolean": lambda: fit_side(w, keep.float(), 16),
        r"keep_NK must be boolean \(8, 32\), got torch.bool of shape \(8, 31\)": lambda: fit_side(w, keep[:, 1:]),
        "w_NK must be a floating matrix": lambda: fit_side(w.int(), keep),
        "group=0 is no number": lambda: fit_side(w, keep, 0),
        "group=1.5 is no number": lambda: fit_side(w, keep, 1.5),
        "damp=-1 is no share": lambda: fit_side(w, keep, 16, "data", H, damp=-1),
        "method='data' needs hessian=": lambda: fit_side(w, keep, 16, "data"),
        "method='mean' makes no use of a hessian": lambda: fit_side(w, keep, 16, "mean", H),
        r"the hessian is \(31, 31\), the weight has 32 features": lambda: fit_side(w, keep, 16, "data", H[1:, 1:]),
        "the layer saw no input": lambda: fit_side(w, keep, 16, "data", 0 * H),
        "singular with damp=0": lambda: fit_side(w, keep, 1, "data", torch.ones(32, 32), damp=0),
        "group=32 leaves 8 numbers, and one column of S and row of X are 40": lambda: fit_side(w, keep, 32, "svd"),
        r"give C \[N, r\] and Z \[r, r\]": lambda: fit_residual(torch.zeros(3, 4), torch.eye(3)),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    for call in (
        lambda: fit_side(w / 0, keep),
        lambda: fit_side(w, keep, 16, "data", H * float("nan")),
        lambda: fit_residual(torch.full((2, 3), float("inf")), torch.eye(3)),
    ):
        with pytest.raises(NonFiniteError):
            call()


def test_the_error_of_a_branch_in_16_bits():
    w, keep = masked(8, 32)
    branch = fit_side(w, keep)
    half = SideBranch(branch.S.bfloat16(), None, branch.group)
    assert output_error(w, keep, torch.eye(32), half) == pytest.approx(
        output_error(w, keep, torch.eye(32), branch), rel=1e-2
    )
