"""Layers on the triton backend whose kernels need a GPU, run as compiled PTX on the CPU."""

import warnings

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="Triton is not installed")

import sparsekit_kernels.spmm24_mma  # noqa: E402, F401 - imported here, so that `emulated` finds it
from sparsekit_kernels import cusparselt, prefill24, target, tuning  # noqa: E402

import sparsekit as sk  # noqa: E402
from sparsekit import SparseLinear, Unsupported  # noqa: E402
from sparsekit.backends import BACKENDS  # noqa: E402
from sparsekit.backends.triton_semi24 import HalfRunner, QuantisedRunner  # noqa: E402
from sparsekit.formats import FORMATS, WeightSpec  # noqa: E402
from tests.kernels.ptx import emulated  # noqa: E402

pytestmark = pytest.mark.skipif(target.INTERPRETED, reason="Triton interprets here; these tests compile")

SEMI24 = ("semi24", "semi24_fp8", "semi24_int8", "semi24_int4")
SIXTEEN_BITS = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        yield


def weight24(N, K, dtype):
    torch.manual_seed(0)
    order = torch.rand(N, -(-K // 4), 4).argsort(-1).argsort(-1).view(N, -1)[:, :K]
    return torch.where(order >= 2, torch.randn(N, K), 0.0).to(dtype)


def exact(layer):
    """The weight in float64, with nothing rounded to the layer's dtype."""
    kind = FORMATS.get(layer.format)
    packed = layer.packed()
    return (kind.unpack(packed) if kind.lossless else kind.unpack(kind.cast(packed, torch.float32))).double()


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("format", SEMI24)
def test_a_layer(format, dtype):
    N, K = 40, 300
    w, bias = weight24(N, K, dtype), torch.randn(N).to(dtype)
    with emulated(), torch.no_grad():
        layer = SparseLinear.from_dense(w, bias, format=format, backend="triton")
        assert layer.backend == "triton" and layer.prepared[0].dtype == torch.int32
        for shape in ((1, K), (2, 5, K), (K,), (0, K)):
            x = torch.randn(shape).to(dtype)
            y = layer(x)
            ref64 = F.linear(x.double(), exact(layer), bias.double())
            assert y.shape == ref64.shape and y.dtype == dtype
            size = F.linear(x.double().abs(), exact(layer).abs(), bias.double().abs())
            assert ((y.double() - ref64).abs() <= size * torch.finfo(dtype).eps).all()


@pytest.mark.parametrize("format", SEMI24)
@pytest.mark.parametrize("N,K", [(1, 1), (3, 7), (17, 130), (64, 520)])
def test_prepare_and_restore_are_inverse(format, N, K):
    for dtype in SIXTEEN_BITS:
        packed = FORMATS.get(format).pack(weight24(N, K, dtype))
        runner = HalfRunner() if format == "semi24" else QuantisedRunner(format)
        prepared = runner.prepare(packed)
        restored = runner.restore(packed.spec, prepared)
        assert restored.spec == packed.spec and list(restored.tensors) == list(packed.tensors)
        for name, tensor in packed.tensors.items():
            assert restored.tensors[name].dtype == tensor.dtype
            assert torch.equal(restored.tensors[name].view(torch.uint8), tensor.view(torch.uint8)), name
        dense = runner.dense(prepared, N, K, dtype)
        assert torch.equal(dense, FORMATS.get(format).unpack(packed))
        assert runner.second_copy_bytes(prepared) == 0


def test_fp32_stays_in_the_canonical_layout_and_quantised_fp32_is_refused():
    w = weight24(16, 64, torch.float32)
    with emulated():
        layer = SparseLinear.from_dense(w, backend="triton")
        assert torch.equal(layer.prepared[0], layer.packed().tensors["values"])
        spec = WeightSpec("semi24_int8", 16, 64, torch.float32)
        answer = BACKENDS.get("triton").why_not(spec, torch.device("cpu"))
        assert answer == "sparse tensor cores multiply bfloat16 and float16, not float32"
        with pytest.raises(Unsupported, match="needs a 16-bit weight"):
            SparseLinear.from_dense(w, backend="triton", prefill="cusparselt")


def test_a_second_copy_only_when_asked_for(monkeypatch):
    """cuSPARSELt's own compression needs its GPU: here it hands back bytes of the right number."""
    N, K = 64, 128
    w = weight24(N, K, torch.bfloat16)
    blob = torch.zeros(cusparselt.blob_bytes(N, K, torch.bfloat16), dtype=torch.uint8)
    monkeypatch.setattr(cusparselt, "prepare", lambda values, meta, K: (blob,))
    monkeypatch.setattr(cusparselt, "why_not", lambda *args: None)
    with emulated():
        one = SparseLinear.from_dense(w, backend="triton")
        two = SparseLinear.from_dense(w, backend="triton", prefill="cusparselt")
        unmeasured = SparseLinear.from_dense(w, backend="triton", prefill="auto")
        monkeypatch.setattr(prefill24, "blob_speedups", lambda *args: {2048: 1.2})
        measured = SparseLinear.from_dense(w, backend="triton", prefill="auto")
        monkeypatch.setattr(prefill24, "blob_speedups", lambda *args: {2048: 1.01})
        noise = SparseLinear.from_dense(w, backend="triton", prefill="auto")
    assert [len(layer.prepared) for layer in (one, two, unmeasured, measured, noise)] == [2, 3, 2, 3, 2]
    runner = HalfRunner()
    assert runner.second_copy_bytes(two.prepared) == blob.nbytes and runner.second_copy_bytes(one.prepared) == 0
    assert torch.equal(runner.dense(two.prepared, N, K, torch.bfloat16), w)


def test_explain_says_where_dense_is_faster(monkeypatch):
    model = torch.nn.Sequential(torch.nn.Linear(64, 32, bias=False).to(torch.bfloat16))
    with torch.no_grad():
        model[0].weight.copy_(weight24(32, 64, torch.bfloat16))
    with emulated():
        sk.pack_(model, backend="triton")
        (row,) = sk.explain(model, (1, 1024)).rows
        assert row["against dense"].startswith("not measured on")
        assert row["M=1"] == "mma.sp on fragments (rule)"
        assert row["M=1024"] == "fragments to dense, then torch's dense product (rule)"
        standing = tuning.Standing(256, "mma", 20.0, 15.0)
        monkeypatch.setattr(tuning, "against_dense", lambda *args, **kwargs: [standing])
        (row,) = sk.explain(model, (1,)).rows
        assert "dense is faster at M=256 (1.33x)" in row["against dense"]


@pytest.fixture
def table(monkeypatch, tmp_path):
    """Stores times of a weight [64, 128], of an imaginary GPU where cuSPARSELt runs."""
    monkeypatch.setenv("SPARSEKIT_TUNING", str(tmp_path))
    monkeypatch.setattr(cusparselt, "why_not", lambda *args: None)
    blob = torch.zeros(cusparselt.blob_bytes(64, 128, torch.bfloat16), dtype=torch.uint8)
    monkeypatch.setattr(cusparselt, "prepare", lambda values, meta, K: (blob,))
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Imaginary GPU")

    def store(M, **us):
        row = {name: tuning.Measured(float(time)) for name, time in us.items()}
        tuning.store(tuning.key("semi24", torch.bfloat16, 64, 128, M), row, torch.device("cpu"))

    return store


def model24():
    model = torch.nn.Sequential(torch.nn.Linear(128, 64, bias=False).to(torch.bfloat16))
    with torch.no_grad():
        model[0].weight.copy_(weight24(64, 128, torch.bfloat16))
    return model


def test_explain_knows_of_the_second_copy_and_of_the_device(table):
    table(2048, mma=50, decompress=40, cusparselt=10, dense=20)
    with emulated():
        for prefill, kernel, verdict in (
            ("dense", "fragments to dense, then torch's dense product (cache)", "dense is faster at M=2048 (2.00x)"),
            ("cusparselt", "cuSPARSELt (cache)", "sparse is 2.00 to 2.00x as fast as dense"),
            ("auto", "cuSPARSELt (cache)", "sparse is 2.00 to 2.00x as fast as dense"),
        ):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                model = sk.pack_(model24(), backend="triton", prefill=prefill)
            (row,) = sk.explain(model, (1, 2000)).rows
            assert row["M=2000"] == kernel and row["M=1"] == "mma.sp on fragments (rule)"
            assert row["against dense"].startswith(verdict)


def test_kernel_asks_the_device_it_is_given(monkeypatch):
    asked = []
    monkeypatch.setattr(
        prefill24, "choice_for", lambda *args, **more: asked.append(args[4]) or tuning.Choice("mma", {}, "rule")
    )
    BACKENDS.get("triton").kernel(WeightSpec("semi24", 64, 128, torch.bfloat16), 1, torch.device("cuda:3"))
    assert asked == [torch.device("cuda:3")]


def test_auto_without_times_says_how_to_measure(table):
    with emulated():
        with pytest.warns(
            UserWarning, match="prefill='auto' keeps one copy of 1 layers.*bench/gpu.sh tune.*'cusparselt'"
        ):
            model = sk.pack_(model24(), backend="triton", prefill="auto")
        assert len(model[0].prepared) == 2
        table(2048, mma=50, decompress=10, cusparselt=40, dense=20)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert len(sk.pack_(model24(), backend="triton", prefill="auto")[0].prepared) == 2


def test_a_layer_stays_dense_where_the_tables_say_so(table):
    table(256, mma=50, decompress=40, cusparselt=10, dense=20)
    with emulated():
        assert type(sk.pack_(model24())[0]) is SparseLinear, "of few tokens nothing was measured"
        table(1, mma=9, decompress=40, dense=8)
        with pytest.warns(
            UserWarning, match=r"0: on Imaginary GPU dense is faster at M=1 \(1.12x\), M=256 \(2.00x\), all"
        ):
            model = sk.pack_(model24())
        assert type(model[0]) is torch.nn.Linear
        (row,) = sk.explain(model).rows
        assert row["why not the others"].startswith(
            "it is 2:4 and stays dense: on Imaginary GPU dense is faster at M=1"
        )
        assert type(sk.pack_(model24(), "semi24")[0]) is SparseLinear
        with pytest.warns(UserWarning, match="second copy"):
            copied = sk.pack_(model24(), prefill="cusparselt")
        assert type(copied[0]) is SparseLinear, "with the copy dense loses at M=256"
