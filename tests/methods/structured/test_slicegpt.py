"""The residual stream turned and cut: nothing changes by turning, and the cut is where it should be."""

import pytest
import torch

import sparsekit as sk
from sparsekit.calibration import load_samples
from sparsekit.errors import NonFiniteError, Unsupported
from sparsekit.methods.structured.slicegpt import Stream, principal_directions, rotate_
from sparsekit.prune import prune_
from sparsekit.snapshot import Snapshot
from tests.archs.tiny_models import tiny_model, token_samples

FAMILIES = ["llama", "mistral", "qwen2"]


def outputs(model):
    with torch.no_grad():
        return model(torch.stack(token_samples(3, seed=5))).logits


def pruned(model, config, dataset=None):
    data = token_samples(6) if dataset is None else dataset
    return prune_(model, config, dataset=data, num_calibration_samples=6, progress=False)


def with_norms(family):
    """Norm weights that differ, as training leaves them."""
    model = tiny_model(family)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype,limit", [(torch.float32, 1e-4), (torch.float64, 1e-5)], ids=str)
def test_turning_changes_nothing(family, dtype, limit):
    """Norms compute in float32 whatever the model's dtype, so float64 does not get below 1e-6."""
    model = with_norms(family).to(dtype)
    before = outputs(model)
    stream = Stream.of(model)
    Q = principal_directions(model, stream, load_samples(token_samples(4), model, num_samples=4).batches)
    torch.testing.assert_close(Q.T @ Q, torch.eye(20, dtype=torch.float64), rtol=0, atol=1e-10)
    rotate_(model, stream, Q, Snapshot(model))
    assert float((outputs(model) - before).abs().max()) <= limit * float(before.abs().max())
    assert all(bool((model.get_submodule(norm).weight == 1).all()) for norm in stream.readers)


def test_directions_are_those_of_the_normed_states():
    model = with_norms("llama")
    stream = Stream.of(model)
    batches = load_samples(token_samples(4), model, num_samples=4).batches
    rows = []
    for norm in stream.readers:
        handle = model.get_submodule(norm).register_forward_hook(
            lambda module, args, output: rows.append((output / module.weight).flatten(0, 1).double())
        )
        for batch in batches:
            with torch.no_grad():
                model(**batch)
        handle.remove()
    x = torch.cat(rows)
    energies = (x @ principal_directions(model, stream, batches)).square().sum(0)
    exact = torch.linalg.eigvalsh(x.T @ x).flip(0)
    torch.testing.assert_close(energies, exact, rtol=1e-4, atol=1e-4 * float(exact[0]))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_cut_model_is_the_dead_one_and_loads_as_stock(family, tmp_path):
    model = with_norms(family)
    tied = model.config.tie_word_embeddings
    plan = pruned(model, sk.SliceGPT(sparsity=0.4, round_to=2))
    assert list(plan.cuts) == ["model.embed_tokens"]
    assert plan.cuts["model.embed_tokens"].kept.tolist() == list(range(12))
    before = outputs(model)
    sk.apply_(model, plan)
    assert float((outputs(model) - before).abs().max()) <= 1e-4 * float(before.abs().max())
    assert model.config.hidden_size == 12 and not model.config.tie_word_embeddings
    assert model.model.layers[0].self_attn.q_proj.weight.shape == (20, 12)
    assert model.model.layers[0].mlp.down_proj.weight.shape == (12, 36)
    assert any("no longer shares its weight" in note for note in plan.notes) == tied
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    assert "quantization_config" not in again.config.to_dict()


def test_where_the_energy_is_the_cut_costs_nothing():
    """A model whose stream lies in 8 of 20 dimensions, turned at random, loses nothing with 12 of them."""
    model = with_norms("llama")
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(20, 8, generator=generator))[0]
    with torch.no_grad():
        for layer in (model.model.embed_tokens, *(b.self_attn.o_proj for b in model.model.layers)):
            weight = layer.weight
            weight.copy_(weight @ basis @ basis.T if layer is model.model.embed_tokens else basis @ basis.T @ weight)
        for block in model.model.layers:
            block.mlp.down_proj.weight.copy_(basis @ basis.T @ block.mlp.down_proj.weight)
    before = outputs(model)
    plan = pruned(model, sk.SliceGPT(sparsity=0.4, round_to=2))
    sk.apply_(model, plan)
    assert float((outputs(model) - before).abs().max()) <= 1e-4 * float(before.abs().max())


def test_principal_directions_beat_others(monkeypatch):
    dense = outputs(with_norms("llama"))
    model, other = with_norms("llama"), with_norms("llama")
    pruned(model, sk.SliceGPT(sparsity=0.2, round_to=2))
    from sparsekit import thin_stream

    own = thin_stream.principal_directions
    monkeypatch.setattr(thin_stream, "principal_directions", lambda *args: own(*args).flip(1))
    pruned(other, sk.SliceGPT(sparsity=0.2, round_to=2))
    errors = [float((outputs(each) - dense).square().mean()) for each in (model, other)]
    assert errors[0] < 0.9 * errors[1]


@pytest.mark.parametrize(
    "constraints,size", [({"params": "70%"}, 14), ({"flops": "75%"}, 14), ({"params": 6000}, None)]
)
def test_budgets(constraints, size):
    model = with_norms("llama")
    params = sum(p.numel() for p in model.parameters())
    plan = pruned(model, sk.SliceGPT(constraints=constraints, round_to=2))
    sk.apply_(model, plan)
    if size is None:
        left = sum(p.numel() for p in model.parameters())
        assert left <= 6000 < left + 2 * params / 20 + 1
    else:
        assert model.config.hidden_size == size


def test_a_tied_head_counts_against_an_absolute_budget():
    model = with_norms("qwen2")
    most = int(0.9 * sum(p.numel() for p in model.parameters()))
    sk.apply_(model, pruned(model, sk.SliceGPT(constraints={"params": most}, round_to=2)))
    left = sum(p.numel() for p in model.parameters())
    assert model.config.hidden_size < 20 and 0.8 * most <= left <= most


def test_what_is_left_is_said():
    notes = pruned(with_norms("llama"), sk.SliceGPT(sparsity=0.35, round_to=2)).notes
    assert any(
        "60.0% of the params of the blocks are left; what goes here goes in steps too large for sparsity=0.35" in note
        for note in notes
    )


def test_a_failure_ties_and_turns_back(monkeypatch):
    model = with_norms("qwen2")
    before, config = {name: t.clone() for name, t in model.state_dict().items()}, model.config.to_dict()
    from sparsekit import thin_stream

    monkeypatch.setattr(thin_stream, "deaden_", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        pruned(model, "slicegpt")
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.to_dict() == config


class TestBadInput:
    @pytest.mark.parametrize("family", ["opt", "gpt2"])
    def test_norms_that_subtract_the_mean(self, family):
        with pytest.raises(Unsupported, match="hidden dimensions of .* cannot be cut"):
            pruned(tiny_model(family), "slicegpt")

    def test_models_whose_answers_are_hidden_states(self):
        with pytest.raises(Unsupported, match="takes RMSNorms"):
            pruned(tiny_model("bert"), "slicegpt")

    def test_norms_of_heads_that_share_an_eps(self):
        model = tiny_model("qwen3")
        before = {name: t.clone() for name, t in model.state_dict().items()}
        with pytest.raises(Unsupported, match="q_norm has its eps"):
            pruned(model, sk.SliceGPT(round_to=2))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_budgets_that_cannot_be(self):
        with pytest.raises(ValueError, match="no hidden size from 2 up is within sparsity=0.95: .* pays for 2"):
            pruned(tiny_model("llama"), sk.SliceGPT(sparsity=0.95, round_to=2))
        with pytest.raises(ValueError, match="knows budgets in sparsity, params and flops"):
            pruned(tiny_model("llama"), sk.SliceGPT(constraints={"speedup": 1.5}))

    def test_layers_that_are_no_targets(self):
        with pytest.raises(ValueError, match="leave out model.layers.1.mlp.down_proj, and method='slicegpt' turns"):
            prune_(tiny_model("llama"), "slicegpt", dataset=token_samples(2), ignore=["re:.*1.mlp.*"], progress=False)

    def test_padding_alone(self):
        nothing = [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4).long()}]
        with pytest.raises(ValueError, match="no token of the calibration data is more than padding"):
            pruned(tiny_model("llama"), "slicegpt", nothing)

    def test_states_that_are_not_finite(self):
        model = tiny_model("llama")
        model.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("inf")
        with pytest.raises(NonFiniteError, match="hidden states hold NaN"):
            pruned(model, sk.SliceGPT(round_to=2))
