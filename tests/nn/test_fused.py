"""Layers run by one product: the numbers of the layers apart, whatever is done to the model in between."""

import copy
import gc
import io
import multiprocessing
import pickle
import threading
import warnings
import weakref

import pytest
import torch
import torch.nn as nn
from torch.utils.checkpoint import checkpoint

import sparsekit as sk
from sparsekit import SparseLinear, Unsupported
from sparsekit.backends import BACKENDS
from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.nn import fuse_, sparse_layers
from sparsekit.nn.fused import SAME_INPUT
from sparsekit.ops import SparseOp
from tests.test_pack import prune24_, state_of

K = 40
CPU = torch.device("cpu")


class LlamaAttention(nn.Module):
    """Made known below; wide q, narrow k and v. `between` stands for code after the first call; it may return an x."""

    between = None
    order = (0, 1, 2)

    def __init__(self, rows=(32, 16, 16), bias=False):
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(K, N, bias=bias) for N in rows)
        self.o_proj = nn.Linear(32, K, bias=False)

    def forward(self, x):
        layers, results = (self.q_proj, self.k_proj, self.v_proj), [None] * 3
        for i in self.order:
            results[i] = layers[i](x)
            if self.between and i == self.order[0]:
                other = self.between(x)
                x = x if other is None else other
        return torch.cat(results, -1)


SAME_INPUT[f"{__name__}.LlamaAttention"] = ("q_proj", "k_proj", "v_proj")


class Wrapped(nn.Module):
    def __init__(self, *modules):
        super().__init__()
        self.blocks = nn.ModuleList(modules)

    def forward(self, x):
        return torch.cat([block(x) for block in self.blocks], -1)


def models(bias=False, dtype=torch.float32, rows=(32, 16, 16), num=1, **options):
    """(dense, packed apart, packed and fused), with one weight."""
    torch.manual_seed(0)
    dense = prune24_(Wrapped(*(LlamaAttention(rows, bias) for _ in range(num)))).to(dtype)
    apart = sk.pack_(copy.deepcopy(dense), **options)
    return dense, apart, sk.pack_(copy.deepcopy(dense), fuse=True, **options)


def trio(model, block=0):
    attention = model.blocks[block]
    return attention.q_proj, attention.k_proj, attention.v_proj


def x_of(*shape, dtype=torch.float32, seed=1):
    return torch.randn(*shape, K, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Launches:
    """How often the operator was called, past the dispatcher or through it."""

    def __init__(self, monkeypatch):
        self.sizes = []
        real = SparseOp.__getattribute__

        def watched(op, name):
            value = real(op, name)
            if name != "linear":
                return value

            def linear(x, weight, bias, N, K):
                self.sizes.append(N)
                return value(x, weight, bias, N, K)

            return linear

        monkeypatch.setattr(SparseOp, "__getattribute__", watched)

    def __call__(self, call):
        self.sizes.clear()
        call()
        return list(self.sizes)


@pytest.fixture
def launches(monkeypatch):
    return Launches(monkeypatch)


def assert_fused(model, block=0):
    q, k, v = trio(model, block)
    assert q.is_fused and k.is_fused and v.is_fused and q.group is k.group is v.group
    assert all(a is b for a, b in zip(q.prepared, v.prepared, strict=True)), "a second copy"


def runs_on_cpu(format, dtype):
    return BACKENDS.get("cpu").why_not(WeightSpec(format, 32, K, dtype), CPU) is None


CASES = [
    (format, dtype, backend)
    for format in FORMATS
    if format.startswith("semi24")
    for dtype in (torch.float32, torch.bfloat16, torch.float16)
    for backend in ("cpu", "reference")
    if backend == "reference" or runs_on_cpu(format, dtype)
]


class TestNumbers:
    @pytest.mark.parametrize("bias", [True, False], ids=["bias", "no_bias"])
    @pytest.mark.parametrize("format,dtype,backend", CASES, ids=str)
    def test_are_those_of_the_layers_apart(self, format, dtype, backend, bias):
        _, apart, fused = models(bias, dtype, format=format, backend=backend)
        assert_fused(fused)
        for shape in ((), (1,), (3,), (2, 5), (0,), (33,)):
            x = x_of(*shape, dtype=dtype)
            for one, other in zip(trio(apart), trio(fused), strict=True):
                expected, got = one(x), other(x)
                assert got.shape == expected.shape and got.dtype == expected.dtype
                if backend == "cpu":
                    assert torch.equal(got, expected)
                else:  # a dense product may add in another order when N is another
                    torch.testing.assert_close(got, expected)

    def test_gradients(self):
        dense, _, fused = models(bias=True)
        x = x_of(2, 3)
        results = []
        for model in (dense, fused):
            leaf = x.clone().requires_grad_()
            out = model(leaf)
            (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
            results.append([leaf.grad, *(layer.bias.grad for layer in trio(model))])
        for got, expected in zip(results[1], results[0], strict=True):
            torch.testing.assert_close(got, expected)

    def test_what_is_written_into_one_result_is_not_seen_in_another(self):
        _, apart, fused = models()
        for grad in (False, True):
            x = x_of(3).requires_grad_(grad)
            q, k, v = (layer(x) for layer in trio(fused))
            q.mul_(2)
            assert torch.equal(k, trio(apart)[1](x)) and torch.equal(v, trio(apart)[2](x))

    def test_autocast(self):
        dense, _, fused = models()
        x = x_of(3)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            for one, other in zip(trio(dense), trio(fused), strict=True):
                assert other(x).dtype == torch.bfloat16
                torch.testing.assert_close(other(x), one(x), atol=3e-2, rtol=3e-2)
        _, apart, fused = models(dtype=torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):  # x is converted for each layer: still one input
            assert torch.equal(fused(x), apart(x.bfloat16()))


class TestOneLaunch:
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    @pytest.mark.parametrize("bias", [True, False])
    def test_for_three_layers(self, launches, mode, bias):
        _, apart, fused = models(bias)
        with mode():
            x = x_of(3).requires_grad_(mode is torch.enable_grad)
            assert launches(lambda: apart(x)) == [32, 16, 16]
            for _ in range(3):
                assert launches(lambda: fused(x)) == [64]
            assert fused.blocks[0].q_proj.group.product is None, "the product is kept alive"

    def test_in_any_order(self, launches):
        _, apart, fused = models()
        x = x_of(3)
        for order in ((2, 1, 0), (1, 2, 0), (0, 2, 1)):
            fused.blocks[0].order = order
            assert launches(lambda: fused(x)) == [64]
            assert torch.equal(fused(x), apart(x))

    def test_a_layer_called_twice_computes_twice(self, launches):
        _, _, fused = models()
        fused.blocks[0].between = lambda x: [trio(fused)[0](x)] and None
        assert launches(lambda: fused(x_of(3))) == [64, 64]

    def test_under_autocast(self, launches):
        _, _, fused = models(dtype=torch.bfloat16)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            x = x_of(3)
            assert launches(lambda: fused(x)) == [64]

    def test_behind_an_adapter(self, launches):
        peft = pytest.importorskip("peft")
        dense, _, _ = models(bias=True)
        config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2)
        model = peft.get_peft_model(sk.pack_(copy.deepcopy(dense)), config)
        sk.pack_(model, fuse=True)
        x = x_of(3)
        assert launches(lambda: model(x)) == [64]
        torch.testing.assert_close(model(x), dense(x))
        attention = model.base_model.model.blocks[0]
        handle = attention.q_proj.lora_A["default"].register_forward_hook(lambda *_: None)
        assert launches(lambda: model(x)) == [64, 64, 64], "a hook within an adapter could write to x"
        handle.remove()
        assert launches(lambda: model(x)) == [64]
        model(x).sum().backward()
        assert all(p.grad is not None for name, p in model.named_parameters() if "lora_" in name)


class Outside:
    """Ways to write to x that no version tells of, or that a compiler does not show."""

    @staticmethod
    def in_place(x):
        x.mul_(2)

    @staticmethod
    def data(x):
        x.data.copy_(x.flip(0))

    @staticmethod
    def dlpack(x):
        torch.utils.dlpack.from_dlpack(torch.utils.dlpack.to_dlpack(x)).mul_(2)


class TestOutsideOfTheParent:
    """Layers called by hand share nothing."""

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    @pytest.mark.parametrize("write", [Outside.in_place, Outside.data, Outside.dlpack])
    def test_x_was_written_to(self, write, mode, bias):
        _, apart, fused = models(bias)
        with mode():
            x = x_of(3)
            trio(fused)[0](x)
            write(x)
            assert torch.equal(trio(fused)[1](x), trio(apart)[1](x))

    def test_x_was_written_to_in_a_compiled_function(self):
        _, apart, fused = models()

        def run(x):
            q = trio(fused)[0](x)
            x.mul_(2)
            return q, trio(fused)[1](x)

        torch._dynamo.reset()
        with torch.no_grad():
            x = x_of(3)
            expected = trio(apart)[0](x), trio(apart)[1](2 * x)
            got = torch.compile(run, fullgraph=True, backend="eager")(x)
        assert torch.equal(got[0], expected[0]) and torch.equal(got[1], expected[1])

    @pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
    def test_nothing_is_kept(self, mode):
        _, _, fused = models()
        gc.disable()
        try:
            with mode():
                x = x_of(3).requires_grad_(mode is torch.enable_grad)
                y = trio(fused)[0](x)
                held = weakref.ref(x), weakref.ref(y if y._base is None else y._base)
                del x, y
                assert held[0]() is None and held[1]() is None
        finally:
            gc.enable()

    def test_nothing_is_kept_when_the_parent_stops_half_way(self):
        _, apart, fused = models()
        attention = fused.blocks[0]

        def stop(x):
            assert attention.q_proj.group.product.source is x, "the scope was not open"
            raise ValueError("half way")

        attention.between = stop
        x = x_of(3)
        with torch.no_grad(), pytest.raises(ValueError, match="half way"):
            fused(x)
        assert attention.q_proj.group.product is None
        with torch.no_grad():
            x.data.mul_(2)
            assert torch.equal(trio(fused)[1](x), trio(apart)[1](x))

    def test_threads_have_scopes_of_their_own(self):
        _, _, fused = models()
        attention, seen = fused.blocks[0], []

        def look(x):
            thread = threading.Thread(target=lambda: seen.append(attention.q_proj.group.product))
            thread.start()
            thread.join()

        attention.between = look
        fused(x_of(3))
        assert seen == [None]


class TestHooksInBetween:
    """Code that is not the class's own could write to x where nothing tells: each layer computes its own then."""

    MODES = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
    WRITES = pytest.mark.parametrize("write", [Outside.in_place, Outside.data, Outside.dlpack])

    def check(self, apart, fused, mode):
        with mode():
            got, expected = fused(x_of(3)), apart(x_of(3))
        assert torch.equal(got, expected)

    @MODES
    @WRITES
    def test_of_a_layer(self, write, mode):
        _, apart, fused = models()
        for model in (apart, fused):
            trio(model)[1].register_forward_pre_hook(lambda layer, inputs: write(inputs[0]))
        self.check(apart, fused, mode)

    @MODES
    @WRITES
    def test_of_all_modules(self, write, mode):
        from torch.nn.modules.module import register_module_forward_pre_hook

        _, apart, fused = models()
        seconds = [trio(model)[1] for model in (apart, fused)]

        def hook(module, inputs):
            if any(module is second for second in seconds):
                write(inputs[0])

        handle = register_module_forward_pre_hook(hook)
        try:
            self.check(apart, fused, mode)
        finally:
            handle.remove()

    @MODES
    def test_of_the_parent(self, mode):
        """One that calls a layer, before the parent or after it."""
        _, apart, fused = models()
        seen = {}

        def tamper(attention, inputs, *output):
            attention.v_proj(inputs[0])
            inputs[0].data.mul_(2)
            seen.setdefault(attention is fused.blocks[0], []).append(attention.k_proj(inputs[0]))

        for model in (apart, fused):
            model.blocks[0].register_forward_pre_hook(tamper)
            model.blocks[0].register_forward_hook(tamper)
            model.blocks[0].register_forward_hook(tamper, prepend=True)
        self.check(apart, fused, mode)
        assert len(seen[True]) == 3
        assert all(torch.equal(a, b) for a, b in zip(seen[True], seen[False], strict=True))

    @MODES
    def test_a_forward_set_on_a_layer(self, mode):
        _, apart, fused = models()
        for model in (apart, fused):
            k = trio(model)[1]
            k.forward = lambda x, k=k: SparseLinear.forward(k, x.mul_(2))
        self.check(apart, fused, mode)

    @MODES
    def test_a_forward_set_on_the_parent(self, mode):
        _, apart, fused = models()
        for model in (apart, fused):
            attention = model.blocks[0]
            attention.forward = lambda x, a=attention: torch.cat([a.q_proj(x), a.k_proj(x.mul_(2)), a.v_proj(x)], -1)
        self.check(apart, fused, mode)

    @MODES
    def test_a_wrapper(self, mode):
        class Doubling(nn.Module):
            def __init__(self, base_layer):
                super().__init__()
                self.base_layer = base_layer

            def forward(self, x):
                return self.base_layer(x.mul_(2))

        _, apart, fused = models()
        for model in (apart, fused):
            model.blocks[0].k_proj = Doubling(trio(model)[1])
        self.check(apart, fused, mode)

    def test_a_scope_that_nothing_would_close_does_not_open(self, launches):
        _, apart, fused = models()
        fused.blocks[0]._forward_hooks.clear()
        assert launches(lambda: fused(x_of(3))) == [64, 64, 64]
        assert torch.equal(fused(x_of(3)), apart(x_of(3))) and trio(fused)[0].group.product is None


class TestNeverStale:
    """`k` after `q` in one forward of their parent, with something changed between the two."""

    def after(self, change, bias=False, mode=torch.no_grad):
        _, apart, fused = models(bias)
        for model in (apart, fused):
            model.blocks[0].between = lambda x, model=model: change(x, model)
        with mode():
            assert torch.equal(fused(x_of(3))[:, 32:], apart(x_of(3))[:, 32:])

    def test_x_was_written_to(self):
        self.after(lambda x, model: [x.mul_(2)] and None)

    def test_x_is_another_of_the_same_values_or_in_the_same_memory(self):
        self.after(lambda x, model: x.clone())
        self.after(lambda x, model: x.view(3, K))
        self.after(lambda x, model: x.flip(0))

    def test_a_weight_was_loaded(self):
        _, other, _ = models()
        trio(other)[1].load_state_dict(
            {"values": torch.ones(16, K // 2), "meta": trio(other)[1].packed().tensors["meta"]}
        )
        self.after(lambda x, model: trio(model)[1].load_state_dict(trio(other)[1].state_dict()) and None)

    def test_a_bias_was_changed(self):
        def in_place(x, model):
            with torch.no_grad():
                trio(model)[1].bias.add_(1)

        def replaced(x, model):
            trio(model)[1].bias = nn.Parameter(torch.full((16,), 3.0))

        self.after(in_place, bias=True)
        self.after(replaced, bias=True)

    def test_a_bias_was_changed_through_data(self):
        """Which no version tells of: so biases are read anew for each product."""
        _, apart, fused = models(bias=True)
        x = x_of(3)
        fused(x)
        for model in (apart, fused):
            trio(model)[1].bias.data.copy_(torch.arange(16.0))
        assert torch.equal(fused(x), apart(x))

    def test_gradients_were_switched_on(self):
        grads = []
        for model in models()[1:]:
            x = x_of(3).requires_grad_()
            model.blocks[0].between = lambda x: torch.set_grad_enabled(True) and None
            with torch.no_grad():
                model(x)[:, 32:].sum().backward()
            grads.append(x.grad)
        torch.testing.assert_close(grads[1], grads[0])

    def test_a_bias_was_taken_away(self):
        _, _, fused = models(bias=True)
        trio(fused)[1].bias = None
        with pytest.raises(RuntimeError, match="a bias of q_proj, k_proj, v_proj was taken away"):
            fused(x_of(3))


class TestModel:
    def test_names_and_state_are_those_of_the_layers_apart(self):
        _, apart, fused = models(bias=True)
        assert list(fused.state_dict()) == list(apart.state_dict())
        for key, tensor in fused.state_dict().items():
            assert torch.equal(tensor, apart.state_dict()[key]), key
            assert tensor.untyped_storage().nbytes() == tensor.nbytes, f"{key} carries the whole group along"
        assert sparse_layers(fused).keys() == sparse_layers(apart).keys()
        assert [name for name, _ in fused.named_parameters()] == [name for name, _ in apart.named_parameters()]

    def test_no_second_copy(self):
        _, apart, fused = models(dtype=torch.bfloat16)

        def held(model):
            return sum({b.untyped_storage().data_ptr(): b.nbytes for b in model.buffers()}.values())

        assert held(fused) == held(apart) == sum(layer.packed_bytes() for layer in sparse_layers(fused).values())
        for one, other in zip(trio(apart), trio(fused), strict=True):
            assert one.packed_bytes() == other.packed_bytes()

    def test_unpack(self):
        dense, _, fused = models(bias=True)
        before = state_of(dense)["state"]
        sk.unpack_(fused)
        after = state_of(fused)["state"]
        assert before.keys() == after.keys() and all(torch.equal(after[key][0], before[key][0]) for key in before)
        assert not sparse_layers(fused)
        assert all(p.untyped_storage().nbytes() == p.nbytes for p in fused.parameters())

    def test_one_layer_leaves(self):
        from sparsekit.pack import replace_by_dense_

        _, apart, fused = models(bias=True)
        x = x_of(3)
        replace_by_dense_(fused, ["blocks.0.k_proj"])
        assert not any(layer.is_fused for layer in sparse_layers(fused).values())
        assert all(layer.is_prepared for layer in sparse_layers(fused).values())
        torch.testing.assert_close(fused(x), apart(x))

    def test_one_layer_is_replaced_by_hand(self):
        dense, apart, fused = models(bias=True)
        fused.blocks[0].k_proj = copy.deepcopy(dense.blocks[0].k_proj)
        torch.testing.assert_close(fused(x_of(3)), apart(x_of(3)))

    def test_memory_is_freed_with_the_model(self):
        gc.collect()
        gc.disable()
        try:
            _, _, fused = models()
            fused(x_of(3))
            held = weakref.ref(trio(fused)[0].prepared[0])
            del fused
            assert held() is None
        finally:
            gc.enable()

    def test_load_state_dict(self):
        _, apart, fused = models(bias=True)
        torch.manual_seed(5)
        other = sk.pack_(prune24_(Wrapped(LlamaAttention(bias=True))))
        state = other.state_dict()
        result = fused.load_state_dict(state)
        assert not result.missing_keys and not result.unexpected_keys
        assert_fused(fused)
        assert torch.equal(fused(x_of(3)), other(x_of(3)))
        assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())

    @pytest.mark.parametrize("part", ["values", "meta"])
    def test_a_damaged_state_changes_nothing(self, part):
        _, apart, fused = models(bias=True)
        before = {key: value.clone() for key, value in fused.state_dict().items()}
        state = {key: value.clone() for key, value in apart.state_dict().items()}
        state[f"blocks.0.k_proj.{part}"].fill_(torch.nan if part == "values" else 0)
        with pytest.raises(RuntimeError, match="blocks.0.k_proj: .* damaged"):
            fused.load_state_dict(state)
        assert_fused(fused)
        assert all(torch.equal(before[key], value) for key, value in fused.state_dict().items())
        assert torch.equal(fused(x_of(3)), apart(x_of(3)))

    def test_save_and_load(self, tmp_path):
        _, apart, fused = models(bias=True)
        sk.save(fused, tmp_path / "a")
        loaded = sk.load(tmp_path / "a", model=Wrapped(LlamaAttention(bias=True)))
        assert torch.equal(loaded(x_of(3)), apart(x_of(3)))
        assert not trio(loaded)[0].is_fused
        sk.pack_(loaded, fuse=True)
        assert_fused(loaded)
        assert torch.equal(loaded(x_of(3)), apart(x_of(3)))

    def test_check(self):
        _, _, fused = models()
        report = sk.check(fused)
        assert report.ok and len(report.rows) == 4

    def test_hooks_run(self, launches):
        _, apart, fused = models()
        seen = []
        attention = fused.blocks[0]
        attention.register_forward_hook(lambda layer, inputs, output: seen.append(output))
        x = x_of(3)
        assert launches(lambda: fused(x)) == [64], "a hook after all of them writes to nothing"
        handle = attention.k_proj.register_forward_hook(lambda layer, inputs, output: seen.append(output))
        assert launches(lambda: fused(x)) == [64, 64, 64], "one in between could write to x"
        assert torch.equal(seen[1], trio(apart)[1](x)) and torch.equal(seen[0], seen[2])
        handle.remove()
        assert launches(lambda: fused(x)) == [64]

    @pytest.mark.parametrize("leave", ["unpack", "one", "meta"])
    def test_no_hooks_are_left_behind(self, leave):
        from sparsekit.pack import replace_by_dense_

        _, _, fused = models()
        attention = fused.blocks[0]
        assert attention._forward_hooks and attention._forward_pre_hooks
        if leave == "unpack":
            sk.unpack_(fused)
        elif leave == "one":
            replace_by_dense_(fused, ["blocks.0.k_proj"])
        else:
            fused.to("meta")
        assert not attention._forward_hooks and not attention._forward_pre_hooks
        assert not attention._forward_hooks_always_called


class TestCopiesAndConversions:
    def test_deepcopy(self, launches):
        _, apart, fused = models(bias=True)
        x = x_of(3).requires_grad_()
        twins = []
        fused.blocks[0].between = lambda x: twins.append(copy.deepcopy(fused))  # with a product that has a gradient
        fused(x)
        fused.blocks[0].between = twins[0].blocks[0].between = None
        twin = twins[0]
        assert trio(twin)[0].group.product is None and len(twin.blocks[0]._forward_hooks) == 1
        assert_fused(twin)
        assert trio(twin)[0].group is not trio(fused)[0].group
        for layer in trio(twin):
            layer.bias.data.zero_()
        assert launches(lambda: twin(x)) == [64]
        assert launches(lambda: fused(x)) == [64]
        assert torch.equal(fused(x), apart(x)) and not torch.equal(twin(x), apart(x))
        sk.unpack_(twin)
        assert not twin.blocks[0]._forward_hooks and fused.blocks[0]._forward_hooks

    def test_deepcopy_of_one_layer(self):
        _, apart, fused = models(bias=True)
        k = copy.deepcopy(trio(fused)[1])
        assert torch.equal(k(x_of(3)), trio(apart)[1](x_of(3)))
        assert torch.equal(k.to_dense(), trio(apart)[1].to_dense())
        k.bfloat16()
        assert torch.equal(k.to_dense(), trio(apart)[1].to_dense().bfloat16())
        assert torch.equal(fused(x_of(3)), apart(x_of(3)))
        assert_fused(fused)

    def test_pickle(self, launches):
        _, apart, fused = models(bias=True)
        for again in (pickle.loads(pickle.dumps(fused)), saved_and_loaded(fused)):
            assert_fused(again)
            assert launches(lambda again=again: again(x_of(3))) == [
                64,
            ]
            assert torch.equal(again(x_of(3)), apart(x_of(3)))
            sk.unpack_(again)
            assert not again.blocks[0]._forward_hooks and not again.blocks[0]._forward_pre_hooks
            assert torch.isfinite(again(x_of(3))).all()

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
    def test_to_another_dtype(self, dtype):
        _, apart, fused = models(bias=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(fused.to(dtype)(x_of(3, dtype=dtype)), apart.to(dtype)(x_of(3, dtype=dtype)))
        assert_fused(fused)
        assert all(layer.spec.dtype == dtype and layer.is_prepared for layer in sparse_layers(fused).values())

    def test_one_layer_to_another_dtype(self):
        _, apart, fused = models(bias=True)
        trio(fused)[0].bfloat16()
        x = x_of(3)
        assert torch.equal(trio(fused)[1](x), trio(apart)[1](x)) and torch.equal(trio(fused)[2](x), trio(apart)[2](x))
        assert torch.equal(trio(fused)[0](x.bfloat16()), copy.deepcopy(trio(apart)[0]).bfloat16()(x.bfloat16()))
        assert not any(layer.is_fused for layer in trio(fused))
        trio(fused)[0].float()
        assert_fused(fused)  # and back
        assert torch.equal(trio(fused)[1](x), trio(apart)[1](x))

    def test_to_a_dtype_that_the_format_does_not_hold(self):
        _, apart, fused = models()
        with pytest.raises(Unsupported, match="unpack_"):
            fused.double()
        assert_fused(fused)
        assert torch.equal(fused(x_of(3)), apart(x_of(3)))

    def test_to_meta_and_back(self):
        _, apart, fused = models(bias=True)
        state = {key: value.clone() for key, value in fused.state_dict().items()}
        fused.to("meta").to_empty(device="cpu").load_state_dict(state)
        assert torch.equal(fused(x_of(3)), apart(x_of(3)))

    def test_a_conversion_that_changes_nothing_keeps_one_copy(self):
        _, apart, fused = models()
        fused._apply(torch.clone)
        assert_fused(fused)
        fused.share_memory()
        assert_fused(fused)
        assert torch.equal(fused(x_of(3)), apart(x_of(3)))

    def test_to_another_process(self):
        _, apart, fused = models()
        with torch.no_grad(), multiprocessing.get_context("spawn").Pool(1) as pool:
            assert torch.equal(pool.apply(_run, (fused.share_memory(), x_of(3))), apart(x_of(3)))

    def test_replicas_of_data_parallelism(self):
        """They share the group with the layers they were made from, and hold parameters as plain attributes."""
        _, apart, fused = models(bias=True)
        with torch.no_grad():
            for layer, one in zip(trio(fused), trio(apart), strict=True):
                replica = layer._replicate_for_data_parallel()
                replica.bias = layer.bias.detach() + 1
                torch.testing.assert_close(replica(x_of(3)), one(x_of(3)) + 1)

    def test_threads(self):
        _, apart, fused = models(bias=True, num=3)
        inputs = [x_of(5, seed=seed) for seed in range(4)]
        expected = [apart(x).detach() for x in inputs]
        wrong = []

        def serve(x, y):
            with torch.no_grad():
                wrong.extend(None for _ in range(100) if not torch.equal(fused(x), y))

        threads = [threading.Thread(target=serve, args=pair) for pair in zip(inputs, expected, strict=True)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_checkpointed_activations(self, reentrant):
        dense, _, fused = models(bias=True)
        grads = []
        for model in (dense, fused):
            x = x_of(3).requires_grad_()
            checkpoint(model, x, use_reentrant=reentrant).pow(2).sum().backward()
            grads.append((x.grad, trio(model)[1].bias.grad))
        for got, expected in zip(grads[1], grads[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


class TestTransforms:
    @pytest.mark.parametrize(
        "transform",
        [
            lambda f, x: torch.func.vmap(f)(x),
            lambda f, x: torch.func.jvp(f, (x,), (x.flip(0),))[1],
            lambda f, x: torch.func.grad(lambda row: f(row).pow(2).sum())(x),
            lambda f, x: torch.func.jacrev(f)(x[0]),
        ],
        ids="vmap jvp grad jacrev".split(),
    )
    def test_matches_dense(self, transform):
        dense, _, fused = models(bias=True)
        x = x_of(3)
        torch.testing.assert_close(transform(fused, x), transform(dense, x), rtol=1e-4, atol=1e-4)

    def test_export(self):
        _, apart, fused = models()
        program = torch.export.export(fused, (x_of(3),))
        calls = [node for node in program.graph.nodes if "linear_semi24" in str(node.target)]
        assert len(calls) == 1
        torch.testing.assert_close(program.module()(x_of(3)), apart(x_of(3)))


class TestChoice:
    def refused(self, change=None, **arguments):
        torch.manual_seed(0)
        model = prune24_(Wrapped(LlamaAttention(**arguments), LlamaAttention()))
        if change:
            change(model.blocks[0])
        expected = model(x_of(3)).detach()
        sk.pack_(model, fuse=True)
        assert_fused(model, 1)
        assert not any(isinstance(layer, SparseLinear) and layer.is_fused for layer in trio(model))
        torch.testing.assert_close(model(x_of(3)), expected, rtol=1e-4, atol=1e-5)
        column = [row["fused"] for row in sk.explain(model).rows if "fused" in row]
        return next(text for text in column if text.startswith("apart"))

    def test_rows_that_do_not_align(self):
        assert self.refused(rows=(32, 24, 16)) == "apart: k_proj has 24 rows, which is no multiple of 16"

    def test_a_layer_that_stays_dense(self):
        assert self.refused(lambda a: a.v_proj.weight.data.normal_()) == "apart: v_proj is not packed"

    def test_a_layer_that_is_absent(self):
        def absent(attention):
            attention.v_proj = None

        torch.manual_seed(0)
        model = prune24_(Wrapped(LlamaAttention()))
        absent(model.blocks[0])
        with pytest.warns(
            UserWarning, match="fuse=True fused nothing: blocks.0: q_proj, k_proj, v_proj stay apart: v_"
        ):
            sk.pack_(model, fuse=True)

    def test_only_one_bias(self):
        def change(attention):
            attention.k_proj.bias = None

        assert self.refused(change, bias=True) == "apart: of k_proj and q_proj only one has a bias"

    def test_other_formats(self):
        torch.manual_seed(0)
        model = prune24_(Wrapped(LlamaAttention(), LlamaAttention()))
        sk.pack_(model, format="semi24_int8", layers=["blocks.0.k_proj"])
        sk.pack_(model, fuse=True)
        assert trio(model)[0].fusion.startswith("apart: k_proj is semi24_int8 16x40")
        assert_fused(model, 1)

    def test_a_format_that_does_not_hold_rows(self):
        torch.manual_seed(0)
        model = Wrapped(LlamaAttention((32, 32, 32)))
        for layer in trio(model):
            layer.weight.data[:, 16:] = 0
        with pytest.warns(
            UserWarning, match="fused nothing: .* stay apart: block does not hold one row after the other"
        ):
            sk.pack_(
                model, format="block", fuse=True, layers=[f"blocks.0.{name}" for name in ("q_proj", "k_proj", "v_proj")]
            )
        assert torch.isfinite(model(x_of(3))).all()

    def test_unknown_modules_are_left_alone(self):
        """A subclass, or a class of a known name from elsewhere: who knows what they do."""

        class Another(LlamaAttention):
            pass

        same_name = type("LlamaAttention", (LlamaAttention,), {"__module__": "transformers_modules.llama"})
        for kind in (Another, same_name):
            model = prune24_(Wrapped(kind()))
            with pytest.warns(UserWarning, match="fused nothing: no module of the model is of a class in"):
                sk.pack_(model, fuse=True)

    def test_twice_is_once(self):
        _, _, fused = models()
        group = trio(fused)[0].group
        sk.pack_(fused, fuse=True)
        assert trio(fused)[0].group is group
        sk.pack_(fused)
        assert trio(fused)[0].group is group

    @pytest.mark.parametrize("at", [0, 1, 2])
    def test_interrupted(self, monkeypatch, at):
        _, apart, _ = models(num=2)
        before = apart.state_dict()
        real, calls = SparseLinear._set_prepared, []

        def interrupted(layer, *arguments):
            calls.append(layer)
            if len(calls) == 3 + at + 1:
                raise KeyboardInterrupt
            real(layer, *arguments)

        monkeypatch.setattr(SparseLinear, "_set_prepared", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fuse_(apart)
        monkeypatch.undo()
        assert not any(layer.is_fused or layer.group for layer in sparse_layers(apart).values())
        assert all(torch.equal(value, before[key]) for key, value in apart.state_dict().items())
        assert torch.isfinite(apart(x_of(3))).all()


def test_every_class_that_is_known_exists_and_reads_one_input():
    """Its forward calls each of the layers with one and the same name."""
    import importlib
    import inspect
    import re

    assert len(SAME_INPUT) > 20
    for path, layers in SAME_INPUT.items():
        module, _, name = path.rpartition(".")
        if module == __name__:
            continue
        kind = getattr(importlib.import_module(module), name)
        assert kind.__module__ == kind.forward.__module__ == module and kind.__qualname__ == name
        source = inspect.getsource(kind.forward)
        inputs = {re.search(rf"self\.{layer}\((\w+)\)", source).group(1) for layer in layers}
        assert len(inputs) == 1, f"{path} calls its layers with {inputs}"
        x = inputs.pop()
        assert not re.search(rf"\b{x}\s*(\+=|\*=|\[.*\]\s*=[^=])|\b{x}\.\w+_\(", source), f"{path} writes to its input"


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def _run(model, x):
    with torch.no_grad():
        return model(x)


def test_the_rows_of_a_group_are_its_members_stacked():
    dense, _, fused = models()
    q = trio(fused)[0]
    whole = BACKENDS.get(q.backend).to_dense(q._prepared_spec, q.prepared)
    assert torch.equal(whole, torch.cat([layer.weight for layer in trio(dense)]))
