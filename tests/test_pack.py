"""`pack_` and `unpack_`: what is packed, what is left alone, and that a failure leaves nothing behind."""

import copy
import functools
import pickle
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sparsekit as sk
from sparsekit import NonFiniteError, PatternError, SparseLinear, Unsupported
from sparsekit import pack as pack_module
from sparsekit.backends import BACKENDS, Backend, Runner
from sparsekit.backends.reference import ReferenceRunner
from sparsekit.nn import install_side_, sparse_layers
from sparsekit.plan import SideBranch


def prune24_(model):
    """Zero the two smallest of four, in every `nn.Linear` and `Conv1D` but the head."""
    for name, module in model.named_modules():
        is_conv1d = type(module).__name__ == "Conv1D"
        if name.endswith("lm_head") or not (is_conv1d or isinstance(module, nn.Linear)):
            continue
        w = module.weight.data.T if is_conv1d else module.weight.data
        groups = F.pad(w.abs(), (0, -w.shape[1] % 4), value=-1.0).view(w.shape[0], -1, 4)
        keep = (groups.argsort(-1).argsort(-1) >= 2).view(w.shape[0], -1)[:, : w.shape[1]]
        w.masked_fill_(~keep, 0)
    return model


class Block(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.up, self.down = nn.Linear(width, 64), nn.Linear(64, width, bias=False)

    def forward(self, x):
        return x + self.down(F.relu(self.up(x)))


def mlp(num_blocks=3):
    torch.manual_seed(0)
    return prune24_(nn.Sequential(*(Block() for _ in range(num_blocks))))


def tiny(family):
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
    return prune24_(model.eval())


def state_of(model):
    """Everything that a failure may not change: the state, classes, flags, and what transformers attached."""
    config = model.config.to_dict() if hasattr(model, "config") else None
    return {
        "state": {key: (tensor.clone(), tensor.dtype) for key, tensor in model.state_dict().items()},
        "classes": {name: type(module) for name, module in model.named_modules()},
        "training": {name: module.training for name, module in model.named_modules()},
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "config": config,
        "quantizer": getattr(model, "hf_quantizer", None),
    }


def assert_same_state(model, before):
    after = state_of(model)
    for key in ("classes", "training", "requires_grad", "config", "quantizer"):
        assert after[key] == before[key], key
    assert after["state"].keys() == before["state"].keys()
    for key, (tensor, dtype) in before["state"].items():
        assert after["state"][key][1] == dtype and torch.equal(after["state"][key][0], tensor), key


def inputs_for(model):
    return torch.arange(12).view(2, 6) % 64


class TestModels:
    @pytest.mark.parametrize("family,num_layers", [("llama", 14), ("gpt2", 8), ("opt", 12), ("bert", 13)])
    def test_logits_generation_and_the_way_back(self, family, num_layers):
        model = tiny(family)
        before = state_of(model)
        ids = inputs_for(model)
        with torch.no_grad():
            masked = model(input_ids=ids).logits
        assert sk.pack_(model) is model
        layers = sparse_layers(model)
        assert len(layers) == num_layers, sorted(layers)
        assert "lm_head" not in layers and not any("embed" in name or "wte" in name for name in layers)
        with torch.no_grad():
            torch.testing.assert_close(model(input_ids=ids).logits, masked, rtol=1e-4, atol=1e-5)
        assert sk.unpack_(model) is model
        assert_same_state(model, before)
        with torch.no_grad():
            assert torch.equal(model(input_ids=ids).logits, masked)

    @pytest.mark.parametrize("family", ["llama", "gpt2", "opt"])
    def test_generate(self, family):
        model = tiny(family)
        arguments = dict(max_new_tokens=12, do_sample=False, pad_token_id=0, eos_token_id=None)
        expected = model.generate(inputs_for(model), **arguments)
        assert torch.equal(sk.pack_(model).generate(inputs_for(model), **arguments), expected)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_half_precision(self, dtype):
        model = tiny("llama").to(dtype)
        dense = copy.deepcopy(model)
        sk.pack_(model)
        for name, layer in sparse_layers(model).items():
            assert layer.spec.dtype == dtype and torch.equal(layer.to_dense(), dense.get_submodule(name).weight)
        with torch.no_grad():
            assert model(input_ids=inputs_for(model)).logits.isfinite().all()

    def test_deepcopy_and_to(self):
        model = sk.pack_(tiny("llama"))
        twin = copy.deepcopy(model).bfloat16()
        assert all(layer.spec.dtype == torch.bfloat16 for layer in sparse_layers(twin).values())
        assert all(layer.spec.dtype == torch.float32 for layer in sparse_layers(model).values())
        with torch.no_grad():
            assert twin(input_ids=inputs_for(twin)).logits.dtype == torch.bfloat16

    def test_compiles_whole(self):
        torch._dynamo.reset()
        model = sk.pack_(mlp())
        x = torch.randn(5, 32)
        with torch.no_grad():
            out = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
            torch.testing.assert_close(out, model(x))


class TestChoice:
    def test_sparse_weights_that_fit_no_format_are_named(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
        with torch.no_grad():
            model[0].weight.mul_(sk.NM(2, 4).project(model[0].weight.abs()))
            model[1].weight.mul_(torch.rand(64, 64) < 0.5)
        with pytest.raises(PatternError, match=r"^1: \d+ of 1,024 groups break semi24"):
            sk.pack_(model, format="semi24")
        assert type(model[0]) is nn.Linear
        with pytest.warns(UserWarning, match=r"1 layers hold many zeros but stay dense.* 1: \d+ of 1,024 groups"):
            sk.pack_(model)
        assert type(model[0]) is sk.SparseLinear and type(model[1]) is nn.Linear

    def test_twice_is_once(self):
        model = sk.pack_(mlp())
        layers = sparse_layers(model)
        assert sk.pack_(model) is model and sparse_layers(model) == layers

    def test_a_layer_that_is_dense_stays_so(self):
        model = mlp()
        model[1].up.weight.data.normal_()
        sk.pack_(model)
        assert sorted(sparse_layers(model)) == ["0.down", "0.up", "1.down", "2.down", "2.up"]

    def test_sparser_than_needed(self):
        model = mlp()
        model[0].up.weight.data[:, ::4] = 0
        dense = model[0].up.weight.clone()
        assert torch.equal(sk.pack_(model)[0].up.to_dense(), dense)

    def test_nothing_to_pack(self):
        with pytest.raises(ValueError, match="no nn.Linear layer to pack"):
            sk.pack_(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))
        with pytest.raises(PatternError, match=r"no layer fits.*0: \d+ of 64 groups break semi24"):
            sk.pack_(nn.Sequential(nn.Linear(32, 8)))
        with pytest.raises(ValueError, match="SparseLinear.from_linear"):
            sk.pack_(nn.Linear(8, 8))

    def test_unknown_names_give_the_nearest(self):
        with pytest.raises(ValueError, match="unknown format 'semi42'.*Did you mean 'semi24'"):
            sk.pack_(mlp(), format="semi42")
        with pytest.raises(ValueError, match="unknown backend 'refrence'.*Did you mean 'reference'"):
            sk.pack_(mlp(), backend="refrence")

    def test_float64(self):
        model = mlp().double()
        before = state_of(model)
        with pytest.raises(PatternError, match="no format holds torch.float64: convert it"):
            sk.pack_(model)
        assert_same_state(model, before)
        mixed = mlp()
        mixed[1].double()
        sk.pack_(mixed)
        assert sorted(sparse_layers(mixed)) == ["0.down", "0.up", "2.down", "2.up"]

    def test_a_named_backend(self):
        model = sk.pack_(mlp(), backend="reference")
        assert {layer.backend for layer in sparse_layers(model).values()} == {"reference"}
        before = state_of(fresh := mlp())
        with pytest.raises(Unsupported, match="0.up: backend 'cusparselt' cannot run"):
            sk.pack_(fresh, backend="cusparselt")
        assert_same_state(fresh, before)

    def test_tied_weights_are_left_alone(self):
        model = nn.ModuleDict(
            {"embed": nn.Embedding(16, 32), "head": nn.Linear(32, 16, bias=False), "up": nn.Linear(32, 8)}
        )
        prune24_(model)
        model["head"].weight = model["embed"].weight
        model["embed"].weight.data.view(16, -1, 4)[..., :2] = 0
        sk.pack_(model)
        assert list(sparse_layers(model)) == ["up"] and model["head"].weight is model["embed"].weight

    def test_a_layer_that_stands_in_two_places_is_left_alone(self):
        """Packed in one of them only, it would be two layers from then on."""
        model = mlp(2)
        model[1].up = model[0].up
        x = torch.randn(3, 32)
        before = model(x)
        sk.pack_(model)
        assert sorted(sparse_layers(model)) == ["0.down", "1.down"] and model[1].up is model[0].up
        torch.testing.assert_close(model(x), before)

    def test_a_block_that_stands_in_two_places_is_packed(self):
        block = Block()
        model = prune24_(nn.Sequential(block, block))
        sk.pack_(model)
        assert isinstance(model[0].up, SparseLinear) and model[1] is model[0]

    def test_attention_reads_its_weight_itself(self):
        torch.manual_seed(0)
        layer = prune24_(nn.TransformerEncoderLayer(32, 4, 64, batch_first=True)).eval()
        x = torch.randn(2, 5, 32)
        expected = layer(x)
        sk.pack_(layer)
        assert sorted(sparse_layers(layer)) == ["linear1", "linear2"]
        assert isinstance(layer.self_attn.out_proj, nn.Linear) and not isinstance(
            layer.self_attn.out_proj, SparseLinear
        )
        with torch.no_grad():
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)

    def test_subclasses_with_a_forward_of_their_own_and_parametrizations(self):
        class Scaled(nn.Linear):
            def forward(self, x):
                return 2 * super().forward(x)

        model = mlp()
        model[0].up = prune24_(nn.Sequential(Scaled(32, 64)))[0]
        nn.utils.parametrizations.weight_norm(model[1].up)
        sk.pack_(model)
        assert sorted(sparse_layers(model)) == ["0.down", "1.down", "2.down", "2.up"]

    def test_meta_and_empty_weights(self):
        model = mlp()
        model[0].up.to("meta")
        model[1].up.weight.data.zero_()
        sk.pack_(model)
        assert sorted(sparse_layers(model)) == ["0.down", "1.down", "2.down", "2.up"]


class TestDamage:
    def test_is_named_with_the_number_of_groups(self):
        model = mlp()
        model[1].down.weight.data[3, :8] = 1.0
        before = state_of(model)
        with pytest.raises(PatternError, match=r"1\.down: 2 of 512 groups.*after pruning.*apply_"):
            sk.pack_(model)
        assert_same_state(model, before)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    def test_nan_is_named(self, bad):
        model = mlp()
        model[2].up.weight.data[0, model[2].up.weight[0].nonzero()[0]] = bad
        before = state_of(copy.deepcopy(model))["classes"]
        with pytest.raises(NonFiniteError, match="2.up: the weight holds NaN or infinity"):
            sk.pack_(model)
        assert {name: type(module) for name, module in model.named_modules()} == before


class TestRollback:
    @pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, MemoryError])
    @pytest.mark.parametrize("where", ["from_linear", "replace_layer_", "describe_packed_"])
    @pytest.mark.parametrize("family", ["llama", "gpt2"])
    def test_the_model_is_as_before(self, monkeypatch, family, where, error):
        model = tiny(family)
        list(model.parameters())[2].requires_grad_(False)
        before = state_of(model)
        calls = 0
        owner = SparseLinear if where == "from_linear" else pack_module
        real = getattr(owner, where)

        def fails_at_the_fourth(*args):
            nonlocal calls
            calls += 1
            if calls == (1 if where == "describe_packed_" else 4):
                raise error("planted")
            return real(*args)

        monkeypatch.setattr(owner, where, fails_at_the_fourth)
        with pytest.raises(error, match="planted"):
            sk.pack_(model)
        monkeypatch.undo()
        assert_same_state(model, before)
        sk.pack_(model)  # and it can be packed afterwards
        assert sparse_layers(model)

    @pytest.mark.parametrize("format", ["semi24", "semi24_int4"])
    def test_branches_are_the_very_same_parameters_where_somebody_holds_them(self, monkeypatch, format):
        model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)))
        prune24_(model)
        for name in "0123":
            install_side_(model, name, SideBranch(torch.randn(32, 2)))
        before, held = state_of(model), dict(model.named_parameters())
        monkeypatch.setattr(pack_module, "describe_packed_", lambda model: 1 / 0 if sparse_layers(model) else None)
        with pytest.raises(ZeroDivisionError):
            sk.pack_(model, format)
        assert_same_state(model, before)
        assert all(parameter is held[name] for name, parameter in model.named_parameters())

    def test_what_was_packed_before_stays_packed(self, monkeypatch):
        model = tiny("llama")
        model.model.layers[1].mlp.up_proj.weight.data.normal_()
        sk.pack_(model)
        prune24_(nn.Sequential(model.model.layers[1].mlp.up_proj))
        before = state_of(model)
        described = model.config.quantization_config.to_dict()
        assert len(sparse_layers(model)) == 13 == len(described["layers"])

        def fails(*args):
            monkeypatch.undo()  # the way back describes what is left
            raise KeyboardInterrupt

        monkeypatch.setattr(pack_module, "describe_packed_", fails)
        with pytest.raises(KeyboardInterrupt):
            sk.pack_(model)
        after = state_of(model)
        assert after["classes"] == before["classes"] and len(sparse_layers(model)) == 13
        assert model.config.quantization_config.to_dict() == described


class TestKept:
    def test_hooks(self):
        model = mlp()
        seen = []
        handles = [
            model[0].up.register_forward_hook(lambda *_: seen.append("after")),
            model[0].up.register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True),
            model[0].up.register_full_backward_hook(lambda *_: seen.append("backward")),
        ]
        for change in (sk.pack_, sk.unpack_):
            change(model)
            seen.clear()
            model(torch.randn(2, 32, requires_grad=True)).sum().backward()
            assert seen == ["before", "after", "backward"], change.__name__
        sk.pack_(model)
        for handle in handles:
            handle.remove()
        seen.clear()
        model(torch.randn(2, 32, requires_grad=True)).sum().backward()
        assert seen == []

    def test_bias_mode_and_requires_grad(self):
        model = mlp().eval()
        model[0].up.weight.requires_grad_(False)
        bias = model[0].up.bias
        sk.pack_(model)
        assert model[0].up.bias is bias and not model[0].up.training and model[0].down.bias is None
        sk.unpack_(model)
        assert model[0].up.bias is bias and not model[0].up.training
        assert not model[0].up.weight.requires_grad and model[0].down.weight.requires_grad

    def test_the_bias_still_trains(self):
        model = sk.pack_(mlp())
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
        x, y = torch.randn(16, 32), torch.randn(16, 32)
        bytes_before = {name: layer.packed().tensors["values"].clone() for name, layer in sparse_layers(model).items()}
        losses = []
        for _ in range(5):
            loss = F.mse_loss(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]
        for name, layer in sparse_layers(model).items():
            assert torch.equal(layer.packed().tensors["values"], bytes_before[name])

    def test_a_bias_of_conv1d_that_is_frozen(self):
        model = tiny("gpt2")
        model.requires_grad_(False)
        before = state_of(model)
        assert_same_state(sk.unpack_(sk.pack_(model)), before)


def test_unpack_does_nothing_to_a_dense_model():
    model = tiny("llama")
    before = state_of(model)
    assert sk.unpack_(model) is model
    assert_same_state(model, before)


def test_memory_falls():
    model = prune24_(nn.Sequential(nn.Linear(512, 512, bias=False))).bfloat16()
    sk.pack_(model)
    assert sum(buffer.nbytes for buffer in model.buffers()) <= 0.65 * 512 * 512 * 2
    assert not list(model.parameters())


def test_progress_is_shown_on_demand(capsys):
    sk.pack_(mlp(), progress=True)
    assert "packing" in capsys.readouterr().err
    sk.pack_(mlp())
    assert capsys.readouterr().err == ""


class TestPuttingBack:
    def interrupted(self, model, monkeypatch, at=1):
        real, calls = pack_module.replace_layer_, []

        def replace(*arguments):
            calls.append(arguments)
            if len(calls) == at + 1:
                raise KeyboardInterrupt
            real(*arguments)

        monkeypatch.setattr(pack_module, "replace_layer_", replace)

    def sparse_model(self):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16, bias=False), nn.Linear(16, 8))
        with torch.no_grad():
            for layer in model:
                layer.weight.mul_(sk.NM(2, 4).project(layer.weight.abs()))
        return model

    def test_the_very_modules_and_parameters_that_somebody_holds_come_back(self, monkeypatch):
        model = self.sparse_model()
        held, parameter = model[0], model[1].weight  # an optimizer holds parameters, not modules
        before = [layer.weight.detach().clone() for layer in model]
        self.interrupted(model, monkeypatch, at=2)
        with pytest.raises(KeyboardInterrupt):
            sk.pack_(model)
        assert model[0] is held and model[1].weight is parameter
        assert all(torch.equal(layer.weight, old) for layer, old in zip(model, before, strict=True))

    def test_the_dense_layer_that_somebody_holds_keeps_its_weight(self):
        model = self.sparse_model()
        held = model[0]
        x = torch.randn(3, 16)
        sk.pack_(model)
        torch.testing.assert_close(model[0](x), held(x))

    def test_an_interrupted_unpack_leaves_all_packed(self, monkeypatch):
        model = sk.pack_(self.sparse_model())
        layers = list(model)
        self.interrupted(model, monkeypatch)
        with pytest.raises(KeyboardInterrupt):
            sk.unpack_(model)
        assert all(now is then for now, then in zip(model, layers, strict=True))

    def test_only_the_layers_asked_for(self):
        model = sk.pack_(self.sparse_model(), layers=["1"])
        assert [type(layer) is SparseLinear for layer in model] == [False, True, False]


def test_very_sparse_weights_are_not_called_damaged():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64))
    with torch.no_grad():
        model[0].weight.mul_(torch.rand(64, 64) < 0.1)  # 2:4 holds in most groups by chance
    with pytest.raises(PatternError, match="no layer fits"):
        sk.pack_(model)


def test_a_backend_that_is_slower_than_dense_is_spoken_of():
    model = nn.Sequential(nn.Linear(16, 16)).half()
    with torch.no_grad():
        model[0].weight.mul_(sk.NM(2, 4).project(model[0].weight.abs()))
    with pytest.warns(UserWarning, match="1 packed layers run on 'reference', .* slower than dense, as 0: .*float16"):
        sk.pack_(model)
    sk.unpack_(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sk.pack_(model, backend="reference")  # asked for by name


def test_a_compiled_model_is_packed_inside():
    inner = nn.Sequential(nn.Linear(16, 16))
    with torch.no_grad():
        inner[0].weight.mul_(sk.NM(2, 4).project(inner[0].weight.abs()))
    compiled = torch.compile(inner)
    assert sk.pack_(compiled) is compiled and type(inner[0]) is SparseLinear
    assert sk.check(compiled).ok and sk.check(compiled).rows[0]["layer"] == "0"
    sk.unpack_(compiled)
    assert type(inner[0]) is nn.Linear


class WithSecondCopy(Runner):
    """The reference, with a path for prefill: a second copy of the values, which does nothing."""

    format = "semi24"
    prefills = ("dense", "cusparselt")

    def __init__(self):
        self.inner = ReferenceRunner("semi24")
        self.asked, self.is_measured, self.faster_dense = [], True, ()

    def why_not(self, spec, device):
        return None

    def prepare(self, packed, prefill="dense"):
        self.asked.append(prefill)
        first = self.inner.prepare(packed)
        return first if prefill == "dense" else (*first, first[0].clone())

    def second_copy_bytes(self, prepared):
        return sum(part.nbytes for part in prepared[2:])

    def restore(self, spec, prepared):
        return self.inner.restore(spec, prepared[:2])

    def linear(self, x, prepared, bias, N, K):
        return self.inner.linear(x, prepared[:2], bias, N, K)

    def dense(self, prepared, N, K, dtype):
        return self.inner.dense(prepared[:2], N, K, dtype)

    def kernel(self, spec, num_tokens, device=None, prepared=()):
        return "a test"

    def unmeasured(self, spec, device):
        return "" if self.is_measured else "measure it"

    def stays_dense(self, spec, device, prefill="dense"):
        if spec.out_features not in self.faster_dense:
            return ""
        return f"on a test dense is faster with prefill={prefill}"


@functools.cache
def backend_with_second_copy():
    runner = WithSecondCopy()
    return runner, Backend("with_second_copy", [runner])  # once: operators cannot be defined twice


@pytest.fixture
def second():
    """A backend that has all prefills."""
    runner, backend = backend_with_second_copy()
    runner.asked.clear()
    runner.is_measured, runner.faster_dense = True, ()
    BACKENDS.register(backend.name, backend)
    yield runner
    del BACKENDS._parts[backend.name]


class TestStayingDense:
    @pytest.fixture(autouse=True)
    def first_asked(self, second, monkeypatch):
        """The only backend that `auto` asks."""
        monkeypatch.setattr(BACKENDS, "_parts", {"with_second_copy": BACKENDS.get("with_second_copy")})

    def test_where_it_was_measured_to_be_faster(self, second):
        second.faster_dense = (64,)
        model, dense = mlp(2), mlp(2)
        with pytest.warns(UserWarning, match="2 sparse layers stay dense, .* 0.up: on a test dense .*Name the format"):
            assert sk.pack_(model) is model
        assert set(sparse_layers(model)) == {"0.down", "1.down"} and type(model[0].up) is nn.Linear
        x = torch.randn(3, 32)
        torch.testing.assert_close(model(x), dense(x))
        (row,) = (row for row in sk.explain(model).rows if row["first layer"] == "0.up")
        assert row["backend"] == "torch" and row["M=1"] == "dense" and row["layers"] == 2
        assert row["why not the others"] == "it is 2:4 and stays dense: on a test dense is faster with prefill=dense"
        with torch.no_grad():
            model[0].up.weight.fill_(1)  # never 2:4: nothing was chosen
        assert sk.explain(model).rows[0]["why not the others"] == "the layer is not packed"

    def test_all_of_them(self, second):
        second.faster_dense = (64, 32)
        model = mlp(1)
        with pytest.warns(UserWarning, match="2 sparse layers stay dense.*prefill=auto"):
            assert sk.pack_(model, prefill="auto") is model
        assert not sparse_layers(model)

    @pytest.mark.parametrize("asked", [{"format": "semi24"}, {"backend": "with_second_copy"}])
    def test_unless_told_otherwise(self, second, asked):
        second.faster_dense = (64, 32)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(sparse_layers(sk.pack_(mlp(1), **asked))) == 2


class TestPrefill:
    VALUES = 2 * 64 * 32 * 4 // 2
    """Bytes of the values of a block of `mlp`, two layers of 64x32 in float32."""

    def test_dense_is_the_default_and_one_copy(self, second):
        model = sk.pack_(mlp(1), backend="with_second_copy")
        assert second.asked == ["dense", "dense"]
        assert all(
            layer.prefill == "dense" and layer.second_copy_bytes() == 0 for layer in sparse_layers(model).values()
        )
        assert "second copy" not in str(sk.check(model))

    @pytest.mark.parametrize("prefill", ["cusparselt", "auto"])
    def test_reaches_the_backend_and_says_what_it_costs(self, second, prefill):
        dense = mlp(1)
        with pytest.warns(UserWarning, match=f"2 packed layers keep a second copy .* prefill: {self.VALUES:,} bytes b"):
            model = sk.pack_(copy.deepcopy(dense), backend="with_second_copy", prefill=prefill)
        assert second.asked == [prefill] * 2
        layers = sparse_layers(model).values()
        assert sum(layer.second_copy_bytes() for layer in layers) == self.VALUES
        assert sum(layer.packed_bytes() for layer in layers) == 2 * self.VALUES + 2 * 64 * 32 // 8
        assert (
            f"2 layers keep a second copy of their weight for prefill: {self.VALUES:,} bytes" in sk.check(model).notes
        )
        assert f"prefill={prefill}" in repr(model)
        x = torch.randn(3, 32)
        torch.testing.assert_close(model(x), dense(x))
        state = sk.pack_(copy.deepcopy(dense)).state_dict()
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_auto_says_that_nothing_was_measured(self, second):
        second.is_measured = False
        message = r"prefill='auto' keeps one copy of 2 layers, as 'dense' does, for want of times; 0.up: measure it"
        for model in (mlp(1), sk.pack_(mlp(1), backend="with_second_copy")):
            with pytest.warns(UserWarning, match=message) as seen:
                sk.pack_(model, backend="with_second_copy", prefill="auto")
            assert len([one for one in seen if "want of times" in str(one.message)]) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sk.pack_(mlp(1), backend="with_second_copy", prefill="dense")

    def test_survives_copies_and_conversions(self, second):
        with pytest.warns(UserWarning, match="second copy"):
            model = sk.pack_(mlp(1), backend="with_second_copy", prefill="cusparselt")
        for change in (
            copy.deepcopy,
            lambda m: pickle.loads(pickle.dumps(m)),
            lambda m: m.bfloat16(),
            lambda m: m.float(),
        ):
            model = change(model)
            for layer in sparse_layers(model).values():
                assert layer.prefill == "cusparselt" and len(layer.prepared) == 3 and layer.second_copy_bytes() > 0
        model.load_state_dict({key: value.clone() for key, value in model.state_dict().items()})
        assert all(len(layer.prepared) == 3 for layer in sparse_layers(model).values())

    def test_of_layers_that_are_packed_already(self, second):
        model = sk.pack_(mlp(1), backend="with_second_copy")
        with pytest.warns(UserWarning, match="second copy"):
            sk.pack_(model, prefill="cusparselt")
        assert all(len(layer.prepared) == 3 for layer in sparse_layers(model).values())
        with pytest.warns(UserWarning, match="second copy"):
            sk.pack_(model)  # asks for nothing, changes nothing
        assert all(len(layer.prepared) == 3 for layer in sparse_layers(model).values())

    @pytest.mark.parametrize("backend", ["cpu", "reference"])
    def test_a_backend_without_such_a_path_says_so(self, backend):
        model = mlp()
        before = state_of(model)
        with pytest.raises(
            Unsupported, match=f"0.up: backend '{backend}' .* no 'cusparselt' path for prefill.*prefill='d"
        ):
            sk.pack_(model, backend=backend, prefill="cusparselt")
        assert_same_state(model, before)
        assert all(layer.prefill == "auto" for layer in sparse_layers(sk.pack_(model, prefill="auto")).values())
        packed = sk.pack_(mlp(), backend=backend)
        with pytest.raises(Unsupported, match="0.up: .* no 'cusparselt' path"):
            sk.pack_(packed, prefill="cusparselt")
        assert all(layer.prefill == "dense" and layer.is_prepared for layer in sparse_layers(packed).values())

    def test_unknown(self):
        with pytest.raises(ValueError, match="prefill='cublas' is none of 'dense', 'cusparselt', 'auto'"):
            sk.pack_(mlp(), prefill="cublas")

    def test_nowhere_to_be_had(self):
        with pytest.raises(
            Unsupported, match="no backend runs .* with prefill='cusparselt': triton: .*; cpu: it has no"
        ):
            sk.pack_(mlp(), prefill="cusparselt")


class TestGrids:
    """A weight that was rounded keeps the grid it was rounded to."""

    @pytest.mark.parametrize("format", ["semi24_int8", "semi24_int4", "semi24_fp8"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_unpacked_and_packed_again_is_the_same(self, format, dtype):
        model = sk.pack_(mlp().to(dtype), format, backend="reference")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        dense = {name: layer.to_dense() for name, layer in sparse_layers(model).items()}
        sk.unpack_(model)
        for again in ("auto", format):
            twin = sk.pack_(copy.deepcopy(model), again, backend="reference")
            assert {layer.format for layer in sparse_layers(twin).values()} == {format}
            assert all(torch.equal(layer.to_dense(), dense[name]) for name, layer in sparse_layers(twin).items())
            scales = {name: tensor for name, tensor in twin.state_dict().items() if name.endswith("scales")}
            assert all(torch.equal(tensor, before[name]) for name, tensor in scales.items())

    def test_a_weight_that_left_its_grid_is_16_bits_again(self):
        model = sk.unpack_(sk.pack_(mlp(), "semi24_int4", backend="reference"))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.01)
        sk.pack_(model)
        assert {layer.format for layer in sparse_layers(model).values()} == {"semi24"}

    @pytest.mark.parametrize("shape", [(67, 130), (5, 7), (33, 129)])
    @pytest.mark.parametrize("format", ["semi24_int8", "semi24_int4", "semi24_fp8"])
    def test_what_is_saved_is_no_view_of_something_larger(self, format, shape):
        model = torch.nn.Sequential(torch.nn.Linear(*shape[::-1]))
        with torch.no_grad():
            model[0].weight.mul_(sk.NM(2, 4).project(model[0].weight.abs()))
        for tensor in sk.pack_(model, format).state_dict().values():
            assert tensor.untyped_storage().nbytes() == tensor.nbytes


class TestNames:
    def test_layers_that_are_none(self):
        with pytest.raises(ValueError, match="layers: unknown layer 'nope': known are"):
            sk.pack_(mlp(), layers=["nope"])
        with pytest.raises(ValueError, match=r"layers='0.up' is a string: give a list"):
            sk.pack_(mlp(), layers="0.up")

    def test_scales_that_fit_nothing(self):
        with pytest.raises(ValueError, match="scales: unknown layer 'nope'"):
            sk.pack_(mlp(), "semi24_int8", scales={"nope": torch.ones(3)})
        with pytest.raises(ValueError, match=r"scales\['0.up'\] is a list: give a tensor"):
            sk.pack_(mlp(), "semi24_int8", scales={"0.up": [1.0]})
        with pytest.raises(ValueError, match=r"^0.up: scales are \(3,\)"):
            sk.pack_(mlp(), "semi24_int8", scales={"0.up": torch.ones(3)})

    def test_a_packed_model_is_not_packed_otherwise(self):
        model = sk.pack_(mlp(), backend="reference")
        with pytest.raises(ValueError, match="is packed as semi24 already. Call unpack_ first"):
            sk.pack_(model, "semi24_int8")
        with pytest.raises(ValueError, match="runs on 'reference' already. Call unpack_ first"):
            sk.pack_(model, backend="cpu")
        assert sk.pack_(model, "semi24", "reference") is model
