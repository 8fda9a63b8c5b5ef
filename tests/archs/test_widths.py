"""Widths are what they claim: a unit whose columns are zero may as well have no rows, and nobody else notices."""

import copy

import pytest
import torch
import transformers
from torch import nn

from sparsekit.archs import Rows, Width, describe_attention, describe_mlp, find_widths, producers
from sparsekit.errors import Unsupported
from sparsekit.targets import weight_NK
from tests.archs.test_producers import MODELS, disturb_, output, small
from tests.archs.tiny_models import roberta, token_samples, vit

FOUND = {
    "llama": [("self_attn.o_proj", "heads", 1, 20), ("mlp.down_proj", "channels", 36, 1)],
    "qwen3": [("self_attn.o_proj", "heads", 1, 20), ("mlp.down_proj", "channels", 36, 1)],
    "llama with biases, three queries a value": [
        ("self_attn.o_proj", "heads", 2, 12),
        ("mlp.down_proj", "channels", 36, 1),
    ],
    "phi3, fused layers": [("mlp.down_proj", "channels", 36, 1)],
    "olmo2, norms after": [("mlp.down_proj", "channels", 36, 1)],
    "opt": [("self_attn.out_proj", "heads", 2, 10), ("fc2", "channels", 36, 1)],
    "gpt2": [("attn.c_proj", "heads", 2, 10), ("mlp.c_proj", "channels", 80, 1)],
    "bert": [("attention.output.dense", "heads", 2, 10), ("output.dense", "channels", 36, 1)],
    "distilbert": [("attention.out_lin", "heads", 2, 10), ("ffn.lin2", "channels", 36, 1)],
    "t5": [("DenseReluDense.wo", "channels", 36, 1)],
}


@pytest.mark.parametrize("family,parts", FOUND.items())
def test_what_is_found_in_the_order_of_execution(family, parts):
    widths = find_widths(MODELS[family]())
    assert len({width.name for width in widths}) == len(widths)
    for index, width in enumerate(widths):
        end, kind, num_units, columns = parts[index % len(parts)]
        assert width.name.endswith(f".{end}")
        assert (width.kind, width.num_units, width.columns) == (kind, num_units, columns)
    assert len(widths) == (4 if family == "t5" else 2 * len(parts))


@pytest.mark.parametrize("model", [vit, roberta])
def test_other_encoders(model):
    kinds = [(width.kind, width.num_units) for width in find_widths(model())]
    assert kinds == [("heads", 3), ("channels", 36)] * 2


def hidden(model, ids):
    if isinstance(model, transformers.ViTForImageClassification):
        pixels = torch.randn(3, 3, 8, 8, generator=torch.Generator().manual_seed(5)).double()
        with torch.no_grad():
            return model(pixel_values=pixels).logits
    return output(model, ids)


TRUTHFUL = {family: build for family, build in MODELS.items() if not family.startswith(("gpt-neox", "minimax"))}
TRUTHFUL |= {"vit": vit, "roberta": roberta}


@pytest.mark.parametrize("family", TRUTHFUL)
def test_rows_and_columns_of_a_unit_belong_together(family):
    """With the columns zero, the rows may hold anything; with them in place, the rows matter."""
    model = disturb_(TRUTHFUL[family]())
    ids = torch.stack(token_samples(3, 12))
    for width in find_widths(model):
        units = torch.arange(width.num_units // 2, width.num_units)
        changed = copy.deepcopy(model)
        columns = width.columns_of(units)
        weight_NK(changed.get_submodule(width.name))[:, columns] = 0
        dead = hidden(changed, ids)
        alive = hidden(model, ids)
        assert not torch.equal(dead, alive), width
        for rows in width.producers:
            for other in (changed, model):
                layer = other.get_submodule(rows.name)
                weight_NK(layer)[rows.of(units)] += 0.7
                if layer.bias is not None:
                    layer.bias.data[rows.of(units)] -= 0.3
            assert torch.equal(hidden(changed, ids), dead), (width, rows)
        assert not torch.allclose(hidden(model, ids), alive, rtol=1e-6), width


def test_each_row_of_a_producer_belongs_to_one_unit():
    for family in TRUTHFUL:
        model = TRUTHFUL[family]()
        for width in find_widths(model):
            units = torch.arange(width.num_units)
            assert width.columns_of(units).tolist() == list(range(weight_NK(model.get_submodule(width.name)).shape[1]))
            rows = [rows.of(units) for rows in width.producers]
            for name in {rows.name for rows in width.producers}:
                own = torch.cat([r for r, each in zip(rows, width.producers, strict=True) if each.name == name])
                assert own.sort().values.tolist() == list(range(weight_NK(model.get_submodule(name)).shape[0]))


def test_indices_of_units():
    width = Width("o", "heads", 3, 4, (Rows("q", 0, 4), Rows("qkv", 20, 2)))
    units = torch.tensor([0, 2])
    assert width.columns_of(units).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert width.producers[1].of(units).tolist() == [20, 21, 24, 25]
    assert width.columns_of(units[:0]).tolist() == []


def test_modules_without_blocks_or_linear_layers_say_so():
    with pytest.raises(Unsupported, match="no list of blocks"):
        find_widths(nn.Sequential(nn.Linear(4, 4)))
    with pytest.raises(Unsupported, match="holds no linear layer"):
        find_widths(nn.LayerNorm(4))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.head_dim = 4
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 4), nn.Linear(8, 4)
        self.close = nn.Linear(8, 8)


class Strange(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"mix": Block(), "rise": nn.Identity()}) for _ in range(2)])


def test_describing_an_attention_and_an_mlp(monkeypatch):
    attentions, mlps = list(producers.ATTENTIONS), list(producers.MLPS)
    from sparsekit.archs import widths

    for module in (producers, widths):
        monkeypatch.setattr(module, "ATTENTIONS", attentions)
        monkeypatch.setattr(module, "MLPS", mlps)
    model = Strange()
    with pytest.raises(Unsupported, match=r"known in Strange.*mix\.query, mix\.key.*describe_attention"):
        find_widths(model)
    for _ in range(2):
        describe_attention("query", "key", "value", "close")
    assert len(attentions) == len(set(attentions))
    (first, second) = find_widths(model)
    assert first == Width(
        "blocks.0.mix.close",
        "heads",
        1,
        8,
        (Rows("blocks.0.mix.query", 0, 8), Rows("blocks.0.mix.key", 0, 4), Rows("blocks.0.mix.value", 0, 4)),
    )
    for block in model.blocks:
        block["wide"] = nn.ModuleDict({"up": nn.Linear(8, 12), "down": nn.Linear(12, 8)})
    describe_mlp("up", "down")
    assert [width.kind for width in find_widths(model)] == ["heads", "channels"] * 2


def test_half_a_model_is_better_than_none():
    """A family of which only the MLP is known has those widths."""
    assert {width.kind for width in find_widths(MODELS["gpt-1"]())} == {"channels"}
    assert {width.kind for width in find_widths(small("Olmo2"))} == {"channels"}
