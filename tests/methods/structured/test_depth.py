"""Blocks that go: which, by every way of judging, and that the rest does as if they had never been."""

import itertools

import pytest
import torch

import sparsekit as sk
from sparsekit.calibration import load_samples
from sparsekit.calibration.quiet import as_in_inference
from sparsekit.errors import NonFiniteError, Unsupported
from sparsekit.methods.structured.depth import Judge, influences, skipped
from sparsekit.prune import prune_
from tests.archs.tiny_models import VOCABULARY, tiny_model, token_samples


def deep(num=5, seed=0):
    """A Llama of blocks that matter more and less."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=20,
        intermediate_size=36,
        num_hidden_layers=num,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    model = LlamaForCausalLM(config).eval()
    for block, scale in zip(model.model.layers, (0.9, 0.05, 0.5, 0.02, 0.3), strict=False):
        for layer in (block.self_attn.o_proj, block.mlp.down_proj):
            torch.nn.init.normal_(layer.weight, std=scale)
    return model


def blocks_of(model):
    return [f"model.layers.{index}" for index in range(len(model.model.layers))]


def loss_without(model, gone, batches):
    """Without help from the code at test: the list of blocks is really shorter."""
    layers = model.model.layers
    model.model.layers = torch.nn.ModuleList(block for index, block in enumerate(layers) if index not in gone)
    with torch.no_grad():
        losses = [float(model(labels=batch["input_ids"], use_cache=False, **batch).loss) for batch in batches]
    model.model.layers = layers
    return sum(losses) / len(losses)


def pruned(model, config, dataset=None):
    data = token_samples(4) if dataset is None else dataset
    return prune_(model, config, dataset=data, num_calibration_samples=4, progress=False)


def batches_of(model):
    return load_samples(token_samples(4), model, num_samples=4).batches


@pytest.mark.parametrize("gone", [[], [1], [0, 3], [2, 3, 4]])
def test_the_judge_counts_the_loss_of_the_shorter_model(gone):
    model = deep()
    batches = batches_of(model)

    class Bar:
        def advance(self, *_):
            pass

    with as_in_inference(model):
        found = Judge(model, blocks_of(model), batches).cost(gone, Bar())
    assert found == pytest.approx(loss_without(model, gone, batches), rel=1e-5)


def test_skipped_blocks_pass_on_what_they_get():
    class Pair(torch.nn.Module):
        def forward(self, x, other=None):
            return x + 1, "kept"

    pair = Pair()
    with skipped(pair):
        out = pair(torch.ones(2), other=3)
        assert torch.equal(out[0], torch.ones(2)) and out[1] == "kept"
    assert torch.equal(pair(torch.ones(2))[0], 2 * torch.ones(2)) and "forward" not in pair.__dict__


@pytest.mark.parametrize("num", [1, 2])
def test_influence_is_that_of_the_paper(num):
    model = deep()
    batches = batches_of(model)
    with as_in_inference(model):
        found = influences(model, blocks_of(model), num, batches)
    with torch.no_grad():
        states = [[], [], [], [], [], []]
        for batch in batches:
            x = model.model.embed_tokens(batch["input_ids"])
            rotary = model.model.rotary_emb(x, torch.arange(x.shape[1])[None])
            states[0].append(x)
            mask = torch.full((24, 24), -torch.inf).triu(1)[None, None]
            for index, block in enumerate(model.model.layers):
                out = block(x, attention_mask=mask, position_embeddings=rotary)
                x = out[0] if isinstance(out, tuple) else out
                states[index + 1].append(x)
    states = [torch.cat(each).flatten(0, 1) for each in states]
    for place, value in enumerate(found):
        cosine = torch.nn.functional.cosine_similarity(states[place], states[place + num], dim=-1)
        assert value == pytest.approx(1 - float(cosine.mean()), abs=1e-5)


def test_the_least_influential_go():
    plan = pruned(deep(), sk.Depth(criterion="influence", sparsity=0.4))
    assert plan.cuts["model.layers"].kept.tolist() == [0, 2, 4]
    plan = pruned(deep(), sk.Depth(criterion="influence", sparsity=0.4, protect_first=2))
    assert plan.cuts["model.layers"].kept.tolist() == [0, 1, 2]


def test_greedy_perplexity_takes_the_best_at_each_step():
    model = deep()
    batches, gone = batches_of(model), []
    for _ in range(2):
        losses = {b: loss_without(model, [*gone, b], batches) for b in range(5) if b not in gone}
        gone.append(min(losses, key=losses.get))
    plan = pruned(deep(), sk.Depth(sparsity=0.4))
    assert plan.cuts["model.layers"].removed.tolist() == sorted(gone)


def test_blocks_in_a_row():
    model = deep()
    batches = batches_of(model)
    windows = {start: loss_without(model, [start, start + 1], batches) for start in range(4)}
    best = min(windows, key=windows.get)
    plan = pruned(deep(), sk.Depth(sparsity=0.4, contiguous=True))
    assert plan.cuts["model.layers"].removed.tolist() == [best, best + 1]
    plan = pruned(deep(), sk.Depth(sparsity=0.4, contiguous=True, criterion="influence"))
    first, second = plan.cuts["model.layers"].removed.tolist()
    assert second == first + 1


def test_in_some_pairs_greedy_is_the_best():
    model = deep()
    batches = batches_of(model)
    losses = {pair: loss_without(model, pair, batches) for pair in itertools.combinations(range(5), 2)}
    found = tuple(pruned(deep(), sk.Depth(sparsity=0.4)).cuts["model.layers"].removed.tolist())
    assert losses[found] <= sorted(losses.values())[2]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "bert"])
def test_what_is_left_is_the_shorter_model(family):
    model, dense = tiny_model(family), tiny_model(family)
    plan = pruned(model, "depth")
    (name,) = plan.cuts
    (gone,) = plan.cuts[name].removed.tolist()
    x = torch.stack(token_samples(2, seed=5))
    with torch.no_grad():
        silent = model(x).logits
        sk.apply_(model, plan)
        short = model(x).logits
        with skipped(dense.get_submodule(f"{name}.{gone}")):
            expected = dense(x, use_cache=False).logits
    torch.testing.assert_close(short, expected, rtol=1e-5, atol=1e-5)
    stays = [note for note in plan.notes if "until apply_ takes it out" in note]
    if family == "bert":
        assert stays, "norms after the sums are not the identity"
    else:
        assert not stays
        torch.testing.assert_close(short, silent, rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_sparsify_drops_blocks():
    model = sk.sparsify(deep(), "depth", dataset=token_samples(4), sparsity=0.4, progress=False)
    assert len(model.model.layers) == model.config.num_hidden_layers == 3
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]
    short = model.generate(torch.stack(token_samples(2)), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert short.shape == (2, 28)


@pytest.mark.parametrize("constraints,left", [({"flops": "60%"}, 3), ({"flops": "79%"}, 3), ({"params": "80%"}, 4)])
def test_budgets_are_not_broken(constraints, left):
    plan = pruned(deep(), sk.Depth(constraints=constraints))
    assert len(plan.cuts["model.layers"].kept) == left


def test_what_is_left_is_said():
    for sparsity, said in (
        (0.4, "60.0% of the params of the blocks are left"),
        (0.5, "steps too large for sparsity=0.5"),
    ):
        notes = pruned(deep(), sk.Depth(sparsity=sparsity)).notes
        assert any(said in note for note in notes) and any("steps too large" in note for note in notes) == (
            sparsity > 0.4
        )


@pytest.mark.parametrize("contiguous", [False, True])
def test_blocks_with_layers_that_are_no_targets_stay(contiguous):
    """Without the two that matter least, which are 1 and 3."""
    given = {"ignore": ["re:.*layers.1.mlp.up_proj", "re:.*layers.3.*"], "dataset": token_samples(4)}
    plan = prune_(deep(), sk.Depth(sparsity=0.2, contiguous=contiguous), progress=False, **given)
    (gone,) = plan.cuts["model.layers"].removed.tolist()
    assert gone not in (1, 3)


def test_blocks_that_cost_less_go_in_greater_number():
    """Where the widths of the blocks differ, as many go as the budget asks for, and not a share of their number."""
    model = deep()
    cuts = {f"model.layers.{index}.mlp.down_proj": sk.plan.Cut(torch.arange(9), 36, "channels") for index in (1, 3)}
    sk.apply_(model, sk.Plan(cuts=cuts))
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    assert sizes[1] == sizes[3] < 0.6 * sizes[0]
    plan = pruned(model, sk.Depth(sparsity=0.2, criterion="influence"))
    gone = plan.cuts["model.layers"].removed.tolist()
    assert gone == [1, 3] and sizes[1] < 0.2 * sum(sizes) <= sizes[1] + sizes[3]


def test_a_budget_in_time():
    plan = pruned(deep(), sk.Depth(constraints={"speedup": 1.3}, length=16))
    assert 1 <= len(plan.cuts["model.layers"].kept) < 5


class TestBadInput:
    def test_too_few_to_choose_from(self):
        with pytest.raises(
            ValueError, match="2 of 5 blocks would have to go, and protect_first=3, .* leave 1 to choose"
        ):
            pruned(deep(), sk.Depth(sparsity=0.4, protect_first=3, protect_last=1))
        with pytest.raises(ValueError, match="2 of 5 blocks would have to go in a row, .* leave 3 to choose"):
            given = {"ignore": ["re:.*layers.[13].mlp.*"], "dataset": token_samples(4), "progress": False}
            prune_(deep(), sk.Depth(sparsity=0.4, contiguous=True), **given)

    def test_no_block_would_be_left(self):
        with pytest.raises(ValueError, match="sparsity=0.9 pays for no block: .* pays for one of 5"):
            pruned(deep(), sk.Depth(sparsity=0.9))

    def test_no_blocks(self):
        model = torch.nn.Linear(4, 4)
        with pytest.raises(Unsupported, match="takes blocks out of one list, and this model has none"):
            pruned(model, "depth", [torch.randn(2, 4)])

    def test_several_lists(self):
        model = tiny_model("t5")
        data = [{"input_ids": each, "decoder_input_ids": each} for each in torch.ones(3, 1, 5).long()]
        with pytest.raises(Unsupported, match="one list, and this model has encoder.block, decoder.block"):
            pruned(model, "depth", data)

    def test_activations_that_are_not_finite(self):
        model = deep()
        model.model.layers[2].mlp.down_proj.weight.data[0, 0] = float("inf")
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            pruned(model, sk.Depth(criterion="influence"))

    def test_padding_alone(self):
        for name in ("depth", sk.Depth(criterion="influence")):
            with pytest.raises(ValueError, match="no token of the calibration data is more than padding"):
                pruned(
                    deep(), name, [{"input_ids": torch.ones(1, 4).long(), "attention_mask": torch.zeros(1, 4).long()}]
                )

    @pytest.mark.parametrize(
        "fields,message",
        [
            ({"criterion": "ppl"}, "unknown criterion 'ppl'"),
            ({"protect_first": -1}, "protect_first=-1 must be a whole number of at least 0"),
            ({"contiguous": None}, "contiguous=None is neither True nor False"),
            ({"pattern": "structured"}, "depth makes the pattern depth"),
        ],
        ids=str,
    )
    def test_fields(self, fields, message):
        with pytest.raises(ValueError, match=message):
            sk.Depth(**fields)
