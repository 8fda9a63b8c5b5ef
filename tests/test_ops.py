"""The operators themselves: `opcheck` on each that runs here, shapes without kernels, and what they refuse."""

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F

from sparsekit.backends import BACKENDS
from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.ops import defined

CPU = torch.device("cpu")
N, K = 24, 40
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SPECS = [WeightSpec("semi24", N, K, dtype) for dtype in DTYPES]
SPECS += [WeightSpec(format, N, K, torch.float32) for format in FORMATS if format != "semi24"]
CASES = [
    pytest.param(name, spec, id=f"{name}-{spec.format}-{str(spec.dtype).removeprefix('torch.')}")
    for name, backend in BACKENDS.items()
    for spec in SPECS
    if backend.why_not(spec, CPU) is None
]


def prepared(name, spec):
    torch.manual_seed(0)
    w = torch.randn(N, K)
    w.view(N, -1, 4)[..., 1:3] = 0
    packed = FORMATS.get(spec.format).pack(w.to(spec.dtype))
    return FORMATS.get(spec.format).unpack(packed), BACKENDS.get(name).prepare(packed)


def op(kind, name, format):
    return getattr(torch.ops.sparsekit, f"{kind}_{format}_{name}").default


def check(operator, arguments):
    utils = ["test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"]
    if any(
        part.dtype == torch.float8_e4m3fn for argument in arguments if isinstance(argument, tuple) for part in argument
    ):
        utils.remove("test_schema")  # it compares by torch.allclose, which has no float8
    torch.library.opcheck(operator, arguments, test_utils=utils)


@pytest.mark.parametrize("name,spec", CASES)
@pytest.mark.parametrize("shape", [(3, 40), (40,), (0, 40), (2, 3, 40)], ids=str)
@pytest.mark.parametrize("has_bias", [True, False])
def test_opcheck(name, spec, shape, has_bias):
    _, weight = prepared(name, spec)
    x = torch.randn(*shape).to(spec.dtype).requires_grad_()
    bias = torch.randn(24).to(spec.dtype).requires_grad_() if has_bias else None
    check(op("linear", name, spec.format), (x, weight, bias, N, K))


@pytest.mark.parametrize("name,spec", CASES)
def test_opcheck_of_an_input_that_is_not_contiguous(name, spec):
    _, weight = prepared(name, spec)
    x = torch.randn(40, 5).to(spec.dtype).T.requires_grad_()
    check(op("linear", name, spec.format), (x, weight, None, N, K))


@pytest.mark.parametrize("name,spec", CASES)
def test_opcheck_of_unpacking(name, spec):
    w, weight = prepared(name, spec)
    check(op("dense", name, spec.format), (weight, N, K, spec.dtype))
    assert torch.equal(op("dense", name, spec.format)(weight, N, K, spec.dtype), w)


@pytest.mark.parametrize("name,spec", CASES)
def test_the_short_way_gives_the_bits_of_the_long_one(name, spec):
    _, weight = prepared(name, spec)
    x, bias = torch.randn(5, 40).to(spec.dtype), torch.randn(24).to(spec.dtype)
    short = BACKENDS.get(name).linear(x, weight, bias, spec)
    assert torch.equal(short, op("linear", name, spec.format)(x, weight, bias, N, K))


@pytest.mark.parametrize("name,format", [(name, format) for name in BACKENDS for format in BACKENDS.get(name).formats])
def test_shapes_are_known_without_a_kernel(name, format):
    """On the meta device, for the backends that cannot run here too."""
    weight = [torch.empty(N, K // 2, dtype=torch.bfloat16, device="meta"), torch.empty(N, 5, device="meta")]
    for shape in ((K,), (0, K), (2, 3, K)):
        x = torch.empty(*shape, dtype=torch.bfloat16, device="meta")
        y = op("linear", name, format)(x, weight, None, N, K)
        assert y.shape == (*shape[:-1], N) and y.dtype == torch.bfloat16 and y.is_meta
    w = op("dense", name, format)(weight, N, K, torch.float16)
    assert w.shape == (N, K) and w.dtype == torch.float16


@pytest.mark.parametrize("name,spec", CASES)
@pytest.mark.parametrize("watched", [True, False])
def test_refuses(name, spec, watched):
    _, weight = prepared(name, spec)

    def call(x):
        if watched:
            return op("linear", name, spec.format)(x, weight, None, N, K)
        return BACKENDS.get(name).linear(x, weight, None, spec)

    with pytest.raises(ValueError, match=r"x has 41 features, W has 40: pass x of shape \[..., 40\]"):
        call(torch.ones(3, 41).to(spec.dtype))
    with pytest.raises(ValueError, match="x is torch.float64, W is .*: convert"):
        call(torch.ones(3, 40).double())
    with pytest.raises(ValueError, match="x is a scalar"):
        call(torch.tensor(1.0).to(spec.dtype))


FP32 = [case for case in CASES if case.values[1].dtype == torch.float32]


@pytest.mark.parametrize("name,spec", FP32)
def test_gradient_by_differences(name, spec):
    """y is linear in x and bias, so a difference of any width is the derivative."""
    w, weight = prepared(name, spec)
    x = torch.randn(3, 40, requires_grad=True)
    bias = torch.randn(24, requires_grad=True)
    y = op("linear", name, spec.format)(x, weight, bias, N, K)
    weights = torch.randn(3, 24)
    grad_x, grad_bias = torch.autograd.grad((y * weights).sum(), (x, bias))
    step = torch.randn(3, 40, dtype=torch.float64)
    moved = F.linear(x.detach().double() + step, w.double()) - F.linear(x.detach().double(), w.double())
    assert (grad_x.double() * step).sum().item() == pytest.approx((moved * weights.double()).sum().item(), rel=1e-4)
    torch.testing.assert_close(grad_bias, weights.sum(0))


@pytest.mark.parametrize("name,spec", FP32)
def test_the_packed_weight_gets_no_gradient(name, spec):
    _, weight = prepared(name, spec)
    wanting = [part.requires_grad_() if part.is_floating_point() else part for part in weight]
    y = op("linear", name, spec.format)(torch.randn(3, 40, requires_grad=True), wanting, None, N, K)
    y.sum().backward()
    assert all(part.grad is None for part in wanting)


@pytest.mark.parametrize("name,format", [(name, format) for name in BACKENDS for format in BACKENDS.get(name).formats])
def test_operators_are_copied_and_pickled_by_name(name, format):
    """A packed layer holds its operators, and is copied, pickled and sent to other processes with them."""
    both = BACKENDS.get(name).op(format)
    assert copy.deepcopy(both) is both and pickle.loads(pickle.dumps(both)) is both and defined(format, name) is both


def test_operators_that_nobody_defined():
    with pytest.raises(ValueError, match="backend='cublas' has no path for format 'semi24'"):
        defined("semi24", "cublas")


def test_a_bias_that_is_a_subclass_is_seen_by_the_dispatcher():
    seen = []

    class Watched(torch.Tensor):
        @classmethod
        def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return torch.zeros(3, N)

    spec = WeightSpec("semi24", N, K, torch.float32)
    _, weight = prepared("reference", spec)
    bias = torch.Tensor._make_wrapper_subclass(Watched, (N,))
    with torch.no_grad():
        BACKENDS.get("reference").linear(torch.randn(3, K), weight, bias, spec)
    assert seen == ["sparsekit.linear_semi24_reference.default"]
