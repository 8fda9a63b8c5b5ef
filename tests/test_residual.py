"""Hidden dimensions that nothing writes to may as well not be there, if the norms know."""

import copy

import pytest
import torch
import transformers
from torch import nn

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.errors import Unsupported
from sparsekit.plan import Cut, MadeBy, Plan
from sparsekit.surgery import apply_
from tests.archs.test_producers import disturb_
from tests.test_slicing import bert, generate, gpt2, llama, opt, run, same, state, traits

EMBEDDING = "model.embed_tokens"
FAMILIES = {
    "llama, a query for each value": lambda: llama(num_heads=3, num_key_value_heads=3),
    "llama, grouped queries, tied": lambda: llama(tie_word_embeddings=True),
    "llama with biases and wide heads": lambda: llama(head_dim=12, attention_bias=True, mlp_bias=True),
    "llama with a large eps": lambda: llama(rms_norm_eps=0.3),
    "mistral": lambda: llama("Mistral"),
    "qwen2, without a head_dim": lambda: llama("Qwen2"),
    "phi3": lambda: llama("Phi3"),
}


def cut(num=18, of=24, seed=0):
    kept = torch.randperm(of, generator=torch.Generator().manual_seed(seed))[:num].sort().values
    return {EMBEDDING: Cut(kept, of, "hidden")}


def deaden_(model, cuts):
    """Let nothing write to the dimensions that go; what reads them may hold anything."""
    gone = cuts[EMBEDDING].removed
    model.get_input_embeddings().weight.data[:, gone] = 0
    for block in model.model.layers:
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            layer.weight.data[gone] = 0
            if layer.bias is not None:
                layer.bias.data[gone] = 0
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_the_masked_model_is_the_sliced_one(family):
    model = disturb_(FAMILIES[family]()).float()
    cuts = cut()
    deaden_(model, cuts)
    expected, texts, is_tied = run(model), generate(model), model.config.tie_word_embeddings
    assert apply_(model, Plan(cuts=cuts)) is model
    found = run(model)
    assert float((found - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))
    assert torch.equal(generate(model), texts) and torch.equal(generate(model, use_cache=False), texts)
    assert model.config.hidden_size == model.model.norm.weight.numel() == 18
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == is_tied
    assert {width.columns for width in find_widths(model)} == {
        width.columns for width in find_widths(FAMILIES[family]())
    }, "heads are as wide as they were"


@pytest.mark.parametrize("family", ["llama, grouped queries, tied", "qwen2, without a head_dim", "phi3"])
def test_the_config_says_it_all(family, tmp_path):
    model = apply_(FAMILIES[family](), Plan(cuts=cut()))
    assert "quantization_config" not in model.config.to_dict()
    model.save_pretrained(tmp_path)
    again, loading = type(model).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(again, state(model)) and torch.equal(run(again), run(model))


def test_with_every_other_kind_of_cut(tmp_path):
    """Layers, hidden dimensions, uneven heads and channels: one plan, once or twice, and through a folder."""
    model = disturb_(llama()).float()
    cuts = cut() | {"model.layers": Cut(torch.tensor([0, 2]), 3, "layers")}
    cuts["model.layers.1.self_attn.o_proj"] = Cut(torch.tensor([1]), 2, "heads")
    cuts["model.layers.0.mlp.down_proj"] = Cut(torch.arange(9), 36, "channels")
    steps = copy.deepcopy(model)
    apply_(model, Plan(cuts=cuts))
    for name in ("model.layers", "model.layers.1.self_attn.o_proj", "model.layers.0.mlp.down_proj", EMBEDDING):
        apply_(steps, Plan(cuts={name: cuts[name]}))
    assert same(steps, state(model)) and traits(steps) == traits(model), "in any order that names allow"
    before, as_it_was = state(model), traits(model)
    apply_(model, Plan(cuts=cuts))
    assert same(model, before) and traits(model) == as_it_was
    assert sk.check(model, Plan(cuts=cuts)).ok
    model.save_pretrained(tmp_path)
    assert torch.equal(run(transformers.AutoModelForCausalLM.from_pretrained(tmp_path)), run(model))


@pytest.mark.parametrize("held", [True, False])
def test_what_fails_later_changes_nothing(held):
    model = llama(tie_word_embeddings=True)
    before, as_it_was, output = state(model), traits(model), run(model)
    parameters = dict(model.named_parameters()) if held else {}
    plan = Plan(cuts=cut() | {"model.layers.0.mlp.down_proj": Cut(torch.arange(9), 30, "channels")})
    with pytest.raises(ValueError, match="leaves 9 of 30 channels"):
        apply_(model, plan)
    assert same(model, before) and traits(model) == as_it_was and torch.equal(run(model), output)
    assert model.lm_head.weight is model.model.embed_tokens.weight, "tied as they were"
    assert all(parameters[name] is p for name, p in model.named_parameters() if held)
    assert model.model.norm.variance_epsilon == model.config.rms_norm_eps == 1e-6


@pytest.mark.parametrize(
    "build,cuts,message",
    [
        (llama, cut(20), "cannot be made of its config.*hidden size.*20.*multiple of.*heads.*6"),
        (lambda: llama("Qwen3", head_dim=8), cut(), "q_norm has its eps from where"),
        (lambda: llama("Gemma", head_dim=8), cut(), "hidden dimensions of GemmaForCausalLM cannot be cut.*Llama"),
        (lambda: llama("Olmo2"), cut(), "hidden dimensions of Olmo2ForCausalLM cannot be cut"),
        (opt, {"model.decoder.embed_tokens": cut()[EMBEDDING]}, "of OPTForCausalLM cannot be cut"),
        (gpt2, {"transformer.wte": cut()[EMBEDDING]}, "of GPT2LMHeadModel cannot be cut"),
        (bert, {"bert.embeddings.word_embeddings": cut()[EMBEDDING]}, "of BertForSequenceClassification cannot be cut"),
        (lambda: nn.Sequential(nn.Embedding(4, 24)), {"0": cut()[EMBEDDING]}, "in a transformers model only"),
        (llama, cut(18, 32), "leaves 18 of 32 hidden dimensions, and model.embed_tokens has 24"),
        (llama, {"model.norm": cut()[EMBEDDING]}, "'model.norm', which is no embedding"),
    ],
)
def test_what_cannot_be_cut_is_refused(build, cuts, message):
    model = build()
    before = state(model)
    with pytest.raises((ValueError, Unsupported), match=message):
        apply_(model, Plan(cuts=cuts))
    assert same(model, before)


def test_packed_layers_are_refused():
    model = sk.pack_(sk.apply_(llama(), sk.prune_(llama(), "magnitude", targets="re:.*mlp.*", progress=False)))
    with pytest.raises(ValueError, match="mlp.* is packed or has a side branch"):
        apply_(model, Plan(cuts=cut()))


@pytest.mark.parametrize("which", ["embedding", "output", "none"])
def test_what_still_writes_to_what_goes_is_said(which, recwarn):
    model = deaden_(llama(), cut())
    gone = cut()[EMBEDDING].removed
    if which == "embedding":
        model.model.embed_tokens.weight.data[3, gone[0]] = 1
    elif which == "output":
        model.model.layers[1].mlp.down_proj.weight.data[gone[2], 0] = 1
    apply_(model, Plan(cuts=cut(), made_by=MadeBy("slicegpt", updates_weights=True)))
    said = [str(warning.message) for warning in recwarn if "what the plan cuts" in str(warning.message)]
    names = {"embedding": ["model.embed_tokens"], "output": ["model.layers.1.mlp.down_proj"], "none": []}[which]
    assert len(said) == len(names) and all(text.startswith(name) for text, name in zip(said, names, strict=True))
