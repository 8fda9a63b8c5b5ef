"""Every shipped launch of spmm24 compiles for every GPU generation, with the compiler in Triton's wheel and no GPU.

Looked at in the machine code: no register spills, shared memory within the chip's limit, tensor cores used at 16 bits.
Not shown here: that the code runs, or how fast.
"""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="Triton is not installed")

from sparsekit_kernels import target  # noqa: E402
from sparsekit_kernels.spmm24 import (  # noqa: E402
    CONFIGS,
    DECOMPRESS,
    _add_partial_kernel,
    _decompress24_kernel,
    _spmm24_kernel,
)

# Shared memory that one block may have, in KiB, by compute capability.
SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"

compiles = pytest.mark.skipif(
    target.INTERPRETED, reason="interpreted; test_in_the_compiler runs this in its own process"
)


@pytest.mark.skipif(not target.INTERPRETED, reason="this process compiles")
def test_in_the_compiler(pytestconfig):
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short", __file__]
    env = {**os.environ, "TRITON_INTERPRET": "0", "PYTEST_ADDOPTS": ""}
    done = subprocess.run(command, cwd=pytestconfig.rootpath, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout, done.stdout


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def compile_kernel(kernel, pointers, constants, capability, num_warps, num_stages=3, unaligned=()):
    """Compile as a launch would; what is neither a pointer nor a constant is an int32, a multiple of 16 if aligned."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, values, attributes = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
            values[(i,)] = constants[name]
            continue
        signature[name] = pointers.get(name, "i32")
        if name not in unaligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, values, attributes)
    options = {"num_warps": num_warps, "num_stages": num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def compile_spmm24(config, dtype, capability, K=4096, bias=True):
    split = config.SPLIT_K > 1
    pointers = {
        "x_ptr": f"*{dtype}", "pairs_ptr": "*i64" if dtype == "fp32" else "*i32", "meta_ptr": "*u8",
        "bias_ptr": f"*{dtype}", "out_ptr": "*fp32" if split else f"*{dtype}",
    }  # fmt: skip
    constants = {
        "K": K, "G": (K + 7) // 8 * 2, "HAS_BIAS": bias and not split, "UPCAST": False, "SPLIT_K": config.SPLIT_K,
        "BLOCK_M": config.BLOCK_M, "BLOCK_N": config.BLOCK_N, "BLOCK_G": config.BLOCK_G,
    }  # fmt: skip
    unaligned = {"M"} if K % 16 == 0 else {"M", "N", "stride_xm"}
    return compile_kernel(
        _spmm24_kernel, pointers, constants, capability, config.num_warps, config.num_stages, unaligned
    )


def inspect(kernel, tmp_path):
    """Return what cuobjdump says of the cubin: the SASS, and {"REG": …, "STACK": …, "LOCAL": …, "SHARED": …}."""
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    run = [str(BIN / "cuobjdump"), "--dump-sass", "--dump-resource-usage", str(cubin)]
    text = subprocess.run(run, check=True, capture_output=True, text=True).stdout
    usage = re.search(r"REG:\d+ STACK:\d+ SHARED:\d+ LOCAL:\d+", text)
    assert usage, text[:2000]
    return text, {key: int(value) for key, value in re.findall(r"(\w+):(\d+)", usage.group())}


def assert_fits(kernel, capability, tmp_path):
    assert len(kernel.asm["cubin"]) > 1000
    sass, usage = inspect(kernel, tmp_path)
    assert usage["STACK"] == 0 and usage["LOCAL"] == 0, f"spills: {usage}"
    assert not re.search(r"\b(LDL|STL)\b", sass), "local memory is used"
    assert kernel.metadata.shared <= SHARED_KIB[capability] * 1024, f"{kernel.metadata.shared} bytes of shared memory"
    print(f"sm_{capability}: {usage['REG']} registers, {kernel.metadata.shared} bytes of shared memory")
    return sass


@compiles
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("name", CONFIGS)
def test_every_config_compiles(name, capability, tmp_path):
    kernel = compile_spmm24(CONFIGS[name], "fp32" if name == "fp32" else "bf16", capability)
    sass = assert_fits(kernel, capability, tmp_path)
    assert re.search(r"\bLDGSTS\S*\.128\b|\bUTMALDG\b", sass), "no 16-byte asynchronous load"
    if name != "fp32":
        assert re.search(r"\b(HMMA|HGMMA|UTCHMMA)\b", sass), "no tensor core instruction"


@compiles
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "fp32"])
def test_split_and_ragged_K_compile(dtype, capability, tmp_path):
    config = CONFIGS["fp32" if dtype == "fp32" else "16-bit, M <= 16"]
    assert_fits(compile_spmm24(replace(config, SPLIT_K=4), dtype, capability), capability, tmp_path)
    assert_fits(compile_spmm24(config, dtype, capability, K=1001), capability, tmp_path)


@compiles
@pytest.mark.parametrize("capability", SHARED_KIB)
@pytest.mark.parametrize("bits", [16, 32])
def test_decompress24_compiles(bits, capability, tmp_path):
    pointers = {"pairs_ptr": f"*i{2 * bits}", "meta_ptr": "*u8", "w_ptr": f"*i{bits}"}
    constants = {"K": 4096, "G": 1024, **{name: DECOMPRESS[name] for name in ("BLOCK_N", "BLOCK_G")}}
    kernel = compile_kernel(_decompress24_kernel, pointers, constants, capability, DECOMPRESS["num_warps"])
    sass = assert_fits(kernel, capability, tmp_path)
    assert "STG.E.128" in sass, "the dense weight is not written 16 bytes at a time"


@compiles
@pytest.mark.parametrize("capability", SHARED_KIB)
def test_add_partial_compiles(capability, tmp_path):
    pointers = {"partial_ptr": "*fp32", "bias_ptr": "*bf16", "y_ptr": "*bf16"}
    constants = {"HAS_BIAS": True, "SPLIT_K": 8, "BLOCK": 1024}
    assert_fits(compile_kernel(_add_partial_kernel, pointers, constants, capability, 4), capability, tmp_path)
