"""Budgets as they are written, costs against independent counts, and allocations that keep and reach the budget."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from sparsekit.archs import Rows, Width, find_widths
from sparsekit.budgets import Budget, Costs, allocate, count_flops, count_params, even_values, values_of
from sparsekit.shapes import LegalWidths, legal_widths
from tests.archs.tiny_models import tiny_model


def base(family, **options):
    """A model of the usual size, without memory."""
    import transformers

    with torch.device("meta"):
        config = getattr(transformers, f"{family}Config")(**options)
        return getattr(transformers, f"{family}Model")(config)


def random_values(widths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {w.name: values_of(torch.rand(w.num_units, generator=generator) ** 3) for w in widths}


# Section 3 of the specification: length -> head and filter in MMAC, BERT-base and DistilBERT in GMAC, attention in %.
KWON = {
    25.16: (5.028, 0.03865, 2.149, 1.074, 33.70),
    31.47: (6.314, 0.04834, 2.691, 1.346, 33.79),
    53.24: (10.830, 0.08178, 4.574, 2.287, 34.09),
    128: (27.263, 0.19661, 11.174, 5.587, 35.14),
    170: (37.123, 0.26112, 14.972, 7.486, 35.71),
    384: (94.372, 0.58982, 35.333, 17.666, 38.46),
}


@pytest.mark.parametrize("length", KWON)
def test_flops_are_those_of_kwon(length):
    head, channel, bert_total, distilbert_total, attention = KWON[length]
    for model, total in ((base("Bert"), bert_total), (base("DistilBert"), distilbert_total)):
        widths = find_widths(model)
        costs = count_flops(model, widths, length)
        units = {w.kind: int(costs.curves[w.name][1]) / 2e6 for w in widths}
        assert units["heads"] == pytest.approx(head, rel=1.5e-4)
        assert units["channels"] == pytest.approx(channel, rel=1.5e-4)
        assert costs.dense / 2e9 == pytest.approx(total, abs=6e-4)
        in_heads = sum(int(costs.curves[w.name][-1]) for w in widths if w.kind == "heads")
        assert 100 * in_heads / costs.dense == pytest.approx(attention, abs=6e-3)
        assert costs.fixed == 0 and costs.measure == "flops"


def test_flops_of_a_gated_decoder():
    """Per token: a key-value group 4 d d_h for its own projections and each of its queries, a channel 3 d."""
    model = base(
        "Llama", hidden_size=64, intermediate_size=96, num_attention_heads=8, num_key_value_heads=2, num_hidden_layers=1
    )
    heads, channels = find_widths(model)
    costs, s, d, size, repeats = count_flops(model, [heads, channels], 10), 10, 64, 8, 4
    seen = (s + 1) / 2  # a causal token sees itself and those before it
    group = 2 * d * size * (repeats + 1) + 2 * seen * size * repeats
    assert costs.curves[heads.name].tolist() == [n * round(2 * s * group) for n in range(3)]
    assert costs.curves[channels.name].tolist() == [n * 2 * s * 3 * d for n in range(97)]


@pytest.mark.parametrize("family", ["bert", "distilbert", "opt", "gpt2", "llama"])
def test_parameters_are_those_of_the_sliced_layers(family):
    """Each unit fewer has the layers of its width lose what the curve says, biases too."""
    model = tiny_model(family)
    widths = find_widths(model)
    costs = count_params(model, widths)
    assert costs.dense + costs.fixed == sum(p.numel() for p in model.parameters())
    for width in widths:
        reader = model.get_submodule(width.name)
        layers = {rows.name: model.get_submodule(rows.name) for rows in width.producers} | {width.name: reader}
        numbers = sum(p.numel() for layer in layers.values() for p in layer.parameters())
        kept = numbers - (0 if getattr(reader, "bias", None) is None else reader.bias.numel())
        assert costs.curves[width.name].tolist() == [kept * n // width.num_units for n in range(width.num_units + 1)]


def test_costs_of_some_widths():
    costs = Costs("params", {"a": np.array([0, 2, 4]), "b": np.array([0, 5])}, 7)
    assert costs.dense == 9
    assert (costs.of({"a": 1}), costs.of({"a": 0, "b": 0}), costs.of({})) == (7, 0, 9)


@pytest.mark.parametrize(
    "given,kind,amount,is_share",
    [
        (0.5, "sparsity", 0.5, True),
        (0, "sparsity", 0, True),
        ({"sparsity": "20%"}, "sparsity", 0.2, True),
        ({"flops": "60%"}, "flops", 0.6, True),
        ({"flops": 0.6}, "flops", 0.6, True),
        ({"flops": "2.5e9"}, "flops", 2.5e9, False),
        ({"params": 5e9}, "params", 5e9, False),
        ({"params": "99.5 %"}, "params", 0.995, True),
        ({"latency_ms": 12.0}, "latency_ms", 12, False),
        ({"latency_ms": 0.4}, "latency_ms", 0.4, False),
        ({"speedup": "1.5"}, "speedup", 1.5, False),
    ],
    ids=str,
)
def test_what_is_written_is_what_is_meant(given, kind, amount, is_share):
    budget = Budget.parse(given)
    assert (budget.kind, budget.is_share) == (kind, is_share)
    assert budget.amount == pytest.approx(amount)


@pytest.mark.parametrize(
    "given,says",
    [
        ({}, "give one budget"),
        ({"flops": 0.5, "params": 0.5}, "give one budget"),
        ({"flop": "60%"}, "Did you mean 'flops'"),
        ({"flops": 60}, "flops=60 is a number of flops, and no share: write '60%' for one"),
        ({"flops": "sixty"}, "flops='sixty' is no budget"),
        ({"flops": "120%"}, "flops='120%' is no budget: give a share of up to 100% or a number, as '60%'"),
        ({"flops": 0}, "flops=0"),
        ({"params": -1}, "params=-1"),
        ({"params": True}, "params=True"),
        ({"latency_ms": "60%"}, "latency_ms='60%'"),
        ({"latency_ms": None}, "latency_ms=None"),
        ({"speedup": 0.9}, "speedup=0.9"),
        ({"speedup": math.inf}, "speedup=inf"),
        (1.0, "sparsity=1.0"),
        (-0.1, "sparsity=-0.1"),
        (math.nan, "sparsity=nan"),
    ],
    ids=str,
)
def test_bad_budgets_say_what_to_write(given, says):
    with pytest.raises(ValueError, match=says):
        Budget.parse(given)


def test_limits_count_what_the_budget_is_about():
    params = Costs("params", {"a": np.array([0, 40, 80]), "b": np.array([0, 20])}, 900)
    ns = Costs("ns", params.curves, 900)
    assert Budget.parse({"params": "29%"}).limits(params)[1] == 29, "embeddings are not part of a share"
    assert Budget.parse(0.71).limits(params)[1] == 29
    assert Budget.parse({"params": 950}).limits(params) == (math.ceil(950 * 0.995) - 900, 50)
    assert Budget.parse({"latency_ms": 950e-6}).limits(ns)[1] == 50
    assert Budget.parse({"speedup": 1.25}).limits(ns)[1] == -100, "fixed costs alone are more than that"
    assert Budget.parse({"speedup": 1.05}).limits(ns)[1] == 1000 * 100 // 105 - 900
    with pytest.raises(ValueError, match="needs costs in flops, these are in ns"):
        Budget.parse({"flops": "60%"}).limits(ns)


@pytest.mark.parametrize("measure", ["flops", "params"])
@pytest.mark.parametrize("ratio", [0.95, 0.9, 0.8, 0.75, 0.7, 0.65, 0.6, 0.5, 0.4])
@pytest.mark.parametrize("family", ["Bert", "DistilBert", "ViT"])
def test_the_budget_is_kept_and_reached(family, ratio, measure):
    """Section 8.2: what is kept lies within one channel of the budget, and more of it keeps no less."""
    model = base(family)
    widths = find_widths(model)
    costs = count_flops(model, widths, 31.47) if measure == "flops" else count_params(model, widths)
    channel = max(int(costs.curves[w.name][1]) for w in widths if w.kind == "channels")
    found = allocate(random_values(widths), costs, Budget.parse({measure: ratio}), legal_widths(model, widths))
    assert found.cost == costs.of(found.num_kept)
    assert ratio - channel / costs.dense < found.cost / costs.dense <= ratio
    assert found.gap == 0


def test_more_budget_is_worth_more():
    model = base("Bert")
    widths = find_widths(model)
    costs, legal = count_flops(model, widths, 170), legal_widths(model, widths)
    found = [allocate(random_values(widths), costs, Budget.parse({"flops": c / 100}), legal) for c in range(10, 101, 5)]
    assert all(a.cost < b.cost and a.value < b.value for a, b in itertools.pairwise(found))
    assert found[-1].num_kept == {w.name: w.num_units for w in widths}


def test_channels_alone_as_kcm_keeps_them():
    """Section 3: of 60 % FLOPs at length 31.47 the heads take 33.79 %, which leaves 39.6 % of the channels."""
    model = base("Bert")
    widths = find_widths(model)
    heads = {w.name for w in widths if w.kind == "heads"}
    legal = legal_widths(model, widths, whole=heads, min_units=1)
    values = {name: value for name, value in random_values(widths).items() if name not in heads}
    for length, table in ((31.47, [0.924, 0.698, 0.396, 0.094]), (170, [0.922, 0.689, 0.378, 0.067])):
        for ratio, share in zip([0.95, 0.8, 0.6, 0.4], table, strict=True):
            found = allocate(values, count_flops(model, widths, length), Budget.parse({"flops": ratio}), legal)
            assert all(found.num_kept[name] == 12 for name in heads)
            kept = sum(n for name, n in found.num_kept.items() if name not in heads)
            assert kept / (12 * 3072) == pytest.approx(share, abs=6e-4)
    floor = "no legal widths reach flops=30%.*'flops': '33.8"
    with pytest.raises(ValueError, match=floor):
        allocate(values, count_flops(model, widths, 31.47), Budget.parse({"flops": 0.3}), legal)


def test_rounded_widths_reach_it_too():
    model = base("Bert")
    widths = find_widths(model)
    costs = count_flops(model, widths, 128)
    for ratio in (0.4, 0.6, 0.83):
        legal = legal_widths(model, widths, round_to=64)
        found = allocate(random_values(widths), costs, Budget.parse({"flops": ratio}), legal)
        assert 0.995 * ratio <= found.cost / costs.dense <= ratio
        assert all(n % 64 == 0 for name, n in found.num_kept.items() if name.endswith("output.dense") and n > 12)


def test_uniform_is_one_number_for_all_blocks():
    model = base("Llama", hidden_size=256, intermediate_size=688, num_attention_heads=16, num_hidden_layers=4)
    widths = find_widths(model)
    legal = legal_widths(model, widths, round_to=4, uniform=True)
    costs = count_params(model, widths)
    found = allocate(random_values(widths), costs, Budget.parse(0.4), legal)
    kinds = {kind: {found.num_kept[w.name] for w in widths if w.kind == kind} for kind in ("heads", "channels")}
    assert all(len(numbers) == 1 for numbers in kinds.values())
    assert 0.995 * 0.6 <= found.cost / costs.dense <= 0.6


def test_even_values_keep_the_same_share_everywhere():
    model = base("Bert")
    widths = find_widths(model)
    costs = count_flops(model, widths, 64)
    found = allocate(even_values(costs), costs, Budget.parse({"flops": "60%"}), legal_widths(model, widths))
    assert 0.9999 * 0.6 < found.cost / costs.dense <= 0.6
    heads = [found.num_kept[w.name] for w in widths if w.kind == "heads"]
    channels = [found.num_kept[w.name] for w in widths if w.kind == "channels"]
    assert set(heads) <= {7, 8} and sum(heads) / 12 == pytest.approx(0.6 * 12, abs=0.5)
    assert max(channels) - min(channels) <= 1 and channels[0] / 3072 == pytest.approx(0.6, abs=0.02)


def toy(*tables, fixed=0, measure="params"):
    """Widths "0", "1", … that cost and may keep what the tables say."""
    widths = tuple(
        Width(str(i), "channels", len(cost) - 1, 1, (Rows("p", 0, 1),)) for i, (cost, _) in enumerate(tables)
    )
    curves = {str(i): np.array(cost) for i, (cost, _) in enumerate(tables)}
    numbers = {str(i): tuple(may) for i, (_, may) in enumerate(tables)}
    return Costs(measure, curves, fixed), LegalWidths(widths, numbers, tuple((w.name,) for w in widths))


def test_budgets_out_of_reach_name_the_nearest():
    costs, legal = toy((range(0, 101), (20, 50, 100)), (range(0, 101), (30, 60, 100)))
    values = {name: torch.arange(101.0) for name in "01"}

    def message(given):
        with pytest.raises(ValueError) as caught:
            allocate(values, costs, given if isinstance(given, Budget) else Budget.parse(given), legal)
        return str(caught.value)

    reachable = sorted({(a + b) / 200 for a in (20, 50, 100) for b in (30, 60, 100)})
    assert reachable == [0.25, 0.4, 0.55, 0.6, 0.65, 0.75, 0.8, 1.0]  # 0.4 twice: (20, 60) and (50, 30)
    assert "{'params': '40%'} and {'params': '55%'} can be had" in message({"params": "50%"})
    assert "{'sparsity': 0.6} and {'sparsity': 0.45} can be had" in message(0.5)
    assert "0.1%: {'params': '25%'} can be had" not in message({"params": "10%"})
    assert "within 0.5%: {'params': '25%'} can be had" in message({"params": "10%"})
    assert "{'params': 50} can be had" in message(Budget("params", 2))
    assert "round_to" in message({"params": "50%"})
    for share in reachable:
        assert allocate(values, costs, Budget.parse({"params": share}), legal).cost == round(200 * share)
    loose = Budget("params", 0.5, True, tolerance=0.25)
    assert allocate(values, costs, loose, legal).cost == 80


def test_what_is_named_as_nearest_is_accepted():
    rng = np.random.default_rng(0)
    for kind, measure in [("params", "params"), ("sparsity", "params"), ("latency_ms", "ns"), ("speedup", "ns")]:
        curve = np.concatenate(([0], rng.integers(10**4, 10**7, 60).cumsum()))
        costs, legal = toy((curve, sorted({*rng.choice(60, 4), 60})), fixed=12345, measure=measure)
        for number in legal.numbers["0"]:
            cost = costs.of({"0": number})
            entry = costs and Budget(kind, 1.0, kind in ("params", "sparsity")).entry(cost, costs)
            if entry == {"sparsity": 0.0} or number == 0:
                continue
            found = allocate({"0": torch.arange(61.0)}, costs, Budget.parse(entry), legal)
            assert found.cost == cost, entry


def test_a_budget_that_asks_for_no_cut_says_so():
    costs, legal = toy((range(0, 101), range(1, 101)), fixed=50)
    values = {"0": torch.arange(101.0)}
    assert allocate(values, costs, Budget.parse(0), legal).num_kept == {"0": 100}
    assert allocate(values, costs, Budget.parse({"params": 150}), legal).num_kept == {"0": 100}
    with pytest.raises(ValueError, match="params=200 is more than the model costs: {'params': 150} is what it has"):
        allocate(values, costs, Budget.parse({"params": 200}), legal)


def test_the_budget_is_used_even_where_less_would_be_worth_as_much_or_more():
    """Steps of cost are coarse: the most valuable choice leaves the budget unused, another one reaches it."""
    costs, legal = toy(([0, 50, 100], (1, 2)), ([0, 49, 100], (1, 2)))
    values = {"0": torch.tensor([0.0, 1.0, 1.5]), "1": torch.tensor([0.0, 3.0, 3.2])}
    found = allocate(values, costs, Budget("params", 0.745, True), legal)
    assert found.num_kept == {"0": 2, "1": 1}
    values["0"][1] = 9.0
    assert allocate(values, costs, Budget("params", 0.745, True), legal).num_kept == {"0": 2, "1": 1}
    assert allocate(values, costs, Budget("params", 0.745, True, tolerance=0.5), legal).num_kept == {"0": 1, "1": 1}


def test_values_are_checked():
    costs, legal = toy((range(0, 11), range(1, 11)), (range(0, 11), (10,)))
    half = Budget.parse(0.3)
    with pytest.raises(ValueError, match=r"0 has no values: give \[11\]"):
        allocate({}, costs, half, legal)
    for bad in (torch.zeros(10), torch.full((11,), math.nan), torch.zeros(11, 1)):
        with pytest.raises(ValueError, match="values of 0 must be 11 finite numbers"):
            allocate({"0": bad}, costs, half, legal)
    assert allocate({"0": torch.arange(11.0)}, costs, half, legal).num_kept == {"0": 4, "1": 10}


def test_values_of_scores():
    assert values_of(torch.tensor([1, 3, 2], dtype=torch.bfloat16)).tolist() == [0, 3, 5, 6]
    assert values_of(torch.rand(4, 2)[:, 1]).dtype == torch.float64
    assert values_of(torch.zeros(0)).tolist() == [0]


def test_lengths_are_checked():
    model = base("Bert", num_hidden_layers=1)
    for length in (0, -3, math.nan):
        with pytest.raises(ValueError, match="is no number of tokens"):
            count_flops(model, find_widths(model), length)


def test_seven_billion_parameters():
    model = base("Llama")
    widths = find_widths(model)
    costs = count_params(model, widths)
    assert costs.dense == 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert isinstance(model, nn.Module) and costs.dense + costs.fixed == sum(p.numel() for p in model.parameters())
    before = copy.deepcopy(costs.curves)
    found = allocate(random_values(widths), costs, Budget.parse({"params": 5e9}), legal_widths(model, widths))
    assert 0.995 * 5e9 <= found.cost + costs.fixed <= 5e9
    assert all(np.array_equal(before[name], costs.curves[name]) for name in before)
