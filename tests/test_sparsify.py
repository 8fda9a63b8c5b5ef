"""The drop-in, from a dense model to a packed one; and that nothing is left of a call that fails."""

import copy
import importlib
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sparsekit as sk
from sparsekit import NonFiniteError, SparsekitError, SparseLinear, Unsupported
from sparsekit.nn import sparse_layers

sparsify_module = importlib.import_module("sparsekit.sparsify")
prune_module = importlib.import_module("sparsekit.prune")
IDS = [torch.randint(0, 64, (1, 32), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]


def tiny(family="llama", dtype=torch.float32):
    import transformers as tf

    torch.manual_seed(0)
    small = dict(vocab_size=64, max_position_embeddings=64)
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
    return model.eval().to(dtype)


class Letters:
    """A -> 0, B -> 1, ...; the end of text is 63."""

    eos_token_id = 63

    def __call__(self, texts, **kwargs):
        return {"input_ids": [[ord(letter) - 65 for letter in text] for text in texts]}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8))


def quiet(model, *args, **kwargs):
    """sparsify without the warning on missing data, where that is not the point."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sk.sparsify(model, *args, progress=False, **kwargs)


def state_of(model):
    return {
        "state": {key: tensor.clone() for key, tensor in model.state_dict().items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "hooks": sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules()),
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "config": model.config.to_dict() if hasattr(model, "config") else None,
        "quantizer": getattr(model, "hf_quantizer", None),
    }


def raw(tensor):
    return tensor.contiguous().view(torch.uint8) if tensor.dim() else tensor


def assert_same_state(model, before):
    after = state_of(model)
    for key in ("classes", "training", "hooks", "requires_grad", "config", "quantizer"):
        assert after[key] == before[key], key
    assert after["state"].keys() == before["state"].keys()
    for key, tensor in before["state"].items():
        assert torch.equal(raw(after["state"][key]), raw(tensor)), f"{key} changed"


class TestTheWholePath:
    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", None])
    @pytest.mark.parametrize("family,num_layers", [("llama", 14), ("gpt2", 8), ("opt", 12), ("bert", 12)])
    def test_the_same_object_all_layers_packed(self, family, num_layers, method):
        model = tiny(family)
        untouched = {
            key: tensor.clone()
            for key, tensor in model.state_dict().items()
            if any(part in key for part in ("embed", "wte", "wpe", "lm_head", "norm", "ln_"))
        }
        data = {} if method == "magnitude" else {"dataset": IDS}
        assert quiet(model, method=method, **data) is model
        layers = sparse_layers(model)
        assert len(layers) == num_layers
        assert not any(part in name for name in layers for part in ("lm_head", "embed", "wte"))
        state = model.state_dict()
        assert untouched and all(torch.equal(state[key], tensor) for key, tensor in untouched.items())
        for layer in layers.values():
            groups = layer.to_dense().view(layer.out_features, -1, 4)
            assert ((groups != 0).sum(-1) == 2).all()
        assert sk.check(model).ok
        with torch.no_grad():
            assert model(input_ids=IDS[0]).logits.isfinite().all()

    def test_magnitude_keeps_the_largest_two_of_four(self):
        model = mlp()
        dense = copy.deepcopy(model)
        quiet(model)
        for name, layer in sparse_layers(model).items():
            groups = dense.get_submodule(name).weight.view(layer.out_features, -1, 4)
            kept = layer.to_dense().view_as(groups)
            for row, expected in zip(kept.reshape(-1, 4), groups.reshape(-1, 4), strict=True):
                largest = expected.abs().topk(2).indices
                assert torch.equal(row, torch.zeros(4).scatter(0, largest, expected[largest]))

    def test_data_beats_no_data(self):
        """SparseGPT's layer outputs are nearer to the dense ones than magnitude's."""
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64))
        x = torch.randn(256, 64) @ torch.randn(64, 64) / 8
        errors = {}
        for method in ("magnitude", "wanda", "sparsegpt"):
            sparse = quiet(copy.deepcopy(model), method=method, dataset=[x], targets="Linear")
            errors[method] = F.mse_loss(sparse(x), model(x)).item()
        assert errors["sparsegpt"] < errors["wanda"] < errors["magnitude"]

    def test_the_shipped_model(self, wikilm):
        import transformers as tf

        model = tf.AutoModelForCausalLM.from_pretrained(wikilm, dtype=torch.bfloat16)
        tokenizer = tf.AutoTokenizer.from_pretrained(wikilm)
        text = (wikilm.parent / "text/train.txt").read_text()[:60_000].split("\n")
        before = model(**tokenizer("The city of", return_tensors="pt")).logits
        sk.sparsify(
            model, dataset=text, tokenizer=tokenizer, num_calibration_samples=4, max_seq_length=128, progress=False
        )
        assert len(sparse_layers(model)) == 42 and isinstance(model.lm_head, nn.Linear)
        assert not isinstance(model.lm_head, SparseLinear)
        after = model(**tokenizer("The city of", return_tensors="pt")).logits
        assert after.isfinite().all() and not torch.equal(after, before)
        agreement = (before.softmax(-1) * after.log_softmax(-1)).sum(-1).mean().item()
        assert agreement > -7, "cross entropy against the dense model is that of a broken one"
        found = sk.check(model)
        assert found.ok and found.summary["sparsity of the sparse layers"] == pytest.approx(0.5, abs=0.01)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        model = quiet(tiny(dtype=dtype), dataset=IDS)
        assert {layer.spec.dtype for layer in sparse_layers(model).values()} == {dtype}

    def test_targets_and_ignore(self):
        model = quiet(tiny(), targets="re:.*mlp", ignore=["down_proj"])
        assert {name.rpartition(".")[2] for name in sparse_layers(model)} == {"gate_proj", "up_proj"}
        model = quiet(tiny(), targets=lambda module, name: name.endswith("layers.1.mlp.up_proj"))
        assert list(sparse_layers(model)) == ["model.layers.1.mlp.up_proj"]

    def test_named_format_and_backend(self):
        model = quiet(tiny(), format="semi24", backend="reference")
        assert {layer.backend for layer in sparse_layers(model).values()} == {"reference"}

    @pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
    def test_seeds(self, method):
        generator = torch.Generator().manual_seed(0)
        text = ["".join(chr(65 + int(i)) for i in torch.randint(0, 60, (90,), generator=generator)) for _ in range(40)]

        def run(seed):
            model = quiet(
                tiny(), method=method, dataset=text, tokenizer=Letters(), num_calibration_samples=2, seed=seed
            )
            return model.state_dict()

        first, again, other = run(3), run(3), run(4)
        assert all(torch.equal(first[key], again[key]) for key in first)
        assert not all(torch.equal(first[key], other[key]) for key in first), "the seed chooses the samples"

    def test_the_global_generator_is_left_alone(self):
        torch.manual_seed(5)
        expected = torch.rand(3)
        model = tiny()
        torch.manual_seed(5)
        quiet(model, dataset=IDS)
        assert torch.equal(torch.rand(3), expected)

    @pytest.mark.parametrize("training", [True, False])
    def test_the_mode_stays(self, training):
        model = tiny().train(training)
        quiet(model, dataset=IDS)
        assert all(module.training is training for module in model.modules())


class TestWeightsThatObeyAlready:
    def test_are_packed_as_they_are(self):
        model = quiet(tiny())
        sk.unpack_(model)
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert sk.sparsify(model, dataset=IDS, progress=False) is model
        sk.unpack_(model)
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())

    def test_a_named_method_prunes_them_anyway(self):
        model = quiet(tiny())
        sk.unpack_(model)
        before = model.model.layers[1].mlp.up_proj.weight.clone()
        quiet(model, pattern="1:4", method="wanda", dataset=IDS)
        after = model.model.layers[1].mlp.up_proj.to_dense()
        assert (after != 0).sum() * 2 == (before != 0).sum() and torch.equal(after, before.where(after != 0, 0))

    def test_one_four_is_packed_too(self):
        model = quiet(tiny(), "1:4")
        assert len(sparse_layers(model)) == 14
        assert sk.check(model).summary["sparsity of the sparse layers"] == pytest.approx(0.75, abs=1e-3)


class TestWarnings:
    def test_no_dataset(self):
        with pytest.warns(UserWarning, match="no dataset: pruned to 2:4 by magnitude.*Pass dataset="):
            sk.sparsify(tiny(), progress=False)
        with pytest.warns(UserWarning, match="no dataset: pruned to 16x16 by magnitude"):
            sk.sparsify(tiny(), "16x16", progress=False)

    def test_too_few_blocks_removed(self):
        model = nn.Sequential(nn.Linear(128, 128))
        with pytest.warns(UserWarning, match="too few blocks of 32x32 .* take 88% .* above 80% .*Raise sparsity"):
            sk.sparsify(model, "32x32", sparsity=0.125, method="magnitude", progress=False)
        assert not sparse_layers(model)

    def test_none_with_a_dataset_or_a_named_method(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sk.sparsify(tiny(), dataset=IDS, num_calibration_samples=len(IDS), progress=False)
            sk.sparsify(tiny(), method="magnitude", progress=False)

    @pytest.mark.parametrize("pattern", ["unstructured", "4:8", "8x8"])
    def test_patterns_without_a_packed_format_stay_dense(self, pattern):
        model = tiny()
        with pytest.warns(UserWarning, match=f"no packed format runs {pattern} weights faster"):
            assert sk.sparsify(model, pattern, method="magnitude", progress=False) is model
        assert not sparse_layers(model) and not hasattr(model, "hf_quantizer")
        weight = model.model.layers[0].mlp.up_proj.weight
        assert (weight == 0).float().mean().item() == pytest.approx(0.5, abs=0.01)


QUANTISED = ["semi24_int8", "semi24_int4", "semi24_fp8"]


def holds_exactly(packed, pruned):
    """Whether each packed layer is, bit for bit, the dense weight beside it."""
    layers = sparse_layers(packed)
    weights = {name: pruned.get_submodule(name).weight for name in layers}
    return len(layers) == 14 and all(torch.equal(layers[name].to_dense(), weights[name]) for name in layers)


class TestQuantisedFormats:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("format", QUANTISED)
    @pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt"])
    def test_packing_changes_nothing_that_the_method_left(self, method, format, dtype):
        pruned = tiny(dtype=dtype)
        config = sk.METHODS.get(method)(format=format)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plan = sk.prune_(pruned, config, dataset=IDS, progress=False)
        assert plan.format == format and plan.scales.keys() == plan.masks.keys()
        model = quiet(tiny(dtype=dtype), method=method, format=format, dataset=IDS)
        assert {layer.format for layer in sparse_layers(model).values()} == {format}
        assert holds_exactly(model, pruned)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert holds_exactly(sk.pack_(pruned, format, scales=plan.scales), sk.unpack_(model))

    def test_the_config_names_the_format(self):
        model = quiet(tiny(), method=sk.SparseGPT(format="semi24_int4"), dataset=IDS)
        assert {layer.format for layer in sparse_layers(model).values()} == {"semi24_int4"}
        again = quiet(tiny(), method=sk.SparseGPT(), format="semi24_int4", dataset=IDS)
        assert holds_exactly(again, sk.unpack_(model))

    def test_a_pruned_model_is_only_rounded(self):
        def pruned():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = tiny()
                sk.prune_(model, "sparsegpt", dataset=IDS, progress=False)
                return model

        before = pruned()
        to_nearest = quiet(pruned(), format="semi24_int4")
        by_sparsegpt = quiet(pruned(), format="semi24_int4", dataset=IDS)
        assert not holds_exactly(to_nearest, sk.unpack_(copy.deepcopy(by_sparsegpt)))
        for model in (to_nearest, by_sparsegpt):
            for name, layer in sparse_layers(model).items():
                assert bool((layer.to_dense()[before.get_submodule(name).weight == 0] == 0).all())

    def test_a_layer_that_no_token_reaches_is_rounded_and_named(self):
        class Branches(nn.Module):
            def __init__(self):
                super().__init__()
                torch.manual_seed(0)
                self.used, self.idle = nn.Linear(16, 8), nn.Linear(16, 8)

            def forward(self, x):
                return self.used(x)

        model = Branches()
        data = [torch.randn(1, 64, 16, generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
        plan = sk.prune_(model, sk.SparseGPT(format="semi24_int8"), dataset=data, progress=False)
        assert "idle: no calibration token reached it: pruned by magnitude" in plan.notes
        assert "idle: its weights were rounded to nearest, without compensation" in plan.notes
        assert plan.scales.keys() == {"used", "idle"}
        weight = model.idle.weight.detach().clone()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            sk.pack_(model, "semi24_int8", scales=plan.scales)
        assert torch.equal(model.idle.to_dense(), weight)

    def test_bits_in_the_report(self):
        report = sk.check(quiet(tiny(), format="semi24_int8", backend="reference"))
        row = next(row for row in report.rows if row["layer"].endswith("down_proj"))
        assert row["bits a weight"] == 5 + 32 / 64  # and a scale of 32 bits for the 64 weights of a row
        assert report.rows[-1]["bits a weight"] == 32


class TestRefusals:
    @pytest.mark.parametrize(
        "arguments,message",
        [
            (dict(pattern="2:4:8"), "unknown pattern '2:4:8'.*known are.*'2:4'"),
            (dict(pattern="unstructurd"), "Did you mean 'unstructured'"),
            (dict(pattern="4:2"), "0 < N < M"),
            (dict(method="sparsegtp"), "unknown method 'sparsegtp'.*Did you mean 'sparsegpt'"),
            (dict(method=7), "method is a int"),
            (dict(method=sk.SparseGPT), "SparseGPT itself"),
            (dict(backend="cpuu"), "unknown backend 'cpuu'.*Did you mean 'cpu'"),
            (dict(format="semi42"), "unknown format 'semi42'.*Did you mean 'semi24'"),
            (dict(format="semi24_int5"), "unknown format 'semi24_int5'.*Did you mean 'semi24_int[48]'"),
            (dict(format="semi24_int4", pattern="4:8"), "format='semi24_int4' does not hold the pattern 4:8"),
            (dict(format="semi24", pattern="unstructured"), "does not hold the pattern unstructured"),
            (dict(format="semi24_int8", method=sk.Magnitude(format="semi24_int4")), "method asks for 'semi24_int4'"),
            (dict(targets="Linaer"), r"targets=\['Linaer'\] matches no layer.*Near 'Linaer': 'Linear'"),
            (dict(targets="re:nothing"), "matches no layer"),
            (dict(targets="re:("), "no regular expression"),
            (dict(ignore=("Linear",)), "leaves nothing"),
            (dict(constraints={"flops": "60%"}), "constraints.*no budget"),
            (dict(sparsity=1.5, pattern="unstructured"), "sparsity=1.5"),
            (dict(sparsity=0.7), "sparsity=0.7"),
            (dict(method="wanda"), "needs calibration data"),
            (dict(pattern="4:8", method=sk.Wanda(pattern="1:4"), dataset=IDS), "give both the same"),
            (dict(dataset=["text"]), "tokenizer"),
            (dict(dataset=[]), "empty"),
            (dict(dataset=IDS, num_calibration_samples=0), "num_calibration_samples=0"),
        ],
    )
    def test_says_what_to_do_and_changes_nothing(self, arguments, message):
        model = tiny()
        before = state_of(model)
        with pytest.raises(ValueError, match=message):
            quiet(model, **arguments)
        assert_same_state(model, before)

    def test_a_backend_that_cannot_run(self):
        model = tiny()
        before = state_of(model)
        with pytest.raises(Unsupported, match="cusparselt"):
            quiet(model, backend="cusparselt")
        assert_same_state(model, before)

    def test_a_model_that_is_packed_already(self):
        model = quiet(tiny())
        before = state_of(model)
        with pytest.raises(ValueError, match="packed already.*unpack_"):
            quiet(model)
        assert_same_state(model, before)

    def test_nan(self):
        model = tiny()
        model.model.layers[1].mlp.up_proj.weight.data[3, 5] = torch.nan
        before = state_of(model)
        with pytest.raises(NonFiniteError, match="model.layers.1.mlp.up_proj"):
            quiet(model, dataset=IDS)
        assert_same_state(model, before)


PHASES = {
    "prune": (prune_module, "set_weight_NK_", 5),
    "apply": (sparsify_module, "apply_", 1),
    "packing": (SparseLinear, "from_linear", 6),
    "packed": (sparsify_module, "check", 1),
}


class TestAllOrNothing:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
    @pytest.mark.parametrize("phase", PHASES)
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    @pytest.mark.parametrize("method", ["magnitude", "sparsegpt"])
    def test_any_phase_may_fail(self, monkeypatch, method, family, phase, error):
        model = tiny(family, torch.bfloat16).train()
        list(model.parameters())[3].requires_grad_(False)
        for parameter in model.parameters():
            parameter.data.view(-1)[::7] = -0.0  # bit for bit, the sign of zero too
        before = state_of(model)
        owner, name, nth = PHASES[phase]
        real, calls = getattr(owner, name), 0

        def fails(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                monkeypatch.undo()
                raise error("planted")
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, fails)
        with pytest.raises(error, match="planted"):
            quiet(model, method=method, dataset=IDS)
        assert calls == nth
        assert_same_state(model, before)
        quiet(model, method=method, dataset=IDS)  # and it works afterwards
        assert sparse_layers(model)

    @pytest.mark.parametrize("phase", ["packing", "packed"])
    def test_weights_that_obeyed_already(self, monkeypatch, phase):
        model = sk.unpack_(quiet(tiny()))
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear) and name != "lm_head":
                module.weight.data[module.weight.data == 0] = -0.0
        before = state_of(model)
        owner, name, nth = PHASES[phase]
        real, calls = getattr(owner, name), 0

        def fails(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls == nth:
                monkeypatch.undo()
                raise KeyboardInterrupt
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, fails)
        with pytest.raises(KeyboardInterrupt):
            sk.sparsify(model, progress=False)
        assert_same_state(model, before)

    def test_a_result_that_does_not_hold_is_refused(self, monkeypatch):
        model = tiny()
        before = state_of(model)
        monkeypatch.setattr(sparsify_module, "check", lambda model, plan: sk.Report("planted", ok=False))
        with pytest.raises(SparsekitError, match="does not hold what was asked for"):
            quiet(model)
        assert_same_state(model, before)

    def test_warnings_as_errors(self):
        model = tiny()
        before = state_of(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(UserWarning, match="no dataset"):
                sk.sparsify(model, progress=False)
            with pytest.raises(UserWarning, match="no packed format"):
                sk.sparsify(model, "unstructured", method="magnitude", progress=False)
        assert_same_state(model, before)


def test_ignored_layers_are_neither_packed_nor_complained_of():
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(32, 32), "b": nn.Linear(32, 32), "c": nn.Linear(32, 32)})
    with torch.no_grad():
        model["b"].weight.mul_(torch.rand(32, 32) < 0.08)
        model["c"].weight.mul_(sk.NM(2, 4).project(model["c"].weight.abs()))
    sk.sparsify(model, "2:4", method="magnitude", ignore=("b", "c"), progress=False)
    assert [type(layer) is sk.SparseLinear for layer in model.values()] == [True, False, False]


def test_the_warning_names_the_pattern_of_the_config():
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.warns(UserWarning, match="no packed format runs 4:8 weights faster"):
        sk.sparsify(model, method=sk.Magnitude(pattern="4:8"), progress=False)


def test_an_interrupted_apply_leaves_the_model_as_it_was(monkeypatch):
    import sparsekit.surgery as surgery

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    plan = sk.prune_(copy.deepcopy(model), "magnitude", progress=False)
    before, real, calls = copy.deepcopy(model), surgery.weight_NK, []

    def interrupting(layer):
        calls.append(layer)
        if len(calls) == 5:  # three to check the shapes, then the second layer to zero
            raise KeyboardInterrupt
        return real(layer)

    monkeypatch.setattr(surgery, "weight_NK", interrupting)
    with pytest.raises(KeyboardInterrupt):
        sk.apply_(model, plan)
    assert all(torch.equal(now, then) for now, then in zip(model.parameters(), before.parameters(), strict=True))


def test_a_backend_that_cannot_run_here_is_refused_before_pruning(monkeypatch):
    monkeypatch.setattr(sparsify_module, "prune_", lambda *_, **__: pytest.fail("pruning must not begin"))
    with pytest.raises(Unsupported, match="backend 'triton' cannot run semi24 16x16"):
        sk.sparsify(nn.Sequential(nn.Linear(16, 16)), method="magnitude", backend="triton", progress=False)


def test_a_name_is_no_model():
    with pytest.raises(ValueError, match="model='llama' is a str: pass the loaded model"):
        sk.sparsify("llama", "2:4")
