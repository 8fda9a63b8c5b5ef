"""Expected cost against counts of sliced models, multipliers on their own, and projections against brute force."""

import itertools
import math

import numpy as np
import pytest
import torch

from sparsekit.archs import find_widths
from sparsekit.benchmarking.latency_table import LatencyTable
from sparsekit.budgets import Costs, count_flops
from sparsekit.targets import weight_NK
from sparsekit.train import constraint as room
from sparsekit.train.constraint import AugmentedLagrangian, Constraint, target_at
from sparsekit.train.expected_cost import ExpectedCost
from sparsekit.train.gates import LIMIT, OPEN, Gates
from tests.archs.tiny_models import tiny_model
from tests.train.test_masked import sliced, some_masks

ALL = ("heads", "channels", "hidden", "layers")


@pytest.fixture
def four(llama):
    """Make a Llama of four layers with eight heads of eight, d = 64 and 176 channels, as small as a head is 1 %."""

    def make(num_key_value_heads=8, **options):
        sizes = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 4, "num_attention_heads": 8}
        return llama(num_key_value_heads=num_key_value_heads, **{**sizes, **options})

    return make


def linears_of(model):
    """Weights of the blocks' linear layers and biases of those that make units."""
    total, widths = 0, find_widths(model)
    producers = {rows.name for width in widths for rows in width.producers}
    for name in {width.name for width in widths} | producers:
        layer = model.get_submodule(name)
        total += weight_NK(layer).numel()
        total += layer.bias.numel() if name in producers and layer.bias is not None else 0
    return total


def random_chances(gates, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.rand(size, generator=generator) for name, size in gates.sizes.items()}


def spread(gates, seed=0):
    gates.log_alpha.data.uniform_(-LIMIT, LIMIT, generator=torch.Generator().manual_seed(seed))
    return gates


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "opt"])
@pytest.mark.parametrize("hidden", [False, True])
def test_where_gates_are_0_or_1_the_count_is_that_of_the_sliced_model(family, hidden):
    if hidden and family in ("gpt2", "opt"):
        pytest.skip("the stream of this family cannot be cut")
    model = tiny_model(family)
    gates = Gates.of(model, ("heads", "channels", "hidden", "layers") if hidden else ("heads", "channels"))
    cost = ExpectedCost.of(model, gates)
    assert cost.dense == linears_of(model) == cost.of_gates({n: torch.ones(s) for n, s in gates.sizes.items()}).item()
    masks = some_masks(gates)
    if "layers" in gates.kinds.values():
        masks["model.layers"][0] = 0
    masks = {name: mask if mask.any() else torch.ones_like(mask) for name, mask in masks.items()}
    wanted = linears_of(sliced(model, gates, masks))
    assert cost.of_gates(masks).item() == cost.of_masks({n: 0.3 * m for n, m in masks.items()}) == wanted
    assert cost.sparsity(masks).item() == pytest.approx(1 - wanted / linears_of(model), abs=1e-12)


@pytest.mark.parametrize("num_key_value_heads", [8, 2])
def test_the_expected_count_is_the_sum_over_all_weights_of_the_chances_at_both_ends(four, num_key_value_heads):
    model = four(num_key_value_heads, attention_bias=True)
    gates = Gates.of(model, ("heads", "channels", "hidden"))
    chances = random_chances(gates)
    stream, wanted = chances["model.embed_tokens"].double(), 0.0
    for width in gates.widths:
        units = chances[width.name].double()
        N = weight_NK(model.get_submodule(width.name)).shape[0]
        wanted += torch.outer(stream[:N], units.repeat_interleave(width.columns)).sum()
        for rows in width.producers:
            layer, own = model.get_submodule(rows.name), units.repeat_interleave(rows.per_unit)
            wanted += torch.outer(own, stream).sum() + (own.sum() if layer.bias is not None else 0)
    found = ExpectedCost.of(model, gates).of_gates(chances)
    assert found.dtype == torch.float64 and found.item() == pytest.approx(wanted.item(), rel=1e-12)


def test_the_whole_model_counts_where_it_is_asked_for(four):
    model = four()
    gates = Gates.of(model, ALL)
    cost = ExpectedCost.of(model, gates, whole=True)
    assert cost.dense == sum(parameter.numel() for parameter in model.parameters())
    masks = some_masks(gates)
    small = sliced(model, gates, masks)
    assert cost.of_masks(masks) == sum(parameter.numel() for parameter in small.parameters())


def test_flops_are_those_of_the_sliced_model(four):
    model = four(2)
    gates = Gates.of(model, ("heads", "channels", "hidden"))
    masks = some_masks(gates)
    small = sliced(model, gates, masks)
    cost = ExpectedCost.of(model, gates, "flops", length=40)
    assert cost.dense == count_flops(model, find_widths(model), 40).dense
    assert cost.of_masks(masks) == count_flops(small, find_widths(small), 40).dense


def test_units_without_gates_stay_and_count(four):
    model = four()
    gates = Gates.of(model, ("channels",))
    cost = ExpectedCost.of(model, gates)
    none = {name: torch.zeros(size) for name, size in gates.sizes.items()}
    assert cost.of_masks(none) == 4 * 4 * 64 * 64 and cost.dense == linears_of(model)


@pytest.mark.parametrize("measure", ["params", "flops"])
def test_the_slope_is_that_of_finite_differences(four, measure):
    model = four(2)
    gates = Gates.of(model, ALL)
    cost = ExpectedCost.of(model, gates, measure)
    chances = {name: each.double().requires_grad_() for name, each in random_chances(gates).items()}
    cost.sparsity(chances).backward()
    for name in ("model.embed_tokens", "model.layers", "model.layers.2.mlp.down_proj", gates.names[0]):
        ends = []
        for shift in (-1e-4, 1e-4):
            moved = {**chances, name: chances[name].detach().clone()}
            moved[name][1] += shift
            ends.append(cost.sparsity(moved).item())
        assert chances[name].grad[1].item() == pytest.approx((ends[1] - ends[0]) / 2e-4, rel=1e-6)


def table_of(model, fixed=0, step=16, jump=1000):
    """Costs in ns that rise by `jump` in steps of so many channels, and by 1000 for each head."""
    curves = {}
    for width in find_widths(model):
        units = np.arange(width.num_units + 1)
        curves[width.name] = 1000 * units if width.kind == "heads" else jump * np.ceil(units / step).astype(np.int64)
    return Costs("ns", curves, fixed)


def test_times_are_those_of_the_table_at_the_expected_number(four):
    model = four()
    gates = Gates.of(model)
    table = table_of(model, fixed=5000)
    cost = ExpectedCost.of(model, gates, "ns", table=table, whole=True)
    assert cost.dense == table.dense + 5000
    masks = some_masks(gates)
    masks[gates.names[1]][:] = 0
    assert cost.of_masks(masks) == table.of({name: int(mask.sum()) for name, mask in masks.items()}) + 5000
    chances = {name: torch.full((size,), 0.7, requires_grad=True) for name, size in gates.sizes.items()}
    wanted = sum(np.interp(0.7 * (len(curve) - 1), range(len(curve)), curve) for curve in table.curves.values())
    found = cost.of_gates(chances)
    assert found.item() == pytest.approx(wanted + 5000)
    found.backward()
    assert all((each.grad > 0).all() for each in chances.values())  # on a step of the table, too
    assert chances["model.layers.0.mlp.down_proj"].grad.mean().item() == pytest.approx(1000 / 16, rel=0.3)


def test_measures_that_cannot_be_told_are_refused(four):
    model = four()
    gates = Gates.of(model)
    with pytest.raises(ValueError, match="unknown measure 'seconds'"):
        ExpectedCost.of(model, gates, "seconds")
    with pytest.raises(ValueError, match="needs table="):
        ExpectedCost.of(model, gates, "ns")
    with pytest.raises(ValueError, match="a budget in time knows the cost of heads and channels only"):
        ExpectedCost.of(model, Gates.of(model, ALL), "ns", table=table_of(model))


def test_targets_rise_to_the_end_of_the_ramp_and_stay():
    assert [target_at(step, 4, 0.4) for step in (0, 1, 4, 9)] == pytest.approx([0, 0.1, 0.4, 0.4])
    assert [target_at(step, 4, 0.4, "cubic") for step in (0, 1, 4, 9)] == pytest.approx([0, 0.23125, 0.4, 0.4])
    assert target_at(0, 0, 0.4) == 0.4
    with pytest.raises(ValueError, match="unknown ramp 'square'"):
        target_at(0, 4, 0.4, "square")


def test_the_penalty_is_its_formula_and_multipliers_climb_on_it():
    lagrangian = AugmentedLagrangian([1.0, 3.0])
    lagrangian.multipliers.data = torch.tensor([[2.0, -1.0], [4.0, 8.0]])
    sparsity = torch.tensor([0.5, 0.25], dtype=torch.float64, requires_grad=True)
    penalty = lagrangian.penalty(sparsity, torch.tensor([0.25, 0.5]))
    assert penalty.item() == pytest.approx(0.25 * (2 * 0.25 + 4 * 0.0625) + 0.75 * (0.25 + 8 * 0.0625))
    penalty.backward()
    assert sparsity.grad.tolist() == pytest.approx([0.25 * (2 + 2 * 4 * 0.25), 0.75 * (-1 - 2 * 8 * 0.25)])
    assert lagrangian.multipliers.grad.flatten().tolist() == pytest.approx([0.0625, -0.1875, 0.25 / 16, 0.75 / 16])
    single = AugmentedLagrangian()
    single.multipliers.data += 1
    assert single.penalty(torch.tensor(0.5), 0.3).item() == pytest.approx(0.2 + 0.04)


def descend(gates, constraint, target, warmup, steps, pull=None):
    """Train gates on the constraint alone, or against a pull that opens them."""
    lagrangian = constraint.lagrangian()
    down = torch.optim.AdamW(gates.parameters(), lr=0.1, weight_decay=0)
    up = torch.optim.AdamW(lagrangian.parameters(), lr=0.1, weight_decay=0, maximize=True)
    for step in range(steps):
        loss = lagrangian.penalty(*constraint.terms(gates.p_open(), target_at(step, warmup, target)))
        loss = loss - (0 if pull is None else (pull * gates.log_alpha).sum())
        down.zero_grad()
        up.zero_grad()
        loss.backward()
        down.step()
        up.step()
        gates.clamp_()
    return lagrangian


@pytest.mark.parametrize("target, warmup", [(0.2, 150), (0.5, 150), (0.2, 600), (0.5, 600)])
def test_multipliers_alone_bring_the_sparsity_to_its_target(four, target, warmup):
    model = four()
    gates = Gates.of(model)
    constraint = Constraint.of(model, gates, target)
    assert constraint.target == pytest.approx(target, abs=1e-5) and constraint.num_constraints == 1
    lagrangian = descend(gates, constraint, target, warmup, warmup + 150)
    assert abs(constraint.cost.sparsity(gates.p_open()).item() - target) < 1e-3
    assert abs(lagrangian.multipliers[0].item()) < 0.5
    projected = constraint.project(gates)
    assert abs(projected.sparsity - target) <= 0.0015


@pytest.mark.parametrize("num_key_value_heads", [8, 2])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("target", [0.2, 0.25, 0.5])
def test_what_stays_is_within_the_budget_and_as_near_to_it_as_units_are_small(four, target, seed, num_key_value_heads):
    model = four(num_key_value_heads)
    gates = spread(Gates.of(model), seed)
    projected = Constraint.of(model, gates, target).project(gates)
    assert all(mask.dtype == torch.bool for mask in projected.masks.values())
    small = sliced(model, gates, projected.masks)
    assert projected.cost == linears_of(small) and projected.sparsity == 1 - projected.cost / linears_of(model)
    assert 0 <= projected.sparsity - target <= 0.0015
    for name, chance in gates.p_open().items():
        kept = projected.masks[name]
        assert kept.all() or chance[kept].min() >= chance[~kept].max()


def test_what_stays_is_the_best_of_all_choices(llama):
    model = llama(intermediate_size=40, num_hidden_layers=1)  # a head costs as much as 16 channels
    gates = Gates.of(model)
    heads, channels = gates.names
    for seed in range(6):
        spread(gates, seed)
        constraint = Constraint.of(model, gates, {"params": 40 / 72}, min_channels=2)
        found = constraint.project(gates)
        chances = {name: each.detach().double() for name, each in gates.p_open().items()}
        unit = {name: int(curve[1]) for name, curve in constraint.cost.costs.curves.items()}
        most, best = 40 * unit[channels], -math.inf
        for few, many in itertools.product(range(1, 3), range(2, 41)):
            if few * unit[heads] + many * unit[channels] <= most:
                worth = unit[heads] * chances[heads].topk(few).values.sum()
                worth += unit[channels] * chances[channels].topk(many).values.sum()
                best = max(best, worth.item())
        worth = sum(unit[name] * chances[name][mask].sum().item() for name, mask in found.masks.items())
        assert found.cost <= most and worth == pytest.approx(best, rel=1e-3)


def test_a_large_unit_that_is_open_is_not_given_for_many_small_ones_that_are_closed(four):
    model = four()
    gates = Gates.of(model)
    for name, alpha in gates.split(gates.log_alpha.detach()).items():
        if gates.kinds[name] == "channels":
            alpha[20:] = -LIMIT
    projected = Constraint.of(model, gates, 0.5).project(gates)
    assert all(mask.all() for name, mask in projected.masks.items() if gates.kinds[name] == "heads")
    assert all(mask[:20].all() for name, mask in projected.masks.items() if gates.kinds[name] == "channels")


def test_between_equal_chances_the_shadow_decides_or_the_scores_that_are_given(four):
    model = four()
    gates = Gates.of(model)
    constraint = Constraint.of(model, gates, 0.5)
    names = [name for name in gates.names if gates.kinds[name] == "channels"]
    order = torch.randperm(len(gates.excess), generator=torch.Generator().manual_seed(0)).float()
    gates.excess += order
    by_shadow = constraint.project(gates)
    for name in names:
        kept, excess = by_shadow.masks[name], gates.split(order)[name]
        assert kept.any() and not kept.all() and excess[kept].min() > excess[~kept].max()
    by_score = constraint.project(gates, {name: -each for name, each in gates.split(order).items()})
    for name in names:
        kept, excess = by_score.masks[name], gates.split(order)[name]
        assert excess[kept].max() < excess[~kept].min()


def test_layers_that_gates_close_keep_their_least_and_that_is_said(four):
    model = four()
    gates = Gates.of(model)
    for name, alpha in gates.split(gates.log_alpha.detach()).items():
        if name.startswith("model.layers.2."):
            alpha.fill_(-LIMIT)
    projected = Constraint.of(model, gates, 0.25, min_heads=2, min_channels=5).project(gates)
    assert projected.masks["model.layers.2.self_attn.o_proj"].sum() == 2
    assert projected.masks["model.layers.2.mlp.down_proj"].sum() == 5
    (note,) = [note for note in projected.notes if "the least stays" in note]
    assert "model.layers.2.self_attn.o_proj (0 heads open, 2 stay), model.layers.2.mlp.down_proj (0 channels" in note
    assert "model.layers.1" not in note


def test_dimensions_are_rounded_and_dealt_out(four):
    model = four(8)
    gates = spread(Gates.of(model))
    constraint = Constraint.of(model, gates, 0.401, round_to=16, tensor_parallel=2)
    for name, mask in constraint.project(gates).masks.items():
        size = int(mask.sum()) * (8 if gates.kinds[name] == "heads" else 1)
        assert size == mask.numel() * (8 if gates.kinds[name] == "heads" else 1) or size // 2 % 16 == 0


def test_uniform_layers_are_led_to_the_same_numbers_and_end_with_them(four):
    model = four()
    gates = Gates.of(model)
    constraint = Constraint.of(model, gates, 0.4, uniform=True)
    assert constraint.num_constraints == 8 == constraint.lagrangian().multipliers.shape[1]
    pull = torch.cat([torch.full((size,), 1e-6 * (index + 1)) for index, size in enumerate(gates.sizes.values())])
    descend(gates, constraint, 0.4, 150, 600, pull)
    shares = {name: 1 - chance.mean().item() for name, chance in gates.p_open().items()}
    for kind in ("heads", "channels"):
        own = [share for name, share in shares.items() if gates.kinds[name] == kind]
        assert max(own) - min(own) < 0.03
    assert constraint.cost.sparsity(gates.p_open()).item() == pytest.approx(0.4, abs=0.01)
    projected = constraint.project(gates)
    counts = {(gates.kinds[name], int(mask.sum())) for name, mask in projected.masks.items()}
    assert len(counts) == 2 and projected.sparsity == pytest.approx(0.4, abs=0.005)


def test_terms_of_uniform_layers_are_met_where_all_are_alike_and_the_whole_is_right(four):
    model = four()
    gates = Gates.of(model)
    constraint = Constraint.of(model, gates, 0.4, uniform=True)
    chances = {name: torch.full((size,), 0.6 if size > 8 else 0.8) for name, size in gates.sizes.items()}
    sparsity, target = constraint.terms(chances, constraint.cost.sparsity(chances).item())
    torch.testing.assert_close(sparsity, target)
    chances[gates.names[0]] = torch.full((8,), 0.4)
    sparsity, target = constraint.terms(chances, constraint.cost.sparsity(chances).item() + 0.1)
    gap = sparsity - target
    assert gap.tolist() == pytest.approx([0.3 - 0.1] + 3 * [-0.1 - 0.1] + 4 * [-0.1])  # heads, then channels


def test_hidden_dimensions_and_layers_go_as_gates_expect_and_the_budget_is_kept(four):
    model = four(8)
    gates = spread(Gates.of(model, ALL))
    parts = gates.split(gates.log_alpha.detach())
    parts["model.embed_tokens"].fill_(LIMIT)
    parts["model.embed_tokens"][::4] = -LIMIT
    parts["model.layers"].fill_(LIMIT)
    parts["model.layers"][2] = -LIMIT
    constraint = Constraint.of(model, gates, 0.6)
    projected = constraint.project(gates)
    assert projected.masks["model.layers"].tolist() == [True, True, False, True]
    assert projected.masks["model.embed_tokens"].sum() == 48 and not projected.masks["model.embed_tokens"][::4].any()
    assert not projected.masks["model.layers.2.mlp.down_proj"].any()
    small = sliced(model, gates, projected.masks)
    assert small.config.hidden_size == 48 and len(small.model.layers) == 3
    assert projected.cost == linears_of(small) and 0 <= projected.sparsity - 0.6 <= 0.0015
    little = Constraint.of(model, gates, 0.1).project(gates)  # more than these alone take
    assert 0 <= little.sparsity - 0.1 <= 0.0015


def test_another_sparsity_can_be_had_on_the_way(four):
    model = four()
    gates = spread(Gates.of(model))
    constraint = Constraint.of(model, gates, {"flops": "50%"})
    assert constraint.target == pytest.approx(0.5, abs=1e-4)
    for sparsity in (0.0, 0.1, 0.33):
        assert 0 <= constraint.project(gates, sparsity=sparsity).sparsity - sparsity <= 0.0015
    with pytest.raises(ValueError, match="sparsity=1.5 is no share"):
        constraint.project(gates, sparsity=1.5)


@pytest.mark.parametrize("budget", [{"speedup": 1.4}, {"latency_ms": 0.06}])
def test_times_are_kept_by_the_table_that_was_measured_once(four, monkeypatch, budget):
    model = four()
    calls = []

    def measure(model, legal, *, batch_size, length):
        calls.append((batch_size, length))
        points = {
            name: tuple((unit, cost / 1e6) for unit, cost in enumerate(curve))
            for name, curve in table_of(model, step=4, jump=250).curves.items()
        }
        sizes = {width.name: width.num_units for width in legal.widths}
        return LatencyTable(batch_size, length, points, sizes, 0.020, ("it was loud",))

    monkeypatch.setattr(room, "measure_latency", measure)
    gates = spread(Gates.of(model))
    constraint = Constraint.of(model, gates, budget, length=32, batch=4)
    most = 60_000 if "latency_ms" in budget else constraint.cost.dense / 1.4
    assert constraint.cost.dense == 76_000 + 20_000 and constraint.target == pytest.approx(1 - most / 96_000, abs=1e-4)
    projected = constraint.project(gates)
    assert most - 500 <= projected.cost <= most and calls == [(4, 32)] and "it was loud" in constraint.notes
    assert constraint.project(gates, sparsity=0.1).sparsity == pytest.approx(0.1, abs=0.011)
    again = Constraint.of(model, gates, budget, length=32, batch=4, table=constraint.table)
    assert len(calls) == 1 and (again.target, again.notes) == (constraint.target, constraint.notes)
    assert all(np.array_equal(curve, constraint.cost.costs.curves[n]) for n, curve in again.cost.costs.curves.items())
    with pytest.raises(ValueError, match="table= holds times, and sparsity=0.2 is no budget in time"):
        Constraint.of(model, gates, 0.2, table=constraint.table)
    other = four(num_hidden_layers=2)
    with pytest.raises(ValueError, match="table= is of another model: model.layers.2.* units there, and none here"):
        Constraint.of(other, Gates.of(other), budget, table=constraint.table)
    with pytest.raises(ValueError, match="a budget in time knows"):
        Constraint.of(model, Gates.of(model, ALL), budget)


def test_parameters_of_the_whole_model_are_kept(four):
    model = four()
    gates = spread(Gates.of(model, ("heads", "channels", "hidden")))
    num = sum(parameter.numel() for parameter in model.parameters())
    projected = Constraint.of(model, gates, {"params": 0.7 * num}).project(gates)
    small = sliced(model, gates, projected.masks)
    assert projected.cost == sum(parameter.numel() for parameter in small.parameters())
    assert 0.69 * num <= projected.cost <= 0.7 * num


def test_budgets_out_of_reach_are_refused_before_training(four, llama):
    model = four()
    with pytest.raises(ValueError, match=r"no legal widths reach sparsity=0.97 within .*can be had"):
        Constraint.of(model, Gates.of(model), 0.97)
    with pytest.raises(ValueError, match=r"no legal widths reach sparsity=0.9 .*can be had.*smaller min_heads"):
        Constraint.of(model, Gates.of(model), 0.9, min_heads=2)
    wide = llama(intermediate_size=4000)
    with pytest.raises(ValueError, match=r"removes 97.0% of the params, and gates, .* 95.3% at most: ask for less, or"):
        Constraint.of(wide, Gates.of(wide), 0.97)
    assert Constraint.of(wide, Gates.of(wide), 0.97, gates_learn=False).target == pytest.approx(0.97)
    coarse = llama(num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"no legal widths reach sparsity=0.3"):
        Constraint.of(coarse, Gates.of(coarse, ("heads",)), 0.3, min_heads=1)
    with pytest.raises(ValueError, match="unknown budget 'weights'"):
        Constraint.of(model, Gates.of(model), {"weights": 0.5})


def test_a_budget_of_all_keeps_all(four):
    model = four()
    gates = Gates.of(model)
    constraint = Constraint.of(model, gates, 0.0)
    assert constraint.target == 0 and all(mask.all() for mask in constraint.project(gates).masks.values())
    assert constraint.cost.sparsity(gates.p_open()).item() == pytest.approx(1 - gates.chance(torch.tensor(OPEN)).item())
