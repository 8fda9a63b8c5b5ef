"""Tables of parts, and tables for people."""

import json

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
