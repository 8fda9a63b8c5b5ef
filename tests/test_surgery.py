import copy

import pytest
import torch
from torch import nn

from sparsekit.errors import Unsupported
from sparsekit.masks import Mask
from sparsekit.methods import Magnitude, SparseGPT
from sparsekit.plan import Plan
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


@pytest.mark.parametrize("kind", ["cuts", "perms"])
def test_decisions_of_a_later_version_are_refused(kind):
    model = tiny_model("llama")
    plan = prune_(copy.deepcopy(model), "magnitude", progress=False)
    setattr(plan, kind, {"model.layers.0": [0, 1]})
    before = copy.deepcopy(model)
    with pytest.raises(Unsupported, match=f"the plan holds {kind}"):
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
