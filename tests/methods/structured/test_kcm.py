"""KCM and the scales it ends with, against a second implementation of the paper, written down plainly and slowly."""

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import lsmr

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.methods.structured import kcm
from sparsekit.methods.structured.inputs import InputSums
from sparsekit.prune import prune_
from tests.archs.tiny_models import tiny_model, token_samples

LENGTH = 24
KEPT = 0.8
LEAST = 8


def model_of(family):
    """In float64, with norms and biases as training leaves them."""
    model = tiny_model(family).double()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


def r2(x_Nd):
    """Multiplicative updates from 1/N, until the sum of C moves by less than 1 %; sigma 1."""
    x = x_Nd.numpy()
    K = np.exp(-((x[:, None] - x[None]) ** 2).sum(-1))
    C = np.full_like(K, 1 / len(K))
    while True:
        before = C.sum()
        C = C * np.sqrt(K / (K @ C))
        if abs(C.sum() - before) < 0.01 * before:
            return np.diag(C)


def unit_range(score):
    return (score - score.min()) / (score.max() - score.min())


def readers_of(model):
    return [width.name for width in find_widths(model) if width.kind == "channels"]


def inputs_of(model, name, batches, masks=None):
    """Inputs and outputs of a reader, and the sum before the norm after it, in a model with masks on its readers."""
    found, hooks = [], []
    for reader, mask in (masks or {}).items():
        hooks.append(
            model.get_submodule(reader).register_forward_pre_hook(lambda m, args, k=mask: (args[0] * k, *args[1:]))
        )
    hooks.append(model.get_submodule(name).register_forward_pre_hook(lambda m, args: found.append(args[0])))
    norm = model.get_submodule(name.rpartition(".")[0]).LayerNorm
    sums = []
    hooks.append(norm.register_forward_pre_hook(lambda m, args: sums.append(args[0])))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for hook in hooks:
        hook.remove()
    return torch.cat(found), torch.cat(sums)


def chosen(model, scores, share):
    """The filters of all layers with the largest scores, as many as the FLOPs pay for; each layer keeps eight."""
    d, heads, head = 20, 2, 10
    per_head = 4 * LENGTH * d * head + 2 * LENGTH**2 * head
    per_filter = 2 * LENGTH * d
    total = len(scores) * (heads * per_head + 36 * per_filter)
    num = int((share * total - len(scores) * heads * per_head) // per_filter)
    masks = {}
    for name, score in scores.items():
        masks[name] = np.zeros(36)
        masks[name][np.argsort(-score)[:LEAST]] = 1
    ranked = sorted(((score[j], name, j) for name, score in scores.items() for j in range(36)), reverse=True)
    for _, name, j in ranked:
        if masks[name][j] == 0 and sum(mask.sum() for mask in masks.values()) < num:
            masks[name][j] = 1
    return {name: torch.tensor(mask) for name, mask in masks.items()}


def tuned(model, masks, teacher_masks, batches):
    """Scales of the kept filters, from the bottom: least squares over tokens and outputs, all rows written out."""
    masks = dict(masks)
    for name in masks:
        student, sums = inputs_of(model, name, batches, masks)
        _, wanted = inputs_of(model, name, batches, teacher_masks)
        layer = model.get_submodule(name)
        last = name == list(masks)[-1]  # of whose outputs the classifier reads the first token alone
        pick = (lambda x: x[:, 0]) if last else (lambda x: x.flatten(0, 1))
        kept = masks[name].nonzero().flatten()
        a, W = pick(student)[:, kept], layer.weight.detach()[:, kept]
        with torch.no_grad():
            residual = pick(sums - layer(student * masks[name]))
        A = torch.einsum("tj,nj->tnj", a, W).flatten(0, 1).numpy()
        b = (pick(wanted) - layer.bias.detach() - residual).flatten().numpy()
        M, v = A.T @ A, A.T @ b
        masks[name][kept] = 1 + torch.tensor(lsmr(M, v - M.sum(1), damp=1.0, maxiter=5 * len(M))[0])
    return masks


@pytest.mark.parametrize("form", ["fixed_point", "density"])
def test_the_whole_method_is_that_of_the_paper(form):
    data = token_samples(16, LENGTH)
    batches = [torch.stack(data[i : i + 4]) for i in range(0, 16, 4)]
    dense, model = model_of("bert"), model_of("bert")
    scores = {}
    for name in readers_of(dense):
        a, _ = inputs_of(dense, name, batches)
        W = dense.get_submodule(name).weight.detach().T
        density = np.exp(-torch.cdist(W, W).square().numpy()).mean(0) ** -0.5
        scores[name] = unit_range(r2(W) if form == "fixed_point" else density) * unit_range(
            a.abs().mean(dim=(0, 1)).numpy()
        )
    config = sk.KCM(constraints={"flops": KEPT}, r2=form)
    plan = prune_(model, config, dataset=data, batch_size=4, num_calibration_samples=16, progress=False)
    masks = chosen(dense, scores, KEPT)
    assert {name: cut.kept.tolist() for name, cut in plan.cuts.items()} == {
        name: mask.nonzero().flatten().tolist() for name, mask in masks.items()
    }
    assert not [note for note in plan.notes if "tuning" in note]
    expected = tuned(dense, masks, chosen(dense, scores, KEPT**0.5), batches)
    for name, scales in expected.items():
        assert float((scales[scales != 0] - 1).abs().max()) > 0.02, "there was something to tune"
        weight = dense.get_submodule(name).weight * scales
        torch.testing.assert_close(model.get_submodule(name).weight, weight, rtol=2e-4, atol=2e-4)


def test_d2_alone_and_r2_alone_are_the_two_factors():
    model = tiny_model("bert")
    reader = next(width for width in find_widths(model) if width.kind == "channels")
    sums = InputSums(36, torch.device("cpu"))
    sums.add(torch.randn(50, 36, generator=torch.Generator().manual_seed(0)))
    found = {}
    from sparsekit.methods.structured.base import Reader

    for r2_form, d2_form in (("fixed_point", "none"), ("none", "abs"), ("fixed_point", "abs")):
        config = sk.KCM(r2=r2_form, d2=d2_form)
        found[r2_form, d2_form] = config.unit_scores(Reader(reader, model.get_submodule(reader.name)), sums)
    both = found["fixed_point", "none"] * found["none", "abs"]
    torch.testing.assert_close(found["fixed_point", "abs"], both)
    assert float(both.min()) == 0 and all(float(each.max()) == 1 for each in list(found.values())[:2])


@pytest.mark.parametrize("looked_at", [5, 512])
def test_a_kernel_that_tells_nothing_apart_is_told(looked_at, monkeypatch):
    monkeypatch.setattr(kcm, "_LOOKED_AT", looked_at)

    def notes(scale, **fields):
        model = tiny_model("bert")
        with torch.no_grad():
            for layer in model.bert.encoder.layer:
                layer.output.dense.weight.mul_(scale / layer.output.dense.weight.norm(dim=0).mean())
        return prune_(
            model, sk.KCM(constraints={"params": "85%"}, **fields), dataset=token_samples(8), progress=False
        ).notes

    assert any("sigma=1 does not fit 2 of 2 layers: of bert.encoder.layer.0.output.dense" in n for n in notes(8.0))
    assert any("sigma=1 does not fit" in note for note in notes(0.05))
    assert not any("sigma" in note for note in [*notes(0.7), *notes(8.0, sigma=None), *notes(8.0, r2="none")])
