"""The GPU packer against the canonical layout and a search group by group, in the interpreter where there is no GPU.

Triton decides when it decorates a kernel whether it will compile or interpret it, once per process. So without a GPU
`test_in_the_interpreter` runs this file again in a process of its own, and there the tests that run kernels run.
The tests of the machine code run here: they need a compiler and no GPU.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit_kernels import compress24 as packer  # noqa: E402
from sparsekit_kernels import layout24, target  # noqa: E402
from sparsekit_kernels.compress24 import LAUNCH, compress24, search24  # noqa: E402

from sparsekit.patterns import NM  # noqa: E402

HAS_GPU = target.why_not("cuda") is None and not target.INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [(1, 1), (1, 4), (3, 5), (2, 7), (5, 8), (7, 17), (4, 63), (6, 172), (5, 1027), (0, 8), (3, 0)]

runs = pytest.mark.skipif(
    not HAS_GPU and not target.INTERPRETED, reason="no GPU; test_in_the_interpreter runs this in a process of its own"
)
compiles = pytest.mark.skipif(target.INTERPRETED, reason="interpreted: the process that started this one compiles")


@pytest.mark.skipif(HAS_GPU, reason="there is a GPU: the kernels run on it")
@pytest.mark.skipif(target.INTERPRETED, reason="this is that process")
def test_in_the_interpreter(pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


def bits(x):
    return x.view(torch.int32 if x.element_size() == 4 else torch.int16)


def assert_same_bits(a, b):
    assert a.dtype == b.dtype and a.shape == b.shape
    assert torch.equal(bits(a), bits(b)) if a.is_floating_point() else torch.equal(a, b)


def ugly(N, K, dtype, seed=0):
    """Normal numbers with ties, zeros of both signs, infinities and the smallest denormals of the dtype."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator).to(dtype)
    kind = torch.randint(0, 16, (N, K), generator=generator)
    coarse = torch.randint(-2, 3, (N, K), generator=generator).to(dtype)
    w = torch.where(kind < 6, coarse, w)
    w = torch.where(kind == 6, torch.tensor(-0.0, dtype=dtype), w)
    w = torch.where(kind == 7, torch.tensor(float("inf"), dtype=dtype).copysign(w), w)
    raw = bits(w)
    raw[kind == 8] = 1
    raw[kind == 9] = raw.new_tensor(torch.iinfo(raw.dtype).min + 2)  # -2 in denormals
    return w.to(DEVICE)


def obeying(w):
    """The same with two random entries of each group cleared, to a zero of either sign."""
    N, K = w.shape
    generator = torch.Generator().manual_seed(1)
    scores = torch.rand(N, (K + 3) // 4, 4, generator=generator)
    keep = (scores.argsort(-1).argsort(-1) >= 2).flatten(1)[:, :K].to(w.device)
    return torch.where(keep, w, torch.zeros_like(w).copysign(w))


def slow_search(w, scores):
    """Which entries stay, one group at a time; a Python sort of (score, place) is the whole definition."""
    keep = torch.zeros(w.shape, dtype=torch.bool)
    N, K = w.shape
    for n in range(N):
        row = scores[n].double().tolist()
        for start in range(0, K, 4):
            group = range(start, min(start + 4, K))
            keep[n, sorted(group, key=lambda k: (-row[k], k))[:2]] = True
    return keep.to(w.device)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,K", SHAPES)
def test_compress24_writes_the_canonical_bytes(N, K, dtype):
    w = obeying(ugly(N, K, dtype))
    values, meta = compress24(w)
    expected_values, expected_meta = layout24.compress24(w)
    assert torch.equal(meta, expected_meta)
    assert_same_bits(values, expected_values)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_set_of_non_zeros_in_a_group(dtype):
    w = torch.zeros(11, 8, dtype=dtype, device=DEVICE)
    sets = [kept for kept in range(16) if kept.bit_count() <= 2]
    for row, kept in enumerate(sets):
        w[row] = torch.tensor([float(place % 4 + 1) if kept >> place % 4 & 1 else -0.0 for place in range(8)])
    values, meta = compress24(w)
    expected = layout24.compress24(w)
    assert_same_bits(values, expected[0])
    assert torch.equal(meta, expected[1])
    assert meta[0, 0] == 14 | 14 << 4, "an empty group is (2, 3)"


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_keeps_its_payload(dtype):
    w = torch.zeros(2, 16, dtype=dtype, device=DEVICE)
    payloads = torch.tensor([-3, 0x7F81 if dtype != torch.float32 else 0x7F800001], dtype=bits(w).dtype)
    bits(w)[1, 5:7] = payloads.to(DEVICE)
    values, meta = compress24(w)
    assert_same_bits(values, layout24.compress24(w)[0])
    assert bits(values)[1, 2:4].tolist() == payloads.tolist()


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,K", [(9, 130), (5, 1027)])
def test_violations_are_counted_and_refused_in_the_same_words(N, K, dtype):
    w = ugly(N, K, dtype)
    with pytest.raises(ValueError) as expected:
        layout24.compress24(w)
    with pytest.raises(ValueError) as found:
        compress24(w)
    assert str(found.value) == str(expected.value)


@runs
def test_one_violation_in_the_last_group():
    w = torch.zeros(33, 1031, device=DEVICE)
    w[32, 1028:] = 1
    with pytest.raises(ValueError, match="^1 groups of four have more than two"):
        compress24(w)


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides(dtype):
    w = obeying(ugly(12, 72, dtype))
    wide = torch.full((24, 2 * 72 + 1), 7, dtype=dtype, device=DEVICE)
    wide[::2, 1::2] = w
    for view in (wide[::2, 1::2], w.T.contiguous().T, w[3:, 8:-1], w[:1].expand(5, 72)):
        for mine, expected in zip(compress24(view), layout24.compress24(view), strict=True):
            assert_same_bits(mine, expected)
        found = search24(view, view.abs().float().T.contiguous().T)
        assert_same_bits(found.values, layout24.compress24(view)[0])


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,K", SHAPES)
def test_search24_keeps_the_two_largest(N, K, dtype):
    w = ugly(N, K, dtype)
    found = search24(w, keep=True, masked=True)
    keep = slow_search(w, w.abs())
    assert torch.equal(found.keep, keep)
    assert torch.equal(found.keep, NM(2, 4).project(w.abs()))
    pruned = torch.where(keep, w, 0)
    assert_same_bits(found.masked, pruned)
    values, meta = layout24.compress24(pruned)
    assert torch.equal(found.meta, meta)
    assert_same_bits(found.values, values)


@runs
@pytest.mark.parametrize("score_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("N,K", [(3, 5), (9, 6), (2, 7), (4, 63), (5, 1027)])
def test_search24_by_given_scores(N, K, dtype, score_dtype):
    w, scores = ugly(N, K, dtype), ugly(N, K, torch.float32 if score_dtype == torch.float64 else score_dtype, seed=3)
    scores = scores.to(score_dtype)
    scores[scores == float("inf")] = -float("inf")  # whole groups of -inf, ahead of the padding all the same
    scores[:, : min(K, 4)] = -float("inf")
    found = search24(w, scores, keep=True)
    keep = slow_search(w, scores)
    assert torch.equal(found.keep, keep)
    assert torch.equal(found.keep, NM(2, 4).project(scores))
    values, meta = layout24.compress24(torch.where(keep, w, 0))
    assert torch.equal(found.meta, meta)
    assert_same_bits(found.values, values)
    assert found.masked is None


@runs
def test_all_ties_keep_the_first_two():
    for w in (torch.ones(3, 10, device=DEVICE), torch.zeros(3, 10, device=DEVICE), -torch.zeros(3, 10, device=DEVICE)):
        keep = search24(w, keep=True).keep
        assert torch.equal(keep, (torch.arange(10, device=DEVICE) % 4 < 2).expand(3, 10))


@runs
def test_nan_scores_are_refused_or_rank_above_infinity():
    w = torch.tensor([[1.0, float("nan"), float("inf"), 4.0, 3.0, 2.0]], device=DEVICE)
    with pytest.raises(ValueError) as expected:
        NM(2, 4).project(w.abs())
    with pytest.raises(ValueError) as found:
        search24(w)
    assert str(found.value) == str(expected.value)
    assert search24(w, keep=True, check=False).keep.tolist() == [[False, True, True, False, True, True]]
    scores = torch.tensor([[1.0, 2.0, 3.0, float("nan")]], device=DEVICE)
    with pytest.raises(ValueError, match="scores hold NaN"):
        search24(w[:, 2:].contiguous(), scores)
    many = torch.full((4, 4), float("nan"), device=DEVICE)
    assert search24(many, many, keep=True, check=False).keep.sum(1).tolist() == [2, 2, 2, 2], "never three of four"


@runs
def test_a_parameter_is_taken_as_it_is():
    w = torch.nn.Parameter(obeying(ugly(3, 16, torch.float32)))
    values, _ = compress24(w)
    assert not values.requires_grad and not search24(w, masked=True).masked.requires_grad


def test_wrong_arguments_are_refused(monkeypatch):
    monkeypatch.setattr(packer, "why_not", lambda device: None)
    with pytest.raises(ValueError, match=r"compress24 takes a matrix \[N, K\], got shape \(4,\)"):
        compress24(torch.zeros(4))
    with pytest.raises(ValueError, match="the weight is torch.float64: convert it first"):
        compress24(torch.zeros(4, 4, dtype=torch.float64))
    for scores in (torch.zeros(4, 5), torch.zeros(4, 4, dtype=torch.int32)):
        with pytest.raises(ValueError, match=r"pass floats \(4, 4\) on cpu, one for each weight"):
            search24(torch.zeros(4, 4), scores)


@pytest.mark.skipif(HAS_GPU or target.INTERPRETED, reason="Triton runs here")
def test_without_a_gpu_says_so():
    with pytest.raises(RuntimeError, match="compress24 cannot run here: needs an NVIDIA GPU"):
        compress24(torch.zeros(4, 4))


# The machine code.

BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def machine_code(kernel, width, capability, path, aligned=True, **flags):
    """Compile as a launch on contiguous matrices would; return the SASS."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointers = {
        "w_ptr": f"*i{width}", "scores_ptr": f"*i{width}", "values_ptr": f"*i{2 * width}", "meta_ptr": "*u8",
        "keep_ptr": "*i8", "masked_ptr": f"*i{width}", "broken_ptr": "*i32", "nan_ptr": "*i32",
    }  # fmt: skip
    launch = dict(LAUNCH[width])
    options = {"num_warps": launch.pop("num_warps")}
    constants = {"BITS": width, "ABS": (1 << width - 1) - 1, "stride_k": 1, **launch, **flags}
    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[(i,)] = "constexpr", constants[name]
            continue
        signature[name] = pointers.get(name, "i32")
        if aligned or name in pointers:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    cubin = path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    run = [str(BIN / "cuobjdump"), "--dump-sass", "--dump-resource-usage", str(cubin)]
    sass = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", sass)
    assert usage is not None and usage[2] == usage[3] == "0", f"spills: {usage and usage.group()}"
    assert not re.search(r"\b(LDL|STL)\b", sass), "local memory is used"
    return sass


def num_instructions(sass):
    return len([op for op in re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(\S[^;]*);", sass, re.M) if op != "NOP"])


SCORED = {"HAS_SCORES": True, "KEEP": True, "MASKED": True, "stride_sk": 1}
PLAIN = {"HAS_SCORES": False, "KEEP": False, "MASKED": False, "stride_sk": 1}


@compiles
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("width", [16, 32])
def test_compress24_compiles(width, capability, tmp_path, own_cache):
    sass = machine_code(packer._compress24_kernel, width, capability, tmp_path)
    assert len(re.findall(r"LDG\.E\S*\.128", sass)) == 4 and not re.search(r"LDG\.E\S*(\.64|\.U16|\.U8)", sass)
    assert len(re.findall(r"STG\.E\S*\.128", sass)) == 2, "packed values are not written 16 bytes at a time"
    groups_a_thread = LAUNCH[width]["BLOCK_N"] * LAUNCH[width]["BLOCK_K"] // 4 // 32 // LAUNCH[width]["num_warps"]
    # Triton 3.6 computes in the layout of the load and again in that of each store, instead of converting.
    budget = 84 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 112
    assert num_instructions(sass) / groups_a_thread <= budget


@compiles
@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
@pytest.mark.parametrize("flags", [PLAIN, SCORED], ids=["packed", "everything"])
@pytest.mark.parametrize("width", [16, 32])
def test_search24_compiles(width, flags, capability, tmp_path, own_cache):
    scores = {"SCORE_ABS": (1 << width - 1) - 1, "SCORE_INFINITY": 0x7F80 << (width - 16)}
    sass = machine_code(packer._search24_kernel, width, capability, tmp_path, **flags, **scores)
    num_loads = len(re.findall(r"LDG\.E\S*\.128", sass))
    assert num_loads == (8 if flags["HAS_SCORES"] else 4) and not re.search(r"LDG\.E\S*(\.64|\.U16|\.U8)", sass)


@compiles
def test_ragged_rows_compile(tmp_path, own_cache):
    machine_code(packer._compress24_kernel, 16, 90, tmp_path, aligned=False)
