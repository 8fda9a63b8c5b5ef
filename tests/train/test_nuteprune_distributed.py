"""NutePrune in two processes: one draw, one set of gates and multipliers, the teachers of one run, also after a resume.


This file is their program as well: `torchrun --nproc_per_node 2 test_nuteprune_distributed.py FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparsekit.benchmarking.latency_table import LatencyTable
from sparsekit.errors import NonFiniteError
from sparsekit.train import constraint as constraint_module
from sparsekit.train import nuteprune_start, nuteprune_student, roles
from sparsekit.train.nuteprune_config import NutePruneConfig
from sparsekit.train.nuteprune_start import Start
from sparsekit.train.nuteprune_trainer import NutePruneTrainer

pytestmark = pytest.mark.timeout(900)  # of the first test, which waits for two processes; a minute where they are free

VOCABULARY, STEPS, SAVED_AT = 61, 8, 4
RUNS = {
    "nearest": {"teachers": "nearest"},
    "hidden, micro-batches": {
        "hidden": True,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 1,
        "gradient_checkpointing": True,
    },
    "one-shot, two stages, gates that learn": {"start": "contribution", "keep": [0.2], "frozen_share": 0.25, "seed": 0},
    "one-shot, hidden": {"start": "contribution", "hidden": True, "frozen_share": 0.25, "seed": 0},
}
TIMED = {"sparsity": 0.5, "constraints": {"speedup": 1.4}}


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 101, "num_hidden_layers": 2, "max_position_embeddings": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    config = LlamaConfig(vocab_size=VOCABULARY, initializer_range=0.2, **sizes, **heads)
    return LlamaForCausalLM(config).eval()


def text():
    generator = torch.Generator().manual_seed(1)
    return list(torch.randint(2, VOCABULARY, (32, 12), generator=generator))


def arguments(folder, num_processes, **options):
    """Four samples a step, spread over the processes."""
    short = {"max_steps": STEPS, "per_device_train_batch_size": 2, "sparsity": 0.4, "learning_rate": 5e-3}
    short |= {
        "start": "open",
        "gate_learning_rate": 1.0,
        "multiplier_learning_rate": 1.0,
        "teacher_steps": 1,
        "lora_rank": 2,
        "hidden_weight": 0.0,  # relative to the size of the batch at hand, which is another on each process
    }
    short |= {"save_strategy": "steps", "save_steps": SAVED_AT, "logging_steps": 1, "disable_tqdm": True}
    options = {**short, "use_cpu": True, "output_dir": str(folder), **options}
    options["per_device_train_batch_size"] *= 2 // num_processes
    return NutePruneConfig(**options)


def outcome(trainer, student):
    """What must be the same on all ranks."""
    logs = [line for line in trainer.state.log_history if "loss" in line]
    numbers = ("loss", "grad_norm", "expected_sparsity", "real_sparsity", "teacher_sparsity", "multiplier_linear")
    return {
        "losses": [[line[name] for name in numbers] for line in logs],
        "gates": student.gates.log_alpha.detach().clone(),
        "multipliers": student.lagrangian.multipliers.detach().clone(),
        "cuts": {name: cut.kept for name, cut in trainer.plan().cuts.items()},
        "weights": {name: value.detach().clone() for name, value in trainer.trained_model().state_dict().items()},
        "snapshots": len(student.snapshots),
    }


def run(args, model=None, resume=None, cls=NutePruneTrainer):
    """Train, and return the outcome."""
    found = []
    trainer = cls(llama() if model is None else model, args, text())
    settle = trainer._settle_

    def look(*given):
        found.append(trainer.student)
        return settle(*given)

    trainer._settle_ = look
    trainer.train(resume_from_checkpoint=resume)
    return outcome(trainer, found[0])


class NanOnTheSecond(NutePruneTrainer):
    def compute_loss(self, *args, **kwargs):
        loss = super().compute_loss(*args, **kwargs)
        return loss * float("nan") if self.state.global_step == 2 and self.args.process_index == 1 else loss


def measured(factor, calls):
    """A table of times that is another on each rank."""

    def measure(model, legal, *, batch_size, length):
        calls.append(length)
        points = {w.name: ((1, 0.0), (w.num_units, factor * (2.0 if w.kind == "heads" else 1.0))) for w in legal.widths}
        return LatencyTable(batch_size, length, points, {w.name: w.num_units for w in legal.widths}, 2.0)

    return measure


def perturb():
    """Let a process find something else than the others do, wherever each finds something by itself."""

    def started(*args, **kwargs):
        start = one_shot(*args, **kwargs)
        masks = {name: mask.roll(1) for name, mask in start.masks.items()}
        repaired = {name: {key: x + 1 for key, x in each.items()} for name, each in start.repaired.items()}
        return Start(masks, repaired, start.notes)

    one_shot, directions = nuteprune_student.one_shot, nuteprune_start.principal_directions
    nuteprune_student.one_shot = started
    nuteprune_start.principal_directions = lambda *args: directions(*args).flip(1)
    distance = roles.Probe._distance
    roles.Probe._distance = staticmethod(lambda *args: 1 - distance(*args))


def work(folder):
    """What each of two processes does."""
    rank, found, calls = int(os.environ["RANK"]), {}, []
    if rank:
        perturb()
    for name, options in RUNS.items():
        found[name] = run(arguments(folder / name, 2, **options))
        checkpoint = str(folder / name / f"checkpoint-{SAVED_AT}")
        found[f"{name}, resumed"] = run(arguments(folder / name, 2, **options), resume=checkpoint)
    other = llama()
    if rank:
        other.load_state_dict({key: torch.zeros_like(value) for key, value in other.state_dict().items()})
    found["first rank's weights"] = run(arguments(folder / "other", 2, save_strategy="no", **RUNS["nearest"]), other)
    constraint_module.measure_latency = measured(1.0 + rank, calls)
    found["timed"] = run(arguments(folder / "timed", 2, save_strategy="no", **TIMED))
    found["measured"] = len(calls)
    with pytest.raises(NonFiniteError) as caught:
        run(arguments(folder / "nan", 2, save_strategy="no"), cls=NanOnTheSecond)
    found["nan"] = str(caught.value)
    torch.save(found, folder / f"rank{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """What the two processes found."""
    folder = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*command, __file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=850,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(ranks, tmp_path, name):
    expected = run(arguments(tmp_path, 1, **RUNS[name], save_strategy="no"))
    found = ranks[0][name]
    assert len(found["losses"]) == STEPS
    for numbers, others in zip(found["losses"], expected["losses"], strict=True):
        assert numbers == pytest.approx(others, rel=2e-3, abs=1e-5)
    torch.testing.assert_close(found["gates"], expected["gates"], rtol=1e-2, atol=1e-3)
    assert found["cuts"].keys() == expected["cuts"].keys()
    assert all(torch.equal(kept, found["cuts"][part]) for part, kept in expected["cuts"].items())
    for key, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][key], value, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("name", [*RUNS, *(f"{name}, resumed" for name in RUNS), "timed", "first rank's weights"])
def test_all_ranks_hold_the_same(ranks, name):
    one, two = (rank[name] for rank in ranks)
    assert one["losses"] == two["losses"] and one["snapshots"] == two["snapshots"]
    assert torch.equal(one["gates"], two["gates"]) and torch.equal(one["multipliers"], two["multipliers"])
    assert one["gates"].std() > 0 and one["multipliers"].abs().max() > 0
    for part in ("cuts", "weights"):
        assert one[part].keys() == two[part].keys()
        assert all(torch.equal(value, two[part][key]) for key, value in one[part].items())


@pytest.mark.parametrize("name", RUNS)
def test_resuming_changes_nothing(ranks, name):
    straight, resumed = ranks[0][name], ranks[0][f"{name}, resumed"]
    assert straight["losses"] == resumed["losses"]
    assert torch.equal(straight["gates"], resumed["gates"])
    assert all(torch.equal(value, resumed["weights"][key]) for key, value in straight["weights"].items())


def test_the_first_rank_decides(ranks):
    assert [rank["measured"] for rank in ranks] == [1, 0]
    for rank in ranks:
        assert rank["first rank's weights"]["losses"] == rank["nearest"]["losses"]


def test_nan_on_one_rank_stops_both(ranks):
    for rank in ranks:
        assert "the loss is nan at step 3: stopped before the weights changed" in rank["nan"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
