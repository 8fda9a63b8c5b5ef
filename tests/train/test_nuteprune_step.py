"""A step of NutePrune: one draw, the gradients of gates, rates, and one copy of the weights."""

import pytest
import torch

from sparsekit.train.nuteprune_student import Student
from sparsekit.train.nuteprune_trainer import NutePruneTrainer
from tests.train.live_tensors import storages
from tests.train.nuteprune_runs import (
    AtStepEnd,
    config,
    llama,
    text,
    train,
)
from tests.train.nuteprune_runs import small_heap as small_heap

STAGES = {"start": "contribution", "stages": [0.2, 0.4], "hidden": False, "num_calibration_samples": 2}
STAGES |= {"sparsity_warmup": None, "frozen_share": None}


def gradients(monkeypatch, folder, steps=2, callbacks=None, **options):
    """Gradients of gates and LoRA in each step, from one start."""
    found, pull = [], Student.pull_

    def look(self, step):
        pull(self, step)
        lora = {name: p.grad.clone() for name, p in self.adapted.named_parameters() if p.requires_grad}
        found.append((self.gates.log_alpha.grad.clone(), lora))

    with monkeypatch.context() as patch:
        patch.setattr(Student, "pull_", look)
        train(
            llama(),
            folder,
            max_steps=steps,
            frozen_share=0.0,
            max_grad_norm=0.0,
            callbacks=callbacks,
            eval_data=text(4),
            **options,
        )
    return found


@pytest.mark.parametrize(
    "other",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 4, "per_device_train_batch_size": 2},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    ],
    ids=["checkpointing", "accumulation", "both"],
)
def test_the_same_gradients(tmp_path, monkeypatch, other):
    options = {"per_device_train_batch_size": 8, "hidden": True, "layers": True}
    options |= {"hidden_weight": 0.5, "hidden_loss": "paper"}  # which is a mean over as many numbers in each batch
    plain = gradients(monkeypatch, tmp_path, **options)
    others = gradients(monkeypatch, tmp_path, **{**options, **other})
    assert len(plain) == len(others) == 2
    for (gates, lora), (gates_there, lora_there) in zip(plain, others, strict=True):
        assert gates.abs().max() > 0
        torch.testing.assert_close(gates_there, gates, rtol=1e-3, atol=1e-6)
        for name, gradient in lora.items():
            torch.testing.assert_close(lora_there[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


def test_an_evaluation_between_micro_batches_changes_nothing(tmp_path, monkeypatch):
    options = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    plain = gradients(monkeypatch, tmp_path, **options)
    looked = NutePruneTrainer.training_step
    evaluated = []

    def step(self, *args, **kwargs):
        loss = looked(self, *args, **kwargs)
        if not self.accelerator.sync_gradients:
            evaluated.append(self.evaluate()["eval_loss"])
            self.model.train()
        return loss

    monkeypatch.setattr(NutePruneTrainer, "training_step", step)
    others = gradients(monkeypatch, tmp_path, **options)
    assert len(evaluated) == 2
    for (gates, lora), (gates_there, lora_there) in zip(plain, others, strict=True):
        assert torch.equal(gates, gates_there) and gates.abs().max() > 0
        assert all(torch.equal(gradient, lora_there[name]) for name, gradient in lora.items())


def test_padding_counts_for_nothing(tmp_path, monkeypatch):
    """The losses of two samples in one batch, the shorter one padded, against those of each by itself."""
    samples = [each[:size] for each, size in zip(text(2), (12, 5), strict=True)]
    by_hand, loss = [], NutePruneTrainer.compute_loss

    @torch.no_grad()
    def compute_loss(self, model, inputs, *args, **kwargs):
        assert inputs["attention_mask"].sum() == 17 and inputs["input_ids"].numel() == 24
        kl = far = size = 0.0
        for ids in samples:
            here = self.student.adapted(input_ids=ids[None], output_hidden_states=True)
            with self.student.roles.teacher(None) as teacher:
                there = teacher(input_ids=ids[None], output_hidden_states=True)
            p, q = (each.logits[0, :-1].double().log_softmax(-1) for each in (there, here))
            kl += float((p.exp() * (p - q)).sum()) / 15
            states = [torch.cat(each.hidden_states[1:]) for each in (here, there)]
            far = far + (states[0] - states[1]).square().sum((1, 2))
            size = size + states[1].square().sum((1, 2))
        by_hand.append((kl, float((far / size).mean())))
        with torch.enable_grad():
            return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(NutePruneTrainer, "compute_loss", compute_loss)
    options = {"max_steps": 1, "per_device_train_batch_size": 2, "teachers": "intact", "hidden_weight": 1.0}
    logged = train(llama(), tmp_path, samples, **options).state.log_history[0]
    assert by_hand[0] == pytest.approx((logged["kd_loss"], logged["hidden_loss"]), rel=1e-3)


def test_the_gradient_of_the_gates_by_finite_differences(tmp_path, monkeypatch):
    """Of the loss of a step and of the constraint, for one unit of each part."""
    steps, losses = [], []
    pull, loss = Student.pull_, NutePruneTrainer.compute_loss

    def look(self, step):
        if step == 1:
            draw, leaves = {name: each.detach().clone() for name, each in self._drawn.items()}, dict(self._leaves)
            for name in draw:
                unit = int(leaves[name].grad.abs().argmax())
                for sign in (1, -1):
                    moved = {**draw, name: draw[name].clone()}
                    moved[name][unit] += sign * 1e-3
                    losses.append(self.at(moved))
                steps.append((float(leaves[name].grad[unit]), (losses[-2] - losses[-1]) / 2e-3))
        pull(self, step)

    def compute_loss(self, model, inputs, *args, **kwargs):
        def at(masks):
            self.student.masked.masks = masks
            with torch.no_grad():
                found = loss(self, model, inputs, *args, **kwargs)
            return float(found)

        if self._student is not None:
            self.student.at = at
        return loss(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Student, "pull_", look)
    monkeypatch.setattr(NutePruneTrainer, "compute_loss", compute_loss)
    train(llama(), tmp_path, max_steps=2, frozen_share=0.0)
    assert len(steps) == 6
    for gradient, slope in steps:
        assert gradient == pytest.approx(slope, rel=0.05, abs=2e-4)


def test_gates_are_drawn_once_a_step_and_anew_in_the_next(tmp_path, monkeypatch):
    drawn, masks_of = [], Student._masks_of

    def look(self, step):
        drawn.append(masks_of(self, step))
        return drawn[-1]

    monkeypatch.setattr(Student, "_masks_of", look)
    options = {"max_steps": 3, "gradient_accumulation_steps": 2, "frozen_share": 0.0, "sparsity_warmup": 1.0}
    train(llama(), tmp_path, **options)
    first, second, third = (torch.cat(list(draw.values())) for draw in drawn)
    assert not torch.equal(first, second) and not torch.equal(second, third)
    assert 0 < int((first < 1).sum()) < len(first) / 4


def test_rates(tmp_path):
    """LoRA's falls; those of gates and multipliers stay, and neither is decayed or clipped."""
    seen = []

    def look(state):
        optimizer = trainer.optimizer.optimizer
        seen.append([group["lr"] for group in optimizer.param_groups])

    settings = config(tmp_path, max_steps=4, weight_decay=0.1, warmup_steps=2, lr_scheduler_type="cosine")
    trainer = NutePruneTrainer(llama(), settings, text(), callbacks=[AtStepEnd(look)])
    trainer.train()
    groups = trainer.optimizer.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.0]
    assert [group["maximize"] for group in groups] == [False, False, True]
    assert [rates[1:] for rates in seen] == [[2.0, 2.0]] * 4
    assert len({rates[0] for rates in seen}) > 2
    with pytest.raises(ValueError, match="lr_scheduler_type='reduce_lr_on_plateau' changes the rate of gates"):
        train(llama(), tmp_path, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_data=text(4))


@pytest.mark.parametrize(
    ("teachers", "changes"),
    [
        ("nearest", {}),
        ("paper", {}),
        ("nearest", STAGES),
    ],
    ids=["nearest", "paper", "stages"],
)
def test_one_copy_of_the_weights_whatever_the_number_of_teachers(tmp_path, teachers, changes):
    """A wide vocabulary, so that a second copy could not hide behind snapshots and LoRA."""
    seen = []

    def look(state):
        held = trainer.student.snapshots
        seen.append((len(held), sum(storages().values()) - held.num_bytes))

    short = {"teacher_steps": 1, "max_steps": 10, "per_device_train_batch_size": 1, "sparsity": 0.6}
    settings = config(tmp_path, teachers=teachers, **short | changes)
    trainer = NutePruneTrainer(llama(vocab_size=8192, hidden_size=32), settings, text(), callbacks=[AtStepEnd(look)])
    trainer.train()
    weights = 4 * 2 * 8192 * 32
    (few, at_first), (many, most) = seen[0], max(seen)
    assert few == 0 and many >= (2 if changes else 3)
    assert most - at_first < 0.25 * weights and at_first > weights
