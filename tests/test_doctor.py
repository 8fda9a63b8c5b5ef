"""The doctor on everything it takes, and what it refuses."""

import importlib

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import sparsekit as sk
from sparsekit import doctor as doctor_function
from sparsekit.benchmarking import LayerShape, layers
from sparsekit.doctor import advice, default_dtype, doctor, parse_dtype
from sparsekit.nn import sparse_layers

doctor_module = importlib.import_module("sparsekit.doctor")
QUICK = {"num_tokens": (1, 2), "max_seconds": 0.5, "progress": False, "device": "cpu"}


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(layers, "MAX_COPIES", 1)


def config():
    return LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        architectures=["LlamaForCausalLM"],
        dtype=torch.float32,
    )


def test_the_machine_alone():
    report = doctor(progress=False, device="cpu")
    assert report.ok and not report.rows and report.notes
    assert report.summary["memory read, GB/s"] > 0 and report.summary["matmul float32, GFLOP/s"] > 0
    assert report.summary["backend triton"].startswith("no: ")
    assert report.summary["backend reference"].startswith("yes")


def test_config_without_weights():
    report = doctor(config(), **QUICK)
    shapes = {row["shape"]: (row["layer"], row["count"]) for row in report.rows}
    assert shapes == {
        "32x32": ("q_proj, o_proj", 4),
        "16x32": ("k_proj, v_proj", 4),
        "48x32": ("gate_proj, up_proj", 4),
        "32x48": ("down_proj", 2),
    }
    assert len(report.rows) == 8 and "float32" in report.title
    assert all(row["advice"] == advice(row["speedup"]) for row in report.rows)
    assert report.summary["verdict"].startswith(("stay dense", "sparse pays"))
    assert "linear layers at M=2" in report.summary
    for gain in report.numbers["linear_layers"]:
        mine = [row for row in report.rows if row["M"] == gain["M"]]
        assert gain["dense_ms"] == pytest.approx(sum(row["dense ms"] * row["count"] for row in mine))
        assert gain["speedup"] == pytest.approx(gain["dense_ms"] / gain["sparse_ms"])
        assert f"{gain['speedup']:.2f}x" in report.summary[f"linear layers at M={gain['M']}"]
    assert [gain["M"] for gain in report.numbers["linear_layers"]] == [1, 2]


def test_module_with_targets():
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 24)).to(torch.bfloat16)
    report = doctor(model, targets=("re:1",), **QUICK)
    assert {row["shape"] for row in report.rows} == {"24x8"} and "bfloat16" in report.title


def test_fp16_checkpoints_are_measured_as_prune_loads_them(tmp_path):
    half = config()
    half.dtype = torch.float16
    half.save_pretrained(tmp_path)
    for model in (half, tmp_path):
        report = doctor(model, **QUICK)
        assert "bfloat16" in report.title and any("float16" in note and "--dtype" in note for note in report.notes)
    assert "semi24 weights in float16" in doctor(half, dtype="float16", **QUICK).title
    in_memory = doctor(nn.Sequential(nn.Linear(16, 8)).half(), **QUICK)
    assert "semi24 weights in float16" in in_memory.title


def test_default_dtype():
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert default_dtype(torch.float16, cpu)[0] is torch.bfloat16 and default_dtype(torch.float16, cpu)[1]
    for own, device in ((torch.float16, gpu), (torch.float32, cpu), (torch.bfloat16, cpu), (None, cpu)):
        assert default_dtype(own, device) == (own, [])


@pytest.mark.parametrize("bias", [True, False])
def test_packed_model_in_memory(bias):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 16, bias=bias), nn.Linear(16, 24, bias=bias)).to(torch.bfloat16)
    sk.sparsify(model, method="magnitude", progress=False)
    assert len(sparse_layers(model)) == 2
    options = {key: value for key, value in QUICK.items() if key != "device"}
    report = doctor(model, **options)
    assert {row["shape"] for row in report.rows} == {"16x32", "24x16"}
    assert "bfloat16 on cpu" in report.title
    assert {row["shape"] for row in doctor(model, targets=("1",), **options).rows} == {"24x16"}


@pytest.mark.parametrize("form", ["semi24_int8", "semi24_int4", "block"])
@pytest.mark.parametrize("where", ["folder", "config", "memory"])
def test_packed_checkpoints_are_measured_in_their_own_format(form, where, tmp_path):
    torch.manual_seed(0)
    model = LlamaForCausalLM(config())
    pattern, asked = ("16x16", "auto") if form == "block" else ("2:4", form)
    sk.sparsify(model, pattern, method="magnitude", sparsity=0.5, format=asked, backend="reference", progress=False)
    sk.save(model, tmp_path)
    source = {"folder": tmp_path, "config": model.config, "memory": model}[where]
    report = doctor(source, **QUICK)
    packed = [layer.spec for layer in sparse_layers(model).values()]
    assert {row["format"] for row in report.rows} == {form} and f": {form} weights" in report.title
    assert sum(row["count"] for row in report.rows if row["M"] == 1) == len(packed) == 14
    asked_for = doctor(source, format="semi24", **QUICK)
    assert {row["format"] for row in asked_for.rows} == {"semi24"}


def test_layers_with_a_branch_are_measured_with_it(tmp_path, monkeypatch):
    from tests.test_checkpoint import tiny, with_branches

    model = sk.pack_(with_branches(tiny()), "semi24_int4", "reference")
    sk.save(model, tmp_path)
    for source in (model, tmp_path):
        seen = []
        monkeypatch.setattr(doctor_module, "measure_shapes", lambda shapes, *_, **__: seen.extend(shapes) or [])  # noqa: B023
        doctor(source, **QUICK)
        assert sum(shape.count for shape in seen) == 14
        assert {shape.side for shape in seen} == {layer.side for layer in sparse_layers(model).values()}
        assert {shape.in_features for shape in seen} == {32, 64}


def test_blocks_are_timed_at_the_density_they_have(monkeypatch):
    seen = []
    monkeypatch.setattr(doctor_module, "measure_shapes", lambda shapes, *_, **__: seen.extend(shapes) or [])
    mixed = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)))
    for layer, kept in zip(mixed, (2, 4, 16), strict=True):
        keep = torch.zeros(16, dtype=torch.bool)
        keep[torch.randperm(16)[:kept]] = True
        layer.weight.data *= keep.view(4, 4).repeat_interleave(16, 0).repeat_interleave(16, 1)
    sk.pack_(mixed, "auto", "reference")
    specs = [layer.spec for layer in sparse_layers(mixed).values()]
    doctor(mixed, **QUICK)
    by_block = {shape.block: shape for shape in seen}
    assert len(specs) == 2 and sum(shape.count for shape in seen) == 3
    for block in {spec.block for spec in specs}:
        numbers = [spec.num_blocks for spec in specs if spec.block == block]
        assert by_block[block].num_blocks == round(sum(numbers) / len(numbers))
    assert by_block[None].format == "semi24"  # the dense layer: blocks tell nothing of it


def test_a_format_that_is_asked_for():
    report = doctor([(32, 128)], format="semi24_int4", **QUICK)
    assert {row["format"] for row in report.rows} == {"semi24_int4"} and "semi24_int4 weights" in report.title


def test_heads_by_name():
    model = LlamaForCausalLM(config())
    named = doctor(model, targets=("lm_head",), ignore=(), **QUICK)
    assert {row["shape"] for row in named.rows} == {"64x32"}
    assert "64x32" not in {row["shape"] for row in doctor(model, ignore=(), **QUICK).rows}


def test_lists_of_shapes():
    report = doctor([(16, 8), LayerShape("mine", 8, 16, 3)], dtype="fp32", **QUICK)
    assert [(row["shape"], row["count"]) for row in report.rows[::2]] == [("16x8", 1), ("8x16", 3)]


def test_local_folder(tmp_path):
    config().save_pretrained(tmp_path)
    assert len(doctor(tmp_path, **QUICK).rows) == 8


def test_time_is_bounded():
    report = doctor([(16, 8), (8, 16)], **{**QUICK, "max_seconds": 0.0})
    assert any("not measured within 0 s: " in note for note in report.notes)


def test_advice_stays_honest():
    assert [advice(x) for x in (2.0, 1.02, 0.9)] == ["sparse", "no gain", "stay dense"]


def test_package_exports_the_function():
    assert doctor_function is doctor


@pytest.mark.parametrize(
    "model, options, message",
    [
        (None, {"num_tokens": (0,)}, "at least 1"),
        (None, {"dtype": "int8"}, "unknown dtype 'int8'"),
        ([(16,)], {}, "no layer shape"),
        (3.5, {}, "not a float"),
        (nn.Sequential(nn.Linear(4, 4)), {"targets": ("Conv",)}, "no layer to prune"),
        ([(16, 8)], {"backend": "gpu"}, "unknown backend 'gpu'"),
        ([(16, 8)], {"format": "semi24_int5"}, "unknown format 'semi24_int5': known are 'auto', "),
        ([(16, 8)], {"format": "block"}, "how many blocks are stored"),
    ],
)
def test_refuses(model, options, message):
    with pytest.raises(ValueError, match=message):
        doctor(model, progress=False, **{"device": "cpu", **options})


def test_missing_model(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(FileNotFoundError, match="no config.json"):
        doctor(tmp_path, progress=False)
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c"):
        with pytest.raises(FileNotFoundError, match="there is no such folder"):
            doctor(name, progress=False)
    with pytest.raises(FileNotFoundError, match="llama-3-8b"):
        doctor("nobody/nowhere", progress=False)


def test_dtype_names():
    assert parse_dtype("bf16") is torch.bfloat16 and parse_dtype(None) is None
