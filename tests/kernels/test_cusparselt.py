"""The cuSPARSELt path. Without a GPU: its words, and all that is around the library, on an imitation of its calls."""

import pytest
import torch
import torch.nn.functional as F
from sparsekit_kernels import cusparselt, layout24, target, tuning
from torch._subclasses.fake_tensor import FakeTensorMode

REASON = cusparselt.why_not(torch.float16, 64, 64, "cuda")
HAS_GPU = REASON is None
gpu = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason=f"cuSPARSELt: {REASON}")]


def weight24(N, K, dtype, device="cpu"):
    scores = torch.rand(N, K // 4, 4, device=device)
    keep = (scores.argsort(-1).argsort(-1) >= 2).view(N, K) & (torch.rand(N, K, device=device) > 0.01)
    return torch.where(keep, torch.randn(N, K, device=device), 0.0).to(dtype)


def max_err(out, ref64):
    return (out.double() - ref64).abs().max().item()


def assert_as_good_as_dense(out, dense, ref64):
    limit = 2 * max_err(dense, ref64) + 1e-5 * ref64.abs().max().item()
    assert out.isfinite().all(), "not finite"
    assert max_err(out, ref64) <= limit, f"error {max_err(out, ref64):.3g} > {limit:.3g}"


@pytest.fixture
def imitation(monkeypatch, tmp_path):
    """The two calls of torch on the CPU: the compressed tensor is the dense one. Refuses what the library refuses."""
    calls = []

    def compress(dense):
        assert dense.is_contiguous() and dense.shape[0] % 16 == 0 and dense.shape[1] % 16 == 0
        return dense.clone()

    def multiply(packed, x_KM, bias=None, *, transpose_result, alg_id, split_k, split_k_mode):
        assert x_KM.T.is_contiguous() and x_KM.shape[1] % 8 == 0, "x must be row-major, tokens a multiple of 8"
        assert transpose_result
        assert x_KM.data_ptr() % 16 == 0 and (bias is None or bias.data_ptr() % 16 == 0), "misaligned"
        calls.append((x_KM.shape[1], alg_id))
        return F.linear(x_KM.T, packed, bias)

    searches = []

    def search(packed, x_MK, bias):
        searches.append(x_MK.shape[0])
        return 7, 1, -1

    monkeypatch.setattr(cusparselt, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: True)
    monkeypatch.setattr(torch, "_cslt_compress", compress)
    monkeypatch.setattr(torch, "_cslt_sparse_mm", multiply)
    monkeypatch.setattr(cusparselt, "_search", search)
    monkeypatch.setattr(cusparselt, "_algorithms", {})
    monkeypatch.setattr(tuning, "may_measure", lambda device: True)
    monkeypatch.setattr(tuning, "may_ever_measure", lambda device: not tuning.is_switched_off())
    monkeypatch.setenv("SPARSEKIT_TUNING", str(tmp_path))
    return calls, searches


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (7, 48), (8, 48), (2, 3, 48), (48,)])
def test_padding_and_layout_around_the_library(shape, dtype, imitation):
    torch.manual_seed(0)
    w, bias = weight24(32, 48, dtype), torch.randn(32).to(dtype)
    x = torch.randn(shape).to(dtype)
    (packed,) = cusparselt.prepare(*layout24.compress24(w), 48)
    out = cusparselt.spmm24(x, packed, 32, 48, bias)
    assert out.shape == (*shape[:-1], 32) and out.is_contiguous()
    assert_as_good_as_dense(out, F.linear(x, w, bias), F.linear(x.double(), w.double(), bias.double()))


def test_rows_apart_are_made_contiguous(imitation):
    w, x = weight24(16, 16, torch.float16), torch.randn(8, 40).half()
    (packed,) = cusparselt.prepare(*layout24.compress24(w), 16)
    assert torch.equal(cusparselt.spmm24(x[:, 3:19], packed, 16, 16), F.linear(x[:, 3:19].contiguous(), w))
    assert cusparselt.spmm24(x[:0, :16], packed, 16, 16).shape == (0, 16)


@pytest.mark.parametrize("K", [16, 80])
def test_restore_is_exact(K, imitation, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(cusparselt, "RESTORE_COLUMNS", 32)
    w = weight24(32, K, torch.bfloat16)
    values, meta = layout24.compress24(w)
    restored = cusparselt.restore(*cusparselt.prepare(values, meta, K), 32, K)
    assert torch.equal(restored[0].view(torch.int16), values.view(torch.int16)) and torch.equal(restored[1], meta)


def test_one_search_per_bucket(imitation):
    calls, searches = imitation
    (packed,) = cusparselt.prepare(*layout24.compress24(weight24(32, 48, torch.float16)), 48)
    for M in (1, 8, 5, 9, 16, 13, 17, 65, 96, 97):
        cusparselt.spmm24(torch.randn(M, 48).half(), packed, 32, 48)
    assert searches == [8, 16, 24, 72, 104]
    cusparselt.spmm24(torch.randn(8, 48).half(), packed, 32, 48, torch.zeros(32).half())
    assert searches == [8, 16, 24, 72, 104, 8], "a bias is another algorithm"
    assert all(alg_id == 7 for _, alg_id in calls)


def run_in_a_new_process(monkeypatch, bias=None):
    monkeypatch.setattr(cusparselt, "_algorithms", {})
    (packed,) = cusparselt.prepare(*layout24.compress24(weight24(32, 48, torch.float16)), 48)
    cusparselt.spmm24(torch.randn(8, 48).half(), packed, 32, 48, bias)


def test_later_processes_read_what_the_first_one_searched(imitation, monkeypatch):
    calls, searches = imitation
    for _ in range(3):
        run_in_a_new_process(monkeypatch)
    assert searches == [8] and calls == [(8, 7)] * 3


@pytest.mark.parametrize("library", ["torch", "cusparselt", "kernels"])
def test_another_version_or_gpu_searches_again(library, imitation, monkeypatch):
    _, searches = imitation
    run_in_a_new_process(monkeypatch)
    versions = {**tuning.versions(), library: "another"}
    monkeypatch.setattr(tuning, "versions", lambda: versions)
    run_in_a_new_process(monkeypatch)
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "another GPU")
    run_in_a_new_process(monkeypatch)
    assert searches == [8, 8, 8]


@pytest.mark.parametrize("config", ['{"alg_id": 3}', '{"alg_id": "x", "split_k": 1, "split_k_mode": -1}'])
def test_a_useless_entry_of_the_cache_is_searched_again(config, imitation, monkeypatch, tmp_path):
    calls, searches = imitation
    run_in_a_new_process(monkeypatch)
    (file,) = tmp_path.rglob("*.json")
    whole = file.read_text()
    start = whole.index('"config": {') + len('"config": ')
    file.write_text(whole[:start] + config + whole[whole.index("}", start) + 1 :])
    run_in_a_new_process(monkeypatch)
    assert searches == [8, 8] and file.read_text() == whole


def test_no_search_while_a_graph_is_captured(imitation, monkeypatch):
    calls, searches = imitation
    with monkeypatch.context() as capture:
        capture.setattr(tuning, "may_measure", lambda device: False)
        run_in_a_new_process(monkeypatch)
    assert searches == [] and calls == [(8, 0)] and cusparselt._algorithms == {}, "not for good"
    (packed,) = cusparselt.prepare(*layout24.compress24(weight24(32, 48, torch.float16)), 48)
    cusparselt.spmm24(torch.randn(8, 48).half(), packed, 32, 48)
    assert searches == [8]


def test_switched_off_takes_the_default_for_good(imitation, monkeypatch, tmp_path):
    calls, searches = imitation
    monkeypatch.setattr(tuning, "may_measure", lambda device: False)
    monkeypatch.setenv("SPARSEKIT_TUNING", "off")
    run_in_a_new_process(monkeypatch)
    assert searches == [] and calls == [(8, 0)]
    assert list(cusparselt._algorithms.values()) == [cusparselt.DEFAULT_ALGORITHM] and not list(tmp_path.iterdir())


def test_misaligned_tensors_are_moved(imitation):
    w = weight24(32, 48, torch.float16)
    (packed,) = cusparselt.prepare(*layout24.compress24(w), 48)
    x, bias = torch.randn(8 * 48 + 3).half()[3:].view(8, 48), torch.randn(33).half()[1:]
    assert x.is_contiguous() and x.data_ptr() % 16 and bias.data_ptr() % 16
    assert torch.equal(cusparselt.spmm24(x, packed, 32, 48, bias), F.linear(x, w, bias))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_price_of_a_blob(dtype):
    assert cusparselt.blob_bytes(32, 48, dtype) == 32 * 27 * 2


def test_why_not_in_words():
    assert cusparselt.why_not(torch.float32, 64, 64, "cuda") == "runs fp16 and bf16, the weight is torch.float32"
    for N, K in ((24, 64), (64, 24), (0, 64), (8, 8)):
        assert "multiples of 16" in cusparselt.why_not(torch.float16, N, K, "cuda")
    assert cusparselt.why_not(torch.float16, 64, 64, "cpu") == "needs an NVIDIA GPU, the tensor is on cpu"


def test_a_build_without_the_library(monkeypatch):
    monkeypatch.setattr(cusparselt, "why_not_cuda", lambda device: None)
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: False)
    assert "without cuSPARSELt" in cusparselt.why_not(torch.float16, 64, 64, "cuda")


def test_old_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(target, "capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.version, "hip", None)
    reason = target.why_not_cuda.__wrapped__(torch.device("cuda"))
    assert reason == "needs compute capability 8.0 or newer, Tesla T4 has 7.5"


def test_wrong_arguments_are_refused():
    values, meta = layout24.compress24(weight24(32, 48, torch.float16))
    with pytest.raises(RuntimeError, match="needs an NVIDIA GPU"):
        cusparselt.prepare(values, meta, 48)
    with pytest.raises(ValueError, match="x has 40 features"):
        cusparselt.spmm24(torch.zeros(1, 40).half(), values, 32, 48)


def test_infinities_are_refused(imitation):
    values, meta = layout24.compress24(weight24(32, 48, torch.float16))
    values[3, 3] = float("inf")
    with pytest.raises(ValueError, match="infinities or NaN"):
        cusparselt.prepare(values, meta, 48)


def test_torch_still_has_the_calls():
    schema = torch.ops.aten._cslt_sparse_mm.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:3] == ["compressed_A", "dense_B", "bias"]
    assert {"transpose_result", "alg_id", "split_k", "split_k_mode"} <= set(names)
    with FakeTensorMode():  # the blob of [32, 48]; torch's own fake kernel must agree on the row-major result
        packed, x = torch.empty(32, 27, dtype=torch.float16), torch.empty(8, 48, dtype=torch.float16)
        y = cusparselt._multiply(packed, x, None, cusparselt.DEFAULT_ALGORITHM)
    assert y.shape == (8, 32) and y.is_contiguous()


class TestGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("M", [1, 8, 100, 256, 1024])
    @pytest.mark.parametrize("N,K", [(16, 16), (48, 80), (4096, 4096), (1024, 14336)])
    def test_gpu_matches_dense(self, N, K, M, dtype):
        torch.manual_seed(0)
        w, x = weight24(N, K, dtype, "cuda"), torch.randn(M, K, device="cuda").to(dtype)
        (packed,) = cusparselt.prepare(*layout24.compress24(w), K)
        for bias in (None, torch.randn(N, device="cuda").to(dtype)):
            out = cusparselt.spmm24(x, packed, N, K, bias)
            ref64 = F.linear(x.double(), w.double(), None if bias is None else bias.double())
            assert out.is_contiguous()
            assert_as_good_as_dense(out, F.linear(x, w, bias), ref64)

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("N,K", [(16, 16), (48, 80), (4096, 14336)])
    def test_gpu_restore_is_exact(self, N, K, dtype):
        torch.manual_seed(0)
        w = weight24(N, K, dtype, "cuda")
        w[0] *= 1e-7  # subnormal in fp16
        values, meta = layout24.compress24(w)
        restored = cusparselt.restore(*cusparselt.prepare(values, meta, K), N, K)
        assert torch.equal(restored[0].view(torch.int16), values.view(torch.int16)) and torch.equal(restored[1], meta)

    def test_gpu_cuda_graph(self):
        torch.manual_seed(0)
        w, x = weight24(1024, 1024, torch.bfloat16, "cuda"), torch.randn(512, 1024, device="cuda").bfloat16()
        (packed,) = cusparselt.prepare(*layout24.compress24(w), 1024)
        cusparselt.spmm24(x, packed, 1024, 1024)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = cusparselt.spmm24(x, packed, 1024, 1024)
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert_as_good_as_dense(out, F.linear(x, w), F.linear(x.double(), w.double()))
