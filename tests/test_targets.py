import warnings

import pytest
import torch
from torch import nn

from sparsekit.targets import find_targets, is_conv1d, set_weight_NK_, weight_NK
from tests.archs.tiny_models import BUILDERS, tiny_model

NUM_LINEARS = {"llama": 14, "mistral": 14, "qwen2": 14, "qwen3": 14, "opt": 14, "gpt2": 8, "bert": 13, "distilbert": 12}


@pytest.mark.parametrize("family", BUILDERS)
def test_the_default_takes_the_linear_layers_and_no_head(family):
    layers = find_targets(tiny_model(family))
    assert len(layers) == NUM_LINEARS[family]
    assert not any("embed" in name and "project" not in name for name in layers)
    assert "lm_head" not in layers


def test_entries_of_every_kind():
    model = tiny_model("llama")
    one = "model.layers.1.mlp.up_proj"
    assert list(find_targets(model, one)) == [one]
    assert list(find_targets(model, [one])) == [one]
    assert len(find_targets(model, "up_proj")) == 2
    assert len(find_targets(model, r"re:.*layers\.0\.mlp")) == 3
    assert len(find_targets(model, lambda module, name: module.out_features == 36)) == 4
    assert len(find_targets(model, "Linear", ["lm_head", "re:.*self_attn", "down_proj"])) == 4
    assert len(find_targets(model, ignore=lambda module, name: "mlp" in name)) == 8


def test_layers_come_in_the_order_of_the_model():
    model = tiny_model("llama")
    names = list(find_targets(model, ["down_proj", "q_proj"]))
    assert names == [name for name, _ in model.named_modules() if name.endswith(("down_proj", "q_proj"))]


def test_conv1d_is_a_linear_stored_transposed():
    model = tiny_model("gpt2")
    assert len(find_targets(model, "Conv1D")) == 8
    layer = model.transformer.h[0].mlp.c_fc
    assert is_conv1d(layer) and weight_NK(layer).shape == (80, 20)
    set_weight_NK_(layer, torch.arange(1600.0).view(80, 20))
    assert torch.equal(layer.weight, torch.arange(1600.0).view(80, 20).T)


def test_a_head_is_taken_only_by_name():
    model = tiny_model("llama")
    assert "lm_head" not in find_targets(model, "Linear", ignore=())
    assert "lm_head" not in find_targets(model, "re:.*", ignore=())
    assert list(find_targets(model, "lm_head", ignore=())) == ["lm_head"]
    assert list(find_targets(model, "re:lm_.*", ignore=())) == ["lm_head"]
    with pytest.raises(ValueError, match=r"ignore=\['lm_head'\] leaves nothing of the 1 layers"):
        find_targets(model, "lm_head")


def test_a_head_that_is_tied_to_the_embedding_is_refused():
    with pytest.raises(ValueError, match="lm_head is the same tensor as model.embed_tokens.weight"):
        find_targets(tiny_model("qwen2"), "lm_head", ignore=())


def test_two_layers_with_one_weight_are_refused():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    model[2].weight = model[0].weight
    with pytest.raises(ValueError, match="the weight of 0 is the same tensor as 2.weight"):
        find_targets(model)
    assert list(find_targets(model, ignore=["0", "2"])) == ["1"]


def test_routers_are_taken_only_by_name():
    block = nn.Module()
    block.gate, block.gate_proj = nn.Linear(4, 3), nn.Linear(4, 4)
    block.experts = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
    model = nn.Module()
    model.moe = block
    assert list(find_targets(model)) == ["moe.gate_proj", "moe.experts.0", "moe.experts.1", "moe.experts.2"]
    assert list(find_targets(model, "moe.gate")) == ["moe.gate"]
    del block.experts
    assert "moe.gate" in find_targets(model), "a gate without experts is no router"


def test_packed_layers_are_not_matched():
    class SparseLinear(nn.Linear):
        pass

    model = nn.Sequential(SparseLinear(4, 4), nn.Linear(4, 4))
    assert list(find_targets(model)) == ["1"]
    with pytest.raises(ValueError, match="packed already: unpack_"):
        find_targets(model[:1])


def test_subclasses_are_matched_by_either_name():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(Special(4, 4), nn.Linear(4, 4))
    assert list(find_targets(model)) == ["0", "1"]
    assert list(find_targets(model, "Special")) == ["0"]


@pytest.mark.parametrize("near", ["upproj", "model.layers.0.mlp.up_prj", "linear", "re:layers.0.mlp.up_proj"])
def test_no_match_lists_what_is_near(near):
    with pytest.raises(ValueError, match="matches no layer that can be pruned") as caught:
        find_targets(tiny_model("llama"), near)
    assert "up_proj" in str(caught.value) or "'Linear'" in str(caught.value)
    assert "model.layers.0.self_attn.q_proj" in str(caught.value)


@pytest.mark.parametrize(
    "near,hint", [("up_prj", "'up_proj'"), ("re:.*mlp.upproj", "up_proj'"), ("Linaer", "'Linear'")]
)
def test_every_entry_of_targets_must_match(near, hint):
    for entries in (["Linear", near], [near, "Linear"]):
        with pytest.raises(ValueError, match="matches no layer that can be pruned") as caught:
            find_targets(tiny_model("llama"), entries)
        assert f"targets=[{near!r}]" in str(caught.value) and hint in str(caught.value)
    with pytest.raises(ValueError, match="matches no layer"):
        find_targets(tiny_model("llama"), ["Linear", lambda module, name: False])


def test_entries_of_ignore_that_spare_nothing_warn():
    model = tiny_model("llama")
    with pytest.warns(UserWarning, match="ignore: 'up_prj' matches no layer of this model. Near 'up_prj': 'up_proj'"):
        assert len(find_targets(model, ignore=["lm_head", "up_prj"])) == 14
    with pytest.warns(UserWarning, match=r"'model.layers.0' matches no layer .*: 're:model\\.layers\\.0'"):
        assert len(find_targets(model, ignore="model.layers.0")) == 14
    assert len(find_targets(model, ignore=r"re:model\.layers\.0")) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_targets(tiny_model("bert"), ignore="lm_head")
        find_targets(model, ignore=["embed_tokens", "up_proj", lambda module, name: False])


def test_a_module_in_two_places_is_one_layer():
    shared = nn.Linear(4, 4)
    assert list(find_targets(nn.Sequential(shared, nn.ReLU(), shared))) == ["0"]


def test_no_match_says_what_the_entry_hit():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="'embed_tokens' matches model.embed_tokens, a Embedding"):
        find_targets(model, "embed_tokens")
    with pytest.raises(ValueError, match="no layer"):
        find_targets(model, ())
    with pytest.raises(ValueError, match="holds no linear layer"):
        find_targets(nn.Sequential(nn.ReLU()))


def test_an_ignore_that_eats_everything_says_so():
    with pytest.raises(ValueError, match=r"leaves nothing of the 14 layers .*narrow ignore"):
        find_targets(tiny_model("llama"), ignore="re:model")


def test_bad_entries():
    model = tiny_model("llama")
    with pytest.raises(ValueError, match="no regular expression"):
        find_targets(model, "re:(")
    with pytest.raises(ValueError, match="unknown entry of targets 3"):
        find_targets(model, [3])


def test_weights_that_cannot_be_pruned_are_refused():
    with pytest.raises(ValueError, match="meta device"):
        find_targets(nn.Sequential(nn.Linear(4, 4, device="meta")))
    quantised = nn.Linear(4, 4)
    quantised.weight = nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match="torch.int8"):
        find_targets(quantised)


def test_a_parametrized_weight_is_refused():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 4)))
    with pytest.raises(ValueError, match="the weight of 0 is computed from other tensors"):
        find_targets(model)


def test_the_model_may_be_a_linear_layer():
    assert list(find_targets(nn.Linear(4, 4))) == [""]


def test_task_heads_are_left_alone_unless_named():
    from transformers import BertConfig, BertForSequenceClassification

    sizes = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=20)
    model = BertForSequenceClassification(BertConfig(**sizes))
    assert "classifier" not in find_targets(model)
    assert "bert.encoder.layer.0.output.dense" in find_targets(model)
    assert list(find_targets(model, targets=("classifier",))) == ["classifier"]
