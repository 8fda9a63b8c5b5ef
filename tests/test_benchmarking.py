"""Timing on calls of known order and cost; benchmarks on tiny models of each kind, and where they must refuse."""

import copy

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, LlamaConfig, LlamaForCausalLM

import sparsekit as sk
from sparsekit.benchmarking import (
    Ceilings,
    Comparison,
    LayerShape,
    Timing,
    benchmark,
    build_pair,
    cache_bytes,
    compare,
    dense_twin,
    environment,
    free_bytes,
    get_shapes,
    layers,
    machine,
    measure_ceilings,
    measure_shapes,
    models,
    random24,
    rotate,
    time_layers,
    time_pair,
)
from sparsekit.benchmarking.layers import random_block
from sparsekit.benchmarking.models import _reason, verdict
from sparsekit.benchmarking.timing import noise_notes
from sparsekit.errors import SparsekitError, Unsupported
from sparsekit.formats import FORMATS, WeightSpec
from sparsekit.nn import SideLinear, sparse_layers
from sparsekit.nn.side_columns import SideColumns

QUICK = {"prompt_length": 8, "new_tokens": 3, "rounds": 1, "progress": False}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(models, "SHORT_SECONDS", 0.0)
    monkeypatch.setattr(layers, "MAX_COPIES", 2)


def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config)


@pytest.fixture
def packed():
    return sk.sparsify(tiny_llama(), "2:4", method="magnitude", progress=False)


def test_timing_statistics():
    timing = Timing((5.0, 1.0, 2.0, 4.0, 3.0, 6.0))
    assert (timing.min, timing.median, timing.p20, timing.p80) == (1.0, 3.5, 2.0, 5.0)
    assert Timing((2.0,)).to_dict() == {"min_s": 2.0, "median_s": 2.0, "p20_s": 2.0, "p80_s": 2.0, "rounds": 1}
    assert Comparison({"dense": Timing((3.0,)), "sparse": Timing((2.0,))}).ratio("dense", "sparse") == 1.5


def test_a_disturbed_measurement_is_told():
    quiet, disturbed = Timing((1.0, 1.1, 1.2)), Timing((1.0, 3.0, 4.0))
    assert Comparison({"dense": quiet, "sparse": disturbed}).noise == 3.0
    assert noise_notes([1.1, 1.2]) == []
    assert "1 of 2 measurements were disturbed: medians up to 3.0" in noise_notes([1.1, 3.0])[0]


def test_variants_take_turns_in_both_orders():
    seen = []
    compare({"a": lambda: seen.append("a"), "b": lambda: seen.append("b")}, rounds=3, warmup=1)
    assert "".join(seen) == "ab" + "ab" + "ba" + "ab"


def test_max_seconds_leaves_three_rounds():
    timings = compare({"a": lambda: None}, rounds=50, max_seconds=0.0)
    assert len(timings["a"].seconds) == 3


def test_rotate_goes_round():
    seen = []
    call = rotate([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(5):
        call()
    assert seen == [0, 1, 2, 0, 1]


def test_timing_refuses():
    with pytest.raises(ValueError, match="nothing to time"):
        compare({})
    with pytest.raises(ValueError, match="rounds=0"):
        compare({"a": print}, rounds=0)
    with pytest.raises(ValueError, match="nothing to rotate"):
        rotate([])


def test_slower_call_is_slower():
    x = torch.randn(400, 400)
    timings = time_pair(lambda: [x @ x for _ in range(20)], lambda: x[:8] @ x, rounds=5)
    assert timings.ratio("dense", "sparse") > 2


def test_share_of_the_ceiling_that_binds():
    ceilings = Ceilings("cpu", read_gb_s=10.0, matmul_gflop_s={"float32": 100.0})
    assert ceilings.share(10**9, 10**9, seconds=0.2, dtype=torch.float32) == pytest.approx(0.5)  # memory: 0.1 s
    assert ceilings.share(10**6, 10**11, seconds=2.0, dtype=torch.float32) == pytest.approx(0.5)  # matmul: 1 s


def test_ceilings_are_measured_once(monkeypatch):
    first = measure_ceilings("cpu", (torch.float32,))
    assert first.read_gb_s > 0 and first.matmul_gflop_s["float32"] > 0
    monkeypatch.setattr(machine, "compare", None)
    assert measure_ceilings("cpu", (torch.float32,)) == first


def test_environment_says_what_a_number_needs():
    facts = environment()
    assert facts["torch"] == torch.__version__ and facts["threads"] == torch.get_num_threads()
    assert facts["cpu"] and facts["isa"] and facts["sparsekit"] == sk.__version__
    assert free_bytes() > 0 and cache_bytes() >= 0


@pytest.mark.parametrize("N, K", [(3, 8), (300, 64), (5, 10)])
def test_random24_keeps_two_of_four(N, K):
    weight = random24(N, K, torch.float32)
    assert weight.shape == (N, K)
    assert ((weight != 0)[:, : K // 4 * 4].view(N, -1, 4).sum(-1) == 2).all()


@pytest.mark.parametrize("N, K, num_blocks", [(64, 96, 5), (300, 50, 7), (16, 16, 0), (40, 72, 15)])
def test_random_block_stores_what_was_asked_for(N, K, num_blocks):
    spec = WeightSpec("block", N, K, torch.bfloat16, (16, 16), num_blocks)
    weight = random_block(spec)
    blocks = nn.functional.pad(weight, (0, -K % 16, 0, -N % 16)).view(-(-N // 16), 16, -(-K // 16), 16)
    filled = (blocks != 0).float().mean((1, 3)).flatten()
    assert weight.shape == (N, K) and weight.dtype is torch.bfloat16 and not weight.signbit()[weight == 0].any()
    assert int((filled > 0).sum()) == num_blocks
    with pytest.raises(ValueError, match="lacks block"):
        random_block(WeightSpec("block", N, K, torch.bfloat16))


@pytest.mark.parametrize("format", [*FORMATS])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs_hold_the_same_weight_in_every_format(format, dtype):
    block = {"block": (32, 16), "num_blocks": 4} if format == "block" else {}
    dense, sparse = build_pair(LayerShape("q", 70, 66, format=format, **block), dtype, backend="reference")
    for one, other in zip(dense, sparse, strict=True):
        assert other.format == format and torch.equal(one.weight, other.to_dense())
    assert len({layer.weight.data_ptr() for layer in dense}) == len(dense)


@pytest.mark.parametrize("format", ["semi24", "semi24_int4"])
@pytest.mark.parametrize("has_X", [False, True])
def test_a_pair_with_a_branch_has_one_answer(format, has_X):
    side = SideColumns(66, 5, 16, has_X)
    dense, sparse = build_pair(LayerShape("q", 70, 66, format=format, side=side), torch.float32, backend="reference")
    assert type(dense[0]) is nn.Linear and sparse[0].side == side
    plain, _ = build_pair(LayerShape("q", 70, 66, format=format), torch.float32, backend="reference")
    assert not torch.equal(dense[0].weight, plain[0].weight), "the branch adds something"
    x = torch.randn(7, 66)
    torch.testing.assert_close(sparse[0](x), dense[0](x), rtol=1e-4, atol=1e-4)
    assert list(measure_shapes([LayerShape("q", 70, 66, side=side)], [3], torch.float32, max_seconds=0.01))


def test_a_model_with_branches_against_its_dense_twin():
    from tests.test_checkpoint import tiny, with_branches

    model = sk.pack_(with_branches(tiny()))
    twin = dense_twin(model)
    kinds = {type(module) for module in twin.modules()}
    assert nn.Linear in kinds and not kinds & {SideLinear, sk.SparseLinear}
    report = sk.benchmark(model, prompt_length=8, new_tokens=2, rounds=1, progress=False)
    assert report.ok, report.notes
    layers = sparse_layers(model).values()
    assert report.summary["pruned weights, bytes"] == sum(layer.packed_bytes() for layer in layers)
    assert report.summary["pruned weights, bytes dense"] == sum(
        4 * layer.out_features * layer.in_features for layer in layers
    )


def test_build_pair_refuses_what_memory_does_not_hold(monkeypatch):
    monkeypatch.setattr(layers, "free_bytes", lambda device: 1000)
    with pytest.raises(Unsupported, match="GB free"):
        build_pair(LayerShape("big", 64, 64), torch.float32)


def test_layers_that_disagree_are_not_timed():
    dense, sparse = build_pair(LayerShape("q", 32, 64), torch.float32)
    with torch.no_grad():
        dense[0].weight[:, :8] = dense[0].weight[:, :8].flip(1)
    with pytest.raises(SparsekitError, match="away from the dense one"):
        time_layers(dense, sparse, 4)


def test_rows_of_shapes():
    rows = list(measure_shapes([LayerShape("q", 32, 64, 5)], [1, 3], torch.float32, max_seconds=0.01))
    assert [(row["layer"], row["shape"], row["count"], row["M"]) for row in rows] == [
        ("q", "32x64", 5, 1),
        ("q", "32x64", 5, 3),
    ]
    assert all(row["dense ms"] > 0 and row["sparse ms"] > 0 and row["of ceiling"] >= 0 for row in rows)


def test_named_shapes():
    """The linear layers of Llama-3-8B hold 6,979,321,856 weights."""
    assert sum(s.count * s.out_features * s.in_features for s in get_shapes("Llama-3-8B")) == 6_979_321_856
    with pytest.raises(ValueError, match="llama-3-8b"):
        get_shapes("llama-3-8")


def test_twin_is_the_unpacked_model_and_shares_the_rest(packed):
    twin = dense_twin(packed)
    unpacked = sk.unpack_(copy.deepcopy(packed))
    ids = torch.arange(12)[None]
    assert torch.equal(twin(ids).logits, unpacked(ids).logits)
    assert twin.model.embed_tokens.weight is packed.model.embed_tokens.weight
    assert not sparse_layers(twin) and len(sparse_layers(packed)) == 14


def test_causal_model_has_prefill_and_decode(packed):
    report = benchmark(packed, **QUICK)
    assert report.ok and report.summary["verdict"]
    whole = {row["what"]: row for row in report.rows if row["layer"] == "whole model"}
    assert set(whole) == {"prefill", "decode"} and (whole["prefill"]["M"], whole["decode"]["M"]) == (8, 1)
    assert {row["layer"] for row in report.rows} >= {"q_proj, o_proj", "k_proj, v_proj", "down_proj"}
    assert {phase: round(ratio, 3) for phase, ratio in report.numbers["speedup"].items()} == {
        phase: report.summary[f"{phase} speedup"] for phase in ("prefill", "decode")
    }
    assert report.summary["decode speedup"] > 0 and report.summary["decode tokens/s sparse"] > 0
    dense_bytes = sum(layer.dense_bytes() for layer in sparse_layers(packed).values())
    assert report.summary["pruned weights, bytes dense"] == dense_bytes
    assert report.summary["pruned weights, ratio"] <= 0.6
    assert report.summary["model, bytes dense"] == sum(p.nbytes for p in tiny_llama().parameters()) + sum(
        b.nbytes for b in packed.buffers() if b.dtype == torch.float32 and b.dim() == 1
    )


def test_encoder_has_one_phase():
    torch.manual_seed(0)
    config = BertConfig(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    model = sk.sparsify(BertModel(config), "2:4", method="magnitude", progress=False)
    model.train()
    report = benchmark(model, batch_size=2, **QUICK)
    assert [row["M"] for row in report.rows if row["layer"] == "whole model"] == [16]
    assert "forward speedup" in report.summary and "decode speedup" not in report.summary
    assert model.training


def test_any_module_with_inputs():
    torch.manual_seed(0)
    model = sk.sparsify(
        nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 8)), method="magnitude", progress=False
    )
    report = benchmark(model, inputs={"input": torch.randn(3, 32)}, rounds=1, progress=False)
    assert report.ok and report.rows[0]["what"] == "forward"
    with pytest.raises(ValueError, match="inputs="):
        benchmark(model, progress=False)


def test_module_without_parameters():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64, bias=False), nn.Linear(64, 32, bias=False))
    sk.sparsify(model, method="magnitude", progress=False)
    assert not list(model.parameters())
    report = benchmark(model, inputs={"input": torch.randn(3, 32)}, rounds=1, progress=False)
    assert report.ok and "forward speedup" in report.summary


def test_dense_model_is_told_to_stay_so():
    report = benchmark(tiny_llama(), **QUICK)
    assert report.ok and report.summary["verdict"].startswith("stay dense")
    assert [set(row) & {"dense ms", "sparse ms"} for row in report.rows] == [{"dense ms"}] * 2


def test_reasons_are_what_was_measured(packed):
    layers_of = sparse_layers(packed)
    row = {"what": "decode", "count": 4, "dense ms": 0.02, "sparse ms": 0.03}
    step = Comparison({"dense": Timing((0.001,)), "sparse": Timing((0.001,))})
    said = _reason(layers_of, [row], {"decode": step}, {"decode": 1}, 1)
    if all(layer.backend == "reference" for layer in layers_of.values()):
        assert "reference backend" in said
    else:
        assert said.startswith("in decode one call of a packed layer takes 30 µs on average, of a dense one 20 µs")
        gaining = {**row, "sparse ms": 0.01}
        said = _reason(layers_of, [gaining], {"decode": step}, {"decode": 1}, 1)
        assert said.startswith("the pruned layers take 8% of a dense decode step")
        assert _reason(layers_of, [], None, {}, 1) == ""
    assert _reason({}, [], None, {}, 1) == "no layer is packed"


def test_wrong_answers_are_not_timed(packed):
    layer = next(iter(sparse_layers(packed).values()))
    layer.register_forward_hook(lambda module, args, output: output.flip(-1))
    report = benchmark(packed, **QUICK)
    assert not report.ok and not report.rows and "wrong answers" in report.summary["verdict"]


def test_one_wrong_layer_of_many_stops_the_clock(packed, monkeypatch):
    """The last down_proj is not the layer of its shape that is timed alone: only the whole model's answer shows it."""
    layer = list(sparse_layers(packed).values())[-1]
    layer.register_forward_hook(lambda module, args, output: 100 * output.flip(-1))
    monkeypatch.setattr(models, "_run_rounds", lambda *_: pytest.fail("wrong answers were timed"))
    report = benchmark(packed, **QUICK)
    assert not report.ok and not report.rows and report.summary["verdict"] == "wrong answers: nothing was timed"
    assert any("away from the dense one" in note for note in report.notes)


def test_without_memory_for_a_twin_layers_alone_are_timed(packed, monkeypatch):
    monkeypatch.setattr(models, "free_bytes", lambda device: 1000)
    report = benchmark(packed, **QUICK)
    assert report.ok and any("dense twin" in note for note in report.notes)
    assert report.rows and all(row["layer"] != "whole model" for row in report.rows)
    assert "the pruned layers' decode" in report.summary["verdict"]


def test_lengths_the_model_cannot_read(packed):
    with pytest.raises(ValueError, match="64 positions"):
        benchmark(packed, prompt_length=64, new_tokens=1)
    with pytest.raises(ValueError, match="at least 1"):
        benchmark(packed, rounds=0)


@pytest.mark.parametrize(
    "speedups, line",
    [
        ({"prefill": 1.02, "decode": 2.34}, "2.34x faster in decode; not faster: prefill 1.02x"),
        ({"prefill": 1.5, "decode": 2.0}, "1.50x faster in prefill, 2.00x faster in decode"),
        ({"forward": 0.8}, "stay dense: forward 0.80x; too small"),
    ],
)
def test_verdict(speedups, line):
    assert verdict(speedups, "too small") == line


@pytest.mark.parametrize("inputs", [torch.randn(3, 32), (torch.randn(3, 32),), {"input": torch.randn(3, 32)}])
def test_inputs_in_every_form(inputs):
    torch.manual_seed(0)
    model = sk.sparsify(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)), method="magnitude", progress=False)
    assert benchmark(model, inputs=inputs, rounds=1, progress=False).rows[0]["what"] == "forward"


def test_a_disturbed_measurement_gives_no_plain_verdict(monkeypatch):
    from sparsekit.benchmarking import models

    torch.manual_seed(0)
    model = sk.sparsify(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 8)), method="magnitude", progress=False)
    quiet = benchmark(model, inputs=torch.randn(3, 32), rounds=1, progress=False)
    assert not quiet.summary["verdict"].startswith("disturbed")
    slow, fast = models.Timing((1.0, 9.0, 9.0)), models.Timing((1.0, 1.0, 1.0))
    monkeypatch.setattr(
        models, "_run_rounds", lambda *_: {"forward": models.Comparison({"dense": slow, "sparse": fast})}
    )
    report = benchmark(model, inputs=torch.randn(3, 32), rounds=3, progress=False)
    assert report.summary["verdict"].startswith(
        "disturbed by other work, run again; by the best times alone: stay dense"
    )
