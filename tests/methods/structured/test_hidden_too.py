"""Hidden dimensions, heads and channels chosen together, and readers refitted to the stream as it was."""

import pytest
import torch
import transformers as tf

import sparsekit as sk
from sparsekit import thin_stream, width_solver
from sparsekit.archs import find_widths
from sparsekit.budgets import StreamSize, count_flops, count_params
from sparsekit.calibration import load_samples
from sparsekit.errors import NonFiniteError, Unsupported
from sparsekit.methods.structured.sensitivity import judging_batches
from sparsekit.methods.structured.slicegpt import Stream, deaden_, rotate_
from sparsekit.prune import prune_
from sparsekit.snapshot import Snapshot
from sparsekit.targets import is_linear
from sparsekit.thin_stream import Thinner
from tests.archs.tiny_models import tiny_model

SIZE = 48


def llama(tied=False, vocab=61, rank=SIZE, bias=False):
    """A Llama whose embeddings lie in `rank` dimensions, turned at random; little is written beyond them."""
    torch.manual_seed(4)
    config = tf.LlamaConfig(
        vocab_size=vocab,
        hidden_size=SIZE,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        attention_bias=bias,
        mlp_bias=bias,
        initializer_range=0.3,
    )
    model = tf.LlamaForCausalLM(config).eval()
    basis = torch.linalg.qr(torch.randn(SIZE, SIZE))[0]
    fading = torch.ones(SIZE)
    fading[rank:] = 0.02
    project = (basis * fading) @ basis.T
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.1)
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ project)
        for block in model.model.layers:
            for layer in (block.self_attn.o_proj, block.mlp.down_proj):
                layer.weight.copy_(project @ layer.weight)
                if layer.bias is not None:
                    layer.bias.copy_(project @ layer.bias)
    return model


def samples(num, seed=0, vocab=61):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, vocab, (23,), generator=generator) for _ in range(num)]


def outputs(model):
    with torch.no_grad():
        return model(torch.stack(samples(4, seed=9))).logits


def pruned(model, num=24, **fields):
    config = sk.Contribution(**fields)
    return prune_(model, config, dataset=samples(num), num_calibration_samples=num, batch_size=4, progress=False)


def hidden(plan):
    return next((len(cut.kept) for cut in plan.cuts.values() if cut.kind == "hidden"), SIZE)


def block_params(model):
    return sum(
        p.numel()
        for block in model.model.layers
        for layer in block.modules()
        if is_linear(layer)
        for p in layer.parameters()
    )


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "biases"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_the_sliced_model_is_the_dead_one_within_its_budget(tied, bias, tmp_path):
    dense, model = llama(tied, rank=20, bias=bias), llama(tied, rank=20, bias=bias)
    plan = pruned(model, sparsity=0.4, hidden=True)
    assert 24 <= hidden(plan) < SIZE and {cut.kind for cut in plan.cuts.values()} > {"hidden"}
    before = outputs(model)
    sk.apply_(model, plan)
    torch.testing.assert_close(outputs(model), before, rtol=0, atol=1e-5 * float(before.abs().max()))
    left = block_params(model) / block_params(dense)
    assert 0.6 * 0.99 <= left <= 0.6 + 1e-9  # a few units and biases are half a per cent of so small a model
    assert model.config.hidden_size == hidden(plan) and not model.config.tie_word_embeddings
    sk.save(model, tmp_path / "m", packed=False)
    again = sk.load(tmp_path / "m")
    torch.testing.assert_close(outputs(again), outputs(model), rtol=0, atol=0)


def test_a_stream_of_low_rank_is_what_goes_first():
    """Where 20 of 48 dimensions carry nearly all; and not where all are at work."""
    assert hidden(pruned(llama(rank=20), sparsity=0.3)) < SIZE == hidden(pruned(llama(), sparsity=0.1))


@pytest.mark.parametrize("others", [0.0, 0.05], ids=["nothing else", "some channels"])
def test_the_readers_heal_what_the_cut_of_the_stream_did(others, monkeypatch):
    """Where inputs come again, in the part of the stream that is left; against the same cuts one after the other."""
    monkeypatch.setattr(Thinner, "_losses", lambda *args: {40: 0.0})
    dense, ours, alone = llama(), llama(), llama()
    stream = Stream.of(dense)
    batches = load_samples(samples(24), dense, num_samples=24, batch_size=4).batches
    rotate_(dense, stream, Thinner(dense, batches, [0], 1)._Q, Snapshot(dense))
    assert hidden(pruned(ours, sparsity=1 - 40 / SIZE * (1 - others))) == 40
    first = sk.SliceGPT(constraints={"params": 40.1 / SIZE})
    sk.apply_(alone, prune_(alone, first, dataset=samples(24), num_calibration_samples=24, progress=False))
    if others:
        sk.apply_(alone, pruned(alone, sparsity=others, hidden=False))
    ends = []
    with torch.no_grad():
        for model in (dense, ours, alone):
            model.model.norm.register_forward_pre_hook(lambda module, args: ends.append(args[0][..., :40]))
            model(torch.stack(samples(24)))
    errors = [float((end - ends[0]).square().mean()) for end in ends[1:]]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize("count", [count_params, lambda *args: count_flops(*args[:2], 23, *args[2:])])
def test_costs_of_a_thinner_stream_are_those_of_the_cut_model(count):
    model = llama()
    widths = find_widths(model)
    expected = count(model, widths, StreamSize(SIZE, 32))
    sk.apply_(model, prune_(model, sk.SliceGPT(sparsity=1 / 3), dataset=samples(8), progress=False))
    assert model.config.hidden_size == 32
    found = count(model, find_widths(model))
    assert (expected.dense, expected.fixed) == (found.dense, found.fixed)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_an_absolute_budget_counts_the_head_of_its_own(tied):
    model = llama(tied, rank=20)
    most = int(0.7 * sum(parameter.numel() for parameter in model.parameters()))
    plan = pruned(model, constraints={"params": most}, hidden=True)
    sk.apply_(model, plan)
    assert 0.99 * most <= sum(parameter.numel() for parameter in model.parameters()) <= most


def test_losses_are_those_of_the_stream_turned_and_cut():
    """Against the model that is really turned and made dead."""
    model = llama(tied=True, rank=30, bias=True)
    batches = load_samples(samples(8), model, num_samples=8, batch_size=2).batches
    thinner = Thinner(model, batches, judging_batches(batches), 1)
    assert list(thinner.losses) == [48, 40, 32, 24] and thinner.losses[48] == 0
    assert thinner.losses[24] > thinner.losses[32] > 0 and thinner.untied == 61 * SIZE
    before = [model(**batches[index]).logits.log_softmax(-1) for index in judging_batches(batches)]
    stream = Stream.of(model)
    rotate_(model, stream, thinner._Q, Snapshot(model))
    deaden_(model, stream, 32)
    after = [model(**batches[index]).logits.log_softmax(-1) for index in judging_batches(batches)]
    kl = torch.cat([(b.exp() * (b - a)).sum(-1).flatten() for b, a in zip(before, after, strict=True)]).mean()
    assert thinner.losses[32] == pytest.approx(float(kl), rel=1e-3)


def test_where_nobody_asked_a_tied_head_of_weight_stays_tied(monkeypatch):
    model = llama(True, rank=20)
    assert hidden(pruned(model, sparsity=0.3)) == SIZE and model.config.tie_word_embeddings
    monkeypatch.setattr(thin_stream, "_MOST_UNTIED", 0.2)
    assert hidden(pruned(llama(True, rank=20), sparsity=0.3)) < SIZE


def test_an_even_number_everywhere_is_a_plain_config(tmp_path):
    model = llama(rank=20)
    sk.apply_(model, pruned(model, sparsity=0.5, hidden=True, uniform=True))
    assert model.config.hidden_size < SIZE and not getattr(model.config, "quantization_config", None)
    model.save_pretrained(tmp_path)
    again = tf.LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(model))


def test_a_failure_turns_everything_back(monkeypatch):
    model = llama(True, rank=20)
    before, config = {name: t.clone() for name, t in model.state_dict().items()}, model.config.to_dict()
    calls = []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise RuntimeError("half-way")
        return original(self, *args)

    original = sk.Contribution.decide
    monkeypatch.setattr(sk.Contribution, "decide", failing)
    with pytest.raises(RuntimeError, match="half-way"):
        pruned(model, sparsity=0.4, hidden=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.to_dict() == config


class TestBadInput:
    def test_families_without_rms_norms(self):
        with pytest.raises(ValueError, match="hidden=True, and hidden dimensions cannot go: .*RMSNorms"):
            pruned(tiny_model("bert"), sparsity=0.3, hidden=True)

    def test_budgets_in_time(self, monkeypatch):
        monkeypatch.setattr(
            width_solver.WidthSolver, "_costs", lambda self, model: count_params(model, self.legal.widths)
        )
        with pytest.raises(ValueError, match="hidden dimensions cannot go: a budget in time"):
            pruned(llama(), constraints={"speedup": 1.2}, hidden=True)

    def test_layers_that_are_no_targets(self):
        with pytest.raises(ValueError, match="leave out model.layers.1.mlp.up_proj"):
            prune_(
                llama(),
                sk.Contribution(sparsity=0.2, hidden=True),
                dataset=samples(8),
                ignore=["model.layers.1.mlp.up_proj"],
            )

    @pytest.mark.parametrize(
        "fields,message",
        [
            ({"hidden": "yes"}, "hidden='yes' is neither"),
            ({"hidden": True, "allocation": "uniform"}, "hidden=True goes with"),
        ],
    )
    def test_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            sk.Contribution(**fields)

    def test_a_model_that_does_something_else_to_its_stream(self, monkeypatch):
        model = llama(rank=20)
        before = {name: t.clone() for name, t in model.state_dict().items()}
        block = type(model.model.layers[0])
        own = block.forward
        scales = torch.linspace(0.3, 2, SIZE)
        monkeypatch.setattr(block, "forward", lambda self, x, *a, **k: own(self, x * scales, *a, **k))
        with pytest.raises(Unsupported, match="when its residual stream was turned"):
            pruned(model, sparsity=0.4, hidden=True)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_weights_that_are_not_finite(self):
        model = llama()
        model.model.embed_tokens.weight.data[3] = float("nan")
        with pytest.raises(NonFiniteError):
            pruned(model, sparsity=0.4, hidden=True)
