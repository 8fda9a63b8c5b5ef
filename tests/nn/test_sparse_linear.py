"""`SparseLinear` wherever an `nn.Linear` may stand: every promise that PyTorch's own layer keeps.

The reference is `nn.Linear` with the same weight, and float64 where numbers are compared.
"""

import copy
import multiprocessing
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sparsekit as sk
from sparsekit import NonFiniteError, PatternError, SparseLinear, Unsupported
from sparsekit.backends import BACKENDS
from sparsekit.formats import WeightSpec

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CPU = torch.device("cpu")
N, K = 24, 40


def weight24(N, K, dtype=torch.float32, seed=0):
    """Random 2:4 weight; row 1 is empty."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(N, K, generator=generator)
    groups = F.pad(torch.rand(N, K, generator=generator), (0, -K % 4), value=-1.0).view(N, -1, 4)
    keep = (groups.argsort(-1).argsort(-1) >= 2).view(N, -1)[:, :K]
    keep[1:2] = False
    return torch.where(keep, w, 0.0).to(dtype)


def make(dtype=torch.float32, bias=True, backend="auto", N=N, K=K, seed=0):
    """A dense layer, and the packed one with the same weight."""
    dense = nn.Linear(K, N, bias=bias).to(dtype)
    dense.weight.data = weight24(N, K, dtype, seed)
    return dense, SparseLinear.from_linear(copy.deepcopy(dense), backend=backend)


def backends_for(dtype):
    spec = WeightSpec("semi24", N, K, dtype)
    return [name for name, backend in BACKENDS.items() if backend.why_not(spec, CPU) is None]


def input_of(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def max_err(out, ref64):
    return (out.double() - ref64).abs().max().item() if out.numel() else 0.0


def assert_as_good_as_dense(out, dense, ref64):
    assert out.dtype == dense.dtype and out.shape == dense.shape
    limit = 2 * max_err(dense, ref64) + 1e-5 * (ref64.abs().max().item() if ref64.numel() else 0.0)
    assert out.isfinite().all(), "not finite"
    assert max_err(out, ref64) <= limit, f"error {max_err(out, ref64):.3g} > {limit:.3g}"


def weights_equal(a, b):
    """Bit for bit, in the canonical layout."""
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


class Outer(nn.Module):
    """A packed layer inside a module, as in a model."""

    def __init__(self, layer):
        super().__init__()
        self.first, self.second = layer, nn.Linear(layer.out_features, 3, dtype=layer.spec.dtype)

    def forward(self, x):
        return self.second(F.silu(self.first(x)))


CASES = [(dtype, name) for dtype in DTYPES for name in backends_for(dtype)]


class TestForward:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("dtype,backend", CASES, ids=str)
    @pytest.mark.parametrize(
        "shape", [(K,), (1, K), (3, K), (17, K), (2, 3, K), (2, 1, 3, K), (0, K), (2, 0, K), (63, K)], ids=str
    )
    def test_matches_dense_whatever_the_leading_dimensions(self, shape, dtype, backend, bias):
        dense, layer = make(dtype, bias, backend)
        assert layer.backend == backend
        x = input_of(*shape, dtype=dtype)
        ref64 = copy.deepcopy(dense).double()(x.double())
        out = layer(x)
        assert out.is_contiguous()
        assert_as_good_as_dense(out, dense(x), ref64)

    @pytest.mark.parametrize("dtype,backend", CASES, ids=str)
    @pytest.mark.parametrize("N,K", [(1, 1), (1, 4), (3, 7), (8, 9), (17, 66), (9, 513)])
    def test_odd_weights(self, N, K, dtype, backend):
        dense, layer = make(dtype, True, backend, N, K)
        x = input_of(5, K, dtype=dtype)
        assert torch.equal(layer.to_dense(), dense.weight)
        assert_as_good_as_dense(layer(x), dense(x), copy.deepcopy(dense).double()(x.double()))

    @pytest.mark.parametrize("dtype,backend", CASES, ids=str)
    def test_input_that_is_not_contiguous(self, dtype, backend):
        dense, layer = make(dtype, True, backend)
        transposed = input_of(K, 5, dtype=dtype).T
        strided = input_of(5, 2 * K, dtype=dtype)[:, ::2]
        rows = input_of(10, K, dtype=dtype)[::2]
        swapped = input_of(3, 5, K, dtype=dtype).transpose(0, 1)
        expanded = input_of(1, K, dtype=dtype).expand(5, K)
        offset = input_of(5 * K + 1, dtype=dtype)[1:].view(5, K)
        for x in (transposed, strided, rows, swapped, expanded, offset):
            before = x.clone()
            assert_as_good_as_dense(layer(x), dense(x), copy.deepcopy(dense).double()(x.double()))
            assert torch.equal(x, before), "the input was changed"

    def test_an_empty_weight(self):
        layer = SparseLinear.from_dense(torch.zeros(N, K), torch.arange(float(N)))
        assert torch.equal(layer(input_of(2, K)), torch.arange(float(N)).expand(2, N))

    def test_nan_and_infinity_in_x_spread_as_in_dense(self):
        """Over the whole row, zeros of the weight included: nothing is skipped."""
        dense, layer = make()
        x = input_of(3, K)
        x[1, 5], x[2, 0] = torch.nan, torch.inf
        assert torch.equal(layer(x).isfinite(), dense(x).isfinite())

    def test_each_row_has_the_same_bits_in_any_batch(self):
        _, layer = make()
        x = input_of(33, K)
        together = layer(x)
        assert all(torch.equal(layer(x[i : i + 1])[0], together[i]) for i in range(33))

    def test_the_result_is_new_memory(self):
        _, layer = make()
        x = input_of(3, K)
        first = layer(x)
        kept = first.clone()
        layer(2 * x)
        assert torch.equal(first, kept)


class TestRefusals:
    def test_features(self):
        _, layer = make()
        for x in (torch.ones(3, K + 1), torch.ones(3, K - 1), torch.ones(K, 3), torch.ones(3, 0)):
            with pytest.raises(ValueError, match=rf"W has {K}: pass x of shape \[\.\.\., {K}\]"):
                layer(x)
        with pytest.raises(ValueError, match="scalar"):
            layer(torch.tensor(1.0))

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64, torch.long, torch.bool], ids=str)
    def test_dtype(self, dtype):
        _, layer = make()
        with pytest.raises(ValueError, match=rf"x is {dtype}, W is torch.float32: convert"):
            layer(torch.ones(3, K).to(dtype))

    def test_weight_that_breaks_the_pattern(self):
        w = weight24(N, K)
        w[3, :3] = 1.0
        with pytest.raises(PatternError, match=r"1 of 240 groups of four"):
            SparseLinear.from_dense(w)

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
    def test_weight_that_is_not_finite(self, bad):
        w = weight24(N, K)
        w[3, w[3].nonzero()[0]] = bad
        with pytest.raises(NonFiniteError, match="NaN or infinity"):
            SparseLinear.from_dense(w)

    def test_float64(self):
        with pytest.raises(Unsupported, match="float64"):
            SparseLinear.from_dense(weight24(N, K, torch.float64))
        _, layer = make()
        before = copy.deepcopy(layer)
        with pytest.raises(Unsupported, match="unpack_"):
            layer.double()
        assert layer.spec == before.spec and weights_equal(layer, before) and layer.is_prepared

    def test_a_named_backend_that_cannot_run(self):
        with pytest.raises(Unsupported, match="cusparselt.*cannot run.*Use backend='auto'"):
            SparseLinear.from_dense(weight24(N, K), backend="cusparselt")
        with pytest.raises(ValueError, match="unknown backend 'cpuu'.*Did you mean 'cpu'"):
            SparseLinear.from_dense(weight24(N, K), backend="cpuu")
        with pytest.raises(ValueError, match="unknown format 'semi42'.*Did you mean 'semi24'"):
            SparseLinear.from_dense(weight24(N, K), format="semi42")


class TestGradients:
    @pytest.mark.parametrize("dtype,backend", CASES, ids=str)
    @pytest.mark.parametrize("shape", [(K,), (5, K), (2, 3, K), (0, K)], ids=str)
    def test_of_x_and_bias(self, shape, dtype, backend):
        dense, layer = make(dtype, True, backend)
        exact = copy.deepcopy(dense).double()
        x = input_of(*shape, dtype=dtype)
        weights = input_of(*shape[:-1], N, dtype=dtype, seed=2)

        def gradients(module, x):
            x = x.clone().requires_grad_()
            (module(x) * weights.to(x.dtype)).sum().backward()
            return x.grad, module.bias.grad

        ref = gradients(exact, x.double())
        for got, plain, true in zip(gradients(layer, x), gradients(dense, x), ref, strict=True):
            assert_as_good_as_dense(got, plain, true)

    def test_only_what_is_asked_for(self):
        _, layer = make()
        layer.bias.requires_grad_(False)
        assert not layer(input_of(3, K)).requires_grad
        x = input_of(3, K).requires_grad_()
        layer(x).sum().backward()
        assert layer.bias.grad is None and x.grad is not None
        layer.bias.requires_grad_(True)
        layer(input_of(3, K)).sum().backward()
        assert torch.equal(layer.bias.grad, torch.full((N,), 3.0))

    def test_none_under_no_grad_and_inference_mode(self):
        _, layer = make()
        x = input_of(3, K)
        with torch.no_grad():
            assert not layer(x).requires_grad
        with torch.inference_mode():
            assert torch.equal(layer(x), layer(x.clone())) and layer(x).is_inference()

    def test_twice(self):
        """d/dg of (g W) v: what gradient penalties need."""
        dense, layer = make()
        x, v = input_of(3, K), input_of(3, K, seed=3)
        results = []
        for module in (dense, layer):
            leaf = x.clone().requires_grad_()
            (grad,) = torch.autograd.grad(module(leaf).pow(2).sum(), leaf, create_graph=True)
            results.append(torch.autograd.grad((grad * v).sum(), leaf)[0])
        torch.testing.assert_close(results[1], results[0], rtol=1e-4, atol=1e-4)

    def test_checkpointed_activations(self):
        from torch.utils.checkpoint import checkpoint

        dense, layer = make()
        x = input_of(3, K).requires_grad_()
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        expected = torch.ones(3, N) @ dense.weight
        torch.testing.assert_close(x.grad, expected)

    def test_the_weight_is_no_parameter(self):
        _, layer = make()
        assert [name for name, _ in layer.named_parameters()] == ["bias"]


class TestTransforms:
    """`torch.func`, against the dense layer."""

    @pytest.mark.parametrize("backend", backends_for(torch.float32))
    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, x: torch.func.vmap(f)(x),
            lambda f, x: torch.func.vmap(f, in_dims=1)(x.T.contiguous()),
            lambda f, x: torch.func.jvp(f, (x,), (x.flip(0),))[1],
            lambda f, x: torch.func.vjp(f, x)[1](torch.ones(3, N))[0],
            lambda f, x: torch.func.grad(lambda row: f(row).pow(2).sum())(x),
            lambda f, x: torch.func.vmap(torch.func.grad(lambda row: f(row).pow(2).sum()))(x),
            lambda f, x: torch.func.jacrev(f)(x[0]),
            lambda f, x: torch.func.jacfwd(f)(x[0]),
            lambda f, x: torch.func.hessian(lambda row: f(row).pow(2).sum())(x[0]),
        ],
        ids="vmap vmap_columns jvp vjp grad grad_per_sample jacrev jacfwd hessian".split(),
    )
    def test_matches_dense(self, transform, backend):
        dense, layer = make(backend=backend)
        x = input_of(3, K)
        torch.testing.assert_close(transform(layer, x), transform(dense, x), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("grad", [True, False])
    def test_forward_mode(self, grad):
        """A tangent that the operator does not know of would come back as zeros."""
        import torch.autograd.forward_ad as forward_ad

        dense, layer = make()
        layer.bias.requires_grad_(grad)
        x, t = input_of(3, K), input_of(3, K, seed=4)
        with torch.set_grad_enabled(grad), forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(layer(forward_ad.make_dual(x, t))).tangent
        torch.testing.assert_close(tangent, t @ dense.weight.T)

    def test_functional_call(self):
        dense, layer = make()
        bias = input_of(N, seed=9)
        x = input_of(3, K)
        out = torch.func.functional_call(layer, {"bias": bias}, x)
        torch.testing.assert_close(out, torch.func.functional_call(dense, {"bias": bias}, x))


class TestCompilers:
    @pytest.mark.parametrize("dtype,backend", CASES, ids=str)
    def test_compiles_whole_with_any_number_of_tokens(self, dtype, backend):
        torch._dynamo.reset()
        _, layer = make(dtype, True, backend)
        model = Outer(layer).eval()
        compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
        with torch.no_grad():
            for M in (1, 3, 17):
                x = input_of(M, K, dtype=dtype)
                torch.testing.assert_close(compiled(x), model(x))

    def test_one_graph_serves_all_m(self):
        torch._dynamo.reset()
        counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
        _, layer = make()
        compiled = torch.compile(layer, fullgraph=True, backend=counter)
        with torch.no_grad():
            for M in (5, 6, 7, 100):
                x = input_of(M, K)
                torch._dynamo.mark_dynamic(x, 0)
                torch.testing.assert_close(compiled(x), layer(x))
        assert counter.frame_count == 1

    def test_gradients_through_a_compiled_model(self):
        torch._dynamo.reset()
        _, layer = make()
        model = Outer(layer)
        plain = copy.deepcopy(model)
        x = input_of(4, K)
        torch.compile(model, fullgraph=True, backend="aot_eager")(x).sum().backward()
        plain(x).sum().backward()
        for a, b in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad)

    def test_inductor(self):
        torch._dynamo.reset()
        _, layer = make()
        with torch.no_grad():
            x = input_of(4, K)
            torch.testing.assert_close(torch.compile(layer, fullgraph=True)(x), layer(x))

    def test_no_graph_break(self):
        torch._dynamo.reset()
        _, layer = make()
        found = torch._dynamo.explain(Outer(layer))(input_of(4, K))
        assert found.graph_break_count == 0 and found.graph_count == 1

    @pytest.mark.parametrize("backend", backends_for(torch.float32))
    def test_reading_the_weight_breaks_no_graph(self, backend):
        """As T5 does, for the dtype of its output projection."""
        torch._dynamo.reset()
        dense, layer = make(backend=backend)

        def forward(x):
            return layer(x.to(layer.weight.dtype)) * layer.weight.sum()

        compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
        x = input_of(3, K)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), dense(x) * dense.weight.sum(), rtol=1e-4, atol=1e-3)

    @pytest.mark.parametrize("backend", backends_for(torch.float32))
    def test_export(self, backend):
        _, layer = make(backend=backend)
        model = Outer(layer).eval()
        x = input_of(4, K)
        tokens = torch.export.Dim("tokens", min=2, max=512)
        program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens},))
        calls = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
        assert f"sparsekit.linear_semi24_{backend}.default" in calls
        for M in (4, 9):
            x = input_of(M, K)
            torch.testing.assert_close(program.module()(x), model(x))

    def test_fake_tensors(self):
        from torch._subclasses.fake_tensor import FakeTensorMode

        _, layer = make(torch.bfloat16)
        with FakeTensorMode(allow_non_fake_inputs=True):
            out = layer(torch.empty(2, 5, K, dtype=torch.bfloat16))
        assert out.shape == (2, 5, N) and out.dtype == torch.bfloat16 and out.device.type == "cpu"

    def test_under_a_profiler_and_a_dispatch_mode(self):
        from torch.utils._python_dispatch import TorchDispatchMode

        seen = []

        class Mode(TorchDispatchMode):
            def __torch_dispatch__(self, func, types, args=(), kwargs=None):
                seen.append(str(func))
                return func(*args, **(kwargs or {}))

        dense, layer = make(backend="reference")
        x = input_of(3, K)
        with torch.no_grad(), Mode():
            layer(x)
        assert "sparsekit.linear_semi24_reference.default" in seen
        with torch.no_grad(), torch.profiler.profile() as profile:
            layer(x)
        assert any(event.key == "sparsekit::linear_semi24_reference" for event in profile.key_averages())


class TestAutocast:
    @pytest.mark.parametrize("enabled", [True, False])
    def test_the_dtype_of_the_weight_decides(self, enabled):
        _, layer = make(torch.bfloat16)
        x = input_of(3, K)
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            if not enabled:
                with pytest.raises(ValueError, match="convert one of them"):
                    layer(x)
            else:
                assert torch.equal(layer(x), layer(x.bfloat16())) and layer(x).dtype == torch.bfloat16

    def test_a_float32_layer_takes_what_autocast_made(self):
        dense, layer = make()
        x = input_of(3, K).requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = nn.Linear(K, K)(x)
            assert hidden.dtype == torch.bfloat16
            layer(hidden).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()
        with torch.autocast("cpu", torch.bfloat16), pytest.raises(ValueError):
            layer(torch.ones(3, K, dtype=torch.long))


class TestCopiesAndConversions:
    def test_deepcopy_is_independent(self):
        _, layer = make()
        twin = copy.deepcopy(layer)
        for tensor in twin.prepared:
            tensor.zero_()
        assert layer.to_dense().any() and not twin.to_dense().any()

    def test_pickle(self):
        _, layer = make(torch.bfloat16)
        again = pickle.loads(pickle.dumps(layer))
        x = input_of(3, K, dtype=torch.bfloat16)
        assert torch.equal(again(x), layer(x)) and again.spec == layer.spec and weights_equal(again, layer)

    def test_to_another_process_and_back(self):
        _, layer = make()
        x = input_of(3, K)
        with torch.no_grad(), multiprocessing.get_context("spawn").Pool(1) as pool:
            out, again = pool.apply(_run_and_return, (layer, x))
        assert torch.equal(out, layer(x)) and weights_equal(again, layer)

    def test_share_memory(self):
        _, layer = make()
        x = input_of(3, K)
        before = layer(x)
        assert layer.share_memory() is layer
        assert all(tensor.is_shared() for tensor in layer.prepared) and layer.bias.is_shared()
        assert torch.equal(layer(x), before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    @pytest.mark.parametrize("method", ["to", "named", "type"])
    def test_to_a_narrower_dtype(self, dtype, method):
        dense, layer = make()
        before = layer.to_dense()
        if method == "to":
            assert layer.to(dtype) is layer
        elif method == "type":
            layer.type(dtype)
        else:
            layer.bfloat16() if dtype == torch.bfloat16 else layer.half()
        assert layer.spec.dtype == layer.bias.dtype == layer.weight.dtype == dtype and layer.is_prepared
        assert torch.equal(layer.to_dense(), before.to(dtype))
        fresh = SparseLinear.from_dense(before.to(dtype), dense.bias.to(dtype).detach())
        assert weights_equal(layer, fresh), "not the canonical bytes of the converted weight"
        x = input_of(3, K, dtype=dtype)
        assert torch.equal(layer(x), fresh(x))

    def test_and_back_is_exact(self):
        _, layer = make(torch.bfloat16)
        before = copy.deepcopy(layer)
        layer.float()
        assert layer.spec.dtype == torch.float32 and torch.equal(layer.to_dense(), before.to_dense().float())
        layer.bfloat16()
        assert weights_equal(layer, before)

    def test_values_that_underflow_leave_the_canonical_bytes(self):
        w = torch.zeros(2, 8)
        w[0, 0], w[0, 1], w[1, 2] = 1e-12, -1e-12, 1.0  # zero in float16
        layer = SparseLinear.from_dense(w).half()
        fresh = SparseLinear.from_dense(torch.tensor([[0.0] * 8, [0, 0, 1.0, 0, 0, 0, 0, 0]]).half())
        assert weights_equal(layer, fresh)
        assert not torch.signbit(layer.to_dense()).any()

    def test_type_keeps_the_indices(self):
        """`Module.type` casts every tensor, integers too; ours must stay."""
        _, layer = make()
        before = copy.deepcopy(layer)
        x = input_of(3, K)
        layer.type(torch.float32)
        assert torch.equal(layer(x), before(x)) and weights_equal(layer, before)

    def test_a_backend_that_holds_another_dtype_takes_over(self):
        _, layer = make()
        layer.half()
        assert layer.backend in backends_for(torch.float16)
        if "cpu" in backends_for(torch.float32):
            _, named = make(backend="cpu")
            before = copy.deepcopy(named)
            with pytest.raises(Unsupported, match="float16"):
                named.half()
            assert weights_equal(named, before) and named.backend == "cpu" and named.spec == before.spec

    def test_to_meta_and_back(self):
        dense, layer = make()
        state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        layer.to("meta")
        assert all(tensor.is_meta for tensor in layer.state_dict().values())
        layer.to_empty(device="cpu").load_state_dict(state)
        x = input_of(3, K)
        torch.testing.assert_close(layer(x), dense(x))

    def test_built_on_meta_then_assigned(self):
        dense, layer = make(torch.bfloat16)
        empty = SparseLinear(layer.spec, device="meta")
        assert empty.prepare_() is empty and not empty.is_prepared
        empty.load_state_dict(layer.state_dict(), assign=True)
        x = input_of(3, K, dtype=torch.bfloat16)
        assert torch.equal(empty(x), layer(x)) and empty.is_prepared

    def test_train_and_eval_and_repr(self):
        _, layer = make()
        assert layer.train(False).training is False
        assert f"in_features={K}, out_features={N}, bias=True, format=semi24" in repr(layer)
        assert isinstance(layer, nn.Linear)

    def test_one_copy_of_the_weight(self):
        """The canonical tensors are gone once the backend has its own."""
        _, layer = make(torch.bfloat16, N=64, K=256)
        held = {tensor.untyped_storage().data_ptr(): tensor.nbytes for tensor in layer.buffers()}
        assert sum(held.values()) == layer.packed_bytes() <= 0.66 * layer.dense_bytes()
        assert layer.dense_bytes() == 64 * 256 * 2


def _run_and_return(layer, x):
    with torch.no_grad():
        return layer(x), layer


class TestStateDict:
    def test_is_canonical_whatever_the_backend(self):
        states = [make(backend=name, dtype=torch.float32)[1].state_dict() for name in backends_for(torch.float32)]
        for state in states:
            assert list(state) == ["bias", "values", "meta"]
            assert (state["values"].shape, state["values"].dtype) == ((N, K // 2), torch.float32)
            assert (state["meta"].shape, state["meta"].dtype) == ((N, K // 8), torch.uint8)
            assert all(torch.equal(state[part], states[0][part]) for part in ("values", "meta"))

    def test_load(self):
        _, layer = make()
        dense, other = make(seed=7)
        result = layer.load_state_dict(other.state_dict())
        assert not result.missing_keys and not result.unexpected_keys
        assert weights_equal(layer, other) and torch.equal(layer.to_dense(), dense.weight)
        other.load_state_dict(make(seed=8)[1].state_dict())
        assert torch.equal(layer.to_dense(), dense.weight), "they share memory"

    def test_saved_state_is_not_written_through(self):
        """Loading into a layer may not change the state dict it came from."""
        for name in backends_for(torch.float32):
            _, layer = make(backend=name)
            state = layer.state_dict()
            kept = {key: tensor.clone() for key, tensor in state.items()}
            fresh = SparseLinear(layer.spec, device="meta")
            fresh.load_state_dict(state, assign=True)
            fresh.prepare_()
            fresh.load_state_dict(make(seed=5)[1].state_dict())
            assert all(torch.equal(state[key], kept[key]) for key in ("values", "meta"))

    @pytest.mark.parametrize("strict", [True, False])
    @pytest.mark.parametrize("gone", [("values",), ("meta",), ("values", "meta")], ids=str)
    def test_half_a_weight_changes_nothing(self, gone, strict):
        """New values at the old positions are a weight that nobody made."""
        _, layer = make()
        before = copy.deepcopy(layer)
        state = make(seed=7)[1].state_dict()
        for part in gone:
            del state[part]
        if strict:
            with pytest.raises(RuntimeError, match=f'Missing key.*"{gone[0]}"'):
                layer.load_state_dict(state)
        else:
            assert set(gone) <= set(layer.load_state_dict(state, strict=False).missing_keys)
        assert torch.equal(layer.to_dense(), before.to_dense())
        x = input_of(3, K)
        torch.testing.assert_close(layer(x), F.linear(x, before.to_dense(), state["bias"]))
        assert layer.is_prepared and layer.backend == before.backend

    def test_unexpected_key(self):
        _, layer = make()
        state = {**layer.state_dict(), "weight": torch.zeros(N, K)}
        with pytest.raises(RuntimeError, match='Unexpected key.*"weight"'):
            layer.load_state_dict(state)

    @pytest.mark.parametrize("backend", backends_for(torch.float32))
    @pytest.mark.parametrize(
        "damage,message",
        [
            (lambda state: state["meta"][2].zero_(), "index pairs"),
            (lambda state: state["meta"][0, :1].fill_(0x44 + 1), "index pairs"),
            (lambda state: state.update(meta=state["meta"][:, :-1].clone()), "size mismatch"),
            (lambda state: state.update(values=state["values"][:-1].clone()), "size mismatch"),
            (lambda state: state.update(bias=torch.ones(N + 1)), "size mismatch"),
        ],
        ids=["zero_meta", "one_nibble", "short_meta", "short_values", "long_bias"],
    )
    def test_a_damaged_one_leaves_the_layer_as_it_was(self, damage, message, backend):
        _, layer = make(backend=backend)
        model = Outer(layer)
        before = copy.deepcopy(layer)
        state = {key: tensor.clone() for key, tensor in make(seed=7)[1].state_dict().items()}
        damage(state)
        with pytest.raises(RuntimeError, match=message):
            model.load_state_dict({f"first.{key}": tensor for key, tensor in state.items()}, strict=False)
        assert weights_equal(layer, before) and layer.backend == backend
        x = input_of(3, K)
        assert torch.equal(layer(x), before(x))
        assert [name for name, _ in layer.named_parameters()] == ["bias"]
        layer.load_state_dict(make(seed=7)[1].state_dict())  # and takes a sound one afterwards
        assert torch.equal(layer.to_dense(), make(seed=7)[0].weight)

    def test_a_damaged_one_is_named(self):
        model = Outer(make()[1])
        state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        state["first.meta"].zero_()
        with pytest.raises(RuntimeError, match="first: meta holds 240 index pairs"):
            model.load_state_dict(state)

    def test_into_a_narrower_layer(self):
        _, layer = make(torch.bfloat16)
        layer.load_state_dict(make(seed=7)[1].state_dict())
        assert torch.equal(layer.to_dense(), make(seed=7)[0].weight.bfloat16())

    def test_assign_of_another_dtype_is_refused(self):
        _, layer = make(torch.bfloat16)
        before = copy.deepcopy(layer)
        with pytest.raises(RuntimeError, match="does not belong to this model"):
            layer.load_state_dict(make(seed=7)[1].state_dict(), assign=True)
        assert weights_equal(layer, before)

    def test_an_unprepared_layer_that_was_damaged_says_so_when_it_runs(self):
        _, layer = make()
        state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
        state["meta"].zero_()
        fresh = SparseLinear(layer.spec)
        fresh.load_state_dict(state)
        with pytest.raises(RuntimeError, match="damaged"):
            fresh(input_of(3, K))


class TestWeight:
    """`layer.weight` may be read; what is written to it would be lost, so it raises."""

    def test_reads(self):
        dense, layer = make(torch.bfloat16)
        weight = layer.weight
        assert torch.equal(weight, dense.weight)
        assert (weight.dtype, weight.device, weight.shape) == (torch.bfloat16, CPU, (N, K))
        assert torch.equal(weight + 1, dense.weight + 1) and torch.equal(weight.T, dense.weight.T)
        assert torch.equal(weight.norm(dim=1), dense.weight.norm(dim=1))
        assert weight.data_ptr() != layer.weight.data_ptr()

    def test_copies_are_ordinary_tensors(self):
        _, layer = make()
        for tensor in (layer.weight.clone(), layer.weight.data.clone(), layer.weight * 1, layer.weight.double()):
            assert type(tensor) is torch.Tensor
            tensor += 1

    @pytest.mark.parametrize(
        "write",
        [
            lambda layer: layer.weight.mul_(2),
            lambda layer: layer.weight.copy_(torch.zeros(N, K)),
            lambda layer: layer.weight.data.add_(1),
            lambda layer: layer.weight.detach().zero_(),
            lambda layer: layer.weight.view(-1)[3:].fill_(1),
            lambda layer: layer.weight.T.zero_(),
            lambda layer: layer.weight[0].zero_(),
            lambda layer: layer.weight.__setitem__((0, 0), 1.0),
            lambda layer: layer.weight.__setattr__("data", torch.zeros(N, K)),
            lambda layer: nn.init.normal_(layer.weight),
            lambda layer: nn.init.zeros_(layer.weight),
            lambda layer: torch.add(layer.weight, 1, out=layer.weight),
        ],
        ids="mul_ copy_ data.add_ detach view.fill_ T.zero_ row.zero_ setitem data= normal_ init.zeros_ out=".split(),
    )
    def test_writes_raise(self, write):
        _, layer = make()
        before = layer.to_dense()
        with pytest.raises(Unsupported, match="read-only.*unpack_"):
            write(layer)
        assert torch.equal(layer.to_dense(), before)

    def test_augmented_assignment_raises(self):
        _, layer = make()
        with pytest.raises(Unsupported, match="read-only"):
            layer.weight.data += torch.ones(N, K)
        with pytest.raises(Unsupported, match="read-only"):
            layer.weight.data *= 2
        with pytest.raises((AttributeError, KeyError)):
            layer.weight = nn.Parameter(torch.zeros(N, K))
        assert "weight" not in layer._parameters


def test_from_linear_keeps_mode_bias_and_source():
    dense, _ = make()
    dense.eval()
    layer = SparseLinear.from_linear(dense)
    assert not layer.training and layer.bias is dense.bias and layer.source == "Linear"


def test_from_conv1d():
    from transformers.pytorch_utils import Conv1D

    conv = Conv1D(N, K)
    conv.weight.data = weight24(N, K).T.contiguous()
    layer = SparseLinear.from_linear(conv)
    assert layer.source == "Conv1D" and torch.equal(layer.to_dense().T, conv.weight)
    x = input_of(2, 3, K)
    torch.testing.assert_close(layer(x), conv(x))


def packed_linear(N=16, K=16):
    torch.manual_seed(0)
    linear = nn.Linear(K, N)
    with torch.no_grad():
        linear.weight.mul_(sk.NM(2, 4).project(linear.weight.abs()))
    return linear, sk.SparseLinear.from_linear(linear)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_a_jit_trace_holds_the_product_and_not_what_memory_held():
    _, layer = packed_linear()
    with torch.no_grad():
        traced = torch.jit.trace(layer, (torch.randn(3, 16),), check_trace=False)
        x = torch.randn(3, 16)
        assert torch.equal(traced(x), layer(x))


def test_autocast_returns_its_own_dtype_as_dense_does():
    linear, layer = packed_linear()
    x = torch.randn(3, 16)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(x).dtype == linear(x).dtype == torch.bfloat16
        torch.testing.assert_close(layer(x), linear(x), atol=2e-2, rtol=2e-2)


def test_the_weight_is_read_only_through_numpy_too():
    linear, layer = packed_linear()
    array = layer.weight.numpy()
    assert (array == linear.weight.detach().numpy()).all()
    with pytest.raises(ValueError, match="read-only"):
        array[:] = 0


def test_a_parametrized_bias():
    """It is a property then, and no parameter."""

    class Doubled(nn.Module):
        def forward(self, bias):
            return 2 * bias

    dense, layer = make()
    for module in (dense, layer):
        nn.utils.parametrize.register_parametrization(module, "bias", Doubled())
    torch.testing.assert_close(layer(input_of(3, K)), dense(input_of(3, K)))


def test_a_bias_that_was_taken_away_or_replaced():
    dense, layer = make()
    for module in (dense, layer):
        module.bias = nn.Parameter(torch.full((N,), 2.0))
    torch.testing.assert_close(layer(input_of(3, K)), dense(input_of(3, K)))
    for module in (dense, layer):
        module.bias = None
    torch.testing.assert_close(layer(input_of(3, K)), dense(input_of(3, K)))
