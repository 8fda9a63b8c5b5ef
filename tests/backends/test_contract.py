"""What every backend promises, over the table: right to float64, exact both ways, and "no" in words."""

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from sparsekit_kernels import layout24, target

from sparsekit import SparseLinear, Unsupported
from sparsekit.backends import BACKENDS, resolve
from sparsekit.formats import FORMATS, WeightSpec

INTERPRETED = target.INTERPRETED
HAS_GPU = not INTERPRETED and target.why_not("cuda") is None
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (3, 7), (64, 64), (17, 130), (96, 512), (8, 1025)]


def device_of(name):
    return torch.device("cuda" if HAS_GPU and name in ("triton", "cusparselt") else "cpu")


def runnable():
    return [
        pytest.param(name, format, dtype, id=f"{name}-{format}-{str(dtype).removeprefix('torch.')}")
        for name, backend in BACKENDS.items()
        for format in backend.formats
        for dtype in DTYPES
        if backend.why_not(WeightSpec(format, 64, 64, dtype), device_of(name)) is None
        and (not INTERPRETED or name == "triton")
    ]


def weight24(N, K, dtype, device):
    scores = F.pad(torch.rand(N, K, device=device), (0, -K % 4), value=-1.0).view(N, -1, 4)
    keep = (scores.argsort(-1).argsort(-1) >= 2).view(N, -1)[:, :K] & (torch.rand(N, K, device=device) > 0.05)
    keep[1:2] = False
    return torch.where(keep, torch.randn(N, K, device=device), 0.0).to(dtype)


def max_err(out, ref64):
    return (out.double() - ref64).abs().max().item()


def assert_as_good_as_dense(out, dense, ref64):
    assert out.dtype == dense.dtype and out.shape == dense.shape
    limit = 2 * max_err(dense, ref64) + 1e-5 * ref64.abs().max().item()
    assert out.isfinite().all(), "not finite"
    assert max_err(out, ref64) <= limit, f"error {max_err(out, ref64):.3g} > {limit:.3g}"


@pytest.mark.parametrize("N,K", SHAPES)
@pytest.mark.parametrize("name,format,dtype", runnable())
def test_as_good_as_dense(name, format, dtype, N, K):
    torch.manual_seed(0)
    backend, device = BACKENDS.get(name), device_of(name)
    packed = FORMATS.get(format).pack(weight24(N, K, dtype, device))
    if reason := backend.why_not(packed.spec, device):
        pytest.skip(reason)
    w = FORMATS.get(format).unpack(packed)
    kind = FORMATS.get(format)
    # What is on a grid is exact in fp32; `w` has been rounded once more, as the dense product's weight must be.
    exact = w.double() if kind.lossless else kind.unpack(kind.cast(packed, torch.float32)).double()
    prepared = backend.prepare(packed)
    for M in (1, 3, 17) if INTERPRETED else (1, 3, 17, 64, 130):
        x = torch.randn(M, K, device=device).to(dtype)
        for bias in (None, torch.randn(N, device=device).to(dtype)):
            out = backend.linear(x, prepared, bias, packed.spec)
            ref64 = F.linear(x.double(), exact, None if bias is None else bias.double())
            assert_as_good_as_dense(out, F.linear(x, w, bias), ref64)


@pytest.mark.parametrize("name,format,dtype", runnable())
def test_the_criterion_sees_a_planted_fault(name, format, dtype):
    """One group of one row reversed, one row unwritten, the bias forgotten: each turns the test above red."""
    torch.manual_seed(0)
    N, K, device = 64, 64, device_of(name)
    backend, w = BACKENDS.get(name), weight24(N, K, dtype, device_of(name))
    w[5, :4] = torch.tensor([1.0, -2.0, 0, 0])
    bias, x = torch.randn(N, device=device).to(dtype), torch.randn(9, K, device=device).to(dtype)
    w = FORMATS.get(format).unpack(FORMATS.get(format).pack(w))
    dense, ref64 = F.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double())
    wrong = w.clone()
    wrong[5, :4] = w[5, :4].flip(0)
    packed = FORMATS.get(format).pack(wrong)
    prepared = backend.prepare(packed)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good_as_dense(backend.linear(x, prepared, bias, packed.spec), dense, ref64)
    right = FORMATS.get(format).pack(w)
    with pytest.raises(AssertionError, match="error"):
        assert_as_good_as_dense(backend.linear(x, backend.prepare(right), None, right.spec), dense, ref64)


@pytest.mark.parametrize("N,K", SHAPES)
@pytest.mark.parametrize("name,format,dtype", runnable())
def test_prepare_and_restore_are_inverse(name, format, dtype, N, K):
    torch.manual_seed(0)
    backend, device = BACKENDS.get(name), device_of(name)
    w = weight24(N, K, dtype, device)
    packed = FORMATS.get(format).pack(w)
    if reason := backend.why_not(packed.spec, device):
        pytest.skip(reason)
    kept = {part: tensor.clone() for part, tensor in packed.tensors.items()}
    prepared = backend.prepare(packed)
    restored = backend.restore(packed.spec, prepared)
    assert restored.spec == packed.spec and list(restored.tensors) == list(packed.tensors)
    for part, tensor in kept.items():
        assert torch.equal(restored.tensors[part].view(torch.uint8), tensor.view(torch.uint8)), part
        assert torch.equal(packed.tensors[part].view(torch.uint8), tensor.view(torch.uint8)), "prepare wrote into it"
    assert torch.equal(backend.to_dense(packed.spec, prepared), FORMATS.get(format).unpack(packed))
    if format == "semi24":
        values, meta = layout24.compress24(w)
        assert torch.equal(restored.tensors["values"], values) and torch.equal(restored.tensors["meta"], meta)


@pytest.mark.parametrize("name,format,dtype", runnable())
def test_no_tokens_and_leading_dimensions(name, format, dtype):
    backend, device = BACKENDS.get(name), device_of(name)
    packed = FORMATS.get(format).pack(weight24(64, 64, dtype, device))
    prepared = backend.prepare(packed)
    for shape in ((0, 64), (2, 0, 64), (64,), (2, 3, 64)):
        out = backend.linear(torch.ones(*shape, device=device).to(dtype), prepared, None, packed.spec)
        assert out.shape == (*shape[:-1], 64) and out.dtype == dtype and out.isfinite().all()


@pytest.mark.parametrize("name,format,dtype", runnable())
def test_a_layer_by_name(name, format, dtype):
    w = weight24(64, 64, dtype, device_of(name))
    layer = SparseLinear.from_dense(w, format=format, backend=name)
    w = layer.to_dense()
    assert layer.backend == name and layer.reasons == {}
    x = torch.randn(5, 64, device=w.device).to(dtype)
    assert_as_good_as_dense(layer(x), F.linear(x, w), F.linear(x.double(), w.double()))
    assert isinstance(BACKENDS.get(name).kernel(layer.spec, 1), str)


def test_auto_takes_the_first_that_can_and_keeps_the_other_answers():
    spec = WeightSpec("semi24", 64, 64, torch.float32)
    chosen, reasons = resolve("auto", spec, torch.device("cpu"))
    asked = list(BACKENDS)[: list(BACKENDS).index(chosen.name)]
    assert list(reasons) == asked and all(reasons.values())
    assert chosen.why_not(spec, torch.device("cpu")) is None


def test_reference_is_the_last_and_runs_anywhere():
    assert list(BACKENDS)[-1] == "reference"
    for device in ("cpu", "cuda", "meta"):
        for dtype in DTYPES:
            assert BACKENDS.get("reference").why_not(WeightSpec("semi24", 3, 5, dtype), torch.device(device)) is None


@pytest.mark.parametrize("name", list(BACKENDS))
class TestNo:
    """Answers are sentences, never exceptions, and touch no device."""

    def test_to_another_format(self, name):
        answer = BACKENDS.get(name).why_not(WeightSpec("no_such", 64, 64, torch.float32), torch.device("cpu"))
        assert "no path for format 'no_such'" in answer

    @pytest.mark.parametrize("device", ["cpu", "cuda", "meta", "mps", "xpu"])
    @pytest.mark.parametrize("dtype", [*DTYPES, torch.float64, torch.int8, torch.float8_e4m3fn], ids=str)
    def test_is_a_sentence(self, name, device, dtype):
        answer = BACKENDS.get(name).why_not(WeightSpec("semi24", 10, 10, dtype), torch.device(device))
        assert answer is None or (len(answer.split()) > 3 and not answer.endswith(".")), answer

    def test_a_named_one_raises_it(self, name):
        spec = WeightSpec("no_such", 64, 64, torch.float32)
        with pytest.raises(Unsupported, match=f"backend '{name}' cannot run no_such 64x64 float32 on cpu: .*auto"):
            resolve(name, spec, torch.device("cpu"))


def test_who_cannot_run_here():
    spec, half = (WeightSpec("semi24", 64, 64, dtype) for dtype in (torch.float32, torch.float16))
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert "bfloat16 and float32, not float16" in BACKENDS.get("cpu").why_not(half, cpu)
    assert "the weight is on cuda" in BACKENDS.get("cpu").why_not(spec, cuda)
    assert "NVIDIA GPU" in BACKENDS.get("cusparselt").why_not(half, cpu)
    if not INTERPRETED:
        assert "the tensor is on cpu" in BACKENDS.get("triton").why_not(spec, cpu)
        with pytest.raises(Unsupported, match="no backend runs.*reference.*no path"):
            resolve("auto", WeightSpec("other", 64, 64, torch.float32), cpu)


@pytest.mark.skipif(INTERPRETED, reason="this is that process")
@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: triton runs on it above")
def test_triton_in_the_interpreter(pytestconfig):
    pytest.importorskip("triton", reason="Triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout
