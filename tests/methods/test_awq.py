"""Scaled inputs: the choice by brute force in float64, the mask and the model's function as they were, outliers."""

import copy

import pytest
import torch

import sparsekit as sk
from sparsekit.archs import Coupling, Producer, find_couplings, fold_scales_
from sparsekit.errors import Unsupported
from sparsekit.formats import FORMATS
from sparsekit.methods import AWQ, Decision, SparseGPT
from sparsekit.methods.awq import rounding_error
from sparsekit.methods.grid import round_to_nearest
from sparsekit.methods.inverse_factor import inverse_factor
from sparsekit.nn import SideLinear, side_layers
from sparsekit.patterns import NM
from sparsekit.targets import is_linear, weight_NK
from tests.archs.tiny_models import tiny_model, token_samples
from tests.methods.test_grid import numbers_of
from tests.methods.test_sparsegpt_rounding import correlated, hessian_of, output_error, stored, weight_of
from tests.methods.test_wide import branched_model
from tests.test_reorder import gpt2, llama, output

FORMAT_NAMES = ["semi24_int8", "semi24_int4", "semi24_fp8"]


def sparse(N, K, seed=0):
    w = weight_of(N, K, seed)
    return w * NM(2, 4).project(w.abs())


def coupling_of(C, head_size=None, repeats=1):
    return Coupling("value", ("consumer",), (Producer("producer"),), C, head_size or C, repeats)


def with_outliers(M, K, seed=0, size=30.0):
    """Inputs of which a few channels are far stronger than the others, as in large models."""
    x = correlated(M, K, seed)
    x[:, [3, K // 2, K - 2]] *= size
    return x


def reference_error(w, scales, C, format):
    """Row after row, span after span, in float64: round w * scales on the best of the shares, and weigh what is left.

    C is [K, K] in any case.
    """
    N, K = w.shape
    size = 128 if format == "semi24_int4" else K
    q = numbers_of(format)
    total = 0.0
    for n in range(N):
        error = torch.zeros(K, dtype=torch.float64)
        for first in range(0, K, size):
            span = slice(first, min(first + size, K))
            v, costs = w[n, span].double() * scales[span], C.diagonal()[span] / scales[span] ** 2
            widest = stored(v.abs().max().item() / q.max().item(), format) or 1.0
            best, least = None, float("inf")
            for tenths in range(10, 3, -1):
                grid = q * (stored(widest * tenths / 10, format) or 1.0)
                rounded = grid[(v[:, None] - grid).abs().argmin(dim=1)] * (v != 0)
                cost = ((rounded - v) ** 2 * costs).sum().item()
                if cost < least:
                    best, least = (rounded - v) / scales[span], cost
            error[span] = best
        total += (error @ C @ error).item()
    return total


@pytest.mark.parametrize("diagonal", [False, True], ids=["form", "diagonal"])
@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("N,K", [(3, 12), (2, 7), (2, 141)])
def test_the_error_of_scales_is_that_of_the_definition(N, K, format, diagonal):
    w, x = sparse(N, K), correlated(3 * K, K)
    scales = (torch.rand(K, generator=torch.Generator().manual_seed(2)) * 2 - 1).exp()
    H = x.T @ x
    costs = H.diagonal() if diagonal else H
    C = torch.diag(H.diagonal().double()) if diagonal else H.double()
    expected = reference_error(w, scales.double(), C, format)
    assert rounding_error(w, scales, costs, format) == pytest.approx(expected, rel=2e-2)


@pytest.mark.parametrize("compensate", [True, False])
@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("C,head_size,repeats", [(24, 24, 1), (10, 5, 3), (7, 7, 1)])
def test_the_best_power_of_the_rms_is_chosen(C, head_size, repeats, format, compensate):
    coupling, K = coupling_of(C, head_size, repeats), C * repeats
    x = with_outliers(200, K)
    x[:, 1] = 0  # a channel that says nothing
    weights, statistics = [sparse(4, K), 3 * sparse(2, K, seed=1)], hessian_of(x)
    config = AWQ(format=format, compensate=compensate)
    found = config.input_scales(coupling, weights, statistics)
    H = statistics.matrix.double()
    costs = H
    if compensate:
        order = config._order(statistics)
        inverse = torch.linalg.inv(_damped(H)[order][:, order])
        U = torch.linalg.cholesky(inverse, upper=True)
        costs = torch.diag(U.diagonal().square().reciprocal()[order.argsort()])
    energy = torch.zeros(C, dtype=torch.float64)
    for k, channel in enumerate(coupling.source.tolist()):
        energy[channel] += H[k, k]
    rms = energy.sqrt().clamp_min(1e-4 * energy.max().sqrt())
    errors = []
    for step in range(21):
        s = rms ** (step / 20)
        s = s / (s.max() * s.min()).sqrt()
        errors.append(sum(reference_error(w, s[coupling.source], costs, format) for w in weights))
    chosen = torch.ones(C, dtype=torch.float64) if found is None else found.double()
    error = sum(reference_error(w, chosen[coupling.source], costs, format) for w in weights)
    assert error <= 1.02 * min(errors) + 1e-12
    if found is not None:
        assert found.max() * found.min() == pytest.approx(1, rel=1e-4)
        power = (chosen.log() - chosen.log().mean()) @ (rms.log() - rms.log().mean()) / rms.log().var() / (C - 1)
        assert float(power) * 20 == pytest.approx(round(float(power) * 20), abs=1e-2)
    if not compensate and format != "semi24_fp8":
        assert found is not None


def _damped(H):
    dead = H.diagonal() == 0
    level = H.diagonal()[~dead].mean()
    return H + torch.diag(torch.where(dead, level, 0.01 * level))


def test_the_factor_turned_by_the_scales_is_the_factor_of_the_scaled_hessian():
    """What makes the search cheap: U of H / s s^T is U s, so costs need no factor for each candidate."""
    x, scales = correlated(200, 24), torch.rand(24) + 0.5
    statistics = hessian_of(x)
    U = inverse_factor(statistics, 0.0).U
    scaled = inverse_factor(statistics.scaled(scales), 0.0).U
    torch.testing.assert_close(scaled, U * scales, rtol=1e-3, atol=1e-4)
    assert torch.equal(statistics.matrix, x.T @ x)


@pytest.mark.parametrize("values", ["zeros", "white"])
def test_nothing_is_scaled_where_it_gains_nothing(values):
    x = torch.zeros(10, 8) if values == "zeros" else torch.eye(8).repeat(4, 1)
    assert AWQ(format="semi24_int4").input_scales(coupling_of(8), [sparse(3, 8)], hessian_of(x)) is None


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_outliers_cost_less(format):
    """Rounded to nearest, outputs are far nearer with scales; made up for by other columns, no further than without."""
    K = 256
    nearest, scaled, walked, both = [], [], [], []
    for seed in range(3):
        w, statistics = sparse(64, K, seed), hessian_of(x := with_outliers(800, K, seed))
        for compensate, without, with_scales in ((False, nearest, scaled), (True, walked, both)):
            config = AWQ(format=format, compensate=compensate)
            s = config.input_scales(coupling_of(K), [w], statistics)
            s = torch.ones(K) if s is None else s
            without.append(output_error(w, config.decide(w, statistics).weight, x))
            decision = config.decide(w * s, statistics.scaled(s))
            assert torch.equal(decision.keep, NM(2, 4).project(w.abs()))
            with_scales.append(output_error(w, decision.weight / s, x))
    assert sum(both) < 1.02 * sum(walked) < 0.9 * sum(nearest)
    if format == "semi24_int4":
        assert sum(scaled) < 0.85 * sum(nearest)


class Unrounded(AWQ):
    """Scales inputs, and leaves it at that."""

    def decide(self, w_NK, statistics):
        return Decision(self.project(w_NK.abs()), w_NK, torch.ones(1))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scaling_changes_neither_the_mask_nor_what_the_model_computes(family, dtype):
    model = {"llama": llama, "gpt2": gpt2}[family]().to(dtype)
    sk.prune_(model, "magnitude", progress=False)
    before, zeros = output(model), {n: weight_NK(m) == 0 for n, m in model.named_modules() if is_linear(m)}
    old = copy.deepcopy(model)
    plan = sk.prune_(model, Unrounded(format="semi24_int4", compensate=False), dataset=token_samples(), progress=False)
    scaled = [
        coupling
        for coupling in find_couplings(model)
        if any(
            not torch.equal(model.get_submodule(name).weight, old.get_submodule(name).weight)
            for name in coupling.consumers
        )
    ]
    assert {coupling.kind for coupling in scaled} >= ({"norm", "value", "mlp"} if family == "llama" else {"norm"})
    for name, mask in plan.masks.items():
        assert (
            torch.equal(weight_NK(model.get_submodule(name)) == 0, zeros[name]) and not (mask.keep & zeros[name]).any()
        )
    error = (output(model).float() - before.float()).norm() / before.float().norm()
    assert error < (1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("compensate", [True, False])
def test_a_sparse_model_is_only_scaled_and_rounded(format, compensate):
    model = llama()
    sk.prune_(model, "magnitude", progress=False)
    zeros = {name: weight_NK(module) == 0 for name, module in model.named_modules() if is_linear(module)}
    before = output(model)
    plan = sk.prune_(
        model,
        AWQ(format=format, compensate=compensate),
        dataset=token_samples(),
        num_calibration_samples=6,
        progress=False,
    )
    assert plan.made_by.method == "awq" and plan.made_by.updates_weights
    for name, mask in plan.masks.items():
        assert torch.equal(mask.keep, ~zeros[name]), "a mask changed"
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    sk.unpack_(sk.pack_(model, format, "reference", scales=plan.scales))
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert (output(model) - before).norm() < 0.2 * before.norm()


def test_a_dense_model_gets_the_mask_of_sparsegpt():
    model, expected = llama(), llama()
    plan = sk.prune_(model, AWQ(format="semi24_fp8"), dataset=token_samples(), progress=False)
    wanted = sk.prune_(expected, SparseGPT(strongest_first=True), dataset=token_samples(), progress=False)
    first = [name for name in plan.masks if "layers.0.self_attn" in name and "o_proj" not in name]
    assert len(first) == 3  # those whose inputs no rounding has touched yet
    for name in first:
        assert torch.equal(plan.masks[name].keep, wanted.masks[name].keep)


def test_without_a_quantised_format_it_is_sparsegpt():
    model, expected = llama(), llama()
    with pytest.warns(UserWarning, match="none is given: this is SparseGPT.*format='semi24_int4'"):
        sk.prune_(model, sk.AWQ(), dataset=token_samples(), progress=False)
    sk.prune_(expected, "sparsegpt", dataset=token_samples(), progress=False)
    ours, theirs = model.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_to_nearest_means_the_least_error_of_each_weight(format):
    w, statistics = sparse(5, 150), hessian_of(correlated(300, 150))
    decision = AWQ(format=format, compensate=False).decide(w, statistics)
    rounded, scales = round_to_nearest(w, w != 0, format, statistics.matrix.diagonal())
    assert torch.equal(decision.weight, rounded) and torch.equal(decision.scales, scales)
    plain, _ = round_to_nearest(w, w != 0, format)
    costs = statistics.matrix.diagonal()
    assert ((rounded - w).square() * costs).sum() <= ((plain - w).square() * costs).sum()


def test_the_drop_in_packs_what_it_scaled():
    model = tiny_model("llama")
    sk.prune_(model, "magnitude", progress=False)
    packed = sk.sparsify(
        model,
        "2:4",
        method="awq",
        dataset=token_samples(),
        num_calibration_samples=6,
        format="semi24_int4",
        progress=False,
    )
    assert packed is model and sk.check(model).ok
    assert FORMATS.get("semi24_int4").name in {layer.format for layer in model.modules() if hasattr(layer, "format")}


def test_inputs_that_a_branch_sums_are_not_scaled_and_said():
    model = branched_model()
    before = {name: t.clone() for name, t in model.state_dict().items() if "norm" in name}
    plan = sk.prune_(model, AWQ(format="semi24_int4"), dataset=token_samples(), progress=False)
    assert any("side branch sums them in groups" in note for note in plan.notes)
    assert any("no layer has inputs" in note for note in plan.notes)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())


def test_inputs_that_a_trained_x_reads_are_scaled_with_it():
    model = branched_model(has_X=True)
    before = output_of(model)
    old = {name: layer.side_X.clone() for name, layer in side_layers(model).items()}
    config = Unrounded(format="semi24_int4", compensate=False)
    for coupling in find_couplings(model):
        scales = torch.rand(coupling.num_channels) + 0.5
        fold_scales_(model, coupling, scales)
        name = coupling.consumers[0]
        layer = model.get_submodule(name)
        assert isinstance(layer, SideLinear)
        torch.testing.assert_close(layer.side_X, old[name] * scales[coupling.source])
    torch.testing.assert_close(output_of(model), before, rtol=1e-4, atol=1e-4)
    notes = sk.prune_(model, config, dataset=token_samples(), progress=False).notes
    assert not any("scaled" in note for note in notes)


def output_of(model):
    with torch.no_grad():
        return model(input_ids=torch.stack(token_samples(3, 12))).logits


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_failed_call_puts_norms_and_weights_back(monkeypatch, error):
    model = llama()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rounded, calls = AWQ.rounded, []

    def fail_at_last(self, w_NK, decision):
        calls.append(1)
        if len(calls) == 14:
            assert not torch.equal(
                model.model.layers[0].input_layernorm.weight, before["model.layers.0.input_layernorm.weight"]
            )
            raise error
        return rounded(self, w_NK, decision)

    monkeypatch.setattr(AWQ, "rounded", fail_at_last)
    with pytest.raises(error):
        sk.prune_(model, AWQ(format="semi24_int4", compensate=False), dataset=token_samples(), progress=False)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_model_that_computes_otherwise_is_refused():
    """Between the norm and its readers something is added: a scale of the norm's weight is none of their inputs."""
    model = llama()
    sk.prune_(model, "magnitude", progress=False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    attention = model.model.layers[0].self_attn
    forward = attention.forward
    added = torch.linspace(0, 6, 24)
    attention.forward = lambda hidden_states, **kwargs: forward(hidden_states=hidden_states + added, **kwargs)
    with pytest.raises(Unsupported, match="gave another output .* use method='sparsegpt'"):
        sk.prune_(model, AWQ(format="semi24_int4", compensate=False), dataset=token_samples(), progress=False)
    after = model.state_dict()
    assert all(torch.equal(after[name], before[name]) for name in before)
