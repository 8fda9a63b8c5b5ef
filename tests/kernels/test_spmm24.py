"""`spmm24` against float64, in Triton's interpreter where there is no GPU.

Triton decides when it decorates a kernel whether it will compile or interpret it, once per process. So without a GPU
`test_in_the_interpreter` runs this file again in a process of its own, and there the other tests run.
"""

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit_kernels import layout24, target
from sparsekit_kernels.spmm24 import (
    CONFIGS,
    DENSE_ABOVE,
    decompress24,
    pick_config,
    spmm24,
    spmm24_large,
    spmm24_small,
)

HAS_GPU = target.why_not("cuda") is None and not target.INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]

runs = pytest.mark.skipif(
    not HAS_GPU and not target.INTERPRETED, reason="no GPU; test_in_the_interpreter runs this in a process of its own"
)


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: the kernels run on it")
@pytest.mark.skipif(target.INTERPRETED, reason="this is that process")
def test_in_the_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


@pytest.fixture(autouse=True)
def unwritten_is_nan():
    """Fill every torch.empty with NaN, so that an element no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before)


def weight24(N, K, dtype):
    """A random weight that keeps two random entries of each group of four; row 1 is empty, 1 % of the kept are 0."""
    scores = torch.rand(N, (K + 3) // 4, 4, device=DEVICE)
    keep = (scores.argsort(-1).argsort(-1) >= 2).view(N, -1)[:, :K]
    keep = keep & (torch.rand(N, K, device=DEVICE) > 0.01)
    keep[1:2] = False
    return torch.where(keep, torch.randn(N, K, device=DEVICE), 0.0).to(dtype)


def max_err(out, ref64):
    return (out.double() - ref64).abs().max().item()


def assert_as_good_as_dense(out, dense, ref64):
    """`out` may be at most twice as far from the fp64 answer as torch's own dense result in the same dtype."""
    assert out.dtype == dense.dtype and out.shape == dense.shape
    limit = 2 * max_err(dense, ref64) + 1e-5 * ref64.abs().max().item()
    assert out.isfinite().all(), "not finite"
    assert max_err(out, ref64) <= limit, f"error {max_err(out, ref64):.3g} > {limit:.3g}"


def check(function, x, w, bias=None):
    out = function(x, *layout24.compress24(w), bias)
    ref64 = F.linear(x.double(), w.double(), None if bias is None else bias.double())
    assert_as_good_as_dense(out, F.linear(x, w, bias), ref64)
    return out


SHAPES = [
    # M, N, K
    (1, 64, 64),
    (1, 1, 1),
    (1, 3, 4),
    (2, 17, 8),
    (3, 96, 512),
    (5, 63, 130),
    (15, 65, 100),
    (16, 64, 72),
    (17, 130, 257),
    (33, 1, 63),
    (63, 70, 513),
    (1, 130, 2056),  # splits K
    (4, 20, 2047),
]


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M,N,K", SHAPES)
def test_matches_dense(M, N, K, dtype):
    torch.manual_seed(0)
    x = torch.randn(M, K, device=DEVICE).to(dtype)
    check(spmm24_small, x, weight24(N, K, dtype), torch.randn(N, device=DEVICE).to(dtype))


@runs
@pytest.mark.parametrize("split", [1, 2, 8])
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_is_correct(name, split):
    torch.manual_seed(0)
    dtype = torch.float32 if name == "fp32" else torch.bfloat16
    config = replace(CONFIGS[name], SPLIT_K=split)
    M, N, K = config.BLOCK_M + 1, config.BLOCK_N + 3, config.BLOCK_G * 4 * 3 + 9  # with 8 splits some have no groups
    x = torch.randn(M, K, device=DEVICE).to(dtype)

    def run(*arguments):
        return spmm24_small(*arguments, config=config)

    check(run, x, weight24(N, K, dtype))
    check(run, x, weight24(N, K, dtype), torch.randn(N, device=DEVICE).to(dtype))


@runs
def test_each_group_reaches_its_columns():
    # x = I writes W.T, so a wrong index, a swapped slot or a lost one shows as a wrong bit.
    torch.manual_seed(0)
    w = weight24(70, 60, torch.float16)
    out = spmm24_small(torch.eye(60, dtype=torch.float16, device=DEVICE), *layout24.compress24(w))
    assert torch.equal(out, w.T)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,K", [(1, 1), (3, 12), (17, 256), (33, 259), (16, 520)])
def test_decompress24_is_exact(N, K, dtype):
    torch.manual_seed(0)
    w = weight24(N, K, dtype)
    w = torch.where(w == w.max(), float("inf"), w)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    values, meta = layout24.compress24(w)
    assert torch.equal(decompress24(values, meta, K).view(bits), w.view(bits))
    values[0, 0] = float("nan")  # the layout is asked with integers: torch's scatter rewrites NaNs of bf16
    assert torch.equal(decompress24(values, meta).view(bits), layout24.decompress24(values.view(bits), meta))


@runs
@pytest.mark.parametrize("M", [DENSE_ABOVE, DENSE_ABOVE + 1, 200])
def test_large_M_goes_through_dense(M, monkeypatch):
    torch.manual_seed(0)
    seen = []
    monkeypatch.setattr("sparsekit_kernels.spmm24.spmm24_large", lambda *a: seen.append(M) or spmm24_large(*a))
    x = torch.randn(M, 100, device=DEVICE).to(torch.bfloat16)
    check(spmm24, x, weight24(33, 100, torch.bfloat16), torch.randn(33, device=DEVICE).to(torch.bfloat16))
    assert bool(seen) == (M > DENSE_ABOVE)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_leading_dimensions(dtype):
    torch.manual_seed(0)
    w = weight24(20, 36, dtype)
    x = torch.randn(2, 3, 2 * 36, device=DEVICE).to(dtype)
    check(spmm24, x[..., 36:], w)  # rows apart
    check(spmm24, x[:, 1, :36], w)
    check(spmm24, torch.randn(36, 5, device=DEVICE).to(dtype).T, w)  # columns apart
    check(spmm24, x[:1, :1, :36].expand(4, 3, 36), w)  # rows on top of each other
    check(spmm24, x[0, 0, :36], w)  # a vector
    check(spmm24, x[..., :36], w, torch.randn(40, device=DEVICE).to(dtype)[::2])


@runs
@pytest.mark.parametrize("shape", [(0, 36), (2, 0, 36)])
def test_no_tokens(shape):
    w = weight24(20, 36, torch.float16)
    out = spmm24(torch.empty(shape, dtype=torch.float16, device=DEVICE), *layout24.compress24(w))
    assert out.shape == (*shape[:-1], 20) and out.dtype == torch.float16


@runs
def test_no_outputs_and_no_features():
    x = torch.randn(3, 36, device=DEVICE)
    meta, bias = torch.zeros(5, 5, dtype=torch.uint8, device=DEVICE), torch.randn(5, device=DEVICE)
    assert spmm24(x, x.new_empty(0, 20), meta[:0]).shape == (3, 0)
    assert torch.equal(spmm24(x[:, :0], x.new_empty(5, 0), meta[:, :0].contiguous(), bias), bias.expand(3, 5))


@runs
def test_an_all_zero_weight_gives_the_bias():
    x, bias = torch.randn(3, 36, device=DEVICE), torch.randn(20, device=DEVICE)
    values, meta = layout24.compress24(torch.zeros(20, 36, device=DEVICE))
    assert torch.equal(spmm24(x, values, meta), torch.zeros(3, 20, device=DEVICE))
    assert torch.equal(spmm24(x, values, meta, bias), bias.expand(3, 20))


@runs
def test_the_same_call_gives_the_same_bits():
    torch.manual_seed(0)
    w = weight24(40, 4096, torch.bfloat16)
    x = torch.randn(2, 4096, device=DEVICE).to(torch.bfloat16)
    assert pick_config(2, 40, 4096, torch.bfloat16, 132).SPLIT_K > 1
    packed = layout24.compress24(w)
    assert torch.equal(spmm24(x, *packed), spmm24(x, *packed))


@runs
def test_agrees_with_the_reference():
    torch.manual_seed(0)
    packed = layout24.compress24(weight24(20, 64, torch.float32))
    x, bias = torch.randn(3, 64, device=DEVICE), torch.randn(20, device=DEVICE)
    torch.testing.assert_close(spmm24(x, *packed, bias), F.linear(x, layout24.decompress24(*packed, x.shape[-1]), bias))


@runs
def test_wrong_arguments_are_refused_in_words():
    values, meta = layout24.compress24(weight24(20, 64, torch.float16))
    x = torch.randn(3, 64, device=DEVICE).half()
    with pytest.raises(ValueError, match="do not hold a weight of 40 features"):
        spmm24(x[:, :40], values, meta)
    with pytest.raises(ValueError, match="convert one of them"):
        spmm24(x.bfloat16(), values, meta)
    with pytest.raises(ValueError, match=r"bias must be \[20\]"):
        spmm24(x, values, meta, torch.zeros(21, device=DEVICE))
    with pytest.raises(ValueError, match="expected one of"):
        spmm24(x.double(), values.double(), meta)
    with pytest.raises(ValueError, match="expected one of"):
        spmm24(x, values, meta.int())
    with pytest.raises(ValueError, match="contiguous"):
        spmm24(x, values.T.contiguous().T, meta)


def test_pick_config_covers_every_shape():
    for dtype in DTYPES:
        for M in (1, 16, 17, 64, 65, 5000):
            for N, K in ((1, 1), (1, 100_000), (4096, 4096), (28672, 8192), (100_000, 8)):
                config = pick_config(M, N, K, dtype, 132)
                assert config.SPLIT_K & (config.SPLIT_K - 1) == 0
                assert config.SPLIT_K == 1 or K // config.SPLIT_K >= 512
    assert pick_config(1, 4096, 4096, torch.bfloat16, 132).SPLIT_K == 8


@pytest.mark.skipif(HAS_GPU or target.INTERPRETED, reason="Triton runs here")
def test_a_cpu_tensor_is_refused_in_words():
    assert target.why_not("cpu") == "needs an NVIDIA GPU, the tensor is on cpu"
    assert target.why_not("cuda") is not None
    values, meta = layout24.compress24(torch.zeros(4, 8))
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        spmm24(torch.zeros(1, 8), values, meta)


def test_importing_target_is_light():
    code = (
        "import sys, torch, sparsekit_kernels.target\n"
        "assert 'triton' not in sys.modules and not torch.cuda.is_initialized()"
    )
    path = os.pathsep.join(p for p in sys.path if p)
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": path})


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason=f"no GPU: {target.why_not('cuda')}")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M", [1, 4, 16, 33, 64, 65, 1024])
def test_gpu_real_layer_shapes(M, dtype):
    torch.manual_seed(0)
    for N, K in ((4096, 4096), (6144, 4096), (4096, 14336)):
        x = torch.randn(M, K, device=DEVICE).to(dtype)
        check(spmm24, x, weight24(N, K, dtype), torch.randn(N, device=DEVICE).to(dtype))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason=f"no GPU: {target.why_not('cuda')}")
@pytest.mark.parametrize("M", [1, 16, 128])
def test_gpu_cuda_graph(M):
    torch.manual_seed(0)
    w = weight24(4096, 4096, torch.bfloat16)
    packed = layout24.compress24(w)
    x = torch.randn(M, 4096, device=DEVICE).to(torch.bfloat16)
    spmm24(x, *packed)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spmm24(x, *packed)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_as_good_as_dense(out, F.linear(x, w), F.linear(x.double(), w.double()))


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason=f"no GPU: {target.why_not('cuda')}")
def test_gpu_offsets_beyond_32_bits():
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip(f"needs 12 GiB of free GPU memory, {free >> 30} GiB are free")
    N, K = 300_000, 8192  # 2.46e9 dense elements, in scratch for M = 65
    values = torch.randn(N, K // 2, device=DEVICE, dtype=torch.bfloat16)
    meta = torch.full((N, K // 8), 0x44, dtype=torch.uint8, device=DEVICE)
    x = torch.randn(65, K, device=DEVICE).bfloat16()
    tail = layout24.decompress24(values[-64:], meta[-64:])
    ref64 = x.double() @ tail.double().T
    assert_as_good_as_dense(spmm24(x[:1], values, meta)[:, -64:], F.linear(x[:1], tail), ref64[:1])
    assert_as_good_as_dense(spmm24(x, values, meta)[:, -64:], F.linear(x, tail), ref64)
