import copy
import warnings

import pytest
import torch
from torch import nn

from sparsekit.masks import Mask
from sparsekit.methods import Magnitude, SparseGPT
from sparsekit.nn import SideLinear, install_side_, side_layers
from sparsekit.plan import Plan, SideBranch
from sparsekit.prune import prune_
from sparsekit.surgery import apply_
from sparsekit.targets import find_targets, weight_NK
from tests.archs.tiny_models import tiny_model, token_samples


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_the_plan_makes_the_same_zeros_in_another_copy(family):
    model = tiny_model(family)
    fresh = copy.deepcopy(model)
    plan = prune_(model, "magnitude", progress=False)
    assert apply_(fresh, plan) is fresh
    assert same(fresh, model)
    apply_(fresh, plan)
    assert same(fresh, model), "applying twice must change nothing more"


def test_a_saved_plan_is_as_good(tmp_path):
    model, fresh = tiny_model("llama"), tiny_model("llama")
    prune_(model, Magnitude(pattern="4:8"), progress=False).save(tmp_path / "plan")
    assert same(apply_(fresh, Plan.load(tmp_path / "plan")), model)


def test_layers_stay_trainable_and_zeros_come_back():
    model = tiny_model("llama")
    plan = prune_(model, "magnitude", progress=False)
    apply_(model, plan)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ids = token_samples(2)[0][None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    layers = find_targets(model)
    assert any(bool((weight_NK(layer)[~plan.masks[name].keep] != 0).any()) for name, layer in layers.items())
    apply_(model, plan)
    for name, layer in layers.items():
        assert bool((weight_NK(layer)[~plan.masks[name].keep] == 0).all())
        assert type(layer) is nn.Linear and layer.weight.requires_grad


def test_compiled_models_have_the_names_of_what_they_wrap():
    model, fresh = tiny_model("llama"), tiny_model("llama")
    plan = prune_(torch.compile(model), "magnitude", progress=False)
    assert list(plan.masks) == list(find_targets(model))
    apply_(torch.compile(fresh), plan)
    assert same(fresh, model)


def test_nan_is_zeroed_where_it_is_removed():
    model = nn.Sequential(nn.Linear(4, 1))
    plan = prune_(model, "magnitude", progress=False)
    model[0].weight.data[~plan.masks["0"].keep] = float("nan")
    apply_(model, plan)
    assert model[0].weight.isfinite().all()


@pytest.mark.parametrize("what", ["missing", "shape", "kind"])
def test_a_plan_for_another_model_changes_nothing(what):
    model = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 4))
    keep = torch.zeros(4, 8, dtype=torch.bool)
    name, message = {
        "missing": ("layer.7", "unknown layer 'layer.7'"),
        "shape": ("2", "layer 2 is 4x8, and 4x4 in this model"),
        "kind": ("1", "layer 1 is a ReLU here"),
    }[what]
    plan = Plan(masks={"0": Mask("2:4", keep), name: Mask("2:4", keep)})
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=message):
        apply_(model, plan)
    assert same(model, before)


def test_a_plan_with_an_update_warns_on_another_model_and_brings_zeros_back_after_training():
    model, fresh = tiny_model("llama"), tiny_model("llama")
    plan = prune_(model, SparseGPT(), dataset=token_samples(), progress=False)
    pruned = copy.deepcopy(model)
    assert same(apply_(model, plan), pruned)
    with pytest.warns(UserWarning, match="lacks the update that sparsegpt made to the kept"):
        apply_(fresh, plan)
    for name, mask in plan.masks.items():
        assert not fresh.get_submodule(name).weight[~mask.keep].any()


def with_branches(model, group=8, rank=None):
    """A pruned copy of the model, without branches, and the plan that has some."""
    pruned = copy.deepcopy(model)
    plan = prune_(pruned, "magnitude", progress=False)
    for name, mask in plan.masks.items():
        N, K = mask.shape
        S = torch.randn(N, rank or -(-K // group)) / 10
        plan.side[name] = SideBranch(S, torch.randn(rank, K) / 3 if rank else None, group)
    return pruned, plan


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
def test_branches_stand_beside_the_masked_weights(tmp_path, family, rank):
    model = tiny_model(family)
    pruned, plan = with_branches(model, rank=rank)
    plan.save(tmp_path / "plan")
    assert apply_(model, Plan.load(tmp_path / "plan")) is model
    layers = side_layers(model)
    assert layers.keys() == plan.masks.keys() == find_targets(model).keys(), "they are linear layers as before"
    x = torch.randn(4, layers[next(iter(layers))].in_features)
    for name, layer in layers.items():
        old = pruned.get_submodule(name)
        assert torch.equal(layer.weight, weight_NK(old)) and layer.branch == plan.side[name]
        if layer.in_features == x.shape[1]:
            expected = old(x) + layer.reduce(x) @ plan.side[name].S.T
            torch.testing.assert_close(layer(x), expected, rtol=1e-5, atol=1e-6)
    apply_(model, plan)
    assert side_layers(model).keys() == layers.keys() and all(
        side_layers(model)[name] is layer for name, layer in layers.items()
    ), "applying twice changes nothing more"


def test_training_a_branch_outlives_the_plan_that_it_came_from():
    model = tiny_model("llama")
    _, plan = with_branches(model)
    apply_(model, plan)
    name, layer = next(iter(side_layers(model).items()))
    layer.side_S.data.add_(1)
    layer.weight.data.add_(1)
    trained = layer.side_S.clone()
    with pytest.warns(UserWarning, match=f"1 layers keep the side branch that they have.*as {name}"):
        apply_(model, plan)
    assert torch.equal(layer.side_S, trained) and not layer.weight[~plan.masks[name].keep].any()
    assert install_side_(model, name, plan.side[name]).branch == plan.side[name]


def test_a_plan_is_put_in_the_models_dtype():
    model = tiny_model("llama").to(torch.bfloat16)
    _, plan = with_branches(model)
    apply_(model, plan)
    assert {layer.side_S.dtype for layer in side_layers(model).values()} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_(model, plan)


@pytest.mark.parametrize("what", ["mask", "shape", "nan", "late"])
def test_a_branch_that_cannot_be_applied_changes_nothing(what, monkeypatch):
    model = tiny_model("llama")
    _, plan = with_branches(model)
    before, kept = copy.deepcopy(model), dict(model.named_parameters())
    name = list(plan.side)[-1]
    if what == "mask":
        plan.side["model.norm"] = plan.side[name]
    elif what == "shape":
        plan.side[name] = SideBranch(plan.side[name].S[:, 1:], None, 8)
    elif what == "nan":
        plan.side[name].S[0, 0] = float("nan")
    else:  # half of the layers have their branch when something fails
        from_linear = SideLinear.from_linear
        calls = iter([None] * 5)
        monkeypatch.setattr(SideLinear, "from_linear", lambda *args: (next(calls), from_linear(*args))[1])
    with pytest.raises((ValueError, StopIteration)):
        apply_(model, plan)
    assert same(model, before) and not side_layers(model)
    assert all(parameter is kept[key] for key, parameter in model.named_parameters())


def test_orders_of_inputs_come_before_branches_and_are_not_asked_for_again():
    model, fresh = tiny_model("llama"), tiny_model("llama")
    plan = prune_(model, Magnitude(permute=True), progress=False)
    assert plan.perms
    for name, mask in plan.masks.items():
        N, K = mask.shape
        plan.side[name] = SideBranch(torch.randn(N, -(-K // 8)), None, 8)
    apply_(fresh, plan)
    before = copy.deepcopy(fresh)
    assert all(
        torch.equal(layer.weight, model.get_submodule(name).weight) for name, layer in side_layers(fresh).items()
    )
    assert same(apply_(fresh, plan), before)
    other = tiny_model("llama")
    for name, branch in plan.side.items():
        install_side_(other, name, branch)
    before = copy.deepcopy(other)
    with pytest.raises(ValueError, match="into another order"):
        apply_(other, plan)
    assert same(other, before), "the sums of a frozen X know no other order"
