"""Side branches: the layer that is trained, and the packed one that runs it, in every format and on every backend.

The reference is float64: W, S and X as dense matrices, X the block indicator where it is not given.
"""

import copy
import itertools
import pickle

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import sparsekit as sk
from sparsekit import CheckpointError, NonFiniteError, SparseLinear, Unsupported
from sparsekit.backends import BACKENDS
from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.nn import SideLinear, dense_layer, grid_of, install_side_, merge_side_, side_branches, sparse_layers
from sparsekit.nn.side import block_indicator
from sparsekit.nn.side_columns import SideColumns, group_sums
from sparsekit.plan import SideBranch
from tests.nn.test_sparse_linear import Outer, assert_as_good_as_dense, input_of, weight24, weights_equal

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
FORMATS24 = [name for name in FORMATS if name.startswith("semi24")]
CPU = torch.device("cpu")
SHAPES = [(24, 40, 16), (17, 172, 16), (8, 129, 64), (3, 7, 16), (1, 1, 16), (40, 96, 5), (5, 250, 1)]
"""N, K, group."""


def branch_of(N, K, group=16, rank=None, dtype=torch.float32, seed=7):
    """A random branch; with a rank, of an X of its own."""
    generator = torch.Generator().manual_seed(seed)
    S = 0.2 * torch.randn(N, rank or -(-K // group), generator=generator)
    X = torch.randn(rank, K, generator=generator) / 4 if rank else None
    return SideBranch(S.to(dtype), None if X is None else X.to(dtype), group)


def make_side(N=24, K=40, group=16, rank=None, dtype=torch.float32, bias=True):
    """A 2:4 layer with a branch; row 1 of its weight is empty."""
    linear = nn.Linear(K, N, bias=bias).to(dtype)
    linear.weight.data = weight24(N, K, dtype)
    return SideLinear.from_linear(linear, branch_of(N, K, group, rank, dtype))


def in_float64(layer, x):
    X = block_indicator(layer.in_features, layer.group) if layer.side_X is None else layer.side_X
    bias = None if layer.bias is None else layer.bias.double()
    x = x.double()
    return F.linear(x, layer.weight.double(), bias) + x @ X.double().T @ layer.side_S.double().T


def assert_exact_to_rounding(packed, x):
    """Each y is off by what rounding z, y and W to x's dtype costs, and sums in fp32, or x in fixed point, at most.

    W, because a quantised kernel may multiply q by its scale in fp32, where the dense weight is rounded.
    """
    y, dense, unit = packed(x), dense_layer(packed), torch.finfo(x.dtype).eps / 2
    assert y.dtype == x.dtype and y.shape == (*x.shape[:-1], packed.out_features) and y.isfinite().all()
    expected, x_abs, w_abs = in_float64(dense, x), packed.extended(x).double().abs(), packed._unpacked().double().abs()
    z_S = dense.reduce(x).double().abs() @ dense.side_S.double().abs().T
    products = 0 if FORMATS.get(packed.format).lossless else x_abs @ w_abs.T
    fixed_point = x_abs.amax(-1, keepdim=True) * w_abs.sum(1) * (2.0**-15 if unit > 1e-6 else 2.0**-21)
    limit = 1.05 * unit * (2 * expected.abs() + z_S + products) + fixed_point
    assert bool(((y.double() - expected).abs() <= limit).all()), ((y.double() - expected).abs() / limit).max()


def runnable(format, dtype):
    spec = WeightSpec(format, 24, 48, dtype)
    return [name for name, backend in BACKENDS.items() if backend.why_not(spec, CPU) is None]


CASES = [
    pytest.param(format, backend, dtype, id=f"{format}-{backend}-{str(dtype).removeprefix('torch.')}")
    for format, dtype in itertools.product(FORMATS24, DTYPES)
    for backend in runnable(format, dtype)
]


class TestSideLinear:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("N,K,group", SHAPES)
    def test_the_sums_are_those_of_the_indicator(self, N, K, group, dtype):
        x = input_of(3, 2, K, dtype=dtype)
        z, expected = group_sums(x, group), x.double() @ block_indicator(K, group, torch.float64).T
        assert z.dtype == dtype and z.shape == expected.shape
        error, unit = (z.double() - expected).abs(), torch.finfo(dtype).eps
        assert bool((error <= unit / 2 * expected.abs() + 2.0**-22 * group_sums(x.double().abs(), group)).all())

    def test_sums_of_16_bit_numbers_lose_nothing_on_the_way(self):
        x = torch.ones(1, 512, dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
        assert group_sums(x, 512).item() == 512

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("rank", [None, 6])
    @pytest.mark.parametrize("N,K,group", SHAPES)
    def test_forward_is_that_of_the_matrices(self, N, K, group, rank, dtype):
        layer, x = make_side(N, K, group, rank, dtype), input_of(5, K, dtype=dtype)
        X = block_indicator(K, group, dtype) if rank is None else layer.side_X
        dense = F.linear(x, layer.weight, layer.bias) + F.linear(F.linear(x, X), layer.side_S)
        assert_as_good_as_dense(layer(x), dense, in_float64(layer, x))

    def test_trains_all_that_it_has(self):
        layer = make_side(rank=4)
        names = {name for name, parameter in layer.named_parameters() if parameter.requires_grad}
        assert names == {"weight", "bias", "side_S", "side_X"}
        layer(input_of(3, 40)).square().sum().backward()
        assert all(bool(parameter.grad.any()) for parameter in layer.parameters())
        x = input_of(2, 40).double().requires_grad_()
        assert torch.autograd.gradcheck(make_side().double(), x)

    def test_a_new_one_adds_nothing(self):
        for rank in (None, 3):
            layer = SideLinear(20, 8, group=8, rank=rank)
            x = input_of(4, 20)
            assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
        assert SideLinear(20, 8, group=8).side_S.shape == (8, 3)

    def test_takes_over_the_parameters_of_the_layer(self):
        linear = nn.Linear(40, 24).eval()
        linear.weight.requires_grad_(False)
        layer = SideLinear.from_linear(linear, branch_of(24, 40))
        assert layer.weight is linear.weight and layer.bias is linear.bias and not layer.training
        assert not layer.side_S.requires_grad, "as trainable as the weight"
        other = SideLinear.from_linear(layer, branch_of(24, 40, rank=2))
        assert other.weight is linear.weight and other.rank == 2 and other.group == 16

    def test_stands_for_a_conv1d(self):
        from transformers.pytorch_utils import Conv1D

        model = nn.Sequential(Conv1D(24, 40))
        x, before = input_of(3, 40), copy.deepcopy(model)
        layer = install_side_(model, "0", branch_of(24, 40))
        assert layer.source == "Conv1D" and torch.allclose(layer(x), in_float64(layer, x).float(), atol=1e-5)
        layer.side_S.data.zero_()
        with pytest.warns(UserWarning, match="1 layers are dense again"):
            assert merge_side_(model) == ["0"]
        assert type(model[0]) is Conv1D and torch.equal(model[0].weight, before[0].weight)
        assert torch.equal(model[0].bias, before[0].bias)

    def test_hooks_stay(self):
        model, calls = nn.Sequential(nn.Linear(40, 24)), []
        handle = model[0].register_forward_hook(lambda *_: calls.append(1))
        install_side_(model, "0", branch_of(24, 40))
        model(input_of(1, 40))
        handle.remove()
        model(input_of(1, 40))
        assert calls == [1]

    @pytest.mark.parametrize(
        "layer, branch, message",
        [
            (nn.Linear(40, 24), branch_of(23, 40), "0: the side branch does not fit.*S has 23 rows"),
            (nn.Linear(40, 24), branch_of(24, 64), "S has 4 columns, 40 features make 3 groups"),
            (nn.ReLU(), branch_of(24, 40), "a ReLU cannot take a side branch: it is no linear layer"),
            (SparseLinear.from_dense(weight24(24, 40)), branch_of(24, 40), "it is packed, call sparsekit.unpack_"),
            (
                nn.utils.parametrizations.weight_norm(nn.Linear(40, 24)),
                branch_of(24, 40),
                "its weight is parametrized",
            ),
            (nn.MultiheadAttention(40, 2).out_proj, branch_of(40, 40), "reads its weight without calling it"),
        ],
        ids=["rows", "columns", "kind", "packed", "parametrized", "attention"],
    )
    def test_refusals(self, layer, branch, message):
        model = nn.Sequential(layer)
        with pytest.raises(ValueError, match=message):
            install_side_(model, "0", branch)
        assert model[0] is layer

    def test_a_layer_in_two_places_is_refused(self):
        layer = nn.Linear(16, 16)
        with pytest.raises(ValueError, match="stands in several places"):
            install_side_(nn.Sequential(layer, layer), "0", branch_of(16, 16))

    @pytest.mark.parametrize("N,K,group", SHAPES)
    @pytest.mark.parametrize("rank", [None, 3])
    def test_merged_is_one_matrix_with_the_same_answer(self, N, K, group, rank):
        model = nn.Sequential(make_side(N, K, group, rank))
        x, expected = input_of(4, K), in_float64(model[0], input_of(4, K))
        with pytest.warns(UserWarning, match="dense again"):
            merge_side_(model)
        assert type(model[0]) is nn.Linear
        assert_as_good_as_dense(model(x), expected.float() + 1e-6, expected)
        assert merge_side_(model) == []

    def test_copies_of_branches_are_copies(self):
        model = nn.Sequential(make_side())
        branches = side_branches(model)
        before = branches["0"].S.clone()
        model[0].side_S.data.add_(1)
        assert torch.equal(branches["0"].S, before)


class TestColumns:
    @pytest.mark.parametrize("K", [1, 7, 8, 40, 250])
    @pytest.mark.parametrize("rank", [1, 2, 3, 4, 5, 17])
    def test_where_they_lie(self, K, rank):
        columns = SideColumns(K, rank, 16, has_X=True)
        w, S = torch.randn(3, K), torch.randn(3, rank)
        whole = columns.join(w, S, scale=0.25)
        expected = torch.zeros(3, columns.packed_features)
        expected[:, :K] = w
        first = (K + 7) // 8 * 8
        for j in range(rank):
            expected[:, first + 4 * (j // 2) + j % 2] = S[:, j] * 4
        assert torch.equal(whole, expected) and columns.packed_features % 8 == 0
        assert columns.packed_features - first < 2 * rank + 8, "two columns for each of S, and less than eight to fill"
        assert all(torch.equal(a, b) for a, b in zip(columns.split(whole, 0.25), (w, S), strict=True))

    @pytest.mark.parametrize(
        "described",
        [
            None,
            {},
            {"rank": 3, "group": 16},
            {"rank": 0, "group": 16, "has_X": True},
            {"rank": 2, "group": 16, "has_X": 0},
        ],
    )
    def test_damaged_descriptions(self, described):
        with pytest.raises(CheckpointError, match="describes no branch of 40 features"):
            SideColumns.from_dict(40, described)


class TestPacked:
    @pytest.mark.parametrize("format,backend,dtype", CASES)
    def test_as_good_as_dense(self, format, backend, dtype):
        for i, (N, K, group) in enumerate(SHAPES):
            for rank in (None, 5):
                side = make_side(N, K, group, rank, dtype, bias=(i + bool(rank)) % 2 == 0)
                packed = SparseLinear.from_linear(side, format, backend)
                for M in (0, 1, 3, 17):
                    assert_exact_to_rounding(packed, input_of(M, K, dtype=dtype))
                assert packed.in_features == K and packed.weight.shape == (N, K) and packed.backend == backend
                if FORMATS.get(format).lossless:
                    assert torch.equal(packed.weight, side.weight)
                    assert torch.equal(packed.side_branch().S, side.side_S)

    @pytest.mark.parametrize("format,backend,dtype", CASES)
    def test_input_that_is_not_contiguous(self, format, backend, dtype):
        side = make_side(24, 172, dtype=dtype)
        packed = SparseLinear.from_linear(side, format, backend)
        wide = input_of(4, 6, 3 * 172, dtype=dtype)
        for x in (
            wide[..., 172:344],
            wide[..., ::3],
            wide[:, ::2, :172].transpose(0, 1),
            wide[:1, :1, :172].expand(2, 5, -1),
        ):
            assert torch.equal(packed(x), packed(x.contiguous()))

    @pytest.mark.parametrize("format", FORMATS24)
    def test_equals_the_applied_model_where_nothing_is_rounded(self, format):
        side = make_side(32, 64)
        packed, x = SparseLinear.from_linear(side, format), input_of(9, 64)
        error = (packed(x) - side(x)).norm() / side(x).norm()
        assert error < {"semi24": 1e-6, "semi24_int8": 0.01, "semi24_int4": 0.15, "semi24_fp8": 0.04}[format]

    @pytest.mark.parametrize("format", FORMATS24)
    @pytest.mark.parametrize("rank", [None, 5])
    @pytest.mark.parametrize("dtype", DTYPES)
    def test_unpacked_is_what_it_ran_and_packs_to_it_again(self, format, rank, dtype):
        for N, K, group in SHAPES[:5]:
            model = nn.Sequential(make_side(N, K, group, rank, dtype), nn.ReLU())
            packed = sk.pack_(model, format)[0]
            state = {name: tensor.clone() for name, tensor in packed.state_dict().items()}
            side = sk.unpack_(model)[0]
            assert isinstance(side, SideLinear) and side.branch == packed.side_branch()
            assert torch.equal(side.weight, packed.to_dense())
            again = sk.pack_(model)[0]
            assert again.format == format
            assert torch.equal(again.to_dense(), side.weight) and again.side_branch() == side.branch
            if format == "semi24":
                assert state.keys() == again.state_dict().keys()
                assert all(torch.equal(state[name], tensor) for name, tensor in again.state_dict().items())

    @pytest.mark.parametrize("format", ["semi24_int8", "semi24_int4", "semi24_fp8"])
    def test_the_grid_of_the_weight_stays_where_the_branch_has_left_it(self, format):
        model = nn.Sequential(make_side(24, 300), nn.ReLU())
        side = sk.unpack_(sk.pack_(model, format))[0]
        side.side_S.data.mul_(30.123)
        found = grid_of(side, side.weight.detach())
        assert found is not None and found[0] == format
        again = sk.pack_(model)[0]
        assert torch.equal(again.to_dense(), side.weight)
        error = (again.side_branch().S - side.side_S).norm() / side.side_S.norm()
        assert error < (0.02 if format == "semi24_int8" else 0.2), "brought to the range of the grid, not cut off"

    @pytest.mark.parametrize("format", ["semi24_int8", "semi24_int4", "semi24_fp8"])
    def test_scales_of_the_weight_alone_are_kept(self, format):
        side = make_side(24, 300)
        kind = FORMATS.get(format)
        scales = kind.pack(side.weight.detach()).tensors["scales"] * 1.25
        on_grid = kind.unpack(kind.pack(side.weight.detach(), scales))
        packed = SparseLinear.from_linear(side, format, scales=scales)
        assert torch.equal(packed.to_dense(), on_grid)

    @pytest.mark.parametrize("size", [1e-3, 1.0, 1e3])
    @pytest.mark.parametrize("format", ["semi24_int8", "semi24_fp8"])
    def test_a_branch_of_any_size_uses_the_grid(self, format, size):
        side = make_side(64, 256)
        side.side_S.data.mul_(size)
        packed = SparseLinear.from_linear(side, format)
        S = packed.side_branch().S
        assert (S - side.side_S).norm() / side.side_S.norm() < 0.05
        assert (packed.to_dense() - side.weight).norm() / side.weight.norm() < 0.05
        scale = packed.side_scale.item()
        assert scale == 2.0 ** round(torch.tensor(scale).log2().item()), "a power of two: it rounds nothing"

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_an_X_of_8_bits(self, dtype):
        side = make_side(16, 250, rank=5, dtype=dtype)
        side.side_X.data[0] = 0
        side.side_X.data[1] *= 1e-3
        side.side_X.data[2] *= 300
        side.side_X.data[3] = 127 / 64
        packed = SparseLinear.from_linear(side, "semi24_int8")
        X = packed.side_branch().X
        steps = packed.side_X_scale
        assert packed.side_X.dtype == torch.int8 and bool((steps == steps.log2().round().exp2()).all())
        assert X.dtype == dtype and bool(((X - side.side_X).abs() <= steps[:, None] / 2).all())
        largest = packed.side_X.abs().amax(1)
        assert largest[0] == 0 and bool((largest[1:] > 63).all()), "seven bits at least"
        assert torch.equal(X[3], side.side_X[3])
        again = SparseLinear.from_linear(dense_layer(packed), "semi24_int8")
        assert torch.equal(again.side_branch().X, X) and torch.equal(again.side_X, packed.side_X)

    @pytest.mark.parametrize("group", [4, 16, 64])
    def test_where_the_grid_leaves_the_choice_z_is_as_large_as_x(self, group):
        packed = SparseLinear.from_linear(make_side(16, 256, group), "semi24_int4")  # S has scales of its own
        assert packed.side_scale.item() == group**-0.5

    def test_a_branch_of_zeros(self):
        side = make_side()
        side.side_S.data.zero_()
        for format in FORMATS24:
            packed = SparseLinear.from_linear(side, format)
            assert not packed.side_branch().S.any() and packed(input_of(2, 40)).isfinite().all()

    def test_bits_are_counted(self):
        """2:4 int4 is 3.125 bits; a branch at group 16 adds an eighth. An X of its own adds 8 bits a number."""
        N, K = 64, 1024
        side = make_side(N, K, dtype=torch.bfloat16, bias=False)
        bits = {name: 8 * SparseLinear.from_linear(side, name).packed_bytes() / (N * K) for name in FORMATS24}
        assert bits["semi24"] == 9 * 1.125
        assert bits["semi24_int4"] == pytest.approx(3.125 * 1.125, abs=1e-3) and bits["semi24_int4"] <= 3.7
        assert bits["semi24_int8"] == pytest.approx(8 * 9 / 16 + 9 / 8 + 32 / K, abs=1e-3)
        own_X = SparseLinear.from_linear(make_side(N, K, rank=64, dtype=torch.bfloat16), "semi24_int4")
        plain = SparseLinear.from_dense(side.weight.detach(), format="semi24_int4")
        added = 8 * (own_X.packed_bytes() - plain.packed_bytes()) / (N * K)
        assert added == pytest.approx(8 * 64 / N + 3.125 / 8 + 16 * 64 / (N * K), rel=1e-3)
        assert own_X.dense_bytes() == plain.dense_bytes() == N * K * 2

    def test_refusals(self):
        side = make_side()
        with pytest.raises(Unsupported, match="block holds no side branch"):
            SparseLinear.from_linear(side, "block")
        packed = SparseLinear.from_linear(side)
        for x in (torch.randn(3, packed.spec.in_features), torch.randn(3, 39), torch.tensor(1.0)):
            with pytest.raises(ValueError, match=r"W has 40.*pass x of shape \[\.\.\., 40\]"):
                packed(x)
        with pytest.raises(ValueError, match="x is torch.float64"):
            packed(input_of(3, 40).double())
        side.side_S.data[3, 1] = float("nan")
        with pytest.raises(NonFiniteError, match="the side branch holds NaN"):
            SparseLinear.from_linear(side)

    def test_pack_names_the_layer_and_leaves_what_fits_nothing(self):
        model = nn.Sequential(make_side(32, 32), nn.Linear(32, 32))
        model[0].weight.data = torch.randn(32, 32)
        with pytest.raises(sk.PatternError, match="0: 256 of 256 groups break semi24"):
            sk.pack_(model)
        with pytest.raises(sk.PatternError, match="0: block holds no side branch"):
            sk.pack_(model, "block")
        assert isinstance(model[0], SideLinear)

    def test_says_what_it_holds(self):
        packed = SparseLinear.from_linear(make_side(group=8))
        assert "in_features=40, out_features=24" in repr(packed) and "side rank=5" in repr(packed)
        assert "side rank=5, X=sums of 8" in repr(make_side(group=8)) and "X=trained" in repr(make_side(rank=2))


PACKED = [("semi24", None), ("semi24_int8", None), ("semi24_int4", 3), ("semi24", 3)]


@pytest.mark.parametrize("format,rank", PACKED)
class TestAsAnyLayer:
    """What `nn.Linear` promises, kept by a packed layer with a branch."""

    def make(self, format, rank, dtype=torch.float32):
        return SparseLinear.from_linear(make_side(24, 40, 16, rank, dtype), format)

    def test_gradients(self, format, rank):
        packed = self.make(format, rank)
        dense = dense_layer(packed)
        x, x2 = (input_of(5, 40).requires_grad_() for _ in range(2))
        for layer, source in ((packed, x), (dense, x2)):
            (layer(source) * input_of(5, 24, seed=3)).sum().backward()
        torch.testing.assert_close(x.grad, x2.grad, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(packed.bias.grad, dense.bias.grad)

    def test_compiles_whole_and_exports(self, format, rank):
        packed = self.make(format, rank)
        model = Outer(packed)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
        for M in (2, 5, 17):
            x = input_of(M, 40)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-6)
        exported = torch.export.export(model, (input_of(2, 40),)).module()
        torch.testing.assert_close(exported(input_of(2, 40)), model(input_of(2, 40)), rtol=1e-5, atol=1e-6)

    def test_transforms(self, format, rank):
        packed = self.make(format, rank)
        dense = dense_layer(packed)
        x = input_of(3, 4, 40)
        torch.testing.assert_close(torch.func.vmap(packed)(x), dense(x), rtol=1e-4, atol=1e-5)
        tangents = [torch.func.jvp(layer, (x,), (x + 1,))[1] for layer in (packed, dense)]
        torch.testing.assert_close(*tangents, rtol=1e-4, atol=1e-5)

    def test_copies_and_conversions(self, format, rank):
        packed, x = self.make(format, rank), input_of(3, 40)
        for copied in (copy.deepcopy(packed), pickle.loads(pickle.dumps(packed))):
            assert torch.equal(copied(x), packed(x)) and weights_equal(copied, packed)
            copied.load_state_dict({name: tensor.clone() for name, tensor in packed.state_dict().items()})
            assert torch.equal(copied(x), packed(x))
        half = copy.deepcopy(packed).to(torch.bfloat16)
        assert half.spec.dtype == torch.bfloat16 and half(x.bfloat16()).dtype == torch.bfloat16
        beside = packed.side.parts_beside(torch.bfloat16, FORMATS.get(format).lossless)
        assert {name: (tensor.shape, tensor.dtype) for name, tensor in half.side_tensors().items()} == beside
        assert (half(x.bfloat16()).float() - packed(x)).norm() / packed(x).norm() < 0.01
        assert {tensor.device.type for tensor in copy.deepcopy(packed).to("meta").state_dict().values()} == {"meta"}

    def test_under_autocast(self, format, rank):
        packed, x = self.make(format, rank, torch.bfloat16), input_of(3, 40)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(packed(x), packed(x.bfloat16()))

    def test_the_state_dict(self, format, rank):
        packed, x = self.make(format, rank), input_of(3, 40)
        state = packed.state_dict()
        rounded = not FORMATS.get(format).lossless
        beside = ["side_X"] * bool(rank) + ["side_X_scale"] * (bool(rank) and rounded) + ["side_scale"] * rounded
        assert list(state) == ["bias", *FORMATS.get(format).names, *beside]
        empty = SparseLinear(packed.spec, side=packed.side, device="meta").to_empty(device="cpu")
        empty.load_state_dict(state)
        assert torch.equal(empty(x), packed(x))
        other = SparseLinear.from_linear(make_side(24, 40, 16, rank), format)
        other.load_state_dict(state)
        assert torch.equal(other(x), packed(x))

    def test_a_damaged_one_leaves_the_layer_as_it_was(self, format, rank):
        packed, x = self.make(format, rank), input_of(3, 40)
        before = packed(x)
        for name in packed.side_tensors().keys() - {"side_X" if format != "semi24" else ""}:
            damaged = {key: tensor.clone() for key, tensor in packed.state_dict().items()}
            damaged[name].fill_(float("nan"))
            with pytest.raises(RuntimeError, match=f"{name} holds NaN"):
                packed.load_state_dict(damaged)
            assert torch.equal(packed(x), before)
            del damaged[name]
            with pytest.raises(RuntimeError, match=f"[Mm]issing.*{name}"):
                packed.load_state_dict(damaged)
            assert torch.equal(packed(x), before)


class TestFused:
    def attention(self, format="semi24", rank=None, groups=(16, 16, 16)):
        from tests.nn.test_fused import LlamaAttention, Wrapped

        model = Wrapped(LlamaAttention())
        for name, group in zip(("q_proj", "k_proj", "v_proj"), groups, strict=True):
            layer = model.blocks[0].get_submodule(name)
            layer.weight.data = weight24(layer.out_features, layer.in_features, seed=layer.out_features)
            install_side_(model, f"blocks.0.{name}", branch_of(layer.out_features, layer.in_features, group, rank))
        return model

    def test_branches_that_read_the_same_run_as_one(self):
        model = self.attention()
        x = input_of(2, 5, 40)
        apart = sk.pack_(copy.deepcopy(model))(x)
        fused = sk.pack_(model, fuse=True)
        layers = [layer for layer in sparse_layers(fused).values() if layer.is_fused]
        assert len(layers) == 3 and all(layer.side is not None for layer in layers)
        torch.testing.assert_close(fused(x), apart, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(copy.deepcopy(fused)(x), apart, rtol=1e-5, atol=1e-6)
        assert isinstance(sk.unpack_(fused).blocks[0].q_proj, SideLinear)
        torch.testing.assert_close(fused(x), apart, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("changes, reason", [
        (dict(rank=3), "the side branches of k_proj and q_proj do not read the same"),
        (dict(groups=(16, 16, 14)), "the side branches of v_proj and q_proj do not read the same"),
    ])  # fmt: skip
    def test_others_stay_apart_and_say_why(self, changes, reason):
        model = self.attention(**changes)
        if "rank" in changes:  # each has an X of its own
            model.blocks[0].k_proj.side_X.data.add_(1)
        x = input_of(2, 5, 40)
        apart = sk.pack_(copy.deepcopy(model))(x)
        with pytest.warns(UserWarning, match="fused nothing"):
            sk.pack_(model, fuse=True)
        assert reason in model.blocks[0].q_proj.fusion
        assert torch.equal(model(x), apart)


def test_lora_beside_a_branch():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = LlamaForCausalLM(config)
    plan = sk.prune_(model, "magnitude", progress=False)
    plan.side = {name: branch_of(*mask.shape) for name, mask in plan.masks.items()}
    sk.apply_(model, plan)
    ids = torch.arange(12).view(2, 6)
    expected = model(input_ids=ids).logits
    for pack in (False, True):
        base = sk.pack_(copy.deepcopy(model)) if pack else copy.deepcopy(model)
        tuned = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))
        torch.testing.assert_close(tuned(input_ids=ids).logits, expected, rtol=1e-3, atol=1e-4)
        tuned(input_ids=ids, labels=ids).loss.backward()
        adapters = [p for n, p in tuned.named_parameters() if "lora_B" in n]
        assert adapters and all(bool(p.grad.any()) for p in adapters)
