"""Legal widths: what kernels, tensor parallelism and stock Hugging Face configs allow; checked against those."""

import copy

import pytest
import torch
from torch import nn

from sparsekit.archs import Rows, Width, find_widths
from sparsekit.plan import Cut
from sparsekit.shapes import legal_widths
from sparsekit.slicing import cut_
from sparsekit.snapshot import Snapshot
from tests.archs.tiny_models import tiny_model


def llama(**options):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(vocab_size=61, hidden_size=48, intermediate_size=100, num_hidden_layers=3, head_dim=8)
    with torch.device("meta"):
        return LlamaForCausalLM(LlamaConfig(**sizes | dict(num_attention_heads=12, num_key_value_heads=6) | options))


def numbers_of(model, kind, **options):
    """The legal numbers of a kind, which must be the same in all blocks."""
    legal = legal_widths(model, **options)
    (found,) = {legal.numbers[width.name] for width in legal.widths if width.kind == kind}
    return list(found)


def test_without_wishes_all_is_legal_down_to_the_minimum():
    model = llama()
    assert numbers_of(model, "heads") == [1, 2, 3, 4, 5, 6]
    assert numbers_of(model, "channels") == list(range(8, 101))
    assert numbers_of(model, "channels", min_units={"channels": 95}) == [95, 96, 97, 98, 99, 100]
    assert numbers_of(model, "heads", min_units=9) == [6], "no more can be asked for than there are"
    legal = legal_widths(model)
    assert legal.groups == tuple((width.name,) for width in find_widths(model))
    assert legal.remarks == ()


@pytest.mark.parametrize("devices", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("round_to", [1, 3, 8, 16])
@pytest.mark.parametrize("heads,groups,size", [(12, 6, 8), (12, 12, 4), (8, 2, 10), (24, 1, 2), (16, 4, 4)])
def test_every_layer_can_be_split_and_is_aligned(devices, round_to, heads, groups, size):
    """Each device gets whole heads and even, aligned shares of all dimensions; and nothing that does is left out."""
    model = llama(num_attention_heads=heads, num_key_value_heads=groups, head_dim=size)
    queries = heads // groups

    def head_sizes(n):
        """What each device holds of queries and keys, or None where it cannot be dealt out."""
        if n * queries % devices or (n % devices and devices % n):
            return None
        return [n * queries // devices * size, max(n // devices, 1) * size]

    wanted = {
        "heads": [
            n
            for n in range(1, groups + 1)
            if (own := head_sizes(n)) and (n == groups or all(length % round_to == 0 for length in own))
        ],
        "channels": [n for n in range(8, 101) if n % devices == 0 and (n == 100 or n // devices % round_to == 0)],
    }
    if not all(wanted.values()):
        with pytest.raises(ValueError, match=rf"dealt out to tensor_parallel={devices} .* round_to={round_to}"):
            legal_widths(model, round_to=round_to, tensor_parallel=devices)
        return
    for kind, expected in wanted.items():
        assert numbers_of(model, kind, round_to=round_to, tensor_parallel=devices) == expected


def test_uniform_llamas_load_in_stock_classes():
    """LlamaConfig wants heads that divide the hidden size; each number that is offered builds, no other one does."""
    from transformers import LlamaConfig, LlamaForCausalLM

    model = llama(num_attention_heads=12, num_key_value_heads=12)
    offered = numbers_of(model, "heads", uniform=True)
    assert offered == [1, 2, 3, 4, 6, 8, 12]
    for number in range(1, 13):
        sizes = dict(num_attention_heads=number, num_key_value_heads=number, head_dim=8)
        entries = copy.deepcopy(model.config).to_dict() | sizes
        if number not in offered:
            with pytest.raises(Exception, match="not a multiple of the number of attention heads"):
                LlamaConfig(**entries)
            continue
        with torch.device("meta"):
            stock = LlamaForCausalLM(LlamaConfig.from_dict(entries))
        assert stock.model.layers[0].self_attn.o_proj.weight.shape == (48, number * 8)
    legal = legal_widths(model, uniform=True)
    assert [len(names) for names in legal.groups] == [3, 3]
    assert len(legal.remarks) == 1 and "may not keep 5, 7, 9, 10, 11 heads" in legal.remarks[0]
    assert numbers_of(model, "heads", uniform=True, tensor_parallel=2) == [2, 4, 6, 8, 12]


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt", "gpt2"])
def test_uniform_encoders_keep_their_heads(family):
    """Their head size is the hidden size over the number of heads, so fewer heads would be wider ones."""
    model = tiny_model(family)
    assert numbers_of(model, "heads", uniform=True) == [2]
    assert numbers_of(model, "heads") == [1, 2]
    assert len(numbers_of(model, "channels", uniform=True)) > 20
    assert "may not keep 1 heads" in legal_widths(model, uniform=True).remarks[0]


@pytest.mark.parametrize("family", ["mistral", "qwen3"])
def test_other_configs_take_any_number_of_heads(family):
    import transformers

    names = {"mistral": "Mistral", "qwen3": "Qwen3"}
    config = getattr(transformers, f"{names[family]}Config")(
        vocab_size=61, hidden_size=40, intermediate_size=64, num_hidden_layers=2, num_attention_heads=10,
        num_key_value_heads=5, head_dim=6,
    )  # fmt: skip
    with torch.device("meta"):
        model = getattr(transformers, f"{names[family]}ForCausalLM")(config)
    assert numbers_of(model, "heads", uniform=True) == [1, 2, 3, 4, 5]


class Plain(nn.Module):
    """No Hugging Face model: nobody's stock class."""

    def __init__(self, widths):
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"fc1": nn.Linear(8, width), "act": nn.ReLU(), "fc2": nn.Linear(width, 8)})
            for width in widths
        )


def test_models_that_are_cut_already():
    model = Plain([24, 32])
    legal = legal_widths(model, uniform=True, round_to=8)
    assert legal.numbers == {"blocks.0.fc2": (8, 16, 24), "blocks.1.fc2": (8, 16, 24)}
    with pytest.raises(ValueError, match="channels of blocks have no legal number in common: they are 24, 32 now"):
        legal_widths(model, uniform=True, whole=["blocks.0.fc2", "blocks.1.fc2"])
    heads = Width("blocks.0.fc2", "heads", 3, 8, (Rows("blocks.0.fc1", 0, 8),))
    assert legal_widths(model, [heads], uniform=True).numbers == {"blocks.0.fc2": (1, 2, 3)}


def test_widths_left_alone():
    model = llama()
    first = find_widths(model)[0].name
    legal = legal_widths(model, whole=[first])
    assert legal.numbers[first] == (6,)
    assert len([name for name, numbers in legal.numbers.items() if len(numbers) == 1]) == 1
    together = legal_widths(model, whole=[first], uniform=True)
    assert {together.numbers[w.name] for w in together.widths if w.kind == "heads"} == {(6,)}


def test_bad_arguments():
    model = llama()
    for options in (dict(round_to=0), dict(tensor_parallel=0)):
        with pytest.raises(ValueError, match="both are numbers of at least 1"):
            legal_widths(model, **options)
    with pytest.raises(ValueError, match="keeps 1 unit or more"):
        legal_widths(model, min_units=0)
    with pytest.raises(ValueError, match="'head': no width of this model, and no kind"):
        legal_widths(model, min_units={"head": 2})
    with pytest.raises(ValueError, match="'lm_head': no width"):
        legal_widths(model, whole=["lm_head"])
    with pytest.raises(ValueError, match="6 heads of 16 columns each: no number of them from 1 up.*tensor_parallel=7"):
        legal_widths(model, tensor_parallel=7)


def test_the_table_for_people():
    rows = legal_widths(llama(), round_to=4, whole=["model.layers.2.mlp.down_proj"]).rows()
    assert [(row["what"], row["layers"], row["now"]) for row in rows] == [
        ("heads", 3, 6),
        ("channels", 2, 100),
        ("channels", 1, 100),
    ]
    assert [row["may keep"] for row in rows] == ["1, 2, 3, 4, 5, 6", "8, 12, 16, …, 100 (24 in all)", "100"]


@pytest.mark.parametrize("family", ["llama", "qwen3", "bert", "gpt2", "opt", "distilbert"])
def test_uniform_cuts_need_no_mark(family):
    """What is offered as uniform is what the config alone can say, once the model is cut so."""
    import transformers

    options = dict(vocab_size=61, hidden_size=24, intermediate_size=36, num_hidden_layers=2, num_attention_heads=4)
    names = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}
    if family in names:
        name = names[family]
        config = getattr(transformers, name.replace("ForCausalLM", "Config"))(**options, num_key_value_heads=4)
        model = getattr(transformers, name)(config)
    else:
        model = tiny_model(family)
    legal = legal_widths(model, uniform=True)
    for least in range(3):
        smaller = copy.deepcopy(model)
        num_kept = {name: numbers[min(least, len(numbers) - 1)] for name, numbers in legal.numbers.items()}
        cuts = {w.name: Cut(torch.arange(num_kept[w.name]), w.num_units, w.kind) for w in legal.widths}
        cut_(smaller, cuts, Snapshot(smaller))
        assert getattr(smaller.config, "quantization_config", None) is None
        stock = type(smaller)(type(smaller.config).from_dict(smaller.config.to_dict()))
        stock.load_state_dict(smaller.state_dict())
