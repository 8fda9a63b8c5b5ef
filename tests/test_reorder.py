"""Inputs put into another order, with what produces them: the same model, on which a mask removes less."""

import copy

import pytest
import torch
import transformers
from torch import nn

import sparsekit as sk
from sparsekit.archs import find_couplings
from sparsekit.calibration import ColumnNorms, Hessian
from sparsekit.errors import Unsupported
from sparsekit.masks import Mask
from sparsekit.methods import ALPS, METHODS, RIA, Magnitude, OneShot, Wanda
from sparsekit.plan import InputOrder, Plan
from sparsekit.targets import weight_NK
from tests.archs.tiny_models import VOCABULARY, tiny_model, token_samples


def llama(seed=0):
    """Three queries a value, biases everywhere, heads of 12, 36 inner channels of unlike strength."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=12,
        attention_bias=True,
        mlp_bias=True,
        max_position_embeddings=64,
    )
    return varied_(transformers.LlamaForCausalLM(config))


def gpt2():
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=24, n_layer=2, n_head=2)
    return varied_(transformers.GPT2LMHeadModel(config))


def bert():
    torch.manual_seed(0)
    sizes = dict(vocab_size=VOCABULARY, hidden_size=24, intermediate_size=36, num_hidden_layers=2)
    return varied_(transformers.BertForSequenceClassification(transformers.BertConfig(**sizes, num_attention_heads=2)))


def varied_(model):
    """Make channels and biases differ, so that orders matter and a bias left behind shows."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
        elif parameter.dim() == 2:
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)
            parameter.data *= torch.rand(parameter.shape[1], generator=generator) ** 2 + 0.05
    return model.eval()


MODELS = {"llama": llama, "gpt2": gpt2, "bert": bert}


def same(model, other):
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)


def output(model):
    with torch.no_grad():
        return model(input_ids=torch.stack(token_samples(3, 12))).logits


def only_reordered(model, plan):
    """A copy of the model with the plan's orders and nothing removed."""
    nothing = {name: Mask("unstructured", torch.ones_like(mask.keep)) for name, mask in plan.masks.items()}
    return sk.apply_(copy.deepcopy(model), Plan(nothing, perms=plan.perms))


@pytest.mark.parametrize("method", ["magnitude", "wanda", "ria"])
@pytest.mark.parametrize("family", MODELS)
def test_the_plan_does_to_another_copy_what_pruning_did(family, method, tmp_path):
    model = MODELS[family]()
    dense, fresh = copy.deepcopy(model), copy.deepcopy(model)
    plan = sk.prune_(model, METHODS.get(method)(permute=True), dataset=token_samples(), progress=False)
    assert len(plan.perms) == 4, "down and output projections of two blocks"
    plan.save(tmp_path / "plan")
    assert same(sk.apply_(fresh, Plan.load(tmp_path / "plan")), model)
    reordered = only_reordered(dense, plan)
    assert not same(reordered, dense)
    torch.testing.assert_close(output(reordered), output(dense), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", MODELS)
def test_more_is_kept_in_every_reordered_layer(family):
    model, plain = MODELS[family](), MODELS[family]()
    plan = sk.prune_(model, Magnitude(permute=True), progress=False)
    sk.prune_(plain, Magnitude(), progress=False)
    for name in plan.masks:
        kept, before = (float(weight_NK(each.get_submodule(name)).abs().sum()) for each in (model, plain))
        assert kept > 1.001 * before if name in plan.perms else kept == pytest.approx(before)


@pytest.mark.parametrize("method", ["sparsegpt", "alps"])
def test_statistics_are_reordered_with_the_inputs(method):
    """Methods that move weights do no worse than when the model was reordered before they came."""
    model = llama()
    config = METHODS.get(method)
    dense = copy.deepcopy(model)
    plan = sk.prune_(model, config(permute=True), dataset=token_samples(), progress=False)
    first = next(name for name in plan.perms if name.endswith("layers.0.mlp.down_proj"))
    before = only_reordered(dense, plan)
    sk.prune_(before, config(), dataset=token_samples(), progress=False)
    found, expected = (each.get_submodule(first).weight for each in (model, before))
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", [ColumnNorms, Hessian])
def test_reordered_statistics(kind):
    x, order = torch.randn(9, 7), torch.randperm(7)
    statistics, direct = kind(7, torch.device("cpu")), kind(7, torch.device("cpu"))
    statistics.add(x)
    direct.add(x[:, order])
    before = statistics.column_norms
    other = statistics.reordered(order)
    torch.testing.assert_close(other.column_norms, direct.column_norms)
    assert other.num_tokens == 9 and torch.equal(statistics.column_norms, before)
    if kind is Hessian:
        torch.testing.assert_close(other.matrix, direct.matrix)
        statistics.factors["a"] = 1
        assert other.factors == {} and statistics.reordered(order).factors == {}


def test_applied_again_the_order_stays(tmp_path):
    model = llama()
    plan = sk.prune_(model, RIA(permute=True), dataset=token_samples(), progress=False)
    pruned = copy.deepcopy(model)
    assert same(sk.apply_(model, plan), pruned)
    model.save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert same(sk.apply_(loaded, plan), pruned)
    generator = torch.Generator().manual_seed(0)
    for parameter in loaded.parameters():  # as after training
        parameter.data += 0.3 * parameter.data.std() * torch.randn(parameter.shape, generator=generator)
    trained = copy.deepcopy(loaded)
    sk.apply_(loaded, plan)
    for name, mask in plan.masks.items():
        expected = trained.get_submodule(name).weight * mask.keep
        assert torch.equal(loaded.get_submodule(name).weight, expected), name


@pytest.mark.parametrize("method", [name for name, config in METHODS.items() if issubclass(config, OneShot)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_old_and_new_order_are_told_apart(method, dtype):
    dense = llama().to(dtype)
    model = copy.deepcopy(dense)
    plan = sk.prune_(model, METHODS.get(method)(permute=True), dataset=token_samples(), progress=False)
    assert plan.perms
    for name, perm in plan.perms.items():
        assert perm.is_in(weight_NK(model.get_submodule(name))), name
        assert not perm.is_in(weight_NK(dense.get_submodule(name))), name


def test_a_copy_in_another_dtype_is_put_in_order():
    dense = llama()
    plan = sk.prune_(copy.deepcopy(dense), RIA(permute=True), dataset=token_samples(), progress=False)
    half, full = only_reordered(dense.bfloat16(), plan), only_reordered(dense.float(), plan)
    assert same(half.float(), full)


@pytest.mark.parametrize("format", ["semi24", "semi24_int4"])
def test_packed_too(format):
    model = llama()
    method = RIA(permute=True, format=None if format == "semi24" else format)
    plan = sk.prune_(model, method, dataset=token_samples(), progress=False)
    expected = output(sk.apply_(model, plan))
    sk.pack_(model, format=format, backend="reference", scales=plan.scales, progress=False)
    torch.testing.assert_close(output(model), expected, rtol=1e-4, atol=1e-5)


def test_sparsify_takes_it(recwarn):
    model = sk.sparsify(llama(), method=RIA(permute=True), dataset=token_samples(), backend="reference", progress=False)
    assert sk.check(model).ok


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_failure_puts_everything_back(error, monkeypatch):
    """Biases of producers too, and producers that are no targets."""
    model = llama()
    before, calls = copy.deepcopy(model), []

    def decide(self, w_NK, statistics, real=Wanda.decide):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(self, w_NK, statistics)

    monkeypatch.setattr(Wanda, "decide", decide)
    with pytest.raises(error):
        sk.prune_(model, Wanda(permute=True), targets=["down_proj", "o_proj"], dataset=token_samples(), progress=False)
    assert same(model, before)


def test_apply_puts_everything_back_as_well():
    model = llama()
    plan = sk.prune_(copy.deepcopy(model), Magnitude(permute=True), progress=False)
    last = list(plan.perms)[-1]
    K = len(plan.perms[last].order)
    plan.perms[last] = InputOrder(torch.arange(K).roll(1), plan.perms[last].signature)
    if "down_proj" in last:  # any order is one, there
        plan.perms["model.layers.0.self_attn.q_proj"] = InputOrder(torch.arange(24), torch.zeros(24))
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="q_proj into another order, and what produces them cannot be found"):
        sk.apply_(model, plan)
    assert same(model, before)


def test_orders_across_heads_are_refused():
    model = llama()
    plan = sk.prune_(copy.deepcopy(model), Magnitude(permute=True), progress=False)
    name = "model.layers.0.self_attn.o_proj"
    plan.perms = {name: InputOrder(torch.arange(72).roll(5), plan.perms[name].signature)}
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match="o_proj cannot take this order: .* within heads of 12, alike in 3"):
        sk.apply_(model, plan)
    assert same(model, before)


class Cumulative(nn.Module):
    """Has the names of an MLP, and mixes its inner channels by their places."""

    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x):
        return x + self.down_proj((self.gate_proj(x).sigmoid() * self.up_proj(x)).cumsum(dim=-1))


def test_a_forward_that_minds_the_order_is_found_out():
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Sequential(nn.Linear(8, 8), Cumulative()) for _ in range(2)])
    assert find_couplings(model)
    before = copy.deepcopy(model)
    samples = list(torch.randn(6, 1, 8))
    with pytest.raises(Unsupported, match=r"down_proj gave another output .* use permute=False"):
        sk.prune_(model, RIA(permute=True), dataset=samples, progress=False)
    assert same(model, before)


def test_layers_that_are_no_targets_keep_their_inputs():
    model = llama()
    plan = sk.prune_(model, Magnitude(permute=True), targets=["re:.*down_proj"], progress=False)
    assert [name.rpartition(".")[2] for name in plan.perms] == ["down_proj"] * 2


def test_nothing_to_reorder_is_said():
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    plan = sk.prune_(model, Magnitude(permute=True), progress=False)
    assert not plan.perms
    assert plan.notes == ["permute=True: no layer has inputs that what produces them could give in another order"]
    assert not sk.prune_(llama(), "magnitude", progress=False).perms


def test_heads_that_groups_do_not_divide_stay_in_order():
    plan = sk.prune_(tiny_model("llama"), Magnitude(permute=True), progress=False)  # heads of 10
    assert [name.rpartition(".")[2] for name in plan.perms] == ["down_proj"] * 2


@pytest.mark.parametrize(
    "fields,message",
    [
        ({"pattern": "unstructured", "permute": True}, "permute=True is for N:M.*than unstructured"),
        ({"pattern": "4x4", "permute": True}, "permute=True is for N:M"),
        ({"permute": "yes"}, "permute='yes' is neither True nor False"),
    ],
    ids=str,
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        ALPS(**fields)
