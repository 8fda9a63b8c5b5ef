"""NutePrune on tiny models, to the end: the budget is met, and the cut changes nothing."""

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.benchmarking.latency_table import LatencyTable
from sparsekit.nn import side_layers
from sparsekit.train import constraint as constraint_module
from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_loss import nonzero_square
from sparsekit.train.nuteprune_student import Student
from sparsekit.train.nuteprune_trainer import NutePruneTrainer
from tests.train.nuteprune_runs import (
    SAVING,
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
    mask = torch.ones(student[0].shape[:-1], dtype=torch.long)
    mask[0, 1:] = 0
    alone = [[state[mask.bool()] for state in states] for states in (student, teacher)]
    teacher[0][0, 1:] = 1e3  # what stands on padding does not matter
    assert float(nonzero_square(student, teacher, mask)) == pytest.approx(float(nonzero_square(*alone)), rel=1e-5)


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
    beside.save_pretrained(tmp_path / "beside")
    for opened in (AutoModelForCausalLM.from_pretrained(tmp_path / "beside"), sk.load(tmp_path / "beside")):
        assert len(side_layers(opened)) == 21 and torch.equal(logits_of(opened), logits_of(beside))


def test_evaluation_sees_the_model_as_it_will_be(tmp_path):
    model, data = llama(), text(8)
    trainer = train(model, tmp_path, eval_data=data, eval_strategy="steps", eval_steps=5, ce_weight=0.2)
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
    found = trainer.family()
    assert list(found) == [0.1, 0.2, 0.4] and len(found) == 3
    for sparsity, (plan, smaller) in found.items():
        assert abs(1 - in_blocks(smaller) / size - sparsity) <= 0.0015
        assert plan.made_by.config["sparsity"] == sparsity and logits_of(smaller).isfinite().all()
    assert torch.equal(logits_of(found[0.4][1]), logits_of(model))
    assert not torch.equal(logits_of(found[0.2][1]), logits_of(model))
    small = found[0.2][1]
    small.save_pretrained(tmp_path / "small")
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "small")
    assert bool(side_layers(opened)) is not merge_lora and torch.equal(logits_of(opened), logits_of(small))


def test_members_are_the_model_as_it_was_on_the_way(tmp_path, monkeypatch):
    """What a member says is what the student said, under these masks, when it was kept."""
    seen, keep = {}, Student._keep

    def look(self, sparsity, *notes):
        keep(self, sparsity, *notes)
        with self.roles.student(self.members[-1].projected.masks) as student:
            seen[sparsity] = student(torch.stack(text(3, seed=5))).logits

    monkeypatch.setattr(Student, "_keep", look)
    found = train(llama(), tmp_path, keep=[0.1, 0.3], max_steps=20).family()
    assert seen.keys() == {0.1, 0.3}
    for sparsity, expected in seen.items():
        assert (logits_of(found[sparsity][1]) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_there_is_no_family_unless_asked_for(tmp_path):
    trainer = NutePruneTrainer(llama(), config(tmp_path, max_steps=4), text())
    with pytest.raises(ValueError, match="there is no plan yet"):
        trainer.plan()
    trainer.train()
    with pytest.raises(ValueError, match=r"name smaller sparsities, keep=\(0.1, 0.2\)"):
        trainer.family()
    with pytest.raises(ValueError, match="this trainer has pruned its model already"):
        trainer.train()


# --- time ------------------------------------------------------------------------------------------------------------


def test_a_budget_in_measured_time(tmp_path, monkeypatch):
    """Times are a stub's: heads are dear, channels cheap; a resumed run goes by those of its checkpoint, and measures
    none."""
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
    assert factors == [3.0]
    milliseconds = 2.0
    for width in find_widths(one):
        kept = len(plan.cuts[width.name].kept) if width.name in plan.cuts else width.num_units
        curve = np.interp(kept, [1, width.num_units], [0, 3.0 if width.kind == "heads" else 1.0])
        milliseconds += float(curve)
    assert 14 / 1.52 <= milliseconds <= 14 / 1.5 + 1e-6
    assert any("12 tokens, on this device" in note for note in plan.notes)
