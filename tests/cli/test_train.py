"""`sparsekit train ast`: from a dense checkpoint to a packed one, with all that people watch; and its mistakes."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsekit as sk
from sparsekit.cli import app
from sparsekit.cli.train import TrainOptions, parse_fields, parse_tokens
from sparsekit.cli.training_view import plot_training
from sparsekit.nn import sparse_layers

SMALL = ["--batch-size", 2, "--max-seq-length", 16, "--set", "num_calibration_samples=4", "--quiet"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def test_a_run_ends_packed_saved_timed_and_drawn(tiny_model, text, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    words = [tiny_model, out, "--dataset", text, "--eval-dataset", text, "--steps", 4, "--slorb-group", 16, *SMALL]
    result = run("train", "ast", *words, "--learning-rate", 1e-3, "--json", report)
    assert result.exit_code == 0, result.stdout + result.stderr
    document = json.loads(report.read_text())
    assert document["ok"] and set(document) >= {"training", "quality", "check", "saved", "benchmark"}
    assert [row["model"] for row in document["quality"]["rows"]] == ["dense", "sparse"]
    losses = [entry for entry in document["training"] if "loss" in entry]
    assert {"kd_loss", "ce_loss", "masked_decay"} <= set(losses[-1])
    assert any("eval_perplexity" in entry for entry in document["training"])
    assert "step 4/4" in result.stdout and "perplexity" in result.stdout
    assert (out / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert [json.loads(line) for line in (out / "training.jsonl").read_text().splitlines()] == document["training"]
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(sparse_layers(model)) == 14
    plan = sk.Plan.load(out / "plan.safetensors")
    assert len(plan.masks) == len(plan.side) == 14
    # what was saved is what was trained: the plan's zeros, and the perplexity that the report gives
    sk.unpack_(model)
    weight = model.get_submodule(next(iter(plan.masks))).weight
    assert bool((weight[~plan.masks[next(iter(plan.masks))].keep] == 0).all())
    found = sk.perplexity(
        AutoModelForCausalLM.from_pretrained(out), text, _tokenizer(tiny_model), max_seq_length=16, progress=False
    )
    assert found.value == pytest.approx(document["quality"]["rows"][1]["perplexity"], rel=2e-2)


def _tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_run_is_resumed(tiny_model, text, tmp_path):
    words = [tiny_model, tmp_path / "out", "--dataset", text, *SMALL, "--no-bench", "--no-plot", "--save-steps", 2]
    whole = run("train", "ast", *words, "--steps", 4, "--checkpoints", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    first = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "half" / "checkpoint-2")
    resumed = run("train", "ast", *words, "--steps", 4, "--checkpoints", tmp_path / "half", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    other = run("train", "ast", *words, "--steps", 5, "--checkpoints", tmp_path / "half", "--resume")
    assert other.exit_code == 1 and "max_steps was 4, is 5" in other.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        ([], "--tokens"),
        (["--steps", 2, "--tokens", "1M"], "one of the two"),
        (["--tokens", "many"], "250000, 1.5M or 7B"),
        (["--steps", 2, "--set", "hysteresis"], "FIELD=VALUE"),
        (["--steps", 2, "--set", "histeresis=0.1"], "hysteresis"),
        (["--steps", 2, "--pattern", "unstructured"], "N:M"),
        (["--steps", 2, "--start", "nonsense"], "sparsegpt"),
        (["--steps", 2, "--learning-rate", "2", "--set", "masked_decay=30"], "masked_decay=30"),
        (["--steps", 2, "--batch-size", "1000"], "one step takes 1000"),
    ],
)
def test_mistakes_are_named(tiny_model, text, tmp_path, words, message):
    given = [*SMALL, *words]
    result = run("train", "ast", tiny_model, tmp_path / "out", "--dataset", text, *given)
    assert result.exit_code == 2, result.stderr
    assert message in result.stderr
    assert not (tmp_path / "out").exists()


def test_prune_points_at_train(tiny_model, text, tmp_path):
    result = run("prune", tiny_model, tmp_path / "out", "--method", "ast", "--dataset", text)
    assert result.exit_code == 2 and "sparsekit train ast" in result.stderr


@pytest.mark.parametrize(
    "text, number", [("250000", 250_000), ("1.5M", 1_500_000), ("7B", 7_000_000_000), ("2k", 2000)]
)
def test_numbers_of_tokens(text, number):
    assert parse_tokens(text) == number


def test_fields_are_json_or_text():
    assert parse_fields(["a=0.5", "b=true", "c=reverse_kl", "d=[1]"]) == {
        "a": 0.5,
        "b": True,
        "c": "reverse_kl",
        "d": [1],
    }


def test_tokens_become_steps(tiny_model, text, tmp_path):
    from sparsekit.cli.train import _trainer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    options = TrainOptions(
        model=str(tiny_model), out=str(tmp_path / "out"), dataset=str(text), eval_dataset=None, tokens="1k",
        checkpoints=None, resume=False, backend="auto", packed=True, dtype="auto", bench=False, plot=False,
        fields={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_seq_length": 16},
    )  # fmt: skip
    assert _trainer(options, model, _tokenizer(tiny_model)).args.max_steps == math.ceil(1000 / (2 * 3 * 16))


def test_a_plot_of_an_empty_history_is_drawn(tmp_path):
    plot_training([], 3, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0
