"""From a Triton kernel and CPU tensors to the emulator, with the specialisation that Triton itself would choose."""

import struct
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
from torch import Tensor

from tests.kernels.ptx.machine import Code, execute
from tests.kernels.ptx.memory import GlobalMemory
from tests.kernels.ptx.program import parse

SHARED_KIB = {80: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # for one block

_codes: dict[str, Code] = {}


def run(
    ptx: str,
    grid: Sequence[int],
    args: Sequence[Tensor | int | float],
    shared_bytes: int = 0,
    order: str = "forward",
    threads_at_once: int = 1 << 14,
) -> Counter[str]:
    """Execute the entry of `ptx` on every CTA of `grid`; tensors are pointers and are written in place.

    Args:
        args: in the order of the entry's parameters; parameters beyond them are null pointers.
        shared_bytes: the dynamic shared memory of a CTA.
        order: which CTAs go first, "forward", "reverse" or "random" (always the same one).
        threads_at_once: how many threads run in lockstep; fewer than a CTA has means one CTA at a time.

    Returns:
        How often each opcode was executed, counted once for all threads in lockstep.

    Raises:
        PtxError: the kernel does what no GPU defines, or holds an instruction that is not known.
    """
    if ptx not in _codes:
        _codes[ptx] = Code(parse(ptx))
    code = _codes[ptx]
    memory = GlobalMemory(arg for arg in args if isinstance(arg, Tensor))
    sizes = [nbytes for _, nbytes in code.program.params.values()]
    if len(args) > len(sizes):
        raise ValueError(f"{len(args)} arguments for {len(sizes)} parameters")
    params = [0] * len(sizes)
    for n, (arg, nbytes) in enumerate(zip(args, sizes, strict=False)):
        if isinstance(arg, Tensor):
            params[n] = memory.address(arg)
        elif isinstance(arg, float):
            params[n] = int.from_bytes(struct.pack({2: "<e", 4: "<f", 8: "<d"}[nbytes], arg), "little")
        else:
            params[n] = int(arg) % (1 << 8 * nbytes)
    ctas = np.arange(int(np.prod(grid)))
    if order == "reverse":
        ctas = ctas[::-1].copy()
    elif order == "random":
        ctas = np.random.default_rng(0).permutation(ctas)
    elif order != "forward":
        raise ValueError(f"order is {order!r}: expected 'forward', 'reverse' or 'random'")
    counts = execute(code, grid, params, memory, shared_bytes, ctas, threads_at_once)
    memory.copy_back()
    return counts


@dataclass(frozen=True)
class How:
    """What the emulator needs to know of a launch, see `emulated` and `run`."""

    capability: int
    order: str = "forward"
    threads_at_once: int = 1 << 14
    counts: Counter[str] = field(default_factory=Counter)


class Compiled:
    """A kernel for one target and one specialisation; like Triton's, `compiled[grid](*args)` runs it as it is."""

    cache: dict[tuple, "Compiled"] = {}

    def __init__(self, fn: Any, target: Any, backend: Any, kwargs: dict, bound: Any) -> None:
        import triton
        from triton.compiler import ASTSource
        from triton.experimental.gluon._runtime import GluonASTSource

        values, specialization, options = bound
        options, signature, constants, attributes = fn._pack_args(backend, kwargs, values, specialization, options)
        source = (GluonASTSource if fn.is_gluon() else ASTSource)(fn, signature, constants, attributes)
        self.kernel = triton.compile(source, target=target, options=options.__dict__)
        self.arg_names = list(signature)
        self.pointers = [name for name, kind in signature.items() if kind != "constexpr"]
        self.how = How(target.arch)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def runner(*args: Any) -> None:
            values = dict(zip(self.arg_names, args, strict=True))
            counts = run(
                self.kernel.asm["ptx"], grid, [values[name] for name in self.pointers], self.kernel.metadata.shared,
                self.how.order, self.how.threads_at_once,
            )  # fmt: skip
            self.how.counts.update(counts)

        return runner


def launch(fn: Any, grid: Any, *args: Any, how: How, **kwargs: Any) -> Compiled:
    """Compile `fn`, a function under @triton.jit, and run it as `fn[grid](*args, **kwargs)` would on a GPU."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    target = GPUTarget("cuda", how.capability, 32)
    backend = make_backend(target)
    kwargs.setdefault("debug", False)
    bound = create_function_from_signature(fn.signature, fn.params, backend)(*args, **kwargs)
    values, kinds, _ = bound
    constants = [value for (kind, *_), value in zip(kinds, values.values(), strict=True) if kind == "constexpr"]
    options = {name: value for name, value in kwargs.items() if name not in values}
    key = (fn, how.capability, str(kinds), str(constants), str(sorted(options.items())))
    if key not in Compiled.cache:
        Compiled.cache[key] = Compiled(fn, target, backend, kwargs, bound)
    compiled = Compiled.cache[key]
    compiled.how = how
    compiled[tuple(grid(values)) if callable(grid) else tuple(grid)](*values.values())
    return compiled


@contextmanager
def emulated(
    capability: tuple[int, int] = (9, 0),
    sms: int = 132,
    compile_for: int | None = None,
    order: str = "forward",
    threads_at_once: int = 1 << 14,
) -> Iterator[Counter[str]]:
    """Within, CPU tensors count as tensors on a GPU of `capability`, and every Triton launch runs in the emulator.

    What `torch.empty` returns should be poisoned, as tests/conftest.py does: then nothing unwritten goes unseen.

    Args:
        capability: what the wrappers are told that the GPU is.
        sms: the number of its multiprocessors.
        compile_for: the target of the compiler if it is not `capability`, e.g. 80 for kernels whose `tl.dot` becomes
            wgmma on sm_90, which the emulator does not know.

    Yields:
        How often each opcode was executed so far, over all launches.
    """
    from sparsekit_kernels import target
    from triton.runtime.jit import JITFunction

    how = How(compile_for or capability[0] * 10 + capability[1], order, threads_at_once)

    def emulate(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Compiled:
        assert not warmup
        return launch(self, grid, *args, how=how, **kwargs)

    answers = {
        "why_not": lambda device: None,
        "why_not_cuda": lambda device: None,
        "capability": lambda device: capability,
        "num_sms": lambda device: sms,
    }
    originals = {name: getattr(target, name) for name in answers}
    properties = SimpleNamespace(
        name="emulated", major=capability[0], minor=capability[1], multi_processor_count=sms,
        shared_memory_per_block_optin=SHARED_KIB.get(how.capability, 99) << 10,
    )  # fmt: skip
    with ExitStack() as patches:
        patches.enter_context(mock.patch.object(JITFunction, "run", emulate))
        patches.enter_context(mock.patch("torch.cuda.get_device_properties", lambda device: properties))
        for module_name, module in list(sys.modules.items()):
            if module_name.split(".")[0] == "sparsekit_kernels":
                for name, answer in answers.items():
                    if getattr(module, name, None) is originals[name]:
                        patches.enter_context(mock.patch.object(module, name, answer))
                if hasattr(module, "_launches"):  # remembered launches are of one GPU
                    patches.enter_context(mock.patch.object(module, "_launches", {}))
        yield how.counts
