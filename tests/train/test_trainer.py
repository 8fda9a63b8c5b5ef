"""What a run refuses, what it computes in, and what it leaves; for what can go wrong between Trainer and masks."""

import copy
import math

import pytest
import torch

import sparsekit as sk
from sparsekit.errors import CheckpointError, NonFiniteError, Unsupported
from sparsekit.nn.side import side_layers
from sparsekit.train import ASTTrainer
from sparsekit.train.trainer import is_complete


@pytest.mark.parametrize(
    "options, message",
    [
        (
            {"load_best_model_at_end": True, "eval_strategy": "steps", "save_strategy": "steps"},
            "load_best_model_at_end",
        ),
        ({"save_only_model": True}, "save_only_model"),
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1"),
        ({"optim": "adafactor"}, "optim="),
        ({"optim": "adamw_torch_8bit"}, "optim="),
        ({"max_grad_norm": None}, "max_grad_norm=None.*0 to leave"),
        ({"format": "semi24_int4", "quantise_ratio": 0.5, "mask_freeze_ratio": 0.1}, "quantise_ratio=0.5"),
    ],
)
def test_options_that_would_break_masks_are_refused(ast, options, message):
    with pytest.raises(ValueError, match=message):
        ast(**options)


def test_an_optimizer_or_loss_of_the_user_is_refused(llama, tokens, ast):
    model = llama()
    with pytest.raises(ValueError, match="optimizers"):
        ASTTrainer(model, ast(), tokens(), optimizers=(torch.optim.SGD(model.parameters(), 0.1), None))
    with pytest.raises(ValueError, match="compute_loss_func"):
        ASTTrainer(model, ast(), tokens(), compute_loss_func=lambda *args: 0)


def test_several_gpus_in_one_process_are_refused(llama, tokens, ast, monkeypatch):
    config = ast()
    monkeypatch.setattr(type(config), "n_gpu", 2)
    with pytest.raises(Unsupported, match="accelerate launch"):
        ASTTrainer(llama(), config, tokens())


def test_the_model_is_no_teacher_of_itself(llama, tokens, ast):
    model = llama()
    with pytest.raises(ValueError, match="a copy is made"):
        ASTTrainer(model, ast(), tokens(), teacher=model)


def test_a_second_run_of_one_trainer_is_refused(llama, tokens, ast):
    trainer = ASTTrainer(llama(), ast(), tokens())
    trainer.train()
    with pytest.raises(ValueError, match="has trained already"):
        trainer.train()


def test_another_run_in_the_folder_is_not_the_last_good_checkpoint(llama, tokens, ast, tmp_path):
    folder = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    ASTTrainer(llama(), ast(**folder), tokens()).train()
    broken = llama()
    with torch.no_grad():
        broken.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NonFiniteError, match="No checkpoint was written yet"):
        ASTTrainer(broken, ast(**folder, start="magnitude"), tokens()).train()


def test_a_checkpoint_without_its_optimizer_is_none(llama, tokens, ast, tmp_path):
    folder = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    ASTTrainer(llama(), ast(**folder), tokens()).train()
    checkpoint = tmp_path / "checkpoint-2"
    assert is_complete(checkpoint)
    (checkpoint / "optimizer.pt").unlink()
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        ASTTrainer(llama(), ast(**folder), tokens()).train(resume_from_checkpoint=str(checkpoint))


def test_resuming_on_other_data_is_refused(llama, tokens, ast, tmp_path):
    folder = {"output_dir": str(tmp_path), "save_strategy": "steps", "save_steps": 2}
    ASTTrainer(llama(), ast(**folder), tokens()).train()
    other = [(sample + 1) % 8 for sample in tokens()]
    with pytest.raises(CheckpointError, match="data was"):
        ASTTrainer(llama(), ast(**folder), other).train(resume_from_checkpoint=True)


def test_in_bf16_logits_are_never_copied_to_fp32(llama, tokens, ast):
    seen = []

    class Spy(ASTTrainer):
        def _losses_of(self, model, inputs, distils, num_items=None):
            found = super()._losses_of(model, inputs, distils, num_items)
            seen.append((found[1].logits.dtype, model.training))
            return found

    model = llama()
    trainer = Spy(model, ast(bf16=True), tokens(), eval_dataset=tokens(4))
    trainer.train()
    assert {dtype for dtype, training in seen if training} == {torch.bfloat16}
    assert "forward" not in vars(model) and model(torch.zeros(1, 2, dtype=torch.long)).logits.dtype == torch.float32
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert len(losses) == 12 and all(map(math.isfinite, losses))


def test_a_failed_start_leaves_the_model_as_it_was(llama, tokens, ast, monkeypatch):
    model = llama()
    before = copy.deepcopy(model.state_dict())
    trainer = ASTTrainer(model, ast(slorb_group=16), tokens())

    def fail(*args, **kwargs):
        raise RuntimeError("no memory")

    monkeypatch.setattr("sparsekit.train.ast_trainer.with_removed", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        trainer.train()
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_a_plan_with_branches_is_no_start(llama, tokens, ast):
    plan = sk.prune_(llama(), ast(slorb_group=16), dataset=tokens(), progress=False)
    with pytest.raises(ValueError, match="plan of masks alone"):
        ASTTrainer(llama(), ast(start=plan), tokens()).train()


def test_a_frozen_svd_branch_keeps_its_X(llama, tokens, ast):
    model = llama()
    trainer = ASTTrainer(model, ast(slorb_group=4, slorb_init="svd"), tokens())
    trainer._before_training(None)
    first = {name: layer.side_X.clone() for name, layer in side_layers(model).items()}
    trainer = ASTTrainer(llama(), ast(slorb_group=4, slorb_init="svd"), tokens())
    trainer.train()
    assert first and all(torch.equal(branch.X, first[name]) for name, branch in trainer.plan().side.items())


def test_a_run_that_ends_early_says_so(llama, tokens, ast):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 2

    trainer = ASTTrainer(llama(), ast(), tokens(), callbacks=[Stop()])
    trainer.train()
    assert any("before the masks froze" in note for note in trainer.plan().notes)


def test_automatic_lambda_needs_a_schedule_and_a_number_does_not(llama, tokens, ast):
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 2}
    options |= {"metric_for_best_model": "loss"}
    with pytest.raises(ValueError, match="give masked_decay as a number"):
        ASTTrainer(llama(), ast(**options), tokens(), eval_dataset=tokens(4)).train()
    ASTTrainer(llama(), ast(**options, masked_decay=1.0), tokens(), eval_dataset=tokens(4)).train()
