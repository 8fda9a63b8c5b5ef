"""AST as a whole: the run of the definition in float64, masks at any time, starts, branches, and what is refused."""

import copy
import gc
import json
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import sparsekit as sk
from sparsekit.errors import NonFiniteError, PatternError, Unsupported
from sparsekit.masks import Mask
from sparsekit.patterns import NM, Unstructured
from sparsekit.plan import Plan
from sparsekit.targets import weight_NK
from sparsekit.train import ast_trainer
from sparsekit.train.ast_trainer import ASTTrainer
from sparsekit.train.trainer import TrainingDiverged, last_checkpoint

STEPS, WARMUP, FREEZE = 12, 3, 9
"""Of the runs that the fixture `ast` describes."""


def masked_layers(model):
    return {name: module for name, module in model.named_modules() if "_proj" in name or "c_" in name.split(".")[-1]}


def assert_legal(keep, n=2, m=4):
    """Every group keeps n, the last one of a row as many as it has, up to n."""
    assert keep.dtype == torch.bool
    for start in range(0, keep.shape[1], m):
        group = keep[:, start : start + m]
        assert (group.sum(1) == min(n, group.shape[1])).all()


def logits_of(model, ids):
    with torch.no_grad():
        return model.eval()(ids).logits


def brute_mask(scores, n=2, m=4):
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for row in range(scores.shape[0]):
        for start in range(0, scores.shape[1], m):
            columns = range(start, min(start + m, scores.shape[1]))
            for column in sorted(columns, key=lambda k: (-scores[row, k].item(), k))[:n]:
                keep[row, column] = True
    return keep


class Spy(ASTTrainer):
    """Writes down, for each micro-step, what went in and what the masks were; for each step, lambda and the rate."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.micro_steps, self.steps, self.follows, self.masks_seen = [], [], [], []
        for module in masked_layers(self.model).values():
            module.register_forward_pre_hook(lambda module, args: self.forward_with(module))
        self.in_this_micro_step = []

    def forward_with(self, module):
        self.in_this_micro_step.append((id(module), module.weight.detach() != 0))

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.in_this_micro_step = []
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.micro_steps.append((self.state.global_step, inputs["input_ids"].clone(), self.in_this_micro_step))
        return loss

    def _before_step(self):
        super()._before_step()
        self.steps.append((self.masked_optimizer.masked_decay, self.masked_optimizer.param_groups[0]["lr"]))
        self.follows.append(self.masked_optimizer.follow)

    def _after_step(self):
        super()._after_step()
        self.masks_seen.append(self.masked_optimizer.keep())


# --- the run of the definition --------------------------------------------------------------------------------------


class InFloat64:
    """The method written down once more, in float64, for one model; slow."""

    def __init__(self, model, kind, hysteresis, weight_decay):
        self.model, self.teacher = copy.deepcopy(model).double(), copy.deepcopy(model).double()
        self.kind, self.hysteresis, self.weight_decay, self.t = kind, hysteresis, weight_decay, 0
        self.masked = {f"{name}.weight" for name in masked_layers(model)}
        parameters = dict(self.model.named_parameters())
        self.W = {name: parameter.detach().clone() for name, parameter in parameters.items()}
        self.M = {name: torch.zeros_like(w) for name, w in self.W.items()}
        self.V = {name: torch.zeros_like(w) for name, w in self.W.items()}
        self.keep = {name: brute_mask(self.W[name].abs()) for name in self.masked}

    def loss(self, ids, kd_weight, ce_weight, T):
        z, teacher = self.model(ids).logits[:, :-1], self.teacher(ids).logits[:, :-1].detach()
        ce = F.cross_entropy(z.flatten(0, 1), ids[:, 1:].flatten())
        log_q, log_p = F.log_softmax(teacher / T, -1), F.log_softmax(z / T, -1)
        kl = (log_q.exp() * (log_q - log_p)).sum(-1).mean()
        return kd_weight * T * T * kl + ce_weight * ce

    def step(self, micro_batches, lr, strength, kd_weight, T=2.0, max_norm=1.0):
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                kept = self.keep.get(name)
                parameter.copy_(self.W[name] if kept is None else torch.where(kept, self.W[name], 0.0))
        self.model.zero_grad()
        losses = [self.loss(ids, kd_weight, 1 - kd_weight, T) / len(micro_batches) for ids in micro_batches]
        sum(losses).backward()
        gradients = {name: parameter.grad for name, parameter in self.model.named_parameters()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in gradients.values()))
        self.t += 1
        for name, g in gradients.items():
            self.update(name, g * min(1.0, max_norm / (norm + 1e-6)), lr, strength)
        return float(sum(losses).detach())

    def update(self, name, g, lr, strength, b1=0.9, b2=0.95, eps=1e-8):
        masked = name in self.masked

        def removed():
            return torch.where(self.keep[name], 0.0, self.W[name])

        if masked and self.kind == "gradient":
            g = g + strength * removed()
        if g.dim() >= 2:
            self.W[name] = self.W[name] * (1 - lr * self.weight_decay)
        self.M[name] = b1 * self.M[name] + (1 - b1) * g
        u, squared = self.M[name] / (1 - b1**self.t), g
        if masked and self.kind == "paper":
            u = squared = u + strength * removed()
        self.V[name] = b2 * self.V[name] + (1 - b2) * squared**2
        self.W[name] = self.W[name] - lr * u / ((self.V[name] / (1 - b2**self.t)).sqrt() + eps)
        if masked and self.kind == "decoupled":
            self.W[name] = self.W[name] - lr * strength * removed()

    def refresh(self):
        for name, keep in self.keep.items():
            bonus = torch.where(keep, 1 + self.hysteresis, 1.0)
            self.keep[name] = brute_mask(self.W[name].abs() * bonus)


@pytest.mark.parametrize("kind,peak", [("decoupled", 20.0), ("gradient", 1e-2), ("paper", 1e-2)])
def test_a_run_is_that_of_the_definition(llama, tokens, ast, kind, peak):
    """Every part in float64 beside it: loss, accumulation, clipping, rates, lambda, masks, each update."""
    model = llama(num_hidden_layers=1)
    options = {"masked_decay_kind": kind, "masked_decay": peak, "weight_decay": 0.1, "gradient_accumulation_steps": 2}
    config = ast(**options, hysteresis=0.1, warmup_steps=2, max_grad_norm=0.3, learning_rate=1e-2)
    reference = InFloat64(model, kind, hysteresis=0.1, weight_decay=0.1)
    trainer = Spy(model, config, tokens(128))
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    for step in range(STEPS):
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / (STEPS - 2)))
        lr, strength = 1e-2 * ((step or 0.5) / 2 if step < 2 else cosine), peak * min(step / WARMUP, 1)
        assert trainer.steps[step] == pytest.approx((strength, lr), rel=1e-9)
        batches = [ids for at, ids, _ in trainer.micro_steps if at == step]
        assert len(batches) == 2
        loss = reference.step(batches, lr, strength, config.kd_weight, max_norm=0.3)
        assert losses[step] == pytest.approx(loss, rel=1e-4)
        if (step + 1) % 2 == 0 and step + 1 <= FREEZE:
            reference.refresh()
        for name, keep in trainer.masks_seen[step].items():
            assert torch.equal(keep, reference.keep[f"{name}.weight"]), (step, name)
    for name, parameter in model.named_parameters():
        state = trainer.masked_optimizer.state[parameter]
        found = state["dense"] if name in reference.masked else parameter.detach()
        torch.testing.assert_close(found.double(), reference.W[name], rtol=1e-2, atol=2e-4)


def test_accumulated_steps_are_those_of_one_large_batch(llama, tokens, ast):
    found = []
    for batch, accumulate in ((6, 1), (2, 3)):
        model = llama()
        config = ast(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulate, learning_rate=5e-3)
        trainer = ASTTrainer(model, config, tokens())
        trainer.train()
        found.append(([line["loss"] for line in trainer.state.log_history if "loss" in line], trainer.plan(), model))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-4)
    assert found[0][1].masks == found[1][1].masks
    for one, two in zip(found[0][2].parameters(), found[1][2].parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-2, atol=2e-4)


def test_the_distance_of_hidden_states_counts_once_in_accumulated_steps(llama, tokens, ast):
    """It is relative to a batch's own hidden states, so that parts of a batch give nearly the same, not the same."""
    found = []
    for batch, accumulate in ((6, 1), (2, 3)):
        sizes = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulate}
        trainer = ASTTrainer(llama(), ast(**sizes, max_steps=1, square_head_weight=3.0), tokens())
        trainer.train()
        found.append(trainer.state.log_history[0])
    assert 3.0 * found[0]["hidden_loss"] > 0.05 * found[0]["loss"], "it must be seen if it counts three times"
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], rel=0.02)
    assert found[0]["hidden_loss"] == pytest.approx(found[1]["hidden_loss"], rel=0.1)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_masks_change_between_optimizer_steps_alone(llama, tokens, ast):
    """With three micro-batches a step and the forward run twice: one mask a step, new every second, at last frozen."""
    model = llama()
    options = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "gradient_checkpointing": True}
    trainer = Spy(model, ast(**options, start="magnitude"), tokens(128))
    first = {name: brute_mask(weight_NK(layer).abs()) for name, layer in masked_layers(model).items()}
    trainer.train()
    by_id = {id(layer): name for name, layer in masked_layers(model).items()}
    in_force = [first, *trainer.masks_seen]
    forwards = 0
    for step, _, seen in trainer.micro_steps:
        for module, nonzero in seen:
            assert torch.equal(nonzero, in_force[step][by_id[module]])
            forwards += 1
    assert forwards == STEPS * 3 * len(first) * 2  # once more for the backward
    changed = [
        step
        for step in range(1, STEPS + 1)
        if any(not torch.equal(in_force[step][name], in_force[step - 1][name]) for name in first)
    ]
    assert changed == [2, 4, 6, 8]
    for masks in in_force:
        for keep in masks.values():
            assert_legal(keep)
    plan = trainer.plan()
    assert {name: mask.keep.tolist() for name, mask in plan.masks.items()} == {
        name: keep.tolist() for name, keep in in_force[-1].items()
    }
    for name, layer in masked_layers(model).items():
        assert torch.equal(weight_NK(layer) != 0, plan.masks[name].keep)


def test_zero_update_steps_keep_the_first_masks(llama, tokens, ast):
    model = llama()
    first = {name: brute_mask(weight_NK(layer).abs()) for name, layer in masked_layers(model).items()}
    trainer = ASTTrainer(model, ast(mask_update_steps=0), tokens())
    trainer.train()
    for name, mask in trainer.plan().masks.items():
        assert torch.equal(mask.keep, first[name])


@pytest.mark.parametrize("pattern", ["1:4", "4:8"])
def test_other_patterns(llama, tokens, ast, pattern):
    trainer = ASTTrainer(llama(), ast(pattern=pattern, max_steps=4), tokens())
    trainer.train()
    n, m = map(int, pattern.split(":"))
    for mask in trainer.plan().masks.values():
        assert str(mask.pattern) == pattern
        assert_legal(mask.keep, n, m)


def test_conv1d_is_masked_along_its_inputs(gpt2, tokens, ast):
    model = gpt2()
    trainer = ASTTrainer(model, ast(), tokens())
    trainer.train()
    plan = trainer.plan()
    assert plan.masks["transformer.h.0.mlp.c_proj"].shape == (32, 63)
    for name, mask in plan.masks.items():
        assert_legal(mask.keep)
        assert torch.equal(model.get_submodule(name).weight.detach().T != 0, mask.keep)


# --- lambda ---------------------------------------------------------------------------------------------------------


def test_automatic_lambda_leaves_little_of_what_stays_removed(llama, tokens, ast):
    """With fixed masks and no gradient worth the name, what is removed decays to 2 % by the step masks would freeze."""
    model = llama()
    config = ast(max_steps=40, learning_rate=1e-3, mask_update_steps=0, mask_freeze_ratio=0.0, logging_steps=40)
    trainer = Spy(model, config, tokens(200, length=4))
    before = {name: weight_NK(layer).clone() for name, layer in masked_layers(model).items()}
    trainer.train()
    strengths = [strength for strength, _ in trainer.steps]
    assert strengths[0] == 0 and strengths[10] == strengths[-1] == max(strengths)
    assert strengths[:11] == pytest.approx([strengths[10] * step / 10 for step in range(11)])
    left, total = 0.0, 0.0
    for name, layer in masked_layers(model).items():
        dense, keep = trainer.masked_optimizer.state[layer.weight]["dense"], trainer.masked_optimizer.keep()[name]
        # what Adam did to it is seen apart from the decay by the sign: the decay goes along the first weight
        left += float((dense * before[name].sign())[~keep].sum())
        total += float(before[name].abs()[~keep].sum())
    assert left / total < 0.1


@pytest.mark.parametrize("kind", ["gradient", "paper"])
def test_automatic_lambda_follows_the_gradients_in_the_other_forms(llama, tokens, ast, kind):
    trainer = Spy(llama(), ast(masked_decay_kind=kind), tokens())
    trainer.train()
    follows = trainer.follows
    assert [strength for strength, _ in trainer.steps] == [None] * STEPS
    assert follows[0] == 0 and follows[WARMUP] == follows[-1] == 0.3
    assert trainer.mask_statistics.masked_energy < 0.2


def test_what_is_logged(llama, tokens, ast):
    trainer = ASTTrainer(llama(), ast(), tokens(), eval_dataset=tokens(8))
    trainer.train()
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len(lines) == STEPS
    for key in ("ce_loss", "kd_loss", "masked_decay", "grad_norm", "learning_rate"):
        assert all(math.isfinite(line[key]) for line in lines), key
    for key in ("initial_flip_rate", "revived", "masked_energy"):
        assert all(math.isfinite(line[key]) for line in lines), key
    assert "flip_rate" in lines[1] and "flip_rate" not in lines[0], "the first choice is at step 2"
    assert lines[-1]["flip_rate"] == 0, "masks stay"
    assert lines[-1]["masked_energy"] < lines[1]["masked_energy"]
    weights = trainer.args.kd_weight, trainer.args.ce_weight
    for line in lines:
        assert line["loss"] == pytest.approx(weights[0] * line["kd_loss"] + weights[1] * line["ce_loss"], rel=1e-4)
    found = trainer.evaluate()
    assert found["eval_perplexity"] == pytest.approx(math.exp(found["eval_loss"]))
    ids = torch.cat(tokens(8))
    logits = logits_of(trainer.model, ids)[:, :-1]
    assert found["eval_loss"] == pytest.approx(
        float(F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())), rel=1e-5
    )


# --- teacher, dtypes, export ----------------------------------------------------------------------------------------


def test_the_teacher_is_the_dense_original_and_stays_so(llama, tokens, ast):
    model = llama()
    original = copy.deepcopy(model.state_dict())
    trainer = ASTTrainer(model, ast(), tokens())
    teacher = trainer.teacher.model
    trainer.train()
    for name, value in teacher.state_dict().items():
        assert torch.equal(value, original[name])
    assert not any(module.training for module in trainer.teacher.modules())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    optimized = {id(parameter) for group in trainer.masked_optimizer.param_groups for parameter in group["params"]}
    assert optimized == {id(parameter) for parameter in model.parameters()}
    assert ASTTrainer(llama(), ast(kd_weight=0.0, ce_weight=1.0), tokens()).teacher is None


def test_a_teacher_that_is_passed_keeps_its_dtype(llama, tokens, ast):
    """A copy that is made has its linear layers in 16 bits under autocast, and the losses are the same, bit for bit."""
    losses = []
    for teacher in (None, llama()):
        trainer = ASTTrainer(llama(), ast(bf16=True, max_steps=4), tokens(), teacher=teacher)
        dtypes = {name: value.dtype for name, value in trainer.teacher.model.state_dict().items()}
        cast = {name for name, dtype in dtypes.items() if dtype == torch.bfloat16}
        assert cast == ({name for name in dtypes if "proj" in name or "lm_head" in name} if teacher is None else set())
        trainer.train()
        losses.append([line["kd_loss"] for line in trainer.state.log_history if "loss" in line])
    assert losses[0] == losses[1]


def test_export_is_the_trained_model(llama, tokens, ast, tmp_path):
    from transformers import AutoModelForCausalLM

    model = llama()
    trainer = ASTTrainer(model, ast(), tokens())
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    ids = torch.cat(tokens(4))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    report = sk.check(loaded)
    assert report.ok, report
    plan = trainer.plan()
    assert plan.made_by.method == "ast" and plan.sparsity > 0.49
    plan.save(tmp_path / "plan.safetensors")
    assert Plan.load(tmp_path / "plan.safetensors") == plan
    before = logits_of(model, ids)
    sk.apply_(model, plan)
    assert torch.equal(logits_of(model, ids), before)


def held_bytes():
    """Bytes of all tensors alive, each storage once."""
    gc.collect()
    tensors = [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor)]
    return sum({one.untyped_storage().data_ptr(): one.untyped_storage().nbytes() for one in tensors}.values())


@pytest.mark.parametrize(
    "dtype,bf16", [(torch.float32, False), (torch.bfloat16, False), (torch.float32, True)], ids=str
)
def test_nothing_of_the_models_size_is_held_beside_teacher_and_optimizer(llama, tokens, ast, dtype, bf16):
    """Between two steps: the student, the teacher, and what the optimizer's text names, to a few hundredths of it."""
    found = []

    class Weighing(ASTTrainer):
        def _after_step(self):
            super()._after_step()
            self.model.zero_grad()
            found.append(held_bytes())

    before = held_bytes()
    model = llama(dtype, hidden_size=96, intermediate_size=160)
    size = sum(parameter.numel() for parameter in model.parameters())
    masked = sum(layer.weight.numel() for layer in masked_layers(model).values())
    Weighing(model, ast(max_steps=3, start="sparsegpt", bf16=bf16), tokens()).train()
    itemsize = dtype.itemsize
    dense = masked if itemsize == 4 else size
    cast = masked + model.lm_head.weight.numel() if bf16 else 0  # of the teacher, which runs under autocast alone
    expected = 2 * size * itemsize - 2 * cast + 4 * dense + masked + 8 * size
    for bytes_held in found:
        assert abs(bytes_held - before - expected) < 0.03 * 4 * size


@pytest.mark.parametrize("loaded,bf16", [(torch.float32, True), (torch.bfloat16, False), (torch.bfloat16, True)])
def test_bf16(llama, tokens, ast, loaded, bf16):
    model = llama(loaded)
    trainer = ASTTrainer(model, ast(bf16=bf16, learning_rate=5e-3, max_steps=24), tokens(128))
    trainer.train()
    assert {parameter.dtype for parameter in model.parameters()} == {loaded}
    for name, mask in trainer.plan().masks.items():
        assert_legal(mask.keep)
        parameter = model.get_submodule(name).weight
        state = trainer.masked_optimizer.state[parameter]
        assert {state[key].dtype for key in ("dense", "exp_avg", "exp_avg_sq")} == {torch.float32}
        assert torch.equal(parameter.detach(), (state["dense"] * mask.keep).to(loaded))
        assert not torch.equal(state["dense"], state["dense"].bfloat16().float())  # it holds more than bf16 can
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.1


# --- starts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["magnitude", "wanda", "sparsegpt"])
def test_a_start_gives_masks_and_kept_weights_and_spares_what_it_removes(llama, tokens, ast, start):
    """With a learning rate of 0: kept weights are those of the one-shot method, removed ones the dense model's, but
    none above a kept one of its group, so that the first choice by magnitude changes nothing."""
    model, twin = llama(), llama()
    dense = {name: weight_NK(layer).clone() for name, layer in masked_layers(model).items()}
    trainer = ASTTrainer(
        model,
        ast(start=start, learning_rate=1e-30, masked_decay=0.0, max_steps=1, num_calibration_samples=64),
        tokens(),
    )
    trainer.train()
    plan = sk.prune_(twin, start, dataset=tokens(), num_calibration_samples=64, progress=False)
    assert plan.masks.keys() == dense.keys()
    for name, mask in trainer.plan().masks.items():
        layer = model.get_submodule(name)
        state = trainer.masked_optimizer.state[layer.weight]
        agree = (mask.keep == plan.masks[name].keep).float().mean()
        assert agree == 1 if start == "magnitude" else agree > 0.98  # samples come in another order
        for start_of_group in range(0, mask.keep.shape[1], 4):
            group = slice(start_of_group, start_of_group + 4)
            keep, found, original = mask.keep[:, group], state["dense"][:, group], dense[name][:, group]
            least = found.abs().masked_fill(~keep, torch.inf).amin(1, keepdim=True).expand_as(keep)
            assert torch.equal(found[~keep], original.clamp(-least, least)[~keep])
        same = torch.equal(state["dense"][mask.keep], dense[name][mask.keep])
        assert same == (start != "sparsegpt")
        torch.testing.assert_close(layer.weight.detach(), weight_NK(twin.get_submodule(name)), atol=0.05, rtol=0.05)


def test_a_plan_is_a_start(llama, tokens, ast):
    model = llama()
    masks = {name: Mask("2:4", brute_mask(-weight_NK(layer).abs())) for name, layer in masked_layers(model).items()}
    trainer = ASTTrainer(model, ast(start=Plan(masks), mask_update_steps=0), tokens())
    trainer.train()
    assert trainer.plan().masks == masks
    assert trainer.plan().made_by.config["start"] == f"Plan {Plan(masks).digest()}"


def test_a_plan_that_does_not_fit_is_refused(llama, tokens, ast):
    model = llama()
    names = list(masked_layers(model))
    scores = {name: weight_NK(layer).abs() for name, layer in masked_layers(model).items()}
    good = {name: Mask("2:4", NM(2, 4).project(score)) for name, score in scores.items()}
    before = copy.deepcopy(model.state_dict())
    free = {**good, names[1]: Mask("unstructured", Unstructured().project(scores[names[1]]))}
    with pytest.raises(PatternError, match=rf"start.*{names[1]} breaks 2:4 in \d+ groups"):
        ASTTrainer(model, ast(start=Plan(free)), tokens()).train()
    with pytest.raises(ValueError, match=f"start: the plan has no mask for {names[0]}.*targets"):
        ASTTrainer(model, ast(start=Plan({names[1]: good[names[1]]})), tokens()).train()
    with pytest.raises(ValueError, match=rf"start.*{names[0]} is \(32, 63\), the weight \(32, 32\)"):
        ASTTrainer(model, ast(start=Plan({**good, names[0]: good[names[6]]})), tokens()).train()
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


# --- low-rank branches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "init,train_x", [("mean", False), ("mean", True), ("data", False), ("data", True), ("svd", True)]
)
def test_branches_train_and_are_in_the_plan(llama, tokens, ast, init, train_x):
    model, fresh = llama(), llama()
    group = 4 if init == "svd" else 16
    trainer = ASTTrainer(model, ast(slorb_group=group, slorb_init=init, slorb_train_x=train_x), tokens())
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0]
    plan = trainer.plan()
    assert plan.side.keys() == plan.masks.keys()
    for name, branch in plan.side.items():
        assert (branch.X is None) == (not train_x) and branch.S.abs().sum() > 0
        assert branch.why_not(*plan.masks[name].shape) is None
    assert plan.sparsity < 0.49
    # The branch adds two dimensions more to learn, without weight decay.
    decayed = {id(p) for group in trainer.masked_optimizer.param_groups[:2] for p in group["params"]}
    sides = {name: p for name, p in model.named_parameters() if ".side_" in name}
    assert len(sides) == len(plan.side) * (1 + train_x) and not decayed & {id(p) for p in sides.values()}
    # A fresh copy with the plan and the weights is the same model.
    trained = {name: value for name, value in model.state_dict().items() if ".side_" not in name}
    fresh.load_state_dict(trained)
    sk.apply_(fresh, plan)
    ids = torch.cat(tokens(4))
    assert torch.equal(logits_of(fresh, ids), logits_of(model, ids))


def test_a_branch_starts_nearer_to_the_teacher(llama, tokens, ast):
    """With a learning rate of 0, on a model whose layers matter."""
    losses = {}
    for init in (None, "data", "svd"):
        options = {} if init is None else {"slorb_group": 4, "slorb_init": init}
        model = llama(initializer_range=0.3)
        trainer = ASTTrainer(
            model,
            ast(learning_rate=1e-30, masked_decay=0.0, max_steps=1, num_calibration_samples=64, **options),
            tokens(),
        )
        trainer.train()
        losses[init] = trainer.state.log_history[0]["kd_loss"]
    assert 0 < losses["svd"] < losses["data"] < losses[None]


def test_a_branch_is_fitted_to_what_the_start_left_undone(llama, tokens, ast, monkeypatch):
    """SparseGPT's kept weights do a part of the removed ones' work, which the branch need not do again."""
    fit, seen = ast_trainer.fit_side, []
    monkeypatch.setattr(ast_trainer, "fit_side", lambda lack, *args, **kw: seen.append(lack) or fit(lack, *args, **kw))
    model = llama()
    dense = {name: weight_NK(layer).clone() for name, layer in masked_layers(model).items()}
    trainer = ASTTrainer(model, ast(start="sparsegpt", slorb_group=4, slorb_init="mean"), tokens())
    trainer._before_training(None)
    assert len(seen) == len(dense)
    for (name, original), lack in zip(dense.items(), seen, strict=True):
        keep = trainer._first_keep[name]
        assert torch.equal(lack[~keep], original[~keep]), name
        assert torch.equal(lack[keep], (original - weight_NK(model.get_submodule(name)))[keep]), name
        assert lack[keep].any(), name


def test_frozen_layers_are_said_and_a_frozen_model_is_refused(llama, tokens, ast):
    model = llama()
    names = list(masked_layers(model))
    model.get_submodule(names[2]).weight.requires_grad_(False)
    trainer = ASTTrainer(model, ast(max_steps=2), tokens())
    trainer.train()
    assert f"1 layers are frozen, as {names[2]}: masked, but" in " ".join(trainer.plan().notes)
    with pytest.raises(ValueError, match="model: all of its parameters are frozen.*requires_grad_"):
        ASTTrainer(model.requires_grad_(False), ast(), tokens())


def test_there_is_no_plan_before_training(llama, tokens, ast):
    with pytest.raises(ValueError, match="no mask yet: call train"):
        ASTTrainer(llama(), ast(), tokens()).plan()


def test_masks_can_freeze_before_the_learning_rate_has_risen(llama, tokens, ast):
    """lambda is chosen by the run's highest rate, not by those that come before."""
    trainer = ASTTrainer(llama(), ast(max_steps=8, warmup_steps=6, mask_freeze_ratio=1.0), tokens())
    trainer.train()
    assert all(math.isfinite(line["loss"]) for line in trainer.state.log_history if "loss" in line)


def test_a_layer_too_small_for_a_branch_is_named(llama, tokens, ast):
    trainer = ASTTrainer(llama(), ast(slorb_group=16, slorb_init="svd"), tokens())
    with pytest.raises(ValueError, match=r"slorb_group=16, slorb_init='svd': no branch for .*k_proj.*smaller group"):
        trainer.train()


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options,message",
    [
        ({"pattern": "unstructured"}, "pattern='unstructured': masks are trained for N:M patterns, as '2:4'"),
        ({"pattern": "64x64"}, "pattern='64x64'.*as '2:4'"),
        ({"pattern": "4:2"}, "0 < N < M"),
        ({"start": "obs"}, "start.*'obs'.*sparsegpt"),
        ({"masked_decay_kind": "l2"}, "masked_decay_kind.*'l2'.*decoupled"),
        ({"kd_kind": "hidden"}, "kd_kind.*'hidden'.*reverse_kl"),
        ({"slorb_init": "sum"}, "slorb_init.*'sum'.*mean"),
        ({"slorb_group": 1}, "slorb_group=1 must be a whole number of at least 2"),
        ({"masked_decay": -1.0}, "masked_decay=-1.0 must be a number of at least 0"),
        ({"masked_decay": float("nan")}, "masked_decay=nan"),
        ({"mask_freeze_ratio": 1.5}, "mask_freeze_ratio=1.5 is a share"),
        ({"kd_weight": 2.0}, "kd_weight=2.0 is a share"),
        ({"kd_weight": 0.0, "ce_weight": 0.0}, "nothing to learn from"),
        ({"temperature": 0.0}, "temperature=0.0 must be greater than 0"),
        ({"mask_update_steps": 2.5}, "mask_update_steps=2.5 must be a whole number"),
        ({"hysteresis": -0.1}, "hysteresis=-0.1"),
        ({"max_seq_length": 1}, "max_seq_length=1"),
        ({"format": "semi24"}, "format='semi24'.*quantised"),
        ({"square_head_weight": 1.0, "teacher_cache": "folder"}, "square_head_weight.*teacher_cache"),
    ],
)
def test_bad_arguments_are_named(ast, options, message):
    with pytest.raises(ValueError, match=message):
        ast(**options)


def test_a_masked_decay_that_would_diverge_is_refused_before_the_first_step(llama, tokens, ast):
    model = llama()
    with pytest.raises(ValueError, match=r"masked_decay=60 times the learning rate reaches 1.02.*at most 58.6.*'auto'"):
        ASTTrainer(model, ast(masked_decay=60.0, warmup_steps=0), tokens()).train()
    assert not any(parameter.grad is not None for parameter in model.parameters())
    ASTTrainer(model, ast(masked_decay=60.0, warmup_steps=0, masked_decay_kind="paper", max_steps=1), tokens()).train()


@pytest.mark.parametrize("lr,schedule,within", [(3.0, "constant_with_warmup", 40), (30.0, "constant", 5)])
def test_a_run_that_diverges_is_stopped(llama, tokens, ast, lr, schedule, within):
    options = {"learning_rate": lr, "lr_scheduler_type": schedule, "warmup_steps": 10, "masked_decay": 0.0}
    trainer = ASTTrainer(llama(), ast(**options, max_steps=40), tokens(256))
    with pytest.raises(TrainingDiverged, match=r"loss rose from .* to .* at step \d+: lower masked_decay=0.0 or learn"):
        trainer.train()
    assert trainer.state.global_step < within


def test_a_short_last_window_is_no_divergence(llama, tokens, ast):
    """Of 13 samples the fourth step has one micro-batch, whose loss is the whole step's, not a fourth of it."""
    config = ast(per_device_train_batch_size=1, gradient_accumulation_steps=4, max_steps=-1, num_train_epochs=3)
    trainer = ASTTrainer(llama(), config, tokens(13))
    trainer.train()
    assert trainer.state.global_step == 12


def test_a_teacher_with_another_vocabulary_is_refused(llama, tokens, ast):
    with pytest.raises(ValueError, match="teacher knows 70 tokens and the student 64.*same|own tokenizer"):
        ASTTrainer(llama(), ast(), tokens(), teacher=llama(vocab_size=70))


def test_a_dataset_shorter_than_one_batch_is_refused(llama, tokens, ast):
    with pytest.raises(ValueError, match=r"7 samples, and one step takes 8 \(per_device.*=4.*steps=2, 1 processes\)"):
        ASTTrainer(llama(), ast(gradient_accumulation_steps=2), tokens(7))
    with pytest.raises(ValueError, match="train_dataset"):
        ASTTrainer(llama(), ast(), None).train()


def test_a_model_that_predicts_no_tokens_is_refused(llama, tokens, ast):
    with pytest.raises(ValueError, match="LlamaModel predicts no tokens.*AutoModelForCausalLM"):
        ASTTrainer(llama().model, ast(), tokens())


@pytest.mark.parametrize("way", ["is_deepspeed_enabled", "is_fsdp_enabled"])
def test_ways_to_shard_that_flatten_weights_are_refused(llama, tokens, ast, monkeypatch, way):
    create = ASTTrainer.create_accelerator_and_postprocess
    monkeypatch.setattr(
        ASTTrainer, "create_accelerator_and_postprocess", lambda self: (create(self), setattr(self, way, True))
    )
    with pytest.raises(Unsupported, match="DeepSpeed and FSDP1 cut weights into flat pieces.*'version': 2.*or DDP"):
        ASTTrainer(llama(), ast(), tokens())


class Poisoned(ASTTrainer):
    """Its loss, or one gradient under a loss that is sound, becomes NaN in the eighth step."""

    what = "loss"

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if self.state.global_step == 7 and self.what == "loss":
            return loss * float("nan")
        return loss

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.state.global_step == 7 and self.what == "gradient":
            model.model.norm.weight.grad[3] = float("nan")
        return loss


@pytest.mark.parametrize("max_grad_norm", [1.0, 0.0])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_before_it_reaches_the_weights(llama, tokens, ast, what, max_grad_norm):
    options = {"save_strategy": "steps", "save_steps": 3, "max_grad_norm": max_grad_norm}
    model = llama()
    trainer = Poisoned(model, ast(**options), tokens())
    trainer.what = what
    with pytest.raises(NonFiniteError, match=r"is nan at step 8: stopped before.*checkpoint-6.*learning_rate=0.02"):
        trainer.train()
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
    for state in trainer.masked_optimizer.state.values():
        assert all(bool(value.isfinite().all()) for value in state.values())
    folder = last_checkpoint(trainer.args.output_dir)
    assert folder.name == "checkpoint-6"
    if what == "gradient":
        return
    sound = ASTTrainer(llama(), ast(**options), tokens())
    sound.train(resume_from_checkpoint=True)
    straight = ASTTrainer(llama(), ast(max_grad_norm=max_grad_norm), tokens())
    straight.train()
    for one, two in zip(sound.model.parameters(), straight.model.parameters(), strict=True):
        assert torch.equal(one, two)


def test_nan_before_any_checkpoint_says_so(llama, tokens, ast):
    with pytest.raises(NonFiniteError, match=r"No checkpoint was written yet \(save_steps=500\)"):
        Poisoned(llama(), ast(), tokens()).train()


# --- arguments ------------------------------------------------------------------------------------------------------


def test_layers_can_be_chosen_by_functions_and_the_arguments_still_be_written_down(llama, tokens, ast):
    def is_mlp(module, name):
        return ".mlp." in name and isinstance(module, nn.Linear)

    config = ast(targets=[is_mlp], ignore=lambda module, name: name.endswith("up_proj"), save_strategy="steps")
    trainer = ASTTrainer(llama(), config, tokens())
    trainer.train()
    names = [f"model.layers.{block}.mlp.{part}_proj" for block in (0, 1) for part in ("gate", "down")]
    assert list(trainer.plan().masks) == names
    assert config.targets == [is_mlp]
    made_by = json.loads((last_checkpoint(config.output_dir) / "sparsekit_config.json").read_text())
    assert made_by["arguments"]["targets"] == names


def test_arguments_fit_into_json_whatever_they_hold(ast):
    fields = ast(start=Plan(), targets=[lambda module, name: True]).to_dict()
    assert json.loads(json.dumps(fields))["start"] == f"Plan {Plan().digest()}"
    assert fields["learning_rate"] == 2e-2
    assert ast().from_dict({"max_steps": 3, "output_dir": "x"}).max_steps == 3
    with pytest.raises(ValueError, match="'max_step'.*max_steps"):
        ast().from_dict({"max_step": 3})
