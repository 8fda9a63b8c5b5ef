"""The `torch.library` operators behind every sparse layer.

For each format that a backend runs there are two, which the backend defines here:

    sparsekit::linear_<format>_<backend>(x, weight, bias?, N, K) -> y     y = x @ W.T + bias, x [..., K], y [..., N]
    sparsekit::dense_<format>_<backend>(weight, N, K, dtype) -> W         the dense weight [N, K]

where `weight` is the list of tensors that the backend's `prepare` made. Both have fake kernels, the first has gradients
for x and bias, so that `torch.compile(fullgraph=True)`, CUDA graphs and `torch.export` see opaque calls with known
shapes.

They are defined through `torch.library.Library` and not `torch.library.custom_op`, whose Python wrapper costs more
than the multiplication of a small layer. For the same reason `SparseOp.linear` calls the kernel directly where nobody
watches the dispatcher: no gradient, no compiler, no mode, no profiler, no subclass.

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

_library = torch.library.Library("sparsekit", "DEF")

Weight = Sequence[Tensor]
Linear = Callable[[Tensor, Weight, Tensor | None, int, int], Tensor]
"""(x, weight, bias, N, K) -> y"""
Dense = Callable[[Weight, int, int, torch.dtype], Tensor]
"""(weight, N, K, dtype) -> W"""


@dataclass(frozen=True)
class SparseOp:
    """Both operators of one format on one backend, ready to call."""

    linear: Linear
    dense: Dense


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

    return SparseOp(call, dense_op)


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


_DENSE_DTYPES = frozenset((torch.bfloat16, torch.float16, torch.float32))


def _check_input(x: Tensor, first: Tensor, K: int) -> None:
    if x.dim() == 0:
        raise ValueError(f"x is a scalar, W has {K} features: pass x of shape [..., {K}]")
    if x.shape[-1] != K:
        raise ValueError(f"x has {x.shape[-1]} features, W has {K}: pass x of shape [..., {K}]")
    if x.dtype != first.dtype and (first.dtype in _DENSE_DTYPES or x.dtype not in _DENSE_DTYPES):
        wanted = first.dtype if first.dtype in _DENSE_DTYPES else "bfloat16, float16 or float32"
        raise ValueError(f"x is {x.dtype}, W is {wanted}: convert one of them, as with model.to({x.dtype})")
