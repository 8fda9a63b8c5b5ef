"""S fitted once more: least squares in float64 beside it, a loss that never rises, and layers that are left alone."""

import copy

import pytest
import torch
from torch import nn

from sparsekit.nn import install_side_, side_layers
from sparsekit.nn.side import block_indicator
from sparsekit.patterns import NM
from sparsekit.plan import SideBranch
from sparsekit.train.ast_trainer import ASTTrainer
from sparsekit.train.refit import STEPS, refit_branches_

DAMP = 1e-4


def samples_of(num_samples=5, length=7, K=19, seed=0):
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(K, K, generator=generator)
    return [{"x": torch.randn(1, length + i, K, generator=generator) @ mix} for i in range(num_samples)]


class Layers(nn.Module):
    """One after the other, so that a branch's input depends on those before it."""

    def __init__(self, *sizes, bias=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(k, n, bias=bias) for k, n in zip(sizes, sizes[1:], strict=False))

    def forward(self, x):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def student_of(teacher, group=4, has_X=False):
    """The teacher 2:4, with a branch of small random numbers beside each layer."""
    student = copy.deepcopy(teacher)
    for index, layer in enumerate(teacher.layers):
        N, K = layer.weight.shape
        generator = torch.Generator().manual_seed(index)
        S = 0.05 * torch.randn(N, -(-K // group), generator=generator)
        X = torch.randn(S.shape[1], K, generator=generator) if has_X else None
        with torch.no_grad():
            student.layers[index].weight.mul_(NM(2, 4).project(layer.weight.abs()))
        install_side_(student, f"layers.{index}", SideBranch(S, X, group))
    return student


def loss_against(teacher, student, samples):
    def loss():
        with torch.no_grad():
            found = [(student(**sample) - teacher(**sample)).double().square().mean() for sample in samples]
        return float(torch.stack(found).mean())

    return loss


def refit(student, teacher, samples, loss=None):
    return refit_branches_(
        student, teacher, samples, lambda sample: student(**sample), loss or loss_against(teacher, student, samples)
    )


@pytest.mark.parametrize("has_X", [False, True], ids=["sums", "X"])
@pytest.mark.parametrize("K,group", [(19, 4), (16, 16), (21, 5), (3, 16)], ids=str)
def test_one_layer_gets_the_least_squares_solution(K, group, has_X):
    """By the normal equations in float64; groups may be ragged, and fewer inputs than one group."""
    teacher, samples = Layers(K, 6, bias=True), samples_of(K=K)
    student = student_of(teacher, group, has_X)
    layer, sparse = student.layers[0], student.layers[0].weight.detach().double()
    S, X = layer.side_S.detach().double(), layer.side_X
    X = block_indicator(K, group).double() if X is None else X.detach().double()
    x = torch.cat([sample["x"].flatten(0, 1) for sample in samples]).double()
    z, lack = x @ X.T, x @ (teacher.layers[0].weight.double() - sparse).T - (x @ X.T) @ S.T
    Z = z.T @ z
    expected = S + lack.T @ z @ torch.linalg.inv(Z + DAMP * Z.diagonal().mean() * torch.eye(len(Z)))
    note = refit(student, teacher, samples)
    torch.testing.assert_close(layer.side_S.detach().double(), expected, rtol=1e-3, atol=1e-4)
    assert "refitted" in note and note.endswith("step 1")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_loss_falls_and_what_is_said_is_so(dtype):
    teacher, samples = Layers(19, 12, 10), samples_of()
    student, teacher = student_of(teacher).to(dtype), teacher.to(dtype)
    samples = [{"x": sample["x"].to(dtype)} for sample in samples]
    loss = loss_against(teacher, student, samples)
    before = loss()
    note = refit(student, teacher, samples)
    after = loss()
    assert after < 0.9 * before and f"loss {before:.4g} -> {after:.4g}" in note
    assert {parameter.dtype for parameter in student.parameters()} == {dtype}


def test_it_is_as_exact_under_autocast():
    """A forward in bf16 has its own rounding; the sums over tokens have none beside it."""
    teacher, samples = Layers(16, 6), samples_of(40, 30, K=16)
    exact, rounded = student_of(teacher), student_of(teacher)
    refit(exact, teacher, samples)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        refit(rounded, teacher, samples)
    change = exact.layers[0].side_S - student_of(teacher).layers[0].side_S
    off = (rounded.layers[0].side_S - exact.layers[0].side_S).norm() / change.norm()
    assert off < 0.02, "the sums are rounded, too"


@pytest.mark.parametrize("good", [None, *STEPS])
def test_the_step_is_the_best_of_those_tried_and_none_where_none_helps(good):
    """Whatever the loss is: one that is lowest at a share of the change takes that share."""
    teacher, samples = Layers(19, 6), samples_of()
    whole, student = student_of(teacher), student_of(teacher)
    before = student.layers[0].side_S.detach().clone()
    refit(whole, teacher, samples)
    change = whole.layers[0].side_S.detach() - before
    target = before + (good or 0.0) * change

    def loss():
        return 1 + float((student.layers[0].side_S.detach() - target).norm())

    note = refit(student, teacher, samples, loss)
    torch.testing.assert_close(student.layers[0].side_S.detach(), target, rtol=1e-5, atol=1e-6)
    if good is None:
        assert torch.equal(student.layers[0].side_S.detach(), before)
        assert note == "branches: a refit would not lower the loss of 1: left as trained"
    else:
        assert note.endswith(f"step {good:g}")


def test_nothing_else_changes():
    teacher, samples = Layers(19, 12, 10), samples_of()
    student = student_of(teacher)
    both = nn.ModuleDict({"student": student, "teacher": teacher})
    before = {name: value.clone() for name, value in both.state_dict().items()}
    refit(student, teacher, samples)
    changed = {name for name, value in both.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"student.layers.0.side_S", "student.layers.1.side_S"}
    assert not any(module._forward_hooks for model in (student, teacher) for module in model.modules())


class Routed(nn.Module):
    """Two experts, of which each sees some of the tokens."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(8, 4) for _ in range(3))
        self.takes = slice(0, 4)

    def forward(self, x):
        return self.layers[0](x[:, self.takes]).sum() + self.layers[1](x).sum()


def test_layers_that_saw_other_tokens_or_none_are_left():
    teacher, samples = Routed(), samples_of(K=8)
    student = student_of(teacher)
    student.takes = slice(0, 3)
    before = [layer.side_S.detach().clone() for layer in side_layers(student).values()]
    falling = iter(range(10, 0, -1))
    refit(student, teacher, samples, lambda: float(next(falling)))
    same = [torch.equal(layer.side_S, S) for layer, S in zip(side_layers(student).values(), before, strict=True)]
    assert same == [True, False, True]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_run_never_ends_its_refit_with_a_higher_loss(llama, tokens, ast, dtype, monkeypatch):
    """And goes on from the refitted branch, also where rounding begins at the same step."""
    import sparsekit.train.ast_trainer as module

    losses, fitted, begun = [], {}, {}
    original, begin = module.refit_branches_, module.begin_rounding_

    def look(student, teacher, samples, run, loss):
        assert all(len(sample["input_ids"]) == 1 for sample in samples)
        losses.append(loss())
        note = original(student, teacher, samples, run, loss)
        losses.append(loss())
        fitted.update({name: layer.side_S.detach().clone() for name, layer in side_layers(student).items()})
        return note

    def look_again(optimizer, format, layers, z_scales):
        found = begin(optimizer, format, layers, z_scales)
        begun.update({name: optimizer.state[layer.side_S]["dense"].clone() for name, layer in layers.items()})
        return found

    monkeypatch.setattr(module, "refit_branches_", look)
    monkeypatch.setattr(module, "begin_rounding_", look_again)
    config = ast(slorb_group=16, format="semi24_int4", mask_freeze_ratio=0.25, quantise_ratio=0.25)
    trainer = ASTTrainer(llama(dtype, initializer_range=0.3), config, tokens())
    trainer.train()
    assert losses[1] < losses[0], "there is something to win here"
    assert begun.keys() == fitted.keys() and all(torch.equal(begun[name].to(dtype), S) for name, S in fitted.items())
    assert any("branches refitted when the masks froze" in note for note in trainer.plan().notes)
