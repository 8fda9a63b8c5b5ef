"""Tables of parts, and tables for people."""

import json
import os

import pytest
from torch import nn

import sparsekit as sk
from sparsekit.registry import Registry
from sparsekit.report import Report, show


def test_registry_lists_the_known_and_names_the_nearest():
    registry: Registry[int] = Registry("method")
    registry.register("sparsegpt", 1)
    registry.register("wanda", 2)
    assert registry.get("wanda") == 2 and list(registry) == ["sparsegpt", "wanda"] and "ria" not in registry
    with pytest.raises(
        ValueError, match="unknown method 'sparsegtp': known are 'sparsegpt', 'wanda'. Did you mean 'sparsegpt'?"
    ):
        registry.get("sparsegtp")
    with pytest.raises(ValueError, match="'wanda' is registered already"):
        registry.register("wanda", 3)


def test_registry_knows_what_is_meant_and_where_auto_is_legal():
    registry: Registry[int] = Registry("backend", meant={"cuda": "triton"})
    registry.register("triton", 1)
    registry.register("cpu", 2)
    registry.check("auto")
    registry.check("cpu")
    with pytest.raises(ValueError, match="'cuda': known are 'auto', 'cpu', 'triton'. Did you mean 'triton'?"):
        registry.check("CUDA".lower())
    with pytest.raises(ValueError, match="unknown backend 'auto': known are 'cpu', 'triton'."):
        registry.get("auto")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"backend": "gpu"}, "known are 'auto', 'cpu', .* Did you mean 'triton'"),
        ({"backend": "cuda"}, "Did you mean 'triton'"),
        ({"format": "int4"}, "known are 'auto', 'block', .* Did you mean 'semi24_int4'"),
        ({"format": "INT8"}, "Did you mean 'semi24_int8'"),
        ({"format": "fp8"}, "Did you mean 'semi24_fp8'"),
    ],
)
def test_names_that_people_try(options, message):
    model = nn.Sequential(nn.Linear(8, 8))
    for call in (sk.pack_, sk.sparsify):
        with pytest.raises(ValueError, match=message):
            call(model, **options)


def test_report_prints_all_it_holds(tmp_path):
    report = Report(
        "title",
        [{"a": 1, "b": "x [y]"}, {"a": 2.5, "c": None}],
        {"speed": 1.75},
        ["mind [this]"],
        numbers={"hidden": 7},
    )
    text = str(report)
    for part in ("title", "speed: 1.75", "x [y]", "2.5", "mind [this]"):
        assert part in text
    assert "hidden" not in text and report.to_dict()["numbers"] == {"hidden": 7}
    assert report.columns == ["a", "b", "c"]
    assert (
        json.loads(report.to_json(tmp_path / "r.json"))
        == json.loads((tmp_path / "r.json").read_text())
        == report.to_dict()
    )


def test_json_holds_no_bare_nan(tmp_path):
    report = Report("title", [{"x": float("nan")}], {"y": float("inf"), "z": [1.5, (float("-inf"),)]})

    def refuse(constant):
        raise AssertionError(f"{constant} is not JSON")

    text = report.to_json(tmp_path / "r.json")
    assert (tmp_path / "r.json").read_text() == text + "\n"
    found = json.loads(text, parse_constant=refuse)
    assert found["rows"] == [{"x": "nan"}] and found["summary"] == {"y": "inf", "z": [1.5, ["-inf"]]}


def test_json_to_a_pipe_or_a_link_leaves_it_there(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "file.json")
    text = Report("title").to_json(tmp_path / "link.json")
    assert (tmp_path / "link.json").is_symlink() and (tmp_path / "file.json").read_text() == text + "\n"
    os.mkfifo(tmp_path / "pipe")
    reader = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK)
    Report("title").to_json(tmp_path / "pipe")
    assert os.read(reader, 1 << 16).decode() == text + "\n" and (tmp_path / "pipe").is_fifo()
    os.close(reader)


@pytest.mark.parametrize(
    "value,shown",
    [
        (None, ""),
        (True, "yes"),
        (1234567, "1,234,567"),
        (0.123456, "0.1235"),
        (123456.7, "123,457"),
        (float("nan"), "nan"),
        ("x", "x"),
    ],
)
def test_cells(value, shown):
    assert show(value) == shown
