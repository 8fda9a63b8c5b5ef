"""Where NutePrune starts: what a one-shot method leaves, and the stages on the way."""

import copy

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback

import sparsekit as sk
from sparsekit.archs import find_widths
from sparsekit.benchmarking.latency_table import LatencyTable
from sparsekit.budgets import count_flops
from sparsekit.errors import Unsupported
from sparsekit.methods.structured.contribution import Contribution
from sparsekit.nn import side_layers
from sparsekit.train import constraint as constraint_module
from sparsekit.train import nuteprune_start, roles
from sparsekit.train.adapters import add_lora, factors_of
from sparsekit.train.gates import Gates
from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_start import one_shot
from sparsekit.train.nuteprune_student import Student
from sparsekit.train.nuteprune_trainer import NutePruneTrainer
from tests.archs.tiny_models import tiny_model
from tests.train.nuteprune_runs import (
    SAVING,
    VOCABULARY,
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

STARTED = {
    "start": "contribution",
    "sparsity_warmup": None,
    "frozen_share": None,
    "max_steps": 2,
    "seed": 0,
    "hidden": False,
}


def run(model, folder, **changes):
    return train(model, folder, **{**STARTED, **changes})


def thin_llama(kv_heads=2, **changes):
    """Its residual stream needs half of its dimensions, so that the others are what costs least."""
    model = llama(kv_heads, **{"hidden_size": 32, "head_dim": 4, **changes})
    P = torch.linalg.qr(torch.randn(32, 32))[0][:, :16]
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ P @ P.T)
        for layer in model.model.layers:
            for writer in (layer.self_attn.o_proj, layer.mlp.down_proj):
                writer.weight.copy_(P @ P.T @ writer.weight)
    return model


def far(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


def said_by(student, masks=None):
    with student.roles.student(student.settled() if masks is None else masks) as model:
        return model(torch.stack(text(3, seed=5))).logits


def zeroed(model, masks):
    """Write zeros where these masks close what the model's readers read."""
    for width in find_widths(model):
        closed = width.columns_of((~masks[width.name]).nonzero().flatten())
        model.get_submodule(width.name).weight.data[:, closed] = 0
    return model


@pytest.fixture
def begun(monkeypatch):
    """What the student is where each stage begins."""
    found, begin = [], Student._begin_stage_

    def look(self, step):
        begin(self, step)
        found.append({"step": step, "logits": said_by(self), "masks": self.settled(), "projected": self.projected})

    monkeypatch.setattr(Student, "_begin_stage_", look)
    return found


def calibrated(model, sparsity, data=None, **fields):
    """What the method makes of a model, on the samples that a run on the same text takes."""
    order = torch.randperm(16, generator=torch.Generator().manual_seed(0)).tolist()
    data = [text()[index] for index in order]
    given = {"num_calibration_samples": 16, "max_seq_length": 12, "batch_size": 4, "seed": 0, "progress": False}
    return sk.prune_(model, Contribution(sparsity=sparsity, **fields), dataset=data, **given)


# --- the first step --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("hidden", [False, True], ids=["", "hidden"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_the_student_starts_as_what_the_method_leaves(tmp_path, begun, kv_heads, hidden):
    make = thin_llama if hidden else llama
    reference = make(kv_heads)
    plan = calibrated(reference, 0.4, hidden=hidden)
    run(make(kv_heads), tmp_path, hidden=hidden, max_steps=1)
    (first,) = begun
    assert ("model.embed_tokens" in plan.cuts) == hidden
    for name, mask in first["masks"].items():
        kept = plan.cuts[name].kept if name in plan.cuts else torch.arange(len(mask))
        if name != "model.embed_tokens":
            assert mask.nonzero().flatten().tolist() == kept.tolist()
    assert far(first["logits"], logits_of(reference)) < 1e-4
    assert far(first["logits"], logits_of(make(kv_heads))) > 0.01


def test_the_teachers_keep_what_they_had(tmp_path, monkeypatch):
    """The intact model all of its weights; the one at the end of a stage its own, up to bf16."""
    begin, leave, said = Student._begin_stage_, Student._leave_stage, []

    def look(self, step):
        begin(self, step)
        with self.roles.teacher(None) as model:
            assert torch.equal(model(torch.stack(text(3, seed=5))).logits, dense)
        if len(self.snapshots):
            with self.roles.teacher(self.snapshots[0]) as model:
                assert far(model(torch.stack(text(3, seed=5))).logits, said[0]) < 0.03
            assert far(said_by(self), said[0]) > 0.06

    def leaves(self, sparsity):
        said.append(said_by(self))
        leave(self, sparsity)

    monkeypatch.setattr(Student, "_begin_stage_", look)
    monkeypatch.setattr(Student, "_leave_stage", leaves)
    dense = logits_of(llama())
    trainer = run(llama(), tmp_path, stages=[0.2], max_steps=2, teacher_steps=1)
    assert len(said) == 1
    assert [line["teacher_sparsity"] for line in trainer.state.log_history if "loss" in line][0] == 0


class Broken(Exception):
    pass


@pytest.mark.parametrize("breaks", ["", "while the method runs", "afterwards"])
def test_the_model_is_as_it_was(tmp_path, monkeypatch, breaks):
    model = llama()
    model.model.embed_tokens.requires_grad_(False)
    args = config(tmp_path, **STARTED)
    widths, adapted = find_widths(model), add_lora(model, args)
    for index, module in enumerate(model.modules()):
        module.training = index % 2 == 0
    forward = model.forward
    vars(model)["forward"] = lambda *args, **kwargs: forward(*args, **kwargs)
    before = (
        {name: value.clone() for name, value in adapted.state_dict().items()},
        [(name, parameter, parameter.requires_grad) for name, parameter in adapted.named_parameters()],
        [(name, module, module.training, len(module._forward_pre_hooks)) for name, module in adapted.named_modules()],
        dict(vars(model)),
    )
    decide, calls = Contribution.decide, []

    def fail(*given):
        raise Broken

    def fail_half_way(self, *given):
        calls.append(given)
        return fail() if len(calls) == 4 else decide(self, *given)

    if breaks == "afterwards":
        monkeypatch.setattr(nuteprune_start, "prune_", lambda *args, **given: fail(sk.prune_(*args, **given)))
    elif breaks:
        monkeypatch.setattr(Contribution, "decide", fail_half_way)
    samples = [{"input_ids": row[None]} for row in text(8)]
    given = {"targets": ("Linear",), "ignore": ("lm_head",), "seed": 0, "progress": False}

    def start():
        return one_shot(adapted, widths, None, None, Contribution(sparsity=0.4), samples, **given)

    if breaks:
        with pytest.raises(Broken):
            start()
    else:
        found = start()
        for width in widths:  # what is closed is there again where a gate opens it
            closed = width.columns_of((~found.masks[width.name]).nonzero().flatten())
            repaired, base = found.repaired[width.name]["weight"], model.get_submodule(width.name).base_layer.weight
            assert torch.equal(repaired[:, closed], base[:, closed]) and not torch.equal(repaired, base)
    for (name, value), then in zip(adapted.state_dict().items(), before[0].values(), strict=True):
        assert torch.equal(value, then), name
    assert all(
        now is then and now.requires_grad == wanted
        for now, (_, then, wanted) in zip(adapted.parameters(), before[1], strict=True)
    )
    now = [(name, module, module.training, len(module._forward_pre_hooks)) for name, module in adapted.named_modules()]
    assert now == before[2]
    assert vars(model).keys() == before[3].keys() and vars(model)["forward"] is before[3]["forward"]


# --- the budget ------------------------------------------------------------------------------------------------------


BUDGETS = {
    "0.2": {"sparsity": 0.2},
    "0.4, gqa": {"sparsity": 0.4},
    "params": {"sparsity": 0.5, "constraints": {"params": 25_000}},
    "flops": {"sparsity": 0.5, "constraints": {"flops": "60%"}},
}


@pytest.mark.parametrize("name", BUDGETS)
def test_the_budget_is_met(tmp_path, name):
    model = llama(2 if "gqa" in name else 4)
    modules, dense, widths = list(model.named_modules()), copy.deepcopy(model), find_widths(model)
    trainer = run(model, tmp_path, **BUDGETS[name])
    assert_plain(model, modules)
    plan, masked = trainer.plan(), logits_of(model)
    sliced = sk.apply_(model, plan)
    assert far(logits_of(sliced), masked) <= 1e-5
    size = sum(parameter.numel() for parameter in dense.parameters())
    if name == "params":
        left = sum(parameter.numel() for parameter in sliced.parameters())
        assert 25_000 - 0.0015 * size <= left <= 25_000
    elif name == "flops":
        costs = count_flops(dense, widths, 12)
        kept = {w.name: len(plan.cuts[w.name].kept) if w.name in plan.cuts else w.num_units for w in widths}
        assert 0.6 - 0.0015 <= costs.of(kept) / costs.dense <= 0.6
    else:
        assert abs(1 - in_blocks(sliced) / in_blocks(dense) - BUDGETS[name]["sparsity"]) <= 0.0015
    logs = [line for line in trainer.state.log_history if "loss" in line]
    assert len(logs) == 2 and all(line["real_sparsity"] == line["target_sparsity"] for line in logs)
    assert len(set(plan.notes)) == len(plan.notes)


def test_uniform_widths(tmp_path):
    model, size = llama(), in_blocks(llama())
    sk.apply_(model, run(model, tmp_path, uniform=True).plan())
    sizes = {(layer.self_attn.q_proj.out_features, layer.mlp.up_proj.out_features) for layer in model.model.layers}
    assert len(sizes) == 1 and abs(1 - in_blocks(model) / size - 0.4) <= 0.005


def test_hidden_dimensions_go(tmp_path, monkeypatch):
    seen, finish = [], Student.finish_

    def look(self, num_done):
        finish(self, num_done)
        seen.append(said_by(self))

    monkeypatch.setattr(Student, "finish_", look)
    model, size = thin_llama(), in_blocks(thin_llama())
    plan = run(model, tmp_path, hidden=True).plan()
    assert plan.cuts["model.embed_tokens"].kind == "hidden"
    masked = logits_of(model)
    assert far(masked, seen[0]) <= 1e-5
    sk.apply_(model, plan)
    assert model.model.embed_tokens.weight.shape[1] < 32 and abs(1 - in_blocks(model) / size - 0.4) <= 0.0015
    assert far(logits_of(model), masked) <= 1e-5


@pytest.mark.parametrize(
    "tied,num_channels", [(False, 203), (True, 203), (True, 2000)], ids=["untied", "tied", "tied, small head"]
)
def test_hidden_dimensions_go_by_themselves_where_that_costs_nothing_else(tmp_path, tied, num_channels):
    model = thin_llama(tie_word_embeddings=tied, intermediate_size=num_channels)
    plan = run(model, tmp_path, hidden=None, max_steps=1).plan()
    assert ("model.embed_tokens" in plan.cuts) != tied
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied


def test_a_head_that_is_untied_in_vain_is_said(tmp_path):
    said = "no hidden dimension went, and lm_head has 976 weights of its own: hidden=False keeps it tied"
    notes = [
        run(make(tie_word_embeddings=True), tmp_path, hidden=True, untie=True, sparsity=0.05).plan().notes
        for make in (llama, thin_llama)
    ]
    assert [said in each for each in notes] == [True, False]


def test_an_evaluation_at_the_start_is_of_what_is_left(tmp_path):
    options = {"eval_strategy": "no", "eval_on_start": True, "learning_rate": 1e-9, "max_steps": 1}
    model = llama()
    trainer = run(model, tmp_path, eval_data=text(8, seed=7), **options)
    at_start = next(line["eval_loss"] for line in trainer.state.log_history if "eval_loss" in line)
    batch = torch.stack(text(8, seed=7))
    left, dense = (float(each(batch, labels=batch).loss) for each in (model.eval(), llama()))
    assert at_start == pytest.approx(left, rel=1e-4) and abs(left - dense) > 1e-2


def test_a_budget_in_time_is_measured_once(tmp_path, monkeypatch):
    """The method goes by the table of the constraint."""
    calls = []

    def measure(model, legal, *, batch_size, length):
        calls.append(length)
        points = {w.name: ((1, 0.0), (w.num_units, 3.0 if w.kind == "heads" else 1.0)) for w in legal.widths}
        return LatencyTable(batch_size, length, points, {w.name: w.num_units for w in legal.widths}, 2.0)

    monkeypatch.setattr(constraint_module, "measure_latency", measure)
    monkeypatch.setattr("sparsekit.width_solver.measure_latency", measure)
    trainer = run(llama(), tmp_path, sparsity=0.5, constraints={"speedup": 1.5})
    assert calls == [12] and trainer.plan().cuts
    assert 1 - 1 / 1.5 <= trainer.state.log_history[0]["real_sparsity"] <= 1 - 1 / 1.52


@pytest.mark.parametrize("stochastic,closed", [(True, 0.083), (False, 0.047)])
def test_gates_that_start_from_masks_are_free_to_change(stochastic, closed):
    gates = Gates.of(llama(), ("heads", "channels", "layers"), stochastic=stochastic)
    name = "model.layers.1.mlp.down_proj"
    mask = torch.arange(203) % 3 > 0
    gates.excess += 1
    gates.start_from_({name: mask})
    chances = gates.p_open()
    assert not gates.excess.any()
    assert chances[name][~mask].unique().tolist() == pytest.approx([closed], abs=1e-3)
    others = torch.cat([chances[name][mask], *(each for other, each in chances.items() if other != name)])
    assert others.min() > 0.95


@pytest.mark.parametrize("gates", ["hard_concrete", "deterministic"])
def test_gates_may_learn_from_there(tmp_path, begun, gates, monkeypatch):
    seen, freeze, start = [], Student.freeze_, Student._begin_stage_

    def look(self, *given):
        seen.append(self.gates.log_alpha.detach().clone())
        freeze(self, *given)

    def began(self, *given):
        start(self, *given)
        seen.append(self.gates.log_alpha.detach().clone())

    monkeypatch.setattr(Student, "freeze_", look)
    monkeypatch.setattr(Student, "_begin_stage_", began)
    model, size = llama(), in_blocks(llama())
    trainer = run(model, tmp_path, gates=gates, frozen_share=0.5, max_steps=8, gate_learning_rate=0.5)
    first, last = seen
    assert begun[0]["projected"] is None and 0.2 < float((first < 0).float().mean()) < 0.6
    assert 0.1 < float((last - first).abs().mean())
    lines = [line for line in trainer.state.log_history if "loss" in line]
    assert len({line["expected_sparsity"] for line in lines[:4]}) == 4
    assert all(line["target_sparsity"] == pytest.approx(0.4, abs=0.0015) for line in lines)
    sk.apply_(model, trainer.plan())
    assert abs(1 - in_blocks(model) / size - 0.4) <= 0.0015


def test_the_method_does_not_compute_in_bf16_where_training_does(tmp_path, monkeypatch):
    """Nor is LoRA added in bf16 to the weights that it prunes."""
    write, seen = nuteprune_start._write_student_, []

    def look(*given):
        seen.append(torch.is_autocast_enabled("cpu"))
        write(*given)

    monkeypatch.setattr(nuteprune_start, "_write_student_", look)
    run(llama(), tmp_path, max_steps=1, bf16=True)
    assert seen == [False]


def test_a_bf16_model_and_accumulation(tmp_path):
    model, size = llama(dtype=torch.bfloat16), in_blocks(llama())
    options = {"bf16": True, "gradient_accumulation_steps": 2, "per_device_train_batch_size": 2, "keep": [0.2]}
    trainer = run(model, tmp_path, **options)
    assert all(parameter.dtype == torch.bfloat16 for parameter in model.parameters())
    sk.apply_(model, trainer.plan())
    assert abs(1 - in_blocks(model) / size - 0.4) <= 0.0015 and logits_of(model).isfinite().all()


def test_a_model_with_biases(tmp_path, begun):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_inner": 203, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": VOCABULARY}
    model = GPT2LMHeadModel(GPT2Config(**sizes, initializer_range=0.2, bos_token_id=0, eos_token_id=1)).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.2)
    reference = copy.deepcopy(model)
    calibrated(reference, 0.4, hidden=False)
    trainer = run(model, tmp_path)
    assert far(begun[0]["logits"], logits_of(reference)) < 1e-4
    masked = logits_of(model)
    assert far(logits_of(sk.apply_(model, trainer.plan())), masked) <= 1e-5


# --- stages ----------------------------------------------------------------------------------------------------------


def test_stages(tmp_path, begun, monkeypatch):
    """What a stage starts from, what it leaves, and that each is a training of its own."""
    left, fresh, rates, leave, begin_step = {}, [], [], Student._leave_stage, NutePruneTrainer.begin_step

    def look(self, sparsity):
        merged, plain = llama(), self.adapted.get_base_model()
        for width in find_widths(merged):
            merged.get_submodule(width.name).weight.data.copy_(plain.get_submodule(width.name).base_layer.weight)
        for name, (B, A) in factors_of(self.adapted).items():
            merged.get_submodule(name).weight.data += B @ A
        zeroed(merged, self.projected.masks)
        left[sparsity] = said_by(self), merged, len(self.snapshots)
        leave(self, sparsity)

    def begins(self):
        begin_step(self)
        group = self.optimizer.param_groups[0]
        fresh.append(not any(parameter in self.optimizer.state for parameter in group["params"]))
        rates.append(group["lr"])

    monkeypatch.setattr(Student, "_leave_stage", look)
    monkeypatch.setattr(NutePruneTrainer, "begin_step", begins)
    model, size = llama(), in_blocks(llama())
    options = {"keep": [0.2], "stages": ["30%"], "max_steps": 6, "teacher_steps": 1}
    trainer = run(model, tmp_path, **options)
    assert [each["step"] for each in begun] == [0, 2, 4] and fresh == [True, False] * 3
    assert rates == pytest.approx([5e-3, 2.5e-3] * 3)
    logged = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
    assert logged[:2] == logged[2:4] and len(set(logged)) == 2
    for earlier, later in zip(begun, begun[1:], strict=False):
        assert all(bool((mask <= earlier["masks"][name]).all()) for name, mask in later["masks"].items())
    assert [each["projected"].sparsity for each in begun] == pytest.approx([0.2, 0.3, 0.4], abs=0.0015)
    for (sparsity, after), (logits, merged, _), each in zip(
        ((0.2, 0.3), (0.3, 0.4)), left.values(), begun[1:], strict=True
    ):
        assert far(logits, logits_of(merged)) < 1e-4, sparsity
        calibrated(merged, after, hidden=False)
        assert far(each["logits"], logits_of(merged)) < 1e-4
    assert [snapshots for _, _, snapshots in left.values()] == [0, 1]
    found = trainer.family()
    assert list(found) == [0.2, 0.4]
    for sparsity, (_, smaller) in found.items():
        assert abs(1 - in_blocks(smaller) / size - sparsity) <= 0.0015
    assert far(logits_of(found[0.2][1]), left[0.2][0]) <= 1e-5
    assert far(logits_of(found[0.4][1]), logits_of(model)) <= 1e-5


@pytest.mark.parametrize("hidden,steps", [(False, (2, 3)), (True, (3,))], ids=["", "hidden"])
def test_resuming_changes_nothing(tmp_path, hidden, steps):
    """From the checkpoint at the end of the first stage, and from one within the second."""
    options = {**SAVING, "save_steps": 1, "max_steps": 4, "keep": [0.2], "hidden": hidden, "teacher_steps": 1}
    make = thin_llama if hidden else llama
    one = make()
    straight = run(one, tmp_path, **options)
    for step in steps:
        other = make()
        resumed = run(other, tmp_path, resume=str(tmp_path / f"checkpoint-{step}"), **options)
        assert straight.plan() == resumed.plan()
        assert_same_model(one, other)
    smaller = [trainer.family()[0.2][1] for trainer in (straight, resumed)]
    assert torch.equal(logits_of(smaller[0]), logits_of(smaller[1]))
    assert ("model.embed_tokens" in straight.plan().cuts) == hidden


def test_training_that_ends_early_is_cut_all_the_same(tmp_path):
    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 1

    model, size = llama(), in_blocks(llama())
    trainer = run(model, tmp_path, keep=[0.1, 0.3], stages=[0.2], max_steps=8, callbacks=[Stop()])
    notes = trainer.plan().notes
    assert "training ended at step 1 of 8" in notes
    assert sum("training ended before the last units went" in note for note in notes) == 1
    assert abs(1 - in_blocks(sk.apply_(model, trainer.plan())) / size - 0.4) <= 0.0015
    found = trainer.family()
    assert list(found) == [0.1, 0.3, 0.4]
    for sparsity, (_, smaller) in found.items():
        assert abs(1 - in_blocks(smaller) / size - sparsity) <= 0.0015


@pytest.mark.parametrize("hidden", [False, True], ids=["", "hidden"])
def test_a_failure_in_a_later_stage_leaves_the_model_as_it_was(tmp_path, hidden):
    """Also of a run that was resumed, whose stages began in another."""

    def fail(state):
        if state.global_step == 4:
            raise Broken

    options = {"hidden": hidden, "untie": hidden, "keep": [0.2], "max_steps": 4, **SAVING, "save_steps": 3}
    for resume in (None, str(tmp_path / "checkpoint-3")):
        model = thin_llama(tie_word_embeddings=True)
        dense, modules = copy.deepcopy(model), list(model.named_modules())
        with pytest.raises(Broken):
            run(model, tmp_path, **options, callbacks=[AtStepEnd(fail)], resume=resume)
        assert_same_model(model, dense)
        assert_plain(model, modules)
        assert model.lm_head.weight is model.model.embed_tokens.weight


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes,said",
    [
        ({"start": "contributon"}, "unknown start 'contributon'.*Did you mean 'contribution'"),
        ({"start": "fisher"}, "start='fisher' needs labels, .*use one of .*'contribution'"),
        ({"start": "open", "stages": [0.2]}, r"stages=\[0.2\] is for a one-shot start"),
        ({"teachers": "paper"}, "teachers='paper' and start='contribution'.*use start='open', or teachers='nearest'"),
        ({"hidden": True, "start": "magnitude_sp"}, "hidden=True, start='magnitude_sp' .*use start='open', or frozen"),
        ({"layers": True}, "layers=True, start='contribution' .*use start='open'"),
        ({"stages": [0.5]}, r"stages=\[0.5\]: these are on the way to sparsity=0.4"),
        ({"stages": [0.2], "keep": [0.1]}, r"keep=\[0.1\] and stages=\[0.2\] make 3 stages, .* 2 steps: train longer"),
        ({"num_calibration_samples": 0}, "num_calibration_samples=0 must be a whole number"),
        (
            {"gates": "deterministic"},
            "gates='deterministic' is for gates that learn, and with start='contribution' none",
        ),
        ({"ramp": "cubic"}, "ramp='cubic' is for gates that learn.*use start='open', or frozen_share=0.5"),
        ({"sparsity_warmup": 0.3, "max_steps": 10}, "sparsity_warmup=0.3"),
        (
            {"stages": [0.2], "frozen_share": 0.5, "max_steps": 8},
            r"frozen_share=0.5 of 8 steps begins at 4, and the last stage, .* at 4: lower frozen_share, or halt less",
        ),
        ({"hidden_weight": 0.0, "kd_weight": 0.0, "ce_weight": 1.0}, "nobody listens.*use teachers='none'"),
        ({"teacher_spacing": 0.0}, "teacher_spacing=0.0 must lie between 0 and 1"),
        ({"teacher_lag": 0}, "teacher_lag=0 must be a whole number"),
        ({"round_to": 64, "sparsity": 0.633, "stages": [0.35]}, r"stages=\[0.35\]: no legal widths reach"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_refused(tmp_path, monkeypatch, changes, said):
    monkeypatch.setattr(Student, "begin_step", lambda *_: pytest.fail("training was begun"))
    model = llama()
    dense, modules = copy.deepcopy(model), list(model.named_modules())
    with pytest.raises(ValueError, match=said):
        run(model, tmp_path, **changes)
    assert_same_model(model, dense)
    assert_plain(model, modules)


def test_a_family_is_not_trained_for_and_lost(tmp_path):
    with pytest.raises(ValueError, match=r"keep=\[0.2\]: here one plan comes back.*NutePrune.*family"):
        sk.prune_(llama(), config(tmp_path, **STARTED, keep=[0.2]), dataset=text(), progress=False)


def test_branches_beside_weights_are_not_lost(tmp_path):
    model = llama()
    run(model, tmp_path, merge_lora=False)
    assert side_layers(model)
    before = logits_of(model)
    again = NutePruneConfig.recovery(output_dir=str(tmp_path / "again"), max_steps=1, use_cpu=True, save_strategy="no")
    beside = copy.copy(again)
    beside.merge_lora = False
    with pytest.raises(ValueError, match="merge_lora=False: .* has a branch beside its weight already"):
        NutePruneTrainer(model, beside, text())
    again.learning_rate = 1e-9
    NutePruneTrainer(model, again, text()).train()
    assert far(logits_of(model), before) < 1e-4


def test_hidden_dimensions_stay_where_the_classes_cannot_be_thinner(tmp_path):
    """Qwen3 norms each head, too, with an eps that is one with that of the stream."""
    model = tiny_model("qwen3").eval()
    trainer = NutePruneTrainer(model, config(tmp_path, **{**STARTED, "hidden": None}), text())
    assert trainer.args.hidden is False
    trainer.train()
    assert not [cut for cut in trainer.plan().cuts.values() if cut.kind == "hidden"]
    with pytest.raises(Unsupported, match="leave hidden out, hidden=False"):
        train(tiny_model("qwen3").eval(), tmp_path, text(), hidden=True, untie=True)


def test_one_config_serves_two_models(tmp_path):
    given = config(tmp_path, **{**STARTED, "hidden": None})
    assert NutePruneTrainer(llama(), given, text()).args.hidden is True
    assert given.hidden is None and given.untie is False
    tied = llama(tie_word_embeddings=True, vocab_size=400)
    assert NutePruneTrainer(tied, given, text()).args.hidden is False
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_the_last_stage_teaches_in_the_first_half_of_the_next(tmp_path):
    seen = []

    class Watch(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(trainer.student.schedule.index)

    changes = {**STARTED, "stages": [0.2], "max_steps": 8, "teacher_steps": 1}
    trainer = NutePruneTrainer(llama(), config(tmp_path, **changes), text(32), callbacks=[Watch()])
    measured = roles.Probe.distances
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(roles.Probe, "distances", lambda self, kept, masks: nearer(measured(self, kept, masks)))
        trainer.train()
    assert seen == [None] * 4 + [0, 0] + [None, None]
    assert "snapshots taught in 2 of 8 steps, and the intact model in the others" in trainer.plan().notes


def test_a_stage_in_which_a_snapshot_teaches_is_resumed(tmp_path, monkeypatch):
    measured = roles.Probe.distances
    monkeypatch.setattr(roles.Probe, "distances", lambda self, kept, masks: nearer(measured(self, kept, masks)))
    options = {**SAVING, "save_steps": 1, "stages": [0.2], "max_steps": 8, "teacher_steps": 1, "hidden_weight": 1.0}
    one, other = llama(), llama()
    straight = run(one, tmp_path, **options)
    resumed = run(other, tmp_path, resume=str(tmp_path / "checkpoint-5"), **options)
    taught = [line["teacher_sparsity"] for line in straight.state.log_history if "teacher_sparsity" in line]
    assert taught == pytest.approx([0] * 4 + [0.2, 0.2, 0, 0], abs=2e-3)
    assert straight.plan() == resumed.plan()
    assert_same_model(one, other)


def nearer(found):
    """Distances under which the last snapshot is always the one to learn from."""
    return roles.Distances(1.0, tuple(0.9 for _ in found.snapshots))
