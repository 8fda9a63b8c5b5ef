"""Cut models as transformers sees them: a plain config where it can say all sizes, a mark where it cannot."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as tf

import sparsekit as sk
from sparsekit import CheckpointError
from sparsekit.archs import find_widths
from sparsekit.errors import Unsupported
from sparsekit.hf.describe import widths_of
from sparsekit.hf.quantizer import SparsekitConfig, SparsekitQuantizer
from sparsekit.methods import METHODS
from sparsekit.nn import sparse_layers
from sparsekit.plan import Cut, Plan
from tests.archs.tiny_models import tiny_model, token_samples, vit
from tests.test_slicing import bert, cuts_of, generate, gpt2, llama, opt, run, same, state


def cut(model, uniform=False, **kinds):
    """Cut a model, but for the kinds that are said not to be."""
    cuts = {name: cut for name, cut in cuts_of(model, uniform=uniform).items() if kinds.get(cut.kind, True)}
    return sk.apply_(model, Plan(cuts=cuts))


def by(method, family="llama", **fields):
    """A tiny model made smaller by a method, with the same numbers everywhere."""
    model = tiny_model(family)
    rows = [{"input_ids": sample.tolist(), "label": index % 2} for index, sample in enumerate(token_samples(8))]
    config = METHODS.get(method)(**fields)
    return sk.apply_(model, sk.prune_(model, config, dataset=rows, batch_size=4, progress=False))


UNIFORM = {
    "contribution": lambda: by("contribution", sparsity=0.25, uniform=True, min_channels=1),
    "contribution of a bert": lambda: by("contribution", "bert", constraints={"params": "76.5%"}, uniform=True),
    "kcm of a bert": lambda: by("kcm", "bert", constraints={"params": "76.5%"}, uniform=True),
    "fisher of a distilbert": lambda: by("fisher", "distilbert", constraints={"params": "76.5%"}, uniform=True),
    "flap, with biases": lambda: by("flap", sparsity=0.25, uniform=True, min_channels=1),
    "slicegpt": lambda: by("slicegpt", sparsity=0.4, round_to=2),
    "slicegpt, untied": lambda: by("slicegpt", "qwen2", sparsity=0.4, round_to=2),
    "depth": lambda: by("depth"),
    "llama": lambda: cut(llama(), uniform=True),
    "llama, tied": lambda: cut(llama(tie_word_embeddings=True), uniform=True),
    "qwen2, without a head_dim": lambda: cut(llama("Qwen2"), uniform=True),
    "mistral": lambda: cut(llama("Mistral"), uniform=True),
    "vit": lambda: cut(vit(), uniform=True),
    "phi3": lambda: cut(llama("Phi3"), uniform=True),
    "bert, channels": lambda: cut(bert(), uniform=True, heads=False),
    "distilbert, channels": lambda: cut(bert("DistilBert"), uniform=True, heads=False),
    "gpt2, channels": lambda: cut(gpt2(), uniform=True, heads=False),
    "opt, channels": lambda: cut(opt(), uniform=True, heads=False),
    "llama, layers": lambda: sk.apply_(llama(), Plan(cuts={"model.layers": Cut(torch.tensor([0, 2]), 3, "layers")})),
    "gpt2, layers": lambda: sk.apply_(gpt2(), Plan(cuts={"transformer.h": Cut(torch.tensor([2]), 3, "layers")})),
}

LOAD_ALL = """
import json, sys, torch, transformers
assert "sparsekit" not in sys.modules
found = {}
for folder in sys.argv[1:]:
    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        model, loading = kind.from_pretrained(folder, output_loading_info=True)
    except Exception as error:
        found[folder] = {"error": f"{type(error).__name__}: {error}"}
        continue
    inputs = torch.load(f"{folder}/inputs.pt")
    expected = torch.load(f"{folder}/logits.pt")
    with torch.no_grad():
        error = float((model(**inputs).logits - expected).abs().max() / expected.abs().max())
    lost = [key for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if loading[key]]
    found[folder] = {"difference": error, "lost": lost, "cached": 0.0}
    if "input_ids" in inputs and model.can_generate():
        ids = inputs["input_ids"]
        with torch.no_grad():
            cache = model(ids[:, :-1], use_cache=True).past_key_values
            step = model(ids[:, -1:], past_key_values=cache).logits[:, -1]
            model.generate(ids, max_new_tokens=3, do_sample=False)
        found[folder]["cached"] = float((step - expected[:, -1]).abs().max() / expected.abs().max())
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def stock(tmp_path_factory):
    """What a process that knows nothing of sparsekit finds in folders that `save_pretrained` wrote."""
    top, families = tmp_path_factory.mktemp("stock"), UNIFORM | {"uneven": MARKED["llama"], "packed": packed}
    folders = {}
    for index, (family, build) in enumerate(families.items()):
        folders[family] = folder = top / str(index)
        model = build()
        model.save_pretrained(folder)
        inputs = {"input_ids": torch.arange(1, 25).view(2, 12)}
        if isinstance(model, tf.ViTForImageClassification):
            inputs = {"pixel_values": torch.randn(2, 3, 8, 8)}
        torch.save(inputs, folder / "inputs.pt")
        with torch.no_grad():
            torch.save(model(**inputs).logits, folder / "logits.pt")
    others = [path for path in sys.path if path and not (Path(path) / "sparsekit").is_dir()]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(others), "TRANSFORMERS_VERBOSITY": "error"}
    command = [sys.executable, "-c", LOAD_ALL, *map(str, folders.values())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    return {family: (folder, found[str(folder)]) for family, folder in folders.items()}


@pytest.mark.parametrize("family", UNIFORM)
def test_a_uniform_cut_is_a_plain_model_to_stock_classes(family, stock):
    folder, found = stock[family]
    assert "sparsekit" not in (folder / "config.json").read_text()
    assert found.get("lost") == [] and found["difference"] <= 1e-6 and found["cached"] <= 1e-5, found


@pytest.mark.parametrize("family", ["uneven", "packed"])
def test_without_sparsekit_other_loads_fail(family, stock):
    _, found = stock[family]
    assert "RuntimeError" in found["error"] and "ignore_mismatched_sizes" in found["error"], found


def test_what_the_config_says_of_a_uniform_cut():
    config = UNIFORM["llama"]().config
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (3, 1, 4)
    assert (config.intermediate_size, config.hidden_size) == (18, 24)
    assert UNIFORM["qwen2, without a head_dim"]().config.head_dim == 4
    assert UNIFORM["gpt2, channels"]().config.n_inner == 48
    assert UNIFORM["opt, channels"]().config.ffn_dim == 18
    assert UNIFORM["gpt2, layers"]().config.n_layer == 1


MARKED = {
    "llama": lambda: cut(llama()),
    "llama, heads that its check of the config refuses": lambda: sk.apply_(
        llama(num_heads=6, num_key_value_heads=6),
        Plan(cuts={f"model.layers.{i}.self_attn.o_proj": Cut(torch.arange(5), 6, "heads") for i in range(3)}),
    ),
    "llama, tied": lambda: cut(llama(tie_word_embeddings=True)),
    "bert": lambda: cut(bert()),
    "bert, all alike": lambda: cut(bert(), uniform=True),
    "distilbert": lambda: cut(bert("DistilBert")),
    "gpt2": lambda: cut(gpt2()),
    "opt": lambda: cut(opt()),
    "vit": lambda: cut(vit()),
}


@pytest.mark.parametrize("family", MARKED)
def test_what_the_config_cannot_say_survives_the_folder(family, tmp_path):
    model = MARKED[family]()
    assert widths_of(model)
    model.save_pretrained(tmp_path / "m")
    again, loading = type(model).from_pretrained(tmp_path / "m", output_loading_info=True)
    assert not any(loading[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert same(again, state(model)) and torch.equal(run(again), run(model))
    assert widths_of(again) == widths_of(model) and find_widths(again) == find_widths(model)
    if model.can_generate():
        assert torch.equal(generate(again), generate(model)) and torch.equal(generate(again, False), generate(model))
    again.save_pretrained(tmp_path / "twice")
    assert same(type(model).from_pretrained(tmp_path / "twice"), state(model))


def test_parts_that_a_model_was_made_without(tmp_path):
    """`add_pooling_layer=False` is nothing that a config knows; a list of blocks with one gone is something else."""
    model = tf.BertModel(bert().config, add_pooling_layer=False).eval()
    cut(model)
    model.save_pretrained(tmp_path)
    again = tf.BertModel.from_pretrained(tmp_path, add_pooling_layer=False)
    ids = torch.arange(1, 12)[None]
    assert torch.equal(again(ids).last_hidden_state, model(ids).last_hidden_state)
    with_pooler = tf.BertModel(bert().config).eval()
    del with_pooler.encoder.layer[0]
    with pytest.raises(Unsupported, match="which this model has not"):
        cut(with_pooler)


def test_what_the_config_can_say_it_says():
    """Channels alike and heads not: the mark holds the heads alone."""
    model = llama()
    cuts = {width.name: Cut(torch.arange(18), 36, "channels") for width in find_widths(model) if width.kind != "heads"}
    cuts["model.layers.1.self_attn.o_proj"] = Cut(torch.tensor([1]), 2, "heads")
    sk.apply_(model, Plan(cuts=cuts))
    assert model.config.intermediate_size == 18 and model.config.num_key_value_heads == 2
    assert widths_of(model) == {
        "model.layers.1.self_attn.k_proj": [4, 24],
        "model.layers.1.self_attn.o_proj": [24, 12],
        "model.layers.1.self_attn.q_proj": [12, 24],
        "model.layers.1.self_attn.v_proj": [4, 24],
    }
    assert model.config.to_dict()["quantization_config"]["layout_version"] == 3


def packed():
    """Cut unevenly, and what is left made 2:4."""
    model = MARKED["llama"]()
    sk.apply_(model, sk.prune_(model, "magnitude", progress=False))
    return sk.pack_(model)


@pytest.mark.parametrize("family", ["llama", "bert", "gpt2"])
def test_our_own_saving_and_loading(family, tmp_path):
    model = MARKED[family]()
    sk.save(model, tmp_path / "m")
    again = sk.load(tmp_path / "m")
    assert same(again, state(model)) and widths_of(again) == widths_of(model)
    card = (tmp_path / "m" / "README.md").read_text()
    assert "import sparsekit" in card and "ignore_mismatched_sizes" in card and "2:4" not in card
    manifest = json.loads((tmp_path / "m" / "sparsekit.json").read_text())
    assert manifest["widths"] == widths_of(model) and manifest["layout_version"] == 3
    sk.save(model, tmp_path / "dense", packed=False)
    assert same(sk.load(tmp_path / "dense"), state(model))
    manifest["widths"].popitem()
    (tmp_path / "m" / "sparsekit.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="name other layers"):
        sk.load(tmp_path / "m")


def test_a_uniform_cut_is_saved_dense(tmp_path):
    model = UNIFORM["llama"]()
    with pytest.raises(ValueError, match="save with packed=False"):
        sk.save(model, tmp_path / "m")
    sk.save(model, tmp_path / "m", packed=False)
    assert same(sk.load(tmp_path / "m"), state(model)) and "any tool" in (tmp_path / "m" / "README.md").read_text()


class TestAfterLoading:
    @pytest.fixture
    def loaded(self, tmp_path):
        model = MARKED["llama"]()
        model.save_pretrained(tmp_path / "m")
        return tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")

    def test_it_is_an_ordinary_model(self, loaded):
        """One that `Trainer` trains, and that can be cast: not a quantised one."""
        from transformers.trainer_utils import validate_quantization_for_training

        validate_quantization_for_training(loaded)
        assert loaded.half().float().dtype == torch.float32
        assert not hasattr(loaded, "hf_quantizer") and not hasattr(loaded.config, "_is_quantized")
        ids = torch.arange(1, 13)[None]
        loaded(input_ids=ids, labels=ids).loss.backward()
        assert all(p.grad is not None for p in loaded.parameters())

    def test_it_is_cut_again(self, loaded, tmp_path):
        before = {width.name: width.num_units for width in find_widths(loaded)}
        cut(loaded, uniform=True, heads=False)
        after = {width.name: width.num_units for width in find_widths(loaded)}
        assert all(after[name] <= num for name, num in before.items()) and before != after
        loaded.save_pretrained(tmp_path / "again")
        assert same(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again"), state(loaded))

    def test_cut_to_what_the_config_can_say_it_loses_its_mark(self, loaded):
        least = min(width.num_units for width in find_widths(loaded) if width.kind == "channels")
        cuts = {
            width.name: Cut(torch.arange(1 if width.kind == "heads" else least), width.num_units, width.kind)
            for width in find_widths(loaded)
        }
        sk.apply_(loaded, Plan(cuts=cuts))
        assert "quantization_config" not in loaded.config.to_dict()
        assert loaded.config.num_key_value_heads == 1 and loaded.config.intermediate_size == least

    def test_layers_go_and_the_mark_follows(self, loaded, tmp_path):
        third = copy.deepcopy(loaded.model.layers[2].mlp.up_proj.weight)
        sk.apply_(loaded, Plan(cuts={"model.layers": Cut(torch.tensor([0, 2]), 3, "layers")}))
        assert widths_of(loaded)["model.layers.1.mlp.up_proj"] == list(third.shape)
        loaded.save_pretrained(tmp_path / "two")
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "two")
        assert same(again, state(loaded)) and len(again.model.layers) == 2

    def test_the_base_model_and_another_head(self, loaded, tmp_path):
        base = tf.AutoModel.from_pretrained(tmp_path / "m")
        assert all(name.startswith("layers.") for name in widths_of(base))
        ids = torch.arange(1, 13)[None]
        with torch.no_grad():
            expected = loaded.model(input_ids=ids).last_hidden_state
            assert torch.equal(base(input_ids=ids).last_hidden_state, expected)
        base.save_pretrained(tmp_path / "base")
        other = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
        with torch.no_grad():
            assert torch.equal(other.model(input_ids=ids).last_hidden_state, expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_dtype_and_device_map(self, loaded, dtype, tmp_path):
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=dtype, device_map="cpu")
        assert {p.dtype for p in again.parameters()} == {dtype}
        assert same(again, {key: value.to(dtype) for key, value in loaded.state_dict().items()})


class TestWithTwoOfFour:
    @pytest.fixture
    def model(self):
        return packed()

    @pytest.mark.parametrize("ours", [True, False])
    def test_packed_and_cut(self, model, ours, tmp_path):
        sk.save(model, tmp_path / "m") if ours else model.save_pretrained(tmp_path / "m")
        again = sk.load(tmp_path / "m") if ours else tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert len(sparse_layers(again)) == len(sparse_layers(model)) == 21
        assert torch.equal(run(again), run(model)) and widths_of(again) == widths_of(model)
        again.save_pretrained(tmp_path / "twice")
        assert torch.equal(run(tf.LlamaForCausalLM.from_pretrained(tmp_path / "twice")), run(model))
        assert "import sparsekit" in sk.check(again).notes[-2] + sk.check(again).notes[-1]

    def test_unpacked_it_is_still_cut(self, model, tmp_path):
        expected, widths = run(model), widths_of(model)
        sk.save(model, tmp_path / "dense", packed=False)
        assert widths_of(model) == widths and len(sparse_layers(model)) == 21
        loaded = sk.load(tmp_path / "dense")
        assert not sparse_layers(loaded) and widths_of(loaded) == widths
        sk.unpack_(model)
        assert not sparse_layers(model) and widths_of(model) == widths and not hasattr(model, "hf_quantizer")
        assert same(loaded, state(model))
        torch.testing.assert_close(run(model), expected, rtol=1e-4, atol=1e-5)
        model.save_pretrained(tmp_path / "m")
        assert same(tf.LlamaForCausalLM.from_pretrained(tmp_path / "m"), state(model))

    def test_benchmark_check_and_explain(self, model):
        assert sk.check(model).ok and sk.explain(model).rows
        report = sk.benchmark(model, prompt_length=8, new_tokens=4, progress=False)
        assert report.rows


class TestAlteredConfigs:
    @pytest.mark.parametrize(
        "change",
        [
            lambda mark: mark.update(widths={"model.layers.0.mlp.up_proj": [7]}),
            lambda mark: mark.update(widths={"model.layers.0.mlp.up_proj": [0, 24]}),
            lambda mark: mark.update(widths={"model.layers.0.mlp.up_proj": [7.0, 24]}),
            lambda mark: mark.update(widths=[3]),
            lambda mark: mark.update(sizes={"model.layers.0.mlp": {"forward": 3}}),
            lambda mark: mark.update(sizes={"model.layers.0.mlp": {"num_heads": "3"}}),
            lambda mark: mark.update(widths={"model.norm": [3, 3]}),
            lambda mark: mark.update(widths={"encoder.0": [3, 3]}),
            lambda mark: mark.update(widths={}, sizes={}),
            lambda mark: mark.update(layout_version=4),
        ],
    )
    def test_are_refused(self, change, tmp_path):
        MARKED["llama"]().save_pretrained(tmp_path / "m")
        path = tmp_path / "m" / "config.json"
        config = json.loads(path.read_text())
        change(config["quantization_config"])
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError):
            tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")

    @pytest.mark.parametrize("left_out", [True, False])
    def test_a_width_that_the_weights_have_not(self, left_out, tmp_path):
        MARKED["llama"]().save_pretrained(tmp_path / "m")
        path = tmp_path / "m" / "config.json"
        config = json.loads(path.read_text())
        widths = config["quantization_config"]["widths"]
        if left_out:
            del widths["model.layers.0.mlp.up_proj"]
        else:
            widths["model.layers.0.mlp.up_proj"][0] -= 1
        path.write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match="other shapes than its config.json says"):
            sk.load(tmp_path / "m")

    def test_the_config_itself(self):
        config = SparsekitConfig(widths={"a": [2, 3]}, sizes={"b": {"num_heads": 1}}, layout_version=3)
        again = SparsekitConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict() and again.of_widths_alone().to_dict() == config.to_dict()
        SparsekitQuantizer(again)
        assert "widths" not in SparsekitConfig(layers={"a": {}}).to_dict()
        assert SparsekitConfig(layers={"a": {}}).of_widths_alone() is None
