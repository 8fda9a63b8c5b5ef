"""`sparsekit train nuteprune`: one model or a family of them, each cut, saved, judged and timed; and its mistakes."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import sparsekit as sk
from sparsekit.cli import app, train_nuteprune
from sparsekit.cli.family_plot import draw_family
from sparsekit.cli.train_nuteprune import budget_fields
from sparsekit.nn import side_layers

SMALL = ["--batch-size", 4, "--max-seq-length", 16, "--lora-rank", 2, "--set", "gate_learning_rate=2.0"]
SHORT = [*SMALL, "--no-bench", "--no-plot"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture(scope="module")
def few(text):
    """A short text to judge by."""
    path = text.with_name("few.txt")
    path.write_text("".join(text.read_text(encoding="utf-8").splitlines(keepends=True)[:8]), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def family(tiny_model, text, few, tmp_path_factory):
    """One run with all its options: the folder, the report, and what was printed."""
    from sparsekit.benchmarking import models

    folder = tmp_path_factory.mktemp("family")
    words = [tiny_model, folder / "out", "--dataset", text, "--eval-dataset", few, "--steps", 4, *SMALL]
    words += ["--json", folder / "report.json", "--keep", "20%", "40%", "--dtype", "fp32"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "SHORT_SECONDS", 0.0)
        result = run("train", "nuteprune", *words)
    assert result.exit_code == 0, result.stdout + result.stderr
    return folder / "out", json.loads((folder / "report.json").read_text()), result.stdout


def test_a_family_is_judged_timed_and_drawn(family):
    out, document, printed = family
    assert document["ok"] and {"training", "family", "check sparsity-20", "check sparsity-40"} <= document.keys()
    rows = document["family"]["rows"]
    assert [row["model"] for row in rows] == ["dense", "sparsity-20", "sparsity-40"]
    assert [row["sparsity"] for row in rows] == pytest.approx([0, 0.2, 0.4], abs=0.02)
    assert all(row["perplexity"] > 0 and row["prefill ms"] > 0 and row["decode ms"] > 0 for row in rows)
    assert json.loads((out / "family.json").read_text()) == rows
    for row in rows[1:]:  # the dense model is timed in turns with each
        assert row["decode speedup"] == pytest.approx(row["decode dense ms"] / row["decode ms"], rel=0.5)
    said = " ".join(printed.split())
    assert "40% of the blocks to go; 20% kept on the way; contribution chooses what goes at steps 0, 2" in said
    assert "step 4/4" in printed
    for name in ("training.png", "family.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"


def test_a_family_is_saved(family, tiny_model, few):
    out, document, _ = family
    rows, tokenizer, sizes = document["family"]["rows"], AutoTokenizer.from_pretrained(tiny_model), []
    for row in rows[1:]:
        folder = out / row["model"]
        model = AutoModelForCausalLM.from_pretrained(folder)
        assert sk.check(model, sk.Plan.load(folder / "plan.safetensors")).ok
        assert AutoTokenizer.from_pretrained(folder)("a")["input_ids"] == tokenizer("a")["input_ids"]
        found = sk.perplexity(model, few, tokenizer, max_seq_length=16, progress=False)
        assert found.value == pytest.approx(row["perplexity"], rel=1e-3)
        sizes.append(sum(parameter.numel() for parameter in model.parameters()))
    assert sizes[0] > sizes[1] and sizes == [row["parameters"] for row in rows[1:]]


def test_lora_beside_the_weights_is_saved_too(tiny_model, text, tmp_path, monkeypatch):
    said, save = {}, train_nuteprune._save_with_branches

    def look(model, folder, tokenizer):
        said[folder] = logits_of(model)
        save(model, folder, tokenizer)

    monkeypatch.setattr(train_nuteprune, "_save_with_branches", look)
    words = [tiny_model, tmp_path / "out", "--dataset", text, "--steps", 3, *SHORT, "--no-merge-lora"]
    result = run("train", "nuteprune", *words, "--keep", "20%", "--keep", "40%", "--dtype", "fp32")
    assert result.exit_code == 0, result.stdout + result.stderr
    assert [folder.name for folder in said] == ["sparsity-20", "sparsity-40"]
    assert "layers have a side branch" in " ".join(result.stdout.split())
    for folder, expected in said.items():
        for model in (AutoModelForCausalLM.from_pretrained(folder), sk.load(folder)):
            assert side_layers(model) and torch.equal(logits_of(model), expected)
        assert sk.check(model, sk.Plan.load(folder / "plan.safetensors")).ok
        assert "branch" in (folder / "README.md").read_text()
        assert len(AutoTokenizer.from_pretrained(folder)) > 0


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.arange(48).view(3, 16)).logits


def test_one_model_and_a_resume(tiny_model, text, tmp_path):
    words = ["train", "nuteprune", tiny_model, tmp_path / "out", "--dataset", text, "--steps", 4, *SHORT]
    words += ["--sparsity", "30%", "--save-steps", 2, "--uniform"]
    whole = run(*words)
    assert whole.exit_code == 0, whole.stdout + whole.stderr
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.intermediate_size < 64
    again = run(*words, "--resume")
    assert again.exit_code == 0, again.stderr
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for (name, one), two in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two), name


def test_options_on_the_budget():
    assert budget_fields(None, [], None, None) == {"sparsity": 0.5, "keep": []}
    assert budget_fields(None, ["50%", "0.1", "25%"], None, None) == {"sparsity": 0.5, "keep": [0.1, 0.25]}
    assert budget_fields("60%", ["50%", "60%"], None, None) == {"sparsity": 0.6, "keep": [0.5]}
    assert budget_fields(None, [], 1.5, None) == {"constraints": {"speedup": 1.5}}
    assert budget_fields(None, [], None, 3.0) == {"constraints": {"latency_ms": 3.0}}
    for given in (("20%", [], 1.5, None), (None, [], 1.5, 3.0), (None, ["10%"], 1.5, None), ("x", [], None, None)):
        with pytest.raises(ValueError):
            budget_fields(*given)


@pytest.mark.parametrize(
    "words,said",
    [
        ([], "--tokens"),
        (["--steps", 4, "--sparsity", "20%", "--speedup", 1.5], "--sparsity and --speedup: two budgets"),
        (["--steps", 4, "--sparsity", "20%", "--keep", "30%"], "these are on the way to sparsity=0.2"),
        (["--steps", 4, "--keep", "much"], "--keep much: give the share of the blocks that is to go"),
        (["--steps", 4, "--teachers", "papr"], "Did you mean 'paper'"),
        (["--steps", 4, "--start", "opne"], "Did you mean 'open'"),
        (["--steps", 4, "--start", "open", "--stages", "20%"], "is for a one-shot start"),
        (["--steps", 2, "--stages", "10%", "--stages", "20%"], "make 3 stages, and there are 2 steps"),
        (["--steps", 4, "--hidden"], "lm_head shares its weight"),
        (["--steps", 4, "--paper"], "lm_head shares its weight"),
        (["--steps", 4, "--hidden", "--no-merge-lora"], "hidden=True and merge_lora=False"),
        (["--steps", 4, "--lora-rank", 3, "--set", "lora_rank=4"], "--lora-rank 3 and --set lora_rank=4"),
        (["--steps", 4, "--set", "gatelearning_rate=1"], "did you mean 'gate_learning_rate'?"),
    ],
    ids=lambda value: "" if isinstance(value, str) else " ".join(map(str, value)),
)
def test_mistakes(tiny_model, text, tmp_path, monkeypatch, words, said):
    from sparsekit.train import NutePruneTrainer

    monkeypatch.setattr(NutePruneTrainer, "train", lambda *_, **__: pytest.fail("training was begun"))
    result = run("train", "nuteprune", tiny_model, tmp_path / "out", "--dataset", text, "--no-plot", *words)
    assert result.exit_code in (1, 2) and said in " ".join(result.stderr.split()), result.stderr
    assert not (tmp_path / "out").exists() and not (tmp_path / "out-checkpoints").exists()


def test_the_plot_draws_what_was_measured():
    rows = [{"sparsity": share, "perplexity": 10 + 30 * share} for share in (0.0, 0.1, 0.5)]
    assert draw_family(rows, "a model")[:4] == b"\x89PNG"
    timed = [row | {"prefill ms": 9 - 8 * row["sparsity"]} for row in rows]
    assert len(draw_family(timed, "a model")) > len(draw_family(rows, "a model"))
