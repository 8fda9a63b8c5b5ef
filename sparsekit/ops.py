"""The `torch.library` operators behind every sparse layer.

For each format that a backend runs there are two, which the backend defines here:

    sparsekit::linear_<format>_<backend>(x, weight, bias?, N, K) -> y     y = x @ W.T + bias, x [..., K], y [..., N]
    sparsekit::dense_<format>_<backend>(weight, N, K, dtype) -> W         the dense weight [N, K]

where `weight` is the list of tensors that the backend's `prepare` made. Both have fake kernels, the first has gradients
for x and bias, so that `torch.compile(fullgraph=True)`, CUDA graphs and `torch.export` see opaque calls with known
shapes.

They are defined through `torch.library.Library` and not `torch.library.custom_op`, whose Python wrapper costs more
than the multiplication of a small layer. For the same reason `SparseOp.linear` calls the kernel directly where nobody
watches the dispatcher: no gradient, no compiler, no mode, no profiler, no subclass. What is on that way is counted in
tenths of a microsecond (bench/overhead.py): functions of torch are looked up once, below, and not at each call.

Inside a `torch.func` transform or forward-mode AD it multiplies by the dense weight: an operator has neither a batching
rule nor a tangent there (torch would loop over `vmap` and return zeros for `jvp`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

_library = torch.library.Library("sparsekit", "DEF")

Weight = Sequence[Tensor]
Linear = Callable[[Tensor, Weight, Tensor | None, int, int], Tensor]
"""(x, weight, bias, N, K) -> y"""
Dense = Callable[[Weight, int, int, torch.dtype], Tensor]
"""(weight, N, K, dtype) -> W"""


@dataclass(frozen=True)
class SparseOp:
    """Both operators of one format on one backend, ready to call. Copied and pickled by name."""

    format: str
    backend: str
    linear: Linear
    dense: Dense

    def __reduce__(self) -> tuple[Callable[[str, str], "SparseOp"], tuple[str, str]]:
        return defined, (self.format, self.backend)


_DEFINED: dict[tuple[str, str], SparseOp] = {}


def defined(format: str, backend: str) -> SparseOp:
    """Return the operators of a format on a backend.

    Raises:
        ValueError: the backend has defined none for this format.
    """
    if (format, backend) not in _DEFINED:
        raise ValueError(f"backend={backend!r} has no path for format {format!r}")
    return _DEFINED[format, backend]


def define(format: str, backend: str, linear: Linear, dense: Dense) -> SparseOp:
    """Define the operators of a format on a backend.

    Args:
        format: name in `FORMATS`.
        backend: name in `BACKENDS`.
        linear: the product; x has passed the checks on its shape, and may be of any rank and strides.
        dense: the dense weight.
    """
    linear_name, dense_name = f"linear_{format}_{backend}", f"dense_{format}_{backend}"
    tags = (torch.Tag.pt2_compliant_tag,)
    _library.define(f"{linear_name}(Tensor x, Tensor[] weight, Tensor? bias, int N, int K) -> Tensor", tags=tags)
    _library.define(f"{dense_name}(Tensor[] weight, int N, int K, ScalarType dtype) -> Tensor", tags=tags)

    def checked_linear(x: Tensor, weight: Weight, bias: Tensor | None, N: int, K: int) -> Tensor:
        _check_input(x, weight[0], K)
        return linear(x, weight, bias, N, K)

    _library.impl(linear_name, checked_linear, "CompositeExplicitAutograd")
    _library.impl(dense_name, dense, "CompositeExplicitAutograd")
    linear_op = getattr(torch.ops.sparsekit, linear_name).default
    dense_op = getattr(torch.ops.sparsekit, dense_name).default

    @torch.library.register_fake(f"sparsekit::{linear_name}", lib=_library)
    def _(x: Tensor, weight: Weight, bias: Tensor | None, N: int, K: int) -> Tensor:
        _check_input(x, weight[0], K)
        return x.new_empty(*x.shape[:-1], N)

    @torch.library.register_fake(f"sparsekit::{dense_name}", lib=_library)
    def _(weight: Weight, N: int, K: int, dtype: torch.dtype) -> Tensor:
        return weight[0].new_empty(N, K, dtype=dtype)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, weight, _, ctx.N, ctx.K = inputs
        ctx.save_for_backward(*weight)

    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        weight = ctx.saved_tensors
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            grad_x = grad @ dense_op(weight, ctx.N, ctx.K, grad.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.reshape(-1, ctx.N).sum(0)
        return grad_x, [None] * len(weight), grad_bias, None, None

    torch.library.register_autograd(f"sparsekit::{linear_name}", backward, setup_context=setup_context, lib=_library)

    def call(x: Tensor, weight: Weight, bias: Tensor | None, N: int, K: int) -> Tensor:
        if _is_unwatched(x, bias):
            _check_input(x, weight[0], K)
            return linear(x, weight, bias, N, K)
        if _is_transformed():
            _check_input(x, weight[0], K)
            return F.linear(x, dense_op(weight, N, K, x.dtype), bias)
        return linear_op(x, weight, bias, N, K)

    op = _DEFINED[format, backend] = SparseOp(format, backend, call, dense_op)
    return op


_is_compiling = torch.compiler.is_compiling
_is_grad_enabled = torch.is_grad_enabled
_num_dispatch_modes = torch._C._len_torch_dispatch_stack
_innermost_transform = torch._C._functorch.peek_interpreter_stack
_is_profiled = torch._C._autograd._profiler_enabled
_tracing_state = torch._C._get_tracing_state


def _is_unwatched(x: Tensor, bias: Tensor | None) -> bool:
    """Return whether calling the kernel past the dispatcher makes no difference to anybody."""
    return not (
        _is_compiling()
        or type(x) is not Tensor
        or (bias is not None and type(bias) is not Parameter and type(bias) is not Tensor)
        or (_is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad)))
        or _num_dispatch_modes()
        or _innermost_transform() is not None
        or forward_ad._current_level >= 0
        or _is_profiled()
        or _tracing_state() is not None
    )


def _is_transformed() -> bool:
    """Return whether a `torch.func` transform or forward-mode AD is under way, outside a compiler."""
    return not _is_compiling() and (_innermost_transform() is not None or forward_ad._current_level >= 0)


_DENSE_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))


def _check_input(x: Tensor, first: Tensor, K: int) -> None:
    shape = x.shape
    if not shape:
        raise ValueError(f"x is a scalar, W has {K} features: pass x of shape [..., {K}]")
    if shape[-1] != K:
        raise ValueError(f"x has {shape[-1]} features, W has {K}: pass x of shape [..., {K}]")
    if x.dtype is not first.dtype and (first.dtype in _DENSE_DTYPES or x.dtype not in _DENSE_DTYPES):
        wanted = first.dtype if first.dtype in _DENSE_DTYPES else "bfloat16, float16 or float32"
        raise ValueError(f"x is {x.dtype}, W is {wanted}: convert one of them, as with model.to({x.dtype})")
