"""A plan survives its file, and a damaged file is refused."""

import pytest
import torch

from sparsekit.errors import CheckpointError
from sparsekit.masks import Mask
from sparsekit.patterns import NM
from sparsekit.plan import MadeBy, Plan


def make_plan() -> Plan:
    torch.manual_seed(0)
    masks = {f"layers.{i}.proj": Mask("2:4", NM(2, 4).project(torch.rand(3 + i, 10))) for i in range(2)}
    return Plan(masks, MadeBy("wanda", {"pattern": "2:4"}, "tiny", "abc", 7, {"torch": "2"}), ["a note"])


def test_round_trip(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "deep" / "plan.safetensors")
    loaded = Plan.load(tmp_path / "deep" / "plan.safetensors")
    assert loaded == plan
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep", tmp_path / "deep" / "plan.safetensors"]


def test_sparsity_counts_every_weight_once():
    plan = make_plan()
    removed = sum(int((~mask.keep).sum()) for mask in plan.masks.values())
    assert plan.sparsity == pytest.approx(removed / sum(mask.keep.numel() for mask in plan.masks.values()))
    assert Plan().sparsity == 0


def test_missing_truncated_and_foreign_files(tmp_path):
    path = tmp_path / "plan.safetensors"
    with pytest.raises(FileNotFoundError, match="no plan at"):
        Plan.load(path)
    make_plan().save(path)
    whole = path.read_bytes()
    for cut in (0, 5, 60, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="not a complete sparsekit plan"):
            Plan.load(path)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError):
        Plan.load(path)


def test_altered_bits_that_break_the_pattern_are_refused(tmp_path):
    plan = make_plan()
    plan.masks["layers.0.proj"].bits.fill_(255)
    plan.save(tmp_path / "plan.safetensors")
    with pytest.raises(CheckpointError, match="breaks 2:4"):
        Plan.load(tmp_path / "plan.safetensors")
