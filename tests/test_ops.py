"""The operators themselves: `opcheck` on each that runs here, shapes without kernels, and what they refuse."""

import pytest
import torch
import torch.nn.functional as F

from sparsekit import ops
from sparsekit.backends import BACKENDS
from sparsekit.formats import FORMATS, WeightSpec

SEMI24 = FORMATS.get("semi24")
CPU = torch.device("cpu")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CASES = [
    pytest.param(name, dtype, id=f"{name}-{str(dtype).removeprefix('torch.')}")
    for name, backend in BACKENDS.items()
    for dtype in DTYPES
    if backend.why_not(WeightSpec("semi24", 24, 40, dtype), CPU) is None
]


def prepared(name, dtype, N=24, K=40):
    torch.manual_seed(0)
    w = torch.randn(N, K)
    w.view(N, -1, 4)[..., 1:3] = 0
    packed = SEMI24.pack(w.to(dtype))
    first, second = BACKENDS.get(name).prepare(packed)
    return w.to(dtype), first, second


def op(kind, name):
    return getattr(torch.ops.sparsekit, f"{kind}24_{name}").default


@pytest.mark.parametrize("name,dtype", CASES)
@pytest.mark.parametrize("shape", [(3, 40), (40,), (0, 40), (2, 3, 40)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(name, dtype, shape, has_bias):
    _, first, second = prepared(name, dtype)
    x = torch.randn(*shape).to(dtype).requires_grad_()
    bias = torch.randn(24).to(dtype).requires_grad_() if has_bias else None
    torch.library.opcheck(op("linear", name), (x, first, second, bias, 24, 40))


@pytest.mark.parametrize("name,dtype", CASES)
def test_opcheck_of_an_input_that_is_not_contiguous(name, dtype):
    _, first, second = prepared(name, dtype)
    x = torch.randn(40, 5).to(dtype).T.requires_grad_()
    torch.library.opcheck(op("linear", name), (x, first, second, None, 24, 40))


@pytest.mark.parametrize("name,dtype", CASES)
def test_opcheck_of_unpacking(name, dtype):
    w, first, second = prepared(name, dtype)
    torch.library.opcheck(op("dense", name), (first, second, 24, 40))
    assert torch.equal(op("dense", name)(first, second, 24, 40), w)


@pytest.mark.parametrize("name,dtype", CASES)
def test_the_short_way_gives_the_bits_of_the_long_one(name, dtype):
    _, first, second = prepared(name, dtype)
    x, bias = torch.randn(5, 40).to(dtype), torch.randn(24).to(dtype)
    short = getattr(ops, f"linear24_{name}")(x, first, second, bias, 24, 40)
    assert torch.equal(short, op("linear", name)(x, first, second, bias, 24, 40))


@pytest.mark.parametrize("name", list(BACKENDS))
def test_shapes_are_known_without_a_kernel(name):
    """On the meta device, for the backends that cannot run here too."""
    first = torch.empty(24, 20, dtype=torch.bfloat16, device="meta")
    second = torch.empty(24, 5, dtype=torch.uint8, device="meta")
    for shape in ((40,), (0, 40), (2, 3, 40)):
        x = torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        y = op("linear", name)(x, first, second, None, 24, 40)
        assert y.shape == (*shape[:-1], 24) and y.dtype == torch.bfloat16 and y.is_meta
    w = op("dense", name)(first, second, 24, 40)
    assert w.shape == (24, 40) and w.dtype == torch.bfloat16


@pytest.mark.parametrize("name,dtype", CASES)
@pytest.mark.parametrize("watched", [True, False])
def test_refuses(name, dtype, watched):
    _, first, second = prepared(name, dtype)
    call = op("linear", name) if watched else getattr(ops, f"linear24_{name}")
    with pytest.raises(ValueError, match=r"x has 41 features, W has 40: pass x of shape \[..., 40\]"):
        call(torch.ones(3, 41).to(dtype), first, second, None, 24, 40)
    other = torch.float64
    with pytest.raises(ValueError, match=f"x is {other}, W is {dtype}: convert"):
        call(torch.ones(3, 40).to(other), first, second, None, 24, 40)
    with pytest.raises(ValueError, match="x is a scalar"):
        call(torch.tensor(1.0).to(dtype), first, second, None, 24, 40)


@pytest.mark.parametrize("name", [case.values[0] for case in CASES if case.values[1] == torch.float32])
def test_gradient_by_differences(name):
    """y is linear in x and bias, so a difference of any width is the derivative."""
    w, first, second = prepared(name, torch.float32)
    x = torch.randn(3, 40, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    y = op("linear", name)(x, first, second, bias, 24, 40)
    weights = torch.randn(3, 24)
    grad_x, grad_bias = torch.autograd.grad((y * weights).sum(), (x, bias))
    step = torch.randn(3, 40, dtype=torch.float64)
    moved = F.linear(x.detach().double() + step, w.double()) - F.linear(x.detach().double(), w.double())
    assert (grad_x.double() * step).sum().item() == pytest.approx((moved * weights.double()).sum().item(), rel=1e-4)
    torch.testing.assert_close(grad_bias, weights.sum(0))


@pytest.mark.parametrize("name", [case.values[0] for case in CASES if case.values[1] == torch.float32])
def test_the_packed_weight_gets_no_gradient(name):
    _, first, second = prepared(name, torch.float32)
    first.requires_grad_()
    y = op("linear", name)(torch.randn(3, 40, requires_grad=True), first, second, None, 24, 40)
    y.sum().backward()
    assert first.grad is None
