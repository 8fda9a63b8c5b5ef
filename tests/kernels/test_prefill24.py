"""The choice of a kernel for many tokens, on imitations of the kernels, of a GPU and of its clock.

The kernels themselves are tested where they live; on a GPU the whole is run at the end.
"""

import inspect
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from sparsekit_kernels import cusparselt, fragments24, layout24, prefill24, target, tuning
from sparsekit_kernels.prefill24 import blob_speedups, choice_for, spmm24_large, stay_dense
from sparsekit_kernels.tuning import Key, Measured

REASON = target.why_not_cuda(torch.device("cuda"))
N, K = 48, 80
DTYPE = torch.bfloat16
CUDA = torch.device("cuda:0")


def weight24(N, K, dtype, device="cpu"):
    scores = torch.rand(N, K // 4, 4, device=device)
    keep = (scores.argsort(-1).argsort(-1) >= 2).view(N, K)
    return torch.where(keep, torch.randn(N, K, device=device), 0.0).to(dtype)


def reference(x, w, bias=None, activation=None, residual=None, dtype=torch.float64):
    y = F.linear(x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype))
    if activation:
        y = F.silu(y[..., : len(w) // 2]) * y[..., len(w) // 2 :]
    return y if residual is None else y + residual.to(dtype)


class Launch(dict):
    """Of any fields, but TOKENS."""

    def __init__(self, TOKENS, **fields):
        if TOKENS < 8:
            raise ValueError("TOKENS is 4: at least 8")
        super().__init__(TOKENS=TOKENS, **fields)

    def check(self, format):
        if self.get("AHEAD", 0) > fragments24.CHUNKS[format]:
            raise ValueError("AHEAD is too far")


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """An imaginary GPU. `ran` lists the kernels that were called, `us` says how long each of them takes."""
    state = SimpleNamespace(ran=[], configs=[], us={"mma": 30, "decompress": 20, "cusparselt": 10, "dense": 15})
    state.capturing, state.broken, state.no_memory = False, set(), False

    def spmm24(x, fragments, metadata, N, bias=None, *, activation=None, residual=None, config=None):
        state.ran.append("mma")
        state.configs.append(config)
        if "mma" in state.broken:
            raise RuntimeError("ptxas failed")
        return reference(x, weight(fragments, metadata, N, x), bias, activation, residual, x.dtype)

    def spmm24_int8(x, fragments, metadata, scales, N, bias=None, **options):
        assert scales is state.scales
        return spmm24(x, fragments, metadata, N, bias, **options)

    def decompress(fragments, metadata, N, K, dtype, *, format="semi24", scales=None, gated=False):
        if state.no_memory:
            raise torch.OutOfMemoryError("CUDA out of memory")
        assert dtype == DTYPE and (format, scales) in (("semi24", None), ("semi24_int8", state.scales))
        state.ran.append("decompress")
        return state.weight

    def multiply_blob(x, blob, N, K, bias=None):
        state.ran.append("cusparselt")
        if "cusparselt" in state.broken:
            raise RuntimeError("operation not supported")
        return F.linear(x, blob, bias)

    def weight(fragments, metadata, N, x):
        assert fragments is state.fragments and metadata is state.metadata and len(state.weight) == N
        return state.weight

    def time_call(call):
        before = len(state.ran)
        call()
        return state.us[state.ran[before] if len(state.ran) > before else "dense"] * 1e-6

    torch.manual_seed(0)
    state.weight = weight24(N, K, DTYPE)
    state.fragments, state.metadata = fragments24.prepare(*layout24.compress24(state.weight), "semi24")
    state.scales = torch.ones(N)
    module = SimpleNamespace(spmm24=spmm24, spmm24_int8=spmm24_int8, decompress=decompress, Config=Launch)
    monkeypatch.setattr(prefill24, "_mma_module", lambda: module)
    monkeypatch.setattr(prefill24, "_runners", {})
    monkeypatch.setattr(cusparselt, "spmm24", multiply_blob)
    monkeypatch.setattr(tuning, "may_ever_measure", lambda device: not tuning.is_switched_off())
    monkeypatch.setattr(tuning, "may_measure", lambda device: tuning.may_ever_measure(device) and not state.capturing)
    monkeypatch.setattr(tuning, "gpu_name", lambda device: "Imaginary GPU")
    monkeypatch.setattr(tuning, "_timer", lambda device: time_call)
    monkeypatch.setattr(tuning, "CONFIG_DIR", tmp_path / "configs")
    monkeypatch.setenv("SPARSEKIT_TUNING", str(tmp_path / "cache"))
    tuning._shipped.cache_clear()
    yield state
    tuning._shipped.cache_clear()


def call(gpu, M=100, blob=False, **options):
    """Call it, check the result, and return the kernels that ran."""
    gpu.ran.clear()
    x = torch.randn(M, K).to(DTYPE)
    y = spmm24_large(x, gpu.fragments, gpu.metadata, N, blob=gpu.weight if blob else None, **options)
    assert torch.allclose(y.double(), reference(x, gpu.weight), rtol=2e-2, atol=2e-2)
    return list(gpu.ran)


def new_process(monkeypatch):
    monkeypatch.setattr(prefill24, "_runners", {})


class TestTheFastest:
    def test_runs_after_one_measurement(self, gpu):
        assert len(call(gpu)) > 20
        assert call(gpu) == ["decompress"]
        assert call(gpu, M=128) == ["decompress"], "the same bucket"
        assert len(call(gpu, M=129)) > 20

    @pytest.mark.parametrize("fastest", ["mma", "decompress", "cusparselt"])
    def test_whichever_it_is(self, fastest, gpu):
        gpu.us[fastest] = 1
        call(gpu, blob=True)
        assert call(gpu, blob=True) == [fastest]

    def test_later_processes_read_the_cache(self, gpu, monkeypatch):
        call(gpu)
        new_process(monkeypatch)
        assert call(gpu) == ["decompress"]

    def test_a_blob_that_came_later_is_measured_too(self, gpu, monkeypatch):
        call(gpu)
        assert "cusparselt" in call(gpu, blob=True) and call(gpu, blob=True) == ["cusparselt"]
        new_process(monkeypatch)
        assert call(gpu) == ["decompress"] and call(gpu, blob=True) == ["cusparselt"]

    def test_dense_needs_no_blob_and_uses_none(self, gpu):
        call(gpu, blob=True, mode="dense")
        assert call(gpu, blob=True, mode="dense") == ["decompress"]

    def test_cusparselt_by_name_measures_nothing(self, gpu):
        gpu.us["cusparselt"] = 1000
        assert call(gpu, blob=True, mode="cusparselt") == ["cusparselt"]

    def test_the_resident_dense_weight_is_on_record(self, gpu):
        call(gpu, blob=True)
        row, source = tuning.lookup(Key("semi24", "bfloat16", N, K, 128), CUDA)
        assert source == "cache" and {name: entry.us for name, entry in row.items()} == gpu.us

    def test_configs_of_a_table_reach_the_kernel(self, gpu):
        row = {"mma": Measured(1.0, {"TOKENS": 64}), "decompress": Measured(2.0)}
        tuning.store(Key("semi24", "bfloat16", N, K, 128), row, CUDA)
        assert call(gpu) == ["mma"] and call(gpu, M=120) == ["mma"] and gpu.configs == [{"TOKENS": 64}] * 2
        assert gpu.configs[0] is gpu.configs[1], "made once for a choice"

    def test_configs_that_are_none_are_ignored_and_measured_again(self, gpu, monkeypatch):
        tuning._warn_of_unsound_row.cache_clear()
        key = Key("semi24", "bfloat16", N, K, 128)
        for bad in ({"TOKENS": 4}, {"NUM_WARPS": 4}, {"TOKENS": 8, "AHEAD": 16}, {"TOKENS": "8"}):
            new_process(monkeypatch)
            tuning.store(key, {"mma": Measured(1.0, bad), "decompress": Measured(2.0)}, CUDA)
            with pytest.warns(UserWarning, match="mma cannot be launched with"):
                call(gpu)
            assert call(gpu) == ["decompress"] and tuning.lookup(key, CUDA)[0]["mma"] == Measured(30.0)

    def test_what_was_tuned_is_measured_with_what_is_missing(self, gpu):
        key = Key("semi24", "bfloat16", N, K, 128)
        tuning.store(key, {"mma": Measured(5.0, {"TOKENS": 64}), "decompress": Measured(20.0)}, CUDA)
        gpu.us["mma"] = 6
        call(gpu, blob=True)
        assert gpu.configs and all(config == {"TOKENS": 64} for config in gpu.configs)
        assert tuning.lookup(key, CUDA)[0]["mma"] == Measured(6.0, {"TOKENS": 64})
        assert call(gpu, blob=True) == ["mma"]

    def test_the_plain_product_is_measured(self, gpu, monkeypatch):
        seen = []
        measure = tuning.measure

        def plain(candidates, device):
            for candidate in candidates:
                product = candidate.calls[0].args[0]
                seen.append((candidate.kernel, product[4], product[8], product[9]))
            return measure(candidates, device)

        monkeypatch.setattr(tuning, "measure", plain)
        x, bias = torch.randn(100, K).to(DTYPE), torch.randn(N).to(DTYPE)
        residual = torch.randn(100, N // 2).to(DTYPE)
        arguments = (x, gpu.fragments, gpu.metadata, N)
        y = spmm24_large(*arguments, bias, activation="silu_mul", residual=residual)
        assert torch.allclose(y.double(), reference(x, gpu.weight, bias, "silu_mul", residual), rtol=3e-2, atol=3e-2)
        assert seen == [(name, None, None, None) for name in ("mma", "decompress", "dense")]
        gpu.ran.clear()
        spmm24_large(*arguments)
        assert gpu.ran == ["decompress"], "one row and one choice for both"

    def test_formats_have_rows_of_their_own(self, gpu):
        call(gpu)
        quantised = {"format": "semi24_int8", "scales": gpu.scales}
        gpu.us["mma"] = 1
        assert len(call(gpu, **quantised)) > 20
        assert call(gpu, **quantised) == ["mma"] and call(gpu) == ["decompress"]


class TestWhereNothingMayBeMeasured:
    def test_the_rule_runs_and_is_not_remembered(self, gpu):
        gpu.capturing = True
        assert call(gpu, M=512, blob=True) == ["mma"] and call(gpu, M=513, blob=True) == ["decompress"]
        gpu.capturing = False
        call(gpu, M=512, blob=True)
        assert call(gpu, M=512, blob=True) == ["cusparselt"]

    def test_what_is_known_is_used_while_capturing(self, gpu, monkeypatch):
        call(gpu)
        new_process(monkeypatch)
        gpu.capturing = True
        assert call(gpu) == ["decompress"]

    def test_switched_off_the_rule_is_remembered(self, gpu, monkeypatch, tmp_path):
        monkeypatch.setenv("SPARSEKIT_TUNING", "off")
        assert call(gpu) == ["mma"] and len(prefill24._runners) == 1
        assert not (tmp_path / "cache").exists()

    def test_a_corrupted_cache_is_measured_again(self, gpu, monkeypatch, tmp_path):
        call(gpu)
        (file,) = (tmp_path / "cache").rglob("*.json")
        good = file.read_text()
        file.write_text(good[: len(good) // 2])
        new_process(monkeypatch)
        with pytest.warns(UserWarning, match="ignoring the tuning cache"):
            assert len(call(gpu)) > 20
        assert call(gpu) == ["decompress"] and file.read_text() == good

    def test_a_kernel_that_fails_is_left_out(self, gpu):
        gpu.broken.add("cusparselt")
        with pytest.warns(UserWarning, match="cusparselt cannot run .*operation not supported"):
            call(gpu, blob=True)
        assert call(gpu, blob=True) == ["decompress"]

    def test_no_memory_to_measure(self, gpu):
        gpu.no_memory = True
        with pytest.warns(UserWarning, match="no memory left"):
            assert call(gpu) == ["mma"]
        assert call(gpu) == ["mma"], "without trying again"


@pytest.mark.parametrize("mode,blob", [("dense", False), ("auto", False), ("cusparselt", True)])
@pytest.mark.parametrize("shape", [(1, K), (70, K), (2, 3, K), (K,), (0, K), (2, 0, K)])
def test_bias_activation_and_residual_whatever_runs(shape, mode, blob, gpu):
    x = torch.randn(shape).to(DTYPE)
    bias = torch.randn(N).to(DTYPE)
    for activation, features in ((None, N), ("silu_mul", N // 2)):
        residual = torch.randn(*shape[:-1], features).to(DTYPE)
        y = spmm24_large(
            x, gpu.fragments, gpu.metadata, N, bias, blob=gpu.weight if blob else None, mode=mode,
            activation=activation, residual=residual,
        )  # fmt: skip
        expected = reference(x, gpu.weight, bias, activation, residual)
        assert y.shape == expected.shape and y.dtype == DTYPE
        assert torch.allclose(y.double(), expected, rtol=3e-2, atol=3e-2)


def test_the_imitations_are_called_as_the_kernels_want_to_be(gpu, monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed")
    from sparsekit_kernels import spmm24_mma

    options = {"activation": None, "residual": None, "config": None}
    for format in fragments24.FORMATS:
        scales = [] if format == "semi24" else ["scales"]
        multiply = getattr(spmm24_mma, "spmm24" + format.removeprefix("semi24"))
        found = inspect.signature(multiply).bind("x", "fragments", "metadata", *scales, "N", "bias", **options)
        assert all(name == value for name, value in found.arguments.items() if name not in options)
        inspect.signature(spmm24_mma.decompress).bind(
            "fragments", "metadata", "N", "K", "dtype", format=format, scales=None, gated=False
        )
        key = Key(format, "bfloat16", 4096, 4096, 16)
        for config in spmm24_mma.candidates(format, 16, 4096, 4096, 132):
            tuning.store(key, {"mma": Measured(1.0, asdict(config))}, CUDA)
            assert spmm24_mma.Config(**tuning.best_config("mma", key, CUDA)) == config
    monkeypatch.setattr(prefill24, "_mma_module", lambda: spmm24_mma)
    tuning._warn_of_unsound_row.cache_clear()
    good = asdict(spmm24_mma.pick_config("semi24_int4", 16, 4096, 4096, 132))
    as_a_table_has_it = {name: int(value) for name, value in good.items()}
    tuning.store(key, {"mma": Measured(1.0, as_a_table_has_it)}, CUDA)
    assert tuning.best_config("mma", key, CUDA) == as_a_table_has_it
    wrong = {"TOKENS": (4, 12, "8"), "AHEAD": (3, 4, 0), "SPLIT_K": (0, 3), "ROW_TILES": (3,), "NUM_WARPS": (4,)}
    for name, values in wrong.items():
        for value in values:
            tuning.store(key, {"mma": Measured(1.0, good | {name: value})}, CUDA)
            with pytest.warns(UserWarning, match="mma cannot be launched with"):
                assert tuning.lookup(key, CUDA) is None


def test_wrong_arguments(gpu):
    with pytest.raises(ValueError, match="x is int8: nothing here rounds activations, call spmm24_mma.spmm24_int8"):
        spmm24_large(torch.zeros(3, K, dtype=torch.int8), gpu.fragments, gpu.metadata, N, scales=gpu.scales)
    with pytest.raises(ValueError, match="mode='fast' is not known: use one of 'auto', 'dense', 'cusparselt'"):
        call(gpu, mode="fast")
    with pytest.raises(ValueError, match="pass blob, from cusparselt.prepare"):
        call(gpu, mode="cusparselt")


def test_runners_in_words(gpu):
    asked = (N, K, DTYPE, CUDA)
    assert str(choice_for(100, *asked)) == "mma (a rule of thumb: not measured)" and gpu.ran == []
    assert choice_for(1000, *asked, has_blob=True).kernel == "decompress"
    assert str(choice_for(100, *asked, has_blob=True, mode="cusparselt")) == "cusparselt"
    call(gpu, blob=True)
    assert str(choice_for(100, *asked)) == "decompress"
    assert str(choice_for(100, *asked, has_blob=True)) == "cusparselt"


class TestStayDense:
    asked = (N, K, DTYPE, CUDA)

    def record(self, M, **us):
        row = {name: Measured(float(one)) for name, one in us.items()}
        tuning.store(Key("semi24", "bfloat16", N, K, M), row, CUDA)

    def test_not_measured(self, gpu):
        verdict = stay_dense(*self.asked)
        assert str(verdict) == "not measured on Imaginary GPU" and verdict.faster_dense == [] and gpu.ran == []
        assert blob_speedups(*self.asked) == {}

    def test_where_and_by_how_much(self, gpu):
        self.record(64, mma=10, decompress=40, dense=15)
        self.record(128, mma=20, decompress=40, cusparselt=12, dense=16)
        self.record(8192, mma=100, decompress=90, cusparselt=60, dense=80)
        verdict = stay_dense(*self.asked)
        assert [one.M for one in verdict.faster_dense] == [128, 8192]
        assert str(verdict) == (
            "dense is faster at M=128 (1.25x), M=8192 (1.12x); elsewhere sparse is 1.50 to 1.50x as fast as dense"
        )
        assert stay_dense(*self.asked, has_blob=True).faster_dense == []
        assert blob_speedups(*self.asked) == pytest.approx({128: 20 / 12, 8192: 1.5})

    def test_stays_where_it_wins_everywhere_and_few_tokens_were_measured(self, gpu):
        self.record(256, mma=20, decompress=30, dense=10)
        assert not stay_dense(*self.asked).stays, "of few tokens nothing is known"
        self.record(64, mma=20, decompress=30, dense=10)
        assert stay_dense(*self.asked).stays
        self.record(1, mma=9, decompress=30, dense=10)
        assert not stay_dense(*self.asked).stays

    def test_everywhere_and_nowhere(self, gpu):
        self.record(1, mma=10, dense=20)
        self.record(2, mma=12, dense=20)
        assert str(stay_dense(*self.asked)) == "sparse is 1.67 to 2.00x as fast as dense at every M that was measured"
        self.record(1, mma=10, dense=5)
        self.record(2, mma=10, dense=8)
        assert str(stay_dense(*self.asked)) == "dense is faster at M=1 (2.00x), M=2 (1.25x), all that was measured"


@pytest.mark.gpu
@pytest.mark.skipif(REASON is not None, reason=str(REASON))
class TestOnAGpu:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
    @pytest.mark.parametrize("mode", prefill24.MODES)
    @pytest.mark.parametrize("M", [65, 300, 2048])
    def test_every_mode_matches_dense(self, M, mode, dtype, monkeypatch, tmp_path):
        monkeypatch.setenv("SPARSEKIT_TUNING", str(tmp_path))
        monkeypatch.setattr(prefill24, "_runners", {})
        torch.manual_seed(0)
        w, x = weight24(1024, 4096, dtype, "cuda"), torch.randn(M, 4096, device="cuda").to(dtype)
        bias = torch.randn(1024, device="cuda").to(dtype)
        values, meta = layout24.compress24(w)
        fragments, metadata = fragments24.prepare(values, meta, "semi24")
        blob = None
        if cusparselt.why_not(dtype, 1024, 4096, "cuda") is None:
            (blob,) = cusparselt.prepare(values, meta, 4096)
        elif mode == "cusparselt":
            pytest.skip("this torch has no cuSPARSELt")
        expected = reference(x, w, bias)
        dense_error = (F.linear(x, w, bias).double() - expected).abs().max()
        for _ in range(2):
            y = spmm24_large(x, fragments, metadata, 1024, bias, blob=blob, mode=mode)
            assert (y.double() - expected).abs().max() <= 2 * dense_error + 1e-5 * expected.abs().max()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = spmm24_large(x, fragments, metadata, 1024, bias, blob=blob, mode=mode)
        graph.replay()
        assert (y.double() - expected).abs().max() <= 2 * dense_error + 1e-5 * expected.abs().max()
