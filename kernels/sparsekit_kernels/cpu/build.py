"""Compile csrc/ on first use, once per machine: `library()` is the loaded shared object.

One shared object holds every instruction set; each has its own translation unit with its own flags, and nothing else
is compiled for more than the baseline, so the file runs on any machine of the same architecture. It is cached under a
hash of the sources, the flags and the compiler's version, written beside its place and renamed, so that processes may
race. Where no cache folder can be written, each process builds in a private temporary folder.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCE_DIR = Path(__file__).parent / "csrc"
FLAGS = "-std=c++17 -O3 -fPIC -fvisibility=hidden -fno-exceptions -fno-rtti -w".split()
_AVX512 = "-mavx2 -mfma -mavx512f -mavx512bw -mavx512dq -mavx512vl".split()
UNITS: dict[str, list[str]] = {"api": [], "layout": [], "portable": [], "quantised_portable": []}
if platform.machine() in ("x86_64", "AMD64"):
    UNITS |= {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": _AVX512,
        "avx512_bf16": [*_AVX512, "-mavx512vbmi2", "-mavx512bf16"],
        "quantised_avx2": ["-mavx2", "-mfma"],
        "quantised_avx512_vnni": [*_AVX512, "-mavx512vbmi2", "-mavx512vnni"],
    }


class BuildError(RuntimeError):
    """The kernels could not be compiled or loaded; the message holds what the compiler said."""


def compiler() -> list[str] | None:
    """Return the command of the C++ compiler: $CXX, or the first of g++, clang++ and c++ on PATH."""
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    for candidate in candidates:
        command = shlex.split(candidate)
        if command and shutil.which(command[0]):
            return command
    return None


def cache_dir() -> Path:
    """Return the folder for compiled kernels: $SPARSEKIT_CACHE, $XDG_CACHE_HOME/sparsekit or ~/.cache/sparsekit."""
    if os.environ.get("SPARSEKIT_CACHE"):
        return Path(os.environ["SPARSEKIT_CACHE"])
    if os.environ.get("XDG_CACHE_HOME"):
        return Path(os.environ["XDG_CACHE_HOME"]) / "sparsekit"
    return Path(os.path.expanduser("~")) / ".cache" / "sparsekit"


@functools.cache
def library() -> ctypes.CDLL:
    """Return the compiled kernels, compiling them if this machine has not yet.

    Raises:
        BuildError: no compiler, the compiler failed, or the result cannot be loaded.
    """
    command = compiler()
    if command is None:
        raise BuildError("no C++ compiler found: install g++ or clang++, or set CXX")
    name = f"cpu_spmm24_{_key(command)}.so"
    folder = cache_dir()
    try:
        cached = folder / name
        if not cached.exists():
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            _compile(command, cached)
        if _is_trusted(cached) and _is_trusted(folder):
            return ctypes.CDLL(str(cached))
    except OSError:
        pass  # a read-only home, a full disk, or a folder that forbids running code: build in private instead
    try:
        # mkdtemp makes the folder 0700; the loaded file stays mapped after the folder is gone.
        with tempfile.TemporaryDirectory(prefix="sparsekit_") as private:
            path = Path(private) / name
            _compile(command, path)
            return ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(
            f"cannot write or load compiled kernels in {folder} or {tempfile.gettempdir()}: {error}"
        ) from error


def _key(command: list[str]) -> str:
    """Hash all that the compiled file depends on."""
    digest = hashlib.sha256(repr((command, FLAGS, UNITS, platform.machine())).encode())
    digest.update(_run([*command, "--version"]).encode())
    for path in sorted(SOURCE_DIR.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:24]


def _is_trusted(path: Path) -> bool:
    """Say whether only this user (or root) can have written `path`: we are about to run it."""
    status = path.stat()
    return status.st_uid in (os.getuid(), 0) and not status.st_mode & 0o002


def _compile(command: list[str], path: Path) -> None:
    """Write the shared object to `path`; other processes see all of it or nothing."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="build_") as folder:

        def compile_unit(unit: str) -> str:
            out = f"{folder}/{unit}.o"
            _run([*command, *FLAGS, *UNITS[unit], "-c", str(SOURCE_DIR / f"{unit}.cpp"), "-o", out])
            return out

        # Not more than two compilers at a time: this may be a login node, and all of it is seconds.
        with ThreadPoolExecutor(2) as pool:
            objects = list(pool.map(compile_unit, reversed(UNITS)))
        shared = f"{folder}/{path.name}"
        _run([*command, "-shared", "-fPIC", *objects, "-o", shared])
        os.replace(shared, path)


def _run(command: list[str]) -> str:
    """Run a compiler and return its output."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    if done.returncode:
        raise BuildError(f"`{shlex.join(command)}` failed with status {done.returncode}:\n{done.stdout.strip()}")
    return done.stdout
