"""Tables of parts, and tables for people."""

import json
import os

import pytest

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


def test_report_prints_all_it_holds(tmp_path):
    report = Report("title", [{"a": 1, "b": "x [y]"}, {"a": 2.5, "c": None}], {"speed": 1.75}, ["mind [this]"])
    text = str(report)
    for part in ("title", "speed: 1.75", "x [y]", "2.5", "mind [this]"):
        assert part in text
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
