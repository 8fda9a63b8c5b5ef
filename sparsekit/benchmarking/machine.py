"""This machine: what it is, and the most that it can do, measured."""

import functools
import itertools
import os
import platform
import subprocess
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsekit.benchmarking.timing import Call, compare
from sparsekit.version import __version__


@dataclass(frozen=True)
class Ceilings:
    """The best rates seen on one device.

    Attributes:
        device: "cpu" or "cuda:0".
        read_gb_s: memory read bandwidth, GB/s, on a buffer far larger than the caches.
        matmul_gflop_s: dtype name ("bfloat16") -> dense matmul rate, GFLOP/s.
    """

    device: str
    read_gb_s: float
    matmul_gflop_s: dict[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def share(self, num_bytes: int, num_flops: int, seconds: float, dtype: torch.dtype) -> float:
        """Return how near a call came to the ceiling that binds it, 1.0 being there."""
        matmul = self.matmul_gflop_s.get(dtype_name(dtype), float("inf"))
        return max(num_bytes / 1e9 / self.read_gb_s, num_flops / 1e9 / matmul) / seconds


def device_of(model: nn.Module) -> torch.device:
    """Return where the model's parameters are, or its buffers: packed layers without bias have only these."""
    first = next(itertools.chain(model.parameters(), model.buffers()), None)
    return first.device if first is not None else torch.device("cpu")


CEILING_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def measure_ceilings(device: torch.device | str = "cpu", dtypes: tuple[torch.dtype, ...] = CEILING_DTYPES) -> Ceilings:
    """Return this machine's read bandwidth and matmul rates; measured once a process, in about two seconds."""
    name = str(torch.device(device))
    threads = torch.get_num_threads()
    matmuls = {dtype_name(dtype): _matmul_gflop_s(name, dtype, threads) for dtype in dtypes}
    return Ceilings(name, _read_gb_s(name, threads), matmuls)


@functools.cache
def _read_gb_s(device: str, threads: int) -> float:
    num_bytes = (2 << 30) if device.startswith("cuda") else (256 << 20)
    matrix = torch.ones(num_bytes // 4 // 4096, 4096, device=device)
    vector, flat = torch.ones(4096, device=device), matrix.view(-1)
    # The best of three readers: which of them is the fastest differs between processors.
    readers: dict[str, Call] = {"sum": flat.sum, "mv": lambda: matrix @ vector, "max": flat.max}
    timings = compare(readers, rounds=7, max_seconds=1.0, device=device)
    return num_bytes / 1e9 / min(timings[name].min for name in readers)


@functools.cache
def _matmul_gflop_s(device: str, dtype: torch.dtype, threads: int) -> float:
    # Processors without fp16 arithmetic emulate it, a hundred times slower: a small product is enough to see that.
    size = 8192 if device.startswith("cuda") else 256 if dtype == torch.float16 else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    timing = compare({"matmul": lambda: a @ b}, rounds=9, max_seconds=1.0, device=device)["matmul"]
    return 2 * size**3 / 1e9 / timing.min


def cache_bytes(device: torch.device | str = "cpu") -> int:
    """Return the size of the last cache before memory; 0 where the machine does not say."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        unit = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}.get(text[-1:], 0)
        sizes.append(int(text[:-1]) * unit if unit else 0)
    return max(sizes, default=0)


def free_bytes(device: torch.device | str = "cpu") -> int:
    """Return the memory that can still be taken on `device`."""
    device = torch.device(device)
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if Path("/proc/meminfo").exists():
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2


def environment(device: torch.device | str | None = None) -> dict[str, Any]:
    """Return what a reader needs to judge a number: hardware, threads, versions, and the commit in a checkout."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _isa(),
        "gpu": None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "triton": _version("triton"),
        "sparsekit": __version__,
        "git_sha": git_sha(),
    }
    if torch.cuda.is_available():
        wanted = torch.device(device or "cuda")
        gpu = torch.cuda.get_device_properties(wanted if wanted.type == "cuda" else torch.device("cuda"))
        facts |= {"gpu": gpu.name, "gpu_arch": f"sm_{gpu.major}{gpu.minor}", "cuda": torch.version.cuda}
    return facts


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def git_sha() -> str | None:
    """Return the commit of the checkout that this package runs from, "+" if files differ; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    sha = _git(root, "rev-parse", "--short=12", "HEAD")
    return sha and sha + ("+" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")


def _git(root: Path, *words: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_model() -> str:
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _isa() -> str:
    """The instruction set that our CPU kernel runs on, else torch's own."""
    from sparsekit_kernels import cpu

    return cpu.isa() if cpu.why_not() is None else torch.backends.cpu.get_cpu_capability()


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
