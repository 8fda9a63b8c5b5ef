"""`kd_loss` and its torch version against float64 autograd: interpreted, as compiled PTX, and compiled for every GPU.

Without a GPU `test_in_the_interpreter` runs this file again in a process of its own, as in test_spmm24.py.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit_kernels import kd_loss as module
from sparsekit_kernels import target
from sparsekit_kernels.kd_loss import kd_loss
from sparsekit_kernels.reference import kd_loss_reference

HAS_GPU = target.why_not("cuda") is None and not target.INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WEIGHTS = dict(kd_weight=0.7, ce_weight=0.3, temperature=2.0)

runs = pytest.mark.skipif(
    not HAS_GPU and not target.INTERPRETED, reason="no GPU; test_in_the_interpreter runs this in a process of its own"
)
compiles = pytest.mark.skipif(target.INTERPRETED, reason="interpreted; the other process compiles")
both = pytest.mark.parametrize(
    "function", [pytest.param(kd_loss, marks=runs, id="kernel"), pytest.param(kd_loss_reference, id="torch")]
)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: the kernel runs on it")
@pytest.mark.skipif(target.INTERPRETED, reason="this is that process")
def test_in_the_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


def strided(x, dtype):
    """x in rows that are longer, NaN between them."""
    wide = torch.full((x.shape[0], x.shape[1] + 5), torch.nan, dtype=dtype, device=DEVICE)
    wide[:, : x.shape[1]] = x
    return wide[:, : x.shape[1]]


def problem(M, V, dtype=torch.float32, teacher_dtype=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits, teacher = (4 * torch.randn(2, M, V, generator=generator)).unbind()
    labels = torch.randint(0, V, (M,), generator=generator).to(DEVICE)
    labels[1::4] = -100
    return strided(logits, dtype), strided(teacher, teacher_dtype or dtype), labels


def truth(logits, teacher, labels, kd_weight, ce_weight, temperature, reverse=False):
    """(ce [M], kd [M], gradient [M, V]) in float64 by autograd, straight from the definitions."""
    z, counts = logits.double().detach().requires_grad_(), labels != -100
    ce = torch.where(counts, F.cross_entropy(z, labels, reduction="none", ignore_index=-100), 0)
    kd = torch.zeros_like(ce)
    if teacher is not None:
        log_p, log_q = F.log_softmax(z / temperature, -1), F.log_softmax(teacher.double() / temperature, -1)
        a, b = (log_p, log_q) if reverse else (log_q, log_p)
        kd = torch.where(counts, temperature**2 * torch.where(a.exp() > 0, a.exp() * (a - b), 0).sum(-1), 0)
    (kd_weight * kd + ce_weight * ce).sum().backward()
    return ce.detach(), kd.detach(), z.grad


def assert_right(function, logits, teacher, labels, **options):
    ce, kd, gradient = truth(logits, teacher, labels, **options)
    found_ce, found_kd = function(logits, teacher, labels, **options)
    assert found_ce.dtype == found_kd.dtype == torch.float32
    torch.testing.assert_close(found_ce.double(), ce, rtol=1e-5, atol=2e-5)
    torch.testing.assert_close(found_kd.double(), kd, rtol=1e-5, atol=1e-4)
    rounding = torch.finfo(logits.dtype).eps / 2
    if function is kd_loss and target.INTERPRETED and logits.dtype == torch.bfloat16:
        rounding *= 2  # the interpreter cuts off what does not fit
    limit = 1.01 * rounding * gradient.abs() + 1e-5 * (options["kd_weight"] + options["ce_weight"])
    excess = (logits.double() - gradient).abs() - limit
    assert (excess <= 0).all(), f"off by {excess.max():.3g} at {(~(excess <= 0)).nonzero()[:8].tolist()}"


@both
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M,V", [(5, 1), (6, 105), (2, 512), (3, 2048), (2, 4099)])
def test_matches_autograd(function, M, V, dtype, reverse):
    logits, teacher, labels = problem(M, V, dtype)
    assert_right(function, logits, teacher, labels, **WEIGHTS, reverse=reverse)


@both
@pytest.mark.parametrize("reverse", [False, True])
def test_logits_that_rise_or_fall_along_the_row(function, reverse):
    """What was summed up to a new maximum counts less from there on, in the student's row and in the teacher's."""
    _, _, labels = problem(5, 4500)
    ramp = torch.linspace(-3, 3, 4500, device=DEVICE)
    slopes = torch.tensor([[-1.0, 1.0], [1.0, 1.0], [1.0, -1.0], [2.0, 1.0], [1.0, 0.0]], device=DEVICE)
    labels[:] = torch.tensor([0, 2047, 2048, 4499, 4096])
    student, teacher = (slopes[:, n, None] * ramp for n in range(2))
    assert_right(function, student, teacher.contiguous(), labels, **WEIGHTS, reverse=reverse)


@both
@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
@pytest.mark.parametrize("kd_weight,ce_weight", [(1.0, 0.0), (0.0, 1.0), (3.0, 2.0)])
def test_weights_and_temperature(function, kd_weight, ce_weight, temperature):
    logits, teacher, labels = problem(4, 105)
    options = dict(kd_weight=kd_weight, ce_weight=ce_weight, temperature=temperature)
    assert_right(function, logits, teacher, labels, **options)


@both
def test_a_teacher_of_another_dtype_or_none(function):
    for student_dtype, teacher_dtype in [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)]:
        assert_right(function, *problem(4, 300, student_dtype, teacher_dtype), **WEIGHTS)
    logits, _, labels = problem(4, 300)
    assert_right(function, logits, None, labels, **WEIGHTS)
    _, kd = function(logits, None, labels, **WEIGHTS)
    assert not kd.any()


@both
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_student_that_is_its_teacher_stays(function, dtype, reverse):
    logits, _, labels = problem(5, 3001, dtype)
    teacher = logits.clone()
    _, kd = function(logits, teacher, labels, kd_weight=1.0, ce_weight=0.0, temperature=1.7, reverse=reverse)
    assert not kd.any() and not logits.any()


@both
@pytest.mark.parametrize("reverse", [False, True])
def test_rows_between_stay_and_nothing_is_written_unasked(function, reverse):
    logits, teacher, labels = problem(6, 105)
    kept, kept_teacher = logits.clone(), teacher.clone()
    first = function(logits, teacher, labels, **WEIGHTS, reverse=reverse, overwrite=False)
    assert torch.equal(logits, kept)
    again = function(logits, teacher, labels, **WEIGHTS, reverse=reverse)
    assert all(map(torch.equal, first, again)) and torch.equal(teacher, kept_teacher)
    whole = logits.as_strided((6, 110), (110, 1))
    assert whole[:, 105:].isnan().all() and whole[:, :105].isfinite().all()


@both
def test_ignored_tokens_count_for_nothing_whatever_they_hold(function):
    logits, teacher, labels = problem(4, 105)
    labels[:] = -100
    logits[0, 0], logits[1, 3], teacher[2, 5] = math.inf, math.nan, -math.inf
    ce, kd = function(logits, teacher, labels, **WEIGHTS)
    assert not ce.any() and not kd.any() and not logits.any()


@both
@pytest.mark.parametrize("reverse", [False, True])
def test_impossible_tokens(function, reverse):
    logits, teacher, labels = problem(4, 2100)
    impossible = torch.arange(2100, device=DEVICE) % 3 == 1
    impossible[:2050] = True  # the whole first block of the row, and more
    impossible[2060] = False
    logits[:, impossible] = teacher[:, impossible] = -math.inf
    labels[labels != -100] = 2060
    possible = ~impossible
    ce, kd, gradient = truth(
        logits[:, possible], teacher[:, possible],
        torch.where(labels == 2060, int(possible[:2060].sum()), labels), **WEIGHTS, reverse=reverse,
    )  # fmt: skip
    found_ce, found_kd = function(logits, teacher, labels, **WEIGHTS, reverse=reverse)
    torch.testing.assert_close(found_ce.double(), ce, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(found_kd.double(), kd, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits[:, possible].double(), gradient, rtol=1e-5, atol=1e-6)
    assert not logits[:, impossible].any()


@both
def test_large_logits_neither_overflow_nor_vanish(function):
    logits, teacher, labels = problem(4, 105)
    for shift in (3e4, -3e4):
        z, t = (x.clone() for x in (logits, teacher))
        z, t = (x * 2**-3 + shift for x in (z, t))
        assert_right(function, z, t, labels, **WEIGHTS)


@both
def test_what_is_not_a_number_shows_in_its_row_alone(function):
    logits, teacher, labels = problem(4, 105)
    labels[:] = 7
    logits[1, 3], teacher[2, 100] = math.nan, math.nan
    ce, kd = function(logits, teacher, labels, **WEIGHTS)
    assert ce.isnan().tolist() == [False, True, False, False]
    assert kd.isnan().tolist() == [False, True, True, False]


@runs
@pytest.mark.parametrize("label", [105, -1, 1 << 40])
def test_a_label_beyond_the_vocabulary_is_not_a_number(label):
    logits, teacher, labels = problem(2, 105)
    labels[0], labels[1] = label, 104
    ce, _ = kd_loss(logits, teacher, labels, **WEIGHTS)
    assert ce.isnan().tolist() == [True, False]


@both
def test_no_tokens(function):
    logits, teacher, labels = problem(0, 105)
    ce, kd = function(logits, teacher, labels, **WEIGHTS)
    assert ce.shape == kd.shape == (0,)


@runs
@pytest.mark.parametrize(
    "change,match",
    [
        ({"logits": torch.zeros(4, 105, dtype=torch.float64)}, "logits are torch.float64"),
        ({"teacher_logits": torch.zeros(4, 104)}, r"teacher_logits are \(4, 104\)"),
        ({"teacher_logits": torch.zeros(105, 4).T}, r"teacher_logits have strides \(1, 4\)"),
        ({"logits": torch.zeros(4, 0), "teacher_logits": None}, r"logits are \(4, 0\)"),
        ({"labels": torch.zeros(5, dtype=torch.long)}, r"labels are torch.int64 \(5,\): expected 4 integers"),
        ({"labels": torch.zeros(4)}, "labels are torch.float32"),
    ],
)
def test_what_does_not_fit_is_refused(change, match):
    good = dict(zip(("logits", "teacher_logits", "labels"), problem(4, 105), strict=True))
    change = {name: x if x is None else x.to(DEVICE) for name, x in change.items()}
    with pytest.raises(ValueError, match=match):
        kd_loss(**{**good, **change}, **WEIGHTS)


@pytest.mark.skipif(HAS_GPU or target.INTERPRETED, reason="Triton runs here")
def test_where_triton_cannot_run_it_says_so():
    with pytest.raises(RuntimeError, match="kd_loss cannot run here: needs an NVIDIA GPU"):
        kd_loss(*problem(4, 105), **WEIGHTS)


@compiles
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: the kernel runs on it")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (12, 0)])
def test_as_ptxas_gets_it(capability, tmp_path, monkeypatch):
    from tests.kernels.ptx import emulated

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    dtype = torch.bfloat16 if capability != (9, 0) else torch.float32
    with emulated(capability, order="random"):
        for reverse in (False, True):
            assert_right(kd_loss, *problem(3, 2500, dtype), **WEIGHTS, reverse=reverse)
            logits, _, labels = problem(2, 2500, dtype)
            _, kd = kd_loss(logits, logits.clone(), labels, **{**WEIGHTS, "ce_weight": 0.0}, reverse=reverse)
            assert not kd.any() and not logits.any()
        logits, _, labels = problem(5, 105, dtype)
        assert_right(kd_loss, logits, None, labels, **WEIGHTS)


@compiles
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: the kernel runs on it")
def test_the_loss_of_training_runs_the_kernel(tmp_path, monkeypatch):
    from sparsekit.train import distill
    from tests.kernels.ptx import emulated

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    logits, teacher, labels = problem(10, 105)
    losses, gradients = [], []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        with emulated((9, 0)) as counts:
            loss = distill.distillation_loss(leaf * 1, teacher, labels, **WEIGHTS, chunk_tokens=4)
            loss.total.backward()
        losses.append(loss.total)
        gradients.append(leaf.grad)
        assert bool(counts) == (len(losses) == 2)
        monkeypatch.setattr(distill, "_kernel", lambda logits, teacher_logits: kd_loss)
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients, rtol=1e-5, atol=1e-7)


@compiles
@pytest.mark.parametrize("capability", [80, 90, 120])
@pytest.mark.parametrize("dtype,V,reverse", [("bf16", 128256, False), ("fp32", 50257, True), ("bf16", 105, True)])
def test_it_compiles_without_spills(dtype, V, reverse, capability, tmp_path, monkeypatch):
    from tests.kernels.test_compile_targets import assert_fits, compile_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    numbers = ("temperature", "kd_weight", "ce_weight")
    pointers = {"z_ptr": f"*{dtype}", "t_ptr": f"*{dtype}", "labels_ptr": "*i64", "ce_ptr": "*fp32", "kd_ptr": "*fp32"}
    block = 128 if V == 105 else module.MOST_AT_ONCE
    constants = {"V": V, "HAS_TEACHER": True, "REVERSE": reverse, "OVERWRITE": True, "BLOCK": block}
    unaligned = {*numbers, *(() if V % 16 == 0 else ("stride_zm", "stride_tm"))}
    kernel = compile_kernel(
        module._kd_loss_kernel, pointers | dict.fromkeys(numbers, "fp32"), constants, capability,
        max(block // 256, 1), unaligned=unaligned,
    )  # fmt: skip
    sass = assert_fits(kernel, capability, tmp_path)
    assert V % 16 or ("LDG.E.128" in sass and "STG.E.128" in sass), "no 16-byte loads and stores"
