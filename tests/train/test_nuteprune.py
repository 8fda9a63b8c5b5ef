"""NutePrune on tiny models: the budget is met, the cut changes nothing, and nothing is left on the model."""

import copy
import gc

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, TrainerCallback

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.benchmarking.latency_table import LatencyTable
from sparsekit.errors import CheckpointError, NonFiniteError
from sparsekit.nn import side_layers
from sparsekit.train import constraint as constraint_module
from sparsekit.train import nuteprune_trainer
from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_loss import nonzero_square
from sparsekit.train.nuteprune_student import Student
from sparsekit.train.nuteprune_trainer import STATE_FILE, NutePruneTrainer, family
from sparsekit.train.trainer import TrainingDiverged

VOCABULARY = 61
SAVING = {"save_strategy": "steps", "save_steps": 4}


@pytest.fixture(scope="module", autouse=True)
def _small_heap():
    """Each run of a Trainer collects garbage: among the objects of these tests alone that is quick."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def llama(kv_heads=2, dtype=torch.float32, **changes):
    """Four heads of four, and so many channels that one is a thousandth of the blocks."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 203, "num_hidden_layers": 3, "num_attention_heads": 4}
    sizes |= {"vocab_size": VOCABULARY, "max_position_embeddings": 16, "num_key_value_heads": kv_heads}
    sizes |= {"initializer_range": 0.2, "bos_token_id": 0, "eos_token_id": 1}
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).to(dtype).eval()


def text(num=16, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(2, VOCABULARY, (num, 12), generator=generator))


def config(folder, **changes):
    """Gates that get there in a few steps."""
    short = {"max_steps": 10, "per_device_train_batch_size": 4, "save_strategy": "no", "logging_steps": 1}
    short |= {"sparsity": 0.4, "gate_learning_rate": 2.0, "multiplier_learning_rate": 2.0, "learning_rate": 5e-3}
    short |= {"sparsity_warmup": 0.3, "frozen_share": 0.3, "teacher_steps": 2, "lora_rank": 2}
    short |= {"output_dir": str(folder), "use_cpu": True, "disable_tqdm": True}
    return NutePruneConfig(**{**short, **changes})


def train(model, folder, data=None, callbacks=None, resume=None, eval_data=None, **changes):
    data = text() if data is None else data
    trainer = NutePruneTrainer(model, config(folder, **changes), data, eval_data, callbacks=callbacks)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.stack(text(3, seed=5))).logits


def in_blocks(model):
    """Parameters of the blocks' linear layers, counted from the model alone."""
    return sum(p.numel() for name, p in model.model.layers.named_parameters() if "norm" not in name)


def assert_same_model(model, expected):
    assert [name for name, _ in model.named_modules()] == [name for name, _ in expected.named_modules()]
    for (name, now), (_, then) in zip(model.state_dict().items(), expected.state_dict().items(), strict=True):
        assert torch.equal(now, then), name


def assert_plain(model, before):
    """Nothing of the training is left but other numbers."""
    modules = dict(before)
    assert all(module is modules[name] for name, module in model.named_modules())
    assert all(parameter.requires_grad for parameter in model.parameters())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "forward" not in vars(module)


class AtStepEnd(TrainerCallback):
    def __init__(self, do):
        self.do = do

    def on_step_end(self, args, state, control, **kwargs):
        self.do(state)


# --- to the end ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gates", ["hard_concrete", "deterministic"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_the_budget_is_met_and_the_cut_changes_nothing(tmp_path, kv_heads, gates):
    model = llama(kv_heads)
    modules, size = list(model.named_modules()), in_blocks(model)
    trainer = train(model, tmp_path, gates=gates)
    assert_plain(model, modules)
    plan, masked = trainer.plan(), logits_of(model)
    assert plan.made_by.method == "nuteprune" and plan.made_by.updates_weights and plan.cuts
    assert in_blocks(model) == size
    sliced = sk.apply_(copy.deepcopy(model), plan)
    assert abs(1 - in_blocks(sliced) / size - 0.4) <= 0.0015
    assert (logits_of(sliced) - masked).abs().max() <= 1e-5 * masked.abs().max()
    assert (logits_of(llama(kv_heads)) - masked).abs().max() > 0.1
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert [line["target_sparsity"] for line in logs[:4]] == pytest.approx([0, 0.4 / 3, 0.8 / 3, 0.4], rel=1e-3)
    assert all(abs(line["real_sparsity"] - 0.4) <= 0.0015 for line in logs[-3:])
    assert logs[0]["kd_loss"] == pytest.approx(logs[0]["loss"], rel=1e-4)
    assert {"expected_sparsity", "multiplier_linear", "multiplier_square", "teacher_sparsity"} <= logs[0].keys()
    plan.save(tmp_path / "plan.safetensors")
    assert sk.Plan.load(tmp_path / "plan.safetensors") == plan


def test_gates_get_to_the_target_and_teachers_follow(tmp_path):
    trainer = train(llama(), tmp_path, max_steps=24, teacher_steps=1, frozen_share=0.25)
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert max(line["expected_sparsity"] for line in logs[:18]) > 0.3
    assert any(line["teacher_sparsity"] > 0 for line in logs)


def test_lora_makes_up_for_what_gates_close(tmp_path):
    """With the gates of one run: its LoRA against none."""
    data, model = text(), llama()
    dense = copy.deepcopy(model)
    trainer = train(model, tmp_path, data, max_steps=40, frozen_share=0.6, learning_rate=2e-2, lora_rank=8)
    cut = {name: each.kept for name, each in trainer.plan().cuts.items()}
    bare = copy.deepcopy(dense)
    for width in find_widths(bare):
        if width.name in cut:
            gone = torch.ones(width.num_units, dtype=torch.bool).index_fill(0, cut[width.name], False)
            bare.get_submodule(width.name).weight.data[:, width.columns_of(gone.nonzero().flatten())] = 0
    batch = torch.stack(data)
    with torch.no_grad():
        wanted = torch.log_softmax(dense(batch).logits, -1)
        far = [
            float((wanted.exp() * (wanted - torch.log_softmax(each.eval()(batch).logits, -1))).sum(-1).mean())
            for each in (model, bare)
        ]
    assert far[0] < 0.7 * far[1], far


def test_pruning_and_sparsifying(tmp_path):
    model, size = llama(), in_blocks(llama())
    plan = sk.prune_(model, config(tmp_path), dataset=text(), progress=False)
    masked = logits_of(model)
    sk.apply_(model, plan)
    assert (logits_of(model) - masked).abs().max() <= 1e-5 * masked.abs().max()
    for pattern in ("structured", "2:4"):  # the second is the default, which a config's own pattern goes before
        other = llama()
        with pytest.warns(UserWarning, match="of the params of the blocks are left"):
            same = sk.sparsify(other, pattern, method=config(tmp_path), dataset=text(), progress=False)
        assert same is other and abs(1 - in_blocks(other) / size - 0.4) <= 0.0015
        assert torch.equal(logits_of(other), logits_of(model))
    with pytest.raises(ValueError, match="constraints=.*and method has its own budget"):
        sk.sparsify(llama(), "structured", method=config(tmp_path), constraints={"flops": 0.5}, dataset=text())


def test_only_targets_have_gates(tmp_path):
    model = llama()
    plan = sk.prune_(model, config(tmp_path, sparsity=0.2), dataset=text(), targets="re:.*mlp.*", progress=False)
    assert {cut.kind for cut in plan.cuts.values()} == {"channels"}
    with pytest.raises(ValueError, match="targets and ignore leave no width whole"):
        sk.prune_(model, config(tmp_path), dataset=text(), targets="re:.*q_proj", progress=False)


def test_a_uniform_result_loads_as_a_plain_checkpoint(tmp_path):
    model, size = llama(), in_blocks(llama())
    plan = train(model, tmp_path, uniform=True).plan()
    sk.apply_(model, plan)
    sizes = {(layer.self_attn.q_proj.out_features, layer.mlp.up_proj.out_features) for layer in model.model.layers}
    assert len(sizes) == 1 and abs(1 - in_blocks(model) / size - 0.4) <= 0.005
    model.save_pretrained(tmp_path / "model")
    stock = LlamaConfig.from_pretrained(tmp_path / "model")
    ((queries, channels),) = sizes
    assert (stock.num_attention_heads * stock.head_dim, stock.intermediate_size) == (queries, channels)
    assert getattr(stock, "quantization_config", None) is None
    assert torch.equal(logits_of(AutoModelForCausalLM.from_pretrained(tmp_path / "model")), logits_of(model))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_hidden_dimensions_and_layers(tmp_path, tied):
    model = llama(tie_word_embeddings=tied)
    dense = copy.deepcopy(model)
    options = {"hidden": True, "layers": True, "sparsity": 0.5, "max_steps": 16, "gate_learning_rate": 4.0}
    if tied:
        with pytest.raises(ValueError, match="hidden=True, and lm_head shares its weight.*untie=True"):
            train(model, tmp_path, **options)
        assert_same_model(model, dense)
        options["untie"] = True
    plan = train(model, tmp_path, **options).plan()
    masked, size = logits_of(model), in_blocks(model)
    assert model.config.tie_word_embeddings is False
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    sk.apply_(model, plan)
    assert (logits_of(model) - masked).abs().max() <= 3e-5 * masked.abs().max()
    assert 1 - in_blocks(model) / size == pytest.approx(0.5, abs=0.005)


def test_layers_that_go(tmp_path, monkeypatch):
    """The first layer's gate is closed by hand: names of what is cut in the others move up."""
    freeze = Student.freeze_

    def close_the_first(self, num_done):
        with torch.no_grad():
            self.gates.split(self.gates.log_alpha)["model.layers"].copy_(torch.tensor([-4.6, 4.6, 4.6]))
        freeze(self, num_done)

    monkeypatch.setattr(Student, "freeze_", close_the_first)
    model, size = llama(), in_blocks(llama())
    plan = train(model, tmp_path, layers=True, max_steps=6).plan()
    assert plan.cuts["model.layers"].kept.tolist() == [1, 2]
    assert plan.cuts.keys() - {"model.layers"} and not any(".2." in name for name in plan.cuts)
    masked = logits_of(model)
    sk.apply_(model, plan)
    assert len(model.model.layers) == 2 and abs(1 - in_blocks(model) / size - 0.4) <= 0.0015
    assert (logits_of(model) - masked).abs().max() <= 1e-5 * masked.abs().max()


def test_the_published_recipe_runs(tmp_path):
    model = llama()
    changes = {"gate_learning_rate": 2.0, "multiplier_learning_rate": 2.0, "max_steps": 7, "use_cpu": True}
    paper = NutePruneConfig.paper(sparsity=0.3, output_dir=str(tmp_path), logging_steps=1, disable_tqdm=True, **changes)
    trainer = NutePruneTrainer(model, paper, text())
    trainer.train()
    first = next(line for line in trainer.state.log_history if "loss" in line)
    expected = 0.1 * 11 * first["kd_loss"] + 0.9 * first["hidden_loss"]  # 12 tokens, 11 of which are predicted
    assert first["loss"] == pytest.approx(expected, rel=1e-3)
    masked = logits_of(model)
    sk.apply_(model, trainer.plan())
    assert (logits_of(model) - masked).abs().max() <= 3e-5 * masked.abs().max()


def test_the_published_distance_of_hidden_states_by_hand():
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, 3, 2, 5, generator=generator) for _ in range(2))
    student[0, 1, 0, 2:] = 0
    student[1] = 0
    expected = 0.0
    for block in range(2):
        pairs = [(s, t) for s, t in zip(student[block].flatten(), teacher[block].flatten(), strict=True) if s != 0]
        expected += sum(float(s - t) ** 2 for s, t in pairs) / max(len(pairs), 1)
    assert float(nonzero_square(student, teacher)) == pytest.approx(expected, rel=1e-5)


def test_text_alone_and_hidden_states(tmp_path):
    trainer = train(llama(), tmp_path, teachers="none", kd_weight=0.0, ce_weight=1.0, max_steps=4)
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(first["ce_loss"], rel=1e-5) and "kd_loss" not in first
    trainer = train(llama(), tmp_path, hidden_weight=0.5, ce_weight=0.1, max_steps=4, teachers="intact")
    first = trainer.state.log_history[0]
    assert first["hidden_loss"] > 0
    expected = first["kd_loss"] + 0.1 * first["ce_loss"] + 0.5 * first["hidden_loss"]
    assert first["loss"] == pytest.approx(expected, rel=1e-4)


def test_a_branch_in_place_of_a_merge(tmp_path):
    merged, beside = llama(), llama()
    plan = train(merged, tmp_path).plan()
    plan_beside = train(beside, tmp_path, merge_lora=False).plan()
    assert plan_beside.cuts == plan.cuts and not side_layers(merged) and len(side_layers(beside)) == 21
    expected = logits_of(merged)
    assert (logits_of(beside) - expected).abs().max() <= 1e-4 * expected.abs().max()
    sk.apply_(beside, plan_beside)
    assert (logits_of(beside) - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_evaluation_sees_the_model_as_it_will_be(tmp_path):
    model, data = llama(), text(8)
    trainer = train(model, tmp_path, eval_data=data, eval_strategy="steps", eval_steps=5)
    found = [line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line]
    batch = torch.stack(data)
    with torch.no_grad():
        expected = float(model(input_ids=batch, labels=batch).loss)
    assert len(found) == 2 and found[1] == pytest.approx(expected, rel=1e-5)


def test_recovery_of_a_cut_model(tmp_path):
    data, model = text(), llama()
    sk.apply_(model, train(model, tmp_path, data).plan())
    size, batch = in_blocks(model), torch.stack(data)
    options = {"max_steps": 12, "learning_rate": 2e-2, "per_device_train_batch_size": 8, "use_cpu": True}
    recovery = NutePruneConfig.recovery(**options, output_dir=str(tmp_path), save_strategy="no", disable_tqdm=True)
    with torch.no_grad():
        before = float(model(input_ids=batch, labels=batch).loss)
    prompts = torch.tensor([-100] * 4 + [0] * 8)
    samples = [{"input_ids": row, "labels": torch.where(prompts < 0, prompts, row)} for row in data]
    plan = sk.prune_(model, recovery, dataset=samples, progress=False)
    with torch.no_grad():
        after = float(model.eval()(input_ids=batch, labels=batch).loss)
    assert not plan.cuts and in_blocks(model) == size and after < before - 0.05


# --- a family --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("merge_lora", [True, False], ids=["merged", "beside"])
def test_a_family_from_one_run(tmp_path, merge_lora):
    model, size = llama(), in_blocks(llama())
    trainer = train(model, tmp_path, keep=[0.2, "10%"], max_steps=20, merge_lora=merge_lora)
    sk.apply_(model, trainer.plan())
    found = family(trainer)
    assert list(found) == [0.1, 0.2, 0.4] and len(found) == 3
    for sparsity, (plan, smaller) in found.items():
        assert abs(1 - in_blocks(smaller) / size - sparsity) <= (0.0015 if merge_lora else 0.1)
        assert plan.made_by.config["sparsity"] == sparsity and logits_of(smaller).isfinite().all()
    assert torch.equal(logits_of(found[0.4][1]), logits_of(model))
    assert not torch.equal(logits_of(found[0.2][1]), logits_of(model))


def test_members_are_the_model_as_it_was_on_the_way(tmp_path, monkeypatch):
    """What a member says is what the student said, under these masks, when it was kept."""
    seen, keep = {}, Student._keep

    def look(self, sparsity, *notes):
        keep(self, sparsity, *notes)
        with self.roles.student(self.members[-1].projected.masks) as student:
            seen[sparsity] = student(torch.stack(text(3, seed=5))).logits

    monkeypatch.setattr(Student, "_keep", look)
    found = family(train(llama(), tmp_path, keep=[0.1, 0.3], max_steps=20))
    assert seen.keys() == {0.1, 0.3}
    for sparsity, expected in seen.items():
        assert (logits_of(found[sparsity][1]) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_there_is_no_family_unless_asked_for(tmp_path):
    trainer = NutePruneTrainer(llama(), config(tmp_path, max_steps=4), text())
    with pytest.raises(ValueError, match="there is no plan yet"):
        trainer.plan()
    trainer.train()
    with pytest.raises(ValueError, match=r"name smaller sparsities, keep=\(0.1, 0.2\)"):
        family(trainer)
    with pytest.raises(ValueError, match="this trainer has pruned its model already"):
        trainer.train()


# --- the same model, whatever happens --------------------------------------------------------------------------------


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


def test_a_student_that_knows_less_than_nothing_stops_it(tmp_path, monkeypatch):
    loss = NutePruneTrainer.compute_loss
    monkeypatch.setattr(NutePruneTrainer, "compute_loss", lambda self, *a, **k: loss(self, *a, **k) + 10)
    with pytest.raises(
        TrainingDiverged, match="would be 4.11 at most.*lower learning_rate=0.005 or gate_learning_rate"
    ):
        train(llama(), tmp_path)


# --- resuming --------------------------------------------------------------------------------------------------------


RESUMED = {
    "nearest, accumulation, a family": {"gradient_accumulation_steps": 2, "keep": [0.1, 0.2], "teacher_steps": 1},
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
        for sparsity, (plan, smaller) in family(straight).items():
            assert plan == family(resumed)[sparsity][0]
            assert torch.equal(logits_of(smaller), logits_of(family(resumed)[sparsity][1]))


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


# --- the step --------------------------------------------------------------------------------------------------------


def gradients(monkeypatch, folder, steps=2, **options):
    """Gradients of gates and LoRA in each step, from one start."""
    found, pull = [], Student.pull_

    def look(self, step):
        pull(self, step)
        lora = {name: p.grad.clone() for name, p in self.adapted.named_parameters() if p.requires_grad}
        found.append((self.gates.log_alpha.grad.clone(), lora))

    with monkeypatch.context() as patch:
        patch.setattr(Student, "pull_", look)
        train(llama(), folder, max_steps=steps, frozen_share=0.0, max_grad_norm=0.0, **options)
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
    plain = gradients(monkeypatch, tmp_path, **options)
    others = gradients(monkeypatch, tmp_path, **{**options, **other})
    assert len(plain) == len(others) == 2
    for (gates, lora), (gates_there, lora_there) in zip(plain, others, strict=True):
        assert gates.abs().max() > 0
        torch.testing.assert_close(gates_there, gates, rtol=1e-3, atol=1e-6)
        for name, gradient in lora.items():
            torch.testing.assert_close(lora_there[name], gradient, rtol=1e-3, atol=1e-6, msg=name)


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


def live_bytes():
    """Bytes of all tensors that are alive, each storage once."""
    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@pytest.mark.parametrize("teachers", ["nearest", "paper"])
def test_one_copy_of_the_weights_whatever_the_number_of_teachers(tmp_path, teachers):
    """A wide vocabulary, so that a second copy could not hide behind snapshots and LoRA."""
    seen = []

    def look(state):
        held = trainer.student.snapshots
        seen.append((len(held), live_bytes() - held.num_bytes))

    changes = {"teacher_steps": 1, "max_steps": 10, "per_device_train_batch_size": 1, "sparsity": 0.6}
    settings = config(tmp_path, teachers=teachers, **changes)
    trainer = NutePruneTrainer(llama(vocab_size=8192, hidden_size=32), settings, text(), callbacks=[AtStepEnd(look)])
    trainer.train()
    weights = 4 * 2 * 8192 * 32
    (few, at_first), (many, most) = seen[0], max(seen)
    assert few == 0 and many >= 3
    assert most - at_first < 0.25 * weights and at_first > weights


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_budget_in_measured_time(tmp_path, monkeypatch):
    """Times are a stub's: heads are dear, channels cheap; a resumed run goes by those of its checkpoint."""
    factors = [1.0, 3.0]

    def measure(model, legal, *, batch_size, length):
        factor = factors.pop(0)
        points = {
            width.name: ((1, 0.0), (width.num_units, factor * (3.0 if width.kind == "heads" else 1.0)))
            for width in legal.widths
        }
        return LatencyTable(batch_size, length, points, {w.name: w.num_units for w in legal.widths}, factor * 2.0)

    monkeypatch.setattr(constraint_module, "measure_latency", measure)
    options = {"sparsity": 0.5, "constraints": {"speedup": 1.5}, **SAVING, "max_steps": 8}
    one, other = llama(), llama()
    plan = train(one, tmp_path, **options).plan()
    assert plan == train(other, tmp_path, resume=str(tmp_path / "checkpoint-4"), **options).plan()
    assert_same_model(one, other)
    milliseconds = 2.0
    for width in find_widths(one):
        kept = len(plan.cuts[width.name].kept) if width.name in plan.cuts else width.num_units
        curve = np.interp(kept, [1, width.num_units], [0, 3.0 if width.kind == "heads" else 1.0])
        milliseconds += float(curve)
    assert 14 / 1.52 <= milliseconds <= 14 / 1.5 + 1e-6
    assert any("12 tokens, on this device" in note for note in plan.notes)


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
