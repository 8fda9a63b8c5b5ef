"""Every shipped launch of the `mma.sp` kernels compiles for every GPU generation, and what its machine code looks like.

No GPU is needed: ptxas and cuobjdump come in Triton's wheel. What the kernels compute is tested in
`test_kernels_in_ptx`, where the same code is executed; how fast they are takes a GPU.
"""

import functools
import os
import re
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit_kernels import (  # noqa: E402
    decompress_fragments24,
    fragments24,
    quantize_tokens,
    spmm24_mma,
    target,
)
from sparsekit_kernels.spmm24_mma import CONFIGS, Config, candidates, pick_config  # noqa: E402

# Shared memory that one block may have, in KiB, by compute capability.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = {"bf16": torch.bfloat16, "fp16": torch.float16, "i8": torch.int8}

# Instructions of the loop for a group of four dense weights, by the most tokens a launch serves: at most these, on any
# generation but sm_89. To read its weight at 4.3 TB/s an H200 may spend 35, 19.4, 19.4 and 12.2 issue slots on a group.
BUDGET = {
    "semi24": {2: 3.0, 8: 2.0, 16: 2.3, 32: 3.0, 64: 4.5},
    "semi24_fp8": {2: 7.8, 8: 6.9, 16: 6.9, 32: 7.4, 64: 9.0},
    "semi24_int8": {2: 6.9, 8: 6.2, 16: 6.2, 32: 6.8, 64: 8.3},
    "semi24_int4": {8: 6.1, 16: 6.1, 32: 7.3, 64: 11.0},
}
INT8_X_BUDGET = {2: 3.4, 8: 2.7, 16: 2.7, 32: 3.1, 64: 4.2}
FP8_BUDGET_WITH_CVT = {2: 4.6, 8: 3.9, 16: 3.9, 32: 4.3, 64: 5.8}  # fp16 x from sm_89 on: e4m3 in one instruction
ISSUE_SLOTS = {"semi24": 35.0, "semi24_fp8": 19.4, "semi24_int8": 19.4, "semi24_int4": 12.2}

compiles = pytest.mark.skipif(target.INTERPRETED, reason="Triton interprets here; these tests compile")


@pytest.fixture(autouse=True, scope="module")
def own_cache(request, tmp_path_factory):
    """Compiled kernels are kept by pytest's cache: Triton finds them by a digest of their source and of itself."""
    cache = getattr(request.config, "cache", None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(cache.mkdir("triton") if cache else tmp_path_factory.mktemp("triton")))
        yield
    compile_for.cache_clear()


def compile_kernel(kernel, pointers, constants, capability, num_warps, aligned=()):
    """Compile as a launch would; what is neither a pointer nor a constant is an int32."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource

    signature, values, attributes = {}, {}, {}
    for n, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(n,)] = constants[name]
            continue
        signature[name] = pointers.get(name, "i32")
        if name in aligned:
            attributes[(n,)] = [["tt.divisibility", 16]]
    source = (GluonASTSource if kernel.is_gluon() else ASTSource)(kernel, signature, values, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})


@functools.cache
def compile_for(capability, format, dtype, config, K=8192, bias=True, gated=False, residual=False):
    """The kernel that multiplies, for weights of `format` and x of `dtype`, "bf16", "fp16" or "i8"."""
    split, int8_x = config.SPLIT_K > 1, dtype == "i8"
    other = "bf16" if int8_x else dtype
    pointers = {
        "x_ptr": "*i32" if config.PACKED_X else f"*{dtype}", "fragments_ptr": "*i32", "metadata_ptr": "*i32",
        "scales_ptr": "*i32" if format == "semi24_int4" else "*fp32", "x_scales_ptr": "*fp32",
        "bias_ptr": f"*{other}", "residual_ptr": f"*{other}",
        "out_ptr": f"*{other}" if not split else "*i32" if int8_x else "*fp32",
    }  # fmt: skip
    constants = spmm24_mma.kernel_constants(format, NAMES[dtype], K, config, divmod(capability, 10)) | {
        "HAS_SCALES": format in ("semi24_fp8", "semi24_int8") and not split, "HAS_X_SCALES": int8_x and not split,
        "HAS_BIAS": bias and not split, "GATED": gated and not split, "HAS_RESIDUAL": residual and not split,
    }  # fmt: skip
    aligned = ("fragments_ptr", "metadata_ptr", "out_ptr", "N")
    warps = config.WARPS_N * config.WARPS_K
    return compile_kernel(spmm24_mma._spmm24_mma_kernel, pointers, constants, capability, warps, aligned)


def disassemble(kernel, tmp_path):
    """[(address, instruction)] and {"REG": …, "STACK": …, "LOCAL": …} of a compiled kernel."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    run = [str(BIN / "cuobjdump"), "--dump-sass", "--dump-resource-usage", str(cubin)]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+", text)
    assert usage, text[:2000]
    code = [(int(a, 16), b.strip()) for a, b in re.findall(r"/\*([0-9a-f]{4,5})\*/\s+(.*?);", text)]
    return code, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage.group())}


def assert_fits(kernel, capability, tmp_path, spilled=0):
    """Nothing is spilled, or at most `spilled` bytes of which the loop that multiplies loads one register back."""
    code, usage = disassemble(kernel, tmp_path)
    assert usage["STACK"] <= spilled and usage["LOCAL"] == 0, f"spills: {usage}"
    hot = loop_of(code) if spilled else [instruction for _, instruction in code]
    local = [instruction for instruction in hot if re.search(r"\b(LDL|STL)\b", instruction)]
    assert len(local) <= (spilled > 0) and not any("STL" in instruction for instruction in local), local
    assert kernel.metadata.shared <= SHARED_KIB[capability] * 1024, f"{kernel.metadata.shared} bytes of shared memory"
    threads = 32 * kernel.metadata.num_warps
    assert usage["REG"] * threads <= 65536, f"{usage['REG']} registers for each of {threads} threads"
    return code


def loop_of(code):
    """The instructions of the one loop that multiplies: from where a branch leads back to, up to that branch."""
    loops = []
    for address, instruction in code:
        branch = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", instruction)
        if branch and int(branch.group(1), 16) < address:
            loops.append([b for a, b in code if int(branch.group(1), 16) <= a <= address])
    loops = [loop for loop in loops if any("MMA.SP" in instruction for instruction in loop)]
    assert len(loops) == 1, f"{len(loops)} loops with tensor core instructions"
    return loops[0]


def opcode(instruction):
    return re.sub(r"^@!?U?P\d+ ", "", instruction).split()[0]


def launches():
    """Shipped launches: every one for sm_90, and for the other targets every format and number of tokens, in bf16 and
    fp16 by turns. $SPARSEKIT_TEST_ALL_LAUNCHES=1 leaves no dtype out, which takes the compiler twice as long."""
    every = os.environ.get("SPARSEKIT_TEST_ALL_LAUNCHES", "0") == "1"
    for n, capability in enumerate(SHARED_KIB):
        for f, (format, configs) in enumerate(CONFIGS.items()):
            for m, tokens in enumerate(configs):
                both = every or capability == 90
                for dtype in ("bf16", "fp16") if both else (("bf16", "fp16")[(n + f + m) % 2],):
                    yield capability, format, dtype, tokens
                if format == "semi24_int8":
                    yield capability, format, "i8", tokens


@compiles
@pytest.mark.parametrize("capability, format, dtype, tokens", list(launches()))
def test_every_launch_compiles(capability, format, dtype, tokens, tmp_path):
    config = CONFIGS[format][tokens]
    kernel = compile_for(capability, format, dtype, config)
    code = assert_fits(kernel, capability, tmp_path)
    instructions = loop_of(code)
    loop = [opcode(instruction) for instruction in instructions]

    rows, fragments, int8_x = config.ROW_TILES, config.TOKENS // 8, dtype == "i8"
    units = 4 if int8_x else 8  # instructions for the columns of a step
    mma = [name for name in loop if "MMA.SP" in name]
    assert len(mma) == units * rows * fragments
    instruction = {
        "fp16": r"HMMA\.SP\.16832\.F32$", "bf16": r"HMMA\.SP\.16832\.F32\.BF16$", "i8": r"IMMA\.SP\.16864\.S8\.S8$"
    }  # fmt: skip
    assert all(re.match(instruction[dtype], name) for name in mma), mma

    # W and its metadata come 16 bytes a lane, once (for int8 x the metadata of two lanes), and so does packed x.
    wide = sum(name.startswith("LDG") and ".128" in name for name in loop)
    assert wide == rows * (fragments24.CHUNKS[format] + 1 + int8_x) + (units * fragments if config.PACKED_X else 0)
    narrow = sum(name.startswith("LDG") and ".128" not in name for name in loop)
    scales = 2 * rows if format == "semi24_int4" else 0
    assert narrow == scales + (0 if config.PACKED_X else 4 * units * fragments)

    assert loads_under_way(instructions) >= (4 if tokens < 64 else 3), loads_under_way(instructions)

    # Nothing goes through shared memory, nothing waits for other warps.
    assert not [name for name in loop if re.match(r"(STS|LDS|LDSM|BAR|ATOM|RED|SHFL|WARPSYNC)\b", name)]
    assert "convert_layout" not in loop_in_ttgir(kernel)

    budget = INT8_X_BUDGET[tokens] if int8_x else BUDGET[format][tokens]
    if format == "semi24_fp8" and dtype == "fp16" and capability >= 89:
        budget = FP8_BUDGET_WITH_CVT[tokens]
    if capability == 89:  # there ptxas copies operands to where it wants them; memory is slow enough for it
        budget += 1.6
    if (
        triton.__version__ < "3.7"
    ):  # which orders the loop's instructions otherwise; the GPUs with slow memory lose most
        budget *= 1.2
    per_group = len(loop) / (8 * rows * 4)  # an instruction of a warp is 32 of a lane, a tile has 128 groups
    print(f"sm_{capability} {format} {dtype} {tokens}: {per_group:.2f}")
    assert per_group <= budget, f"{per_group:.2f} instructions for a group"


def loads_under_way(loop):
    """The most 16-byte loads that a lane has issued in the loop and not yet waited for: up to the first use of each."""
    twice = loop + loop
    spans = []
    for n, instruction in enumerate(loop):
        load = re.match(r"(?:@!?U?P\d+ )?LDG\S*\.128\S* (R\d+),", instruction)
        if load:
            register = re.compile(rf"\b{load.group(1)}\b(?!\.64\])")
            spans.append((n, next(m for m in range(n + 1, len(twice)) if register.search(twice[m]))))
    return max(sum(start < n <= end or start < n + len(loop) <= end for start, end in spans) for n in range(len(loop)))


def loop_in_ttgir(kernel):
    text = kernel.asm["ttgir"]
    return text[text.index("scf.for") : text.index("scf.yield")]


@compiles
@pytest.mark.parametrize("capability", [80, 90, 120])
def test_registers_and_lanes_are_where_the_fragments_want_them(capability):
    """All operands of inline PTX have the layout in which a lane holds four neighbours, one warp after the other."""
    kernel = compile_for(capability, "semi24", "bf16", CONFIGS["semi24"][2])
    text = kernel.asm["ttgir"]
    layouts = dict(re.findall(r"^(#\w+) = #ttg\.blocked<(\{.*?\})>", text, re.MULTILINE))
    asm = re.findall(r"elementwise_inline_asm .*?: (.*?) loc", text)
    assert len(asm) == 2 * 16  # in the loop and after it: 8 fragments of x, 8 multiplications
    used = set(re.findall(r"tensor<\d+x\w+, (#\w+)>", " ".join(asm)))
    assert len(used) == 1, used
    expected = "{sizePerThread = [4], threadsPerWarp = [32], warpsPerCTA = [8], order = [0]}"
    assert layouts[used.pop()] == expected
    modifier = "::ordered_metadata" if capability >= 100 else ""
    assert f"mma.sp{modifier}.sync.aligned.m16n8k32" in kernel.asm["ptx"]


@compiles
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_every_epilogue_compiles(capability, tmp_path):
    plain, plain_int8 = CONFIGS["semi24"][8], CONFIGS["semi24_int8"][8]
    turn = list(SHARED_KIB).index(capability)
    gated, residual = turn % 3 < 2, turn % 3 > 0
    kernel = compile_for(capability, "semi24_int8", "bf16", plain_int8, K=1000, gated=gated, residual=residual)
    assert_fits(kernel, capability, tmp_path)
    split = replace(plain, SPLIT_K=4)
    spilled = 8 if triton.__version__ < "3.7" else 0  # Triton 3.6 on sm_90 and sm_100: an address
    assert_fits(compile_for(capability, "semi24", "fp16", split, K=1000), capability, tmp_path, spilled)
    int8_x = turn % 2 == 0
    if int8_x:
        kernel = compile_for(
            capability, "semi24_int8", "i8", replace(plain_int8, SPLIT_K=4), K=1001, gated=gated, residual=residual
        )
        assert_fits(kernel, capability, tmp_path)
    flags = {
        "HAS_SCALES": True, "HAS_X_SCALES": int8_x, "HAS_BIAS": True, "GATED": not gated, "HAS_RESIDUAL": True,
        "SPLIT_K": 4,
    }  # fmt: skip
    outside = dict.fromkeys(("bias_ptr", "residual_ptr", "y_ptr"), "*bf16")
    sums = {"sums_ptr": "*i32" if int8_x else "*fp32"}
    pointers = sums | {"scales_ptr": "*fp32", "x_scales_ptr": "*fp32"} | outside
    code = assert_fits(
        compile_kernel(spmm24_mma._add_splits_kernel, pointers, flags, capability, 4), capability, tmp_path
    )
    assert not any(opcode(instruction).startswith(("ATOM", "RED")) for _, instruction in code)


@compiles
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_packing_and_decompressing_compile(capability, tmp_path):
    turn = list(SHARED_KIB).index(capability) % 2
    for units, x in ((8, "*bf16"), (4, "*i8"))[turn:]:
        pointers = {"x_ptr": x, "packed_ptr": "*i32"}
        kernel = compile_kernel(spmm24_mma._pack_x_kernel, pointers, {"UNITS": units}, capability, 4, ("packed_ptr",))
        assert any("STG.E.128" in instruction for _, instruction in assert_fits(kernel, capability, tmp_path))
    pointers = {"x_ptr": "*bf16", "q_ptr": "*i8", "scales_ptr": "*fp32"}
    kernel = compile_kernel(quantize_tokens._quantize_tokens_kernel, pointers, {"BLOCK": 4096}, capability, 8)
    assert_fits(kernel, capability, tmp_path)
    for format in ("semi24", "semi24_int4") if turn else ("semi24_fp8", "semi24_int8"):
        pointers = {
            "fragments_ptr": "*i32", "metadata_ptr": "*i32", "w_ptr": "*bf16",
            "scales_ptr": "*i32" if format == "semi24_int4" else "*fp32",
        }  # fmt: skip
        constants = {"FORMAT": format, "NUM_CHUNKS": fragments24.CHUNKS[format], "GATED": True, "QUADS": True}
        kernel = compile_kernel(decompress_fragments24._decompress_kernel, pointers, constants, capability, 4)
        code = assert_fits(kernel, capability, tmp_path)
        assert sum("STG.E.64" in instruction for _, instruction in code) == 8, "not one store of 8 bytes for a group"


def test_budgets_leave_room():
    """The weight is read at the speed of memory: the budgets are below the issue slots that an H200 has meanwhile."""
    for format, budget in [*BUDGET.items(), ("semi24_int8", INT8_X_BUDGET)]:
        assert list(budget) == list(CONFIGS[format]) and max(budget.values()) < ISSUE_SLOTS[format]


def test_pick_config():
    for format, configs in CONFIGS.items():
        for M in (1, 2, 3, 8, 9, 16, 33, 64, 65, 5000):
            config = pick_config(format, M, 4096, 4096, 132)
            bucket = min((most for most in configs if most >= M), default=64)
            assert replace(config, SPLIT_K=1) == configs[bucket]
    wide, narrow = pick_config("semi24", 1, 28672, 4096, 132), pick_config("semi24", 1, 512, 14336, 132)
    assert wide.SPLIT_K == 1 and narrow.SPLIT_K > 1
    assert pick_config("semi24", 1, 16, 256, 132).SPLIT_K == 1, "a step cannot be split"
    for K in (256, 1000, 4096, 28672):
        for N in (1, 100, 4096):
            config = pick_config("semi24", 4, N, K, 132)
            assert config.SPLIT_K == 1 or config.SPLIT_K * config.WARPS_K <= fragments24.num_steps(K)


def test_candidates_are_launches():
    for format in fragments24.FORMATS:
        for M in (1, 16, 64, 300):
            found = candidates(format, M, 4096, 4096, 132)
            assert found[0] == pick_config(format, M, 4096, 4096, 132) and len(set(found)) == len(found) > 4
            for config in found:
                assert fragments24.CHUNKS[format] % config.AHEAD == 0
                assert config.WARPS_N * config.WARPS_K <= 32 and config.TOKENS % 8 == 0


@compiles
@pytest.mark.parametrize("config", [Config(TOKENS=8, ROW_TILES=4, AHEAD=2, WARPS_N=1, WARPS_K=8, SPLIT_K=2)])
def test_a_candidate_that_no_table_names_compiles(config, tmp_path):
    assert config in candidates("semi24", 1, 8192, 8192, 132)
    assert_fits(compile_for(90, "semi24", "bf16", config), 90, tmp_path)


def operands(N=32, K=512, format="semi24"):
    T, S = fragments24.num_tiles(N), fragments24.num_steps(K)
    return torch.zeros(T, S, fragments24.CHUNKS[format], 32, 4, dtype=torch.int32), torch.zeros(
        T, S, 32, 4, dtype=torch.int32
    )


def test_without_a_gpu_it_says_so():
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU, the tensor is on cpu"):
        spmm24_mma.spmm24(torch.zeros(1, 512, dtype=torch.bfloat16), *operands(), 32)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x_scales=None), "x is int8 and x_scales are missing: pass the float32 ones of quantize_tokens"),
        (dict(x_scales=torch.ones(2).half()), "x_scales are torch.float16"),
        (dict(x_scales=torch.ones(3)), r"x_scales are \(3,\): expected one for each row of x, \(2,\)"),
        (dict(out_dtype=torch.float32), "out_dtype=torch.float32: expected torch.bfloat16 or torch.float16"),
        (dict(x=torch.zeros(2, 512).half()), "are for int8 x, x is torch.float16: leave them out"),
        (dict(x=torch.zeros(2, 262143, dtype=torch.int8)), "int32 holds the sums of at most 262142 columns"),
        (dict(bias=torch.zeros(32).half()), "bias is torch.float16"),
        (dict(residual=torch.zeros(2, 32)), "residual is torch.float32"),
        (dict(residual=torch.zeros(1, 32).bfloat16()), r"residual is \(1, 32\): expected \(2, 32\)"),
    ],
)
def test_bad_input_with_int8_x(change, message, monkeypatch):
    monkeypatch.setattr(spmm24_mma, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(spmm24_mma, "capability", lambda device: (9, 0))
    monkeypatch.setattr(spmm24_mma, "num_sms", lambda device: 132)
    fragments, metadata = operands(format="semi24_int8")
    x = torch.zeros(2, 512, dtype=torch.int8)
    arguments = (
        dict(x=x, fragments=fragments, metadata=metadata, scales=torch.ones(32), N=32, x_scales=torch.ones(2)) | change
    )
    with pytest.raises(ValueError, match=message):
        spmm24_mma.spmm24_int8(**arguments)
    if not change.keys() & {"x_scales", "out_dtype"}:
        with pytest.raises(ValueError, match="x is torch.int8: expected torch.float16 or torch.bfloat16"):
            spmm24_mma.spmm24(x, *operands(), 32)


@pytest.mark.parametrize("x", [torch.zeros(2, 3, dtype=torch.int8), torch.zeros(2, 0), torch.tensor(1.0)])
def test_what_cannot_be_quantised(x, monkeypatch):
    with pytest.raises(RuntimeError, match="quantize_tokens cannot run here: needs an NVIDIA GPU"):
        quantize_tokens.quantize_tokens(x)
    monkeypatch.setattr(quantize_tokens, "why_not", lambda device: None)
    with pytest.raises(ValueError, match="x is (torch.int8: expected|.*no features)"):
        quantize_tokens.quantize_tokens(x)


def test_launches_are_bounded():
    """Ever new numbers of tokens share launches, whose config is that of `pick_config` for each of them."""
    numbers = [*range(1, 3000), *range(3000, 200_000, 777), 10**6]
    kinds = {spmm24_mma._tokens_like(M) for M in numbers}
    assert len(kinds) <= 7 + spmm24_mma.MOST_BLOCKS and 0 not in kinds and spmm24_mma._tokens_like(0) == 0
    for format in ("semi24", "semi24_int4"):
        for N, K in [(16, 256), (512, 14336), (28672, 4096)]:
            for M in numbers[:300] + numbers[::97]:
                like = spmm24_mma._tokens_like(M)
                assert pick_config(format, M, N, K, 200) == pick_config(format, like, N, K, 200)


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(x=torch.zeros(2, 512)), "x is torch.float32"),
        (dict(x=torch.zeros(2, 500).half()[:, :0]), "no features"),
        (dict(x=torch.zeros(2, 1024).half()), "are not W"),
        (dict(N=33), "are not W"),
        (dict(bias=torch.zeros(31).half()), "bias is"),
        (dict(bias=torch.zeros(32)), "bias is torch.float32"),
        (dict(residual=torch.zeros(3, 32).half()), "residual is"),
        (dict(activation="gelu"), "gelu"),
        (dict(activation="silu_mul", N=31), "as many gate as up"),
        (
            dict(metadata=operands()[1].transpose(2, 3).contiguous().transpose(2, 3)),
            "metadata .* with strides .* are not",
        ),
        (dict(fragments=operands()[0].float()), "fragments torch.float32 .* are not W"),
        (dict(config=Config(TOKENS=8, ROW_TILES=1, AHEAD=16, WARPS_N=1, WARPS_K=8)), "AHEAD=16: .* has 8 chunks"),
    ],
)
def test_bad_input(change, message, monkeypatch):
    monkeypatch.setattr(spmm24_mma, "why_not_cuda", lambda device: None)
    fragments, metadata = operands()
    arguments = dict(x=torch.zeros(2, 512).half(), fragments=fragments, metadata=metadata, N=32) | change
    with pytest.raises(ValueError, match=message):
        spmm24_mma.spmm24(**arguments)


@pytest.fixture
def launches_that_do_nothing(monkeypatch):
    """The wrappers get as far as they do on a GPU: what they let pass is launched, and computes nothing."""
    monkeypatch.setattr(spmm24_mma, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(spmm24_mma, "capability", lambda device: (9, 0))
    monkeypatch.setattr(spmm24_mma, "num_sms", lambda device: 132)
    monkeypatch.setattr(spmm24_mma.Kernel, "__call__", lambda self, grid, *args: None)
    monkeypatch.setattr(spmm24_mma, "_launches", {})


@pytest.mark.parametrize("known", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("format", fragments24.FORMATS)
def test_each_call_is_checked(format, known, launches_that_do_nothing):
    """Also those of a shape that was launched before."""
    fragments, metadata = operands(format=format)
    good = dict(x=torch.zeros(2, 512).half(), fragments=fragments, metadata=metadata, N=32, bias=torch.zeros(32).half())
    good["residual"] = torch.zeros(2, 32).half()
    multiply = getattr(spmm24_mma, "spmm24" + format.removeprefix("semi24"))
    changes = [
        (dict(fragments=fragments.transpose(0, 1).contiguous().transpose(0, 1)), "fragments .* with strides"),
        (dict(fragments=fragments.view(torch.float32)), "fragments torch.float32"),
        (dict(fragments=fragments[:1]), "fragments .* are not W"),
        (dict(fragments=fragments.to("meta")), "fragments on meta"),
        (dict(metadata=metadata.transpose(0, 1).contiguous().transpose(0, 1)), "metadata .* with strides"),
        (dict(metadata=metadata.view(torch.float32)), "metadata torch.float32"),
        (dict(metadata=metadata[:1]), "metadata .* are not W"),
        (dict(bias=torch.zeros(32)), "bias is torch.float32"),
        (dict(bias=torch.zeros(33).half()), "bias is"),
        (dict(bias=torch.zeros(32, device="meta").half()), "bias is on meta"),
        (dict(residual=torch.zeros(2, 32)), "residual is torch.float32"),
        (dict(residual=torch.zeros(2, 32, device="meta").half()), "residual is on meta"),
        (dict(x=torch.zeros(2, 512)), "x is torch.float32"),
    ]
    if format != "semi24":
        good["scales"] = scales = (
            torch.ones(2, 2, 2, 8, dtype=torch.int32) if format == "semi24_int4" else torch.ones(32)
        )
        changes += [
            (dict(scales=None), f"{format} needs scales: pass contiguous"),
            (dict(scales=scales.to(torch.float64)), "scales torch.float64 .*: expected contiguous"),
            (dict(scales=scales[:-1]), "scales .*: expected contiguous"),
            (dict(scales=torch.stack([scales, scales], -1)[..., 0]), "scales .* with strides .*: expected contiguous"),
            (dict(scales=scales.to("meta")), "scales is on meta"),
        ]
    for change, message in changes:
        if known:
            if "on meta" in message:
                continue  # neither it nor the CPU, which passes for a GPU here, has a number
            multiply(**good)
        with pytest.raises(ValueError, match=message):
            multiply(**(good | change))


def test_operands_between_multiples_of_16_bytes_are_compiled_for_apart(launches_that_do_nothing):
    fragments, metadata = operands()
    shifted = torch.zeros(fragments.numel() + 1, dtype=torch.int32)[1:].view(fragments.shape)
    for operand in (fragments, shifted, fragments):
        spmm24_mma.spmm24(torch.zeros(2, 512).half(), operand, metadata, 32)
    assert len(spmm24_mma._launches) == 2


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(TOKENS=4), "TOKENS=4: expected a power of two, 8 or more"),
        (dict(TOKENS=128), "TOKENS=128"),
        (dict(AHEAD=3), "AHEAD=3: expected a power of two"),
        (dict(ROW_TILES=0), "ROW_TILES=0"),
        (dict(WARPS_K="8"), "WARPS_K='8'"),
        (dict(SPLIT_K=-2), "SPLIT_K=-2"),
        (dict(WARPS_N=8), "at most 32 warps"),
        (dict(PACKED_X=2), "PACKED_X=2"),
    ],
)
def test_a_config_that_cannot_be_launched(change, message):
    """One of them reaching the compiler may end the process."""
    with pytest.raises(ValueError, match=message):
        replace(CONFIGS["semi24"][8], **change)
