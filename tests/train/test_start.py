"""Runs that start from a plan: what of it counts, what goes on into the plan of the run, and what is refused."""

import copy

import pytest
import torch

import sparsekit as sk
from sparsekit.methods import Magnitude
from sparsekit.plan import Plan
from sparsekit.snapshot import Snapshot
from sparsekit.surgery import reorder_
from sparsekit.train.ast_trainer import ASTTrainer
from sparsekit.train.maskllm_config import MaskLLMConfig
from sparsekit.train.maskllm_trainer import MaskLLMTrainer
from sparsekit.train.start import START_METHODS, check_start


@pytest.fixture
def uneven(llama):
    """Make a Llama whose inner channels are of unlike strength, so that their order matters."""

    def make():
        model = llama(intermediate_size=64)
        generator = torch.Generator().manual_seed(1)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 and "layers" in name:
                parameter.data *= 5 * torch.rand(parameter.shape[1], generator=generator) ** 2 + 0.1
        return model

    return make


@pytest.fixture
def maskllm(tmp_path):
    """Make arguments of a run that learns next to nothing, so that masks stay those of the prior."""

    def make(**options):
        settled = {"learning_rate": 1e-12, "prior_lean": 1.0, "kd_weight": 0.0, "max_steps": 4, "save_strategy": "no"}
        run = {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "output_dir": str(tmp_path)}
        return MaskLLMConfig(**{**settled, **run, **options})

    return make


def plan_for(model, **options):
    return sk.prune_(copy.deepcopy(model), Magnitude(**options), progress=False)


def logits_of(model, tokens):
    with torch.no_grad():
        return model.eval()(torch.cat(tokens(8))).logits


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same(model, state):
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_reordering_alone_changes_no_output_and_removes_nothing(uneven, tokens):
    model = uneven()
    plan, before = plan_for(model, permute=True), logits_of(model, tokens)
    assert plan.perms
    assert reorder_(model, plan) is model
    torch.testing.assert_close(logits_of(model, tokens), before, rtol=1e-4, atol=1e-5)
    moved = state_of(model)
    assert all(bool((model.get_submodule(name).weight != 0).all()) for name in plan.masks)
    assert_same(reorder_(model, plan), moved)
    assert any(not torch.equal(value, moved[name]) for name, value in uneven().state_dict().items())


def test_inputs_that_are_in_their_old_order_are_refused(uneven, tokens, ast, maskllm):
    model = uneven()
    plan, before = plan_for(model, permute=True), state_of(model)
    for argument, run in (
        ("start", lambda: ASTTrainer(model, ast(start=plan), tokens())),
        ("prior", lambda: MaskLLMTrainer(model, maskllm(prior=plan), tokens())),
    ):
        message = (
            rf"{argument}: the plan reorders the inputs of \S+, and .*reorder_\(model, plan\) first.*permute=False"
        )
        with pytest.raises(ValueError, match=message):
            run().train()
        assert_same(model, before)


def test_the_order_goes_on_into_the_plan_of_a_learnt_mask(uneven, tokens, maskllm, tmp_path):
    """Weights stay, so the plan alone makes the trained model of a copy in the old order; after a resume, too."""
    model, other = uneven(), uneven()
    start = plan_for(model, permute=True)
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = MaskLLMTrainer(reorder_(model, start), maskllm(prior=start, **saving), tokens())
    trainer.train()
    plan = trainer.plan()
    assert plan.masks == start.masks and plan.perms == start.perms
    plan.save(tmp_path / "plan")
    sk.apply_(other, Plan.load(tmp_path / "plan"))
    assert_same(other, state_of(model))
    resumed = MaskLLMTrainer(reorder_(uneven(), start), maskllm(prior=start, **saving), tokens())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.plan() == plan


def test_the_order_goes_on_into_the_plan_of_a_trained_model(uneven, tokens, ast):
    model = uneven()
    start = plan_for(model, permute=True)
    options = {"save_strategy": "steps", "save_steps": 6}
    trainer = ASTTrainer(reorder_(model, start), ast(start=start, **options), tokens())
    trainer.train()
    plan = trainer.plan()
    assert plan.perms == start.perms
    before = state_of(model)
    assert_same(sk.apply_(model, plan), before)
    resumed = ASTTrainer(reorder_(uneven(), start), ast(start=start, **options), tokens())
    resumed.train(resume_from_checkpoint=True)
    assert resumed.plan() == plan
    targets = ["re:.*self_attn.*"]
    part = ASTTrainer(reorder_(uneven(), start), ast(start=start, targets=targets, max_steps=1), tokens())
    part.train()
    assert set(part.plan().perms) == {name for name in start.perms if "self_attn" in name}


def test_scales_are_left_aside_and_a_note_says_so(uneven, tokens, ast, maskllm):
    model = uneven()
    start = plan_for(model, format="semi24_int4")
    assert start.scales
    for argument, trainer in (
        ("start", ASTTrainer(uneven(), ast(start=start), tokens())),
        ("prior", MaskLLMTrainer(uneven(), maskllm(prior=start), tokens())),
    ):
        trainer.train()
        plan = trainer.plan()
        assert not plan.scales and f"{argument}: the plan's scales of semi24_int4 were left aside" in plan.notes


def test_branches_are_refused(uneven, tokens, ast, maskllm):
    model = uneven()
    trained = ASTTrainer(uneven(), ast(slorb_group=16, max_steps=1), tokens())
    trained.train()
    start = trained.plan()
    with pytest.raises(ValueError, match="start: the plan holds cuts or side branches"):
        ASTTrainer(model, ast(start=start), tokens()).train()
    with pytest.raises(ValueError, match="prior: the plan holds cuts or side branches"):
        MaskLLMTrainer(model, maskllm(prior=start), tokens()).train()


def test_both_know_the_same_methods(ast, maskllm):
    for method in START_METHODS:
        assert ast(start=method).start == maskllm(prior=method).prior == method
    for argument, make in (("start", ast), ("prior", maskllm)):
        with pytest.raises(ValueError, match=f"unknown {argument} 'obs'.*sparsegpt.*A Plan will do, too"):
            make(**{argument: "obs"})
    with pytest.raises(ValueError, match="unknown start None"):
        check_start("start", None)


@pytest.mark.parametrize("fails_at", [1, 5])
def test_masks_go_into_all_layers_or_none(uneven, tokens, maskllm, monkeypatch, fails_at):
    """When a learnt mask is put in at last, whatever fails then."""
    model = uneven()
    before, remember, calls = state_of(model), Snapshot.remember, []
    trainer = MaskLLMTrainer(model, maskllm(), tokens())
    train = type(trainer).__mro__[1].train

    def train_then_fail(self, *args, **kwargs):
        result = train(self, *args, **kwargs)

        def failing(snapshot, name):
            calls.append(name)
            if len(calls) == fails_at:
                raise KeyboardInterrupt
            remember(snapshot, name)

        monkeypatch.setattr(Snapshot, "remember", failing)
        return result

    monkeypatch.setattr(type(trainer).__mro__[1], "train", train_then_fail)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert len(calls) == fails_at
    assert_same(model, before)
