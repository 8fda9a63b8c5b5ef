"""Couplings are what they claim: the model computes the same after any order, and any scales, were folded in."""

import copy

import pytest
import torch
import transformers
from torch import nn

from sparsekit.archs.producers import Coupling, Producer, find_couplings, fold_order_, fold_scales_
from sparsekit.nn import install_side_
from sparsekit.plan import SideBranch
from sparsekit.targets import find_targets, weight_NK
from tests.archs.tiny_models import BUILDERS, tiny_model, token_samples


def small(family, **more):
    """A model of a family that has traits the tiny models lack."""
    sizes = dict(
        vocab_size=61,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=64,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**(sizes | more))
    return getattr(transformers, f"{family}ForCausalLM")(config).eval()


def opt(**more):
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=24, ffn_dim=36, num_hidden_layers=2, num_attention_heads=3)
    return transformers.OPTForCausalLM(transformers.OPTConfig(max_position_embeddings=64, **(sizes | more))).eval()


def gemma3():
    torch.manual_seed(0)
    sizes = dict(vocab_size=61, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4)
    config = transformers.Gemma3TextConfig(**sizes, num_key_value_heads=2, head_dim=8, pad_token_id=0)
    return transformers.Gemma3ForCausalLM(config).eval()


MODELS = {
    **{family: (lambda family=family: tiny_model(family)) for family in (*BUILDERS, "t5")},
    "llama with biases, three queries a value": lambda: small("Llama", attention_bias=True, mlp_bias=True),
    "llama, heads that are wider than the model": lambda: small("Llama", head_dim=12),
    "gemma, whose norms add 1": lambda: small("Gemma", head_dim=8),
    "gemma2": lambda: small("Gemma2", head_dim=8, attn_implementation="eager"),
    "gemma3": lambda: gemma3(),
    "phi3, fused layers": lambda: small("Phi3"),
    "granite": lambda: small("Granite"),
    "starcoder2": lambda: small("Starcoder2"),
    "olmo2, norms after": lambda: small("Olmo2"),
    "cohere, one norm for both": lambda: small("Cohere"),
    "minimax, residual after the norm": lambda: small(
        "MiniMax", num_local_experts=2, head_dim=8, layer_types=["full_attention"] * 2, experts_implementation="eager"
    ),
    "nemotron": lambda: small("Nemotron"),
    "gpt-neox": lambda: transformers.GPTNeoXForCausalLM(
        transformers.GPTNeoXConfig(
            vocab_size=61, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=3
        )
    ).eval(),
    "gpt-1": lambda: transformers.OpenAIGPTLMHeadModel(
        transformers.OpenAIGPTConfig(vocab_size=61, n_positions=64, n_embd=24, n_layer=2, n_head=3)
    ).eval(),
    "opt, norms after": lambda: opt(do_layer_norm_before=False),
    "opt with gelu": lambda: opt(activation_function="gelu"),
    "qwen3-next, gated heads": lambda: small(
        "Qwen3Next", head_dim=8, num_experts=0, layer_types=["full_attention"] * 2
    ),
}


def output(model, ids):
    more = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=ids, **more).logits


def disturb_(model):
    """Give every bias and norm weight a value of its own, so that one left behind shows."""
    generator = torch.Generator().manual_seed(3)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.3 * torch.randn(parameter.shape, generator=generator)
    return model.double()


def random_order(coupling, seed=0):
    generator = torch.Generator().manual_seed(seed)
    heads = torch.arange(coupling.num_channels).view(-1, coupling.head_size)
    return torch.cat([head[torch.randperm(len(head), generator=generator)] for head in heads])


def random_scales(coupling, seed=0):
    return torch.rand(coupling.num_channels, generator=torch.Generator().manual_seed(seed)) * 3 + 0.3


def holds(model, coupling, ids):
    """Fold a random order and random scales into copies; return the change of the output, relative, for each."""
    before = output(model, ids)
    changes = {}
    for what, fold_, made, allowed in (
        ("order", fold_order_, random_order, coupling.can_permute),
        ("scales", fold_scales_, random_scales, coupling.can_scale),
    ):
        if allowed:
            changed = copy.deepcopy(model)
            fold_(changed, coupling, made(coupling))
            for name in coupling.consumers:
                assert not torch.equal(weight_NK(changed.get_submodule(name)), weight_NK(model.get_submodule(name)))
            changes[what] = float((output(changed, ids) - before).abs().max() / before.abs().max())
    return changes


@pytest.mark.parametrize("family", MODELS)
def test_folding_changes_nothing(family):
    model = disturb_(MODELS[family]())
    ids = torch.stack(token_samples(3, 12))
    for coupling in find_couplings(model):
        changes = holds(model, coupling, ids)
        assert changes and max(changes.values()) <= 1e-5, (coupling, changes)


@pytest.mark.parametrize("rank", [3, None])
@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "llama with biases, three queries a value"])
def test_side_branches_go_along_or_forbid_it(family, rank):
    """Rows of S with the producer, columns of X with the consumer; the sums of a frozen X know no other order."""
    model = disturb_(MODELS[family]())
    ids = torch.stack(token_samples(3, 12))
    generator = torch.Generator().manual_seed(0)
    before = {coupling.consumers: coupling for coupling in find_couplings(model)}
    for name in find_targets(model):
        N, K = weight_NK(model.get_submodule(name)).shape
        S = torch.randn(N, rank or -(-K // 8), generator=generator) / 5
        install_side_(model, name, SideBranch(S, torch.randn(rank, K, generator=generator) / 3 if rank else None, 8))
    couplings = find_couplings(model)
    assert {coupling.consumers for coupling in couplings} == before.keys()
    for coupling in couplings:
        if rank is None:
            assert not coupling.can_permute and not coupling.can_scale
            with pytest.raises(ValueError, match="cannot be scaled"):
                fold_scales_(model, coupling, random_scales(coupling))
        else:
            assert coupling == before[coupling.consumers]
            changes = holds(model, coupling, ids)
            assert changes and max(changes.values()) <= 1e-5, (coupling, changes)


KINDS = {
    "llama": ["norm", "norm", "value", "mlp"],
    "qwen2": ["norm", "norm", "value", "mlp"],
    "opt": ["norm", "norm", "value", "mlp"],
    "gpt2": ["norm", "norm", "value", "mlp"],
    "bert": ["value", "mlp"],
    "distilbert": ["value", "mlp"],
    "phi3, fused layers": ["norm", "norm", "value", "mlp"],
    "gemma2": ["norm", "norm", "value", "mlp"],
    "gpt-1": ["mlp"],
    "opt, norms after": ["value", "mlp"],
    "olmo2, norms after": ["value", "mlp"],
    "cohere, one norm for both": ["value", "mlp"],
    "minimax, residual after the norm": ["value"],
    "qwen3-next, gated heads": ["mlp"],
}


@pytest.mark.parametrize("family,kinds", KINDS.items())
def test_what_is_found(family, kinds):
    couplings = find_couplings(MODELS[family]())
    assert sorted(coupling.kind for coupling in couplings) == sorted(kinds * 2), couplings
    for coupling in couplings:
        assert coupling.can_permute == (coupling.kind != "norm")
        gelu = coupling.kind == "mlp" and family in ("gpt2", "bert", "distilbert", "gpt-1")
        assert coupling.can_scale != gelu


def test_scales_pass_relu_and_the_other_factor_but_no_gelu():
    can_scale = {
        family: [coupling.can_scale for coupling in find_couplings(MODELS[family]()) if coupling.kind == "mlp"]
        for family in ("opt", "opt with gelu", "llama", "t5", "nemotron")
    }
    assert can_scale == {
        "opt": [True] * 2,
        "opt with gelu": [False] * 2,
        "llama": [True] * 2,
        "t5": [True] * 4,
        "nemotron": [False] * 2,  # relu squared
    }


def test_the_channels_behind_grouped_queries():
    value = Coupling("value", ("o",), (Producer("v"),), num_channels=6, head_size=3, repeats=2)
    assert value.source.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5, 3, 4, 5]
    order = torch.tensor([2, 0, 1, 3, 5, 4])
    columns = value.input_order(order)
    assert columns.tolist() == [2, 0, 1, 5, 3, 4, 6, 8, 7, 9, 11, 10]
    assert torch.equal(value.source[columns], order[value.source])
    assert torch.equal(value.channel_order(columns), order)


@pytest.mark.parametrize(
    "order",
    [
        [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 10],
        [3, 1, 2, 0, 4, 5, 6, 7, 8, 9, 10, 11],  # across heads
        [1, 0, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11],  # unlike in two heads that share values
        [0, 1, 2, 3, 4, 5],
    ],
    ids=str,
)
def test_orders_that_cannot_be_folded_are_refused(order):
    value = Coupling("value", ("o",), (Producer("v"),), num_channels=6, head_size=3, repeats=2)
    with pytest.raises(ValueError, match="the inputs of o cannot take this order.*each of 6 channels"):
        value.channel_order(torch.tensor(order))


def test_bad_calls_change_nothing():
    model = tiny_model("gpt2")
    before = copy.deepcopy(model.state_dict())
    norm, mlp = (next(each for each in find_couplings(model) if each.kind == kind) for kind in ("norm", "mlp"))
    with pytest.raises(ValueError, match="c_attn cannot be put into another order"):
        fold_order_(model, norm, torch.arange(20))
    with pytest.raises(ValueError, match="c_proj cannot be scaled"):
        fold_scales_(model, mlp, torch.ones(80))
    with pytest.raises(ValueError, match="c_proj cannot take this order"):
        fold_order_(model, mlp, torch.zeros(80, dtype=torch.int64))
    for scales in (torch.ones(7), torch.ones(20).neg_(), torch.full((20,), torch.inf)):
        with pytest.raises(ValueError, match="must be 20 positive numbers"):
            fold_scales_(model, norm, scales)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


class Attention(nn.Module):
    """Has the names of an attention, and a norm between values and output."""

    head_dim = 4

    def __init__(self, between):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(8, 8) for _ in range(4))
        self.add_module(*between)


@pytest.mark.parametrize(
    "between,found",
    [
        (("sub_norm", nn.LayerNorm(8)), 0),
        (("v_norm", nn.LayerNorm(8, elementwise_affine=False)), 0),
        (("g_proj", nn.Linear(8, 8)), 0),
        (("q_norm", nn.LayerNorm(4)), 1),
        (("dropout", nn.Dropout()), 1),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_unknown_parts_in_between_are_left_alone(between, found):
    model = nn.Sequential(nn.ModuleList([nn.ModuleDict({"self_attn": Attention(between)})]))
    assert len(find_couplings(model)) == found
