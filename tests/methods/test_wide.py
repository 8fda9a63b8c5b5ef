"""Weight and branch rounded as one: against x' written out, the packed layer, and rounding one after the other."""

import copy

import pytest
import torch
from torch import nn

import sparsekit as sk
from sparsekit.calibration import ColumnNorms, Hessian
from sparsekit.formats import FORMATS
from sparsekit.methods import AWQ, Magnitude, SparseGPT, Wanda
from sparsekit.methods.base import Decision
from sparsekit.methods.grid import round_to_nearest
from sparsekit.methods.wide import WideWeight
from sparsekit.nn import grid_of, install_side_, side_layers
from sparsekit.nn.side import SideLinear, block_indicator
from sparsekit.nn.side_columns import SideColumns
from sparsekit.patterns import NM
from sparsekit.plan import Plan, SideBranch
from tests.archs.tiny_models import tiny_model, token_samples
from tests.methods.test_sparsegpt_rounding import correlated, hessian_of, output_error, reference, weight_of

FORMAT_NAMES = ["semi24_int8", "semi24_int4", "semi24_fp8"]
SHAPES = [(5, 24, 8), (3, 19, 4), (4, 130, 16), (1, 7, 3), (6, 256, 16)]


def layer_with_branch(N, K, group, has_X=False, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator)
    linear = nn.Linear(K, N, bias=False)
    linear.weight.data = (w * NM(2, 4).project(w.abs())).to(dtype)
    rank = -(-K // group)
    X = torch.randn(rank, K, generator=generator) if has_X else None
    return SideLinear.from_linear(linear, SideBranch(0.3 * torch.randn(N, rank, generator=generator), X, group))


def written_out(x_MK, wide, layer):
    """x' column by column, in float64."""
    z = x_MK.double() @ (block_indicator(x_MK.shape[1], layer.group) if wide.X is None else wide.X).double().T
    out = torch.zeros(len(x_MK), wide.weight.shape[1], dtype=torch.float64)
    out[:, : x_MK.shape[1]] = x_MK.double()
    for j in range(z.shape[1]):
        out[:, -(-x_MK.shape[1] // 8) * 8 + j // 2 * 4 + j % 2] = z[:, j] * wide.z_scale
    return out


@pytest.mark.parametrize("has_X", [False, True], ids=["sums", "X"])
@pytest.mark.parametrize("N,K,group", SHAPES)
def test_statistics_of_the_wide_inputs_are_those_of_x_written_out(N, K, group, has_X):
    layer, x = layer_with_branch(N, K, group, has_X), correlated(50, K)
    wide = WideWeight.of(layer, NM(2, 4), "semi24_int8")
    assert wide.z_scale != 1
    if has_X:
        assert not torch.equal(wide.X, layer.side_X) and (wide.X - layer.side_X).abs().max() < 0.02 * wide.X.abs().max()
        layer.side_X.data = wide.X
    expected = written_out(x, wide, layer)
    H = wide.statistics(hessian_of(x))
    torch.testing.assert_close(H.matrix.double(), expected.T @ expected, rtol=1e-4, atol=1e-3)
    assert H.num_last == wide.weight.shape[1] - -(-K // 8) * 8
    torch.testing.assert_close(layer(x).double(), expected @ wide.weight.double().T, rtol=1e-4, atol=1e-4)
    norms = ColumnNorms(K, torch.device("cpu"))
    norms.add(x.abs())
    of_w = wide.statistics(norms).column_norms
    torch.testing.assert_close(of_w[:K], norms.column_norms)
    assert bool((of_w[(wide.weight != 0).any(dim=0)] > 0).all())


@pytest.mark.parametrize("N,K,group", SHAPES)
def test_splitting_undoes_widening(N, K, group):
    layer = layer_with_branch(N, K, group)
    wide = WideWeight.of(layer, NM(2, 4), "semi24_int8")
    assert wide.weight.dtype == torch.float32 and NM(2, 4).count_violations(wide.weight != 0) == 0
    keep = NM(2, 4).project(wide.weight.abs())
    for weight in (None, wide.weight.clone()):
        decision, S = wide.split(Decision(keep, weight, torch.ones(N), ("said",)))
        assert torch.equal(S, layer.side_S) and decision.notes == ("said",) and len(decision.scales) == N
        assert torch.equal(decision.keep, keep[:, :K])
        assert decision.weight is None if weight is None else torch.equal(decision.weight, layer.weight)


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("N,K,group", [(3, 24, 8), (2, 19, 4), (2, 130, 16)])
def test_the_walk_is_the_definition_with_the_branch_last(N, K, group, format):
    layer, x = layer_with_branch(N, K, group), correlated(3 * K, K)
    wide = WideWeight.of(layer, NM(2, 4), format)
    statistics = wide.statistics(hessian_of(x))
    decision = SparseGPT(format=format).decide(wide.weight, statistics)
    known, H = NM(2, 4).project(wide.weight.abs()), statistics.matrix
    x_wide = written_out(x, wide, layer).float()
    keep, q, scales = reference(wide.weight, x_wide, format, num_last=statistics.num_last, H=H, known=known)
    assert torch.equal(decision.keep, keep) and not decision.notes
    torch.testing.assert_close(decision.weight.double(), q * scales, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_rounding_both_at_once_is_nearer_than_one_after_the_other(format):
    K, group = 256, 16
    errors = []
    for seed in range(3):
        layer, x = layer_with_branch(64, K, group, seed=seed), correlated(1000, K, seed)
        wide, statistics = WideWeight.of(layer, NM(2, 4), format), hessian_of(x)
        at_once, S = wide.split(SparseGPT(format=format).decide(wide.weight, wide.statistics(statistics)))
        alone = SparseGPT(format=format).decide(layer.weight.detach(), statistics).weight
        rounded, _ = round_to_nearest(wide.weight, wide.weight != 0, format)
        to_nearest, S_nearest = wide.columns.split(rounded, wide.z_scale)
        indicator = block_indicator(K, group)
        merged = layer.weight + layer.side_S @ indicator
        errors.append(
            [
                output_error(merged, w + S_new @ indicator, x)
                for w, S_new in ((at_once.weight, S), (alone, S_nearest), (to_nearest, S_nearest))
            ]
        )
    at_once, one_after_the_other, to_nearest = torch.tensor(errors).mean(dim=0).tolist()
    assert at_once < 0.95 * one_after_the_other and at_once < 0.7 * to_nearest


def branched_model(dtype=torch.float32, has_X=False):
    """A small Llama that is 2:4, with a branch beside every layer."""
    torch.manual_seed(0)
    model = tiny_model("llama").to(dtype)
    sk.prune_(model, "magnitude", progress=False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            N, K = module.weight.shape
            X = 0.5 * torch.randn(-(-K // 8), K) if has_X else None
            install_side_(model, name, SideBranch(0.05 * torch.randn(N, -(-K // 8)), X, 8))
    return model


@pytest.mark.parametrize("has_X", [False, True], ids=["sums", "X"])
@pytest.mark.parametrize("config", [SparseGPT, Wanda, Magnitude, AWQ], ids=lambda config: config.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_packing_changes_neither_the_weight_nor_the_branch(format, dtype, config, has_X, tmp_path):
    model = branched_model(dtype, has_X)
    before = copy.deepcopy(model)
    plan = sk.prune_(model, config(format=format), dataset=token_samples(), progress=False)
    kind, layers = FORMATS.get(format), side_layers(model)
    assert set(plan.side) == set(plan.scales) == set(layers)
    for name, layer in layers.items():
        old = before.get_submodule(name)
        K = layer.in_features
        width = SideColumns(K, layer.rank, layer.group, has_X).packed_features
        assert plan.scales[name].shape == kind.grid.scale_shape(len(layer.weight), width)
        assert plan.side[name] == layer.branch and torch.equal(plan.scales[name], grid_of(layer, layer.weight)[1])
        assert torch.equal(plan.masks[name].keep, NM(2, 4).project(old.weight.abs()))
        assert not torch.equal(layer.side_S, old.side_S)
    plan.save(tmp_path / "plan")
    again = Plan.load(tmp_path / "plan")
    assert again == plan
    sk.apply_(model, again)
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sk.unpack_(sk.pack_(model, format, "reference", scales=plan.scales))
    after = model.state_dict()
    assert after.keys() == held.keys() and all(torch.equal(after[name], held[name]) for name in held)


def test_a_dense_weight_is_pruned_and_rounded_with_its_branch():
    model = branched_model()
    generator = torch.Generator().manual_seed(0)
    for layer in side_layers(model).values():
        layer.weight.data = torch.randn(layer.weight.shape, generator=generator) / 5
    plan = sk.prune_(model, SparseGPT(format="semi24_int4"), dataset=token_samples(), progress=False)
    assert sk.check(sk.pack_(model, "semi24_int4", "reference", scales=plan.scales), plan).ok


def test_without_a_quantised_format_the_branch_stays_as_it_is():
    model = branched_model()
    before = {name: layer.side_S.clone() for name, layer in side_layers(model).items()}
    plan = sk.prune_(model, "sparsegpt", dataset=token_samples(), progress=False)
    assert not plan.side and not plan.scales
    assert all(torch.equal(layer.side_S, before[name]) for name, layer in side_layers(model).items())


@pytest.mark.parametrize("shape", [(5,), (4, 1), (4, 3)], ids=str)
def test_scales_of_a_plan_that_fit_neither_the_weight_nor_both_are_refused(shape):
    model = branched_model()
    plan = sk.prune_(model, SparseGPT(format="semi24_int4"), dataset=token_samples(), progress=False)
    name = next(iter(plan.scales))
    plan.scales[name] = torch.ones(shape, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match=f"scales of {name} are"):
        plan.check_scales()


def test_a_failed_call_puts_branches_back(monkeypatch):
    model = branched_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config, calls = SparseGPT(format="semi24_int4"), []
    decide = SparseGPT.decide

    def fail_at_last(self, w_NK, statistics):
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return decide(self, w_NK, statistics)

    monkeypatch.setattr(SparseGPT, "decide", fail_at_last)
    with pytest.raises(KeyboardInterrupt):
        sk.prune_(model, config, dataset=token_samples(), progress=False)
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)


def test_hessians_of_layers_that_share_inputs_stay_apart():
    """The factor that is kept with a Hessian is not that of the wide one."""
    x = correlated(60, 24)
    statistics = hessian_of(x)
    SparseGPT(format="semi24_int4").decide(weight_of(3, 24), statistics)
    wide = WideWeight.of(layer_with_branch(3, 24, 8), NM(2, 4), "semi24_int4").statistics(statistics)
    assert isinstance(wide, Hessian) and not wide.factors and statistics.factors
