"""`block`: packed, run, saved and loaded, and chosen by `pack_` where it pays."""

import copy
import json
import warnings

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from sparsekit_kernels.layout_block import block_grid, compress_block

import sparsekit as sk
from sparsekit import CheckpointError, SparseLinear, Unsupported
from sparsekit.backends import BACKENDS
from sparsekit.formats import FORMATS, PackedWeight, WeightSpec

BLOCK = FORMATS.get("block")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
CPU = torch.device("cpu")


def block_weight(N, K, block, dtype=torch.float32, density=0.3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    kept = torch.rand(block_grid(N, K, block), generator=generator) < density
    keep = kept.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)[:N, :K]
    return torch.where(keep, torch.randn(N, K, generator=generator), -0.0).to(dtype)


def block_model(pattern="64x64", sparsity=0.75, dtype=torch.float32, width=256):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(width, 2 * width), nn.ReLU(), nn.Linear(2 * width, width, bias=False)).to(dtype)
    sk.prune_(model, sk.Magnitude(pattern=pattern, sparsity=sparsity), progress=False)
    return model


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "N,K,block", [(256, 256, (64, 64)), (130, 260, (16, 32)), (128, 384, (128, 128)), (5, 9, (16, 16))]
)
def test_exact_both_ways(N, K, block, dtype):
    w = block_weight(N, K, block, dtype)
    packed = BLOCK.pack(w)
    assert packed.spec.num_blocks == packed.tensors["values"].shape[0]
    assert tuple(packed.tensors) == BLOCK.names == tuple(BLOCK.parts(packed.spec))
    BLOCK.validate(packed)
    bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(BLOCK.unpack(packed).view(bits), torch.where(w == 0, 0, w).view(bits))
    if N % block[0] == K % block[1] == 0:
        assert packed.spec.block == block
        for name, part in zip(BLOCK.names, compress_block(w, block), strict=True):
            assert torch.equal(packed.tensors[name], part)
    for _, backend in BACKENDS.items():
        if backend.why_not(packed.spec, CPU) is None:
            restored = backend.restore(packed.spec, backend.prepare(packed))
            assert restored.spec == packed.spec and list(restored.tensors) == list(packed.tensors)
            for name, part in packed.tensors.items():
                assert torch.equal(restored.tensors[name].view(torch.uint8), part.view(torch.uint8)), backend.name


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("density", [0.0, 0.1, 0.6, 1.0])
def test_any_density_and_number_of_tokens(density, backend):
    """Beyond 16 tokens a weight with most blocks stored is multiplied densely, one with few by its blocks."""
    torch.manual_seed(0)
    w = block_weight(70, 200, (16, 32), torch.float32, density)
    bias = torch.randn(70)
    layer = SparseLinear.from_dense(w, bias, format="block", backend=backend)
    for M in (0, 1, 16, 17, 100):
        x = torch.randn(M, 200)
        exact = F.linear(x.double(), w.double(), bias.double()).float()
        torch.testing.assert_close(layer(x), exact, rtol=1e-5, atol=5e-5)
    assert torch.equal(layer(x[:0]), torch.zeros(0, 70))
    if density == 0:
        assert torch.equal(layer(x), bias.expand(100, 70))


def test_non_contiguous_inputs_and_gradients():
    w = block_weight(64, 96, (16, 16))
    layer = SparseLinear.from_dense(w, format="block")
    torch.manual_seed(0)
    x = torch.randn(96, 2, 3).permute(1, 2, 0).requires_grad_()
    torch.testing.assert_close(layer(x), F.linear(x, w))
    layer(x).square().sum().backward()
    found, x.grad = x.grad, None
    F.linear(x, w).square().sum().backward()
    torch.testing.assert_close(found, x.grad)


def test_compiles_into_one_graph():
    layer = SparseLinear.from_dense(block_weight(64, 96, (16, 16)), torch.randn(64), format="block")
    x = torch.randn(3, 96)
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))


class TestPack:
    @pytest.mark.parametrize("pattern,block", [("64x64", (64, 64)), ("128x128", (128, 128)), ("32x64", (32, 64))])
    def test_a_model_pruned_in_blocks_is_packed_in_them(self, pattern, block):
        model = block_model(pattern)
        dense = copy.deepcopy(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            sk.pack_(model)
        for i in (0, 2):
            assert model[i].spec.format == "block" and model[i].spec.block == block
            assert model[i].packed_bytes() < 0.27 * model[i].dense_bytes()
        x = torch.randn(3, 256)
        torch.testing.assert_close(model(x), dense(x))
        report = sk.check(model)
        assert report.ok and {row["pattern"] for row in report.rows} == {pattern}
        sk.unpack_(model)
        assert torch.equal(model[0].weight, torch.where(dense[0].weight == 0, 0, dense[0].weight))

    def test_few_zero_blocks_stay_dense(self):
        model = block_model(sparsity=0.1)
        with pytest.raises(sk.PatternError, match="break semi24; .* blocks hold non-zeros, too many for block"):
            sk.pack_(model)
        assert type(model[0]) is nn.Linear

    def test_scattered_zeros_stay_dense(self):
        model = block_model("unstructured", 0.9)
        with pytest.raises(sk.PatternError, match="blocks hold non-zeros"):
            sk.pack_(model)

    def test_2_4_comes_first(self):
        model = block_model("2:4", 0.5)
        assert {layer.spec.format for layer in sk.pack_(model) if isinstance(layer, SparseLinear)} == {"semi24"}

    def test_by_name(self):
        model = block_model()
        sk.pack_(model, "block", "reference")
        assert model[0].spec.format == "block" and model[0].backend == "reference"

    def test_sparsify(self):
        model = nn.Sequential(nn.Linear(256, 256), nn.ReLU())
        sk.sparsify(model, "64x64", method="magnitude", sparsity=0.75, progress=False)
        assert isinstance(model[0], SparseLinear) and model[0].spec.num_blocks == 4

    def test_float16_on_a_cpu_is_spoken_of(self):
        with pytest.warns(UserWarning, match="2 packed layers run on 'reference'.*bfloat16 and float32, not float16"):
            sk.pack_(block_model(dtype=torch.float16))


class TestStateDict:
    def test_round_trip_through_a_folder(self, tmp_path):
        model = sk.pack_(block_model(dtype=torch.bfloat16))
        x = torch.randn(3, 256).bfloat16()
        sk.save(model, tmp_path / "packed")
        described = json.loads((tmp_path / "packed" / "sparsekit.json").read_text())["layers"]["0"]
        assert described["block"] == [64, 64] and described["num_blocks"] == model[0].spec.num_blocks
        assert "64x64" in (tmp_path / "packed" / "README.md").read_text()
        again = sk.load(tmp_path / "packed", model=block_model(sparsity=0.5, dtype=torch.bfloat16))
        assert again[0].spec == model[0].spec and torch.equal(again(x), model(x))

    def test_a_transformers_model(self, tmp_path):
        transformers = pytest.importorskip("transformers")
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=2
        )
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(config).eval()
        sk.prune_(model, sk.Magnitude(pattern="64x64", sparsity=0.75), progress=False)
        sk.pack_(model)
        ids = torch.arange(9)[None]
        model.save_pretrained(tmp_path)
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        packed = {name: layer.spec for name, layer in model.named_modules() if isinstance(layer, SparseLinear)}
        assert packed == {name: x.spec for name, x in again.named_modules() if isinstance(x, SparseLinear)}
        assert len(packed) == 7 and torch.equal(again(ids).logits, model(ids).logits)

    def test_on_the_meta_device_until_loaded(self):
        layer = SparseLinear.from_dense(block_weight(64, 96, (16, 16)), format="block")
        empty = SparseLinear(layer.spec, bias=False, device="meta")
        assert {name: part.shape for name, part in empty.state_dict().items()} == {
            name: part.shape for name, part in layer.state_dict().items()
        }
        empty.load_state_dict(layer.state_dict(), assign=True)
        x = torch.randn(2, 96)
        assert torch.equal(empty(x), layer(x))

    def test_another_dtype(self):
        w = block_weight(64, 96, (16, 16))
        w[:16, :16] = 1e-30  # a whole block that fp16 cannot hold
        layer = SparseLinear.from_dense(w, format="block")
        stored = layer.spec.num_blocks
        layer.half()
        assert layer.spec.num_blocks == stored - 1 and torch.equal(layer.to_dense(), w.half() + 0.0)
        with pytest.raises(Unsupported, match="block does not hold torch.float64"):
            layer.double()

    def test_weights_of_another_size_are_refused(self):
        layer = SparseLinear.from_dense(block_weight(64, 96, (16, 16)), format="block")
        other = SparseLinear.from_dense(block_weight(64, 96, (16, 16), density=0.6), format="block")
        before = layer.to_dense()
        with pytest.raises(RuntimeError, match="size mismatch for values"):
            layer.load_state_dict(other.state_dict())
        assert torch.equal(layer.to_dense(), before)


class TestDamage:
    def damaged(self, name, index, value):
        packed = BLOCK.pack(block_weight(64, 96, (16, 16)))
        tensors = {part: tensor.clone() for part, tensor in packed.tensors.items()}
        tensors[name][index] = value
        return PackedWeight(packed.spec, tensors)

    @pytest.mark.parametrize(
        "name,index,value,match",
        [
            ("values", (0, 0, 0), float("nan"), "values hold NaN or infinity"),
            ("values", (0, 0, 0), -0.0, "values hold -0.0"),
            ("columns", 0, 6, r"columns must be in 0 \.\. 5"),
            ("row_pointers", 1, 99, "row_pointers must ascend"),
        ],
    )
    def test_of_tensors_is_found(self, name, index, value, match):
        with pytest.raises(CheckpointError, match=f"{match}.*(damaged)"):
            BLOCK.validate(self.damaged(name, index, value))

    def test_of_shapes_is_found(self):
        packed = BLOCK.pack(block_weight(64, 96, (16, 16)))
        with pytest.raises(CheckpointError, match="columns is torch.int64.* needs torch.int32"):
            BLOCK.validate(PackedWeight(packed.spec, {**packed.tensors, "columns": packed.tensors["columns"].long()}))

    @pytest.mark.parametrize(
        "details",
        [
            {},
            {"block": [64, 64]},
            {"block": [64], "num_blocks": 1},
            {"block": [0, 64], "num_blocks": 1},
            {"block": "64x64", "num_blocks": 1},
            {"block": [64, 64], "num_blocks": 5},
            {"block": [64, 64], "num_blocks": "1"},
        ],
    )
    def test_of_the_description_is_found(self, details):
        with pytest.raises(CheckpointError, match="describe no 128x128 weight"):
            BLOCK.spec(128, 128, torch.float32, details)
        assert BLOCK.spec(128, 128, torch.float32, {"block": [64, 64], "num_blocks": 4}).num_blocks == 4

    def test_a_spec_without_blocks(self):
        with pytest.raises(ValueError, match="lacks block and num_blocks"):
            BLOCK.parts(WeightSpec("block", 64, 64, torch.float32))


def test_wrong_arguments_are_refused_in_words():
    with pytest.raises(Unsupported, match="bfloat16, float16 and float32, not torch.float64"):
        BLOCK.pack(torch.zeros(4, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="takes no scales"):
        BLOCK.pack(torch.zeros(4, 4), torch.ones(4))
    spec = WeightSpec("block", 64, 64, torch.float32, (8, 8), 1)
    assert "multiples of 16, these are 8x8" in BACKENDS.get("triton").why_not(spec, torch.device("cuda"))
