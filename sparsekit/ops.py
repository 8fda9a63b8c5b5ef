"""The `torch.library` operators behind every sparse layer.

For each backend that runs `semi24` there are two:

    sparsekit::linear24_<backend>(x, first, second?, bias?, N, K) -> y     y = x @ W.T + bias, x [..., K], y [..., N]
    sparsekit::dense24_<backend>(first, second?, N, K) -> W                the dense weight [N, K]

where `first` and `second` are what the backend's `prepare` made (one tensor or two). Both have fake kernels, the first
has gradients for x and bias, so that `torch.compile(fullgraph=True)`, CUDA graphs and `torch.export` see opaque calls
with known shapes.

They are defined through `torch.library.Library` and not `torch.library.custom_op`, whose Python wrapper costs more
than the multiplication of a small layer. For the same reason `linear24_<backend>(...)` here calls the kernel directly
where nobody watches the dispatcher: no gradient, no compiler, no mode, no profiler, no subclass.

Inside a `torch.func` transform or forward-mode AD it multiplies by the dense weight: an operator has neither a batching
rule nor a tangent there (torch would loop over `vmap` and return zeros for `jvp`).
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from sparsekit_kernels import cpu, reference
from sparsekit_kernels.layout24 import decompress24
from torch import Tensor
from torch.autograd import forward_ad

_library = torch.library.Library("sparsekit", "DEF")

# (x, first, second, bias, N, K) and (first, second, N, K); lambdas below, so the types are said here once.
Linear24 = Callable[[Tensor, Tensor, Any, Tensor | None, int, int], Tensor]
Dense24 = Callable[[Tensor, Any, int, int], Tensor]


def _define(backend: str, linear: Linear24, dense: Dense24) -> tuple[Linear24, Dense24]:
    """Define both operators of a backend and return them ready to call."""
    linear_name, dense_name = f"linear24_{backend}", f"dense24_{backend}"
    tags = (torch.Tag.pt2_compliant_tag,)
    weight = "Tensor first, Tensor? second"
    _library.define(f"{linear_name}(Tensor x, {weight}, Tensor? bias, int N, int K) -> Tensor", tags=tags)
    _library.define(f"{dense_name}({weight}, int N, int K) -> Tensor", tags=tags)

    def checked_linear(x: Tensor, first: Tensor, second: Tensor | None, bias: Tensor | None, N: int, K: int) -> Tensor:
        _check_input(x, first, K)
        return linear(x, first, second, bias, N, K)

    _library.impl(linear_name, checked_linear, "CompositeExplicitAutograd")
    _library.impl(dense_name, dense, "CompositeExplicitAutograd")
    linear_op = getattr(torch.ops.sparsekit, linear_name).default
    dense_op = getattr(torch.ops.sparsekit, dense_name).default

    @torch.library.register_fake(f"sparsekit::{linear_name}", lib=_library)
    def _(x: Tensor, first: Tensor, second: Tensor | None, bias: Tensor | None, N: int, K: int) -> Tensor:
        _check_input(x, first, K)
        return x.new_empty(*x.shape[:-1], N)

    @torch.library.register_fake(f"sparsekit::{dense_name}", lib=_library)
    def _(first: Tensor, second: Tensor | None, N: int, K: int) -> Tensor:
        return first.new_empty(N, K)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, first, second, _, ctx.N, ctx.K = inputs
        ctx.save_for_backward(first, second)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_op(*ctx.saved_tensors, ctx.N, ctx.K)
        if ctx.needs_input_grad[3]:
            grad_bias = grad.reshape(-1, ctx.N).sum(0)
        return grad_x, None, None, grad_bias, None, None

    torch.library.register_autograd(f"sparsekit::{linear_name}", backward, setup_context=setup_context, lib=_library)

    def call(x: Tensor, first: Tensor, second: Tensor | None, bias: Tensor | None, N: int, K: int) -> Tensor:
        if _is_unwatched(x, bias):
            _check_input(x, first, K)
            return linear(x, first, second, bias, N, K)
        if _is_transformed():
            _check_input(x, first, K)
            return F.linear(x, dense_op(first, second, N, K), bias)
        return linear_op(x, first, second, bias, N, K)

    return call, dense_op


def _is_unwatched(x: Tensor, bias: Tensor | None) -> bool:
    """Return whether calling the kernel past the dispatcher makes no difference to anybody."""
    if torch.compiler.is_compiling():
        return False
    if torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)):
        return False
    return (
        type(x) is Tensor
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not torch._C._autograd._profiler_enabled()
        and torch._C._get_tracing_state() is None
    )


def _is_transformed() -> bool:
    """Return whether a `torch.func` transform or forward-mode AD is under way, outside a compiler."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _check_input(x: Tensor, first: Tensor, K: int) -> None:
    if x.dim() == 0:
        raise ValueError(f"x is a scalar, W has {K} features: pass x of shape [..., {K}]")
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features, W has {K}: pass x of shape [..., {K}]")
    if first.is_floating_point() and x.dtype != first.dtype:
        raise ValueError(f"x is {x.dtype}, W is {first.dtype}: convert one of them, as with model.to({x.dtype})")


@functools.cache
def _kernels(name: str) -> ModuleType:
    """Import a kernel module when it first runs: a machine without Triton or a compiler never asks."""
    import importlib

    return importlib.import_module(f"sparsekit_kernels.{name}")


def _decompress(canonical: tuple[Tensor, Tensor], K: int) -> Tensor:
    values, meta = canonical
    return decompress24(values, meta, K)


linear24_reference, dense24_reference = _define(
    "reference",
    lambda x, values, meta, bias, N, K: reference.spmm24(x, values, meta, bias),
    lambda values, meta, N, K: decompress24(values, meta, K),
)
linear24_triton, dense24_triton = _define(
    "triton",
    lambda x, values, meta, bias, N, K: _kernels("spmm24").spmm24(x, values, meta, bias),
    lambda values, meta, N, K: decompress24(values, meta, K),
)
linear24_cpu, dense24_cpu = _define(
    "cpu",
    lambda x, blocks, masks, bias, N, K: cpu.spmm24(x, blocks, masks, N, bias),
    lambda blocks, masks, N, K: _decompress(cpu.restore(blocks, masks, N), K),
)
linear24_cusparselt, dense24_cusparselt = _define(
    "cusparselt",
    lambda x, packed, _, bias, N, K: _kernels("cusparselt").spmm24(x, packed, N, K, bias),
    lambda packed, _, N, K: _decompress(_kernels("cusparselt").restore(packed, N, K), K),
)
