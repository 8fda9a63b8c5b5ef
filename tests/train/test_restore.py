"""A run through `prune_` leaves the model as it was when it fails, and a plain one, pruned, when it does not."""

import copy

import pytest
import torch

import sparsekit as sk
from sparsekit.nn.side import SideLinear
from sparsekit.train.ast_trainer import ASTTrainer
from sparsekit.train.optimizer import MaskedAdamW
from sparsekit.train.restore import Kept, restored_whole_on_failure
from sparsekit.train.teachers import teaching_copy

EVERYTHING = {"slorb_group": 16, "slorb_init": "mean", "bf16": True, "gradient_checkpointing": True}
"""Options that replace modules, wrap the forward, add hooks and change the config."""


def state_of(model):
    """All that must not change: modules by identity, values, gradients wanted, modes, attributes, config."""
    return {
        "modules": {name: id(module) for name, module in model.named_modules()},
        "parameters": {name: id(parameter) for name, parameter in model.named_parameters()},
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "wants_gradient": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "training": {name: module.training for name, module in model.named_modules()},
        "attributes": {name: attributes_of(module) for name, module in model.named_modules()},
        "config": (copy.deepcopy(vars(model.config)), copy.deepcopy(vars(model.generation_config))),
    }


def attributes_of(module):
    return {name: len(value) if isinstance(value, dict) else repr(type(value)) for name, value in vars(module).items()}


def assert_same(before, after):
    for what in before.keys() - {"values"}:
        assert before[what] == after[what], what
    assert before["values"].keys() == after["values"].keys()
    for name, value in before["values"].items():
        assert torch.equal(value, after["values"][name]), name


def mixed(model):
    """Some modules in training mode, some parameters frozen, a hook."""
    model.train()
    model.model.layers[1].eval()
    model.model.embed_tokens.weight.requires_grad_(False)
    model.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    handle = model.model.norm.register_forward_hook(lambda *args: None)
    return model, handle


@pytest.mark.parametrize("kd_weight", [0.5, 0.0])
@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
@pytest.mark.parametrize("at", ["start", "step", "refresh"])
def test_a_run_that_fails_leaves_the_model_as_it_was(llama, tokens, ast, monkeypatch, at, error, kd_weight):
    """Whether its values come from the teacher or from a copy of their own."""
    model, handle = mixed(llama())
    before = state_of(model)
    calls = []

    def fails(original):
        def call(*args, **options):
            calls.append(None)
            if len(calls) == (1 if at == "start" else 3):
                raise error
            return original(*args, **options)

        return call

    where, name = {
        "start": (ASTTrainer, "_install_branches"),
        "step": (MaskedAdamW, "step"),
        "refresh": (MaskedAdamW, "refresh_masks_"),
    }[at]
    monkeypatch.setattr(where, name, fails(getattr(where, name)))
    with pytest.raises(type(error)):
        sk.prune_(model, ast(kd_weight=kd_weight, ce_weight=1.0, **EVERYTHING), dataset=tokens(), progress=False)
    assert len(calls) == (1 if at == "start" else 3)
    assert_same(before, state_of(model))
    assert len(model.model.norm._forward_hooks) == 1
    handle.remove()
    assert not model.model.norm._forward_hooks


@pytest.mark.parametrize(
    "options,dataset",
    [
        ({}, None),
        ({"per_device_train_batch_size": 100}, "tokens"),
        ({"masked_decay": 99.0, "warmup_steps": 0}, "tokens"),
    ],
    ids=["no data", "too little data", "lambda"],
)
def test_a_run_that_cannot_begin_leaves_the_model_as_it_was(llama, tokens, ast, options, dataset):
    model, _ = mixed(llama())
    before = state_of(model)
    with pytest.raises(ValueError):
        data = tokens() if dataset else None
        sk.prune_(model, ast(**{**EVERYTHING, **options}), dataset=data, progress=False)
    assert_same(before, state_of(model))


def test_a_run_that_succeeds_leaves_a_plain_model(llama, tokens, ast):
    """No forward in bf16, hook, checkpointing or cache that is off; the mode and the gradients wanted as they were."""
    model = llama()
    before = state_of(model)
    options = {name: value for name, value in EVERYTHING.items() if not name.startswith("slorb")}
    plan = sk.prune_(model, ast(**options), dataset=tokens(), progress=False)
    after = state_of(model)
    for what in before.keys() - {"values"}:
        assert before[what] == after[what], what
    for name, mask in plan.masks.items():
        assert torch.equal(model.get_submodule(name).weight.detach() != 0, mask.keep)
    assert not any(parameter.grad is not None for parameter in model.parameters())
    assert model(torch.cat(tokens(2))).logits.dtype == torch.float32
    copy.deepcopy(model)


def test_new_layers_take_the_mode_of_the_model(llama, tokens, ast):
    for training in (False, True):
        model = llama().train(training)
        plan = sk.prune_(model, ast(**EVERYTHING, max_steps=2), dataset=tokens(), progress=False)
        layers = [module for module in model.modules() if isinstance(module, SideLinear)]
        assert len(layers) == len(plan.side) == 14
        assert {module.training for module in model.modules()} == {training}


def test_the_teacher_is_the_only_other_copy(llama, tokens, ast, monkeypatch):
    """Where there is a teacher, no values are copied beside it; where there is none, one copy is made."""
    copies = []

    class Counted(Kept):
        def __init__(self, *args):
            super().__init__(*args)
            copies.append((not self._copied, self._twin is None))

    monkeypatch.setattr("sparsekit.train.restore.Kept", Counted)
    teachers = []
    begin = ASTTrainer._begin
    monkeypatch.setattr(ASTTrainer, "_begin", lambda self: (teachers.append(self.teacher), begin(self))[1])
    for kd_weight in (0.5, 0.0):
        sk.prune_(llama(), ast(kd_weight=kd_weight, max_steps=1), dataset=tokens(), progress=False)
    assert copies == [(True, False), (False, True)]
    assert teachers[0] is not None and teachers[1] is None


def test_learning_a_mask_takes_no_copy(llama, tokens, tmp_path, monkeypatch):
    copies = []

    class Counted(Kept):
        def __init__(self, *args):
            super().__init__(*args)
            copies.append(len(self._copied))

    monkeypatch.setattr("sparsekit.train.restore.Kept", Counted)
    run = {"max_steps": 1, "prior": "magnitude", "use_cpu": True, "save_strategy": "no", "output_dir": str(tmp_path)}
    sk.prune_(llama(), sk.MaskLLM(**run), dataset=tokens(), progress=False)
    assert copies == [0]


@pytest.mark.parametrize("twin", ["none", "copy", "in fewer bits"])
def test_the_body_alone(llama, twin):
    """Values come from the twin where it has the very same, and else from copies."""
    model = llama()
    autocast = torch.bfloat16 if twin == "in fewer bits" else None
    twin = None if twin == "none" else teaching_copy(model, autocast)
    linear = {name for name in model.state_dict() if "proj" in name or "lm_head" in name}
    copied = set(Kept(model, twin)._copied)
    assert copied == (set(model.state_dict()) if twin is None else linear if autocast else set())
    before = state_of(model)
    with pytest.raises(ZeroDivisionError), restored_whole_on_failure(model, twin):
        model.train().requires_grad_(False)
        model.model.layers[0].mlp.gate_proj = torch.nn.Identity()
        for parameter in model.parameters():
            parameter.data.fill_(7)
        model.config.use_cache = False
        model.note = "left here"
        raise ZeroDivisionError
    assert_same(before, state_of(model))
