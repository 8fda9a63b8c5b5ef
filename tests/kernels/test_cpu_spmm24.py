"""The CPU kernel against torch's dense product in float64, for every instruction set this machine has."""

import importlib.util
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from sparsekit_kernels import cpu, layout24
from sparsekit_kernels.cpu import build

REASON = cpu.why_not()
pytestmark = pytest.mark.skipif(REASON is not None, reason=REASON or "runs here")
DTYPES = (torch.bfloat16, torch.float32)
TOKENS = (0, 1, 2, 3, 5, 6, 7, 8, 12, 13, 15, 16, 17, 33, 64, 65, 130)


@pytest.fixture(params=cpu.ISAS)
def isa(request, monkeypatch):
    """Run the test on this instruction set."""
    monkeypatch.delenv("SPARSEKIT_CPU_ISA", raising=False)
    _forget()
    if cpu.ISAS.index(request.param) > cpu.ISAS.index(cpu.isa()):
        pytest.skip(f"this processor has no {request.param}")
    monkeypatch.setenv("SPARSEKIT_CPU_ISA", request.param)
    _forget()
    yield request.param
    monkeypatch.undo()
    _forget()


@pytest.fixture
def threads():
    """Change torch's number of threads, and change it back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def _forget():
    cpu.isa.cache_clear()
    cpu._spmm24.cache_clear()


def weight24(N, K, dtype, density=1.0):
    """A random 2:4 weight; with density below 1, groups with one or no non-zero too."""
    Kp = layout24.padded_features(K)
    keep = torch.rand(N, Kp // 4, 4).argsort(-1) < 2
    keep &= torch.rand(N, Kp // 4, 4) < density
    return (torch.randn(N, Kp // 4, 4) * keep).view(N, Kp)[:, :K].contiguous().to(dtype)


def prepared(w):
    return cpu.prepare(*layout24.compress24(w))


def assert_as_good_as_dense(out, dense, ref64):
    """`out` may be at most twice as far from the fp64 answer as torch's own dense result in the same dtype."""
    assert out.shape == dense.shape and out.dtype == dense.dtype
    if out.numel() == 0:
        return
    limit = 2 * (dense.double() - ref64).abs().max() + 1e-5 * ref64.abs().max()
    error = (out.double() - ref64).abs().max()
    assert out.isfinite().all(), "not finite"
    assert error <= limit, f"error {error:.3g} > {limit:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N,K",
    [(1, 1), (3, 2), (17, 5), (130, 63), (17, 72), (1, 172), (130, 352), (3, 512), (17, 4096), (33, 8200), (64, 64)],
)
def test_matches_dense(N, K, dtype, isa):
    torch.manual_seed(0)
    w = weight24(N, K, dtype, density=0.9)
    blocks = prepared(w)
    for M in TOKENS:
        for bias in (None, torch.randn(N).to(dtype)):
            x = torch.randn(M, K).to(dtype)
            ref64 = x.double() @ w.double().T + (0 if bias is None else bias.double())
            assert_as_good_as_dense(cpu.spmm24(x, *blocks, N, bias), F.linear(x, w, bias), ref64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_tokens_are_cut_into_blocks(dtype, isa):
    w, x = weight24(40, 136, dtype), torch.randn(1100, 136).to(dtype)
    ref64 = x.double() @ w.double().T
    assert_as_good_as_dense(cpu.spmm24(x, *prepared(w), 40), F.linear(x, w), ref64)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_for_any_number_of_tokens_and_threads(dtype, isa, threads):
    torch.manual_seed(1)
    N, K = 300, 4500
    blocks, x = prepared(weight24(N, K, dtype)), torch.randn(70, K).to(dtype)
    threads(1)
    one = cpu.spmm24(x, *blocks, N)
    threads(2)
    assert torch.equal(cpu.spmm24(x, *blocks, N), one)
    for M in (1, 4, 6, 7, 13):
        assert torch.equal(cpu.spmm24(x[:M], *blocks, N), one[:M])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_layout_of_x(dtype, isa):
    w = weight24(24, 64, dtype)
    blocks = prepared(w)
    base = torch.randn(6, 5, 2 * 64).to(dtype)
    for x in (base[..., :64], base[..., ::2], base[:, 2, 1:65], base[0, :, :64].T.contiguous().T, base[0, 0, 3:67]):
        out = cpu.spmm24(x, *blocks, 24)
        assert_as_good_as_dense(out, F.linear(x, w), x.double() @ w.double().T)
        assert out.is_contiguous()
    assert cpu.spmm24(base[:0, :, :64], *blocks, 24).shape == (0, 5, 24)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_infinities_and_nan_spread_as_in_a_dense_product(dtype, isa):
    w = weight24(19, 70, dtype)
    for M in (3, 20):
        x = torch.randn(M, 70).to(dtype)
        x[1, 69], x[2, 3] = float("inf"), float("nan")
        out, dense = cpu.spmm24(x, *prepared(w), 19), F.linear(x.float(), w.float())
        assert torch.equal(out.isnan(), dense.isnan()) and torch.equal(out.isinf(), dense.isinf())
        assert out[0].isfinite().all() and not out[1:3].isfinite().any()


def test_zero_weight_gives_the_bias(isa):
    bias = torch.randn(9)
    out = cpu.spmm24(torch.randn(4, 40), *prepared(torch.zeros(9, 40)), 9, bias)
    assert torch.equal(out, bias.expand(4, 9))


@pytest.mark.parametrize("dtype", [torch.float16, *DTYPES], ids=str)
@pytest.mark.parametrize("N,K", [(1, 1), (3, 5), (8, 8), (17, 63), (130, 172), (64, 352)])
def test_packing_is_exact(N, K, dtype):
    torch.manual_seed(2)
    for density in (1.0, 0.5, 0.0):
        w = weight24(N, K, dtype, density)
        w[torch.rand(N, K) < 0.1] *= -0.0  # minus zeros among the zeros
        values, meta = layout24.compress24(w)
        fast_values, fast_meta = cpu.compress24(w)
        assert torch.equal(fast_values.view(torch.uint8), values.view(torch.uint8)) and torch.equal(fast_meta, meta)
        if dtype == torch.float16:
            continue
        blocks = cpu.prepare(values, meta)
        back = cpu.restore(*blocks, N)
        assert torch.equal(back[0].view(torch.uint8), values.view(torch.uint8)) and torch.equal(back[1], meta)


def test_prepared_bytes():
    for dtype, share in ((torch.bfloat16, 9 / 16), (torch.float32, 17 / 32)):
        w = weight24(64, 256, dtype)
        assert sum(t.nbytes for t in prepared(w)) == w.nbytes * share


def test_compress_reads_rows_at_any_stride():
    w = weight24(6, 40, torch.float32)
    wide = torch.full((6, 64), 7.0)
    wide[:, 3:43] = w
    for view in (wide[:, 3:43], w.T.contiguous().T):
        assert torch.equal(cpu.compress24(view)[0], layout24.compress24(w)[0])


def test_mistakes_are_told():
    w = weight24(8, 16, torch.float32)
    values, meta = layout24.compress24(w)
    blocks = cpu.prepare(values, meta)
    x = torch.randn(2, 16)
    with pytest.raises(ValueError, match="1 groups of four have more than two non-zeros"):
        cpu.compress24(torch.tensor([[1.0, 2.0, 3.0, 0.0]]))
    with pytest.raises(ValueError, match="matrix"):
        cpu.compress24(torch.zeros(4))
    with pytest.raises(ValueError, match="not legal"):
        cpu.prepare(values, meta * 0)
    with pytest.raises(ValueError, match="prepare takes"):
        cpu.prepare(values, meta[:, :1])
    with pytest.raises(ValueError, match="for N=9"):
        cpu.spmm24(x, *blocks, 9)
    with pytest.raises(ValueError, match="24 features"):
        cpu.spmm24(torch.randn(2, 24), *blocks, 8)
    with pytest.raises(ValueError, match="one dtype"):
        cpu.spmm24(x.bfloat16(), *blocks, 8)
    with pytest.raises(ValueError, match="bias must be"):
        cpu.spmm24(x, *blocks, 8, torch.zeros(7))
    assert "float16" in cpu.why_not(torch.float16)
    assert cpu.why_not(torch.bfloat16) is None


@pytest.mark.parametrize("asked,match", [("sse", "is not one of"), ("avx512_bf16", "runs at most avx2")])
def test_an_instruction_set_that_cannot_run_is_an_error(asked, match, monkeypatch):
    class Avx2Only:
        def sparsekit_best_isa(self):
            return 1

    monkeypatch.setattr(cpu, "library", Avx2Only)
    monkeypatch.setenv("SPARSEKIT_CPU_ISA", asked)
    _forget()
    with pytest.raises(ValueError, match=match):
        cpu.isa()
    assert match in cpu.why_not()
    monkeypatch.undo()
    _forget()


def test_python_threads_may_call_at_once(isa, threads):
    threads(2)
    weights = [weight24(96, 260, torch.bfloat16) for _ in range(4)]
    inputs = [torch.randn(m, 260).bfloat16() for m in (1, 5, 20, 40)]
    want = [cpu.spmm24(x, *prepared(w), 96) for x, w in zip(inputs, weights, strict=True)]

    def work(i):
        blocks = prepared(weights[i])
        return all(torch.equal(cpu.spmm24(inputs[i], *blocks, 96), want[i]) for _ in range(50))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


GUARDED = """
import ctypes, mmap, sys, torch
from sparsekit_kernels import cpu, layout24

def at_the_end_of_a_page(t):
    pages = -(-t.nbytes // 4096) * 4096
    memory = mmap.mmap(-1, pages + 4096)
    address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(address + pages), ctypes.c_size_t(4096), 0) == 0
    return torch.frombuffer(memory, dtype=t.dtype, count=t.numel(), offset=pages - t.nbytes).view(t.shape).copy_(t)

for isa in cpu.ISAS[: cpu.ISAS.index(cpu.isa()) + 1]:
    cpu._spmm24 = lambda level=cpu.ISAS.index(isa), rest=cpu._spmm24()[1:]: (level, *rest)
    for dtype in (torch.bfloat16, torch.float32):
        for N, K in ((1, 1), (9, 5), (17, 63), (40, 72), (8, 352)):
            keep = torch.arange(K) % 4 < 2
            w = (torch.randn(N, K) * keep).to(dtype)
            blocks = [at_the_end_of_a_page(t) for t in cpu.prepare(*layout24.compress24(w))]
            bias = at_the_end_of_a_page(torch.randn(N).to(dtype))
            for M in (1, 2, 6, 7, 20):
                x = at_the_end_of_a_page(torch.randn(M, K).to(dtype))
                torch.testing.assert_close(cpu.spmm24(x, *blocks, N, bias), torch.nn.functional.linear(x, w, bias),
                                           rtol=2e-2, atol=2e-1)
print("inside")
"""


def test_reads_nothing_outside_its_tensors():
    path = str(Path(cpu.__file__).parents[2])
    code = f"import sys; sys.path.insert(0, {path!r})\n{GUARDED}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0 and "inside" in done.stdout, f"status {done.returncode}: {done.stderr}"


def _build_here(cache, barrier, results):
    """Load build.py alone (no torch) and compile into `cache`."""
    import os

    os.environ["SPARSEKIT_CACHE"] = cache
    spec = importlib.util.spec_from_file_location("build_alone", build.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.UNITS = {"layout": []}  # one small unit: what races is the cache, not the compiler
    module.FLAGS = [*module.FLAGS, "-O0"]
    barrier.wait()
    results.put(hasattr(module.library(), "sparsekit_prepare24"))


def test_processes_may_race_to_build(tmp_path):
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(3), context.Queue()
    workers = [context.Process(target=_build_here, args=(str(tmp_path), barrier, results)) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(60)
    assert [results.get(timeout=5) for _ in workers] == [True] * 3
    assert [path.suffix for path in tmp_path.iterdir()] == [".so"], "one library, nothing left behind"


@pytest.fixture
def fresh_build(monkeypatch, tmp_path):
    """An empty cache, and nothing loaded; the compiler is the test's to set."""
    monkeypatch.setenv("SPARSEKIT_CACHE", str(tmp_path / "cache"))
    build.library.cache_clear()
    _forget()
    yield monkeypatch
    monkeypatch.undo()
    build.library.cache_clear()
    _forget()


def test_what_the_compiler_says_is_told(fresh_build, tmp_path):
    compiler = tmp_path / "broken"
    compiler.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such header"; exit 1\n')
    compiler.chmod(0o755)
    fresh_build.setenv("CXX", str(compiler))
    assert "no such header" in cpu.why_not()
    assert cpu.why_not(build=False) is None
    with pytest.raises(build.BuildError, match="no such header"):
        build.library()


def test_no_compiler_is_told(fresh_build):
    fresh_build.setenv("CXX", "/nowhere/c++")
    assert "install g++ or clang++" in cpu.why_not()


def test_a_cache_that_cannot_be_written_is_replaced(fresh_build, tmp_path):
    built = Path(build.library()._name)

    def copy(command, path):
        path.write_bytes(built.read_bytes())

    fresh_build.setattr(build, "_compile", copy)
    fresh_build.setenv("SPARSEKIT_CACHE", "/proc/no/such/folder")
    build.library.cache_clear()
    library = build.library()
    assert not Path(library._name).exists() and library.sparsekit_best_isa() >= 0
