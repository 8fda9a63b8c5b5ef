"""The bench of NutePrune: what its rows hold, and what its table says of them."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).resolve().parent.parent / "bench"


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    yield importlib.import_module("nuteprune_quality")
    sys.modules.pop("nuteprune_quality", None)


def row(method, sparsity, seed, perplexity, accuracy, **more):
    shared = {"case": "wikilm", "method": method, "sparsity": sparsity, "seed": seed, "steps": 0 if more else 150}
    left = {"block_params_left": 0.8, "params_left": 0.85}
    return shared | left | {"perplexity_valid": perplexity, "perplexity_test": perplexity, "accuracy_valid": accuracy}


def test_the_table_holds_means_beside_the_dense_model_and_says_how_goals_fared(bench):
    rows = [row("dense", None, 0, 20.0, 0.4, dense=True)]
    rows += [row("ours", 0.2, seed, perplexity, 0.39) for seed, perplexity in ((0, 21.0), (1, 21.2))]
    rows += [row("ours", 0.25, 0, 23.0, 0.39), row("paper", 0.2, 0, 20.5, 0.39)]
    report = bench.table(rows)
    first, second, third = report.rows
    assert [line["method"] for line in report.rows] == ["paper", "ours", "ours"]
    assert second["perplexity"] == pytest.approx(21.1) and second["spread"] == pytest.approx(0.02**0.5)
    assert second["of dense"] == pytest.approx(1.055) and second["accuracy"] == pytest.approx(0.975)
    assert first["spread"] is None and third["seeds"] == 1
    met, missed = report.notes
    assert met.startswith("wikilm at 20%: 1.055 of the dense perplexity") and met.endswith("3.9% of its tokens: met")
    assert "1.150 of the dense perplexity (at most 1.1)" in missed and missed.endswith(": missed")


def test_rows_that_are_there_are_not_measured_again(bench, monkeypatch, tmp_path):
    done = []

    class Stub:
        case = bench.DECODERS["wikilm"]

        def run(self, *asked):
            done.append(asked)
            return {"perplexity_valid": 1.0}

    file = tmp_path / "rows.jsonl"
    words = ["--data", ".", "--json", str(file), "--methods", "ours|one-shot", "--sparsities", "0.2", "--seeds", "0,1"]
    bench.measure(Stub(), bench.parsed(words))
    assert [asked[:3] for asked in done] == [
        ("dense", None, 0),
        *[(method, 0.2, seed) for seed in (0, 1) for method in ("ours", "one-shot")],
    ]
    assert [asked[3] for asked in done] == [0, 150, 0, 150, 0]
    assert {json.loads(line)["tokens"] for line in file.read_text().splitlines()} == {0, 150 * 4096}
    bench.measure(Stub(), bench.parsed(words))
    assert len(done) == 5


def test_accuracy_counts_next_tokens(bench):
    class Said:
        device = torch.device("cpu")

        def __call__(self, input_ids, use_cache):
            logits = torch.zeros(*input_ids.shape, 9)
            logits.scatter_(-1, (input_ids[..., None] + 1) % 9, 1.0)  # the next in line
            return type("Out", (), {"logits": logits})

    assert bench.accuracy(Said(), torch.tensor([0, 1, 2, 4, 5, 6, 8, 0, 3]), 4) == pytest.approx(4 / 6)


def test_unknown_rows_are_refused(bench):
    with pytest.raises(SystemExit):
        bench.parsed(["--data", ".", "--json", "x", "--methods", "ours|theirs"])
