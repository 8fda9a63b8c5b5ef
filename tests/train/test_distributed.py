"""Two processes train what one trains: masks, losses and weights, with DDP and with FSDP2, and after a resume.

This file is the program of the two processes as well: `torchrun --nproc_per_node 2 test_distributed.py FOLDER`.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.tensor import DTensor

import sparsekit as sk
from sparsekit.errors import NonFiniteError, Unsupported
from sparsekit.nn.side import install_side_
from sparsekit.plan import SideBranch
from sparsekit.train.ast_config import ASTConfig
from sparsekit.train.ast_trainer import ASTTrainer

pytestmark = pytest.mark.timeout(900)  # of the first test, which waits for two processes; a minute where they are free

VOCABULARY, STEPS, SAVED_AT = 64, 6, 3
FULL = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "FULL_STATE_DICT"}}
SHARDED = {"fsdp": True, "fsdp_config": {"version": 2, "state_dict_type": "SHARDED_STATE_DICT"}}
BRANCHES = {"slorb_group": 16, "slorb_init": "data", "slorb_train_x": True, "weight_decay": 0.1}
MICRO_BATCHES = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "gradient_checkpointing": True}
ROUNDING = {"format": "semi24_int4", "quantise_ratio": 0.5, "mask_freeze_ratio": 0.5}
FOLLOWING = {"masked_decay_kind": "gradient", "start": "sparsegpt"}

BF16, HIDDEN = "fsdp, bf16", "ddp, hidden states"
RUNS = {
    "ddp": ({}, {}),
    "ddp, micro-batches, branches": ({}, {**MICRO_BATCHES, **BRANCHES}),
    "fsdp, whole state": (FULL, FOLLOWING),
    "fsdp, sharded state, micro-batches, branches": (SHARDED, {**MICRO_BATCHES, **BRANCHES}),
}
"""Name -> how the run is spread, what is run."""


ROUNDED = {
    "fsdp, whole state, rounded": (FULL, {**BRANCHES, **ROUNDING}),
    "fsdp, sharded state, rounded": (SHARDED, {**BRANCHES, **ROUNDING}),
}
RUNS_IN_TWO = {**RUNS, BF16: (FULL, {"bf16": True, **BRANCHES}), HIDDEN: ({}, {"square_head_weight": 3.0}), **ROUNDED}
"""With those that one process does not do to the bit: sharded, weights are cast to bf16 before they are multiplied; the
distance of hidden states is relative to a batch's own; and what lies between two numbers of a grid goes to either.
`ROUNDED` ones are saved after rounding began."""


def llama():
    """N of k_proj is 20, which two processes share unevenly in no group; down_proj has 63 inputs."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 40, "intermediate_size": 63, "num_hidden_layers": 2, "max_position_embeddings": 32}
    config = LlamaConfig(vocab_size=VOCABULARY, **sizes, num_attention_heads=4, num_key_value_heads=2, head_dim=10)
    return LlamaForCausalLM(config).eval()


def gpt2():
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=36, n_layer=1, n_head=4))


def tokens():
    generator = torch.Generator().manual_seed(0)
    starts, steps = (torch.randint(0, high, (64, 1), generator=generator) for high in (VOCABULARY, 4))
    return list(((starts + (steps + 1) * torch.arange(12)) % VOCABULARY)[:, None])


def arguments(folder, num_processes, **options):
    """Four samples a step, spread over the processes."""
    short = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "start": "magnitude",
        "mask_update_steps": 2,
        "num_calibration_samples": 8,
        "save_strategy": "steps",
        "save_steps": SAVED_AT,
        "logging_steps": 1,
        "disable_tqdm": True,
        "use_cpu": True,
        "output_dir": str(folder),
    }
    options = {**short, **options}
    options["per_device_train_batch_size"] *= 2 // num_processes
    return ASTConfig(**options)


def spread_as(args):
    """Let accelerate shard where `args` ask for FSDP. It does that on accelerators alone, and on CPUs takes DDP instead
    without a word, so it is told here that these are accelerators; the device stays the CPU."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    assert args.device.type == "cpu" and args.world_size == 2
    AcceleratorState._reset_state()
    kind = DistributedType.MULTI_XPU if args.fsdp else DistributedType.MULTI_CPU
    PartialState._shared_state["distributed_type"] = kind


def trainer_for(model, args, cls=ASTTrainer):
    spread_as(args)
    trainer = cls(model, args, tokens())
    assert trainer.is_fsdp_enabled == bool(args.fsdp)
    return trainer


def outcome(trainer):
    """What must be the same: losses, masks and branches on every rank, statistics; the weights, whole."""
    losses = [(line["step"], line["loss"], line["grad_norm"]) for line in trainer.state.log_history if "loss" in line]
    sharded = any(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    plan = trainer.plan()
    model = trainer.trained_model()
    return {
        "losses": losses,
        "masks": {name: mask.keep for name, mask in plan.masks.items()},
        "side": {name: (branch.S, branch.X) for name, branch in plan.side.items()},
        "scales": plan.scales,
        "statistics": trainer.mask_statistics and vars(trainer.mask_statistics),
        "weights": {name: value.detach().clone() for name, value in model.state_dict().items()},
        "sharded": sharded,
    }


def pruned(args):
    """Masks and weights that `prune_` gives."""
    model = llama()
    spread_as(args)
    plan = sk.prune_(model, args, dataset=tokens(), progress=False)
    assert not any(hasattr(module, "_original_forward") for module in model.modules())
    return {name: mask.keep for name, mask in plan.masks.items()}, model.state_dict()


class NanOnTheSecond(ASTTrainer):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        return loss * float("nan") if self.state.global_step == 3 and self.args.process_index == 1 else loss


def work(folder):
    """What each of two processes does."""
    rank = int(os.environ["RANK"])
    found = {}
    for name, (spread, options) in RUNS_IN_TWO.items():
        run = folder / name
        trainer = trainer_for(llama(), arguments(run, 2, **spread, **options))
        trainer.train()
        found[name] = outcome(trainer)
        trainer = trainer_for(llama(), arguments(run, 2, **spread, **options))
        trainer.train(resume_from_checkpoint=str(run / f"checkpoint-{SAVED_AT}"))
        found[f"{name}, resumed"] = outcome(trainer)
    # Ranks that loaded other weights, or none, take the first one's, and so does the teacher.
    model = llama()
    if rank:
        model.load_state_dict({key: torch.zeros_like(value) for key, value in model.state_dict().items()})
    trainer = trainer_for(model, arguments(folder / "other", 2, save_strategy="no"))
    trainer.train()
    found["ddp, first rank's weights"] = outcome(trainer)
    found["prune_, ddp"] = pruned(arguments(folder / "prune", 2, save_strategy="no"))
    for name, call in {
        "nan": lambda: trainer_for(llama(), arguments(folder / "nan", 2), NanOnTheSecond).train(),
        "cut groups": lambda: trainer_for(gpt2(), arguments(folder / "gpt2", 2, **FULL)).train(),
        "prune_, fsdp": lambda: pruned(arguments(folder / "prune", 2, **FULL)),
    }.items():
        with pytest.raises((NonFiniteError, Unsupported)) as caught:
            call()
        found[name] = str(caught.value)
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


def assert_close(found, expected):
    assert [step for step, *_ in found["losses"]] == [step for step, *_ in expected["losses"]]
    for (_, *numbers), (_, *others) in zip(found["losses"], expected["losses"], strict=True):
        assert numbers == pytest.approx(others, rel=2e-4)
    assert found["masks"].keys() == expected["masks"].keys()
    for name, keep in expected["masks"].items():
        assert torch.equal(found["masks"][name], keep), name
    assert found["statistics"] == pytest.approx(expected["statistics"], rel=1e-3)
    assert found["weights"].keys() == expected["weights"].keys()
    for name, value in expected["weights"].items():
        torch.testing.assert_close(found["weights"][name], value, rtol=1e-2, atol=2e-4)


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_train_what_one_does(ranks, tmp_path, name):
    trainer = ASTTrainer(llama(), arguments(tmp_path, 1, **RUNS[name][1], save_strategy="no"), tokens())
    trainer.train()
    expected = outcome(trainer)
    assert expected["statistics"]["initial_flip_rate"] > 0
    assert_close(ranks[0][name], expected)


def test_two_processes_see_the_distance_of_hidden_states_once(ranks, tmp_path):
    trainer = ASTTrainer(llama(), arguments(tmp_path, 1, **RUNS_IN_TWO[HIDDEN][1], save_strategy="no"), tokens())
    trainer.train()
    first = trainer.state.log_history[0]
    assert 3.0 * first["hidden_loss"] > 0.05 * first["loss"], "it must be seen if it counts twice"
    assert ranks[0][HIDDEN]["losses"][0][1] == pytest.approx(first["loss"], rel=0.02)


@pytest.mark.parametrize("resumed", ["", ", resumed"])
@pytest.mark.parametrize("name", RUNS_IN_TWO)
def test_all_ranks_hold_the_same(ranks, name, resumed):
    one, two = (rank[name + resumed] for rank in ranks)
    assert one["sharded"] == two["sharded"] == name.startswith("fsdp")
    assert len(one["masks"]) == 14 and one["masks"]["model.layers.1.mlp.down_proj"].shape == (40, 63)
    for key in ("masks", "side"):
        assert one[key].keys() == two[key].keys()
    for layer, keep in one["masks"].items():
        assert keep.dtype == torch.bool and torch.equal(keep, two["masks"][layer])
    for layer, (S, X) in one["side"].items():
        assert torch.equal(S, two["side"][layer][0]) and torch.equal(X, two["side"][layer][1])
        assert torch.equal(S, one["weights"][f"{layer}.side_S"])
    assert one["losses"] == two["losses"] and one["statistics"] == two["statistics"]
    if "fsdp" not in name:
        assert all(torch.equal(value, two["weights"][key]) for key, value in one["weights"].items())
    assert one["scales"].keys() == two["scales"].keys() == (one["masks"].keys() if name in ROUNDED else set())
    assert all(torch.equal(scales, two["scales"][layer]) for layer, scales in one["scales"].items())
    for layer, keep in one["masks"].items():
        there = one["weights"][f"{layer}.weight"] != 0
        assert not (there & ~keep).any()
        assert name in ROUNDED or torch.equal(there, keep)


@pytest.mark.parametrize("name", RUNS_IN_TWO)
def test_resuming_changes_nothing(ranks, name):
    straight, resumed = ranks[0][name], ranks[0][f"{name}, resumed"]
    assert straight["losses"] == resumed["losses"]
    for key in ("masks", "weights", "scales"):
        assert straight[key].keys() == resumed[key].keys()
        assert all(torch.equal(value, resumed[key][layer]) for layer, value in straight[key].items())


@pytest.mark.parametrize("name", ROUNDED)
def test_packing_what_two_processes_rounded_changes_nothing(ranks, name):
    found = ranks[0][name]
    model = llama()
    for layer, (S, X) in found["side"].items():
        install_side_(model, layer, SideBranch(S, X, BRANCHES["slorb_group"]))
    model.load_state_dict(found["weights"])
    sk.pack_(model, "semi24_int4", "reference", scales=found["scales"])
    for key, value in sk.unpack_(model).state_dict().items():
        assert torch.equal(value, found["weights"][key]), key


def test_the_first_rank_decides(ranks):
    for rank in ranks:
        assert rank["ddp, first rank's weights"]["losses"] == rank["ddp"]["losses"]


def test_nan_on_one_rank_stops_both(ranks):
    for rank in ranks:
        assert "the loss is nan at step 4: stopped before the weights changed" in rank["nan"]


def test_pruning_in_two_processes_is_training_in_two(ranks):
    for rank in ranks:
        masks, weights = rank["prune_, ddp"]
        assert masks.keys() == rank["ddp"]["masks"].keys()
        assert all(torch.equal(keep, masks[name]) for name, keep in rank["ddp"]["masks"].items())
        assert all(torch.equal(value, weights[name]) for name, value in rank["ddp"]["weights"].items())


def test_pruning_a_model_that_is_sharded_is_refused(ranks):
    for rank in ranks:
        assert "FSDP leaves it in shards" in rank["prune_, fsdp"] and "trained_model()" in rank["prune_, fsdp"]


def test_groups_that_sharding_would_cut_are_refused(ranks):
    for rank in ranks:
        assert "sharded along in_features, which cuts groups of 2:4" in rank["cut groups"]
        assert "or DDP" in rank["cut groups"]


if __name__ == "__main__":
    work(Path(sys.argv[1]))
