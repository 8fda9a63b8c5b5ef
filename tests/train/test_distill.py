"""The distillation loss against float64 autograd on whole logits, and what it does to memory."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsekit.train.distill import Head, TopK, distillation_loss, square_head

KINDS = ["forward_kl", "reverse_kl"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 33), (3, 5, 105), (2, 3, 4, 17), (0, 9), (2, 0, 9)]
"""Of logits; the last dimension is the vocabulary."""


def problem(shape, dtype=torch.float64, seed=0, ignored=0.3):
    generator = torch.Generator().manual_seed(seed)
    student = (3 * torch.randn(shape, generator=generator)).to(dtype)
    teacher = (3 * torch.randn(shape, generator=generator)).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=generator)
    return student, teacher, labels.masked_fill(torch.rand(shape[:-1], generator=generator) < ignored, -100)


def reference(student, teacher, labels, kd_weight, ce_weight, T, kind="forward_kl", num_items=None):
    """(total, ce, kd, gradient) in float64 by autograd, straight from the definitions."""
    z = student.double().detach().requires_grad_()
    valid = labels != -100
    count = max(int(valid.sum()), 1) if num_items is None else num_items
    ce = F.cross_entropy(z[valid], labels[valid], reduction="sum") / count
    kd = torch.zeros((), dtype=torch.float64)
    if teacher is not None:
        p, q = F.log_softmax(z[valid] / T, -1), F.log_softmax(teacher[valid].double() / T, -1)
        a, b = (q, p) if kind == "forward_kl" else (p, q)
        kd = T**2 * (a.exp() * (a - b)).sum() / count
    total = kd_weight * kd + ce_weight * ce
    total.backward()
    return total.item(), ce.item(), kd.item(), z.grad


def run(student, teacher, labels, scale=1.0, **options):
    """(loss, gradient) of logits that came out of something, as in a model."""
    leaf = student.detach().clone().requires_grad_()
    loss = distillation_loss(leaf * 1, teacher, labels, **options)
    (scale * loss.total).backward()
    return loss, leaf.grad


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_autograd(shape, dtype, kind, inplace):
    student, teacher, labels = problem(shape, dtype)
    total, ce, kd, gradient = reference(student, teacher, labels, 0.7, 0.4, 2.0, kind)
    loss, grad = run(
        student, teacher, labels, kd_weight=0.7, ce_weight=0.4, temperature=2.0, kind=kind, inplace=inplace
    )
    close = 1e-12 if dtype == torch.float64 else 1e-5
    assert [x.item() for x in (loss.total, loss.ce, loss.kd)] == pytest.approx([total, ce, kd], rel=close, abs=close)
    assert not loss.ce.requires_grad and not loss.kd.requires_grad
    assert grad.dtype == dtype and grad.shape == student.shape
    # Rounded twice, as it is stored and as it is scaled, from sums in float32 or better.
    rounding = torch.finfo(dtype).eps * gradient.abs() + 2.0**-24 * (dtype == torch.float16)
    assert ((grad.double() - gradient).abs() <= rounding + close / 10).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_closed_form_is_the_derivative(kind):
    student, teacher, labels = problem((4, 6))
    top = TopK(*reversed(F.log_softmax(teacher / 1.5, -1).topk(3)))
    for taught in (teacher, top):

        def total(z, taught=taught):
            return distillation_loss(
                z, taught, labels, kd_weight=0.7, ce_weight=0.4, temperature=1.5, kind=kind, inplace=False
            ).total

        z = student.clone().requires_grad_()
        (analytic,) = torch.autograd.grad(total(z), z)
        with torch.no_grad():
            for i in range(student.numel()):
                step = torch.zeros_like(student)
                step.view(-1)[i] = 1e-6
                numeric = (total(student + step) - total(student - step)) / 2e-6
                assert analytic.view(-1)[i].item() == pytest.approx(numeric.item(), abs=1e-8)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_a_student_that_is_its_teacher_stays(kind, dtype):
    student, _, labels = problem((5, 33), dtype)
    head = nn.Identity()
    for teacher in (student.clone(), Head(student.clone(), head)):
        loss, grad = run(student, teacher, labels, kd_weight=1.0, ce_weight=0.0, temperature=2.0, kind=kind)
        assert loss.kd.item() == 0 and loss.total.item() == 0 and not grad.any()


def test_temperature_squared_keeps_the_size_of_the_gradient():
    # At small logits KL(q || p) is |zt - zs|^2 / 2V T^2 (centred): T^2 KL does not depend on T.
    student, teacher, labels = problem((6, 50), ignored=0)
    student, teacher = 1e-3 * student, 1e-3 * teacher
    gap = (teacher - student) - (teacher - student).mean(-1, keepdim=True)
    expected = gap.square().mean(-1).mean() / 2
    for T in (1.0, 2.0, 8.0):
        loss, grad = run(student, teacher, labels, kd_weight=1.0, ce_weight=0.0, temperature=T)
        assert loss.kd.item() == pytest.approx(expected.item(), rel=1e-2)
        torch.testing.assert_close(grad, -gap / 50 / 6, rtol=1e-2, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [1, 4, 5, 14, 15, 1000])
def test_the_size_of_chunks_changes_nothing(chunk_tokens, kind):
    student, teacher, labels = problem((3, 5, 21), torch.float32)
    options = dict(kd_weight=0.7, ce_weight=0.4, temperature=2.0, kind=kind)
    top = TopK(*reversed(F.log_softmax(teacher / 2, -1).topk(4)))
    for taught in (teacher, Head(teacher, nn.Identity()), top, None):
        whole, whole_grad = run(student, taught, labels, chunk_tokens=15, **options)
        loss, grad = run(student, taught, labels, chunk_tokens=chunk_tokens, **options)
        assert torch.equal(grad, whole_grad)
        assert loss.total.item() == pytest.approx(whole.total.item(), rel=1e-6)


def test_chunks_of_a_head_meet_their_own_tokens():
    torch.manual_seed(0)
    student, _, labels = problem((3, 5, 21))
    hidden, head = torch.randn(3, 5, 8, dtype=torch.float64), nn.Linear(8, 21, dtype=torch.float64)
    seen = []
    head.register_forward_hook(lambda module, args, output: seen.append((len(args[0]), output.requires_grad)))
    total, _, _, gradient = reference(student, head(hidden).detach(), labels, 0.7, 0.4, 2.0)
    seen.clear()
    loss, grad = run(student, Head(hidden, head), labels, kd_weight=0.7, ce_weight=0.4, temperature=2.0, chunk_tokens=4)
    assert seen == [(4, False), (4, False), (4, False), (3, False)]
    assert loss.total.item() == pytest.approx(total) and head.weight.grad is None
    torch.testing.assert_close(grad, gradient)


@pytest.mark.parametrize("make", [
    lambda x: x[:, :-1],
    lambda x: x[:, ::2],
    lambda x: x.transpose(0, 1),
    lambda x: x.transpose(-1, -2),
    lambda x: x[..., 1:],
    lambda x: x[0],
    lambda x: x[0, 0],
])  # fmt: skip
@pytest.mark.parametrize("inplace", [True, False])
def test_views_of_logits(make, inplace):
    student, teacher, _ = problem((3, 6, 21))
    labels = problem(make(student).shape, seed=3)[2]
    total, _, _, gradient = reference(make(student), make(teacher), labels, 0.7, 0.4, 2.0)
    leaf = student.clone().requires_grad_()
    options = dict(kd_weight=0.7, ce_weight=0.4, temperature=2.0, chunk_tokens=4, inplace=inplace)
    loss = distillation_loss(make(leaf * 1), make(teacher), labels, **options)
    (gradient_of_leaf,) = torch.autograd.grad(loss.total, leaf)
    assert loss.total.item() == pytest.approx(total)
    torch.testing.assert_close(make(gradient_of_leaf), gradient)
    assert gradient_of_leaf.count_nonzero() == gradient.count_nonzero()


@pytest.mark.parametrize("scale", [1.0, 0.25, 65536.0])
def test_fp16_gradients_do_not_underflow_before_they_are_scaled(scale):
    student, teacher, labels = problem((3, 5, 105), torch.float16)
    _, _, _, gradient = reference(student, teacher, labels, 0.7, 0.4, 2.0, num_items=10_000_000)
    _, grad = run(
        student, teacher, labels, scale=scale, kd_weight=0.7, ce_weight=0.4, temperature=2.0, num_items=10_000_000
    )
    smallest = 2.0**-24
    assert ((grad.double() - scale * gradient).abs() <= 3e-3 * scale * gradient.abs() + 1.01 * smallest).all()
    if scale > 1:
        assert grad.any()


@pytest.mark.parametrize("num_items", [40, torch.tensor(40), torch.tensor(40.0)])
def test_num_items_divides_the_sums(num_items):
    student, teacher, labels = problem((3, 5, 21))
    total, ce, kd, gradient = reference(student, teacher, labels, 0.7, 0.4, 2.0, num_items=40)
    loss, grad = run(student, teacher, labels, kd_weight=0.7, ce_weight=0.4, temperature=2.0, num_items=num_items)
    assert [x.item() for x in (loss.total, loss.ce, loss.kd)] == pytest.approx([total, ce, kd])
    torch.testing.assert_close(grad, gradient)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_counts_where_all_labels_are_ignored(kind):
    student, teacher, labels = problem((3, 5, 21), ignored=2)
    student[0, 0, 0], teacher[0, 1, 2] = math.inf, math.nan
    for taught in (teacher, TopK(*reversed(teacher.topk(3))), None):
        loss, grad = run(student, taught, labels, kd_weight=0.7, ce_weight=0.4, temperature=2.0, kind=kind)
        assert (loss.total.item(), loss.ce.item(), loss.kd.item()) == (0, 0, 0) and not grad.any()


@pytest.mark.parametrize("kind", KINDS)
def test_impossible_tokens(kind):
    student, teacher, labels = problem((4, 9), ignored=0)
    student[:, 3] = teacher[:, 3] = -math.inf  # impossible for both: as if it were not there
    labels[labels == 3] = 0
    rest = [0, 1, 2, 4, 5, 6, 7, 8]
    fewer = labels - (labels > 3).long()
    total, _, _, gradient = reference(student[:, rest], teacher[:, rest], fewer, 0.7, 0.4, 2.0, kind)
    loss, grad = run(student, teacher, labels, kd_weight=0.7, ce_weight=0.4, temperature=2.0, kind=kind)
    assert loss.total.item() == pytest.approx(total)
    torch.testing.assert_close(grad[:, rest], gradient)
    assert not grad[:, 3].any()


def test_not_a_number_shows():
    student, teacher, labels = problem((4, 9), ignored=0)
    student[2, 5] = math.nan
    assert run(student, teacher, labels, kd_weight=1.0, ce_weight=1.0, temperature=2.0)[0].total.isnan()
    student[2, 5], teacher[1, 1] = 0, math.nan
    loss, _ = run(student, teacher, labels, kd_weight=1.0, ce_weight=1.0, temperature=2.0)
    assert loss.total.isnan() and loss.ce.isfinite()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_all_tokens_kept_is_the_exact_divergence(dtype, kind):
    student, teacher, labels = problem((3, 5, 21), dtype)
    top = TopK(*reversed(F.log_softmax(teacher / 2, -1).topk(21)))
    options = dict(kd_weight=0.7, ce_weight=0.4, temperature=2.0, kind=kind)
    exact, exact_grad = run(student, teacher, labels, **options)
    loss, grad = run(student, top, labels, **options)
    torch.testing.assert_close(loss.total, exact.total)
    torch.testing.assert_close(grad, exact_grad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [1, 4, 20])
def test_the_other_tokens_are_one(k, kind):
    T = 2.0
    student, teacher, labels = problem((6, 21))
    log_q, ids = F.log_softmax(teacher / T, -1).topk(k)
    z = student.clone().requires_grad_()
    valid = labels != -100
    q = F.softmax(teacher / T, -1)
    is_top = torch.zeros_like(q, dtype=torch.bool).scatter(1, ids, True)

    def buckets(p):  # every token on its own, if it is in the top; those that are not, together
        return torch.cat((torch.where(is_top, p, 0), torch.where(is_top, 0, p).sum(-1, keepdim=True)), -1)

    a, b = buckets(q), buckets(F.softmax(z / T, -1))
    a, b = (a, b) if kind == "forward_kl" else (b, a)
    terms = torch.where(a > 0, a * (a.clamp(min=1e-300).log() - b.clamp(min=1e-300).log()), 0)
    expected = (T**2 * terms.sum(-1))[valid].mean()
    expected.backward()
    loss, grad = run(student, TopK(ids, log_q), labels, kd_weight=1.0, ce_weight=0.0, temperature=T, kind=kind)
    assert loss.kd.item() == pytest.approx(expected.item(), rel=1e-6)
    torch.testing.assert_close(grad, z.grad, rtol=1e-5, atol=1e-8)
    exact, _ = run(student, teacher, labels, kd_weight=1.0, ce_weight=0.0, temperature=T, kind=kind)
    assert loss.kd <= exact.kd + 1e-12  # merging classes never raises a divergence


def test_top_k_of_one_certain_token():
    student, _, labels = problem((4, 9), torch.float32, ignored=0)
    sure = TopK(torch.full((4, 1), 2), torch.zeros(4, 1))  # the others have no probability left
    loss, grad = run(student, sure, labels, kd_weight=1.0, ce_weight=0.0, temperature=1.0)
    expected, expected_grad = run(student, None, torch.full((4,), 2), kd_weight=0.0, ce_weight=1.0, temperature=1.0)
    assert loss.kd.item() == pytest.approx(expected.ce.item(), rel=1e-4)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64])
def test_a_cache_in_half_precision(id_dtype):
    student, teacher, labels = problem((3, 5, 105), torch.float32)
    log_q, ids = F.log_softmax(teacher / 2, -1).topk(64)
    options = dict(kd_weight=1.0, ce_weight=0.0, temperature=2.0)
    exact, _ = run(student, TopK(ids, log_q), labels, **options)
    loss, _ = run(student, TopK(ids.to(id_dtype), log_q.half()), labels, **options)
    assert loss.kd.item() == pytest.approx(exact.kd.item(), rel=1e-3)


class Allocations(TorchDispatchMode):
    """Storages of at least `size` elements that operations inside made."""

    def __init__(self, size):
        super().__init__()
        self.size, self.known, self.made = size, set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        before = {x.untyped_storage().data_ptr() for x in _tensors((args, kwargs))}
        out = function(*args, **(kwargs or {}))
        for x in _tensors(out):
            if x.untyped_storage().nbytes() >= self.size * 2 and x.untyped_storage().data_ptr() not in before:
                self.made.append((str(function), tuple(x.shape)))
        return out


def _tensors(tree):
    return [x for x in torch.utils._pytree.tree_leaves(tree) if isinstance(x, torch.Tensor)]


@pytest.mark.parametrize("taught", ["head", "top k", "logits"])
def test_logits_exist_once(taught):
    tokens, d, V = 64, 8, 301
    torch.manual_seed(0)
    hidden = torch.randn(4, 16, d, dtype=torch.bfloat16, requires_grad=True)
    lm_head, teacher_head = (nn.Linear(d, V, bias=False, dtype=torch.bfloat16) for _ in range(2))
    labels = torch.randint(0, V, (4, 16))
    teacher = {
        "head": lambda: Head(hidden.detach(), teacher_head),
        "top k": lambda: TopK(torch.arange(5).expand(4, 16, 5), torch.full((4, 16, 5), -3.0)),
        "logits": lambda: torch.randn(4, 16, V).bfloat16(),
    }[taught]()
    with Allocations(tokens * V) as allocations:
        logits = lm_head(hidden)
        loss = distillation_loss(logits, teacher, labels, kd_weight=1.0, ce_weight=1.0, temperature=2.0, chunk_tokens=8)
        loss.total.backward()
    assert len(allocations.made) == 1, allocations.made  # by the student's head
    assert hidden.grad.any() and lm_head.weight.grad.any() and teacher_head.weight.grad is None
    with Allocations(tokens * V) as allocations:
        distillation_loss(
            lm_head(hidden),
            teacher,
            labels,
            kd_weight=1.0,
            ce_weight=1.0,
            temperature=2.0,
            chunk_tokens=8,
            inplace=False,
        ).total.backward()
    assert len(allocations.made) == 2, allocations.made  # the test sees what is allocated


@pytest.mark.parametrize("kind", KINDS)
def test_without_gradient_logits_stay(kind):
    student, logits, labels = problem((3, 5, 21), torch.float32)
    options = dict(kd_weight=0.7, ce_weight=0.4, temperature=2.0, kind=kind)
    for teacher in (logits, TopK(*reversed(F.log_softmax(logits / 2, -1).topk(4))), None):
        expected, _ = run(student, teacher, labels, **options)
        kept, leaf = student.clone(), student.clone().requires_grad_()
        plain = distillation_loss(student, teacher, labels, **options)
        with torch.no_grad():
            evaluated = distillation_loss(leaf, teacher, labels, **options)
        with torch.inference_mode():
            inferred = distillation_loss(student, teacher, labels, **options)
        assert torch.equal(student, kept) and torch.equal(leaf, kept) and not plain.total.requires_grad
        for loss in (plain, evaluated, inferred):
            assert torch.equal(loss.total, expected.total)


def test_with_inplace_false_logits_stay():
    student, teacher, labels = problem((3, 5, 21))
    logits = student.clone().requires_grad_()
    loss = distillation_loss(logits, teacher, labels, kd_weight=1.0, ce_weight=0.0, temperature=1.0, inplace=False)
    loss.total.backward()
    assert torch.equal(logits, student) and logits.grad.any()


def test_an_activation_that_needs_its_output_is_told():
    student, teacher, labels = problem((3, 5, 21))
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(torch.tanh(leaf), teacher, labels, kd_weight=1.0, ce_weight=0.0, temperature=1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total.backward()


def test_a_second_backward_pass_is_refused():
    student, teacher, labels = problem((3, 5, 21))
    leaf = student.clone().requires_grad_()
    loss = distillation_loss(leaf * 1, teacher, labels, kd_weight=1.0, ce_weight=0.0, temperature=1.0)
    loss.total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.total.backward()


def test_it_trains():
    torch.manual_seed(0)
    teacher = nn.Linear(8, 21)
    student = copy.deepcopy(teacher)
    nn.init.normal_(student.weight)
    optimizer = torch.optim.Adam(student.parameters(), 0.05)
    x, losses = torch.randn(64, 8), []
    for _ in range(200):
        loss = distillation_loss(
            student(x),
            Head(x, teacher),
            torch.zeros(64, dtype=torch.long),
            kd_weight=1.0,
            ce_weight=0.0,
            temperature=2.0,
        )
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
        losses.append(loss.kd.item())
    assert losses[-1] < 0.01 * losses[0]


def test_square_head_is_a_sum_of_relative_errors():
    torch.manual_seed(0)
    student = [torch.randn(2, 3, 4, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)]
    teacher = [10.0**i * torch.randn(2, 3, 4, requires_grad=True) for i in range(3)]
    expected = sum(
        F.mse_loss(s.double(), t.double()) / (t.double().square().mean() + 0.5)
        for s, t in zip(student, teacher, strict=True)
    )
    loss = square_head(student, teacher, eps=0.5)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx(expected.item(), rel=1e-5)
    gradients = torch.autograd.grad(loss, student, retain_graph=True)
    for gradient, other in zip(gradients, torch.autograd.grad(expected, student), strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-2, atol=1e-4)
    assert torch.autograd.grad(loss, teacher, allow_unused=True) == (None, None, None)
    assert square_head([torch.zeros(2, 3)], [torch.zeros(2, 3)]).item() == 0
    assert square_head(teacher, teacher).item() == 0


@pytest.mark.parametrize("student,teacher", [([], []), ([(2, 3)], [(2, 4)]), ([(2, 3)], [(2, 3), (2, 3)])])
def test_square_head_wants_the_same_blocks(student, teacher):
    with pytest.raises(ValueError, match="pass the same blocks of both"):
        square_head([torch.zeros(s) for s in student], [torch.zeros(s) for s in teacher])


GOOD = dict(kd_weight=0.7, ce_weight=0.4, temperature=2.0)


@pytest.mark.parametrize(
    "option,match",
    [
        ({"kd_weight": -1.0}, "kd_weight=-1.0 must be"),
        ({"ce_weight": math.nan}, "ce_weight=nan must be"),
        ({"temperature": 0.0}, "temperature=0.0 must be"),
        ({"temperature": math.inf}, "temperature=inf must be"),
        ({"kind": "backward"}, "kind='backward' must be one of forward_kl, reverse_kl"),
        ({"chunk_tokens": 0}, "chunk_tokens=0 must be"),
        ({"num_items": 0}, "num_items=0 must be"),
    ],
)
def test_options_out_of_range(option, match):
    student, teacher, labels = problem((3, 5, 21))
    with pytest.raises(ValueError, match=match):
        distillation_loss(student, teacher, labels, **{**GOOD, **option})


@pytest.mark.parametrize(
    "teacher,match",
    [
        (lambda: torch.zeros(3, 5, 22), "teacher's vocabulary has 22 tokens, the student's 21"),
        (lambda: Head(torch.zeros(3, 5, 4), nn.Linear(4, 22)), "teacher's vocabulary has 22 tokens, the student's 21"),
        (lambda: Head(torch.zeros(3, 5, 4), lambda x: x), "teacher's vocabulary has 4 tokens, the student's 21"),
        (lambda: TopK(torch.zeros(3, 5, 22).long(), torch.zeros(3, 5, 22)), "vocabulary has 22"),
        (lambda: TopK(torch.full((3, 5, 2), 21), torch.zeros(3, 5, 2)), "from 21 to 21"),
        (lambda: TopK(torch.zeros(3, 5, 2).long(), torch.zeros(3, 5, 1)), "must be alike"),
        (lambda: torch.zeros(3, 4, 21), r"the teacher has \(3, 4\) tokens, the student \(3, 5\)"),
        (lambda: nn.Linear(2, 2), "teacher is Linear: pass logits, Head, TopK or None"),
    ],
)
def test_a_teacher_that_does_not_fit_changes_nothing(teacher, match):
    student, _, labels = problem((3, 5, 21), torch.float32)
    logits = student.clone().requires_grad_()
    with pytest.raises(ValueError, match=match):
        distillation_loss(logits, teacher(), labels, **GOOD)
    assert torch.equal(logits, student)


@pytest.mark.parametrize(
    "labels,match",
    [
        (torch.zeros(3, 4, dtype=torch.long), "one label per token"),
        (torch.full((3, 5), 21), "labels go from 21 to 21, the vocabulary has 21 tokens"),
        (torch.full((3, 5), -1), "labels go from -1 to -1"),
    ],
)
def test_labels_that_do_not_fit(labels, match):
    student, teacher, _ = problem((3, 5, 21))
    with pytest.raises(ValueError, match=match):
        distillation_loss(student, teacher, labels, **GOOD)


def test_a_teacher_of_weight_zero_is_not_asked():
    def head(hidden):
        raise AssertionError("the teacher was asked")

    student, _, labels = problem((3, 5, 21))
    loss = distillation_loss(
        student, Head(torch.zeros(3, 5, 4), head), labels, kd_weight=0.0, ce_weight=1.0, temperature=2.0
    )
    assert loss.kd.item() == 0 and loss.total.item() == loss.ce.item() > 0
