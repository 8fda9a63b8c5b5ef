"""`sparsekit train ast`: from a dense checkpoint to a packed one, with all that people watch; and its mistakes."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsekit as sk
from sparsekit.backends import BACKENDS
from sparsekit.cli import app
from sparsekit.cli.settings import parse_settings, parse_tokens
from sparsekit.cli.train import TrainOptions, make_config
from sparsekit.cli.training_view import PANELS, plot_training
from sparsekit.nn import sparse_layers

SMALL = ["--batch-size", 2, "--max-seq-length", 16, "--set", "num_calibration_samples=4"]
SHORT = [*SMALL, "--steps", 2, "--start", "magnitude", "--no-bench", "--no-plot"]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


@pytest.fixture
def no_training(monkeypatch):
    """The mistake is to be seen before the first step."""
    from sparsekit.train import ASTTrainer

    monkeypatch.setattr(ASTTrainer, "train", lambda *_, **__: pytest.fail("training was begun"))


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
    evaluated = [entry["step"] for entry in document["training"] if "eval_perplexity" in entry]
    assert evaluated == [0, 1, 2, 3, 4], "the first mask alone, then every step"
    assert "1 process × 2 samples × 1 accumulated × 16 tokens = 32 tokens a step; 4 steps; 128 tokens" in result.stdout
    assert "an evaluation every step;" in result.stdout and "a checkpoint every 500 steps" in result.stdout
    assert "step 4/4" in result.stdout and "perplexity" in result.stdout
    assert losses[0]["learning_rate"] > 0
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


def test_a_run_is_resumed(tiny_model, text, tmp_path, monkeypatch):
    logged = []
    monkeypatch.setattr("transformers.trainer.logger.warning", logged.append)
    words = [tiny_model, tmp_path / "out", "--dataset", text, *SMALL, "--no-bench", "--no-plot", "--save-steps", 2]
    none = run("train", "ast", *words, "--steps", 4, "--checkpoints", tmp_path / "whole", "--resume")
    assert none.exit_code == 2 and "holds no complete checkpoint; leave it out" in none.stderr
    whole = run("train", "ast", *words, "--steps", 4, "--checkpoints", tmp_path / "whole")
    assert whole.exit_code == 0, whole.stderr
    assert f"{tmp_path / 'whole'} holds the run's checkpoints" in whole.stderr + whole.stdout
    anew = run("train", "ast", *words, "--steps", 4, "--checkpoints", tmp_path / "whole")
    assert anew.exit_code == 2 and "an earlier run, the newest checkpoint-4: --resume goes on" in anew.stderr
    first = load_file(tmp_path / "out" / "model.safetensors")
    (tmp_path / "half").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "half" / "checkpoint-2")
    resumed = run("train", "ast", *words, "--steps", 4, "--checkpoints", tmp_path / "half", "--resume")
    assert resumed.exit_code == 0, resumed.stderr
    assert not logged and "already at step" not in resumed.stderr
    again = load_file(tmp_path / "out" / "model.safetensors")
    assert first.keys() == again.keys() and all(torch.equal(first[name], again[name]) for name in first)
    finished = run("train", "ast", *words, "--steps", 4, "--checkpoints", tmp_path / "whole", "--resume")
    assert finished.exit_code == 0 and "checkpoint-4 is already at step 4 of 4" in finished.stderr
    other = run("train", "ast", *words, "--steps", 5, "--checkpoints", tmp_path / "half", "--resume")
    assert other.exit_code == 1 and "max_steps was 4, is 5" in other.stderr and "docs/training.md" in other.stderr


def test_an_interrupted_run_says_how_to_go_on(tiny_model, text, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    folder = tmp_path / "out-checkpoints"
    words = ["train", "ast", tiny_model, tmp_path / "out", "--dataset", text, *SHORT]
    assert run(*words).exit_code == 0
    monkeypatch.setattr("sparsekit.train.ast_trainer.ASTTrainer.train", interrupted)
    result = run(*words, "--resume")
    assert result.exit_code == 130 and f"--resume goes on from {folder / 'checkpoint-2'}" in result.stderr


MISTAKES = [
    ([], "--tokens"),
    (["--steps", 2, "--tokens", "1M"], "one of the two"),
    (["--tokens", "many"], "250000, 1.5M or 7B"),
    (["--steps", "-3"], "--steps -3: at least 1"),
    (["--steps", 2, "--set", "hysteresis"], "FIELD=VALUE"),
    (["--steps", 2, "--set", "histeresis=0.1"], "'histeresis': did you mean 'hysteresis'?"),
    (["--steps", 2, "--set", "lr_scheduler_typ=linear"], "'lr_scheduler_typ': did you mean 'lr_scheduler_type'?"),
    (["--steps", 2, "--set", "slorb_train_x=yes"], "slorb_train_x='yes' must be True or False"),
    (["--steps", 2, "--set", "hysteresis=0.1", "--set", "hysteresis=0.2"], "hysteresis stands there twice"),
    (["--steps", 10, "--set", "max_steps=20"], "--steps 10 and --set max_steps=20: both set max_steps"),
    (["--tokens", "1k", "--set", "max_steps=20"], "--tokens 1k and --set max_steps=20"),
    (
        ["--steps", 2, "--set", "per_device_train_batch_size=4"],
        "--batch-size 2 and --set per_device_train_batch_size=4",
    ),
    (["--steps", 2, "--start", "wanda", "--set", "start=ria"], "--start wanda and --set start=ria"),
    (["--steps", 2, "--set", "output_dir=x"], "use --checkpoints DIR"),
    (["--steps", 2, "--set", "resume_from_checkpoint=true"], "use --resume"),
    (["--steps", 2, "--pattern", "unstructured"], "N:M"),
    (["--steps", 2, "--start", "nonsense"], "sparsegpt"),
    (["--steps", 2, "--slorb-group", "1"], "slorb_group=1 must be a whole number of at least 2"),
    (["--steps", 2, "--batch-size", "1000"], "one step takes 1000"),
    (["--steps", 2, "--dataset", "{folder}"], "is a folder: name one file"),
    (["--steps", 2, "--eval-dataset", "{empty}"], "eval_dataset: the dataset is empty: it holds no text"),
    (["--steps", 2, "--eval-dataset", "{folder}"], "--eval-dataset"),
    (["--steps", 2, "--checkpoints", "/proc/new/x"], "--checkpoints /proc/new/x: cannot be written"),
    (["--steps", 2, "--teacher-cache", "{folder}"], "is no teacher cache"),
]


@pytest.mark.parametrize("words, message", MISTAKES, ids=[" ".join(map(str, words)) for words, _ in MISTAKES])
def test_mistakes_are_named(tiny_model, text, tmp_path, no_training, words, message):
    (tmp_path / "empty.txt").write_text("\n")
    places = {"folder": tmp_path, "empty": tmp_path / "empty.txt"}
    given = [*SMALL, *(str(word).format(**places) for word in words)]
    result = run("train", "ast", tiny_model, tmp_path / "out", "--dataset", text, *given)
    assert result.exit_code == (1 if "cache" in message else 2), result.stderr
    assert message in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_a_decay_that_would_diverge_is_a_mistake(tiny_model, text, tmp_path):
    words = [*SHORT, "--learning-rate", "2", "--set", "masked_decay=30"]
    result = run("train", "ast", tiny_model, tmp_path / "out", "--dataset", text, *words)
    assert result.exit_code == 2 and "masked_decay=30" in result.stderr and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "out, message",
    [("/proc/out", "OUT /proc/out: cannot be written"), ("{file}/out", "cannot be written"), ("{file}", "is a file")],
)
def test_a_place_that_cannot_be_written_is_told_before_training(tiny_model, text, no_training, out, message):
    result = run("train", "ast", tiny_model, out.format(file=text), "--dataset", text, *SHORT)
    assert result.exit_code == 2 and message in result.stderr


def test_the_working_directory_is_no_place_for_a_model(tiny_model, text, tmp_path, no_training, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = run("train", "ast", tiny_model, ".", "--dataset", text, *SHORT)
    assert result.exit_code == 2 and "OUT . is the working directory" in result.stderr


def test_a_model_that_is_not_whole(tiny_model, text, tmp_path, no_training):
    def told(model):
        result = run("train", "ast", model, tmp_path / "out", "--dataset", text, *SHORT)
        assert result.exit_code == 2
        return result.stderr

    (tmp_path / "empty").mkdir()
    missing = f"MODEL {tmp_path / 'empty'} is no whole model, there is no config.json, no weights, no a tokenizer in it"
    assert missing.replace("no a", "no") in told(tmp_path / "empty")
    (tmp_path / "empty" / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    assert "there is no weights, no tokenizer in it" in told(tmp_path / "empty")
    assert "there is no such folder" in told(tmp_path / "nowhere")
    assert "is a file: name the folder" in told(tiny_model / "config.json")


def test_a_backend_that_cannot_run_is_told_before_training(tiny_model, text, tmp_path, no_training, monkeypatch):
    asked = []

    def why_not(spec, device, prefill="dense"):
        asked.append(spec)
        return "no such processor"

    monkeypatch.setattr(BACKENDS.get("cpu"), "why_not", why_not)
    words = ["--backend", "cpu", "--format", "semi24_int8", "--slorb-group", 16]
    result = run("train", "ast", tiny_model, tmp_path / "out", "--dataset", text, *SHORT, *words)
    assert result.exit_code == 1 and "no such processor" in result.stderr
    spec = asked[0]  # of q_proj: 32 inputs, and two sums of 16 behind them
    assert (spec.format, spec.out_features, spec.in_features, spec.dtype) == ("semi24_int8", 32, 40, torch.float32)


def test_a_pattern_without_packed_format_is_told_first(tiny_model, text, tmp_path):
    words = [*SHORT, "--pattern", "4:8"]
    result = run("train", "ast", tiny_model, tmp_path / "out", "--dataset", text, *words)
    assert result.exit_code == 0, result.stderr
    told, step = result.stdout.find("no packed format holds 4:8"), result.stdout.find("step 1/2")
    assert 0 <= told < step
    plan = sk.Plan.load(tmp_path / "out" / "plan.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert not sparse_layers(model) and sk.check(model, plan).ok


class Broken(Exception):
    pass


def fail(*args, **kwargs):
    raise Broken("it broke")


@pytest.mark.parametrize("branch", [[], ["--slorb-group", 16]], ids=["plain", "branch"])
@pytest.mark.parametrize("part", ["pack_", "check", "save"])
def test_a_trained_model_is_kept_whatever_fails_before_it_is_saved(
    tiny_model, text, tmp_path, monkeypatch, part, branch
):
    out, save = tmp_path / "out", sk.save
    fails = (
        fail
        if part != "save"
        else lambda *args, packed, **named: fail() if packed else save(*args, packed=packed, **named)
    )
    with monkeypatch.context() as patched:
        patched.setattr(sk, part, fails)
        result = run("train", "ast", tiny_model, out, "--dataset", text, *SHORT, *branch)
    assert result.exit_code == 1
    assert "Broken: it broke" in result.stderr and f"the trained model is in {out}, dense, with zeros" in result.stderr
    plan = sk.Plan.load(out / "plan.safetensors")
    model = sk.apply_(AutoModelForCausalLM.from_pretrained(out), plan)
    assert bool(plan.side) == bool(branch)
    assert sk.check(model, plan).ok and len(sparse_layers(sk.pack_(model))) == 14
    # and it is the one that a run in which nothing fails ends with
    whole = run("train", "ast", tiny_model, tmp_path / "whole", "--dataset", text, *SHORT, *branch)
    assert whole.exit_code == 0, whole.stderr
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "whole")
    tokens = torch.arange(12)[None]
    assert torch.equal(model(tokens).logits, packed(tokens).logits)


@pytest.mark.parametrize("part", ["sparsekit.cli.trained.plot_training", "sparsekit.benchmark"])
def test_what_fails_after_the_model_is_saved_leaves_it(tiny_model, text, tmp_path, monkeypatch, part):
    out = tmp_path / "out"
    monkeypatch.setattr(part, fail)
    result = run("train", "ast", tiny_model, out, "--dataset", text, *SMALL, "--steps", 2, "--start", "magnitude")
    assert result.exit_code == 1 and f"it broke (--debug shows where) (the trained model is in {out})" in result.stderr
    assert len(sparse_layers(AutoModelForCausalLM.from_pretrained(out))) == 14


def test_an_interrupted_end_says_where_the_model_is(tiny_model, text, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sk, "pack_", interrupted)
    result = run("train", "ast", tiny_model, tmp_path / "out", "--dataset", text, *SHORT)
    assert result.exit_code == 130 and f"the trained model is in {tmp_path / 'out'}, dense" in result.stderr


def test_quiet_shows_nothing_but_errors(tiny_model, text, tmp_path):
    words = [tiny_model, tmp_path / "out", "--dataset", text, "--eval-dataset", text, *SMALL, "--steps", 2, "-q"]
    result = run("train", "ast", *words, "--start", "magnitude", "--json", tmp_path / "report.json")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "", "")
    assert json.loads((tmp_path / "report.json").read_text())["benchmark"]["rows"]
    result = run("train", "ast", *words, "--start", "nonsense")
    assert result.exit_code == 2 and not result.stdout and len(result.stderr.splitlines()) == 1


def test_a_cache_takes_the_teachers_place(tiny_model, text, tmp_path):
    cache, report = tmp_path / "cache", tmp_path / "report.json"
    words = ["--dataset", text, "--max-seq-length", 16, "--temperature", 1.5]
    result = run("train", "cache", tiny_model, cache, *words, "--top-k", 4096, "--json", report)
    assert result.exit_code == 0, result.stderr
    summary = json.loads(report.read_text())["cache"]["summary"]
    assert summary["on disk, bytes"] == sum(file.stat().st_size for file in cache.iterdir())
    assert summary["tokens"] == 16 * summary["samples"]
    assert summary["probability that they hold, mean"] == pytest.approx(1, abs=1e-2)
    losses = {}
    for name, teacher in {"cache": ["--teacher-cache", cache], "model": []}.items():
        trained = run("train", "ast", tiny_model, tmp_path / name, *words, *SHORT, *teacher, "--fp32", "--json", report)
        assert trained.exit_code == 0, trained.stderr
        log = json.loads(report.read_text())["training"]
        losses[name] = [(entry["loss"], entry["kd_loss"]) for entry in log if "kd_loss" in entry]
    # the whole vocabulary is kept, so that both say the same, but for 16 bits on disk
    for cached, taught in zip(losses["cache"], losses["model"], strict=True):
        assert cached == pytest.approx(taught, rel=2e-3, abs=2e-3)
    other = run("train", "ast", tiny_model, tmp_path / "out", "--dataset", text, *SHORT, "--teacher-cache", cache)
    assert other.exit_code == 2 and "temperature 1.5" in other.stderr


@pytest.mark.parametrize(
    "words, message",
    [
        (["--top-k", 0], "top_k=0"),
        (["--top-k", 5000], "top_k=5000 of a vocabulary of 4096"),
        (["--temperature", 0], "temperature=0"),
        (["--dataset", "{folder}"], "is a folder"),
    ],
)
def test_mistakes_about_a_cache(tiny_model, text, tmp_path, words, message):
    given = ["--dataset", text, "--max-seq-length", 16, *(str(word).format(folder=tmp_path) for word in words)]
    result = run("train", "cache", tiny_model, tmp_path / "cache", *given)
    assert result.exit_code == 2 and message in result.stderr and not (tmp_path / "cache").exists()


def test_prune_points_at_train(tiny_model, text, tmp_path):
    result = run("prune", tiny_model, tmp_path / "out", "--method", "ast", "--dataset", text)
    assert result.exit_code == 2 and "sparsekit train ast" in result.stderr


@pytest.mark.parametrize(
    "text, number", [("250000", 250_000), ("1.5M", 1_500_000), ("7B", 7_000_000_000), ("2k", 2000)]
)
def test_numbers_of_tokens(text, number):
    assert parse_tokens(text) == number


def test_fields_are_json_or_text():
    assert parse_settings(["a=0.5", "b=true", "c=reverse_kl", "d=[1]"]) == {
        "a": 0.5,
        "b": True,
        "c": "reverse_kl",
        "d": [1],
    }


def test_tokens_become_steps(tiny_model, text, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    options = TrainOptions(
        model=str(tiny_model), out=str(tmp_path / "out"), dataset=str(text), eval_dataset=None, tokens="1k",
        checkpoints=str(tmp_path / "run"), resume=False, backend="auto", packed=True, dtype="auto", bench=False,
        plot=False,
        fields={"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_seq_length": 16},
    )  # fmt: skip
    assert make_config(options, model).max_steps == math.ceil(1000 / (2 * 3 * 16))


def test_a_plot_of_an_empty_history_is_drawn(tmp_path):
    plot_training([], 3, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 0


def test_every_curve_of_a_plot_is_named_and_fills_its_axis(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, *_, **__: drawn.append(figure))
    keys = [key for panel in PANELS for key in panel.curves]
    values = {key: 100.0 + index for index, key in enumerate(keys)}
    plot_training([{"step": step, **{k: v + step / 10 for k, v in values.items()}} for step in (1, 2)], 2, tmp_path)
    axes = drawn[0].axes
    assert [panel.get_title(loc="left") for panel in axes] == [panel.title for panel in PANELS]
    for panel, shown in zip(axes, PANELS, strict=True):
        assert [text.get_text() for text in panel.get_legend().get_texts()] == list(shown.curves.values())
        assert panel.get_ylim()[0] > 90, "the axis begins where the curve does, not at 0"
        below = panel.get_legend().get_window_extent().y0
        assert below >= panel.get_window_extent().y1, "the names are above the curves"
