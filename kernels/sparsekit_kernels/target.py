"""What this machine can run: whether Triton works here, and in words why not.

Importing this module imports no Triton and touches no device; every answer is found on first use and remembered.
"""

import functools
import importlib.util
import os

import torch

# Triton reads the same variable when it decorates a kernel: with it, kernels run on the CPU in numpy.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on")

MIN_CAPABILITY = (8, 0)  # bf16 and cp.async, which every kernel here leans on


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """Return the compute capability of a CUDA device, e.g. (9, 0)."""
    return torch.cuda.get_device_capability(device)


@functools.cache
def num_sms(device: torch.device) -> int:
    """Return the number of multiprocessors; under the interpreter that of an H100, so that it picks as a GPU would."""
    return 132 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def why_not(device: torch.device | str) -> str | None:
    """Return None if the Triton kernels run on `device`, else the reason and what to do."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install triton"
    if INTERPRETED:
        return None
    return why_not_cuda(torch.device(device))


@functools.cache
def why_not_cuda(device: torch.device) -> str | None:
    """Return None if `device` is an NVIDIA GPU that this torch can use and that is recent enough, else the reason."""
    if device.type != "cuda":
        return f"needs an NVIDIA GPU, the tensor is on {device.type}"
    if torch.version.hip is not None:
        return "needs an NVIDIA GPU, this is a ROCm build of torch"
    if not torch.cuda.is_available():
        return "no CUDA device is visible to torch (a CPU build, no driver, or CUDA_VISIBLE_DEVICES is empty)"
    if capability(device) < MIN_CAPABILITY:
        found, needed = (".".join(map(str, pair)) for pair in (capability(device), MIN_CAPABILITY))
        return f"needs compute capability {needed} or newer, {torch.cuda.get_device_name(device)} has {found}"
    return None
