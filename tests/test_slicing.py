"""A cut model computes what the full one does with the same units dead; and it is a model like any other."""

import copy
import itertools
import warnings

import pytest
import torch
import transformers
from torch import nn

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.errors import Unsupported
from sparsekit.masks import Mask
from sparsekit.methods import Magnitude
from sparsekit.nn import SIZES, install_side_, sparse_layers
from sparsekit.patterns import NM
from sparsekit.plan import Cut, MadeBy, Plan, SideBranch
from sparsekit.snapshot import restored_on_failure
from sparsekit.surgery import apply_
from sparsekit.targets import find_targets, weight_NK
from tests.archs.test_producers import disturb_
from tests.archs.tiny_models import VOCABULARY, roberta, token_samples, vit


def llama(family="Llama", num_heads=6, num_key_value_heads=2, layers=3, **more):
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=layers, pad_token_id=0,
        num_attention_heads=num_heads, num_key_value_heads=num_key_value_heads, max_position_embeddings=64, **more,
    )  # fmt: skip
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def opt():
    torch.manual_seed(0)
    sizes = dict(hidden_size=24, ffn_dim=36, num_hidden_layers=3, num_attention_heads=3, max_position_embeddings=64)
    return transformers.OPTForCausalLM(transformers.OPTConfig(vocab_size=VOCABULARY, **sizes)).eval()


def gpt2(**more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, n_positions=64, n_embd=24, n_layer=3, n_head=3)
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **more)).eval()


def bert(kind="Bert"):
    torch.manual_seed(0)
    names = ("dim", "hidden_dim", "n_layers", "n_heads")
    if kind == "Bert":
        names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = dict(zip(names, (24, 36, 3, 3), strict=True))
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, max_position_embeddings=64, **sizes)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


DECODERS = {
    "llama, a query for each value": lambda: llama(num_heads=3, num_key_value_heads=3),
    "llama, grouped queries, tied": lambda: llama(tie_word_embeddings=True),
    "llama with biases and wide heads": lambda: llama(head_dim=12, attention_bias=True, mlp_bias=True),
    "qwen2": lambda: llama("Qwen2"),
    "qwen3, norms of heads": lambda: llama("Qwen3", head_dim=8),
    "opt": opt,
    "gpt2": gpt2,
}
MODELS = DECODERS | {
    "bert": bert,
    "distilbert": lambda: bert("DistilBert"),
    "roberta": roberta,
    "vit": vit,
    "phi3, one layer for gate and up": lambda: llama("Phi3"),
}


def run(model, seed=2):
    dtype = next(model.parameters()).dtype
    if isinstance(model, transformers.ViTForImageClassification):
        images = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(seed)).to(dtype)
        inputs = {"pixel_values": images}
    else:
        ids = torch.stack(token_samples(3, 12, seed))
        mask = torch.ones_like(ids)
        mask[1, 7:] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
    with torch.no_grad():
        return model(**inputs).logits


def cuts_of(model, seed=0, uniform=False):
    """Cut each width to between a third and two thirds; of a uniform cut, all of one kind to the same number."""
    generator = torch.Generator().manual_seed(seed)
    cuts, places = {}, itertools.count()
    for width in find_widths(model):
        num = max(1, width.num_units // 2) if uniform else 1 + (width.num_units + 2 * next(places)) // 3
        num = min(num, width.num_units)
        kept = torch.randperm(width.num_units, generator=generator)[:num].sort().values
        cuts[width.name] = Cut(kept, width.num_units, width.kind)
    return cuts


def deaden_(model, cuts):
    """Make the units that go dead, as a method leaves them, and their rows arbitrary, as it may."""
    for width in find_widths(model):
        removed = cuts[width.name].removed
        weight_NK(model.get_submodule(width.name))[:, width.columns_of(removed)] = 0
        for rows in width.producers:
            weight_NK(model.get_submodule(rows.name))[rows.of(removed)] *= -3
    return model


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, before):
    now = model.state_dict()
    return now.keys() == before.keys() and all(torch.equal(now[key], value) for key, value in before.items())


def traits(model):
    """All that a cut may change beside parameters."""
    attributes = {
        (name, key): value
        for name, module in model.named_modules()
        for key, value in vars(module).items()
        if key in SIZES or key in ("layer_idx", "in_features", "out_features", "nf", "nx")
    }
    is_quantized = getattr(model, "is_quantized", False)
    return attributes, model.config.to_dict(), type(getattr(model, "hf_quantizer", None)), is_quantized


@pytest.mark.parametrize("uniform", [False, True])
@pytest.mark.parametrize("family", MODELS)
def test_the_masked_model_is_the_sliced_one(family, uniform):
    """In float64 to 1e-12; in float32 to 1e-5 of the largest logit."""
    model = disturb_(MODELS[family]())
    cuts = cuts_of(model, uniform=uniform)
    deaden_(model, cuts)
    for dtype, limit in ((torch.float32, 1e-5), (torch.float64, 1e-12)):
        masked = copy.deepcopy(model).to(dtype)
        sliced = copy.deepcopy(masked)
        assert apply_(sliced, Plan(cuts=cuts)) is sliced
        expected, found = run(masked), run(sliced)
        error = float((found - expected).abs().max())
        assert error <= limit * max(1.0, float(expected.abs().max())), (dtype, error)


@pytest.mark.parametrize("family", MODELS)
def test_sizes_are_those_of_the_cuts_and_all_else_is_untouched(family):
    model = MODELS[family]()
    cuts, widths = cuts_of(model), {width.name: width for width in find_widths(model)}
    before, total = state(model), sum(p.numel() for p in model.parameters())
    apply_(model, Plan(cuts=cuts))
    touched, removed = set(), 0
    for name, width in widths.items():
        gone = len(cuts[name].removed)
        readers = weight_NK(model.get_submodule(name))
        removed += gone * width.columns * readers.shape[0]
        touched |= {f"{name}.weight"}
        for rows in width.producers:
            layer = model.get_submodule(rows.name)
            removed += gone * rows.per_unit * (weight_NK(layer).shape[1] + (layer.bias is not None))
            touched |= {f"{rows.name}.weight", f"{rows.name}.bias"}
    assert sum(p.numel() for p in model.parameters()) == total - removed
    assert [(w.name, w.num_units) for w in find_widths(model)] == [(n, len(cut.kept)) for n, cut in cuts.items()]
    after = model.state_dict()
    assert after.keys() == before.keys()
    for key, value in before.items():
        assert key in touched or torch.equal(after[key], value), key
    for module in model.modules():
        if isinstance(module, nn.Linear):
            assert module.weight.shape == (module.out_features, module.in_features)


def generate(model, use_cache=True):
    ids = torch.stack(token_samples(2, 5))
    with torch.no_grad():
        return model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=use_cache, eos_token_id=None)


@pytest.mark.parametrize("family", DECODERS)
def test_generation_with_the_cache_of_keys_and_values(family):
    model = disturb_(DECODERS[family]()).float()
    cuts = cuts_of(model)
    deaden_(model, cuts)
    expected = generate(model)
    apply_(model, Plan(cuts=cuts))
    assert torch.equal(generate(model), expected) and torch.equal(generate(model, use_cache=False), expected)


def blocks_of(model):
    return next(name for name, module in model.named_modules() if isinstance(module, nn.ModuleList) and len(module) > 1)


@pytest.mark.parametrize("family", MODELS)
def test_layers_that_go_are_as_if_they_had_never_been(family):
    model = disturb_(MODELS[family]()).float()
    name = blocks_of(model)
    blocks = model.get_submodule(name)
    kept = [0, len(blocks) - 1] if len(blocks) > 2 else [1]
    reference = copy.deepcopy(model)
    for index, block in enumerate(reference.get_submodule(name)):
        if index not in kept:  # steps aside, in whatever form its kind returns
            block.forward = lambda hidden_states, *args, **kwargs: hidden_states
    plan = Plan(cuts={name: Cut(torch.tensor(kept), len(blocks), "layers")})
    apply_(model, plan)
    assert len(model.get_submodule(name)) == model.config.num_hidden_layers == len(kept)
    torch.testing.assert_close(run(model), run(reference), rtol=0, atol=0)
    assert "quantization_config" not in model.config.to_dict()
    if family in DECODERS:
        assert torch.equal(generate(model), generate(model, use_cache=False))
        assert [block.get_submodule("attn" if family == "gpt2" else "self_attn").layer_idx
                for block in model.get_submodule(name)] == list(range(len(kept)))  # fmt: skip


def test_layers_go_before_widths_and_names_are_those_of_what_is_left():
    model = disturb_(llama()).float()
    plan = Plan(cuts={"model.layers.1.mlp.down_proj": Cut(torch.arange(7), 36, "channels")})
    plan.cuts["model.layers"] = Cut(torch.tensor([0, 2]), 3, "layers")
    keep = NM(2, 4).project(torch.rand(24, 7))
    plan.masks["model.layers.1.mlp.down_proj"] = Mask("2:4", keep)
    last = model.model.layers[2]
    apply_(model, plan)
    assert model.model.layers[1] is last and last.mlp.down_proj.weight.shape == (24, 7)
    assert not last.mlp.down_proj.weight[~keep].any() and model.model.layers[0].mlp.down_proj.in_features == 36
    before = state(model)
    apply_(model, plan)
    assert same(model, before)
    plan.masks["model.layers.2.mlp.down_proj"] = plan.masks.pop("model.layers.1.mlp.down_proj")
    with pytest.raises(ValueError, match=r"speaks of model\.layers\.2\.mlp\.down_proj, and leaves 2 layers"):
        apply_(llama(), plan)


def test_types_of_layers_follow_their_layers():
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    model = llama("Qwen2", layer_types=types, use_sliding_window=True, sliding_window=4)
    reference = copy.deepcopy(model)
    reference.model.layers[0].forward = lambda hidden_states, *args, **kwargs: hidden_states
    apply_(model, Plan(cuts={"model.layers": Cut(torch.tensor([1, 2]), 3, "layers")}))
    assert model.config.layer_types == types[1:] and model.config.num_hidden_layers == 2
    assert torch.equal(run(model), run(reference))
    assert torch.equal(generate(model), generate(model, use_cache=False))


@pytest.mark.parametrize("family", ["llama, grouped queries, tied", "gpt2", "bert"])
def test_once_is_enough_and_all_kept_is_nothing(family):
    model = MODELS[family]()
    before, as_it_was, parameters = state(model), traits(model), dict(model.named_parameters())
    everything = {name: Cut(torch.arange(cut.num), cut.num, cut.kind) for name, cut in cuts_of(model).items()}
    everything[blocks_of(model)] = Cut(torch.arange(3), 3, "layers")
    apply_(model, Plan(cuts=everything))
    assert same(model, before) and traits(model) == as_it_was
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())
    plan = Plan(cuts=cuts_of(model))
    apply_(model, plan)
    before, as_it_was, parameters = state(model), traits(model), dict(model.named_parameters())
    apply_(model, plan)
    assert same(model, before) and traits(model) == as_it_was
    assert all(parameters[name] is parameter for name, parameter in model.named_parameters())


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("family", ["llama, grouped queries, tied", "gpt2", "bert"])
def test_a_cut_that_fails_half_way_changes_nothing(family, held):
    model = MODELS[family]()
    plan = Plan(cuts=cuts_of(model))
    plan.cuts[blocks_of(model)] = Cut(torch.tensor([0, 1]), 3, "layers")
    for name in [name for name in plan.cuts if ".2." in name]:
        del plan.cuts[name]
    name = list(find_widths(model))[0].name
    plan.masks = {
        name: Mask("unstructured", torch.ones(3, 4, dtype=torch.bool).tril())
    }  # of no size that the cut leaves
    before, as_it_was, output = state(model), traits(model), run(model)
    blocks = list(model.get_submodule(blocks_of(model)))
    parameters = dict(model.named_parameters()) if held else {}
    with pytest.raises(ValueError, match=f"the plan's layer {name} is 3x4"):
        apply_(model, plan)
    assert same(model, before) and traits(model) == as_it_was and torch.equal(run(model), output)
    assert list(model.get_submodule(blocks_of(model))) == blocks
    assert all(parameters[name] is p for name, p in model.named_parameters() if held), "optimizers still see them"


def test_all_that_came_after_a_cut_is_taken_back_with_it():
    """Prune, cut, prune what is left, reorder, branch, pack; and then it fails."""
    model = llama()
    install_side_(model, "model.layers.2.self_attn.q_proj", SideBranch(torch.ones(24, 2), group=12))
    before, as_it_was, output = state(model), traits(model), run(model)
    cuts = {"model.layers.1.mlp.down_proj": Cut(torch.arange(8), 36, "channels")}
    cuts |= {"model.layers": Cut(torch.tensor([0, 2]), 3, "layers")}
    with pytest.raises(KeyboardInterrupt), restored_on_failure(model):
        sk.prune_(model, Magnitude(), ignore=("lm_head", "model.layers.2.self_attn.q_proj"), progress=False)
        apply_(model, Plan(cuts=cuts))
        plan = sk.prune_(model, "magnitude", targets="re:.*mlp.*", progress=False)
        plan.side = {"model.layers.1.mlp.down_proj": SideBranch(torch.randn(24, 1), group=8)}
        apply_(model, plan)
        sk.pack_(model)
        assert len(sparse_layers(model)) > 5 and model.config.quantization_config.widths
        raise KeyboardInterrupt
    assert not sparse_layers(model) and same(model, before) and traits(model) == as_it_was
    assert torch.equal(run(model), output)
    assert list(sk.nn.side_layers(model)) == ["model.layers.2.self_attn.q_proj"], "the branch from before stays"


def test_a_saved_plan_cuts_as_well(tmp_path):
    model, other = llama(), llama()
    plan = Plan(cuts=cuts_of(model))
    plan.save(tmp_path / "plan")
    apply_(model, plan)
    assert same(apply_(other, Plan.load(tmp_path / "plan")), state(model))


def test_what_is_cut_trains_casts_and_keeps_its_hooks():
    model = llama().to(torch.bfloat16)
    model.model.layers[0].mlp.down_proj.weight.requires_grad_(False)
    calls = []
    model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *args: calls.append(args))
    apply_(model, Plan(cuts=cuts_of(model)))
    run(model)
    assert len(calls) == 1
    assert not model.model.layers[0].mlp.down_proj.weight.requires_grad
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    ids = token_samples(1)[0][None]
    model.half().float()(input_ids=ids, labels=ids).loss.backward()
    assert (
        model.model.layers[0].self_attn.k_proj.weight.grad.shape == model.model.layers[0].self_attn.k_proj.weight.shape
    )


def test_a_model_inside_another_module():
    plain, model = llama(), llama()
    cuts = cuts_of(plain)
    apply_(plain, Plan(cuts=cuts))
    apply_(nn.ModuleDict({"student": model}), Plan(cuts={f"student.{name}": cut for name, cut in cuts.items()}))
    assert same(model, state(plain)) and traits(model) == traits(plain)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return x + self.fc2(self.fc1(x).relu())


def test_a_plain_module():
    torch.manual_seed(0)
    model = nn.Sequential(*[Mlp() for _ in range(3)])
    model[2].fc2.weight.data[:, :4] = 0
    x = torch.randn(2, 6)
    expected = model[2](model[0](x))
    cuts = {"": Cut(torch.tensor([0, 2]), 3, "layers"), "1.fc2": Cut(torch.arange(4, 10), 10, "channels")}
    apply_(model, Plan(cuts=cuts))
    torch.testing.assert_close(model(x), expected)
    assert len(model) == 2 and model[1].fc1.out_features == 6


def with_layers(kept, num, name="model.layers"):
    return {name: Cut(torch.tensor(kept), num, "layers")}


def with_channels(kept, num, name="model.layers.0.mlp.down_proj", kind="channels"):
    return {name: Cut(torch.arange(kept), num, kind)}


@pytest.mark.parametrize(
    "cuts,message",
    [
        (with_channels(4, 30), r"leaves 4 of 30 channels that .*\.down_proj reads; in this model it reads 36"),
        (with_channels(36, 40, kind="heads"), "it reads 36 channels"),
        (with_channels(4, 36, "model.layers.0.mlp.up_proj"), "unknown part with channels 'model.layers.0.mlp.up_proj'"),
        (with_channels(1, 2, "model.layers.0.self_attn", "heads"), "unknown part with heads"),
        (with_layers([0], 4), "leaves 1 of 4 layers in model.layers, which has 3 here"),
        (with_layers([0], 3, "model.blocks"), "unknown list of layers 'model.blocks'.*model.layers"),
    ],
)  # fmt: skip
def test_cuts_of_another_model_are_refused(cuts, message):
    model = llama()
    before, as_it_was = state(model), traits(model)
    with pytest.raises(ValueError, match=message):
        apply_(model, Plan(cuts=with_layers([0, 1, 2], 3) | cuts))
    assert same(model, before) and traits(model) == as_it_was


def packed(model):
    sk.apply_(model, sk.prune_(model, "magnitude", targets="re:.*layers.0.mlp.*", progress=False))
    return sk.pack_(model)


def branched(model):
    install_side_(model, "model.layers.0.mlp.up_proj", SideBranch(torch.ones(36, 2), group=12))
    return model


def tied(model):
    model.model.layers[0].mlp.up_proj.weight = model.model.layers[1].mlp.up_proj.weight
    return model


def parametrized(model):
    nn.utils.parametrizations.weight_norm(model.model.layers[0].mlp.down_proj)
    return model


def miscounted(model):
    model.model.layers[0].mlp.intermediate_size = 35
    return model


@pytest.mark.parametrize(
    "change,error,message",
    [
        (packed, ValueError, "model.layers.0.mlp.down_proj is packed: unpack_"),
        (branched, ValueError, "up_proj has a side branch.*merge_side_"),
        (tied, Unsupported, "up_proj is also that of another module"),
        (parametrized, Unsupported, "down_proj is computed from other tensors"),
        (lambda model: model.to("meta"), ValueError, "down_proj is on the meta device"),
        (miscounted, Unsupported, "model.layers.0.mlp says intermediate_size = 35, and its layers are made for 36"),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_layers_that_cannot_be_cut_are_refused(change, error, message):
    model = change(llama())
    before = traits(model)
    with pytest.raises(error, match=message):
        apply_(model, Plan(cuts=with_channels(4, 36)))
    assert traits(model) == before


@pytest.mark.parametrize(
    "build,name,message",
    [
        (lambda: gpt2(scale_attn_by_inverse_layer_idx=True), "transformer.h", "attn.scaling is not the same in all"),
        (lambda: llama("Olmo2"), "model.layers.0.self_attn.o_proj", "unknown part with heads"),
        (lambda: llama("Phi3"), "model.layers.0.self_attn.o_proj", "unknown part with heads"),
    ],
)
def test_families_that_cannot_be_cut_there_are_refused(build, name, message):
    model = build()
    before, as_it_was = state(model), traits(model)
    cut = Cut(torch.tensor([1]), 3, "layers") if name.endswith(".h") else Cut(torch.tensor([1]), 2, "heads")
    with pytest.raises((ValueError, Unsupported), match=message):
        apply_(model, Plan(cuts={name: cut}))
    assert same(model, before) and traits(model) == as_it_was


def test_layers_of_an_encoder_decoder_that_its_config_cannot_count():
    config = transformers.T5Config(vocab_size=VOCABULARY, d_model=20, d_kv=10, d_ff=36, num_layers=2, num_heads=2)
    model = transformers.T5ForConditionalGeneration(config).eval()
    before, as_it_was = state(model), traits(model)
    with pytest.raises(Unsupported, match=r"layers of encoder\.block cannot be taken out: its config cannot say so"):
        apply_(model, Plan(cuts=with_layers([0], 2, "encoder.block")))
    assert same(model, before) and traits(model) == as_it_was


def test_a_refit_that_this_model_lacks_is_missed():
    model = llama()
    plan = Plan(cuts=with_channels(4, 36), made_by=MadeBy("flap", updates_weights=True))
    with pytest.warns(
        UserWarning, match="down_proj still reads or writes what the plan cuts.*lacks the refit that flap made"
    ):
        apply_(copy.deepcopy(model), plan)
    model.model.layers[0].mlp.down_proj.weight.data[:, 4:] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        apply_(model, plan)


def test_what_is_left_takes_two_of_four():
    """First widths, then 2:4 on what is left: one model, packed, that computes what its masked form does."""
    model = llama(num_heads=6, num_key_value_heads=2, head_dim=8).eval()
    apply_(model, Plan(cuts=cuts_of(model)))
    plan = sk.prune_(model, "magnitude", progress=False)
    assert set(plan.masks) == set(find_targets(model)) and plan.sparsity > 0.49
    expected = run(model)
    sk.pack_(model)
    assert len(sparse_layers(model)) == len(plan.masks)
    torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(generate(model), generate(model, use_cache=False))
    assert sk.check(model, plan).ok


def test_check_says_what_is_left_and_who_opens_it():
    model, uniform = llama(), llama()
    plan, even = Plan(cuts=cuts_of(model)), Plan(cuts=cuts_of(uniform, uniform=True))
    plan.cuts |= with_layers([0, 1, 2], 3)
    report = sk.check(model, plan)
    assert not report.ok and any("down_proj has 36 channels, the plan leaves" in note for note in report.notes)
    apply_(model, plan)
    report = sk.check(model, plan)
    assert report.ok and report.summary["layers left"] == "3 of 3"
    assert any("after `import sparsekit`" in note for note in report.notes)
    assert any("after `import sparsekit`" in note for note in sk.check(model).notes)
    apply_(uniform, even)
    report = sk.check(uniform, even)
    assert report.ok and any("without sparsekit: the config says all sizes" in note for note in report.notes)
    plan.cuts |= with_channels(3, 4, "model.layers.9.mlp.down_proj")
    assert "the plan cuts model.layers.9.mlp.down_proj, which the model does not have" in sk.check(model, plan).notes
