import pytest
import torch
from torch import nn

from sparsekit.archs import find_blocks, max_positions, vocabulary_size
from sparsekit.targets import find_targets
from tests.archs.tiny_models import BUILDERS, VOCABULARY, tiny_model

LISTS = {
    "llama": "model.layers",
    "mistral": "model.layers",
    "qwen2": "model.layers",
    "qwen3": "model.layers",
    "opt": "model.decoder.layers",
    "gpt2": "transformer.h",
    "bert": "bert.encoder.layer",
    "distilbert": "distilbert.transformer.layer",
}


@pytest.mark.parametrize("family", BUILDERS)
def test_each_family_has_one_list_of_two_blocks(family):
    model = tiny_model(family)
    name = LISTS[family]
    assert find_blocks(model, find_targets(model)) == {name: [f"{name}.0", f"{name}.1"]}
    assert max_positions(model) == 64
    assert vocabulary_size(model) == VOCABULARY


def test_an_encoder_and_a_decoder_are_two_lists():
    model = tiny_model("t5")
    assert list(find_blocks(model, find_targets(model))) == ["encoder.block", "decoder.block"]


def test_lists_inside_a_block_belong_to_it():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Sequential(nn.Linear(4, 4)) for _ in range(3)])

    model = nn.Module()
    model.layers = nn.ModuleList([Mixture(), Mixture()])
    assert find_blocks(model, find_targets(model)) == {"layers": ["layers.0", "layers.1"]}


def test_a_list_without_targets_is_none():
    model = tiny_model("llama")
    assert find_blocks(model, ["lm_head"]) == {}
    assert find_blocks(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4)), ["0", "2"]) == {}


def test_a_sequential_of_equal_modules_is_a_list():
    model = nn.Sequential(*[nn.Sequential(nn.Linear(4, 4), nn.ReLU()) for _ in range(3)])
    assert find_blocks(model, find_targets(model)) == {"": ["0", "1", "2"]}


def test_a_model_that_says_nothing_has_no_limits():
    assert max_positions(nn.Linear(2, 2)) is None
    assert vocabulary_size(nn.Linear(2, 2)) is None


def test_roberta_positions_start_behind_the_padding():
    from transformers import RobertaConfig, RobertaModel

    config = RobertaConfig(
        vocab_size=30,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        max_position_embeddings=18,
    )
    model = RobertaModel(config).eval()
    limit = max_positions(model)
    assert limit == 16
    model(input_ids=torch.full((1, limit), 5))
    with pytest.raises((IndexError, RuntimeError), match="out of"):
        model(input_ids=torch.full((1, limit + 1), 5))
