"""Launches that cost the host little: Triton finds the compiled kernel of a call anew each time, here it is kept."""

from typing import Any


class Kernel:
    """A Triton kernel, its constants and its warps. The first call compiles it; later ones go straight to the driver.

    So what Triton specialises a kernel for (pointers and numbers divisible by 16, numbers that are 1) must be the same
    in all calls, or be named by the kernel's `do_not_specialize`.
    """

    def __init__(self, kernel: Any, constants: dict[str, Any], num_warps: int) -> None:
        self.kernel, self.constants, self.num_warps = kernel, constants, num_warps
        self.tail = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.compiled: Any = None

    def __call__(self, grid: tuple[int, int, int], *args: Any) -> None:
        """Launch with `args`, all that are no constants, in their order."""
        if self.compiled is None:
            self.compiled = self.kernel[grid](*args, **self.constants, num_warps=self.num_warps)
        else:
            self.compiled[grid](*args, *self.tail)
