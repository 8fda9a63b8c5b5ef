"""What is trained on the grid is what is packed, bit for bit; gradients pass; shards of rows round as the whole."""

import json

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor
from transformers import TrainerCallback

import sparsekit as sk
from sparsekit.errors import Unsupported
from sparsekit.formats import FORMATS
from sparsekit.methods.grid import Grid, scale_spans
from sparsekit.nn import grid_of, side_layers
from sparsekit.nn.side import SideLinear
from sparsekit.patterns import NM
from sparsekit.plan import Plan, SideBranch
from sparsekit.train.ast_trainer import ROUNDING_RATE, ASTTrainer
from sparsekit.train.fake_quant import BranchGrid, FakeQuant, begin_rounding_
from sparsekit.train.optimizer import MaskedAdamW
from sparsekit.train.trainer import CONFIG_FILE
from tests.methods.test_grid import numbers_of

FORMAT_NAMES = ["semi24_int8", "semi24_int4", "semi24_fp8"]
SHAPES = [(5, 24, 8), (3, 19, 4), (4, 130, 16), (1, 7, 3), (6, 256, 16), (9, 128, 16)]


def matrix(N, K, seed=0):
    return torch.randn(N, K, generator=torch.Generator().manual_seed(seed))


def sparse(N, K, seed=0):
    w = matrix(N, K, seed)
    return w * NM(2, 4).project(w.abs())


def branch_of(N, K, group, has_X=False, size=0.3):
    rank = -(-K // group)
    return SideBranch(size * matrix(N, rank, 5), matrix(rank, K, 6) if has_X else None, group)


def parts(branch):
    return {"side_S": branch.S} if branch.X is None else {"side_S": branch.S, "side_X": branch.X}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("N,K,group", SHAPES)
def test_a_weight_is_rounded_to_what_packing_gives(N, K, group, format, dtype):
    w = sparse(N, K)
    w[0] = 0
    rounding, kind = FakeQuant(format), FORMATS.get(format)
    rounded, written = rounding("layer", w, w != 0, {})
    assert not written and bool((rounded[w == 0] == 0).all())
    held = rounded.to(dtype)
    packed = kind.pack(held, rounding.scales["layer"])
    assert torch.equal(packed.tensors["scales"], rounding.scales["layer"]) and torch.equal(kind.unpack(packed), held)
    again, _ = rounding("layer", w, w != 0, {})
    assert torch.equal(again, rounded)


@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("N,K,group", SHAPES)
def test_scales_are_those_of_least_squares_among_shares_of_the_widest(N, K, group, format):
    """By brute force in float64, span after span, and the branch's columns counted by what their inputs sum."""
    w, branch = sparse(N, K), branch_of(N, K, group)
    rounding = FakeQuant(format, {"layer": BranchGrid.of(format, w, branch)})
    columns, z_scale = rounding.branches["layer"].columns, rounding.branches["layer"].z_scale
    rounded, written = rounding("layer", w, w != 0, parts(branch))
    whole, got = (columns.join(*pair, z_scale).double() for pair in ((w, branch.S), (rounded, written["side_S"])))
    costs = torch.ones(whole.shape[1], dtype=torch.float64)
    costs[columns.first :] = group * z_scale**2
    q = numbers_of(format)
    for n in range(N):
        for span in scale_spans(format, whole.shape[1]):
            v = whole[n, span]
            widest = float(Grid.of(format, (v.abs().max() / q.max()).float()[None]).scales)
            errors = []
            for tenths in range(4, 11):
                grid = q * float(Grid.of(format, torch.tensor([widest * tenths / 10])).scales)
                errors.append(float(((v[:, None] - grid).abs().min(dim=1).values.square() * costs[span]).sum()))
            error = float(((got[n, span] - v).square() * costs[span]).sum())
            assert error <= min(errors) * (1 + 1e-4) + 1e-12


@pytest.mark.parametrize("has_X", [False, True], ids=["sums", "X"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("format", FORMAT_NAMES)
@pytest.mark.parametrize("N,K,group", SHAPES)
def test_a_branch_is_rounded_to_what_packing_gives(N, K, group, format, dtype, has_X):
    """Even where both have grown since the beginning, and in other proportions."""
    w, branch = sparse(N, K), branch_of(N, K, group, has_X)
    rounding = FakeQuant(format, {"layer": BranchGrid.of(format, w, branch)})
    w, branch = 1.7 * sparse(N, K, 3), branch_of(N, K, group, has_X, size=0.5)
    rounded, written = rounding("layer", w, w != 0, parts(branch))
    assert written.keys() == parts(branch).keys() and not torch.equal(written["side_S"], branch.S)
    linear = nn.Linear(K, N, bias=False)
    linear.weight = nn.Parameter(rounded.to(dtype))
    layer = SideLinear.from_linear(linear, SideBranch(written["side_S"], written.get("side_X"), group))
    sk.nn.remember_grid_(layer, format, rounding.scales["layer"])
    assert torch.equal(grid_of(layer, layer.weight)[1], rounding.scales["layer"])
    model = nn.Sequential(layer)
    sk.unpack_(sk.pack_(model, format, "reference"))
    assert torch.equal(model[0].weight, layer.weight) and torch.equal(model[0].side_S, layer.side_S)
    assert not has_X or torch.equal(model[0].side_X, layer.side_X)


@pytest.mark.parametrize("format", FORMAT_NAMES)
def test_rows_apart_are_rounded_as_all_together(format):
    """What a rank does that holds some of the rows, none perhaps of them."""
    w, branch = sparse(7, 130), branch_of(7, 130, 16, has_X=True)
    grids = {"layer": BranchGrid.of(format, w, branch)}
    together = FakeQuant(format, grids)
    expected, beside = together("layer", w, w != 0, parts(branch))
    found, scales, X = [], [], []
    for rows, of_X in ((slice(0, 4), slice(0, 6)), (slice(4, 7), slice(6, 9))):
        rank = FakeQuant(format, grids)
        part, written = rank("layer", w[rows], w[rows] != 0, {"side_S": branch.S[rows], "side_X": branch.X[of_X]})
        found.append(torch.cat((part, written["side_S"]), 1))
        scales.append(rank.scales["layer"])
        X.append(written["side_X"])
    assert torch.equal(torch.cat(found), torch.cat((expected, beside["side_S"]), 1))
    assert torch.equal(torch.cat(scales), together.scales["layer"]) and torch.equal(torch.cat(X), beside["side_X"])


@pytest.mark.parametrize("format", ["semi24", "dense", "block"])
def test_a_format_that_rounds_nothing_is_refused(format):
    with pytest.raises(ValueError, match="rounds nothing|unknown format"):
        FakeQuant(format)


@pytest.mark.parametrize("transposed", [False, True])
def test_the_optimizer_trains_the_dense_weight_under_the_grid(transposed):
    """Steps are those of a dense weight that gets the gradient of the rounded one."""
    w = matrix(6, 20)
    parameter = nn.Parameter((w.T if transposed else w).clone())
    group = {"params": [parameter], "names": ["layer"], "transposed": [transposed], "masked": True}
    rounding = FakeQuant("semi24_int4")
    optimizer = MaskedAdamW([group], pattern=NM(2, 4), lr=0.01, rewrite=rounding)
    optimizer.mask_()
    reference = nn.Parameter(w.clone())
    expected = torch.optim.AdamW([reference], lr=0.01, betas=(0.9, 0.95), weight_decay=0.0)
    for step in range(5):
        held = parameter.detach().T if transposed else parameter.detach()
        gradient = (held * 3 + matrix(6, 20, seed=step)).detach()
        parameter.grad, reference.grad = (gradient.T.contiguous() if transposed else gradient), gradient
        optimizer.step()
        expected.step()
    dense, held = (x.T if transposed else x for x in (optimizer.state[parameter]["dense"], parameter.detach()))
    torch.testing.assert_close(dense, reference.detach(), rtol=1e-5, atol=1e-6)
    assert torch.equal(held, rounding("layer", dense * (held != 0), held != 0, {})[0])
    kind = FORMATS.get("semi24_int4")
    assert torch.equal(kind.unpack(kind.pack(held.contiguous(), rounding.scales["layer"])), held)


ROUNDED = {"format": "semi24_int4", "quantise_ratio": 0.25}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"slorb_group": 16},
        {"slorb_group": 4, "slorb_train_x": True},
        {"slorb_group": 4, "slorb_init": "svd"},
        {"format": "semi24_int8", "slorb_group": 16},
        {"quantise_ratio": 0.0, "slorb_group": 16},
    ],
    ids=["plain", "branches", "trained X", "svd", "int8", "after the last step"],
)
def test_a_run_ends_on_the_grid_and_packs_as_it_is(llama, tokens, ast, tmp_path, options, dtype):
    model = llama(dtype)
    config = ast(**{**ROUNDED, **options})
    plan = sk.prune_(model, config, dataset=tokens())
    assert plan.format == config.format and set(plan.scales) == set(plan.masks)
    assert ("slorb_group" in options) == bool(plan.side)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan") == plan
    held = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.stack([sample.view(-1) for sample in tokens(4)])
    with torch.no_grad():
        before = model(input_ids=ids).logits
    sk.apply_(model, plan)
    sk.pack_(model, config.format, "reference", scales=plan.scales)
    with torch.no_grad():
        assert (model(input_ids=ids).logits - before).abs().max() < (1e-4 if dtype == torch.float32 else 0.1)
    sk.unpack_(model)
    assert all(torch.equal(tensor, held[name]) for name, tensor in model.state_dict().items())
    assert sk.check(sk.pack_(model), plan).ok, "and without being asked, on the grid that it remembers"
    assert {layer.format for layer in sk.nn.sparse_layers(model).values()} == {config.format}


@pytest.mark.parametrize(
    "options,dtype",
    [({}, torch.float32), ({"slorb_group": 16, "slorb_train_x": True}, torch.bfloat16)],
    ids=["plain", "branches"],
)
def test_training_on_the_grid_wins_back_what_rounding_costs(llama, tokens, ast, monkeypatch, options, dtype):
    """A fifth of it at least, at the very rates of the run that is rounded at the end."""
    monkeypatch.setattr("sparsekit.train.ast_trainer.ROUNDING_RATE", 0.0)
    ids, losses = torch.cat(tokens(256)), {}

    def loss_of(model):
        with torch.no_grad():
            logits = model.eval()(ids).logits[:, :-1].float()
        return float(nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    run = {"max_steps": 120, "per_device_train_batch_size": 8, "mask_update_steps": 10, "kd_weight": 0.5}
    for format in (None, "semi24_int4"):
        model = llama(dtype, num_hidden_layers=1, num_attention_heads=2, initializer_range=0.2)
        config = ast(**run, **options, format=format, mask_freeze_ratio=0.4, quantise_ratio=0.4)
        trainer = ASTTrainer(model, config, tokens(256))
        trainer.train()
        sparse = loss_of(model)
        sk.pack_(model, "semi24_int4", "reference", scales=trainer.plan().scales or None)
        losses[format] = sparse, loss_of(model)
    (sparse, rounded_at_the_end), (trained_on_the_grid, packed) = losses[None], losses["semi24_int4"]
    assert packed == pytest.approx(trained_on_the_grid, abs=1e-3)
    cost = rounded_at_the_end - sparse
    assert cost > 0.02 and packed < rounded_at_the_end - 0.2 * cost, losses


def test_rounding_begins_at_its_step_and_not_before_masks_stay(llama, tokens, ast, monkeypatch):
    for options, expected in (
        ({}, 9),
        ({"quantise_ratio": 0.1}, 11),
        ({"mask_freeze_ratio": 0.5, "quantise_ratio": 0.5}, 6),
        ({"mask_freeze_ratio": 1.0, "quantise_ratio": 1.0}, 0),
    ):
        trainer = ASTTrainer(llama(), ast(**{**ROUNDED, **options}), tokens())
        began = []

        def begin(*args, trainer=trainer, began=began, begin=trainer._round):
            began.append(trainer.state.global_step)
            begin(*args)

        monkeypatch.setattr(trainer, "_round", begin)
        trainer.train()
        assert began == [expected] and trainer.quantise_step == expected
    assert ASTTrainer(llama(), ast(), tokens()).quantise_step is None


@pytest.mark.parametrize("schedule,after", [("cosine", None), ("linear", None), ("constant", 1.0)])
def test_weights_can_move_on_the_grid(llama, tokens, ast, schedule, after):
    """The phase begins at a share of the learning rate, or where the schedule is above, and falls."""
    options = {"max_steps": 20, "lr_scheduler_type": schedule, "quantise_ratio": 0.25, "warmup_steps": 0}
    rates = {}
    for format in ("semi24_int4", None):
        trainer = ASTTrainer(llama(), ast(**options, format=format, masked_decay=0.0), tokens(128))
        trainer.train()
        found = [line["learning_rate"] for line in trainer.state.log_history if "loss" in line]
        rates[format] = [rate / trainer.args.learning_rate for rate in found]
    begin = 15
    assert rates["semi24_int4"][:begin] == pytest.approx(rates[None][:begin])
    phase, without = rates["semi24_int4"][begin:], rates[None][begin:]
    assert phase[0] == pytest.approx(after or max(ROUNDING_RATE, without[0]))
    assert phase == sorted(phase, reverse=True) and (schedule == "constant" or phase[-1] < 0.3 * phase[0])
    assert all(one >= other for one, other in zip(phase, without, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_written_into_a_branch_counts(dtype):
    """As a refit does, at the very step at which rounding begins."""
    linear = nn.Linear(16, 6, bias=False)
    linear.weight = nn.Parameter(sparse(6, 16).to(dtype))
    layer = SideLinear.from_linear(linear, branch_of(6, 16, 4))
    masked = {"params": [layer.weight], "names": ["layer"], "transposed": [False], "masked": True}
    optimizer = MaskedAdamW([masked, {"params": [layer.side_S], "branch": ["layer.side_S"]}], pattern=NM(2, 4), lr=0.1)
    layer.weight.grad, layer.side_S.grad = torch.ones_like(layer.weight), torch.ones_like(layer.side_S)
    optimizer.step()
    wanted = branch_of(6, 16, 4, size=2.0).S.to(dtype)
    with torch.no_grad():
        layer.side_S.copy_(wanted)
    rounding = begin_rounding_(optimizer, "semi24_int8", {"layer": layer})
    dense = optimizer.state[layer.side_S]["dense"]
    assert torch.equal(dense, wanted.float()) and not torch.equal(layer.side_S, wanted)
    kept = optimizer.state[layer.weight]["dense"] * (layer.weight != 0)
    assert torch.equal(
        layer.side_S.float(), rounding("layer", kept, kept != 0, {"side_S": dense})[1]["side_S"].to(dtype).float()
    )
    begin_rounding_(optimizer, "semi24_int8", {"layer": layer}, {"layer": rounding.branches["layer"].z_scale})
    assert torch.equal(optimizer.state[layer.side_S]["dense"], dense), "what is on the grid is no new value on resuming"


@pytest.mark.parametrize("options", [{}, {"slorb_group": 16, "slorb_train_x": True}], ids=["plain", "branches"])
@pytest.mark.parametrize("format", ["semi24_int4", "semi24_int8"])
def test_resuming_on_the_grid_changes_nothing(llama, tokens, ast, tmp_path, options, format):
    config = {
        **ROUNDED,
        **options,
        "format": format,
        "quantise_ratio": 0.25,
        "save_strategy": "steps",
        "save_steps": 10,
    }
    straight = ASTTrainer(llama(), ast(**config), tokens())
    straight.train()
    folder = tmp_path / "run" / "checkpoint-10"
    state = json.loads((folder / CONFIG_FILE).read_text())["state"]
    assert set(state["z_scales"]) == set(side_layers(straight.model))
    resumed = ASTTrainer(llama(), ast(**config), tokens())
    resumed.train(resume_from_checkpoint=str(folder))
    assert straight.plan() == resumed.plan() and straight.plan().scales
    named = dict(resumed.model.named_parameters())
    for name, parameter in straight.model.named_parameters():
        assert torch.equal(parameter, named[name]), name
        state, other = straight.masked_optimizer.state[parameter], resumed.masked_optimizer.state[named[name]]
        assert state.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in state.items())


def test_a_plan_made_before_rounding_began_has_no_scales(llama, tokens, ast):
    trainer = ASTTrainer(llama(), ast(**ROUNDED), tokens())

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer.add_callback(Stop())
    trainer.train()
    assert trainer.state.global_step == 3 and not trainer.plan().scales and trainer.plan().format == "semi24_int4"


@pytest.mark.parametrize("along", [0, 1])
def test_shards_along_the_inputs_are_refused(along):
    """Scales are for whole rows; those of a transposed weight are cut by shards along its first dimension."""
    parameter = nn.Parameter(torch.zeros(8, 8))
    group = {"params": [parameter], "names": ["layer"], "transposed": [along == 0], "masked": True}
    optimizer = MaskedAdamW([group], pattern=NM(2, 4))
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        sharded = nn.Parameter(distribute_tensor(sparse(8, 8), mesh, [Shard(along)]))
        optimizer.param_groups[0]["params"] = [sharded]
        with pytest.raises(Unsupported, match="layer is sharded along in_features"):
            begin_rounding_(optimizer, "semi24_int4", {})
        assert optimizer.rewrite is None
    finally:
        torch.distributed.destroy_process_group()
