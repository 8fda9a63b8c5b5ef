"""Packed models as transformers sees them: its own saving, loading, and everything it does to a loaded model."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
import transformers as tf

import sparsekit as sk
from sparsekit import CheckpointError, SparseLinear
from sparsekit.hf.quantizer import SparsekitConfig, SparsekitQuantizer
from sparsekit.nn import sparse_layers

IDS = torch.arange(12).view(2, 6)


def prune24_(model):
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and not name.endswith(("lm_head", "score")):
            w = module.weight.data
            groups = w.abs().view(w.shape[0], -1, 4)
            w.masked_fill_((groups.argsort(-1).argsort(-1) < 2).view_as(w), 0)
    return model


def tiny(seed=0, **changes):
    torch.manual_seed(seed)
    config = tf.LlamaConfig(
        vocab_size=64, max_position_embeddings=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, **changes,
    )  # fmt: skip
    return prune24_(tf.LlamaForCausalLM(config).eval())


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


@pytest.fixture
def saved(tmp_path):
    model = sk.pack_(tiny())
    model.save_pretrained(tmp_path / "m")
    return model, tmp_path / "m"


class TestFromPretrained:
    @pytest.mark.parametrize("shard", ["5GB", "20KB"])
    def test_the_same_logits(self, shard, tmp_path):
        model = sk.pack_(tiny())
        model.save_pretrained(tmp_path / "m", max_shard_size=shard)
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "m")
        assert torch.equal(logits(again), logits(model))
        assert sparse_layers(again).keys() == sparse_layers(model).keys()
        assert again.config.quantization_config.quant_method == "sparsekit"

    def test_by_its_own_class_and_twice(self, saved):
        model, folder = saved
        again = tf.LlamaForCausalLM.from_pretrained(folder)
        again.save_pretrained(folder)
        assert torch.equal(logits(tf.LlamaForCausalLM.from_pretrained(folder)), logits(model))

    def test_into_the_base_model(self, saved):
        model, folder = saved
        base = tf.AutoModel.from_pretrained(folder)
        assert type(base).__name__ == "LlamaModel" and len(sparse_layers(base)) == 14
        with torch.no_grad():
            assert torch.equal(base(input_ids=IDS).last_hidden_state, model.model(input_ids=IDS).last_hidden_state)

    def test_from_the_base_model_and_into_another_head(self, tmp_path):
        base = sk.pack_(tiny().model)
        base.save_pretrained(tmp_path / "base")
        for kind in (tf.LlamaForCausalLM, tf.LlamaForSequenceClassification):
            model = kind.from_pretrained(tmp_path / "base")
            assert len(sparse_layers(model)) == 14 and all(name.startswith("model.") for name in sparse_layers(model))
            with torch.no_grad():
                expected = base(input_ids=IDS).last_hidden_state
                assert torch.equal(model.model(input_ids=IDS).last_hidden_state, expected)
            model.save_pretrained(tmp_path / "head")
            assert len(sparse_layers(kind.from_pretrained(tmp_path / "head"))) == 14

    def test_the_wrong_class(self, saved):
        with pytest.raises((CheckpointError, ValueError)):
            tf.BertModel.from_pretrained(saved[1])

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "auto"], ids=str)
    def test_dtype(self, dtype, saved):
        model, folder = saved
        again = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        wanted = torch.float32 if dtype == "auto" else dtype
        for name, layer in sparse_layers(again).items():
            assert layer.spec.dtype == wanted
            assert torch.equal(layer.to_dense(), model.get_submodule(name).to_dense().to(wanted))
        assert logits(again).isfinite().all()

    def test_device_map(self, saved):
        model, folder = saved
        again = tf.AutoModelForCausalLM.from_pretrained(folder, device_map="cpu")
        assert torch.equal(logits(again), logits(model))

    def test_no_random_weight_is_drawn(self, saved, monkeypatch):
        """transformers initialises what it believes missing; for a large model that takes minutes."""
        _, folder = saved
        drawn = []
        monkeypatch.setattr(SparseLinear, "weight", property(lambda self: drawn.append(self)))
        tf.AutoModelForCausalLM.from_pretrained(folder)
        assert not drawn

    def test_no_warning_about_keys(self, saved, capfd):
        import transformers.utils.logging as tf_logging

        tf_logging.set_verbosity_warning()
        tf.AutoModelForCausalLM.from_pretrained(saved[1])
        printed = capfd.readouterr()
        assert "MISSING" not in printed.err + printed.out and "UNEXPECTED" not in printed.err + printed.out

    def test_layers_are_ready_to_run(self, saved):
        again = tf.AutoModelForCausalLM.from_pretrained(saved[1])
        assert all(layer.is_prepared for layer in sparse_layers(again).values())
        assert not any(tensor.is_meta for tensor in again.state_dict().values())


class TestTheModel:
    def test_dequantize(self, saved):
        model, folder = saved
        again = tf.AutoModelForCausalLM.from_pretrained(folder)
        again.dequantize()
        assert not sparse_layers(again) and not hasattr(again, "hf_quantizer")
        assert torch.equal(logits(again), logits(sk.unpack_(model)))

    def test_unpack_and_save_is_dense(self, saved, tmp_path):
        model, _ = saved
        sk.unpack_(model)
        assert not hasattr(model.config, "quantization_config")
        model.save_pretrained(tmp_path / "dense")
        again = tf.AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
        assert not sparse_layers(again) and torch.equal(logits(again), logits(model))

    def test_packing_again_describes_again(self, saved, tmp_path):
        model, _ = saved
        sk.unpack_(model.model.layers[0])
        sk.pack_(sk.unpack_(model))
        model.save_pretrained(tmp_path / "again")
        assert torch.equal(logits(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "again")), logits(model))

    def test_training_of_what_is_not_packed(self, saved):
        model = tf.AutoModelForCausalLM.from_pretrained(saved[1]).train()
        model(input_ids=IDS, labels=IDS).loss.backward()
        assert model.model.embed_tokens.weight.grad is not None and model.lm_head.weight.grad is not None

    def test_compiles_whole(self, saved):
        torch._dynamo.reset()
        model = tf.AutoModelForCausalLM.from_pretrained(saved[1])
        with torch.no_grad():
            compiled = torch.compile(model.model.layers[0].mlp, fullgraph=True, backend="aot_eager")
            x = torch.randn(2, 3, 32)
            torch.testing.assert_close(compiled(x), model.model.layers[0].mlp(x))

    def test_resized_embeddings(self, saved):
        model = tf.AutoModelForCausalLM.from_pretrained(saved[1])
        before = model.model.layers[0].mlp.up_proj.to_dense()
        model.resize_token_embeddings(80)
        assert logits(model).shape[-1] == 80 and torch.equal(model.model.layers[0].mlp.up_proj.to_dense(), before)

    def test_generate(self, saved):
        model = tf.AutoModelForCausalLM.from_pretrained(saved[1])
        assert model.generate(IDS, max_new_tokens=3, do_sample=False).shape == (2, 9)


class TestConfig:
    LAYERS = {"a": {"format": "semi24", "shape": [8, 8], "source": "Linear", "bias": False}}

    def test_json_round_trip(self):
        config = SparsekitConfig(layers=self.LAYERS)
        again = SparsekitConfig.from_dict(config.to_dict())
        assert again.to_dict() == config.to_dict() == {
            "quant_method": "sparsekit", "layout_version": 1, "layers": self.LAYERS
        }  # fmt: skip

    def test_the_backend_is_not_stored(self):
        assert "backend" not in SparsekitConfig(layers=self.LAYERS, backend="reference").to_dict()

    def test_refuses_what_a_later_version_wrote(self):
        with pytest.raises(CheckpointError, match="layout version 4, this sparsekit reads up to 3: upgrade"):
            SparsekitQuantizer(SparsekitConfig(layers=self.LAYERS, layout_version=4))

    def test_registered_once(self):
        from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

        from sparsekit.hf.register import register

        register()
        assert AUTO_QUANTIZER_MAPPING["sparsekit"] is SparsekitQuantizer
        assert AUTO_QUANTIZATION_CONFIG_MAPPING["sparsekit"] is SparsekitConfig


def test_sizes_that_do_not_fit_the_config(saved):
    _, folder = saved
    config = tf.AutoConfig.from_pretrained(folder)
    config.intermediate_size = 128
    with pytest.raises(CheckpointError, match=r"mlp\.(gate|up|down)_proj is packed as"):
        tf.LlamaForCausalLM.from_pretrained(folder, config=config)


def test_importing_loads_no_transformers():
    code = (
        "import sys, sparsekit; assert 'transformers' not in sys.modules; "
        "import transformers.quantizers.auto as auto; assert 'sparsekit' in auto.AUTO_QUANTIZER_MAPPING; "
        "from transformers.modeling_utils import PreTrainedModel; "
        "assert PreTrainedModel.save_pretrained.keeps_branches; "
        "assert not any('sparsekit' in type(finder).__module__ for finder in sys.meta_path)"
    )
    root = Path(importlib.import_module("sparsekit").__file__).parents[1]
    path = f"{root}:{root / 'kernels'}"
    env = {**os.environ, "PYTHONPATH": f"{os.environ.get('PYTHONPATH', '')}:{path}".lstrip(":")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_model_that_another_quantizer_described_is_left_alone():
    model = tiny()
    model.hf_quantizer = object()
    sk.unpack_(model)
    assert hasattr(model, "hf_quantizer")


def test_hidden_states_reach_every_layer():
    """The packed layers are the ones that run: breaking one changes the logits."""
    model = sk.pack_(tiny())
    before = logits(model)
    for layer in sparse_layers(model).values():
        kept = [tensor.clone() for tensor in layer.prepared]
        layer.prepared[0].mul_(2)
        assert not torch.equal(logits(model), before)
        for tensor, old in zip(layer.prepared, kept, strict=True):
            tensor.copy_(old)
    assert torch.equal(logits(model), before)
    assert F.softmax(before, -1).isfinite().all()


class TestPackedThroughAPart:
    """Whatever hand packed the layers, the checkpoint says so and loads."""

    def logits_after_reload(self, model, folder):
        ids = torch.arange(6)[None]
        expected = model(ids).logits
        sk.save(model, folder)
        return sk.load(folder)(ids).logits, expected

    def tiny(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        sizes = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, vocab_size=20)
        return LlamaForCausalLM(LlamaConfig(**sizes)).eval()

    def test_a_list_of_blocks(self, tmp_path):
        model = self.tiny()
        sk.sparsify(model.model.layers, method="magnitude", progress=False)
        now, expected = self.logits_after_reload(model, tmp_path / "m")
        assert torch.equal(now, expected)

    def test_one_layer_by_hand(self, tmp_path):
        model = self.tiny()
        linear = model.model.layers[1].mlp.up_proj
        with torch.no_grad():
            linear.weight.mul_(sk.NM(2, 4).project(linear.weight.abs()))
        model.model.layers[1].mlp.up_proj = sk.SparseLinear.from_linear(linear)
        now, expected = self.logits_after_reload(model, tmp_path / "m")
        assert torch.equal(now, expected)

    def test_inside_a_peft_model_that_is_unloaded(self, tmp_path):
        from peft import LoraConfig, get_peft_model

        wrapped = get_peft_model(self.tiny(), LoraConfig(target_modules=["q_proj"], r=2))
        sk.sparsify(wrapped, method="magnitude", targets=("re:.*mlp.*proj", "re:.*base_layer"), progress=False)
        model = wrapped.unload()
        model.save_pretrained(tmp_path / "m")
        ids = torch.arange(6)[None]
        assert torch.equal(sk.load(tmp_path / "m")(ids).logits, model(ids).logits)

    def test_inside_a_compiled_model(self, tmp_path):
        model = sk.sparsify(self.tiny(), method="magnitude", progress=False)
        ids = torch.arange(6)[None]
        sk.save(torch.compile(model), tmp_path / "m")
        assert torch.equal(sk.load(tmp_path / "m")(ids).logits, model(ids).logits)

    def test_a_manifest_that_knows_of_layers_the_config_does_not(self, tmp_path):
        import json

        model = sk.sparsify(self.tiny(), method="magnitude", progress=False)
        sk.save(model, tmp_path / "m")
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        del config["quantization_config"]
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        with pytest.raises(sk.CheckpointError, match="name other layers"):
            sk.load(tmp_path / "m")

    @pytest.mark.parametrize("version", ["x", None, 99])
    def test_an_altered_layout_version(self, tmp_path, version):
        import json

        model = sk.sparsify(self.tiny(), method="magnitude", progress=False)
        model.save_pretrained(tmp_path / "m")
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        config["quantization_config"]["layout_version"] = version
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        with pytest.raises(sk.CheckpointError, match="layout.version"):
            sk.load(tmp_path / "m")

    def test_nan_in_the_values_is_refused_by_name(self, tmp_path):
        from safetensors.torch import load_file, save_file

        model = sk.sparsify(self.tiny(), method="magnitude", progress=False)
        model.save_pretrained(tmp_path / "m")
        file = tmp_path / "m" / "model.safetensors"
        tensors = load_file(file)
        tensors["model.layers.1.mlp.up_proj.values"][3, 2] = float("nan")
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(sk.CheckpointError, match=r"model.layers.1.mlp.up_proj: values hold NaN"):
            sk.load(tmp_path / "m")

    def test_a_dtype_that_the_format_does_not_hold(self, tmp_path):
        sk.save(sk.sparsify(self.tiny(), method="magnitude", progress=False), tmp_path / "m")
        with pytest.raises(sk.Unsupported, match="does not hold torch.float64"):
            sk.load(tmp_path / "m", dtype=torch.float64)
