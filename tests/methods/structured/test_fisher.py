"""Fisher information of masks against finite differences, and its searches against all there is to search."""

import itertools

import pytest
import torch

import sparsekit as sk
from sparsekit.methods.structured import scaled
from sparsekit.methods.structured.fisher import rearranged
from sparsekit.methods.structured.recover import tune_scales
from sparsekit.prune import prune_
from tests.archs.tiny_models import tiny_model, token_samples


def labelled(num=12):
    return [{"input_ids": sample.tolist(), "label": index % 3} for index, sample in enumerate(token_samples(num))]


def job_of(model, dataset, batch_size, **fields):
    """The job that the engine makes for the method, caught at work."""
    caught = []

    class Caught(sk.Fisher):
        def count(self, job):
            caught.append(job)
            return super().count(job)

    plan = prune_(
        model, Caught(**fields), dataset=dataset, batch_size=batch_size, num_calibration_samples=99, progress=False
    )
    return caught[0], plan


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_gradients_are_those_of_finite_differences(family):
    model = tiny_model(family).double()
    dataset = labelled(4) if family == "bert" else token_samples(4)
    job, _ = job_of(tiny_model(family).double(), dataset, 2, sparsity=0.5)
    for width in job.widths:
        gradients = job.gradients[width.name]
        assert gradients.shape == (2, width.num_units)
        assert torch.equal(job.scores[width.name], gradients.square().sum(0))
        unit, step = width.num_units // 2, 1e-5 if family == "bert" else 1e-2  # a Llama works in float32 inside
        places = slice(unit * width.columns, (unit + 1) * width.columns)
        for row, batch in enumerate(job.labelled):
            losses = []
            for sign in (1, -1):
                mask = torch.ones(width.num_units * width.columns, dtype=torch.float64)
                mask[places] += sign * step
                hook = model.get_submodule(width.name).register_forward_pre_hook(lambda m, args, k=mask: args[0] * k)
                with torch.no_grad():
                    losses.append(float(model(**batch).loss))
                hook.remove()
            expected = (losses[0] - losses[1]) / (2 * step)
            assert float(gradients[row, unit]) == pytest.approx(
                expected, rel=1e-4 if family == "bert" else 0.02, abs=1e-4
            )


def test_the_search_finds_the_best_there_is():
    """Two layers of two heads and 36 filters: all numbers of each that the budget pays for, and at least one."""
    job, plan = job_of(tiny_model("bert"), labelled(), 4, constraints={"flops": "60%"}, min_channels=1, rearrange=False)
    sums = [torch.cat((torch.zeros(1), job.scores[w.name].sort(descending=True).values.cumsum(0))) for w in job.widths]
    units = [int(job.solver.costs.curves[w.name][1]) for w in job.widths]
    least, most = job.solver.budget.limits(job.solver.costs)
    best = max(
        sum(float(values[number]) for values, number in zip(sums, numbers, strict=True))
        for numbers in itertools.product(range(1, 3), range(1, 37), range(1, 3), range(1, 37))
        if least <= sum(number * unit for number, unit in zip(numbers, units, strict=True)) <= most
    )
    kept = {name: cut.kept for name, cut in plan.cuts.items()}
    found = sum(float(job.scores[w.name][kept.get(w.name, slice(None))].sum()) for w in job.widths)
    assert found == pytest.approx(best, rel=1e-6)


def test_rearrangement_never_raises_the_interaction_and_finds_the_best_of_a_few():
    better = 0
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        g = torch.randn(5, 8, generator=generator, dtype=torch.float64)
        g[:, 3] = -g[:, 6] + 0.05 * torch.randn(5, generator=generator, dtype=torch.float64)  # these two cancel
        kept = g.square().sum(0).sort(descending=True).indices[:5].sort().values

        def lost(kept, g=g):
            gone = [unit for unit in range(8) if unit not in kept]
            return float(g[:, gone].sum(1).square().sum())

        found = rearranged(kept, g).tolist()
        assert len(found) == 5 and found == sorted(set(found))
        assert lost(found) <= lost(kept.tolist()) + 1e-12
        best = min(lost(each) for each in itertools.combinations(range(8), 5))
        better += lost(found) < lost(kept.tolist())
        assert lost(found) <= 4 * best + 1e-9
    assert better >= 6


@pytest.mark.parametrize("kept", [[], [0, 1, 2]])
def test_nothing_to_rearrange(kept):
    assert rearranged(torch.tensor(kept, dtype=torch.long), torch.ones(2, 3)).tolist() == kept


def test_heads_of_the_first_block_keep_their_scale():
    model, dense = tiny_model("bert"), tiny_model("bert")
    plan = prune_(model, sk.Fisher(sparsity=0.4), dataset=labelled(), progress=False, num_calibration_samples=12)
    changed = {}
    for name, cut in plan.cuts.items():
        columns = cut.kept if cut.kind == "channels" else torch.cat([torch.arange(10) + 10 * u for u in cut.kept])
        new, old = model.get_submodule(name).weight[:, columns], dense.get_submodule(name).weight[:, columns]
        changed[name] = not torch.equal(new, old)
        ratio = (new / old).reshape(20, len(cut.kept), -1)
        assert bool((ratio.std(dim=(0, 2)) < 1e-4).all()), "one scale for each unit"
    firsts = [name for name in changed if "layer.0.attention" in name]
    assert not any(changed[name] for name in firsts) and any(changed[name] for name in changed if name not in firsts)
    assert plan.made_by.num_samples == 12 and plan.made_by.updates_weights


def test_heads_are_tuned_with_an_offset_and_on_all_tokens(monkeypatch):
    """As in the official code: filters are tuned without, and those of the last layer on the first token alone."""
    calls = []

    def caught(moments, w_NK, bias, kept, columns, *, offset):
        calls.append((columns, offset, float(moments.weight)))
        return tune_scales(moments, w_NK, bias, kept, columns, offset=offset)

    monkeypatch.setattr(scaled, "tune_scales", caught)
    job, _ = job_of(tiny_model("bert"), labelled(), 4, sparsity=0.4, recovery="scale")
    tokens = sum(len(row["input_ids"]) for row in labelled())
    heads, filters = ([call for call in calls if (call[0] > 1) is which] for which in (True, False))
    assert heads and filters and all(offset for _, offset, _ in heads) and not any(offset for _, offset, _ in filters)
    assert {weight for *_, weight in heads} == {tokens} and [weight for *_, weight in filters] == [tokens, 12]


def test_a_failed_tuning_is_told_and_ends_there(monkeypatch):
    from sparsekit.methods.structured import recover

    calls = []

    def failing(A, b, damp):
        calls.append(len(b))
        return torch.zeros_like(b), recover.Stop.ITERATIONS if len(calls) == 2 else recover.Stop.SOLVED

    monkeypatch.setattr(recover, "lsmr", failing)
    plan = prune_(
        tiny_model("bert"), sk.Fisher(sparsity=0.3), dataset=labelled(), progress=False, num_calibration_samples=12
    )
    (note,) = [note for note in plan.notes if "tuning" in note]
    assert "tuning of scales ended at bert.encoder.layer.1.attention.output.dense" in note and "iterations" in note
    assert len(calls) == 2


def test_a_model_without_a_loss_is_refused():
    model = tiny_model("bert").bert
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(ValueError, match="BertModel gives no loss for labels"):
        prune_(model, "fisher", dataset=labelled(), progress=False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
