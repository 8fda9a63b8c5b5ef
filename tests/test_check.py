"""`check` and `explain` against counts made here, and that damage turns `ok` False."""

import json

import pytest
import torch
import torch.nn as nn

import sparsekit as sk
from sparsekit import SparseLinear
from sparsekit.backends import BACKENDS
from sparsekit.check import sparsity_of
from sparsekit.nn import sparse_layers
from sparsekit.plan import SideBranch


def mlp(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 24, bias=False), nn.ReLU(), nn.Linear(24, 8)).to(
        dtype
    )


def pruned(pattern="2:4", ignore=(), **kwargs):
    model = mlp(**kwargs)
    return model, sk.prune_(model, sk.Magnitude(pattern=pattern), ignore=ignore, progress=False)


def weight_of(module):
    return module.to_dense() if isinstance(module, SparseLinear) else module.weight


class TestCheck:
    @pytest.mark.parametrize("packed", [True, False])
    @pytest.mark.parametrize("pattern", ["2:4", "1:4"])
    def test_numbers(self, pattern, packed):
        model, plan = pruned(pattern)
        model[0].weight.data[:5] = 0
        if packed:
            sk.pack_(model)
        report = sk.check(model, plan)
        assert report.ok and [row["layer"] for row in report.rows] == ["0", "2", "4"]
        zeros = total = held = 0
        for row in report.rows:
            module = model.get_submodule(row["layer"])
            w = weight_of(module).detach()
            count = sum(value == 0 for line in w.tolist() for value in line)
            bytes_held = sum(t.nbytes for t in module.prepared) if packed else w.numel() * 4
            assert row["sparsity"] == pytest.approx(count / w.numel(), abs=1e-4)
            assert row["asked"] == pytest.approx(0.5 if pattern == "2:4" else 0.75)
            assert row["shape"] == f"{w.shape[0]}x{w.shape[1]}" and row["pattern"] == pattern and row["finite"]
            assert row["dense bytes"] == w.numel() * 4 and row["bytes"] == bytes_held
            assert row["backend"] == (module.backend if packed else "torch")
            zeros, total, held = zeros + count, total + w.numel(), held + bytes_held
        assert report.summary["sparsity of the sparse layers"] == pytest.approx(zeros / total, abs=1e-3)
        assert report.summary["linear layers"] == report.summary["sparse"] == 3
        assert report.summary["packed"] == (3 if packed else 0)
        bytes_line = report.summary["bytes of the sparse layers"]
        bits = report.numbers.pop("bits_a_weight")
        assert bits == 8 * held / total and report.summary["bits a weight of the sparse layers"] == round(bits, 3)
        assert report.numbers == {"sparse_bytes": held, "dense_bytes": 4 * total, "ratio": held / (4 * total)}
        assert {row["format"] for row in report.rows} == {"semi24" if packed else "dense"}
        assert bytes_line == f"{held:,} of {4 * total:,} dense ({held / (4 * total):.3f})"
        assert any("no layer is packed" in note for note in report.notes) is not packed

    @pytest.mark.parametrize("rank", [None, 2])
    def test_a_branch_is_no_sparsity_and_costs_bytes(self, rank):
        model, plan = pruned("2:4")
        plain = {row["layer"]: row for row in sk.check(model, plan).rows}
        for name, mask in plan.masks.items():
            N, K = mask.shape
            S = torch.ones(N, rank or -(-K // 16))
            plan.side[name] = SideBranch(S, torch.ones(rank, K) if rank else None, 16)
        lacking = sk.check(model, plan)
        assert not lacking.ok and "0 lacks the side branch of the plan: call sparsekit.apply_" in lacking.notes[0]
        sk.apply_(model, plan)
        for packed in (False, True):
            report = sk.check(sk.pack_(model) if packed else model, plan)
            assert report.ok
            zeros = total = held = 0
            for row in report.rows:
                (N, K), branch = plan.masks[row["layer"]].shape, plan.side[row["layer"]]
                module = model.get_submodule(row["layer"])
                own = [*module.prepared, *module.side_tensors().values()] if packed else module.parameters()
                num_bytes = sum(t.nbytes for t in own if packed or t.dim() == 2)
                assert row["side"] == branch.num_numbers and row["bytes"] == num_bytes
                assert row["bits a weight"] == round(8 * num_bytes / (N * K), 3)
                density = 1 - plain[row["layer"]]["sparsity"] + branch.num_numbers / (N * K)
                assert row["sparsity"] == pytest.approx(1 - density, abs=2e-4)
                assert row["asked"] == plain[row["layer"]]["asked"] and row["dense bytes"] == 4 * N * K
                zeros, total, held = zeros + row["sparsity"] * N * K, total + N * K, held + num_bytes
            assert report.summary["sparsity of the sparse layers"] == pytest.approx(zeros / total, abs=1e-3)
            assert report.numbers["bits_a_weight"] == 8 * held / total
        assert all("with a side branch of rank" in row["weight"] for row in sk.explain(model).rows)
        (sk.unpack_(model)[0]).side_S.data[0, 0] = float("inf")
        assert "0 holds NaN or infinity" in sk.check(model).notes

    def test_a_dense_model_is_fine_and_said_to_be_dense(self):
        report = sk.check(mlp())
        assert report.ok and {row["pattern"] for row in report.rows} == {"dense"} and report.summary["sparse"] == 0

    def test_the_reason_of_every_backend_passed_over(self):
        model = sk.pack_(pruned()[0])
        layer = model[0]
        [note] = [note for note in sk.check(model).notes if "layers run on" in note]
        assert note.startswith("3 layers run on 'cpu'")
        assert layer.reasons and all(f"not {name}: {reason}" in note for name, reason in layer.reasons.items())

    def test_a_plan_broken_after_pruning(self):
        model, plan = pruned()
        keep = plan.masks["2"].keep
        n, k = (~keep).nonzero()[0].tolist()
        model[2].weight.data[n, k] = 1.0
        report = sk.check(model, plan)
        assert not report.ok
        assert any("2 has non-zeros where the plan removes" in note for note in report.notes)
        assert any("2 breaks 2:4 in 1 places" in note for note in report.notes)
        assert sk.check(sk.apply_(model, plan), plan).ok

    def test_other_zeros_than_planned(self):
        """The pattern holds, the plan does not."""
        model, plan = pruned()
        model[2].weight.data = model[2].weight.data.roll(1, 0)
        assert not sk.check(model, plan).ok
        assert sk.check(model).ok

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf])
    @pytest.mark.parametrize("packed", [True, False])
    def test_not_finite(self, packed, bad):
        model, plan = pruned()
        if packed:
            sk.pack_(model)
            model[2].prepared[0].view(-1)[0] = bad  # memory gone wrong: no file with it would load
        else:
            kept = plan.masks["2"].keep.nonzero()[0].tolist()
            model[2].weight.data[kept[0], kept[1]] = bad
        for report in (sk.check(model, plan), sk.check(model)):
            assert not report.ok and "2 holds NaN or infinity" in report.notes
            assert [row["finite"] for row in report.rows] == [True, False, True]

    def test_a_plan_of_another_model(self):
        model, plan = pruned()
        del model[4]
        report = sk.check(model, plan)
        assert not report.ok and any("the plan names 4, which the model does not have" in note for note in report.notes)

    def test_layers_on_meta_are_left_out(self):
        model, _ = pruned()
        model[0].to("meta")
        assert [row["layer"] for row in sk.check(model).rows] == ["2", "4"]

    def test_conv1d_is_shown_as_out_by_in(self):
        from transformers.pytorch_utils import Conv1D

        model = nn.Sequential(Conv1D(24, 32))
        plan = sk.prune_(model, "magnitude", progress=False)
        assert sk.check(model, plan).rows[0]["shape"] == "24x32" and sk.check(model, plan).ok
        sk.pack_(model)
        assert sk.check(model, plan).rows[0]["shape"] == "24x32" and sk.check(model, plan).ok

    def test_a_model_without_linear_layers(self):
        assert sk.check(nn.Sequential(nn.ReLU())).rows == []

    def test_json_and_print(self, tmp_path):
        report = sk.check(sk.pack_(pruned()[0]))
        report.to_json(tmp_path / "report.json")
        assert json.loads((tmp_path / "report.json").read_text())["ok"] is True
        assert "sparsekit check" in str(report) and "64x32" in str(report)

    def test_nothing_changes(self):
        model = sk.pack_(pruned()[0])
        before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
        sk.check(model)
        sk.explain(model)
        assert all(torch.equal(model.state_dict()[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize("zeros", [0, 1, 17, 64])
def test_sparsity_of(zeros):
    w = torch.ones(8, 8)
    w.view(-1)[:zeros] = 0
    w.view(-1)[: zeros // 2] = -0.0
    assert sparsity_of(w) == zeros / 64
    assert sparsity_of(torch.empty(0, 4)) in (0.0, 1.0)


class TestExplain:
    def test_one_row_for_each_kind_of_layer(self):
        model = mlp()
        sk.prune_(model, "magnitude", ignore=("4",), progress=False)
        model.append(nn.Linear(24, 8))
        model.append(nn.Linear(24, 8))
        sk.pack_(model)
        rows = sk.explain(model, num_tokens=(1, 77)).rows
        assert sum(row["layers"] for row in rows) == 5
        assert [row["first layer"] for row in rows] == ["0", "2", "4"]
        assert rows[2]["layers"] == 3 and rows[2]["weight"] == "dense 8x24 float32"
        assert rows[2]["M=1"] == rows[2]["M=77"] == "dense"
        assert rows[0]["weight"] == "semi24 64x32 float32" and rows[0]["backend"] == model[0].backend
        assert rows[0]["M=77"] == BACKENDS.get(model[0].backend).kernel(model[0].spec, 77)

    def test_every_other_backend_has_an_answer(self):
        model = sk.pack_(pruned()[0], backend="reference")
        why = sk.explain(model).rows[0]["why not the others"]
        for name, backend in BACKENDS.items():
            if name == "reference":
                assert "reference:" not in why
                continue
            reason = backend.why_not(model[0].spec, torch.device("cpu"))
            assert f"{name}: {reason or 'it can run'}" in why

    def test_a_layer_that_was_never_run_is_prepared(self):
        model = sk.pack_(pruned()[0])
        fresh = SparseLinear(model[0].spec)
        fresh.load_state_dict(model[0].state_dict())
        assert not fresh.is_prepared
        assert sk.explain(nn.Sequential(fresh)).rows[0]["backend"] == model[0].backend

    def test_nothing_linear(self):
        assert "the model has no linear layer" in sk.explain(nn.ReLU()).notes


def test_layers_of_a_packed_model_are_all_reported():
    model = sk.pack_(pruned()[0])
    assert {row["layer"] for row in sk.check(model).rows} == set(sparse_layers(model))


def test_explain_says_what_runs_at_each_number_of_tokens():
    from sparsekit.backends import BACKENDS
    from sparsekit.formats import WeightSpec

    spec = WeightSpec("semi24", 64, 64, torch.bfloat16)
    for name, backend in BACKENDS.items():
        kernels = [backend.kernel(spec, m) for m in (1, 64, 65, 4096)]
        assert all(kernels), name
        if name == "triton" and not torch.cuda.is_available():  # else a table may know better than the rule
            assert kernels[0] == kernels[1] == kernels[2] != kernels[3]
    for bad in ((0,), (4, -1)):
        with pytest.raises(ValueError, match="no number of tokens"):
            sk.explain(torch.nn.Linear(4, 4), num_tokens=bad)
