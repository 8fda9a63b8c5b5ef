"""`spmm_block` against float64, in Triton's interpreter where there is no GPU, and its machine code.

Triton decides when it decorates a kernel whether it will compile or interpret it, once per process. So without a GPU
`test_in_the_interpreter` runs this file again in a process of its own, and there the tests that run kernels run. The
tests of the machine code run here: they need a compiler and no GPU.
"""

import math
import os
import re
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit_kernels import spmm_block as kernels  # noqa: E402
from sparsekit_kernels import target  # noqa: E402
from sparsekit_kernels.layout_block import block_grid, compress_block  # noqa: E402
from sparsekit_kernels.spmm_block import CONFIGS, pick_config, prepare, spmm_block  # noqa: E402

from tests.kernels.test_compile_targets import SHARED_KIB, assert_fits, compile_kernel, own_cache  # noqa: E402, F401

HAS_GPU = target.why_not("cuda") is None and not target.INTERPRETED
DEVICE = "cuda" if HAS_GPU else "cpu"
DTYPES = [torch.float16, torch.bfloat16, torch.float32]

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


def block_weight(N, K, block, dtype, density=0.4):
    """Normals in random blocks, the first row's ends among them; the second block row is empty, the third full."""
    kept = torch.rand(block_grid(N, K, block), device=DEVICE) < density
    if 0 < density < 1:
        kept[1:2], kept[2:3], kept[:1, :1], kept[:1, -1:] = False, True, True, True
    keep = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    keep = keep & (torch.rand(N, K, device=DEVICE) > 0.1)
    return torch.where(keep, torch.randn(N, K, device=DEVICE), 0.0).to(dtype)


def pack(w, block, num_sms=132):
    return prepare(*compress_block(w, block), num_sms)


def max_err(out, ref64):
    return (out.double() - ref64).abs().max().item()


def assert_as_good_as_dense(out, dense, ref64):
    """`out` may be at most twice as far from the fp64 answer as torch's own dense result in the same dtype."""
    assert out.dtype == dense.dtype and out.shape == dense.shape
    limit = 2 * max_err(dense, ref64) + 1e-5 * ref64.abs().max().item()
    assert out.isfinite().all(), "not finite"
    assert max_err(out, ref64) <= limit, f"error {max_err(out, ref64):.3g} > {limit:.3g}"


def check(x, w, prepared, bias=None, residual=None, config=None):
    out = spmm_block(x, prepared, w.shape[0], bias, residual, config)
    dense, ref64 = F.linear(x, w, bias), F.linear(x.double(), w.double(), None if bias is None else bias.double())
    if residual is not None:
        dense, ref64 = dense + residual, ref64 + residual.double()
    assert_as_good_as_dense(out, dense, ref64)
    return out


BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    # M, N, K, block, dtype
    (1, 64, 64, (64, 64), BF16),
    (1, 1, 1, (16, 16), FP32),
    (1, 200, 700, (64, 64), FP16),
    (1, 130, 513, (16, 32), FP32),
    (1, 130, 300, (128, 128), BF16),
    (2, 17, 8, (64, 64), BF16),
    (3, 96, 512, (32, 32), FP16),
    (5, 63, 130, (16, 16), FP32),
    (8, 130, 300, (128, 128), BF16),
    (15, 65, 100, (48, 16), FP16),
    (17, 130, 257, (32, 64), BF16),
    (20, 33, 70, (32, 48), FP32),
    (33, 100, 520, (64, 48), FP16),
    (64, 70, 333, (64, 64), BF16),
    (65, 130, 257, (64, 64), BF16),
    (70, 40, 90, (16, 16), FP32),
    (129, 60, 700, (32, 128), FP16),
    (150, 140, 190, (128, 128), BF16),
]


@runs
@pytest.mark.parametrize("M,N,K,block,dtype", CASES, ids=str)
def test_matches_dense(M, N, K, block, dtype):
    torch.manual_seed(0)
    w = block_weight(N, K, block, dtype)
    x, bias, residual = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((M, K), (N,), (M, N)))
    prepared = pack(w, block)
    check(x, w, prepared, bias, residual)
    check(x, w, prepared)


def tokens_of(name):
    return 130 if "more" in name else int(re.findall(r"\d+", name)[-1])


@runs
@pytest.mark.parametrize("cut", [False, True], ids=["whole", "cut"])
@pytest.mark.parametrize("name", [name for name in CONFIGS if "more" not in name])
def test_every_decode_config_is_correct(name, cut, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "CUT_ABOVE", 2 * 32 if cut else 10_000)
    dtype = torch.float32 if "fp32" in name else torch.bfloat16
    M, N, K, block = tokens_of(name), 80, CONFIGS[name].BLOCK_K * CONFIGS[name].num_warps + 90, (32, 32)
    w = block_weight(N, K, block, dtype)
    prepared = pack(w, block)
    assert (prepared[5].shape[0] > 0) == cut
    x, bias, residual = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((M, K), (N,), (M, N)))
    assert pick_config(M, dtype, 128) == CONFIGS[name]
    check(x, w, prepared, bias, residual)
    if cut:  # again in another cut: other sums, as right
        check(x, w, pack(w, block, num_sms=1), bias)


@runs
@pytest.mark.parametrize("block", [(16, 16), (64, 64), (48, 80)], ids=str)
@pytest.mark.parametrize("M", [1, 60, 70])
def test_each_weight_reaches_its_place(M, block):
    # Rows of the identity pick columns of W, so a wrong index shows as a wrong bit.
    torch.manual_seed(0)
    N, K = 83, 100
    w = block_weight(N, K, block, torch.float16)
    prepared = pack(w, block)
    eye = torch.eye(K, dtype=torch.float16, device=DEVICE)
    for start in range(0, K - M + 1, 29):
        out = spmm_block(eye[start : start + M], prepared, N)
        assert torch.equal(out, w.T[start : start + M])


@runs
@pytest.mark.parametrize("M", [1, 7, 70])
@pytest.mark.parametrize("density", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("dtype", [FP16, FP32], ids=str)
def test_any_density(dtype, density, M):
    torch.manual_seed(0)
    N, K, block = 70, 130, (32, 64)
    w = block_weight(N, K, block, dtype, density)
    x, bias = torch.randn(M, K, device=DEVICE).to(dtype), torch.randn(N, device=DEVICE).to(dtype)
    prepared = pack(w, block)
    out = check(x, w, prepared, bias)
    assert (prepared[0].shape[0] == 0) == (density == 0)
    if density == 0:
        assert torch.equal(out, bias.expand(M, N))
    if density == 1 and M > 64:  # by the dense library, and by our kernel all the same
        check(x, w, prepared, bias, config=pick_config(M, dtype, block[0]))


@runs
def test_a_full_weight_is_multiplied_densely_at_prefill(monkeypatch):
    seen = []
    decompress = kernels.decompress_block
    monkeypatch.setattr(kernels, "decompress_block", lambda *a: seen.append(a) or decompress(*a))
    x = torch.randn(65, 64, device=DEVICE).to(torch.bfloat16)
    for density, M, expected in ((1.0, 65, 1), (1.0, 64, 0), (0.3, 65, 0)):
        w = block_weight(64, 64, (16, 16), torch.bfloat16, density)
        residual = torch.randn(M, 64, device=DEVICE).to(torch.bfloat16)
        check(x[:M], w, pack(w, (16, 16)), None, residual)
        assert len(seen) == expected
        seen.clear()


@runs
def test_launches_are_bounded(monkeypatch):
    """New shapes take the place of the oldest, and shapes seen before are still multiplied."""
    monkeypatch.setattr(kernels, "MOST_LAUNCHES", 3)
    monkeypatch.setattr(kernels, "_launches", {})
    w = block_weight(20, 36, (16, 16), FP32, 0.7)
    prepared = pack(w, (16, 16))
    for M in (1, 2, 3, 4, 5, 1, 5):
        check(torch.randn(M, 36, device=DEVICE), w, prepared)
        assert len(kernels._launches) <= 3
    assert {key[0][0] for key in kernels._launches} == {4, 5, 1}


@runs
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_strides_and_leading_dimensions(dtype):
    torch.manual_seed(0)
    N, K, block = 20, 36, (16, 16)
    w = block_weight(N, K, block, dtype, 0.7)
    prepared = pack(w, block)
    x = torch.randn(2, 3, 2 * K, device=DEVICE).to(dtype)
    check(x[..., K:], w, prepared)  # rows apart
    check(x[:, 1, :K], w, prepared)
    check(torch.randn(K, 5, device=DEVICE).to(dtype).T, w, prepared)  # columns apart
    check(torch.randn(K, 70, device=DEVICE).to(dtype).T, w, prepared)
    check(x[:1, :1, :K].expand(4, 3, K), w, prepared)  # rows on top of each other
    check(x[0, 0, :K], w, prepared)  # a vector
    wide = torch.randn(2, 3, 2 * N, device=DEVICE).to(dtype)
    check(x[..., :K], w, prepared, wide[0, 0, ::2], wide[..., ::2])


@runs
@pytest.mark.parametrize("shape", [(0, 36), (2, 0, 36)])
def test_no_tokens(shape):
    prepared = pack(block_weight(20, 36, (16, 16), torch.float16), (16, 16))
    out = spmm_block(torch.empty(shape, dtype=torch.float16, device=DEVICE), prepared, 20)
    assert out.shape == (*shape[:-1], 20) and out.dtype == torch.float16


@runs
@pytest.mark.parametrize("M", [1, 3, 70])
def test_no_outputs_and_no_features(M):
    x, bias = torch.randn(M, 36, device=DEVICE), torch.randn(5, device=DEVICE)
    assert spmm_block(x, pack(torch.zeros(0, 36, device=DEVICE), (16, 16)), 0).shape == (M, 0)
    empty = pack(torch.zeros(5, 0, device=DEVICE), (16, 16))
    assert torch.equal(spmm_block(x[:, :0], empty, 5, bias), bias.expand(M, 5))


@runs
@pytest.mark.parametrize("M", [1, 5, 65])
def test_the_same_call_gives_the_same_bits(M, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "CUT_ABOVE", 64)
    w = block_weight(40, 512, (16, 64), torch.bfloat16)
    prepared = pack(w, (16, 64))
    assert prepared[5].shape[0] > 0
    x = torch.randn(M, 512, device=DEVICE).to(torch.bfloat16)
    assert torch.equal(spmm_block(x, prepared, 40), spmm_block(x, prepared, 40))


@runs
def test_wrong_arguments_are_refused_in_words():
    prepared = pack(block_weight(20, 64, (16, 16), torch.float16), (16, 16))
    x = torch.randn(3, 64, device=DEVICE).half()
    with pytest.raises(ValueError, match="convert one of them"):
        spmm_block(x.bfloat16(), prepared, 20)
    with pytest.raises(ValueError, match="convert one of them, to one of"):
        spmm_block(x.double(), tuple(part.double() if i == 0 else part for i, part in enumerate(prepared)), 20)
    with pytest.raises(ValueError, match="2 rows of blocks, N=40 needs 3"):
        spmm_block(x, prepared, 40)
    with pytest.raises(ValueError, match=r"bias must be \[20\]"):
        spmm_block(x, prepared, 20, torch.zeros(21, device=DEVICE))
    with pytest.raises(ValueError, match=r"residual must be \[3, 20\]"):
        spmm_block(x, prepared, 20, None, torch.zeros(1, 3, 20, device=DEVICE))


@pytest.mark.skipif(HAS_GPU or target.INTERPRETED, reason="Triton runs here")
def test_a_cpu_tensor_is_refused_in_words():
    prepared = pack(torch.zeros(4, 8), (16, 16))
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        spmm_block(torch.zeros(1, 8), prepared, 4)


@pytest.mark.parametrize("block", [(8, 64), (64, 8), (24, 16)], ids=str)
def test_blocks_without_a_kernel_are_refused_in_words(block):
    with pytest.raises(ValueError, match=f"blocks of {block[0]}x{block[1]} cannot run here.*multiples of 16"):
        pack(torch.ones(70, 70, device=DEVICE), block)


@pytest.mark.parametrize("num_sms", [1, 132])
def test_the_work_list_has_each_block_once(num_sms, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(kernels, "CUT_ABOVE", 256)
    w = block_weight(16 * 70, 4000, (16, 16), torch.float32, 0.05)
    values, columns, row_pointers, order, work, cut_rows = (part.cpu() for part in pack(w, (16, 16), num_sms))
    counts = row_pointers.diff()
    assert sorted(order.tolist()) == list(range(70)) and (counts[order.long()].diff() <= 0).all()
    seen = sorted((first, last, row) for row, first, last in work.tolist() if first < last)
    assert [first for first, _, _ in seen] == [0, *(last for _, last, _ in seen[:-1])] and seen[-1][1] == len(columns)
    for row, first, last in work.tolist():
        assert row_pointers[row] <= first <= last <= row_pointers[row + 1]
    assert set(work[:, 0].tolist()) == set(range(70)), "an empty row has an item too: it writes the bias"
    num_parts = sum(last - first for _, first, last in cut_rows.tolist())
    assert len(work) - num_parts == 70 - len(cut_rows)
    lengths = work[:, 2] - work[:, 1]
    assert (lengths[num_parts:].diff() <= 0).all(), "whole rows are in order"
    for row, first, last in cut_rows.tolist():
        assert work[first:last, 0].unique().tolist() == [row] and last - first > 1
        assert lengths[first:last].max() - lengths[first:last].min() <= 1, "parts are equal"
    share = math.ceil(len(columns) / (num_sms * kernels.PROGRAMS_PER_SM))
    assert lengths.max() <= max(256 // 16, 1.5 * share)
    assert (len(cut_rows) > 0) == (num_sms > 1), "the full row is cut where there is room"


def test_pick_config_covers_every_shape():
    for dtype in DTYPES:
        for M in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 5000):
            for BN in (16, 32, 48, 64, 96, 128, 256):
                config = pick_config(M, dtype, BN)
                assert BN % config.ROWS == 0 and config.ROWS & (config.ROWS - 1) == 0
                assert M <= config.BLOCK_M or config.kernel == "prefill"
                assert (config.kernel == "vector") == (M == 1)


class FakeKernel:
    """Stands in for a Triton kernel: notes who was called, with what."""

    arg_names = ["x_ptr", "M", "A", "B"]

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def compile_and_run(*args, **constants):
            self.calls.append(("triton", grid, args, constants))
            return {grid: lambda *everything: self.calls.append(("driver", everything))}

        return compile_and_run


@pytest.mark.skipif(target.INTERPRETED, reason="the interpreter compiles nothing")
def test_later_calls_go_straight_to_the_driver_unless_a_pointer_is_odd():
    fake, x = FakeKernel(), torch.zeros(9)
    kernel = kernels._Kernel(fake, (2, 1, 1), {"B": 5, "A": 4}, {"num_warps": 4})
    odd = x[1:]
    for tensor in (odd, x, x, odd, x):
        kernel(tensor is x, tensor, 3)
    assert [call[0] for call in fake.calls] == ["triton", "triton", "driver", "triton", "driver"]
    assert fake.calls[0] == ("triton", (2, 1, 1), (odd, 3), {"B": 5, "A": 4, "num_warps": 4})
    (same, *rest) = fake.calls[2][1]
    assert same is x and rest == [3, 4, 5], "constants follow in the order of the kernel's arguments"


@compiles
@pytest.mark.parametrize("name", ["_vector_kernel", "_decode_kernel", "_add_parts_kernel", "_prefill_kernel"])
def test_constants_are_the_last_arguments(name):
    is_constant = [parameter.is_constexpr for parameter in getattr(kernels, name).params]
    assert is_constant == sorted(is_constant) and any(is_constant)


# The machine code.


def compile_config(name, capability, block=(64, 64), K=4096, parts=True, dtype=None):
    dtype = dtype or ("fp32" if "fp32" in name else "bf16")
    torch_dtype = torch.float32 if dtype == "fp32" else torch.bfloat16
    config = pick_config(tokens_of(name), torch_dtype, block[0], SHARED_KIB[capability])
    names = ("columns", "work", "row_pointers", "order", "cut_rows")
    pointers = {"parts_ptr": "*fp32", **{f"{part}_ptr": "*i32" for part in names}}
    pointers |= {f"{part}_ptr": f"*{dtype}" for part in ("x", "values", "bias", "residual", "y")}
    constants = {
        "K": K, "BN": block[0], "BK": block[1], "LONGEST": 0, "HAS_BIAS": True, "HAS_RESIDUAL": parts,
        "ROWS": config.ROWS, "BLOCK_K": config.BLOCK_K,
    }  # fmt: skip
    tokens = {"UPCAST": False, "BLOCK_M": config.BLOCK_M}
    if config.kernel == "prefill":
        kernel, constants = kernels._prefill_kernel, {**constants, **tokens, "GROUP_M": kernels.GROUP_M}
    elif config.kernel == "vector":
        kernel, constants = kernels._vector_kernel, {**constants, "HAS_PARTS": parts}
    else:
        kernel = kernels._decode_kernel
        constants = {**constants, **tokens, "HAS_PARTS": parts, "WARPS": config.num_warps}
    unaligned = {"M", "num_parts"} if K % 16 == 0 else {"M", "num_parts", "N", "stride_xm"}
    stages = 3 if config.kernel == "vector" else config.num_stages
    return config, compile_kernel(kernel, pointers, constants, capability, config.num_warps, stages, unaligned)


def innermost_loop(sass):
    """The instructions of the longest loop that contains no other."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.M)
    places = {int(address, 16): i for i, (address, _) in enumerate(lines)}
    loops = []
    for i, (_, text) in enumerate(lines):
        jump = re.search(r"\bBRA\S* (?:\S+ )*0x([0-9a-f]+)", text)
        if jump and places.get(int(jump[1], 16), i) < i:
            loops.append((places[int(jump[1], 16)], i))
    inner = [a for a in loops if not any(a[0] <= b[0] and b[1] <= a[1] and a != b for b in loops)]
    start, end = max(inner, key=lambda loop: loop[1] - loop[0])
    return [text for _, text in lines[start : end + 1]]


def count(instructions, pattern):
    return sum(bool(re.search(pattern, text)) for text in instructions)


# Instructions that a loop of sm_90 spends on a weight, over all lanes. A multiprocessor of an H200 issues 128 a clock,
# in which about 9 weights of 16 bits arrive. Beyond 16 tokens the products themselves take most.
LOOP_BUDGET = {
    "16-bit, M = 1": 5,
    "16-bit, M <= 8": 6,
    "16-bit, M <= 16": 9,
    "16-bit, M <= 32": 5,
    "16-bit, M <= 64": 10,
}


@compiles
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_compiles(name, capability, tmp_path):
    config, kernel = compile_config(name, capability, (128, 128) if "more" in name else (64, 64))
    sass = assert_fits(kernel, capability, tmp_path)
    loop = innermost_loop(sass)
    weights, itemsize = config.ROWS * config.BLOCK_K, 4 if "fp32" in name else 2
    if config.kernel == "decode":
        weights *= config.num_warps  # each has columns of its own
    if config.kernel == "vector":
        assert_streams_weights_first(loop, weights * itemsize // (16 * 32 * config.num_warps))
    else:
        x_bytes = config.BLOCK_M * weights // config.ROWS * itemsize
        tiles = kernel.metadata.shared // (weights * itemsize + x_bytes)
        asynchronous = config.kernel == "prefill" and itemsize == 2 and capability in (90, 100)  # reads one tile longer
        assert tiles == config.depth + asynchronous, "not as many tiles in flight as the config says"
        assert count(loop, r"\bLDGSTS\.E\.BYPASS\.128\b"), "no 16-byte asynchronous load"
        assert_multiplies(loop, name, config, capability)
    if capability == 90 and name in LOOP_BUDGET:
        spent = len(loop) * 32 * config.num_warps / weights
        print(f"{name}: {spent:.1f} instructions a weight")
        assert spent <= LOOP_BUDGET[name] <= 128 / 9
        assert count(loop, r"\bBAR\b") <= 3


def assert_streams_weights_first(loop, loads):
    """W comes in 16-byte loads, evicted first, none of which waits for those of x; no shuffle, no spill."""
    assert count(loop, r"\bLDG\.E\.EF\.128\b") == count(loop, r"\bLDG\S*EF") == loads
    first_x = next(i for i, text in enumerate(loop) if re.search(r"\bLDG\S*\.EL", text))
    assert count(loop[:first_x], r"\bLDG\.E\.EF\.128\b") == loads, "loads of W wait for those of x"
    assert not count(loop, r"\bSHFL\b")


def assert_multiplies(loop, name, config, capability):
    if "fp32" in name:
        assert count(loop, r"\bFFMA2?\b") and not count(loop, r"MMA\b"), "fp32 is not IEEE"
    elif config.kernel == "prefill":
        assert count(loop, {90: r"\bHGMMA\b", 100: r"\bUTCHMMA\b"}.get(capability, r"\bHMMA\b"))
    else:
        expected = config.ROWS // 16 * config.BLOCK_M // 8 * config.BLOCK_K // 16
        assert count(loop, r"\bHMMA\.16816\b") == expected, "warps multiply what others do too"


@compiles
@pytest.mark.parametrize(
    "name,block",
    [
        ("16-bit, M = 1", (16, 16)),
        ("16-bit, M = 1", (128, 128)),
        ("16-bit, M <= 16", (48, 80)),
        ("16-bit, M <= 64", (32, 32)),
        ("16-bit, more", (64, 64)),
    ],
    ids=str,
)
def test_blocks_of_other_sizes_load_16_bytes_at_a_time_too(name, block, tmp_path):
    config, kernel = compile_config(name, 90, block)
    loop = innermost_loop(assert_fits(kernel, 90, tmp_path))
    assert config.ROWS == math.gcd(CONFIGS[name].ROWS, block[0])
    assert count(loop, r"\b(LDG\.E\.EF|LDGSTS\.E\.BYPASS)\.128\b")
    assert not count(loop, r"\bLDG\S*\.EF(?!\.128)")


@compiles
@pytest.mark.parametrize("name", ["16-bit, M = 1", "16-bit, M <= 16", "16-bit, more", "fp32, more"])
def test_ragged_K_compiles(name, tmp_path):
    dtype = "fp32" if "fp32" in name else "fp16"
    kernel = compile_config(name, 90, K=1001, parts=False, dtype=dtype)[1]
    assert_fits(kernel, 90, tmp_path)


@compiles
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_add_parts_compiles(capability, tmp_path):
    pointers = {"parts_ptr": "*fp32", "cut_rows_ptr": "*i32"}
    pointers |= {f"{part}_ptr": "*bf16" for part in ("bias", "residual", "y")}
    constants = {"BN": 64, "LONGEST": 0, "HAS_BIAS": True, "HAS_RESIDUAL": True, "BLOCK_N": 64}
    assert_fits(compile_kernel(kernels._add_parts_kernel, pointers, constants, capability, 4), capability, tmp_path)


# On a GPU.


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason=f"no GPU: {target.why_not('cuda')}")
@pytest.mark.parametrize("block", [(64, 64), (128, 128), (16, 16)], ids=str)
@pytest.mark.parametrize("M", [1, 2, 8, 16, 33, 64, 65, 1024])
def test_gpu_real_layer_shapes(M, block):
    torch.manual_seed(0)
    for N, K in ((4096, 4096), (1024, 14336), (14336, 4096)):
        for dtype in DTYPES:
            w = block_weight(N, K, block, dtype, 0.2)
            x, bias, residual = (torch.randn(*shape, device=DEVICE).to(dtype) for shape in ((M, K), (N,), (M, N)))
            check(x, w, pack(w, block, target.num_sms(x.device)), bias, residual)


@pytest.mark.gpu
@pytest.mark.skipif(not HAS_GPU, reason=f"no GPU: {target.why_not('cuda')}")
@pytest.mark.parametrize("M", [1, 16, 128])
def test_gpu_cuda_graph(M):
    torch.manual_seed(0)
    w = block_weight(4096, 4096, (64, 64), torch.bfloat16)
    prepared = pack(w, (64, 64))
    x = torch.randn(M, 4096, device=DEVICE).to(torch.bfloat16)
    spmm_block(x, prepared, 4096)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = spmm_block(x, prepared, 4096)
    x.copy_(torch.randn_like(x))
    graph.replay()
    assert_as_good_as_dense(out, F.linear(x, w), F.linear(x.double(), w.double()))
