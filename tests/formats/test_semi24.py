"""`semi24` against a reference in numpy that shares no code with it; bit for bit, both ways."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsekit_kernels import cpu, layout24

from sparsekit import CheckpointError, PatternError, Unsupported
from sparsekit.backends import BACKENDS
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec

SEMI24 = FORMATS.get("semi24")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
BITS = {torch.bfloat16: torch.int16, torch.float16: torch.int16, torch.float32: torch.int32}
COMPILED = cpu.why_not() is None


def bits(tensor):
    """The raw bits, so that -0.0, NaN and subnormals are told apart."""
    return tensor.contiguous().view(BITS[tensor.dtype])


def reference_pack(w):
    """The layout as its documentation says it, one group at a time. Returns the bits of values, and meta."""
    raw = bits(w).numpy()
    magnitude = raw & (0x7FFF if raw.itemsize == 2 else 0x7FFFFFFF)
    N, K = raw.shape
    Kp = -(-K // 8) * 8
    values = np.zeros((N, Kp // 2), raw.dtype)
    meta = np.zeros((N, Kp // 8), np.uint8)
    for n in range(N):
        for g in range(Kp // 4):
            columns = [4 * g + i for i in range(4)]
            used = [i for i, k in enumerate(columns) if k < K and magnitude[n, k] != 0]
            assert len(used) <= 2
            for free in (3, 2, 1, 0):
                if len(used) < 2 and free not in used:
                    used.append(free)
            used.sort()
            for slot, i in enumerate(used):
                k = columns[i]
                if k < K and magnitude[n, k] != 0:
                    values[n, 2 * g + slot] = raw[n, k]
            meta[n, g // 2] |= (used[0] | used[1] << 2) << (4 * (g % 2))
    return torch.from_numpy(values), torch.from_numpy(meta)


def pack(w):
    packed = SEMI24.pack(w)
    return packed.tensors["values"], packed.tensors["meta"]


def assert_exact(w):
    """`pack` gives the bytes of the reference, `unpack` gives `w` with +0.0 for -0.0, and so do all backends."""
    packed = SEMI24.pack(w)
    values, meta = reference_pack(w)
    assert torch.equal(bits(packed.tensors["values"]), values), "values differ from the reference"
    assert torch.equal(packed.tensors["meta"], meta), "meta differs from the reference"
    SEMI24.validate(packed)
    positive = torch.where(w == 0, torch.zeros_like(w), w)
    assert torch.equal(bits(SEMI24.unpack(packed)), bits(positive))
    python = layout24.compress24(w)
    assert torch.equal(bits(python[0]), values) and torch.equal(python[1], meta), "layout24 differs"
    for backend in BACKENDS.items():
        _assert_backend_is_exact(backend[1], packed, positive)


def _assert_backend_is_exact(backend, packed, w):
    if backend.why_not(packed.spec, torch.device("cpu")) is not None:
        return
    prepared = backend.prepare(packed)
    restored = backend.restore(packed.spec, prepared)
    assert torch.equal(bits(restored.tensors["values"]), bits(packed.tensors["values"])), backend.name
    assert torch.equal(restored.tensors["meta"], packed.tensors["meta"]), backend.name
    assert torch.equal(bits(backend.to_dense(packed.spec, prepared)), bits(w)), backend.name


def random24(N, K, dtype, seed, density=1.0, minus_zeros=0.0):
    """Up to two non-zeros a group: normals, subnormals, the largest and the smallest numbers; some -0.0."""
    generator = torch.Generator().manual_seed(seed)
    info = torch.finfo(dtype)
    kinds = torch.randint(5, (N, K), generator=generator)
    w = torch.randn(N, K, generator=generator).to(dtype)
    w = torch.where(kinds == 1, torch.tensor(info.smallest_normal / 2).to(dtype), w)  # subnormal
    w = torch.where(kinds == 2, torch.tensor(-info.max).to(dtype), w)
    w = torch.where(kinds == 3, torch.tensor(1.0).to(dtype), w)  # ties
    order = torch.nn.functional.pad(torch.rand(N, K, generator=generator), (0, -K % 4), value=-1.0).view(N, -1, 4)
    keep = (order.argsort(-1).argsort(-1) >= 2).view(N, -1)[:, :K]
    keep &= torch.rand(N, K, generator=generator) < density
    zeros = torch.where(torch.rand(N, K, generator=generator) < minus_zeros, -0.0, 0.0).to(dtype)
    return torch.where(keep, w, zeros)


@settings(max_examples=120, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 20),
    K=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    density=st.sampled_from([0.0, 0.3, 0.9, 1.0]),
    minus_zeros=st.sampled_from([0.0, 0.5, 1.0]),
    seed=st.integers(0, 2**31),
)
def test_exact_both_ways(N, K, dtype, density, minus_zeros, seed):
    assert_exact(random24(N, K, dtype, seed, density, minus_zeros))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_set_of_positions(dtype):
    """All eleven ways to place at most two non-zeros in a group, beside one another, in both nibbles."""
    ways = [way for way in range(16) if bin(way).count("1") <= 2]
    rows = [
        [(i + 1.5) * (way >> i & 1) for way in (first, second) for i in range(4)] for first in ways for second in ways
    ]
    assert_exact(torch.tensor(rows).to(dtype))


@pytest.mark.parametrize(
    "group,nibble,slots",
    [
        ([0, 0, 0, 0], 0b1110, [0, 0]),
        ([5, 0, 0, 0], 0b1100, [5, 0]),
        ([0, 5, 0, 0], 0b1101, [5, 0]),
        ([0, 0, 5, 0], 0b1110, [5, 0]),
        ([0, 0, 0, 5], 0b1110, [0, 5]),
        ([5, 6, 0, 0], 0b0100, [5, 6]),
        ([5, 0, 6, 0], 0b1000, [5, 6]),
        ([5, 0, 0, 6], 0b1100, [5, 6]),
        ([0, 5, 6, 0], 0b1001, [5, 6]),
        ([0, 5, 0, 6], 0b1101, [5, 6]),
        ([0, 0, 5, 6], 0b1110, [5, 6]),
    ],
)
def test_worked_by_hand(group, nibble, slots):
    """The table of `docs`: nibble = idx0 | idx1 << 2, and where the filler goes."""
    values, meta = pack(torch.tensor([group + [0, 0, 1, 2]]).float())
    assert meta.tolist() == [[nibble | 0b1110 << 4]]
    assert values.tolist() == [[*map(float, slots), 1.0, 2.0]]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_weights_have_equal_bytes(dtype):
    w = random24(9, 37, dtype, 3, density=0.6)
    minus = torch.where(w == 0, torch.tensor(-0.0).to(dtype), w)
    wide = torch.zeros(18, 74, dtype=dtype)
    wide[::2, ::2] = w
    for same in (minus, w.T.contiguous().T, wide[::2, ::2]):
        assert torch.equal(w, same)
        values, meta = pack(same)
        assert torch.equal(bits(values), bits(pack(w)[0])) and torch.equal(meta, pack(w)[1])


def test_packing_leaves_the_weight_alone():
    w = random24(9, 37, torch.float32, 3, minus_zeros=1.0)
    before = bits(w).clone()
    SEMI24.unpack(SEMI24.pack(w)).fill_(7)
    assert torch.equal(bits(w), before)


@pytest.mark.skipif(not COMPILED, reason=str(cpu.why_not()))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,K", [(1, 1), (7, 8), (33, 66), (130, 1024), (5, 4099)])
def test_the_compiled_packer_equals_the_written_down_one(N, K, dtype):
    w = random24(N, K, dtype, N + K, density=0.9, minus_zeros=0.5)
    for a, b in zip(cpu.compress24(w), layout24.compress24(w), strict=True):
        assert a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    N=st.integers(1, 9),
    K=st.integers(3, 40),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 999),
    data=st.data(),
)
def test_violations_are_counted(N, K, dtype, seed, data):
    w = random24(N, K, dtype, seed, density=0.8, minus_zeros=0.5)
    broken = set()
    for _ in range(data.draw(st.integers(0, 3))):
        n, g = data.draw(st.integers(0, N - 1)), data.draw(st.integers(0, K // 4 - (K % 4 < 3)))
        columns = data.draw(st.sampled_from([(0, 1, 2), (0, 1, 3), (0, 2, 3), (1, 2, 3), (0, 1, 2, 3)]))
        columns = columns if 4 * g + 3 < K else (0, 1, 2)
        w[n, [4 * g + i for i in columns]] = torch.finfo(dtype).smallest_normal / 2  # a subnormal is not zero
        broken.add((n, g))
    assert SEMI24.count_violations(w) == (len(broken), N * -(-K // 4))
    if broken:
        with pytest.raises(PatternError, match=f"^{len(broken)} of {N * -(-K // 4)} groups of four"):
            SEMI24.pack(w)
    else:
        assert_exact(w)


def test_refuses_other_dtypes():
    for dtype in (torch.float64, torch.int8):
        with pytest.raises(Unsupported, match=f"not {dtype}: convert"):
            SEMI24.pack(torch.zeros(2, 8, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N,K", [(1, 1), (3, 8), (16, 72), (5, 130)])
def test_parts_say_what_pack_makes(N, K, dtype):
    packed = SEMI24.pack(random24(N, K, dtype, 0))
    assert packed.spec == WeightSpec("semi24", N, K, dtype)
    assert {name: (tuple(t.shape), t.dtype) for name, t in packed.tensors.items()} == SEMI24.parts(packed.spec)
    assert packed.nbytes == sum(t.numel() * t.element_size() for t in packed.tensors.values())
    if K % 8 == 0:
        assert packed.nbytes == packed.spec.dense_bytes * (9 if dtype.itemsize == 2 else 8.5) / 16


class TestPlantedFaults:
    """Damage to packed bytes is seen: by `validate` where no weight has such bytes, by comparison elsewhere."""

    @staticmethod
    def packed():
        torch.manual_seed(0)
        w = random24(16, 64, torch.bfloat16, 5)
        return w, SEMI24.pack(w)

    def damaged(self, change):
        w, packed = self.packed()
        parts = {name: tensor.clone() for name, tensor in packed.tensors.items()}
        change(parts)
        return w, PackedWeight(packed.spec, parts)

    @pytest.mark.parametrize("high", [False, True], ids=["low_nibble", "high_nibble"])
    @pytest.mark.parametrize("nibble", range(16))
    def test_only_the_six_nibbles_pass(self, nibble, high):
        def change(parts):
            byte = int(parts["meta"][3, 2])
            parts["meta"][3, 2] = (byte & 0x0F | nibble << 4) if high else (byte & 0xF0 | nibble)

        _, packed = self.damaged(change)
        idx0, idx1 = nibble & 3, nibble >> 2
        if idx0 < idx1:
            SEMI24.validate(packed)
        else:
            with pytest.raises(CheckpointError, match="meta holds 1 index pairs"):
                SEMI24.validate(packed)

    def test_swapped_indices(self):
        """idx1 | idx0 << 2 everywhere: no such weight exists."""

        def change(parts):
            meta = parts["meta"]
            parts["meta"] = (meta & 0x33) << 2 | (meta & 0xCC) >> 2

        _, packed = self.damaged(change)
        with pytest.raises(CheckpointError, match="meta holds 256 index pairs"):
            SEMI24.validate(packed)

    @pytest.mark.parametrize(
        "change",
        [
            lambda parts: parts["meta"].copy_(parts["meta"] >> 4 | parts["meta"] << 4),
            lambda parts: parts["values"].copy_(parts["values"].roll(1, 1)),
            lambda parts: parts["values"].copy_(parts["values"].view(16, -1, 2).flip(-1).view(16, -1)),
            lambda parts: parts["meta"].copy_(parts["meta"].roll(1, 0)),
            lambda parts: parts["values"][7, 5:6].neg_(),
        ],
        ids=["nibbles_swapped", "values_shifted", "slots_swapped", "rows_shifted", "one_sign"],
    )
    def test_legal_but_wrong_bytes_change_the_weight(self, change):
        w, packed = self.damaged(change)
        assert not torch.equal(SEMI24.unpack(packed), w)
        with pytest.raises(AssertionError):
            _assert_backend_is_exact(BACKENDS.get("reference"), packed, w)

    @pytest.mark.parametrize(
        "change,message",
        [
            (lambda parts: parts.update(values=parts["values"][:, :-1]), r"values is torch.bfloat16 \(16, 31\)"),
            (lambda parts: parts.update(values=parts["values"].float()), "values is torch.float32"),
            (lambda parts: parts.update(meta=parts["meta"][1:]), r"meta is torch.uint8 \(15, 8\)"),
            (lambda parts: parts.update(meta=parts["meta"].view(torch.int8)), "meta is torch.int8"),
            (lambda parts: parts.update(meta=parts["meta"].flatten()), r"meta is torch.uint8 \(128,\)"),
        ],
    )
    def test_other_shapes_and_dtypes(self, change, message):
        _, packed = self.damaged(change)
        with pytest.raises(CheckpointError, match=f"{message}.*does not belong"):
            SEMI24.validate(packed)


class TestContract:
    """What every format for 2:4 weights promises, over the table."""

    @pytest.mark.parametrize("name", [name for name in FORMATS if name.startswith("semi24")])
    def test_round_trip(self, name):
        kind = FORMATS.get(name)
        assert kind.name == name and kind.dtypes
        for dtype in kind.dtypes:
            w = random24(24, 44, dtype, 1)
            assert kind.count_violations(w)[0] == 0
            packed = kind.pack(w)
            kind.validate(packed)
            assert packed.spec.format == name
            if kind.lossless:
                assert torch.equal(kind.unpack(packed), w)
            else:
                again = kind.pack(kind.unpack(packed), packed.tensors["scales"])
                assert torch.equal(kind.unpack(again), kind.unpack(packed))
            assert all(tensor.is_contiguous() for tensor in packed.tensors.values())

    @pytest.mark.parametrize("name", list(FORMATS))
    def test_some_backend_runs_it_anywhere(self, name):
        for dtype in FORMATS.get(name).dtypes:
            spec = WeightSpec(name, 8, 8, dtype)
            assert any(backend.why_not(spec, torch.device("cpu")) is None for _, backend in BACKENDS.items())

    def test_unknown(self):
        with pytest.raises(ValueError, match="unknown format 'semi-24': known are .*'semi24'.* Did you mean 'semi24'"):
            FORMATS.get("semi-24")
