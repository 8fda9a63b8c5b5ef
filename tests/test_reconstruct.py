"""Local reconstruction against least squares in float64, and against whole forwards of both models."""

import copy
import sys

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sparsekit as sk
from sparsekit.calibration import Walk
from sparsekit.errors import NonFiniteError, PatternError
from sparsekit.evaluate import perplexity
from sparsekit.nn import sparse_layers
from sparsekit.nn.side import install_side_
from sparsekit.plan import SideBranch
from sparsekit.reconstruct import reconstruct_
from sparsekit.targets import find_targets, weight_NK
from tests.archs.tiny_models import BUILDERS, tiny_model, token_samples

QUICK = {"epochs": 4, "batch_size": 2, "progress": False}


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in after)


def pruned_copy(dense, method="magnitude", **options):
    model = copy.deepcopy(dense)
    return model, sk.prune_(model, method, progress=False, **options)


def correlated(M, K, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator) / K**0.5 + torch.eye(K)
    return torch.randn(M, K, generator=generator) @ mix


def least_squares(x_MK, y_MN, keep_NK, bias):
    """Row by row, the best weights where `keep` allows them, and the best bias, in float64."""
    x, y, weight = x_MK.double(), y_MN.double(), torch.zeros(keep_NK.shape, dtype=torch.float64)
    offsets = torch.zeros(len(keep_NK), dtype=torch.float64)
    ones = torch.ones(len(x), 1 if bias else 0, dtype=torch.float64)
    for n, keep in enumerate(keep_NK):
        solution = torch.linalg.lstsq(torch.cat((x[:, keep], ones), dim=1), y[:, n, None]).solution[:, 0]
        weight[n, keep] = solution[: int(keep.sum())]
        offsets[n] = solution[-1] if bias else 0
    return weight, offsets


def share_lost(out, target):
    return float((out.double() - target.double()).square().sum() / target.double().square().sum())


class TestLeastSquares:
    """A linear layer by itself: what Adam is after is known exactly."""

    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
    @pytest.mark.parametrize("pattern", ["2:4", "2x3", "unstructured"])
    def test_one_layer(self, pattern, bias):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(13, 7, bias=bias))
        x = correlated(256, 13)
        model, plan = pruned_copy(dense, sk.Magnitude(pattern=pattern))
        keep = plan.masks["0"].keep
        data = [x, x]  # the second judges
        report = reconstruct_(model, dense=dense, dataset=data, **QUICK | {"epochs": 400, "batch_size": 1})
        weight, offsets = least_squares(x, dense(x).detach(), keep, bias)
        lost = share_lost(F.linear(x.double(), weight, offsets), dense(x).detach())
        assert report.rows[0]["loss after"] == pytest.approx(lost, rel=1e-3)
        assert report.rows[0]["loss before"] > 1.05 * lost, "so that there was something to gain"
        assert (model[0].weight - weight).abs().max() < 0.02 * weight.abs().max()
        assert bool((model[0].weight[~keep] == 0).all())

    def test_a_layer_makes_up_for_those_before_it(self):
        torch.manual_seed(0)
        dense = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
        x = correlated(512, 12)
        model, plan = pruned_copy(dense)
        options = QUICK | {"epochs": 600, "batch_size": 1, "learning_rate": 0.05}
        reconstruct_(model, plan, dense=dense, dataset=[x, x], **options)
        inside, target = torch.tanh(model[0](x)).detach(), dense(x).detach()
        keep = plan.masks["2"].keep
        best, *others = (
            share_lost(F.linear(inside.double(), *least_squares(fitted_on, fitted_to, keep, bias=True)), target)
            for fitted_on, fitted_to in (
                (inside, target),
                (inside, dense[2](inside).detach()),  # what the dense layer makes of the student's inputs
                (torch.tanh(dense[0](x)).detach(), target),  # as if nothing before it had been pruned
            )
        )
        lost = share_lost(model(x).detach(), target)
        assert lost == pytest.approx(best, rel=0.01) and min(others) > 1.05 * best

    def test_conv1d(self):
        from transformers.pytorch_utils import Conv1D

        torch.manual_seed(0)
        dense = nn.Sequential(Conv1D(6, 12))
        dense[0].weight.data.normal_()
        x = correlated(256, 12)
        model, plan = pruned_copy(dense)
        report = reconstruct_(model, dense=dense, dataset=[x, x], **QUICK | {"epochs": 300, "batch_size": 1})
        keep = plan.masks["0"].keep
        weight, offsets = least_squares(x, dense(x).detach(), keep, bias=True)
        lost = share_lost(F.linear(x.double(), weight, offsets), dense(x).detach())
        assert report.rows[0]["loss after"] == pytest.approx(lost, rel=1e-3)
        assert bool((model[0].weight.T[~keep] == 0).all())

    def test_the_model_itself_may_be_the_layer(self):
        torch.manual_seed(0)
        dense = nn.Linear(8, 5)
        x = correlated(64, 8)
        model, _ = pruned_copy(dense)
        (row,) = reconstruct_(model, dense=dense, dataset=[x], **QUICK | {"epochs": 50}).rows
        assert row["loss after"] < row["loss before"] and (model.weight == 0).float().mean() == 0.5


def outputs_of(model, names, batch):
    """What some modules give in a forward of the whole model."""
    found = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: found.__setitem__(
                name, (output[0] if isinstance(output, tuple) else output).double()
            )
        )
        for name in names
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return found


def loss_by_hand(student, dense, names, batch, keep=...):
    ours, theirs = (outputs_of(model, names, batch) for model in (student, dense))
    return {name: share_lost(ours[name][keep], theirs[name][keep]) for name in names}


@pytest.mark.parametrize("family", [*BUILDERS, "t5"])
def test_every_family(family):
    """Masks, all that is not in a pruned block, and the losses that are reported, by whole forwards of both models."""
    dense = tiny_model(family)
    rows = [{"input_ids": ids[None]} for ids in token_samples(8)]
    if family == "t5":
        rows = [row | {"decoder_input_ids": row["input_ids"][:, :9]} for row in rows]
    model, plan = pruned_copy(dense)
    model.train()
    before, keeps = state(model), {name: mask.keep for name, mask in plan.masks.items()}
    report = reconstruct_(model, plan, dense=dense, dataset=rows, **QUICK)
    assert model.training and all(parameter.requires_grad for parameter in model.parameters())
    assert all(parameter.grad is None for parameter in [*model.parameters(), *dense.parameters()])
    assert not any(module._forward_hooks or "forward" in module.__dict__ for module in model.modules())
    units = [row["block"] for row in report.rows]
    assert all(row["loss after"] <= row["loss before"] for row in report.rows)
    assert sum(row["weights"] == "refitted" for row in report.rows) >= len(units) - 1
    model.eval()
    last = {key: torch.cat([row[key] for row in rows[-2:]]) for key in rows[0]}  # the batch that judged
    expected = loss_by_hand(model, dense, units, last)
    for row in report.rows:
        assert row["loss after"] == pytest.approx(expected[row["block"]], rel=1e-3), row["block"]
    for name, layer in find_targets(model).items():
        assert bool((weight_NK(layer)[~keeps[name]] == 0).all()), name
        assert not torch.equal(weight_NK(layer), weight_NK(find_targets(dense)[name])), name
    outside = {key for key in before if not any(key.startswith(f"{unit}.") for unit in units)}
    assert outside and all(torch.equal(model.state_dict()[key], before[key]) for key in outside)
    assert plan.made_by.updates_weights and any("reconstructed" in note for note in plan.notes)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
@pytest.mark.parametrize("pattern", ["2:4", "4x4", "unstructured"])
def test_after_any_method_and_pattern(method, pattern):
    dense, data = tiny_model("llama"), token_samples(8)
    model, plan = pruned_copy(dense, sk.METHODS.get(method)(pattern=pattern), dataset=data)
    zeros = {name: weight_NK(layer) == 0 for name, layer in find_targets(model).items()}
    report = reconstruct_(model, dense=dense, dataset=data, **QUICK)
    for name, layer in find_targets(model).items():
        w_NK = weight_NK(layer)
        assert bool((w_NK[zeros[name]] == 0).all()) and not bool(w_NK[zeros[name]].signbit().any())
        assert plan.masks[name].pattern.count_violations(w_NK != 0) == 0
    assert [row["weights"] for row in report.rows] == ["refitted"] * 2


def test_norms_and_biases_are_an_option():
    dense, data = tiny_model("opt"), token_samples(8)
    for wanted in (True, False):
        model, _ = pruned_copy(dense)
        before = state(model)
        reconstruct_(model, dense=dense, dataset=data, norms_and_biases=wanted, **QUICK)
        moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
        vectors = {key for key in moved if model.state_dict()[key].dim() == 1}
        assert len(moved) > len(vectors) and bool(vectors) == wanted
        if wanted:
            assert {"model.decoder.layers.0.fc1.bias", "model.decoder.layers.1.final_layer_norm.weight"} <= vectors


def test_what_is_shared_is_left_alone():
    class Block(nn.Module):
        def __init__(self, norm):
            super().__init__()
            self.norm, self.linear = norm, nn.Linear(8, 8)

        def forward(self, x):
            return x + torch.tanh(self.linear(self.norm(x)))

    torch.manual_seed(0)
    norm = nn.LayerNorm(8)
    dense = nn.Sequential(*(Block(norm) for _ in range(3)), nn.Linear(8, 8, bias=False))
    dense[1].linear.bias = dense[0].linear.bias
    model, _ = pruned_copy(dense)
    before = state(model)
    reconstruct_(model, dense=dense, dataset=correlated(64, 8).split(16), **QUICK)
    moved = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert moved == {f"{i}.linear.weight" for i in range(3)} | {"2.linear.bias", "3.weight"}
    assert model[0].norm is model[1].norm and model[1].linear.bias is model[0].linear.bias


@pytest.mark.parametrize("family", ["llama", "bert"])
def test_padding_counts_for_nothing(family):
    dense = tiny_model(family)
    ids = torch.stack(token_samples(8, 12))
    mask = torch.ones_like(ids)
    mask[::2, 7:] = 0
    results = []
    for filling in (0, 5):
        rows = [
            {"input_ids": torch.where(m.bool(), i, filling)[None], "attention_mask": m[None]}
            for i, m in zip(ids, mask, strict=True)
        ]
        model, _ = pruned_copy(dense)
        report = reconstruct_(model, dense=dense, dataset=rows, **QUICK)
        results.append((state(model), report))
    assert all(torch.allclose(results[0][0][key], value, atol=1e-5) for key, value in results[1][0].items())
    last = {key: torch.cat([row[key] for row in rows[-2:]]) for key in rows[0]}
    units = [row["block"] for row in report.rows if row["block"] != "bert.pooler.dense"]
    expected = loss_by_hand(model, dense, units, last, keep=last["attention_mask"].bool())
    for row in report.rows[: len(units)]:
        assert row["loss after"] == pytest.approx(expected[row["block"]], rel=1e-3)


def test_skips_over_blocks():
    """Blocks that cannot stand in for themselves: the dense model's part is run whole, with all of its weights."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 6)

        def forward(self, x):
            return torch.tanh(self.linear(x))

    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block() for _ in range(4)])

        def forward(self, input):
            first = self.blocks[0](input)
            return self.blocks[3](self.blocks[2](self.blocks[1](first)) + first)

    torch.manual_seed(0)
    dense = Skipping()
    model, _ = pruned_copy(dense)
    data = [torch.randn(4, 6) for _ in range(6)]
    report = reconstruct_(model, dense=dense, dataset=data, **QUICK | {"batch_size": 4, "epochs": 40})
    expected = loss_by_hand(model, dense, [f"blocks.{i}" for i in range(4)], {"input": data[-1]})
    assert {row["block"]: pytest.approx(row["loss after"], rel=1e-3) for row in report.rows} == expected
    assert all(row["weights"] == "refitted" for row in report.rows)


def test_a_layer_that_runs_twice_is_left_and_said():
    torch.manual_seed(0)
    twice = nn.Linear(8, 8)
    dense = nn.Sequential(twice, nn.Tanh(), twice, nn.Tanh(), nn.Linear(8, 4))
    model, _ = pruned_copy(dense)
    before = model[0].weight.detach().clone()
    report = reconstruct_(model, dense=dense, dataset=correlated(64, 8).split(16), **QUICK | {"batch_size": 16})
    assert [row["block"] for row in report.rows] == ["4"] and torch.equal(model[0].weight, before)
    assert report.notes[0] == "0: it runs 2 times in one forward: left as it is"


def test_an_expert_that_no_token_reaches_keeps_its_weights():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

        def forward(self, x):
            return x + torch.tanh(self.experts[0](x))

    torch.manual_seed(0)
    dense = nn.Sequential(Mixture(), Mixture())
    model, _ = pruned_copy(dense)
    before = model[0].experts[1].weight.detach().clone()
    report = reconstruct_(model, dense=dense, dataset=correlated(64, 8).split(16), **QUICK | {"batch_size": 16})
    assert torch.equal(model[0].experts[1].weight, before) and report.rows[0]["weights"] == "refitted"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_learns_in_full(dtype):
    """Steps far smaller than the rounding of a weight must add up: the gain is about that of fp32."""
    dense, data = tiny_model("llama"), token_samples(24)
    gains = {}
    for kind in (torch.float32, dtype):
        theirs = copy.deepcopy(dense).to(kind)
        model, _ = pruned_copy(theirs)
        report = reconstruct_(model, dense=theirs, dataset=data, **QUICK | {"learning_rate": 1e-3, "epochs": 6})
        gains[kind] = [row["loss before"] / row["loss after"] for row in report.rows]
        assert all(parameter.dtype == kind for parameter in model.parameters())
    assert gains[torch.float32][0] > 1.02
    for exact, half in zip(*gains.values(), strict=True):
        assert half - 1 > 0.7 * (exact - 1)


def test_a_block_that_gets_worse_keeps_its_weights():
    dense, data = tiny_model("llama"), token_samples(8)
    model, plan = pruned_copy(dense)
    before = state(model)
    report = reconstruct_(model, plan, dense=dense, dataset=data, **QUICK | {"learning_rate": 100.0})
    assert same(model, before)
    assert all(row["weights"] == "as they were" and row["loss after"] == row["loss before"] for row in report.rows)
    assert len(report.notes) == 3 and "model.layers.0: refitting did not help (loss" in report.notes[0]
    assert report.summary["refitted"] == "0 of 2 blocks" and set(report.notes) <= set(plan.notes)


def test_equal_seeds_give_equal_bits():
    dense, results = tiny_model("gpt2"), []
    for seed, global_seed in ((3, 0), (3, 1), (4, 0)):
        model, _ = pruned_copy(dense)
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        reconstruct_(model, dense=dense, dataset=token_samples(8), seed=seed, **QUICK)
        assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"
        results.append(model)
    assert same(results[1], state(results[0])) and not same(results[2], state(results[0]))


def test_a_state_dict_will_do_and_so_will_what_pruning_changed():
    dense, data = tiny_model("gpt2"), token_samples(8)
    model, _ = pruned_copy(dense)
    reconstruct_(model, dense=dense, dataset=data, **QUICK)
    changed = {f"{name}.weight": dense.get_parameter(f"{name}.weight") for name in find_targets(dense)}
    for given in (dense.state_dict(), changed):
        other, _ = pruned_copy(dense)
        reconstruct_(other, dense=given, dataset=data, **QUICK)
        assert same(other, state(model))


def test_side_branches_stay_and_the_dense_model_has_none():
    dense, data = tiny_model("gpt2"), token_samples(8)
    model, _ = pruned_copy(dense)
    for name, layer in find_targets(model).items():
        N, K = weight_NK(layer).shape
        install_side_(model, name, SideBranch(0.1 * torch.randn(N, -(-K // 4)), None, 4))
    before = state(model)
    report = reconstruct_(model, dense=dense, dataset=data, **QUICK)
    expected = loss_by_hand(model, dense, ["transformer.h.0", "transformer.h.1"], {"input_ids": torch.stack(data[-2:])})
    assert {row["block"]: pytest.approx(row["loss after"], rel=1e-3) for row in report.rows} == expected
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if "side_" in key)


def test_inputs_in_another_order():
    """RIA with a permutation rewrites rows and columns; the dense weights come in the order that they had."""
    dense, data = tiny_model("llama"), token_samples(8)
    model, plan = pruned_copy(dense, sk.METHODS.get("ria")(permute=True), dataset=data)
    report = reconstruct_(model, plan, dense=dense, dataset=data, **QUICK)
    units = [row["block"] for row in report.rows]
    expected = loss_by_hand(model, dense, units, {"input_ids": torch.stack(data[-2:])})
    assert {row["block"]: pytest.approx(row["loss after"], rel=1e-3) for row in report.rows} == expected
    assert all(row["weights"] == "refitted" for row in report.rows)


class TestFailure:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    def test_whatever_ends_it_early_leaves_the_model_as_it_was(self, error, monkeypatch):
        dense = tiny_model("opt")
        model, plan = pruned_copy(dense)
        model.model.decoder.layers[0].fc1.weight.requires_grad_(False)
        before, notes = state(model), list(plan.notes)
        finish, visits = Walk.finish, []

        def finish_some(self, step, outputs=None):
            visits.append(step)
            if len(visits) == 6:  # project_in and the first block of both walks have passed
                assert not same(model, before), "something has changed by now"
                raise error
            finish(self, step, outputs)

        monkeypatch.setattr(Walk, "finish", finish_some)
        with pytest.raises(error):
            reconstruct_(model, plan, dense=dense, dataset=token_samples(8), **QUICK)
        assert same(model, before) and plan.notes == notes and not plan.made_by.updates_weights
        assert not model.model.decoder.layers[0].fc1.weight.requires_grad
        assert model.model.decoder.layers[0].fc2.weight.requires_grad

    def test_activations_that_are_not_finite(self):
        dense = tiny_model("llama")
        model, _ = pruned_copy(dense)
        before = state(model)
        dense.model.layers[1].mlp.down_proj.weight.data[3, 3] = torch.nan
        with pytest.raises(NonFiniteError, match="the outputs of model.layers.1 hold NaN or infinity"):
            reconstruct_(model, dense=dense, dataset=token_samples(4), **QUICK)
        assert same(model, before)


class TestBadInput:
    @pytest.fixture
    def models(self):
        dense = tiny_model("llama")
        return dense, *pruned_copy(dense)

    def refused(self, model, message, error=ValueError, **options):
        before = state(model)
        with pytest.raises(error, match=message):
            reconstruct_(model, **{"dataset": token_samples(4)} | QUICK | options)
        assert same(model, before)

    def test_no_dense_weights(self, models):
        dense, model, _ = models
        self.refused(model, r"pass dense=, the original model .*sparsify\(model, ..., reconstruct=True\)")
        self.refused(model, "dense is the pruned model itself", dense=model)
        self.refused(model, "dense has the weights of the pruned model", dense=copy.deepcopy(model))
        self.refused(model, "dense is a str: pass the original model, or its state dict", dense="model")
        partial = {key: value for key, value in dense.state_dict().items() if "layers.1.mlp.up_proj" not in key}
        self.refused(model, "dense lacks model.layers.1.mlp.up_proj.weight", dense=partial)
        self.refused(
            model, r"lm_head.weight is \[61, 12\] in dense and \[61, 20\] in the model", dense=tiny_model("opt")
        )
        wide = dense.state_dict() | {"model.layers.0.mlp.up_proj.weight": torch.zeros(40, 20)}
        self.refused(model, r"up_proj.weight is \[40, 20\] in dense and \[36, 20\] in the model", dense=wide)

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"epochs": 0}, "epochs=0 must be a whole number of at least 1"),
            ({"epochs": 1.5}, "epochs=1.5 must be a whole number"),
            ({"learning_rate": -1.0}, "learning_rate=-1.0 must be a positive share of the size of a weight"),
            ({"learning_rate": float("nan")}, "learning_rate=nan"),
            ({"learning_rate": True}, "learning_rate=True"),
            ({"dataset": None}, "no dataset"),
            ({"batch_size": 0}, "batch_size=0 must be a whole number of at least 1"),
            ({"targets": "nothing"}, "targets=.* matches no layer"),
        ],
    )
    def test_arguments(self, models, options, message):
        dense, model, _ = models
        self.refused(model, message, dense=dense, **options)

    def test_nothing_is_pruned(self, models):
        dense, *_ = models
        self.refused(copy.deepcopy(dense), "no layer to refit is pruned: call sparsekit.prune_ first", dense=dense)

    def test_a_weight_that_was_damaged(self, models):
        dense, model, _ = models
        weight = model.model.layers[0].mlp.up_proj.weight.data
        weight[0, :4] = 1.0
        self.refused(model, "up_proj: 1 of 180 groups of four break 2:4", error=PatternError, dense=dense)

    def test_a_plan_that_does_not_fit(self, models):
        dense, model, plan = models
        other, other_plan = pruned_copy(tiny_model("opt"))
        self.refused(model, "the plan does not fit this model", dense=dense, plan=other_plan)
        model.model.layers[1].mlp.up_proj.weight.data.fill_(1.0)
        self.refused(
            model, r"up_proj has non-zeros where the plan removes: call sparsekit.apply_", dense=dense, plan=plan
        )

    def test_weights_on_a_grid(self):
        dense, data = tiny_model("llama"), token_samples(4)
        model, plan = pruned_copy(dense, sk.SparseGPT(format="semi24_int8"), dataset=data)
        remedy = "Reconstruct first, and round afterwards: prune without a format"
        self.refused(model, f"q_proj: rounded for semi24_int8.*{remedy}", dense=dense)
        self.refused(model, f"the plan's layers: rounded for semi24_int8.*{remedy}", dense=dense, plan=plan)

    def test_packed_layers(self, models):
        dense, model, _ = models
        sk.pack_(model)
        with pytest.raises(ValueError, match="packed already: unpack_ the model"):
            reconstruct_(model, dense=dense, dataset=token_samples(4), **QUICK)


class TestSparsify:
    OPTIONS = {"dataset": token_samples(8), "num_calibration_samples": 8, "progress": False}

    @pytest.mark.filterwarnings("ignore")
    def test_keeps_the_dense_weights_by_itself(self):
        dense = tiny_model("gpt2")
        model, by_hand = copy.deepcopy(dense), copy.deepcopy(dense)
        assert sk.sparsify(model, reconstruct=True, **self.OPTIONS) is model
        plan = sk.prune_(by_hand, "sparsegpt", **self.OPTIONS)
        reconstruct_(by_hand, plan, dense=dense, **self.OPTIONS)
        sk.unpack_(model)
        assert all(torch.equal(value, state(by_hand)[key]) for key, value in model.state_dict().items())

    @pytest.mark.filterwarnings("ignore")
    def test_rounds_after_it(self):
        model = tiny_model("llama")
        sk.sparsify(model, reconstruct=True, format="semi24_int8", **self.OPTIONS)
        assert {layer.format for layer in sparse_layers(model).values()} == {"semi24_int8"}

    @pytest.mark.parametrize(
        "options,message",
        [
            ({"dataset": None, "method": "magnitude"}, "reconstruct=True needs calibration data"),
            ({"dataset": iter(token_samples(4))}, "reads the dataset more than once"),
            ({"method": "ast"}, "reconstruct=True is for one-shot methods"),
        ],
    )
    def test_refuses(self, options, message):
        model = tiny_model("llama")
        before = state(model)
        with pytest.raises(ValueError, match=message):
            sk.sparsify(model, reconstruct=True, **self.OPTIONS | options)
        assert same(model, before)

    def test_refuses_what_is_pruned_already(self):
        model, _ = pruned_copy(tiny_model("llama"))
        with pytest.raises(ValueError, match="the weights obey 2:4 already.*reconstruct_"):
            sk.sparsify(model, reconstruct=True, **self.OPTIONS)

    def test_a_failure_after_it_restores_all(self, monkeypatch):
        model = tiny_model("opt")
        before = state(model)
        monkeypatch.setattr(sys.modules["sparsekit.sparsify"], "check", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError), pytest.warns():
            sk.sparsify(model, reconstruct=True, **self.OPTIONS)
        assert same(model, before)


def test_perplexity_of_a_trained_model(wikilm):
    """On text that it was not refitted on, more than half of what magnitude pruning costs comes back."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from sparsekit.evaluate import read_tokens

    tokenizer = AutoTokenizer.from_pretrained(wikilm)
    dense = AutoModelForCausalLM.from_pretrained(wikilm, dtype=torch.float32)
    train, valid = (read_tokens(wikilm.parent / "text" / f"{split}.txt", tokenizer) for split in ("train", "valid"))
    model, _ = pruned_copy(dense)
    options = {"max_seq_length": 128, "max_tokens": 8192, "progress": False}
    found = [float(perplexity(each, valid, **options)) for each in (dense, model)]
    chunks = [train[start : start + 128] for start in range(0, 64 * 512, 512)]
    reconstruct_(model, dense=dense, dataset=chunks, epochs=2, progress=False)
    found.append(float(perplexity(model, valid, **options)))
    assert found[0] < found[2] < (found[0] + found[1]) / 2
