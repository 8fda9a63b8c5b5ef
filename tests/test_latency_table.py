"""Latency tables by a clock that counts operations, where the truth is known; and on the real one."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparsekit.archs import find_widths
from sparsekit.benchmarking import Comparison, Timing, forward, latency_table, time_forward
from sparsekit.benchmarking.latency_table import LatencyTable, check_prediction, measure_latency
from sparsekit.budgets import Budget, allocate, values_of
from sparsekit.errors import SparsekitError
from sparsekit.plan import Cut
from sparsekit.shapes import legal_widths
from sparsekit.slicing import cut_
from sparsekit.snapshot import Snapshot
from tests.archs.tiny_models import tiny_model, vit

FAMILIES = ["bert", "distilbert", "opt", "gpt2", "llama", "qwen3", "t5", "vit"]


def model_of(family):
    return vit() if family == "vit" else tiny_model(family)


def operations(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops() + 1e-6


@pytest.fixture
def counted(monkeypatch):
    """Time stands for operations: a millisecond for each thousand; for copies of blocks, half of that."""

    def compare(calls, **options):
        seconds = {name: operations(call) / (2e6 if isinstance(name, tuple) else 1e6) for name, call in calls.items()}
        return Comparison({name: Timing((each,)) for name, each in seconds.items()})

    monkeypatch.setattr(latency_table, "compare", compare)
    monkeypatch.setattr(forward, "compare", compare)


def sliced(model, num_kept):
    smaller = copy.deepcopy(model)
    cuts = {w.name: Cut(torch.arange(num_kept[w.name]), w.num_units, w.kind) for w in find_widths(model)}
    cut_(smaller, cuts, Snapshot(smaller))
    return smaller


@pytest.mark.parametrize("family", FAMILIES)
def test_predicts_what_the_sliced_model_takes(family, counted):
    """Operations are linear in units, so the prediction is exact, between the measured numbers too."""
    model = model_of(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    legal = legal_widths(model)
    table = measure_latency(model, legal, batch_size=3, length=12, num_points=4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        num_kept = {
            name: numbers[int(torch.randint(len(numbers), (), generator=generator))]
            for name, numbers in legal.numbers.items()
        }
        smaller = sliced(model, num_kept)
        check = check_prediction(table, model, smaller, num_kept)
        assert table.predict(num_kept) == pytest.approx(check.sliced_ms, rel=1e-5)
        assert table.predict({}) == pytest.approx(check.dense_ms, rel=1e-5)
        assert abs(check.error) < 1e-5
        assert check.measured == pytest.approx(check.dense_ms / check.sliced_ms)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any("forward" in vars(module) or module._forward_hooks for module in model.modules())


def test_budgets_in_time_count_the_whole_model(counted):
    from transformers import BertConfig, BertModel

    sizes = dict(vocab_size=61, hidden_size=20, intermediate_size=300, num_hidden_layers=2, num_attention_heads=5)
    model = BertModel(BertConfig(**sizes)).eval()
    legal = legal_widths(model)
    costs = measure_latency(model, legal, batch_size=2, length=16).costs()
    whole = (costs.dense + costs.fixed) / 1e6
    values = {w.name: values_of(torch.arange(w.num_units) + 1.0) for w in legal.widths}
    for given, limit in (({"speedup": 1.3}, whole / 1.3), ({"latency_ms": 0.7 * whole}, 0.7 * whole)):
        found = allocate(values, costs, Budget.parse(given), legal)
        smaller = sliced(model, found.num_kept)
        (taken,) = (1e3 * t.median for t in time_forward({"it": smaller}, batch_size=2, length=16).timings.values())
        assert 0.994 * limit <= taken <= limit * (1 + 1e-5)
    with pytest.raises(ValueError, match="no legal widths reach speedup=50 .*'speedup': "):
        allocate(values, costs, Budget.parse({"speedup": 50}), legal)


def test_blocks_of_one_shape_are_measured_once(monkeypatch):
    names = []

    def compare(calls, **options):
        names.extend(calls)
        return Comparison({name: Timing((operations(call) / 1e6,)) for name, call in calls.items()})

    monkeypatch.setattr(latency_table, "compare", compare)
    model = tiny_model("bert")
    table = measure_latency(model, legal_widths(model), num_points=4, length=8)
    assert len(names) == 2 + 1 + 1 + 3, "the model, the rest, the least block, one more head, three numbers of channels"
    assert [units for units, _ in table.points["bert.encoder.layer.1.output.dense"]] == [8, 17, 27, 36]
    names.clear()
    kept = {w.name: w.num_units for w in find_widths(model)} | {"bert.encoder.layer.0.output.dense": 20}
    cut = sliced(model, kept)
    uneven = measure_latency(cut, legal_widths(cut), num_points=4, length=8)
    assert len(names) == 2 + 2 * (1 + 1 + 3)
    assert uneven.predict({}) == pytest.approx(table.predict(kept), rel=1e-5)


def test_widths_left_alone_and_rounded_ones(counted):
    model = tiny_model("llama")
    alone = find_widths(model)[1].name
    legal = legal_widths(model, round_to=4, whole=[alone])
    table = measure_latency(model, legal, length=8, num_points=3)
    assert all(units % 4 == 0 for name, points in table.points.items() if "mlp" in name for units, _ in points)
    kept = {name: numbers[0] for name, numbers in legal.numbers.items()}
    assert kept[alone] == 36
    (taken,) = time_forward({"it": sliced(model, kept)}, length=8).timings.values()
    assert table.predict(kept) == pytest.approx(1e3 * taken.median, rel=1e-5)
    whole = legal_widths(model, whole=[w.name for w in legal.widths])
    still = measure_latency(model, whole, length=8)
    assert still.fixed_ms == pytest.approx(table.predict({}), rel=1e-6)
    assert still.costs().dense == 0


def test_curves_rise_and_are_interpolated():
    table = LatencyTable(1, 8, {"a": ((2, 0.0), (4, 1.0), (8, 1.5))}, {"a": 8}, fixed_ms=3.0)
    costs = table.costs()
    assert costs.curves["a"].tolist() == [0, 0, 0, 500_000, 10**6, 1_125_000, 1_250_000, 1_375_000, 1_500_000]
    assert costs.curves["a"].dtype == np.int64 and costs.fixed == 3_000_000 and costs.measure == "ns"
    assert table.predict({"a": 3}) == 3.5
    assert latency_table._rising([0.0, 3, 1, 2, 5, 4]) == [0, 2, 2, 2, 4.5, 4.5]
    assert latency_table._rising([0.0, 1, 2]) == [0, 1, 2]


def measured(monkeypatch, times):
    """A table of a model whose calls take `times(name)` seconds, one or several."""
    monkeypatch.setattr(
        latency_table,
        "compare",
        lambda calls, **options: Comparison({name: Timing(tuple(times(name))) for name in calls}),
    )
    model = tiny_model("bert")
    return measure_latency(model, legal_widths(model), length=8, num_points=3)


def test_noise_does_not_make_more_units_faster(monkeypatch):
    noisy = iter([9, 1, 8, 2, 7, 3, 6, 4])
    table = measured(monkeypatch, lambda name: [100.0 if name == "model" else 1.0 if name == "rest" else next(noisy)])
    assert all((np.diff(curve) >= 0).all() for curve in table.costs().curves.values())
    assert table.predict({}) == pytest.approx(1e5)
    with pytest.raises(
        SparsekitError, match="the model took 1e\\+03 ms, and 2e\\+03 ms without its blocks: other work"
    ):
        measured(monkeypatch, lambda name: [2.0 if name == "rest" else 1.0])


def test_a_disturbed_machine_is_noted(monkeypatch):
    def times(name, disturbed=9.0):
        own = {"model": 10.0, "rest": 2.0}.get(name, 1.0)
        return [own, disturbed * own, disturbed * own]

    table = measured(monkeypatch, times)
    assert table.predict({}) == pytest.approx(90_000)
    (note,) = table.notes
    assert "disturbed: medians up to 9.0 times the best" in note
    assert measured(monkeypatch, lambda name: times(name, 1.1)).notes == ()


def test_on_the_real_clock():
    model = tiny_model("llama")
    legal = legal_widths(model)
    table = measure_latency(model, legal, batch_size=2, length=16, num_points=3, max_seconds=0.5)
    least = {name: numbers[0] for name, numbers in legal.numbers.items()}
    assert 0 < table.predict(least) <= table.predict({})
    check = check_prediction(table, model, sliced(model, least), least)
    assert check.dense_ms > 0 and check.sliced_ms > 0 and check.predicted >= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_on_a_gpu():
    from transformers import BertConfig, BertModel

    model = BertModel(BertConfig(num_hidden_layers=4)).eval().to("cuda", torch.float16)
    legal = legal_widths(model, round_to=64)
    table = measure_latency(model, legal, batch_size=64, length=256, max_seconds=5)
    half = {name: min(n for n in numbers if n >= numbers[-1] / 2) for name, numbers in legal.numbers.items()}
    check = check_prediction(table, model, sliced(model, half), half)
    assert check.measured > 1.3
    assert abs(check.error) < 0.15


def test_the_precision_of_matmuls_is_the_users(counted):
    seen = []

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)

        def forward(self, x):
            seen.append((torch.get_float32_matmul_precision(), self.training, torch.is_grad_enabled()))
            return self.fc2(self.act(self.fc1(x)))

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList([Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    model = Net().train()
    torch.set_float32_matmul_precision("high")
    try:
        table = measure_latency(model, legal_widths(model), inputs={"x": torch.randn(5, 8)})
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert set(seen) == {("high", False, False)}
    assert model.training and len(table.points) == 2


def test_inputs_that_do_not_fit():
    model = tiny_model("bert")
    legal = legal_widths(model)
    with pytest.raises(ValueError, match="length=65 is more than the 64 positions of BertForSequenceClassification"):
        measure_latency(model, legal, length=65)
    with pytest.raises(ValueError, match="batch_size=0, length=8: both are numbers of at least 1"):
        measure_latency(model, legal, batch_size=0, length=8)

    class Net(nn.Module):
        def __init__(self, runs):
            super().__init__()
            mlp = nn.ModuleDict({"fc1": nn.Linear(8, 16), "act": nn.ReLU(), "fc2": nn.Linear(16, 8)})
            self.blocks, self.runs = nn.ModuleList([mlp]), runs

        def forward(self, x):
            return x

    net = Net(False)
    with pytest.raises(ValueError, match="Net reads neither tokens nor images: pass inputs="):
        measure_latency(net, legal_widths(net))
    with pytest.raises(ValueError, match="blocks.0 does not run on these inputs"):
        measure_latency(net, legal_widths(net), inputs={"x": torch.randn(2, 8)})
