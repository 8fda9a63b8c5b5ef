"""`save_pretrained` loses no side branch: it comes back where sparsekit is imported, and elsewhere the load fails."""

import json

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.trainer_utils import load_sharded_checkpoint

import sparsekit as sk
from sparsekit import CheckpointError
from sparsekit.archs import find_widths
from sparsekit.hf.describe import widths_of
from sparsekit.masks import Mask
from sparsekit.nn import SideLinear, install_side_, side_layers, sparse_layers
from sparsekit.patterns import NM
from sparsekit.plan import Cut, Plan, SideBranch
from sparsekit.targets import find_targets, set_weight_NK_, weight_NK

IDS = torch.arange(12).view(2, 6)


def llama(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=63, num_hidden_layers=2, num_attention_heads=4)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, max_position_embeddings=32, **changes)).eval()


def gpt2():
    torch.manual_seed(0)
    return tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=32, n_embd=32, n_layer=1, n_head=4)).eval()


def with_branches(model, group=16, has_X=False, only=""):
    """2:4 weights, and a branch beside each whose name holds `only`."""
    for index, (name, layer) in enumerate(find_targets(model).items()):
        w_NK = weight_NK(layer)
        set_weight_NK_(layer, w_NK * Mask("2:4", NM(2, 4).project(w_NK.abs())).keep)
        N, K = w_NK.shape
        generator = torch.Generator().manual_seed(index)
        S, X = (torch.randn(size, generator=generator) for size in ((N, -(-K // group)), (-(-K // group), K)))
        if only in name:
            install_side_(model, name, SideBranch(0.1 * S, X if has_X else None, group))
    return model


def logits_of(model):
    with torch.no_grad():
        return model(IDS).logits


def assert_same_branches(found, expected):
    layers, others = side_layers(found), side_layers(expected)
    assert layers.keys() == others.keys() and others
    for name, layer in layers.items():
        other = others[name]
        assert layer.branch == other.branch and torch.equal(layer.weight, other.weight)
        assert (layer.source, layer.bias is None) == (other.source, other.bias is None)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
@pytest.mark.parametrize("has_X", [False, True], ids=["sums", "X"])
@pytest.mark.parametrize(
    "make,dtype",
    [
        (llama, torch.float32),
        (llama, torch.bfloat16),
        (lambda: llama(mlp_bias=True), torch.float32),
        (gpt2, torch.float32),
    ],
    ids=["llama", "bf16", "bias", "gpt2"],
)
def test_what_is_saved_comes_back(make, dtype, has_X, shard, tmp_path):
    model = make()
    for parameter in model.parameters():  # and not `model.to(dtype)`, which would round the rotary angles
        parameter.data = parameter.data.to(dtype)
    with_branches(model, has_X=has_X)
    before = dict(vars(model.config))
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert dict(vars(model.config)) == before | {"architectures": [type(model).__name__], "dtype": model.config.dtype}
    assert "hf_quantizer" not in vars(model), "the model itself stays a plain one"
    for again in (tf.AutoModelForCausalLM.from_pretrained(tmp_path), sk.load(tmp_path)):
        assert_same_branches(again, model)
        assert torch.equal(logits_of(again), logits_of(model))
        assert not hasattr(again.config, "quantization_config") and not again.is_quantized
        assert all(p.requires_grad and p.device.type == "cpu" for p in again.parameters())
    again.save_pretrained(tmp_path / "twice")
    assert_same_branches(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "twice"), model)


def test_without_sparsekit_the_load_fails(tmp_path, monkeypatch):
    """Rather than leave the branches out with a warning."""
    with_branches(llama()).save_pretrained(tmp_path)
    monkeypatch.delitem(AUTO_QUANTIZER_MAPPING, "sparsekit")
    monkeypatch.delitem(AUTO_QUANTIZATION_CONFIG_MAPPING, "sparsekit")
    with pytest.raises(RuntimeError, match="(?s)weight.*mismatch|size mismatch|ignore_mismatched_sizes"):
        tf.LlamaForCausalLM.from_pretrained(tmp_path)


def test_beside_packed_layers(tmp_path):
    model = with_branches(llama(), only="mlp")
    names = [name for name in find_targets(model) if "self_attn" in name]
    for name in names:
        sk.pack_(model.get_submodule(name.rpartition(".")[0]), "semi24", "reference")
    model.save_pretrained(tmp_path)
    again = tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_same_branches(again, model)
    assert sparse_layers(again).keys() == sparse_layers(model).keys() == set(names)
    torch.testing.assert_close(logits_of(again), logits_of(model))  # by other kernels
    assert again.config.quantization_config.quant_method == "sparsekit"


def cut(model):
    """Heads and channels gone, another number of them in each block."""
    cuts = {}
    for index, width in enumerate(find_widths(model)):
        num = max(1, width.num_units * (index + 2) // 7)
        cuts[width.name] = Cut(torch.arange(num), width.num_units, width.kind)
    return sk.apply_(model, Plan(cuts=cuts))


@pytest.mark.parametrize("has_packed", [False, True], ids=["branches", "and packed layers"])
@pytest.mark.parametrize("make", [llama, gpt2], ids=["llama", "gpt2"])
def test_beside_widths_that_the_config_cannot_say(make, has_packed, tmp_path):
    """Cut unevenly, then branches beside some of what is left, then the other layers packed 2:4."""
    model = with_branches(cut(make()), only="mlp")
    if has_packed:
        others = [name for name in find_targets(model) if name not in side_layers(model)]
        sk.pack_(model, "semi24", "reference", layers={name: model.get_submodule(name) for name in others})
    widths, expected = widths_of(model), logits_of(model)
    assert widths and bool(sparse_layers(model)) == has_packed
    generated = model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0)
    for turn in ("first", "again"):
        model.save_pretrained(tmp_path / turn)
        model = tf.AutoModelForCausalLM.from_pretrained(tmp_path / turn)
        assert_same_branches(model, with_branches(cut(make()), only="mlp"))
        assert widths_of(model) == widths
        torch.testing.assert_close(logits_of(model), expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.generate(IDS, max_new_tokens=5, do_sample=False, pad_token_id=0), generated)


def test_into_the_base_model_and_in_another_dtype(tmp_path):
    model = with_branches(llama())
    model.save_pretrained(tmp_path)
    base = tf.LlamaModel.from_pretrained(tmp_path)
    assert set(side_layers(base)) == {name.removeprefix("model.") for name in side_layers(model)}
    with torch.no_grad():
        assert torch.equal(base(IDS)[0], model.model(IDS)[0])
    half = tf.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}


def test_the_wrong_class(tmp_path):
    with_branches(llama()).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="has none of them: load it with the class that saved it"):
        tf.GPT2LMHeadModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_a_model_with_branches_reads_the_files_as_they_are(shard, tmp_path):
    """As a trainer that resumes does, and whatever file a part is in."""
    model, other = with_branches(llama()), with_branches(llama())
    model.save_pretrained(tmp_path, max_shard_size=shard)
    for parameter in other.parameters():
        torch.nn.init.zeros_(parameter)
    if (tmp_path / "model.safetensors.index.json").exists():
        load_sharded_checkpoint(other, tmp_path, strict=False)
    else:
        result = other.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=False)
        assert not result.missing_keys and not result.unexpected_keys
    assert_same_branches(other, model)
    assert all(torch.equal(one, two) for one, two in zip(model.parameters(), other.parameters(), strict=True))


def test_a_state_dict_that_is_handed_over_is_the_one_saved(tmp_path):
    model = with_branches(llama())
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state["model.layers.0.mlp.up_proj.side_S"] += 1
    model.save_pretrained(tmp_path, state_dict=state)
    found = side_layers(sk.load(tmp_path))["model.layers.0.mlp.up_proj"]
    assert torch.equal(found.side_S, state["model.layers.0.mlp.up_proj.side_S"])


def test_damage_is_named(tmp_path):
    with_branches(llama()).save_pretrained(tmp_path)
    file, config = tmp_path / "model.safetensors", tmp_path / "config.json"
    whole, described = load_file(file), json.loads(config.read_text())
    name = "model.layers.0.mlp.up_proj"
    save_file({key: value for key, value in whole.items() if key != f"{name}.side_S"}, file, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"{name}.side_S is missing"):
        tf.LlamaForCausalLM.from_pretrained(tmp_path)
    save_file(whole, file, {"format": "pt"})
    for change, message in (
        ({"side": {"rank": 5, "group": 16, "has_X": False}}, "describes no branch"),
        ({"shape": [3, 32]}, "up_proj is packed as"),
        ({"side": None}, "describes no branch"),
    ):
        branches = described["quantization_config"]["branches"]
        altered = {**branches, name: {**branches[name], **change}}
        quantization = {**described["quantization_config"], "branches": altered}
        config.write_text(json.dumps({**described, "quantization_config": quantization}))
        with pytest.raises(CheckpointError, match=message):
            tf.LlamaForCausalLM.from_pretrained(tmp_path)


def test_a_model_of_another_quantizer_is_refused(tmp_path):
    model = with_branches(llama())
    model.config.quantization_config = {"quant_method": "other"}
    with pytest.raises(ValueError, match=r"side branch.*sparsekit.pack_\(model\)"):
        model.save_pretrained(tmp_path)
    assert model.config.quantization_config == {"quant_method": "other"}


def test_models_without_branches_are_saved_as_ever(tmp_path):
    model = llama()
    model.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    assert set(load_file(tmp_path / "model.safetensors")) == set(model.state_dict())
    assert not any(isinstance(module, SideLinear) for module in tf.LlamaForCausalLM.from_pretrained(tmp_path).modules())
