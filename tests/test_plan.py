"""A plan survives its file, and a damaged file is refused."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from sparsekit_kernels.quant import GRIDS

from sparsekit.errors import CheckpointError
from sparsekit.masks import Mask
from sparsekit.patterns import NM
from sparsekit.plan import Cut, InputOrder, MadeBy, Plan, SideBranch
from sparsekit.registry import unknown


def make_plan() -> Plan:
    torch.manual_seed(0)
    masks = {f"layers.{i}.proj": Mask("2:4", NM(2, 4).project(torch.rand(3 + i, 10))) for i in range(2)}
    made_by = MadeBy(
        "wanda", {"pattern": "2:4"}, "tiny", "abc", 7, {"torch": "2"}, False, 12, 256, ["Linear"], ["head"]
    )
    side = {"layers.0.proj": SideBranch(torch.rand(3, 2), group=8)}
    perms = {"layers.0.proj": InputOrder(torch.randperm(10), torch.randn(10))}
    cuts = {"layers": Cut(torch.tensor([0, 2]), 3, "layers"), "layers.1.out": Cut(torch.tensor([1]), 4, "heads")}
    return Plan(masks, made_by, ["a note"], cuts, perms, side)


def test_round_trip(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "deep" / "plan.safetensors")
    loaded = Plan.load(tmp_path / "deep" / "plan.safetensors")
    assert loaded == plan
    assert list(tmp_path.rglob("*")) == [tmp_path / "deep", tmp_path / "deep" / "plan.safetensors"]


def rewrite(path, change):
    """Change the header of a plan's file, and leave its tensors."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
        header = json.loads(file.metadata()["sparsekit_plan"])
    change(header)
    save_file(tensors, path, metadata={"sparsekit_plan": json.dumps(header)})


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header["made_by"].update(flavour="strawberry"),
        lambda header: header.update(made_by=None),
        lambda header: header.pop("notes"),
        lambda header: header.update(notes=None),
        lambda header: header.update(cuts=3),
    ],
    ids=["unknown key", "no made_by", "no notes", "null notes", "cuts"],
)
def test_headers_that_are_no_plan_are_refused(tmp_path, change):
    path = tmp_path / "plan.safetensors"
    make_plan().save(path)
    rewrite(path, change)
    with pytest.raises(CheckpointError, match="not a complete sparsekit plan"):
        Plan.load(path)


def test_what_an_older_file_lacks_is_empty(tmp_path):
    path, plan = tmp_path / "plan.safetensors", make_plan()
    plan.save(path)

    def shorten(header):
        for key in ("num_samples", "sample_length", "targets", "ignore"):
            del header["made_by"][key]
        for key in ("cuts", "perms", "side"):
            del header[key]

    rewrite(path, shorten)
    loaded = Plan.load(path)
    assert loaded.masks == plan.masks and loaded.notes == plan.notes
    assert loaded.cuts == loaded.perms == loaded.side == {}
    assert (loaded.made_by.num_samples, loaded.made_by.targets, loaded.made_by.seed) == (0, [], 7)


def test_branches_survive_the_file(tmp_path):
    plan = make_plan()
    plan.side["layers.1.proj"] = SideBranch(torch.rand(4, 3).bfloat16(), torch.rand(3, 10), group=5)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded == plan and loaded.side["layers.0.proj"].X is None
    assert loaded.side["layers.1.proj"].S.dtype == torch.bfloat16 and loaded.side["layers.1.proj"].group == 5
    for change in (
        SideBranch(plan.side["layers.1.proj"].S, plan.side["layers.1.proj"].X, group=4),
        SideBranch(plan.side["layers.1.proj"].S, plan.side["layers.1.proj"].X * 2, group=5),
        SideBranch(plan.side["layers.1.proj"].S.float(), plan.side["layers.1.proj"].X, group=5),
        SideBranch(torch.zeros(4, 2), group=5),
    ):
        plan.side["layers.1.proj"] = change
        assert plan != loaded


def test_orders_survive_the_file_and_tell_plans_apart(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded == plan and loaded.perms["layers.0.proj"].order.dtype == torch.int64
    order, signature = plan.perms["layers.0.proj"].order, plan.perms["layers.0.proj"].signature
    for change in ({}, {"layers.0.proj": InputOrder(order.flip(0), signature)}):
        loaded.perms = change
        assert loaded != plan


@pytest.mark.parametrize(
    "name,K,message",
    [("layers.7.proj", 10, "layers.7.proj, which has no mask"), ("layers.0.proj", 9, "is of 9, it has 10")],
)
def test_orders_that_do_not_fit_are_refused(tmp_path, name, K, message):
    plan = make_plan()
    plan.perms = {name: InputOrder(torch.arange(K), torch.zeros(K))}
    plan.save(tmp_path / "plan")
    with pytest.raises(CheckpointError, match=message):
        Plan.load(tmp_path / "plan")


@pytest.mark.parametrize(
    "order,signature,message",
    [
        (torch.tensor([0, 2, 2]), torch.zeros(3), "order must hold each of 0 … K-1 once"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), torch.zeros(3), "as int64"),
        (torch.tensor([0, 1, 2]), torch.zeros(2), r"signature must be fp32 \[3\]"),
        (torch.tensor([0, 1, 2]), torch.tensor([0, float("nan"), 0]), "and finite"),
    ],
    ids=["twice", "int32", "short", "nan"],
)
def test_what_is_no_order_is_refused(order, signature, message):
    with pytest.raises(ValueError, match=message):
        InputOrder(order, signature)


def test_cuts_survive_the_file_and_tell_plans_apart(tmp_path):
    plan = make_plan()
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded == plan and loaded.cuts["layers"].kept.tolist() == [0, 2]
    for change in (
        Cut(torch.tensor([0, 1]), 3, "layers"),
        Cut(torch.tensor([0, 2]), 4, "layers"),
        Cut(torch.tensor([0, 2]), 3, "channels"),
    ):
        loaded.cuts["layers"] = change
        assert loaded != plan


def test_a_plan_of_cuts_alone():
    plan = Plan(cuts={"a": Cut(torch.tensor([1, 2]), 4, "channels"), "b": Cut(torch.arange(3), 4, "channels")})
    assert plan.units() == {"channels": (5, 8)} and plan.sparsity == pytest.approx((0.5 + 0.25) / 2)
    assert repr(plan) == "Plan(by hand: 5 of 8 channels, sparsity=0.375)"
    assert plan.cuts["a"].removed.tolist() == [0, 3] and str(plan.cuts["a"]) == "Cut(channels: 2 of 4)"


@pytest.mark.parametrize(
    "kept,num,kind,message",
    [
        ([], 3, "heads", "nothing is left of 3 heads: keep 1 or more"),
        ([0, 3], 3, "heads", r"rise from 0 or more to 2 or less, got \[0, 3\]"),
        ([-1, 1], 3, "heads", "from 0 or more"),
        ([1, 0], 3, "layers", "kept must rise"),
        ([1, 1], 3, "layers", "kept must rise"),
        ([0], 3, "depth", "unknown kind 'depth'"),
        ([[0]], 3, "heads", r"int64 \[n\], got torch.int64 of shape \(1, 1\)"),
        ([0.0], 3, "heads", "got torch.float32"),
    ],
)
def test_what_is_no_cut_is_refused(kept, num, kind, message):
    kept = torch.tensor(kept) if kept else torch.tensor([], dtype=torch.int64)
    with pytest.raises(ValueError, match=message):
        Cut(kept, num, kind)


@pytest.mark.parametrize("name", ["layers.2.proj", "layers.2"])
def test_names_of_layers_that_went_are_refused(tmp_path, name):
    plan = make_plan()
    plan.cuts[name] = Cut(torch.tensor([0]), 2, "channels")
    plan.save(tmp_path / "plan")
    with pytest.raises(CheckpointError, match=f"speaks of {name}, and leaves 2 layers in layers.*layers.0 to layers.1"):
        Plan.load(tmp_path / "plan")


def test_what_branches_store_is_no_sparsity():
    plan = make_plan()
    without = Plan(plan.masks).sparsity
    assert plan.sparsity == pytest.approx(without - 6 / 70)


@pytest.mark.parametrize(
    "branch, name, message",
    [
        (SideBranch(torch.zeros(3, 2), group=8), "layers.7.proj", "which has no mask"),
        (SideBranch(torch.zeros(4, 2), group=8), "layers.0.proj", "S has 4 rows, the weight has 3"),
        (SideBranch(torch.zeros(3, 2), group=16), "layers.0.proj", "S has 2 columns, 10 features make 1 groups"),
        (SideBranch(torch.zeros(3, 2), torch.zeros(2, 9)), "layers.0.proj", "X has 9 columns, the weight has 10"),
        (SideBranch(torch.full((3, 1), float("nan"))), "layers.0.proj", "holds NaN or infinity"),
    ],
)
def test_branches_that_do_not_fit_are_refused(tmp_path, branch, name, message):
    plan = make_plan()
    plan.side = {name: branch}
    plan.save(tmp_path / "plan")
    with pytest.raises(CheckpointError, match=message):
        Plan.load(tmp_path / "plan")


def test_a_branch_whose_factors_do_not_fit_is_refused():
    with pytest.raises(ValueError, match="group=0 is no number of features"):
        SideBranch(torch.zeros(3, 2), group=0)
    with pytest.raises(ValueError, match="S must be a floating matrix, got torch.int64"):
        SideBranch(torch.zeros(3, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"give S \[N, r\] and X \[r, K\]"):
        SideBranch(torch.zeros(3, 2), torch.zeros(3, 8))


def rounded_plan(format="semi24_int4", N=3, K=300):
    masks = {"proj": Mask("2:4", NM(2, 4).project(torch.rand(N, K, generator=torch.Generator().manual_seed(0))))}
    grid = GRIDS[format]
    scales = {"proj": torch.rand(grid.scale_shape(N, K)).add(0.1).to(grid.scale_dtype)}
    return Plan(masks, MadeBy("sparsegpt", {"pattern": "2:4", "format": format}), scales=scales)


@pytest.mark.parametrize("format", list(GRIDS))
def test_scales_survive_the_file(tmp_path, format):
    plan = rounded_plan(format)
    plan.save(tmp_path / "plan")
    loaded = Plan.load(tmp_path / "plan")
    assert loaded == plan and loaded.format == format
    assert loaded.scales["proj"].dtype == GRIDS[format].scale_dtype
    assert str(loaded) == f"Plan(sparsegpt: 2:4 for {format}, 1 layers, sparsity=0.500)"
    loaded.scales["proj"] *= 2
    assert loaded != plan and plan != make_plan()
    loaded.scales = {}
    assert loaded != plan


@pytest.mark.parametrize(
    "change,message",
    [
        (lambda plan: plan.scales["proj"].neg_(), "not positive and finite"),
        (lambda plan: plan.scales["proj"].fill_(float("nan")), "not positive and finite"),
        (lambda plan: plan.scales.update(proj=plan.scales["proj"][:2].clone()), r"scales of proj are .*\(2, 3\)"),
        (lambda plan: plan.scales.update(proj=plan.scales["proj"].float()), "scales of proj are torch.float32"),
        (lambda plan: plan.scales.update(other=plan.scales["proj"].clone()), "scales of other, which has no mask"),
        (lambda plan: plan.made_by.config.update(format="semi24"), "its format is semi24, not one of"),
        (lambda plan: plan.made_by.config.clear(), "its format is None"),
    ],
    ids=["negative", "nan", "shape", "dtype", "no mask", "lossless", "no format"],
)
def test_scales_that_do_not_fit_are_refused(tmp_path, change, message):
    plan = rounded_plan()
    change(plan)
    plan.save(tmp_path / "plan")
    with pytest.raises(CheckpointError, match=message):
        Plan.load(tmp_path / "plan")


def test_scales_that_the_file_lacks_are_missed(tmp_path):
    path = tmp_path / "plan"
    rounded_plan().save(path)
    with safe_open(path, framework="pt") as file:
        metadata, tensors = file.metadata(), {"masks.proj": file.get_tensor("masks.proj")}
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match="scales.proj"):
        Plan.load(path)


def test_names_that_are_not_near_are_not_offered():
    assert "Did you mean" not in unknown("backend", "cuda", ["cpu", "reference", "triton"])
    assert "Did you mean 'triton'?" in unknown("backend", "tritn", ["cpu", "reference", "triton"])


def test_sparsity_counts_every_weight_once():
    plan = Plan(make_plan().masks)
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
    save_file({"x": torch.zeros(1)}, path)
    with pytest.raises(CheckpointError):
        Plan.load(path)


def test_altered_bits_that_break_the_pattern_are_refused(tmp_path):
    plan = make_plan()
    plan.masks["layers.0.proj"].bits.fill_(255)
    plan.save(tmp_path / "plan.safetensors")
    with pytest.raises(CheckpointError, match="breaks 2:4"):
        Plan.load(tmp_path / "plan.safetensors")


def test_a_plan_prints_as_one_line_and_its_notes():
    made = "wanda: 1 of 4 heads, 2 of 3 layers, then 2:4, 2 layers, 1 with a side branch, 1 with reordered inputs"
    assert str(make_plan()) == f"Plan({made}, sparsity=0.314)\n  • a note"
    assert repr(Plan()) == "Plan(by hand: nothing, 0 layers, sparsity=0.000)"
