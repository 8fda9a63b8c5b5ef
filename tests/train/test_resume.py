"""A resumed run is the run that was not interrupted, bit for bit, or it is refused with what differs."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from sparsekit.errors import CheckpointError
from sparsekit.nn import side_branches
from sparsekit.train import trainer as trainer_module
from sparsekit.train.ast_trainer import ASTTrainer
from sparsekit.train.teacher_cache import write_teacher_cache
from sparsekit.train.trainer import CONFIG_FILE, is_complete, last_checkpoint

SAVING = {"save_strategy": "steps", "save_steps": 6}


def losses_of(trainer):
    return {
        line["step"]: {key: line[key] for key in ("loss", "ce_loss", "kd_loss", "grad_norm", "learning_rate")}
        for line in trainer.state.log_history
        if "loss" in line
    }


def assert_same_run(one, two):
    """Losses, weights, masks, branches and the optimizer's state, bit for bit."""
    assert losses_of(one) == losses_of(two)
    named = dict(two.model.named_parameters())
    for name, parameter in one.model.named_parameters():
        assert torch.equal(parameter, named[name]), name
        state, other = one.masked_optimizer.state[parameter], two.masked_optimizer.state[named[name]]
        assert state.keys() == other.keys()
        for key, value in state.items():
            assert value.dtype == other[key].dtype and torch.equal(value, other[key]), (name, key)
    assert one.plan() == two.plan()


@pytest.mark.parametrize(
    "options,dtype",
    [
        ({}, torch.float32),
        ({"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_grad_norm": 0.3}, torch.float32),
        ({"slorb_group": 16, "slorb_init": "data", "slorb_train_x": True, "weight_decay": 0.1}, torch.float32),
        ({"slorb_group": 4, "slorb_init": "svd", "mask_freeze_ratio": 0.5}, torch.float32),
        ({"bf16": True}, torch.bfloat16),
        ({"start": "sparsegpt", "masked_decay_kind": "gradient"}, torch.float32),
        ({"masked_decay_kind": "paper", "masked_decay": 0.01, "gradient_checkpointing": True}, torch.float32),
        ({"teacher_cache": "cache"}, torch.float32),
        ({"max_steps": -1, "num_train_epochs": 2, "per_device_train_batch_size": 8}, torch.float32),
    ],
    ids=[
        "plain",
        "accumulation",
        "branches",
        "frozen at the checkpoint",
        "bf16",
        "gradient",
        "paper",
        "cache",
        "epochs",
    ],
)
def test_resuming_changes_nothing(llama, tokens, ast, tmp_path, options, dtype):
    if "teacher_cache" in options:
        options = {**options, "teacher_cache": str(tmp_path / "cache")}
        write_teacher_cache(llama(dtype), tokens(), tmp_path / "cache", top_k=8, progress=False)
    straight = ASTTrainer(llama(dtype), ast(**SAVING, **options), tokens())
    straight.train()
    folder = tmp_path / "run" / "checkpoint-6"
    assert is_complete(folder) and straight.state.global_step > 6
    resumed = ASTTrainer(llama(dtype), ast(**SAVING, **options), tokens())
    resumed.train(resume_from_checkpoint=str(folder))
    assert_same_run(straight, resumed)


@pytest.mark.parametrize("options", [{}, {"slorb_train_x": True}], ids=["sums", "X"])
def test_a_checkpoint_opens_with_its_branches(llama, tokens, ast, tmp_path, options):
    trainer = ASTTrainer(llama(), ast(**SAVING, slorb_group=16, max_steps=6, **options), tokens())
    trainer.train()
    trainer.save_model(str(tmp_path / "model"))
    ids = torch.cat(tokens(4))
    for folder in (tmp_path / "run" / "checkpoint-6", tmp_path / "model"):
        found = AutoModelForCausalLM.from_pretrained(folder)
        assert side_branches(found) == side_branches(trainer.model) == trainer.plan().side
        with torch.no_grad():
            assert torch.equal(found(ids).logits, trainer.model.eval()(ids).logits)


def test_masks_come_from_the_checkpoint_and_not_from_the_weights(llama, tokens, ast, tmp_path):
    """Two steps after the last choice, masks by magnitude would be others; with no more choices they must stay."""
    options = {**SAVING, "save_steps": 3, "mask_update_steps": 2}
    straight = ASTTrainer(llama(), ast(**options), tokens())
    straight.train()
    resumed = ASTTrainer(llama(), ast(**options), tokens())
    begun = {}
    begin = resumed._begin

    def look():
        begin()
        begun.update(resumed.masked_optimizer.keep())
        states = resumed.masked_optimizer.state
        dense = {name: states[resumed.model.get_submodule(name).weight]["dense"] for name in begun}
        fresh = {name: resumed.args.parsed_pattern.project(w.abs()) for name, w in dense.items()}
        assert any(not torch.equal(fresh[name], keep) for name, keep in begun.items())

    for callback in resumed.callback_handler.callbacks:
        if isinstance(callback, trainer_module.Callback):
            callback._begin = look
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-3"))
    saved = torch.load(tmp_path / "run" / "checkpoint-3" / "optimizer.pt", weights_only=True)
    for index, name in enumerate(begun):
        assert torch.equal(begun[name], (saved["state"][index]["flags"] & 1).bool())
    assert_same_run(straight, resumed)


def test_resuming_the_newest(llama, tokens, ast, tmp_path):
    straight = ASTTrainer(llama(), ast(**SAVING, save_total_limit=1), tokens())
    straight.train()
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-12"]
    resumed = ASTTrainer(llama(), ast(**SAVING, save_total_limit=1), tokens())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 12
    assert_same_run(straight, resumed)


# --- refused --------------------------------------------------------------------------------------------------------


@pytest.fixture
def checkpoint(llama, tokens, ast, tmp_path):
    ASTTrainer(llama(), ast(**SAVING, max_steps=6), tokens()).train()
    return tmp_path / "run" / "checkpoint-6"


def test_other_arguments_are_refused_and_listed(llama, tokens, ast, checkpoint):
    other = ast(**SAVING, max_steps=8, hysteresis=0.2, pattern="1:4", targets=["re:.*mlp.*"], weight_decay=0.1)
    model = llama()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as caught:
        ASTTrainer(model, other, tokens()).train(resume_from_checkpoint=str(checkpoint))
    message = str(caught.value)
    for difference in (
        "max_steps was 6, is 8",
        "hysteresis was 0.3, is 0.2",
        "pattern was '2:4', is '1:4'",
        "targets was ['Linear'], is ['re:.*mlp.*']",
        "weight_decay was 0.0, is 0.1",
    ):
        assert difference in message
    assert message.count(" is ") == 5 and "start anew in another output_dir" in message
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_what_does_not_change_the_result_may_differ(llama, tokens, ast, checkpoint):
    options = {**SAVING, "max_steps": 6, "save_steps": 2, "logging_steps": 5, "gradient_checkpointing": True}
    ASTTrainer(llama(), ast(**options), tokens()).train(resume_from_checkpoint=str(checkpoint))


def test_folders_that_are_no_checkpoint(llama, tokens, ast, checkpoint, tmp_path):
    def resume(value, **options):
        ASTTrainer(llama(), ast(**SAVING, max_steps=6, **options), tokens()).train(resume_from_checkpoint=value)

    with pytest.raises(FileNotFoundError, match="resume_from_checkpoint='.*missing': there is no such folder"):
        resume(str(tmp_path / "missing"))
    with pytest.raises(CheckpointError, match="resume_from_checkpoint=True, and .*empty holds no complete checkpoint"):
        resume(True, output_dir=str(tmp_path / "empty"))
    (checkpoint / "trainer_state.json").write_text('{"global_step": 6, ')
    with pytest.raises(CheckpointError, match="checkpoint-6 is no complete checkpoint.*resume_from_checkpoint=True"):
        resume(str(checkpoint))
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        resume(True)


# --- complete or not there ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["save_model", "_save_optimizer_and_scheduler", "_save_rng_state"])
@pytest.mark.parametrize(
    "error", [OSError("No space left on device"), KeyboardInterrupt()], ids=["disk full", "ctrl-c"]
)
def test_a_checkpoint_is_complete_or_not_there(llama, tokens, ast, tmp_path, monkeypatch, name, error):
    """Whatever part of the second save fails, the first is there, and named as the one to resume."""
    original, calls = getattr(ASTTrainer, name), []

    def fails(self, *args, **options):
        calls.append(None)
        original(self, *args, **options)
        if len(calls) == 2:
            raise error

    monkeypatch.setattr(ASTTrainer, name, fails)
    with pytest.raises(type(error)):
        ASTTrainer(llama(), ast(**SAVING, save_total_limit=1), tokens()).train()
    assert [folder.name for folder in (tmp_path / "run").glob("checkpoint-*")] == ["checkpoint-6"]
    assert last_checkpoint(str(tmp_path / "run")) == tmp_path / "run" / "checkpoint-6"


def test_older_checkpoints_go_once_the_new_one_is_complete(llama, tokens, ast, tmp_path, monkeypatch):
    import transformers.trainer

    rotate, seen = transformers.trainer.rotate_checkpoints, []

    def look(*args, **options):
        seen.append(sorted(folder.name for folder in (tmp_path / "run").glob("checkpoint-*") if is_complete(folder)))
        rotate(*args, **options)

    monkeypatch.setattr(transformers.trainer, "rotate_checkpoints", look)
    ASTTrainer(llama(), ast(**SAVING, save_total_limit=1), tokens()).train()
    assert seen == [["checkpoint-6"], ["checkpoint-12", "checkpoint-6"]]


def test_a_save_that_was_killed_is_passed_over(checkpoint):
    """Every file but the last one is there, as when the process dies; the one before it is the newest complete."""
    killed = checkpoint.with_name("checkpoint-8")
    shutil.copytree(checkpoint, killed)
    (killed / "trainer_state.json").unlink()
    assert last_checkpoint(str(checkpoint.parent)) == checkpoint
    assert not is_complete(killed)


def test_what_an_earlier_run_left_under_the_same_name_is_not_mixed_in(llama, tokens, ast, checkpoint):
    (checkpoint / "optimizer_of_another.pt").touch()
    made_by = json.loads((checkpoint / CONFIG_FILE).read_text())
    ASTTrainer(llama(), ast(**SAVING, max_steps=6, hysteresis=0.2), tokens()).train()
    assert not (checkpoint / "optimizer_of_another.pt").exists()
    assert json.loads((checkpoint / CONFIG_FILE).read_text()) == {
        **made_by,
        "arguments": {**made_by["arguments"], "hysteresis": 0.2},
    }
    assert Path(checkpoint / "model.safetensors").is_file()
