"""What fails or is refused leaves the model as it was, and a resumed run is the run that was not interrupted."""

import copy

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

import sparsekit as sk
from sparsekit.errors import CheckpointError, NonFiniteError
from sparsekit.train import nuteprune_trainer
from sparsekit.train.nuteprune_student import Student
from sparsekit.train.nuteprune_trainer import STATE_FILE, NutePruneTrainer
from sparsekit.train.trainer import TrainingDiverged
from tests.train.nuteprune_runs import (
    SAVING,
    AtStepEnd,
    assert_plain,
    assert_same_model,
    config,
    in_blocks,
    llama,
    logits_of,
    text,
    train,
)
from tests.train.nuteprune_runs import small_heap as small_heap


@pytest.mark.parametrize("error", [NonFiniteError, KeyboardInterrupt, RuntimeError])
def test_what_fails_leaves_the_model_as_it_was(tmp_path, monkeypatch, error):
    model = llama(tie_word_embeddings=True)
    model.lm_head.requires_grad_(True)
    dense, modules = copy.deepcopy(model), list(model.named_modules())

    def fail(state):
        if state.global_step == 7 and error is not NonFiniteError:
            raise error

    loss = NutePruneTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        nan = error is NonFiniteError and self.state.global_step == 2
        return loss(self, *args, **kwargs) * (float("nan") if nan else 1)

    monkeypatch.setattr(NutePruneTrainer, "compute_loss", compute_loss)
    with pytest.raises(error):
        train(model, tmp_path, callbacks=[AtStepEnd(fail)], hidden=True, untie=True)
    assert_same_model(model, dense)
    assert_plain(model, modules)
    assert model.lm_head.weight is model.model.embed_tokens.weight and model.config.tie_word_embeddings
    assert torch.equal(logits_of(model), logits_of(dense))


def test_what_fails_while_the_result_is_written_does_too(tmp_path, monkeypatch):
    model = llama()
    dense, modules = copy.deepcopy(model), list(model.named_modules())

    def fail(adapted, *args):
        settle(adapted, *args)
        raise RuntimeError("late")

    settle = nuteprune_trainer.settle_
    monkeypatch.setattr(nuteprune_trainer, "settle_", fail)
    with pytest.raises(RuntimeError, match="late"):
        train(model, tmp_path)
    assert_same_model(model, dense)
    assert_plain(model, modules)


def test_a_nan_names_the_step_and_the_checkpoint(tmp_path, monkeypatch):
    loss = NutePruneTrainer.compute_loss
    monkeypatch.setattr(
        NutePruneTrainer,
        "compute_loss",
        lambda self, *a, **k: loss(self, *a, **k) * (float("nan") if self.state.global_step == 5 else 1),
    )
    with pytest.raises(NonFiniteError, match="the loss is nan at step 6: .*last good checkpoint is .*checkpoint-4"):
        train(llama(), tmp_path, **SAVING)


def test_gates_without_a_finite_gradient_stop_it(tmp_path, monkeypatch):
    monkeypatch.setattr(Student, "gate_gradient", lambda self: float("inf"))
    with pytest.raises(NonFiniteError, match="norm of the gradients of the gates is inf at step 1"):
        train(llama(), tmp_path)


PUBLISHED = {"kd_reduction": "sequences", "hidden_loss": "paper", "hidden_weight": 0.9, "kd_weight": 0.1}


@pytest.mark.parametrize(
    ("losses", "most"), [({}, "4.11"), (PUBLISHED, "0.411"), ({"teachers": "none", "ce_weight": 0.5}, "2.06")]
)
def test_a_student_that_knows_less_than_nothing_stops_it(tmp_path, monkeypatch, losses, most):
    model = llama()
    dense = copy.deepcopy(model)

    def sure_of_what_is_wrong(args, outputs, *others):
        outputs.logits = outputs.logits * -50
        return loss(args, outputs, *others)

    loss = nuteprune_trainer.student_loss
    monkeypatch.setattr(nuteprune_trainer, "student_loss", sure_of_what_is_wrong)
    culprits = "lower learning_rate=0.005 or gate_learning_rate"
    with pytest.raises(TrainingDiverged, match=f"would be {most} at most if all were as likely: {culprits}"):
        train(model, tmp_path, **losses)
    assert_same_model(model, dense)


def test_hidden_states_far_from_the_teachers_are_no_divergence(tmp_path):
    train(llama(), tmp_path, max_steps=4, hidden_loss="paper", hidden_weight=1e4)


def test_teachers_leave_no_files_behind(tmp_path):
    folder, seen = tmp_path / "snapshots" / "0", []
    look = AtStepEnd(lambda state: seen.append(len(list(folder.glob("*.safetensors")))))
    train(llama(), tmp_path, snapshots_on_disk=True, callbacks=[look])
    assert max(seen) > 1 and not folder.exists()


# --- resuming --------------------------------------------------------------------------------------------------------


RESUMED = {
    "nearest, accumulation, a family": {
        "gradient_accumulation_steps": 2,
        "keep": [0.1, 0.2],
        "teacher_steps": 1,
        "hidden_weight": 1.0,
    },
    "paper, hidden": {"teachers": "paper", "hidden": True, "sparsity": 0.5},
    "frozen at the checkpoint": {"frozen_share": 0.6, "sparsity_warmup": 0.2},
    "snapshots on disk, checkpointing": {"snapshots_on_disk": True, "gradient_checkpointing": True},
    "bf16, uniform": {"uniform": True, "bf16": True},
}


@pytest.mark.parametrize("name", RESUMED)
def test_resuming_changes_nothing(tmp_path, name):
    options = {**SAVING, "max_steps": 8, **RESUMED[name]}
    dtype = torch.bfloat16 if "bf16" in options else torch.float32
    one, other = llama(dtype=dtype), llama(dtype=dtype)
    straight = train(one, tmp_path, **options)
    resumed = train(other, tmp_path, resume=str(tmp_path / "checkpoint-4"), **options)

    def numbers(trainer):
        logs = [line for line in trainer.state.log_history if "loss" in line]
        return [{key: value for key, value in line.items() if key != "epoch"} for line in logs]

    assert numbers(straight) == numbers(resumed) and len(numbers(straight)) == 8
    assert straight.plan() == resumed.plan()
    assert_same_model(one, other)
    ends = [load_file(tmp_path / f"checkpoint-{step}" / STATE_FILE) for step in (4, 8)]
    assert ends[0].keys() <= ends[1].keys()
    assert any(not torch.equal(ends[0][key], ends[1][key]) for key in ends[0] if key.startswith("lora."))
    if "keep" in options:
        for sparsity, (plan, smaller) in straight.family().items():
            assert plan == resumed.family()[sparsity][0]
            assert torch.equal(logits_of(smaller), logits_of(resumed.family()[sparsity][1]))


def test_snapshots_and_multipliers_are_in_the_checkpoint(tmp_path, monkeypatch):
    seen, load = {}, Student.load

    def look(self, tensors, numbers):
        load(self, tensors, numbers)
        seen.update(snapshots=len(self.snapshots), multipliers=self.lagrangian.multipliers.clone())

    monkeypatch.setattr(Student, "load", look)
    options = {**SAVING, "save_steps": 6, "teacher_steps": 1}
    train(llama(), tmp_path, **options)
    train(llama(), tmp_path, resume=str(tmp_path / "checkpoint-6"), **options)
    assert seen["snapshots"] > 0 and seen["multipliers"].abs().max() > 0


def test_resuming_needs_the_same_model_and_arguments(tmp_path):
    train(llama(), tmp_path, **SAVING)
    folder = str(tmp_path / "checkpoint-4")
    other = llama()
    other.model.layers[0].mlp.up_proj.weight.data.mul_(2)
    dense = copy.deepcopy(other)
    with pytest.raises(CheckpointError, match="model was '[0-9a-f]+', is '[0-9a-f]+'"):
        train(other, tmp_path, resume=folder, **SAVING)
    assert_same_model(other, dense)
    with pytest.raises(CheckpointError, match="teachers was 'nearest', is 'paper'"):
        train(llama(), tmp_path, resume=folder, teachers="paper", **SAVING)
    (tmp_path / "checkpoint-4" / STATE_FILE).unlink()
    with pytest.raises(CheckpointError, match=f"holds no {STATE_FILE}"):
        train(llama(), tmp_path, resume=folder, **SAVING)


# --- refused ---------------------------------------------------------------------------------------------------------


def test_a_model_with_adapters_is_refused(tmp_path):
    from peft import LoraConfig, get_peft_model

    adapted = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for model in (adapted, adapted.get_base_model()):
        with pytest.raises(ValueError, match=r"the model has adapters already .*merge_and_unload\(\)"):
            NutePruneTrainer(model, config(tmp_path), text())


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"max_steps": 3, "sparsity_warmup": 0.5, "frozen_share": 0.5}, "of 3 steps ends at 2, .*train longer, or"),
        ({"sparsity": 0.99}, "sparsity=0.99"),
        ({"round_to": 64, "sparsity": 0.35}, "no legal widths reach sparsity=0.35"),
        ({"round_to": 64, "sparsity": 0.633, "keep": [0.35]}, r"keep=\[0.35\]: no legal widths reach"),
        ({"lora_targets": ["qproj"]}, "lora_targets: .*qproj"),
        ({"lora_targets": ["lm_head"]}, "lora_targets: lm_head is outside"),
    ],
    ids=["schedule", "gates", "widths", "keep", "no layer", "head"],
)
def test_what_cannot_be_done_is_refused_before_training(tmp_path, changes, said):
    model = llama()
    dense, modules = copy.deepcopy(model), list(model.named_modules())
    with pytest.raises(ValueError, match=said):
        train(model, tmp_path, **changes)
    assert_same_model(model, dense)
    assert_plain(model, modules)


def test_hidden_dimensions_go_with_all_layers(tmp_path):
    with pytest.raises(ValueError, match="hidden=True, and targets and ignore leave out .*self_attn"):
        sk.prune_(llama(), config(tmp_path, hidden=True), dataset=text(), targets="re:.*mlp.*", progress=False)


def test_training_that_ends_early_is_cut_all_the_same(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    model, size = llama(), in_blocks(llama())
    plan = train(model, tmp_path, callbacks=[Stop()]).plan()
    assert "training ended at step 3 of 10" in plan.notes
    assert abs(1 - in_blocks(sk.apply_(model, plan)) / size - 0.4) <= 0.0015
