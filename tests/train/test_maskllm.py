"""MaskLLM: the maths of drawn masks against brute force in float64, and the trainer on tiny models."""

import copy
import gc
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, TrainerCallback
from transformers.pytorch_utils import Conv1D

import sparsekit as sk
from sparsekit.errors import CheckpointError, NonFiniteError, PatternError, Unsupported
from sparsekit.masks import Mask
from sparsekit.nn.side import SideLinear
from sparsekit.patterns import NM
from sparsekit.plan import Plan
from sparsekit.targets import find_targets, weight_NK
from sparsekit.train.gumbel import (
    Draw,
    DrawnMaskLinear,
    candidates,
    gumbel_noise,
    initial_logits,
    possible,
    soft_choice,
    soft_mask,
)
from sparsekit.train.maskllm_config import MaskLLMConfig
from sparsekit.train.maskllm_trainer import MaskLLMTrainer
from sparsekit.train.trainer import SparseTrainer

VOCABULARY = 61


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Each run of a Trainer collects garbage: among the objects of these tests alone that is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def llama(seed=0, **changes):
    """A Llama whose down projections have 22 inputs: no multiple of 4."""
    torch.manual_seed(seed)
    settings = {"hidden_size": 20, "intermediate_size": 22, "num_hidden_layers": 2, "num_attention_heads": 2}
    settings |= {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "tie_word_embeddings": True}
    settings |= {"bos_token_id": 0, "eos_token_id": 1, "initializer_range": 0.2}
    return LlamaForCausalLM(LlamaConfig(**settings | changes)).eval()


def gpt2(seed=0):
    torch.manual_seed(seed)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=20,
            n_layer=1,
            n_head=2,
            n_positions=16,
            bos_token_id=0,
            eos_token_id=1,
            initializer_range=0.2,
        )
    ).eval()


def text(num=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(2, VOCABULARY, (num, 16), generator=generator))


def config(folder, **changes):
    settings = {"max_steps": 4, "per_device_train_batch_size": 4, "prior": "magnitude", "save_strategy": "no"}
    settings |= {"kd_weight": 0.0}
    settings |= {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True, "logging_steps": 1}
    return MaskLLMConfig(**settings | changes)


def train(model, folder, data=None, callbacks=None, resume=None, **changes):
    trainer = MaskLLMTrainer(model, config(folder, **changes), text() if data is None else data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


class AtStepEnd(TrainerCallback):
    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        self.do(state, kwargs["model"])


def recorder(into):
    """A callback that keeps the logits after each step."""
    return AtStepEnd(lambda state, model: into.append(logits_of(model)))


def logits_of(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if name.endswith("mask_logits")}


def assert_same_model(model, expected):
    for (name, now), (_, then) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(now, then), name


# --- candidates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,m", [(2, 4), (1, 4), (3, 5), (2, 8), (4, 8), (1, 2)])
def test_candidates_are_all_ways_to_keep_n_of_m(n, m):
    expected = [row for row in itertools.product([1, 0], repeat=m) if sum(row) == n]
    assert candidates(NM(n, m)).tolist() == [[bool(x) for x in row] for row in expected]


def test_candidates_are_in_the_order_of_the_paper():
    rows = ["".join(str(int(x)) for x in row) for row in candidates(NM(2, 4))]
    assert rows == ["1100", "1010", "1001", "0110", "0101", "0011"]


def test_too_many_candidates_are_refused():
    with pytest.raises(ValueError, match="'8:16' has 12870 masks a group.*'2:4'"):
        candidates(NM(8, 16))


@pytest.mark.parametrize("n,m,length", [(2, 4, 1), (2, 4, 2), (2, 4, 3), (1, 4, 3), (4, 8, 5), (3, 5, 5)])
def test_a_short_group_takes_only_candidates_that_keep_all_they_can(n, m, length):
    for row, fits in zip(candidates(NM(n, m)).tolist(), possible(NM(n, m), length).tolist(), strict=True):
        assert fits == (sum(row[:length]) == min(n, length))


# --- the first logits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n,m,K", [(2, 4, 12), (2, 4, 11), (2, 4, 9), (1, 4, 7), (4, 8, 13), (2, 4, 3)])
def test_prior_by_brute_force(n, m, K):
    pattern, rows = NM(n, m), 5
    keep = pattern.project(torch.randn(rows, K, generator=torch.Generator().manual_seed(0)))
    generator = torch.Generator().manual_seed(3)
    found = initial_logits(keep, pattern, lean=0.03, std=0.01, generator=generator)
    noise = torch.randn(rows, -(-K // m), len(candidates(pattern)), generator=torch.Generator().manual_seed(3)) * 0.01
    table = candidates(pattern).tolist()
    for row, group, c in itertools.product(range(rows), range(-(-K // m)), range(len(table))):
        members = [(k, table[c][k - group * m]) for k in range(group * m, min(group * m + m, K))]
        overlap = sum(bool(keep[row, k]) and kept for k, kept in members)
        expected = float(noise[row, group, c]) + (overlap - n * n / m) * 0.01 * 3
        if sum(kept for _, kept in members) < min(n, len(members)):
            expected = -float("inf")
        assert found[row, group, c] == pytest.approx(expected, abs=1e-7)


def test_a_strong_prior_is_the_likeliest_mask_and_none_is_not():
    pattern, generator = NM(2, 4), torch.Generator().manual_seed(0)
    keep = pattern.project(torch.randn(30, 38, generator=generator))
    linear = nn.Linear(38, 30)
    for lean, std, same in ((0.5, 0.01, True), (0.01, 0.0, True), (0.0, 0.01, False)):
        logits = initial_logits(keep, pattern, lean=lean, std=std, generator=generator)
        found = DrawnMaskLinear(linear, logits, pattern, Draw(), 0).keep()
        assert torch.equal(found, keep) == same
        assert pattern.count_violations(found) == 0


# --- noise -----------------------------------------------------------------------------------------------------------


def test_noise_is_standard_gumbel():
    from scipy.stats import gumbel_r, kstest  # slow to import, and two processes import this file below

    noise = gumbel_noise(torch.Size([200, 50, 6]), 7, torch.device("cpu"))
    assert kstest(noise.flatten().numpy()[::3], gumbel_r.cdf).pvalue > 1e-3


def test_noise_belongs_to_its_key_and_layer():
    shape, cpu = torch.Size([3, 2, 6]), torch.device("cpu")
    draw = Draw(key=(0, 0, 5, 1))
    first = gumbel_noise(shape, draw.seed(0), cpu)
    assert torch.equal(first, gumbel_noise(shape, Draw(key=(0, 0, 5, 1)).seed(0), cpu))
    others = [draw.seed(1)] + [
        Draw(key=key).seed(0) for key in ((1, 0, 5, 1), (0, 1, 5, 1), (0, 0, 6, 1), (0, 0, 5, 0))
    ]
    for seed in others:
        assert not torch.isclose(first, gumbel_noise(shape, seed, cpu)).any()


def test_an_exponential_of_zero_gives_no_infinite_noise(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda self, generator: self.zero_())
    assert gumbel_noise(torch.Size([2, 3]), 0, torch.device("cpu")).isfinite().all()


# --- soft masks and their gradients ----------------------------------------------------------------------------------


def soft_mask_by_hand(logits, noise, kappa, tau, pattern, K):
    """The formula one group at a time, in float64."""
    table = candidates(pattern).numpy().astype(np.float64)
    N, G, _ = logits.shape
    mask = np.zeros((N, G * pattern.m))
    for row, group in itertools.product(range(N), range(G)):
        z = (kappa * logits[row, group].double().numpy() + noise[row, group].double().numpy()) / tau
        y = np.exp(z - z.max())
        mask[row, group * pattern.m : (group + 1) * pattern.m] = (y / y.sum()) @ table
    return mask[:, :K]


@pytest.mark.parametrize("kappa,tau", [(100.0, 4.0), (500.0, 0.05), (1.0, 1.0)])
@pytest.mark.parametrize("n,m,K", [(2, 4, 12), (2, 4, 9), (2, 4, 3), (1, 4, 7), (4, 8, 13)])
def test_soft_mask_by_brute_force(n, m, K, kappa, tau):
    pattern, generator = NM(n, m), torch.Generator().manual_seed(0)
    keep = pattern.project(torch.randn(3, K, generator=generator))
    logits = initial_logits(keep, pattern, lean=0.01, std=0.01, generator=generator)
    choice = soft_choice(logits, kappa, tau, seed=11)
    found = soft_mask(choice, candidates(pattern).float(), K)
    noise = gumbel_noise(logits.shape, 11, logits.device)
    expected = torch.from_numpy(soft_mask_by_hand(logits, noise, kappa, tau, pattern, K))
    assert (found.double() - expected).abs().max() < 5e-5
    assert torch.allclose(found.sum(dim=1)[..., None], torch.tensor(float(K // m * n + min(n, K % m))))


def plain_formula(layer, x, weight, bias):
    """What the layer computes in training, by operations that autograd knows, in float64; and its leaves."""
    draw, logits = layer.draw, layer.mask_logits.detach().double().requires_grad_()
    x = x.detach().double().requires_grad_()
    noise = gumbel_noise(logits.shape, draw.seed(layer.index), logits.device).double()
    y = torch.softmax((draw.kappa * logits + noise) / draw.tau, dim=-1)
    masked = (y @ layer.table.double()).flatten(1)[:, : weight.shape[1]] * weight.double()
    return F.linear(x, masked, None if bias is None else bias.double()), masked.square().sum(), x, logits


@pytest.mark.parametrize("dtype,limit", [(torch.float32, 2e-5), (torch.bfloat16, 2e-2), (torch.float16, 3e-3)], ids=str)
@pytest.mark.parametrize(
    "n,m,K,N,lead", [(2, 4, 12, 5, (3, 2)), (2, 4, 9, 7, (6,)), (4, 8, 13, 3, (1, 4, 2)), (1, 4, 3, 1, (5,))]
)
def test_outputs_and_gradients_against_autograd_of_the_formula(n, m, K, N, lead, dtype, limit):
    torch.manual_seed(0)
    pattern = NM(n, m)
    linear = nn.Linear(K, N, bias=K != 13, dtype=dtype).requires_grad_(False)
    logits = initial_logits(
        pattern.project(torch.randn(N, K)), pattern, lean=0.01, std=0.01, generator=torch.Generator().manual_seed(0)
    )
    layer = DrawnMaskLinear(linear, logits, pattern, Draw(120.0, 1.5, (3, 0), keeps_energy=True), index=2).train()
    x = torch.randn(*lead, 2 * K, dtype=dtype)[..., ::2].requires_grad_()
    out = layer(x)
    energy = layer.take_energy()
    assert layer.take_energy() is None
    expected, expected_energy, x64, logits64 = plain_formula(layer, x, linear.weight, linear.bias)
    upstream = torch.randn(out.shape)
    (out.float() * upstream).sum().add(0.7 * energy).backward()
    (expected * upstream.double()).sum().add(0.7 * expected_energy).backward()
    pairs = [(out, expected), (energy, expected_energy), (x.grad, x64.grad), (layer.mask_logits.grad, logits64.grad)]
    for found, reference in pairs:
        error = (found.double() - reference).abs().max()
        assert error <= limit * reference.abs().max(), f"{error:.3g} of {reference.abs().max():.3g}"
    assert linear.weight.grad is None


def test_gradient_of_the_logits_by_finite_differences():
    torch.manual_seed(0)
    pattern, linear = NM(2, 4), nn.Linear(6, 2).double().requires_grad_(False)
    logits = initial_logits(
        pattern.project(torch.randn(2, 6)), pattern, lean=0.25, std=0.5, generator=torch.Generator().manual_seed(0)
    )
    layer = DrawnMaskLinear(linear, logits, pattern, Draw(2.0, 1.3), index=0).train()
    x = torch.randn(4, 6, dtype=torch.float64)
    layer(x).square().sum().backward()
    step = 1e-2
    for index in itertools.product(*map(range, logits.shape)):
        if not logits[index].isfinite():
            assert layer.mask_logits.grad[index] == 0
            continue
        values = []
        for side in (step, -step):
            with torch.no_grad():
                layer.mask_logits[index] += side
                values.append(float(layer(x).square().sum()))
                layer.mask_logits[index] -= side
        slope = (values[0] - values[1]) / (2 * step)
        assert float(layer.mask_logits.grad[index]) == pytest.approx(
            slope, abs=2e-3 * float(layer.mask_logits.grad.abs().max())
        )


def test_nothing_but_the_input_is_kept_for_the_backward_pass():
    layer = masked_linear(nn.Linear(32, 16))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(3, 32)
        layer(x)
    assert {id(t) for t in kept} == {id(t) for t in (x, layer.mask_logits, layer.weight, layer.table)}


def masked_linear(linear, pattern=None, **kwargs):
    pattern, linear = pattern or NM(2, 4), linear.requires_grad_(False)
    keep = pattern.project(weight_NK(linear).abs())
    logits = initial_logits(keep, pattern, lean=0.03, std=0.01, generator=torch.Generator().manual_seed(0))
    return DrawnMaskLinear(linear, logits, pattern, Draw(100.0, 1.0, keeps_energy=True), 0).train(
        kwargs.get("training", True)
    )


def test_in_eval_mode_the_likeliest_mask_counts_and_ties_go_to_the_first():
    layer = masked_linear(nn.Linear(10, 3), training=False)
    with torch.no_grad():
        layer.mask_logits[0] = 0.0
        layer.mask_logits[0, -1, ~possible(NM(2, 4), 2)] = -torch.inf
    keep = layer.keep()
    assert keep[0].tolist() == [True, True, False, False] * 2 + [True, True]
    x = torch.randn(4, 10)
    assert torch.equal(layer(x), F.linear(x, layer.weight * keep, layer.bias))
    assert NM(2, 4).count_violations(keep) == 0 and (keep.sum(dim=1) == 6).all()


def test_conv1d_is_seen_as_the_linear_layer_that_it_is():
    torch.manual_seed(0)
    conv = Conv1D(7, 12)
    conv.bias.data.normal_()
    linear = nn.Linear(12, 7)
    linear.weight.data.copy_(conv.weight.T)
    linear.bias.data.copy_(conv.bias)
    x = torch.randn(2, 3, 12)
    one, other = masked_linear(conv), masked_linear(linear)
    assert torch.equal(one.mask_logits, other.mask_logits)
    assert torch.allclose(one(x), other(x), atol=1e-6)
    assert one.weight.data_ptr() == conv.weight.data_ptr()


def test_autocast_keeps_masks_in_float32():
    layer = masked_linear(nn.Linear(64, 8))
    x = torch.randn(5, 64)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    exact = layer(x)
    assert (out.float() - exact).abs().max() < 0.02 * exact.abs().max()
    energies = [layer.energy]
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(layer.energy, energies[0])
    out.sum().backward()
    assert layer.mask_logits.grad.dtype == torch.float32


# --- training --------------------------------------------------------------------------------------------------------


def test_only_the_mask_is_learnt(tmp_path):
    model = llama()
    model.lm_head.requires_grad_(True)
    dense, modules = copy.deepcopy(model), dict(model.named_modules())
    trainer = train(model, tmp_path, learning_rate=1e-2)
    plan = trainer.plan()
    assert dict(model.named_modules()).keys() == modules.keys()
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert plan.masks.keys() == find_targets(model).keys() and plan.sparsity == pytest.approx(0.5, abs=0.02)
    assert not plan.made_by.updates_weights and plan.made_by.method == "maskllm"
    kept = {name: mask.keep for name, mask in plan.masks.items()}
    for (name, now), (_, then) in zip(model.named_parameters(), dense.named_parameters(), strict=True):
        layer = name.removesuffix(".weight")
        expected = then * kept[layer] if layer in kept else then
        assert torch.equal(now, expected), name
    for name, keep in kept.items():
        K = keep.shape[1]
        assert (keep.sum(dim=1) == K // 4 * 2 + min(2, K % 4)).all(), name
    assert trainer.prior.masks != plan.masks


def test_plan_says_the_same_as_applying_it(tmp_path):
    model = llama()
    dense = copy.deepcopy(model)
    plan = sk.prune_(model, config(tmp_path, learning_rate=1e-2), dataset=text(), progress=False)
    assert_same_model(model, sk.apply_(dense, plan))
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan


@pytest.mark.parametrize("make", [llama, gpt2])
def test_loss_falls_below_that_of_the_prior(make, tmp_path):
    model = make()
    data = text(8)
    loss = {}
    dense = copy.deepcopy(model)
    trainer = train(model, tmp_path, data, max_steps=30, learning_rate=1e-2, per_device_train_batch_size=8)
    batch = torch.stack(data)
    prior = sk.apply_(dense, Plan(trainer.prior.masks))
    with torch.no_grad():
        for name, each in (("prior", prior), ("learnt", model.eval())):
            loss[name] = float(each(input_ids=batch, labels=batch).loss)
    assert loss["learnt"] < loss["prior"] - 0.1, loss


def test_distillation_needs_no_second_copy_of_the_weights(tmp_path):
    model = llama()
    dense, seen = copy.deepcopy(model), {}

    def look(state, student):
        teacher = trainer.teacher.model
        seen["shared"] = all(
            one.data_ptr() == other.data_ptr()
            for one, other in zip(teacher.parameters(), dense_parameters(student), strict=True)
        )
        batch = torch.stack(text(2))
        with torch.no_grad():
            seen["same"] = torch.equal(teacher(input_ids=batch).logits, dense(input_ids=batch).logits)

    trainer = MaskLLMTrainer(model, config(tmp_path, kd_weight=1.0, max_steps=6), text(), callbacks=[AtStepEnd(look)])
    trainer.train()
    assert seen == {"shared": True, "same": True}
    losses = [entry["kd_loss"] for entry in trainer.state.log_history if "kd_loss" in entry]
    assert len(losses) == 6 and all(loss > 0 for loss in losses)
    assert trainer.state.log_history[0]["loss"] == pytest.approx(losses[0], rel=1e-4)


def dense_parameters(model):
    return [p for name, p in model.named_parameters() if not name.endswith("mask_logits")]


def test_schedules_are_linear_from_the_first_step_to_the_last(tmp_path):
    trainer = train(llama(), tmp_path, max_steps=5)
    logs = [entry for entry in trainer.state.log_history if "kappa" in entry]
    assert [entry["kappa"] for entry in logs] == pytest.approx([100, 200, 300, 400, 500])
    assert [entry["tau"] for entry in logs] == pytest.approx([4, 3.0125, 2.025, 1.0375, 0.05])
    rates = [entry["learning_rate"] for entry in logs]
    cosine = [0.1 + 0.9 * (1 + np.cos(np.pi * step / 5)) / 2 for step in range(5)]
    assert rates == pytest.approx([5e-4 * (2000 / 5) ** 0.5 * share for share in cosine], rel=1e-6)


def test_statistics_by_hand(tmp_path):
    found = {}

    def look(state, model):
        found.update(trainer.mask_statistics())
        found["kappa"] = trainer._draw.kappa
        found["logits"] = {name.removesuffix(".mask_logits"): pi for name, pi in logits_of(model).items()}

    trainer = MaskLLMTrainer(llama(), config(tmp_path, learning_rate=1e-2), text(), callbacks=[AtStepEnd(look)])
    trainer.train()
    table, changed, probabilities = candidates(NM(2, 4)), [], []
    for name, pi in found["logits"].items():
        prior = trainer.prior.masks[name].keep
        for row, group in itertools.product(range(pi.shape[0]), range(pi.shape[1])):
            members = prior[row, 4 * group : 4 * group + 4]
            changed.append(not torch.equal(table[pi[row, group].argmax()][: len(members)], members))
            probabilities.append(float(torch.softmax(found["kappa"] * pi[row, group].double(), 0).max()))
    assert found["changed_groups"] == pytest.approx(np.mean(changed))
    assert found["mask_probability"] == pytest.approx(np.mean(probabilities), rel=1e-5)
    assert 0 < found["changed_groups"] < 1
    last = [entry for entry in trainer.state.log_history if "kappa" in entry][-1]
    assert last["changed_groups"] == pytest.approx(found["changed_groups"])
    assert 0 < last["kept_energy"] < 1


@pytest.mark.parametrize("make", [llama, gpt2])
def test_resuming_gives_the_same_bit_for_bit(make, tmp_path):
    straight, resumed = [], []
    model, data = make(), text(20)
    again = copy.deepcopy(model)
    settings = {"max_steps": 6, "learning_rate": 1e-2, "save_strategy": "steps", "save_steps": 3}
    settings |= {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    first = train(model, tmp_path, data, [recorder(straight)], **settings)
    second = train(again, tmp_path, data, [recorder(resumed)], str(tmp_path / "checkpoint-3"), **settings)
    assert len(resumed) == 3
    for name, logits in straight[-1].items():
        assert torch.equal(logits, resumed[-1][name]), name
    assert first.plan() == second.plan()
    assert first.prior.masks == second.prior.masks
    assert_same_model(model, again)


def test_resuming_with_other_arguments_names_them(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 2}
    train(llama(), tmp_path, **settings)
    model = llama()
    dense = copy.deepcopy(model)
    with pytest.raises(CheckpointError, match="tau_start was 4.0, is 3.0"):
        train(model, tmp_path, resume=str(tmp_path / "checkpoint-2"), tau_start=3.0, **settings)
    assert_same_model(model, dense)


def test_gradient_checkpointing_changes_nothing(tmp_path):
    runs = []
    for checkpointing in (False, True):
        after, kept = [], []
        look = AtStepEnd(lambda state, model, kept=kept: kept.extend(energies_of(model)))
        options = {"gradient_checkpointing": checkpointing, "learning_rate": 1e-2}
        train(llama(), tmp_path, callbacks=[recorder(after), look], **options)
        runs.append(after[-1])
        assert len(kept) >= 14 and all(energy is None for energy in kept), "a graph stays in memory"
    for name, logits in runs[0].items():
        assert torch.equal(logits, runs[1][name]), name


def energies_of(model):
    return [module.energy for module in model.modules() if isinstance(module, DrawnMaskLinear)]


def test_micro_steps_add_up_to_one_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(Draw, "seed", lambda self, layer: 7 * self.key[2] + layer)  # whatever the micro-step
    runs = []
    for accumulation in (1, 4):
        after = []
        train(
            llama(),
            tmp_path,
            callbacks=[recorder(after)],
            max_steps=1,
            gradient_accumulation_steps=accumulation,
            per_device_train_batch_size=8 // accumulation,
            energy_weight=1.0,
            adam_epsilon=1.0,
            max_grad_norm=0.0,
            learning_rate=1.0,
        )
        runs.append(after[-1])
    for name, logits in runs[0].items():
        other = runs[1][name]
        usable = logits.isfinite()
        assert torch.equal(usable, other.isfinite())
        assert torch.allclose(logits[usable], other[usable], atol=1e-5), name


def test_each_micro_step_draws_anew(tmp_path, monkeypatch):
    keys = []
    seed = Draw.seed
    monkeypatch.setattr(Draw, "seed", lambda self, layer: keys.append((*self.key, layer)) or seed(self, layer))
    train(llama(), tmp_path, max_steps=2, gradient_accumulation_steps=2, per_device_train_batch_size=2, seed=5)
    assert len(keys) == len(set(keys)) == 2 * 2 * 14
    assert {key[:2] for key in keys} == {(5, 0)} and {key[2:4] for key in keys} == {(0, 0), (0, 1), (1, 0), (1, 1)}


def test_the_energy_term_pulls_towards_large_weights_and_fades(tmp_path):
    runs = {}
    for weight in (0.0, 10.0):
        trainer = train(llama(), tmp_path, energy_weight=weight, learning_rate=3e-2, max_steps=8, prior_lean=0.0)
        logs = [entry for entry in trainer.state.log_history if "kept_energy" in entry]
        runs[weight] = logs[-1]["kept_energy"]
        assert logs[0]["loss"] == pytest.approx(logs[0]["ce_loss"], rel=1e-5)
    assert runs[10.0] > runs[0.0] + 0.05, runs


def test_evaluation_sees_the_mask_as_it_would_be(tmp_path):
    model, data = llama(), text(8)
    trainer = MaskLLMTrainer(
        model, config(tmp_path, eval_strategy="steps", eval_steps=4, learning_rate=1e-2), text(), data
    )
    trainer.train()
    found = next(entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry)
    batch = torch.stack(data)
    with torch.no_grad():
        expected = float(model.eval()(input_ids=batch, labels=batch).loss)
    assert found == pytest.approx(expected, rel=1e-5)


def test_prior_from_a_method_leaves_weights_alone(tmp_path):
    model = llama()
    dense = copy.deepcopy(model)
    trainer = train(model, tmp_path, prior="sparsegpt", learning_rate=1e-12, prior_lean=1.0)
    assert trainer.plan().masks == trainer.prior.masks
    assert trainer.prior.made_by.method == "sparsegpt"
    for name, mask in trainer.plan().masks.items():
        assert torch.equal(model.get_submodule(name).weight, dense.get_submodule(name).weight * mask.keep), name


def test_a_plan_as_prior_may_keep_fewer(tmp_path):
    model = llama()
    masks = {name: Mask("1:4", NM(1, 4).project(weight_NK(layer).abs())) for name, layer in find_targets(model).items()}
    trainer = train(model, tmp_path, prior=Plan(masks), learning_rate=1e-12, prior_lean=1.0)
    for name, mask in trainer.plan().masks.items():
        assert str(mask.pattern) == "2:4" and (mask.keep & masks[name].keep).sum() == masks[name].keep.sum()


def test_layers_of_zeros_are_left_out(tmp_path):
    model = llama()
    nn.init.zeros_(model.model.layers[1].mlp.down_proj.weight)
    plan = train(model, tmp_path).plan()
    assert len(plan.masks) == 13 and any("every weight is zero already" in note for note in plan.notes)


def test_a_layer_in_two_places_is_masked_in_both(tmp_path):
    model = llama()
    model.model.layers[1].mlp.up_proj = model.model.layers[0].mlp.up_proj
    seen = []
    layers = model.model.layers
    look = AtStepEnd(lambda state, _: seen.append(layers[0].mlp.up_proj is layers[1].mlp.up_proj))
    plan = train(model, tmp_path, callbacks=[look]).plan()
    assert seen == [True] * 4 and len(plan.masks) == 13
    assert layers[0].mlp.up_proj is layers[1].mlp.up_proj and type(layers[0].mlp.up_proj) is nn.Linear


@pytest.mark.parametrize("pattern", ["1:4", "4:8", "2:3"])
def test_other_patterns(pattern, tmp_path):
    model = llama()
    trainer = train(model, tmp_path, pattern=pattern, max_steps=2)
    plan = trainer.plan()
    assert {str(mask.pattern) for mask in trainer.prior.masks.values()} == {pattern}
    n, m = map(int, pattern.split(":"))
    for name, mask in plan.masks.items():
        K = mask.shape[1]
        assert (mask.keep.sum(dim=1) == K // m * n + min(n, K % m)).all(), name


def test_in_bf16_losses_are_near_those_in_fp32(tmp_path):
    runs = [train(llama(), tmp_path, bf16=bf16, max_steps=6, kd_weight=0.5) for bf16 in (False, True)]
    for key in ("ce_loss", "kd_loss", "kept_energy"):
        exact, rounded = ([entry[key] for entry in run.state.log_history if key in entry] for run in runs)
        assert rounded == pytest.approx(exact, rel=0.02) and rounded != exact


def test_a_run_that_is_cut_short_says_so(tmp_path):
    def stop(state, model):
        trainer.control.should_training_stop = state.global_step == 2

    trainer = MaskLLMTrainer(llama(), config(tmp_path), text(), callbacks=[AtStepEnd(stop)])
    trainer.train()
    assert trainer.plan().notes[-1].startswith("training ended at step 2")
    assert not train(llama(), tmp_path).plan().notes[1:]


# --- failures --------------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def __init__(self, error):
        self.error = error

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise self.error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=repr)
def test_whatever_ends_it_the_model_is_as_it_was(error, tmp_path):
    model = llama()
    model.model.norm.requires_grad_(False)
    dense, modules = copy.deepcopy(model), dict(model.named_modules())
    with pytest.raises(type(error)):
        train(model, tmp_path, callbacks=[Stop(error)], prior="sparsegpt", kd_weight=0.5)
    assert all(module is modules[name] for name, module in model.named_modules())
    wanted = {name: p.requires_grad for name, p in dense.named_parameters()}
    assert {name: p.requires_grad for name, p in model.named_parameters()} == wanted
    assert_same_model(model, dense)


def test_nan_stops_the_run_and_leaves_the_model(tmp_path):
    model = llama()
    modules = dict(model.named_modules())
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(NonFiniteError, match="loss is nan at step 1"):
        sk.prune_(model, config(tmp_path), dataset=text(), progress=False)
    assert all(module is modules[name] for name, module in model.named_modules())


def test_no_mask_before_training(tmp_path):
    with pytest.raises(ValueError, match=r"call train\(\) first"):
        MaskLLMTrainer(llama(), config(tmp_path), text()).plan()


@pytest.mark.parametrize(
    "changes,message",
    [
        ({"kappa_start": 0.0}, "kappa_start=0 must be greater than 0, as 100"),
        ({"kappa_end": -1.0}, "kappa_end=-1.0 must be a number"),
        ({"tau_end": 0.0}, "tau_end=0 must be greater than 0, as 0.05"),
        ({"tau_start": float("nan")}, "tau_start=nan"),
        ({"logit_std": -0.1}, "logit_std=-0.1 must be"),
        ({"temperature": 0.0}, "temperature=0 must be greater than 0"),
        ({"prior_lean": -3.0}, "prior_lean=-3.0"),
        ({"energy_weight": -1e-5}, "energy_weight=-1e-05"),
        ({"learning_rate": "high"}, "learning_rate='high' must be a number"),
        ({"kd_weight": 1.5}, "kd_weight=1.5 is a share"),
        ({"kd_weight": 0.0, "ce_weight": 0.0}, "nothing to learn from"),
        ({"kd_kind": "sideways"}, "forward_kl"),
        ({"prior": "maskllm"}, "sparsegpt.*A Plan will do"),
        ({"pattern": "8:16"}, "12870 masks a group"),
        ({"pattern": "64x64"}, "N:M patterns"),
        ({"pattern": "4:4"}, "0 < N < M"),
        ({"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}}, "use_reentrant"),
    ],
    ids=str,
)
def test_bad_arguments(changes, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **changes)


def test_bad_priors(tmp_path):
    model = llama()
    good = {name: Mask("2:4", NM(2, 4).project(weight_NK(layer))) for name, layer in find_targets(model).items()}
    name = "model.layers.0.mlp.up_proj"
    for masks, error, message in [
        ({key: mask for key, mask in good.items() if key != name}, ValueError, f"no mask for {name}"),
        (good | {name: Mask("2:4", torch.zeros(3, 4, dtype=torch.bool))}, ValueError, r"is \(3, 4\), the weight"),
        (good | {name: Mask("3:4", torch.arange(20).repeat(22, 1) % 4 < 3)}, PatternError, f"of {name} breaks 2:4"),
    ]:
        dense = copy.deepcopy(model)
        with pytest.raises(error, match=message):
            train(model, tmp_path, prior=Plan(masks))
        assert_same_model(model, dense)


def test_layers_that_can_take_no_mask_are_named(tmp_path):
    model = llama()
    model.model.layers[0].mlp.up_proj = SideLinear(20, 22, bias=False)
    with pytest.raises(ValueError, match="model.layers.0.mlp.up_proj, a SideLinear, can take no learnt mask.*ignore"):
        MaskLLMTrainer(model, config(tmp_path), text())


def test_sharding_is_refused(tmp_path, monkeypatch):
    build = SparseTrainer.__init__

    def sharded(self, *args, **kwargs):
        build(self, *args, **kwargs)
        self.is_fsdp_enabled = True

    monkeypatch.setattr(SparseTrainer, "__init__", sharded)
    with pytest.raises(Unsupported, match="cannot be sharded: use DDP"):
        MaskLLMTrainer(llama(), config(tmp_path), text())


# --- several processes -----------------------------------------------------------------------------------------------

TWO_PROCESSES = """
import os
import pathlib
import sys
import torch
sys.path[:0] = {path!r}
from {module} import AtStepEnd, config, llama, logits_of, text
from sparsekit.train.maskllm_trainer import MaskLLMTrainer
found = []
trainer = MaskLLMTrainer(llama(), config({folder!r}, max_steps=3, learning_rate=1e-2, per_device_train_batch_size=2),
                         text(), callbacks=[AtStepEnd(lambda state, model: found.append(logits_of(model)))])
trainer.train()
flat = torch.cat([pi.flatten() for pi in found[-1].values()]).nan_to_num(neginf=-1)
both = [torch.empty_like(flat) for _ in range(2)]
torch.distributed.all_gather(both, flat)
assert torch.equal(*both), "logits differ"
keys = [torch.zeros(1, dtype=torch.int64) for _ in range(2)]
torch.distributed.all_gather(keys, torch.tensor([trainer._draw.key[1]]))
assert sorted(int(key) for key in keys) == [0, 1], keys
pathlib.Path({folder!r} + "/../rank" + os.environ["RANK"]).write_text(repr(float(flat.double().sum())))
"""


@pytest.mark.timeout(900)  # two processes start anew, which takes its time on a busy machine
def test_two_processes_learn_one_mask_from_noise_of_their_own(tmp_path):
    """Equal logits on both ranks after DDP's average, from keys that differ by the rank."""
    script = tmp_path / "two.py"
    here = os.path.dirname(__file__)
    script.write_text(TWO_PROCESSES.format(path=[here], module="test_maskllm", folder=str(tmp_path / "out")))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(script)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    first, second = ((tmp_path / f"rank{rank}").read_text() for rank in range(2))
    assert first == second
