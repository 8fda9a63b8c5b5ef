"""Checkpoints: the same logits after reloading, refusals by name, and a disk that is never left half-written."""

import copy
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import sparsekit as sk
from sparsekit import CheckpointError
from sparsekit.nn import SideLinear, merge_side_, side_layers, sparse_layers
from sparsekit.plan import Plan, SideBranch

REPOSITORY = Path(__file__).parents[1]
IDS = torch.arange(12).view(2, 6)


def prune24_(model):
    for name, module in model.named_modules():
        is_conv1d = type(module).__name__ == "Conv1D"
        if name.endswith("lm_head") or not (is_conv1d or isinstance(module, nn.Linear)):
            continue
        w = module.weight.data.T if is_conv1d else module.weight.data
        groups = F.pad(w.abs(), (0, -w.shape[1] % 4), value=-1.0).view(w.shape[0], -1, 4)
        keep = (groups.argsort(-1).argsort(-1) >= 2).view(w.shape[0], -1)[:, : w.shape[1]]
        w.masked_fill_(~keep, 0)
    return model


def tiny(family="llama", dtype=torch.float32, **changes):
    import transformers as tf

    torch.manual_seed(0)
    small = dict(vocab_size=64, max_position_embeddings=64) | changes
    if family == "llama":
        config = tf.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                num_key_value_heads=2, **small)  # fmt: skip
        model = tf.LlamaForCausalLM(config)
    elif family == "gpt2":
        model = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4))
    elif family == "opt":
        config = tf.OPTConfig(hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
                              word_embed_proj_dim=32, **small)  # fmt: skip
        model = tf.OPTForCausalLM(config)
    else:
        config = tf.BertConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **small
        )
        model = tf.BertForMaskedLM(config)
    prune24_(model.eval())
    for parameter in model.parameters():  # and not `model.to(dtype)`, which would round the rotary angles
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def logits(model):
    with torch.no_grad():
        return model(input_ids=IDS).logits


def same_packed(a, b):
    a, b = sparse_layers(a), sparse_layers(b)
    return a.keys() == b.keys() and all(
        torch.equal(a[name].packed().tensors[part], b[name].packed().tensors[part])
        for name in a
        for part in ("values", "meta")
    )


def parts_of(model):
    """The packed tensors of every layer, as dtypes and bytes."""
    return {
        (name, part): (tensor.dtype, tensor.shape, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, layer in sparse_layers(model).items()
        for part, tensor in layer.packed().tensors.items()
    }


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def python(code, *arguments):
    """Run code in a process of its own that finds this checkout."""
    path = os.pathsep.join([str(REPOSITORY), str(REPOSITORY / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path.rstrip(os.pathsep), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, "-c", code, *map(str, arguments)], env=env, capture_output=True, text=True)


@pytest.fixture
def packed(tmp_path):
    """A packed model and the folder it was saved to."""
    model = sk.pack_(tiny(dtype=torch.bfloat16))
    sk.save(model, tmp_path / "model")
    return model, tmp_path / "model"


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
    def test_packed(self, family, dtype, tmp_path):
        model = sk.pack_(tiny(family, dtype))
        sk.save(model, tmp_path / "m")
        again = sk.load(tmp_path / "m")
        assert type(again) is type(model) and not again.training and next(again.parameters()).dtype == dtype
        assert same_packed(again, model) and torch.equal(logits(again), logits(model))
        assert all(layer.is_prepared for layer in sparse_layers(again).values())

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("format", ["semi24_int8", "semi24_int4", "semi24_fp8"])
    def test_quantised(self, format, family, dtype, tmp_path):
        """The numbers and scales come back as they were, whatever dtype the model is loaded in."""
        import transformers as tf

        model = sk.pack_(tiny(family, dtype), format, "reference")
        parts = parts_of(model)
        sk.save(model, tmp_path / "a")
        model.save_pretrained(tmp_path / "b")
        for again in (
            sk.load(tmp_path / "a", backend="reference"),
            sk.load(tmp_path / "b", backend="reference", dtype=dtype),
        ):
            assert parts_of(again) == parts and torch.equal(logits(again), logits(model))
        for wanted in (torch.float32, torch.bfloat16, torch.float16):
            for folder in (tmp_path / "a", tmp_path / "b"):
                again = tf.AutoModelForCausalLM.from_pretrained(folder, dtype=wanted)
                assert parts_of(again) == parts
                layer = next(iter(sparse_layers(again).values()))
                assert layer.spec.dtype == layer.to_dense().dtype == again.dtype == wanted
        bits = {"semi24_int8": 5, "semi24_int4": 3, "semi24_fp8": 5}[format]
        card = (tmp_path / "a/README.md").read_text()
        assert f"(2:4, as {format}):" in card
        said = float(card.split(" bits for each dense weight")[0].rpartition(" ")[2])
        assert bits < said <= bits + 1  # the scales: 32 bits for rows of 32 and 64, 16 for each row at 4 bits

    @pytest.mark.parametrize("format", ["semi24_int8", "semi24_int4", "semi24_fp8"])
    def test_a_quantised_module_that_is_no_transformers_model(self, format, tmp_path):
        def module(seed):
            torch.manual_seed(seed)
            return prune24_(nn.Sequential(nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 8)))

        model = sk.pack_(module(0), format, "reference")
        sk.save(model, tmp_path / "m")
        again = sk.load(tmp_path / "m", model=module(1), backend="reference")
        assert parts_of(again) == parts_of(model)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "bert"])
    def test_dense(self, family, tmp_path):
        """With zeros, under the names of the dense model; packs again to the same bytes."""
        masked = tiny(family)
        expected = logits(masked)
        state = {key: tensor.clone() for key, tensor in masked.state_dict().items()}
        model = sk.pack_(masked)
        before = logits(model)
        sk.save(model, tmp_path / "m", packed=False)
        assert "quantization_config" not in json.loads((tmp_path / "m/config.json").read_text())
        assert model.config.quantization_config is not None and torch.equal(logits(model), before)
        again = sk.load(tmp_path / "m")
        assert not sparse_layers(again) and torch.equal(logits(again), expected)
        assert all(torch.equal(again.state_dict()[key], tensor) for key, tensor in state.items())
        assert same_packed(sk.pack_(again), model)

    def test_a_dense_model(self, tmp_path):
        model = tiny()
        with pytest.raises(ValueError, match="no layer of the model is packed.*pack_"):
            sk.save(model, tmp_path / "m")
        assert not (tmp_path / "m").exists()
        sk.save(model, tmp_path / "m", packed=False)
        assert torch.equal(logits(sk.load(tmp_path / "m")), logits(model))

    @pytest.mark.parametrize("packed", [True, False])
    def test_shards(self, packed, tmp_path):
        model = sk.pack_(tiny())
        sk.save(model, tmp_path / "m", packed=packed, max_shard_size="20KB")
        assert len(list((tmp_path / "m").glob("*.safetensors"))) >= 3
        assert (tmp_path / "m/model.safetensors.index.json").is_file()
        again = sk.load(tmp_path / "m")
        torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0 if packed else 1e-4)

    def test_tied_embeddings(self, tmp_path):
        model = sk.pack_(tiny(tie_word_embeddings=True))
        for packed in (True, False):
            sk.save(model, tmp_path / "m", packed=packed)
            again = sk.load(tmp_path / "m")
            assert again.lm_head.weight is again.model.embed_tokens.weight
            torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=0 if packed else 1e-4)

    def test_biases_and_a_partly_packed_model(self, tmp_path):
        model = tiny(attention_bias=True, mlp_bias=True)
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.data.normal_()
        model.model.layers[1].mlp.up_proj.weight.data.normal_()
        sk.pack_(model)
        sk.save(model, tmp_path / "m")
        again = sk.load(tmp_path / "m")
        assert same_packed(again, model) and torch.equal(logits(again), logits(model))

    def test_saved_and_loaded_again_and_again(self, packed, tmp_path):
        model, folder = packed
        for _ in range(2):
            again = sk.load(folder)
            sk.save(again, folder)
        assert same_packed(sk.load(folder), model)
        assert torch.equal(logits(sk.load(folder)), logits(model))

    def test_arguments(self, packed):
        model, folder = packed
        assert {layer.backend for layer in sparse_layers(sk.load(folder, backend="reference")).values()} == {
            "reference"
        }
        wide = sk.load(folder, dtype=torch.float32)
        assert next(wide.parameters()).dtype == torch.float32
        assert torch.equal(logits(wide), logits(copy.deepcopy(model).to(torch.float32)))
        half = sk.load(folder, dtype=torch.float16, device="cpu")
        assert half.dtype == torch.float16 and same_packed(half, copy.deepcopy(model).to(torch.float16))
        with pytest.raises(ValueError, match="unknown backend 'cpuu'"):
            sk.load(folder, backend="cpuu")
        with pytest.raises(sk.Unsupported, match="cannot run"):
            sk.load(folder, backend="cusparselt")

    def test_bytes_on_disk(self, packed):
        """9/16 of the dense bytes, and nothing of the dense weight beside them."""
        model, folder = packed
        with safe_open(folder / "model.safetensors", "pt") as file:
            sizes = {key: file.get_tensor(key).nbytes for key in file.keys()}
        packed_bytes = sum(size for key, size in sizes.items() if key.endswith((".values", ".meta")))
        layers = sparse_layers(model)
        assert packed_bytes == sum(layer.dense_bytes() for layer in layers.values()) * 9 / 16
        assert sum(sizes.get(f"{name}.weight", 0) for name in layers) == 0

    def test_nothing_is_a_pickle(self, packed):
        names = set(contents(packed[1]))
        assert names == {"README.md", "config.json", "generation_config.json", "model.safetensors", "sparsekit.json"}
        readme = (packed[1] / "README.md").read_text()
        assert "import sparsekit" in readme and "0.562" in readme and "AutoModelForCausalLM" in readme

    def test_a_tokenizer_goes_along(self, wikilm, tmp_path):
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(wikilm)
        sk.save(sk.pack_(tiny()), tmp_path / "m", tokenizer=tokenizer)
        assert AutoTokenizer.from_pretrained(tmp_path / "m")("a b")["input_ids"] == tokenizer("a b")["input_ids"]


class Plain(nn.Module):
    """No transformers model; its head is tied to its embedding."""

    def __init__(self, width=32):
        super().__init__()
        self.embed, self.up, self.down = nn.Embedding(16, width), nn.Linear(width, 64), nn.Linear(64, width)
        self.head = nn.Linear(width, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids):
        return self.head(self.down(F.relu(self.up(self.embed(ids)))))


def plain(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = Plain(**kwargs)
    prune24_(nn.Sequential(model.up, model.down))
    return model


class TestPlainModules:
    @pytest.mark.parametrize("packed", [True, False])
    def test_round_trip(self, packed, tmp_path):
        model = sk.pack_(plain())
        sk.save(model, tmp_path / "m", packed=packed)
        target = plain(seed=1)
        again = sk.load(tmp_path / "m", model=target)
        assert again is target and again.head.weight is again.embed.weight
        assert bool(sparse_layers(again)) is packed
        torch.testing.assert_close(again(IDS), model(IDS), rtol=0, atol=0 if packed else 1e-5)

    def test_needs_the_module(self, tmp_path):
        sk.save(sk.pack_(plain()), tmp_path / "m")
        with pytest.raises(
            ValueError, match="config.json is missing in .*: fetch it again .* pass a dense one to load into, as model="
        ):
            sk.load(tmp_path / "m")

    @pytest.mark.parametrize("packed", [True, False])
    def test_another_module_is_refused_and_left_alone(self, packed, tmp_path):
        sk.save(sk.pack_(plain()), tmp_path / "m", packed=packed)
        for other in (plain(seed=1, width=64), nn.Sequential(nn.Linear(4, 4)), _with_more(plain(seed=1))):
            classes = [type(module) for module in other.modules()]
            before = {key: tensor.clone() for key, tensor in other.state_dict().items()}
            with pytest.raises(CheckpointError):
                sk.load(tmp_path / "m", model=other)
            assert [type(module) for module in other.modules()] == classes
            after = other.state_dict()
            assert after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


def _with_more(model):
    model.more = nn.Linear(3, 3)
    return model


class TestDamage:
    @pytest.mark.parametrize(
        "damage,message",
        [
            (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors is missing"),
            (lambda folder: os.truncate(folder / "model.safetensors", 5000), "model.safetensors has 5,000 bytes"),
            (lambda folder: os.truncate(folder / "model.safetensors", 0), "model.safetensors has 0 bytes"),
            (lambda folder: flip(folder / "model.safetensors", -9), "model.safetensors does not have the digest"),
            (lambda folder: flip(folder / "model.safetensors", 3), "model.safetensors does not have the digest"),
            (lambda folder: os.truncate(folder / "sparsekit.json", 40), "sparsekit.json is damaged"),
            (lambda folder: (folder / "sparsekit.json").write_text("[]"), "sparsekit.json is damaged"),
            (lambda folder: (folder / "sparsekit.json").write_text("{}"), "sparsekit.json is damaged"),
            (lambda folder: (folder / "sparsekit.json").write_bytes(b"\xff\xfe"), "sparsekit.json is damaged"),
            (lambda folder: edit(folder / "sparsekit.json", "files", 7), "sparsekit.json is damaged"),
            (lambda folder: edit(folder / "sparsekit.json", "files", {"a": {}}), "sparsekit.json is damaged"),
            (lambda folder: os.truncate(folder / "config.json", 40), "config.json cannot be read"),
            (lambda folder: drop_layer(folder / "config.json"), "config.json and sparsekit.json name other layers"),
        ],
    )
    def test_is_named(self, damage, message, packed):
        damage(packed[1])
        with pytest.raises(CheckpointError, match=message):
            sk.load(packed[1])

    def test_a_missing_shard_is_named(self, tmp_path):
        sk.save(sk.pack_(tiny()), tmp_path / "m", max_shard_size="20KB")
        shard = sorted((tmp_path / "m").glob("*.safetensors"))[2]
        shard.unlink()
        with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
            sk.load(tmp_path / "m")

    def test_no_checkpoint(self, tmp_path):
        for folder in (tmp_path, tmp_path / "nowhere"):
            with pytest.raises(FileNotFoundError, match="no checkpoint in"):
                sk.load(folder)


def flip(path, position):
    raw = bytearray(path.read_bytes())
    raw[position] ^= 1
    path.write_bytes(raw)


def edit(path, key, value):
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))


def drop_layer(path):
    config = json.loads(path.read_text())
    config["quantization_config"]["layers"].popitem()
    path.write_text(json.dumps(config))


class TestDamageWithoutManifest:
    """What `save_pretrained` wrote has no digests: the tensors themselves must speak."""

    @pytest.fixture
    def folder(self, tmp_path):
        sk.pack_(tiny(attention_bias=True)).save_pretrained(tmp_path / "m")
        assert not (tmp_path / "m/sparsekit.json").exists()
        return tmp_path / "m"

    @staticmethod
    def rewrite(folder, change):
        path = folder / "model.safetensors"
        state = load_file(path)
        change(state)
        save_file(state, path, metadata={"format": "pt"})

    NAME = "model.layers.1.self_attn.q_proj"

    @pytest.mark.parametrize("loader", ["sparsekit", "transformers"])
    @pytest.mark.parametrize(
        "change,message",
        [
            (lambda state: state["NAME.meta"].fill_(0), "NAME: meta holds 256 index pairs"),
            (lambda state: state["NAME.meta"][0, :1].fill_(0xE3), "NAME: meta holds 1 index pairs"),
            (lambda state: state.pop("NAME.values"), r"NAME.values is missing"),
            (lambda state: state.pop("NAME.meta"), r"NAME.meta is missing"),
            (lambda state: state.pop("NAME.bias"), r"NAME.bias is missing"),
        ],
        ids=["meta", "one_nibble", "no_values", "no_meta", "no_bias"],
    )
    def test_is_named(self, change, message, loader, folder):
        class Named(dict):
            """The state dict, with NAME for the name of the layer."""

            def __getitem__(self, key):
                return state[key.replace("NAME", TestDamageWithoutManifest.NAME)]

            def pop(self, key):
                return state.pop(key.replace("NAME", TestDamageWithoutManifest.NAME))

        path = folder / "model.safetensors"
        state = load_file(path)
        change(Named())
        save_file(state, path, metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=message.replace("NAME", self.NAME)):
            self.load(loader, folder)

    @pytest.mark.parametrize("part", ["values", "meta", "bias"])
    def test_other_shapes(self, part, folder):
        key = f"{self.NAME}.{part}"
        self.rewrite(folder, lambda state: state.update({key: state[key][:-1].clone()}))
        with pytest.raises(CheckpointError):
            self.load("sparsekit", folder)

    @pytest.mark.parametrize("loader", ["sparsekit", "transformers"])
    @pytest.mark.parametrize(
        "change,message",
        [
            (lambda described: described.update(layers={}), "names no packed layer"),
            (lambda described: described["layers"]["NAME"].pop("source"), "does not give the source of NAME"),
            (lambda described: described["layers"]["NAME"].update(format="semi42"), "unknown format.*'semi24'"),
            (lambda described: described["layers"]["NAME"].update(shape=[8, 8]), r"NAME is packed as \[8, 8\]"),
            (lambda described: described.update(layout_version=99), "layout version 99.*upgrade sparsekit"),
        ],
        ids=["no_layers", "no_source", "format", "shape", "version"],
    )
    def test_config(self, change, message, loader, folder):
        text = (folder / "config.json").read_text().replace(self.NAME, "NAME")
        config = json.loads(text)
        change(config["quantization_config"])
        (folder / "config.json").write_text(json.dumps(config).replace("NAME", self.NAME))
        with pytest.raises(CheckpointError, match=message.replace("NAME", self.NAME)):
            self.load(loader, folder)

    @staticmethod
    def load(loader, folder):
        from transformers import AutoModelForCausalLM

        return sk.load(folder) if loader == "sparsekit" else AutoModelForCausalLM.from_pretrained(folder)


def with_branches(model, rank=None, group=16):
    """The pruned model with random branches beside all that is pruned."""
    plan, generator = sk.prune_(model, "magnitude", progress=False), torch.Generator().manual_seed(0)
    for name, mask in plan.masks.items():
        N, K = mask.shape
        S = torch.randn(N, rank or -(-K // group), generator=generator) / 10
        X = torch.randn(rank, K, generator=generator) / 3 if rank else None
        plan.side[name] = SideBranch(S, X, group)
    return sk.apply_(model, Plan(plan.masks, side=plan.side))


def all_parts_of(model):
    return parts_of(model) | {
        (name, part): tensor.clone()
        for name, layer in sparse_layers(model).items()
        for part, tensor in layer.side_tensors().items()
    }


def equal_parts(model, other):
    ours, theirs = all_parts_of(model), all_parts_of(other)
    return ours.keys() == theirs.keys() and all(
        torch.equal(part, theirs[key]) if isinstance(part, torch.Tensor) else part == theirs[key]
        for key, part in ours.items()
    )


class TestSideBranches:
    @pytest.mark.parametrize("rank", [None, 3])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("format", ["semi24", "semi24_int8", "semi24_int4"])
    def test_packed(self, format, family, rank, tmp_path):
        from transformers import AutoModelForCausalLM

        model = sk.pack_(with_branches(tiny(family, torch.bfloat16), rank), format)
        sk.save(model, tmp_path / "a")
        model.save_pretrained(tmp_path / "b")
        manifest = json.loads((tmp_path / "a/sparsekit.json").read_text())
        config = json.loads((tmp_path / "b/config.json").read_text())["quantization_config"]
        assert manifest["layout_version"] == config["layout_version"] == 2
        for again in (sk.load(tmp_path / "a"), AutoModelForCausalLM.from_pretrained(tmp_path / "b")):
            assert equal_parts(again, model) and torch.equal(logits(again), logits(model))
            unpacked = sk.unpack_(again)
            assert side_layers(unpacked).keys() == sparse_layers(model).keys()
            assert all(
                layer.branch == sparse_layers(model)[name].side_branch()
                for name, layer in side_layers(unpacked).items()
            )
        stored = sum(
            tensor.nbytes
            for layer in sparse_layers(model).values()
            for tensor in (*layer.packed().tensors.values(), *layer.side_tensors().values())
        )
        num_weights = sum(layer.in_features * layer.out_features for layer in sparse_layers(model).values())
        card = (tmp_path / "a/README.md").read_text()
        assert f", {8 * stored / num_weights:.3g} bits for each dense weight." in card
        assert f"{len(sparse_layers(model))} of them have a low-rank side branch" in card
        on_disk = load_file(tmp_path / "a/model.safetensors")
        parts = {"values", "meta", "scales", "side_X", "side_X_scale", "side_scale"}
        assert sum(part.nbytes for key, part in on_disk.items() if key.rpartition(".")[2] in parts) == stored

    def test_plain_layers_stay_readable_by_what_knows_no_branches(self, packed):
        _, folder = packed
        assert json.loads((folder / "config.json").read_text())["quantization_config"]["layout_version"] == 1
        assert json.loads((folder / "sparsekit.json").read_text())["layout_version"] == 1
        assert "side branch" not in (folder / "README.md").read_text()

    def test_a_module_that_is_no_transformers_model(self, tmp_path):
        def module(seed):
            torch.manual_seed(seed)
            return prune24_(nn.Sequential(nn.Linear(20, 36), nn.ReLU(), nn.Linear(36, 8)))

        model, x = sk.pack_(with_branches(module(0), group=8), "semi24_int8"), torch.randn(3, 20)
        sk.save(model, tmp_path / "m")
        again = sk.load(tmp_path / "m", model=module(1))
        assert equal_parts(again, model) and torch.equal(again(x), model(x))

    @pytest.mark.parametrize("form", ["applied", "packed", "half packed"])
    def test_what_would_lose_the_branches_is_refused(self, form, tmp_path):
        model = with_branches(tiny())
        if form != "applied":
            names = list(side_layers(model))
            sk.pack_(model, layers=names if form == "packed" else names[:3])
        with pytest.raises(ValueError, match=r"have a side branch, as model.*sparsekit.pack_.*merge_side_"):
            sk.save(model, tmp_path / "m", packed=form == "half packed")
        assert not (tmp_path / "m").exists()

    def test_the_remedies_hold(self, tmp_path):
        model = sk.pack_(with_branches(tiny()))
        expected = logits(model)
        sk.unpack_(model)
        with pytest.warns(UserWarning, match="14 layers are dense again"):
            merge_side_(model)
        sk.save(model, tmp_path / "m", packed=False)
        torch.testing.assert_close(logits(sk.load(tmp_path / "m")), expected, rtol=1e-4, atol=1e-5)
        assert not any(isinstance(module, SideLinear) for module in model.modules())

    @pytest.mark.parametrize(
        "change,message",
        [
            (lambda layer: layer.update(side={"rank": 2}), "side=.* describes no branch of 64 features"),
            (lambda layer: layer["side"].update(rank=3), "describes no branch of 64 features"),
            (lambda layer: layer["side"].update(group=0), "describes no branch of 64 features"),
            (lambda layer: layer["side"].update(rank=40, group=1), "describes no branch of 64 features"),
            (lambda layer: layer.update(format="block"), "NAME: block holds no side branch"),
        ],
    )
    def test_a_damaged_description_is_named(self, change, message, tmp_path):
        model = sk.pack_(with_branches(tiny()))
        model.save_pretrained(tmp_path / "m")
        config = json.loads((tmp_path / "m/config.json").read_text())
        name = next(iter(config["quantization_config"]["layers"]))
        change(config["quantization_config"]["layers"][name])
        (tmp_path / "m/config.json").write_text(json.dumps(config))
        with pytest.raises(CheckpointError, match=message.replace("NAME", name)):
            sk.load(tmp_path / "m")

    @pytest.mark.parametrize("part", ["side_X_scale", "side_scale"])
    def test_a_missing_or_damaged_part_is_named(self, part, tmp_path):
        model = sk.pack_(with_branches(tiny(), rank=3), "semi24_int8")
        for damage in ("gone", "nan"):
            model.save_pretrained(tmp_path / "m")
            state = load_file(tmp_path / "m/model.safetensors")
            key = next(key for key in state if key.endswith(part))
            if damage == "gone":
                del state[key]
            else:
                state[key].fill_(float("nan"))
            save_file(state, tmp_path / "m/model.safetensors", metadata={"format": "pt"})
            wanted = f"{key} is missing" if damage == "gone" else f"{key.rpartition('.')[0]}: {part} holds NaN"
            with pytest.raises(CheckpointError, match=wanted):
                sk.load(tmp_path / "m")


class TestTheDisk:
    def test_full(self, packed, monkeypatch):
        model, folder = packed
        before = contents(folder.parent)
        usage = shutil.disk_usage(folder)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
        for target in (folder, folder.parent / "new"):
            with pytest.raises(OSError, match="needs .* GB and 0.00 GB are free"):
                sk.save(model, target)
        assert contents(folder.parent) == before and not (folder.parent / "new").exists()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, OSError, MemoryError])
    @pytest.mark.parametrize("packed_form", [True, False])
    @pytest.mark.parametrize("where", ["write_card", "_write_manifest", "_write_pretrained", "rename"])
    def test_a_failed_save_leaves_what_was_there(self, where, packed_form, error, packed, monkeypatch):
        from sparsekit import checkpoint

        model, folder = packed
        (folder / "notes.txt").write_text("mine")
        before = contents(folder.parent)
        real_rename = os.rename

        def fails(*args):
            if where == "_write_pretrained":
                (args[1] / "model.safetensors").write_bytes(b"half")
            raise error("planted")

        def rename_fails(source, target):
            if Path(target) == folder and ".old" not in str(source):
                raise error("planted")
            real_rename(source, target)

        if where == "rename":
            monkeypatch.setattr(os, "rename", rename_fails)
        else:
            monkeypatch.setattr(checkpoint, where, fails)
        with pytest.raises(error, match="planted"):
            sk.save(model, folder, packed=packed_form)
        monkeypatch.undo()
        assert contents(folder.parent) == before
        assert [path.name for path in folder.parent.iterdir()] == [folder.name], "a temporary folder is left"
        assert torch.equal(logits(sk.load(folder)), logits(model))
        assert model.config.quantization_config is not None and model.hf_quantizer is not None

    def test_foreign_files_stay_and_stale_weights_go(self, tmp_path):
        folder = tmp_path / "m"
        (folder / "sub").mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
        (folder / "sub/data.bin").write_bytes(b"mine")
        model = sk.pack_(tiny())
        sk.save(model, folder, max_shard_size="20KB")
        assert (folder / "model.safetensors.index.json").is_file()
        sk.save(model, folder)
        assert (folder / "notes.txt").read_text() == "mine" and (folder / "sub/data.bin").read_bytes() == b"mine"
        assert [path.name for path in folder.glob("*.safetensors*")] == ["model.safetensors"]
        assert torch.equal(logits(sk.load(folder)), logits(model))

    def test_a_file_in_the_way(self, tmp_path):
        (tmp_path / "m").write_text("mine")
        with pytest.raises(NotADirectoryError, match="pass a folder"):
            sk.save(sk.pack_(tiny()), tmp_path / "m")
        assert (tmp_path / "m").read_text() == "mine"


LOAD = """
import sys, torch
{imports}
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
with torch.no_grad():
    print(float(model(input_ids=torch.arange(12).view(2, 6)).logits.double().sum()))
"""


class TestInAnotherProcess:
    @pytest.mark.parametrize(
        "imports",
        [
            "import sparsekit; from transformers import AutoModelForCausalLM",
            "from transformers import AutoModelForCausalLM; import sparsekit",
        ],
        ids=["sparsekit_first", "transformers_first"],
    )
    def test_from_pretrained(self, imports, packed):
        done = python(LOAD.format(imports=imports), packed[1])
        assert done.returncode == 0, done.stderr
        assert float(done.stdout) == float(logits(packed[0]).double().sum())

    def test_without_sparsekit_the_packed_form_fails(self, packed):
        done = python(LOAD.format(imports="from transformers import AutoModelForCausalLM"), packed[1])
        assert done.returncode != 0 and "sparsekit" in done.stderr, done.stderr

    def test_without_sparsekit_the_dense_form_opens(self, packed, tmp_path):
        model, _ = packed
        sk.save(model, tmp_path / "dense", packed=False)
        code = LOAD.format(imports="from transformers import AutoModelForCausalLM")
        done = python(code + "\nassert 'sparsekit' not in sys.modules", tmp_path / "dense")
        assert done.returncode == 0, done.stderr
        expected = logits(sk.unpack_(copy.deepcopy(model)))
        assert float(done.stdout) == float(expected.double().sum())
