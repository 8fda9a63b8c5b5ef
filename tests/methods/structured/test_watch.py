"""Where the outputs of readers join the residual stream is found by trying, in all families and in made-up ones."""

import pytest
import torch
from torch import nn

from sparsekit.archs import find_widths
from sparsekit.calibration import Walk, load_samples
from sparsekit.methods.structured.divergence import Answers
from sparsekit.methods.structured.watch import Tokens, Watcher, first_only_readers
from tests.archs.tiny_models import tiny_model, token_samples

JOINS = {
    "bert": ["attention.output.LayerNorm", "output.LayerNorm"],
    "distilbert": ["sa_layer_norm", "output_layer_norm"],
    "llama": ["post_attention_layernorm", ""],
    "qwen3": ["post_attention_layernorm", ""],
    "opt": ["final_layer_norm", ""],
    "gpt2": ["ln_2", ""],
}


def walked(model, batches=None):
    widths = find_widths(model)
    layers = {width.name: model.get_submodule(width.name) for width in widths}
    batches = batches or load_samples(token_samples(3), model, num_samples=3).batches
    return Walk(model, layers, batches)


@pytest.mark.parametrize("family", JOINS)
def test_joins_of_families(family):
    with walked(tiny_model(family)) as walk:
        for step in walk.steps:
            watcher = Watcher(walk, step, step.layers, {})
            assert [join and join.removeprefix(f"{step.block}.") for join in watcher.joins.values()] == JOINS[family]
            output, seen = watcher.look(1, step.layers)
            last = list(step.layers)[-1]
            if JOINS[family][1] == "":
                state = output if isinstance(output, torch.Tensor) else output[0]
                assert torch.equal(seen[last].sums, state.view_as(seen[last].sums))
            for name in step.layers:
                glanced = watcher.glance(1, name)
                assert all(torch.equal(getattr(glanced, what), getattr(seen[name], what)) for what in vars(glanced))
            walk.finish(step)


@pytest.mark.parametrize("family", JOINS)
def test_the_sum_is_the_output_and_what_came_before(family):
    """Of the first reader: what it adds to is the input of the block, but for post-norm blocks the same."""
    model = tiny_model(family)
    with walked(model) as walk:
        step = walk.steps[0]
        entered = []
        handle = model.get_submodule(step.block).register_forward_pre_hook(
            lambda module, args, kwargs: entered.append((*args, *kwargs.values())[0]), with_kwargs=True
        )
        _, seen = Watcher(walk, step, step.layers, {}).look(0, step.layers)
        handle.remove()
        first = seen[next(iter(step.layers))]
        torch.testing.assert_close(first.sums, first.outputs + entered[-1], rtol=1e-5, atol=1e-5)


class Parallel(nn.Module):
    """Attention and MLP side by side, and a norm on the output of the last (as in Gemma 2)."""

    def __init__(self):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(8), nn.Linear(8, 12), nn.Linear(12, 8)
        self.other, self.after_norm = nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x):
        h = self.norm(x)
        return x + self.other(h) + self.after_norm(self.fc2(self.fc1(h).relu()))


def test_sums_where_names_do_not_help():
    torch.manual_seed(0)
    model = nn.ModuleDict({"blocks": nn.ModuleList([Parallel(), Parallel()])})
    model.forward = lambda x: model["blocks"][1](model["blocks"][0](x))
    layers = {name: module for name, module in model.named_modules() if name.endswith(("other", "fc2"))}
    with Walk(model, layers, [{"input": torch.randn(2, 5, 8)}]) as walk:
        watcher = Watcher(walk, walk.steps[0], walk.steps[0].layers, {})
        assert watcher.joins == {"blocks.0.fc2": "blocks.0.after_norm", "blocks.0.other": ""}
        _, seen = watcher.look(0, watcher.joins)
        assert torch.equal(seen["blocks.0.fc2"].sums, seen["blocks.0.fc2"].outputs)


def test_looking_leaves_no_trace():
    model = tiny_model("bert")
    with walked(model) as walk:
        Watcher(walk, walk.steps[0], walk.steps[0].layers, {}).look(0, walk.steps[0].layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_classifiers_read_the_first_token_after_the_last_attention():
    model = tiny_model("bert")
    widths = [width.name for width in find_widths(model)]
    batch = load_samples(token_samples(3), model, num_samples=3, batch_size=3).batches[0]
    assert first_only_readers(model, widths, batch) == frozenset(widths[-2:])
    for other in ("distilbert", "llama"):
        model = tiny_model(other)
        widths = [width.name for width in find_widths(model)]
        assert first_only_readers(model, widths, batch) == frozenset(widths[-2:] if other == "distilbert" else ())


def test_tokens_leave_padding_out():
    x = torch.arange(24.0).view(2, 4, 3)
    mask = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 0]])
    assert torch.equal(Tokens.of({"attention_mask": mask}).pick(x), x[mask.bool()])
    assert torch.equal(Tokens.of({"attention_mask": mask}, first_only=True).pick(x), x[:, 0])
    assert torch.equal(Tokens.of({"attention_mask": 1 - mask}, first_only=True).pick(x), x[:0, 0])
    assert torch.equal(Tokens.of({}).pick(x), x.view(8, 3))


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_answers_diverge_by_the_mean_kl(family):
    model, other = tiny_model(family), tiny_model(family, seed=1)
    batch = load_samples(token_samples(3), model, num_samples=3, batch_size=3).batches[0]
    batch["attention_mask"] = torch.ones_like(batch["input_ids"])
    batch["attention_mask"][0, 20:] = 0
    answers = Answers()
    with torch.no_grad():
        answers.remember(0, batch, model(**batch))
        before, now = model(**batch).logits.double(), other(**batch).logits.double()
        found, num = answers.divergence(0, other(**batch))
        assert answers.divergence(0, model(**batch))[0] == pytest.approx(0, abs=1e-5)
    kl = (before.softmax(-1) * (before.log_softmax(-1) - now.log_softmax(-1))).sum(-1)
    if family == "llama":
        kl = kl[batch["attention_mask"].bool()]
    assert num == kl.numel() and found == pytest.approx(float(kl.sum()), rel=1e-4)


def test_hidden_states_diverge_by_their_distance():
    model = tiny_model("bert").bert
    batch = load_samples(token_samples(3), model, num_samples=3, batch_size=3).batches[0]
    answers = Answers()
    with torch.no_grad():
        output = model(**batch)
        answers.remember(0, batch, output)
        moved = output.last_hidden_state + 0.1
        found, num = answers.divergence(0, type(output)(last_hidden_state=moved))
    states = output.last_hidden_state.flatten(0, 1)
    spread = (states - states.mean(0)).square().sum() / len(states)
    assert num == len(states) and found == pytest.approx(float(0.01 * states.numel() / spread), rel=1e-3)
