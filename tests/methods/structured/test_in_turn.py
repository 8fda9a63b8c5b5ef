"""`sparsify` with structured patterns, and several in turn: one plan, one report."""

import pytest
import torch

import sparsekit as sk
from sparsekit.plan import Cut, MadeBy, Plan
from sparsekit.sparsify import for_packing, merged
from tests.archs.tiny_models import tiny_model, token_samples
from tests.methods.structured.test_depth import deep

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def sparsified(model, *args, **fields):
    given = {"dataset": token_samples(8), "num_calibration_samples": 8, "progress": False, **fields}
    return sk.sparsify(model, *args, **given)


def outputs(model):
    with torch.no_grad():
        return model(torch.stack(token_samples(3, seed=5))).logits


def test_structured_by_itself_takes_contribution_and_cuts():
    model = tiny_model("bert")
    assert sparsified(model, "structured") is model
    assert sum(block.output.dense.in_features for block in model.bert.encoder.layer) < 72
    assert sk.check(model).ok


def test_without_data_it_is_magnitude_and_said():
    with pytest.warns(UserWarning, match="no dataset: pruned to structured by magnitude"):
        model = sk.sparsify(tiny_model("bert"), "structured", progress=False)
    assert all(block.output.dense.in_features == 18 for block in model.bert.encoder.layer)


@pytest.mark.parametrize("method", ["flap", sk.FLAP(sparsity=0.5), sk.KCM(constraints={"params": "85%"})], ids=repr)
def test_a_method_by_name_or_config(method):
    model = tiny_model("bert")
    before = sum(parameter.numel() for parameter in model.parameters())
    sparsified(model, "structured", method=method)
    assert sum(parameter.numel() for parameter in model.parameters()) < before


def test_a_budget_is_passed_on():
    model = sparsified(tiny_model("bert"), "structured", constraints={"params": "85%"})
    dense = tiny_model("bert")
    left = sum(p.numel() for p in model.bert.encoder.parameters()) / sum(
        p.numel() for p in dense.bert.encoder.parameters()
    )
    assert 0.83 < left < 0.87


def test_widths_then_two_of_four():
    model = sparsified(tiny_model("bert"), ["structured", "2:4"], sparsity=0.5)
    layer = model.bert.encoder.layer[0].attention.self.query
    assert layer.out_features < 20
    report = sk.check(model)
    assert report.ok and outputs(model).isfinite().all()
    dense = {name: module for name, module in model.named_modules() if isinstance(module, sk.SparseLinear)}
    assert dense and all(bool((m.to_dense() != 0).float().mean() <= 0.6) for m in dense.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "distilbert"])
def test_one_report_of_both_and_one_folder(family, tmp_path):
    """What goes, what is zero, who opens it: in one table; and it is the same model after a trip to disk."""
    model = sparsified(tiny_model(family), ["structured", "2:4"], sparsity=0.4, method=[None, "magnitude"])
    report = sk.check(model)
    assert report.ok and report.summary["packed"] == report.summary["sparse"] > 0
    shapes = {row["layer"]: row["shape"] for row in report.rows}
    dense = {row["layer"]: row["shape"] for row in sk.check(tiny_model(family)).rows}
    assert shapes.keys() == dense.keys() and shapes != dense
    assert any("have sizes that its config cannot say" in note and "are packed" in note for note in report.notes)
    model.save_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(model))
    if model.can_generate():
        x = torch.stack(token_samples(2, 6))
        given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        cached = again.generate(x, **given)
        assert torch.equal(cached, model.generate(x, **given)) and cached.shape == (2, 12)
        assert torch.equal(cached, again.generate(x, use_cache=False, **given))


def test_hidden_dimensions_then_widths(tmp_path):
    """What the stream does not need, then what blocks do not; the plan of both does it again."""
    found = []
    original = sk.sparsify.__globals__["merged"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sk.sparsify.__globals__, "merged", lambda *two: found.append(original(*two)) or found[-1])
        methods = [sk.SliceGPT(sparsity=0.2, round_to=2), sk.Contribution(sparsity=0.25, min_channels=1)]
        model = sparsified(tiny_model("llama"), ["structured", "structured"], method=methods)
    (plan,) = found
    assert model.config.hidden_size == 16 and {cut.kind for cut in plan.cuts.values()} >= {"hidden", "channels"}
    assert plan.made_by.method == "slicegpt, contribution" and sk.check(model, plan).ok
    model.save_pretrained(tmp_path)
    assert torch.equal(outputs(type(model).from_pretrained(tmp_path)), outputs(model))


def test_three_in_turn_leave_one_plan_that_can_be_repeated():
    found = []
    original = sk.sparsify.__globals__["merged"]

    def caught(first, second):
        found.append(original(first, second))
        return found[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sk.sparsify.__globals__, "merged", caught)
        model = sparsified(
            deep(),
            ["structured", "depth", "2:4"],
            method=[sk.MagnitudeSP(sparsity=0.4), sk.Depth(sparsity=0.4), "magnitude"],
        )
    plan = found[-1]
    assert len(model.model.layers) == 3
    assert {cut.kind for cut in plan.cuts.values()} == {"channels", "layers"}
    assert all(not name.startswith(("model.layers.3", "model.layers.4")) for name in plan.cuts)
    assert plan.made_by.method == "magnitude_sp, depth, magnitude"
    again = deep()
    sk.apply_(again, plan)
    torch.testing.assert_close(outputs(again), outputs(model), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size,expected", [(64, 16), (24, 8), (20, 1)])
def test_widths_that_are_packed_later_fill_the_packed_format(size, expected):
    layers = {"a": torch.nn.Linear(64, 7), "b": torch.nn.Linear(size, 5)}
    assert for_packing(sk.Contribution(), layers).round_to == expected
    assert for_packing(sk.Contribution(round_to=2), layers).round_to == 2
    assert for_packing(sk.Depth(), layers) == sk.Depth()


def test_cuts_of_one_width_follow_one_another():
    first = Plan({}, MadeBy("a"), ["x"], {"w": Cut(torch.tensor([1, 3, 4, 7]), 9, "channels")})
    second = Plan({}, MadeBy("b"), ["y"], {"w": Cut(torch.tensor([0, 2]), 4, "channels")})
    both = merged(first, second)
    assert both.cuts == {"w": Cut(torch.tensor([1, 4]), 9, "channels")}
    assert both.notes == ["x", "y"] and both.made_by.method == "a, b"


def test_names_follow_the_layers():
    cut = Cut(torch.tensor([0]), 2, "channels")
    first = Plan({}, MadeBy("a"), [], {f"m.layers.{index}.fc": cut for index in range(4)} | {"m.layers2.0.fc": cut})
    layers = Cut(torch.tensor([1, 3]), 4, "layers")
    both = merged(
        first, Plan({}, MadeBy("b"), [], {"m.layers": layers, "m.layers.1.fc": Cut(torch.tensor([0]), 1, "channels")})
    )
    assert both.cuts == {
        "m.layers": layers,
        "m.layers.0.fc": cut,
        "m.layers.1.fc": cut,
        "m.layers2.0.fc": cut,
    }


class TestBadInput:
    @pytest.mark.parametrize(
        "args,fields,message",
        [
            ([["2:4", "structured"]], {}, "2:4 must come last"),
            ([[]], {}, r"pattern=\[\] names nothing to do"),
            ([["structured", "2:4"]], {"method": "kcm"}, "takes a method for each, in a list of 2, got 'kcm'"),
            (["structured"], {"method": "wanda"}, "takes whole parts of a model out"),
            (["2:4"], {"constraints": {"flops": "60%"}}, "methods that zero weights take no budget"),
            (["structured"], {"reconstruct": True}, "nothing is masked here"),
            (["structured"], {"sparsity": 0.3, "constraints": {"flops": "60%"}}, "are two budgets"),
            (["depth"], {"method": sk.KCM()}, "method asks for 'structured': give both the same"),
            (["structured"], {"method": sk.KCM(), "constraints": {"flops": "60%"}}, "method has its own budget"),
            (["structured"], {"method": "kmc"}, "unknown method 'kmc'"),
            (["2:4"], {"method": "kcm"}, "method='kcm' makes the pattern structured, and pattern='2:4' came"),
            ([["structured", "depth"]], {"sparsity": 0.3}, "cuts more than once, and one budget does not say"),
        ],
        ids=str,
    )
    def test_contradictions(self, args, fields, message):
        model = tiny_model("bert")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        with pytest.raises(ValueError, match=message):
            sparsified(model, *args, **fields)
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())

    def test_data_that_can_be_read_once_only(self):
        with pytest.raises(ValueError, match="an iterator runs dry: pass a list"):
            sparsified(tiny_model("bert"), ["structured", "2:4"], dataset=iter(token_samples(4)))

    def test_a_failure_in_the_second_stage_takes_back_the_first(self, monkeypatch):
        model = tiny_model("bert")
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        monkeypatch.setitem(sk.sparsify.__globals__, "pack_", lambda *args, **fields: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sparsified(model, ["structured", "2:4"])
        after = model.state_dict()
        assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
