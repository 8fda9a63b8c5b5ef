"""LoRA put on, merged and kept beside: nothing changes but what it adds, and that to the last bit."""

import copy
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.errors import NonFiniteError, Unsupported
from sparsekit.nn import side_layers
from sparsekit.plan import Cut, Plan
from sparsekit.targets import weight_NK
from sparsekit.train.adapters import add_lora, as_side_, lora_parameters, merge_
from sparsekit.train.masked import Masked
from tests.archs.tiny_models import tiny_model

pytest.importorskip("peft", reason="peft is not installed")

IDS = torch.arange(18).view(2, 9) * 7 % 61


def lora(**changes):
    return SimpleNamespace(**{"lora_rank": 3, "lora_alpha": 6.0, "lora_targets": "all-linear", "seed": 0, **changes})


def filled(model, **changes):
    """Put on LoRA that adds something."""
    adapted = add_lora(model, lora(**changes))
    generator = torch.Generator().manual_seed(1)
    for parameter in lora_parameters(adapted).values():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return adapted


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def adapted_names(model):
    return {name.partition(".lora_")[0].removeprefix("base_model.model.") for name in lora_parameters(model)}


@pytest.mark.parametrize("family", ["llama", "opt", "gpt2"])
def test_it_adds_nothing_yet_and_stays_inside_of_the_blocks(family):
    model = tiny_model(family).eval()
    expected = logits(model)
    adapted = add_lora(model, lora())
    assert torch.equal(logits(adapted), expected)
    names = adapted_names(adapted)
    inside = ("model.layers.", "model.decoder.layers.", "transformer.h.")
    assert names and all(name.startswith(inside) for name in names), names  # project_in of OPT is none of them
    reads = {width.name for width in find_widths(tiny_model(family))}
    makes = {rows.name for width in find_widths(tiny_model(family)) for rows in width.producers}
    assert names == reads | makes


def test_only_the_lora_trains_and_in_fp32(llama):
    adapted = add_lora(llama(torch.bfloat16), lora())
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    assert trained == lora_parameters(adapted).keys()
    assert {parameter.dtype for parameter in lora_parameters(adapted).values()} == {torch.float32}


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r"re:.*\.(q|v)_proj"], ids=str)
def test_named_targets(llama, targets):
    names = adapted_names(add_lora(llama(), lora(lora_targets=targets)))
    assert names == {f"model.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in "qv"}


def test_the_seed_alone_decides_the_factors(llama):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = lora_parameters(add_lora(llama(seed=5), lora(seed=3)))
    torch.manual_seed(6)
    second = lora_parameters(add_lora(llama(seed=7), lora(seed=3)))
    other = lora_parameters(add_lora(llama(), lora(seed=4)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)
    torch.set_rng_state(before)
    drawn = torch.rand(3)
    torch.set_rng_state(before)
    add_lora(copy.deepcopy(MODEL), lora())
    assert torch.equal(torch.rand(3), drawn)


MODEL = tiny_model("llama")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_merging_rounds_once(family, dtype):
    model = tiny_model(family).to(dtype).eval()
    before = copy.deepcopy(model)
    adapted = filled(model)
    factors = {name: parameter.detach().double() for name, parameter in lora_parameters(adapted).items()}
    merged = merge_(adapted)
    assert merged is model
    names = adapted_names(filled(copy.deepcopy(before)))
    untouched = dict(model.named_parameters()).keys() - {f"{name}.weight" for name in names}
    for name in names:
        layer = f"base_model.model.{name}"
        delta = factors[f"{layer}.lora_B.default.weight"] @ factors[f"{layer}.lora_A.default.weight"] * 2
        exact = weight_NK(before.get_submodule(name)).double() + delta
        error = (weight_NK(model.get_submodule(name)).double() - exact).abs()
        half = torch.finfo(dtype).eps / 2 * exact.abs()
        slack = 4 * torch.finfo(torch.float32).eps * exact.abs().clamp(min=1)  # the sum is made in fp32
        assert bool((error <= half + slack).all()), name
    for name in untouched:
        assert torch.equal(model.get_parameter(name), before.get_parameter(name)), name


def test_merging_gives_the_model_back(llama):
    model = llama()
    model.lm_head.weight.requires_grad_(False)
    parameters, kinds = dict(model.named_parameters()), {n: type(m) for n, m in model.named_modules()}
    wanted = {name: parameter.requires_grad for name, parameter in parameters.items()}
    adapted = filled(model)
    expected = logits(adapted)
    merged = merge_(adapted)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-4, atol=1e-5)
    now = dict(merged.named_parameters())
    assert now.keys() == parameters.keys() and all(now[name] is parameters[name] for name in now)
    assert {name: parameter.requires_grad for name, parameter in now.items()} == wanted
    assert {n: type(m) for n, m in merged.named_modules()} == kinds
    assert torch.equal(logits(add_lora(merged, lora())), logits(merged))  # and again


def test_bad_lora_is_refused_and_changes_nothing(llama):
    adapted = filled(llama())
    before = copy.deepcopy(adapted.state_dict())
    last = list(lora_parameters(adapted).values())[-1]
    last.data[0, 0] = torch.nan
    for end in (merge_, lambda model: as_side_(model, Plan())):
        with pytest.raises(NonFiniteError, match=r"down_proj holds NaN or infinity"):
            end(adapted)
    last.data[0, 0] = before[list(lora_parameters(adapted))[-1]][0, 0]
    assert all(torch.equal(x, before[name]) for name, x in adapted.state_dict().items())
    adapted.merge_adapter()
    with pytest.raises(ValueError, match="merged already: call model.unmerge_adapter"):
        merge_(adapted)
    with pytest.raises(ValueError, match="no LoRA named 'default': pass what add_lora returned"):
        merge_(llama())


def test_what_cannot_be_adapted_is_refused(llama):
    model = llama()
    for changes, message in [
        ({"lora_rank": 0}, "lora_rank=0 must be a whole number of at least 1"),
        ({"lora_alpha": 0.0}, "lora_alpha=0.0 must be above 0"),
        ({"lora_targets": ["q_prj"]}, "lora_targets: .*q_prj"),
        ({"lora_targets": ["lm_head"]}, "lora_targets: lm_head is outside of the blocks"),
    ]:
        with pytest.raises(ValueError, match=message):
            add_lora(model, lora(**changes))
    with pytest.raises(ValueError, match=r"adapters already \(default\): fold them in, model = model.merge_and_unload"):
        add_lora(add_lora(llama(), lora()), lora())
    with pytest.raises(ValueError, match="adapters already"):
        add_lora(add_lora(model, lora()).get_base_model(), lora())


def test_weights_that_cannot_take_it_are_refused(llama):
    quantised = llama()
    layer = quantised.model.layers[1].mlp.up_proj
    layer.weight = nn.Parameter(layer.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj is quantised \(Linear\).*bfloat16"):
        add_lora(quantised, lora())
    packed = llama()
    for name, layer in packed.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            layer.weight.data[:, 0::4] = layer.weight.data[:, 1::4] = 0
    with pytest.raises(ValueError, match=r"is packed, .*unpack_\(model\) first"):
        add_lora(sk.pack_(packed), lora())


def cuts_of(model):
    """Keep the second half of the units of each width."""
    return {w.name: Cut(torch.arange(w.num_units // 2, w.num_units), w.num_units, w.kind) for w in find_widths(model)}


def masks_of(cuts):
    return {name: torch.zeros(cut.num).index_fill(0, cut.kept, 1) for name, cut in cuts.items()}


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_beside_the_weights_is_cut_with_them(family, llama, tmp_path):
    model = llama() if family == "llama" else tiny_model(family)
    widths, plan = find_widths(model), Plan(cuts=cuts_of(model))
    adapted = filled(model)
    masked = Masked(adapted, widths)
    masked.masks = masks_of(plan.cuts)
    expected = logits(adapted)
    masked.remove()
    names = adapted_names(adapted)
    full = as_side_(adapted, plan)
    assert full is model and side_layers(model).keys() == names
    assert all(layer.rank == 3 for layer in side_layers(model).values())
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    before = {name: tuple(layer.weight.shape) for name, layer in side_layers(model).items()}
    sk.apply_(model, plan)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    for name, layer in side_layers(model).items():
        assert tuple(layer.weight.shape) < before[name], name
        assert layer.side_S.shape == (layer.out_features, 3) and layer.side_X.shape == (3, layer.in_features)
    model.save_pretrained(tmp_path / "m")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "m").eval()
    assert side_layers(again).keys() == names
    assert torch.equal(logits(again), logits(model))


def test_a_cut_beside_branches_that_fails_takes_all_back(llama):
    model = llama()
    plan = Plan(cuts=cuts_of(model))
    as_side_(filled(model), plan)
    before = copy.deepcopy(model.state_dict())
    last = list(plan.cuts)[-1]
    plan.cuts[last] = Cut(torch.arange(3), 5, "channels")
    with pytest.raises(ValueError, match="leaves 3 of 5"):
        sk.apply_(model, plan)
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())


def test_side_branches_with_layers_that_go(llama):
    model = llama(num_hidden_layers=3)
    reader = "model.layers.1.mlp.down_proj"  # the last one, once the second has gone
    plan = Plan(
        cuts={"model.layers": Cut(torch.tensor([0, 2]), 3, "layers"), reader: Cut(torch.arange(9), 63, "channels")}
    )
    as_side_(filled(model), plan)
    layers = side_layers(model)
    assert not layers["model.layers.2.mlp.down_proj"].side_X[:, 9:].any()
    assert layers[reader].side_X.all()
    sk.apply_(model, plan)
    assert side_layers(model)[reader].side_X.shape == (3, 9)


def test_plans_that_branches_cannot_follow(llama):
    adapted = filled(llama())
    expected = logits(adapted)
    with pytest.raises(Unsupported, match="merge_lora=True"):
        as_side_(adapted, Plan(cuts={"model.embed_tokens": Cut(torch.arange(30), 32, "hidden")}))
    with pytest.raises(ValueError, match="the plan does not fit this model: it cuts 64 channels"):
        as_side_(adapted, Plan(cuts={"model.layers.0.mlp.down_proj": Cut(torch.arange(30), 64, "channels")}))
    assert torch.equal(logits(adapted), expected)
    assert {n for n, p in adapted.named_parameters() if p.requires_grad} == lora_parameters(adapted).keys()
