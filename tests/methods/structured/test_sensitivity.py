"""Sensitivity is measured: the curves are the divergences of models that were really cut so."""

import copy

import pytest
import torch

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.calibration import load_samples
from sparsekit.methods.structured.base import Job
from sparsekit.methods.structured.moments import Moments
from sparsekit.methods.structured.removal import removals
from sparsekit.methods.structured.sensitivity import SHARES, interpolated, sensitivity_curves
from sparsekit.prune import prune_
from sparsekit.targets import set_weight_NK_
from tests.archs.tiny_models import tiny_model, token_samples


class Bar:
    def advance(self, *_):
        pass


def job_of(model, num=16):
    batches = load_samples(token_samples(num), model, num_samples=num).batches
    return Job(model, find_widths(model), batches, None, Bar())


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
def test_curves_are_those_of_models_that_were_cut(family):
    model = tiny_model(family)
    job = job_of(model)
    least = {width.name: 1 for width in job.widths}
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    curves = sensitivity_curves(job, least, 0.01)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    width = job.widths[-1]
    judging, fitting = job.batches[::8], [batch for index, batch in enumerate(job.batches) if index % 8]
    reader = job.reader(width)
    moments = Moments(*reversed(reader.w_NK.shape), torch.device("cpu"))
    handle = reader.layer.register_forward_hook(
        lambda m, args, output: moments.add(
            args[0].reshape(-1, args[0].shape[-1]), output.reshape(-1, output.shape[-1])
        )
    )
    with torch.no_grad():
        for batch in fitting:
            model(**batch)
    handle.remove()
    for number in (round(SHARES[0] * width.num_units), round(SHARES[2] * width.num_units), 1):
        (removal,) = removals(moments, reader.w_NK, reader.bias, width.columns, [number], 0.01)
        cut = copy.deepcopy(model)
        layer = cut.get_submodule(width.name)
        set_weight_NK_(layer, removal.reader.weight)
        if removal.reader.bias is not None:
            layer.bias.data.copy_(removal.reader.bias)
        total, count = 0.0, 0
        with torch.no_grad():
            for batch in judging:
                old, new = (each(**batch).logits.log_softmax(-1).flatten(0, -2).double() for each in (model, cut))
                total += float((old.exp() * (old - new)).sum())
                count += len(old)
        assert float(curves[width.name][number]) == pytest.approx(total / count, rel=0.02, abs=1e-7)


@pytest.mark.parametrize("family", ["bert", "llama"])
def test_more_units_never_cost_more(family):
    job = job_of(tiny_model(family))
    for width in job.widths:
        curve = sensitivity_curves(job, {w.name: min(8, w.num_units) for w in job.widths}, 0.01)[width.name]
        assert curve.shape == (width.num_units + 1,) and curve[-1] == 0 and bool((curve.diff() <= 0).all())


def test_a_curve_goes_through_what_was_measured():
    measured = {2: 8.0, 4: 2.0, 7: 0.25, 10: 0.0}
    curve = interpolated(measured, 10)
    assert all(float(curve[n]) == pytest.approx(level) for n, level in measured.items())
    assert float(curve[3]) == pytest.approx(4.0) and float(curve[1]) == pytest.approx(16.0)
    assert float(curve[8]) == pytest.approx(0.25 * 2 / 3) and float(curve[9]) == pytest.approx(0.25 / 3)
    noisy = interpolated({1: 0.1, 2: 0.3, 3: 0.2, 4: 0.0}, 4)
    assert noisy.tolist() == pytest.approx([0.3, 0.3, 0.3, 0.2, 0.0])
    assert interpolated({1: 5.0, 2: 0.0}, 2).tolist() == pytest.approx([10.0, 5.0, 0.0])
    assert interpolated({3: 0.0}, 3).tolist() == pytest.approx([0.0] * 4, abs=1e-9)


def test_what_matters_is_spared():
    """A block that hardly adds anything is cut first, however large its weights are next to their inputs."""
    model = tiny_model("llama")
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight.mul_(1e-3)
        model.model.layers[1].mlp.up_proj.weight.mul_(10)
    plan = prune_(
        model,
        sk.Contribution(constraints={"params": 1 - 20 * 60 / 9120}, min_channels=1),
        dataset=token_samples(16),
        num_calibration_samples=16,
        progress=False,
    )
    left = {name: len(cut.kept) for name, cut in plan.cuts.items()}
    assert left["model.layers.1.mlp.down_proj"] < 22 and "model.layers.0.mlp.down_proj" not in left
