"""Every command once on a tiny model, its JSON, and each bad argument with exit status 2 and one clear line."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sparsekit as sk
from sparsekit.benchmarking import SHAPES, LayerShape
from sparsekit.cli import app, demo
from sparsekit.cli.models import load_model
from sparsekit.cli.prune import short_check
from sparsekit.nn import sparse_layers
from sparsekit.report import Report

ROOT = Path(__file__).resolve().parents[2]


def run(*words):
    return CliRunner().invoke(app, [str(word) for word in words])


def environment():
    paths = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    return {**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}


@pytest.fixture
def tiny_shapes(monkeypatch):
    monkeypatch.setitem(SHAPES, "tiny", [LayerShape("q_proj", 32, 64, 2)])


def test_prune_says_all_and_saves_packed(tiny_model, text, tmp_path):
    out, report = tmp_path / "out", tmp_path / "report.json"
    words = ["--method", "sparsegpt", "--dataset", text, "--eval-dataset", text, "--num-calibration-samples", 4]
    result = run("prune", tiny_model, out, *words, "--max-seq-length", 32, "--json", report, "--quiet")
    assert result.exit_code == 0, result.stderr
    document = json.loads(report.read_text())
    assert document["ok"] and set(document) >= {"quality", "check", "saved", "benchmark", "environment"}
    assert [row["model"] for row in document["quality"]["rows"]] == ["dense", "sparse"]
    assert document["check"]["summary"]["packed"] == 14
    assert document["saved"]["summary"]["on disk, bytes"] == (out / "model.safetensors").stat().st_size
    assert document["benchmark"]["summary"]["verdict"] in " ".join(result.stdout.split())
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(sparse_layers(model)) == 14 and (out / "tokenizer.json").is_file()


def test_prune_to_a_quantised_format(tiny_model, text, tmp_path):
    words = ["--dataset", text, "--num-calibration-samples", 4, "--max-seq-length", 32, "--backend", "reference"]
    result = run("prune", tiny_model, tmp_path / "out", *words, "--format", "semi24_int4", "--no-bench", "-q")
    assert result.exit_code == 0, result.stderr
    layers = sparse_layers(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert len(layers) == 14 and {layer.format for layer in layers.values()} == {"semi24_int4"}


@pytest.mark.parametrize(
    "words,message",
    [
        (["--format", "semi24_int5"], "unknown format 'semi24_int5'"),
        (["--format", "semi24_int4", "--pattern", "4:8"], "does not hold the pattern 4:8"),
        (["--permute", "--pattern", "unstructured"], "permute=True is for N:M"),
    ],
)
def test_what_does_not_fit_ends_before_the_model_is_loaded(words, message, tmp_path):
    result = run("prune", tmp_path / "no model", tmp_path / "out", *words, "-q")
    assert result.exit_code == 2 and message in " ".join(result.stderr.split())


def test_prune_dense_opens_anywhere(tiny_model, tmp_path):
    words = ["--method", "magnitude", "--dense", "--no-bench", "--targets", "re:.*mlp", "--ignore", "down_proj", "-q"]
    result = run("prune", tiny_model, tmp_path / "out", *words)
    assert result.exit_code == 0, result.stderr
    weights = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    zeros = {name: (w == 0).float().mean().item() for name, w in weights.items() if "proj" in name}
    assert all(share == (0.5 if "gate_proj" in name or "up_proj" in name else 0) for name, share in zeros.items())


def test_prune_with_reordered_inputs(tiny_model, tmp_path):
    for out, words in (("plain", ()), ("reordered", ("--permute",))):
        result = run(
            "prune", tiny_model, tmp_path / out, "--method", "magnitude", "--dense", "--no-bench", *words, "-q"
        )
        assert result.exit_code == 0, result.stderr
    plain, reordered = (AutoModelForCausalLM.from_pretrained(tmp_path / out) for out in ("plain", "reordered"))
    name = "model.layers.0.mlp.down_proj"
    assert reordered.get_submodule(name).weight.abs().sum() > plain.get_submodule(name).weight.abs().sum()


def test_prune_unstructured_says_that_it_gains_nothing(tiny_model, tmp_path):
    result = run("prune", tiny_model, tmp_path / "out", "--pattern", "unstructured", "--method", "magnitude", "-q")
    assert result.exit_code == 0, result.stderr
    assert "no layer could be packed" in result.stdout and "stay dense" in result.stdout
    assert "no packed format runs unstructured" in result.stderr


def test_the_check_has_one_line_for_each_kind_of_layer():
    row = {"shape": "8x8", "pattern": "unstructured", "format": "dense", "finite": True, "backend": "torch"}
    row |= {"dense bytes": 128, "bytes": 128, "bits a weight": 16.0}
    rows = [row | {"layer": f"{i}.up", "sparsity": 0.4996 + i / 10_000} for i in range(8)]
    rows += [row | {"layer": "0.down", "sparsity": 0.4}, row | {"layer": "1.down", "sparsity": 0.6}]
    rows += [row | {"layer": "2.down", "sparsity": 0.6, "format": "semi24"}]
    shown = short_check(Report("check", rows)).rows
    assert [(line["layers"], line["name"], line["sparsity"]) for line in shown] == [
        (8, "up", 0.5),
        (2, "down", "0.4 to 0.6"),
        (1, "down", 0.6),
    ]
    assert shown[0]["bytes"] == 128 and "format" in shown[0]


def test_eval(tiny_model, text):
    result = run("eval", tiny_model, "--dataset", text, "--max-seq-length", 32, "--json", "-", "-q")
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)["evaluation"]["summary"]
    assert 1000 < found["perplexity"] < 20_000 and found["tokens_per_second"] > 0
    assert "perplexity" in result.stderr


def test_bench_of_a_dense_model_prunes_in_memory(tiny_model, tmp_path):
    before = sorted(tiny_model.iterdir())
    report = tmp_path / "b.json"
    words = ["--prompt-length", 8, "--new-tokens", 2, "--rounds", 1]
    result = run("bench", tiny_model, *words, "--json", report, "-q")
    assert result.exit_code == 0, result.stderr
    document = json.loads(report.read_text())["benchmark"]
    assert "decode speedup" in document["summary"] and any("magnitude" in note for note in document["notes"])
    assert sorted(tiny_model.iterdir()) == before


def test_bench_of_shapes(tiny_shapes):
    result = run("bench", "--shapes", "tiny", "--num-tokens", "1,3", "--json", "-", "-q")
    assert result.exit_code == 0, result.stderr
    document = json.loads(result.stdout)
    assert [row["M"] for row in document["shapes"]["rows"]] == [1, 3]
    assert document["shapes"]["summary"]["speedup of one pass at M=3"] > 0


@pytest.mark.parametrize("command, key", [("bench", "shapes"), ("doctor", "doctor")])
def test_shapes_in_a_quantised_format(command, key, tiny_shapes):
    words = ["--shapes", "tiny", "--format", "semi24_int4", "--num-tokens", "1", "--json", "-", "-q"]
    result = run(command, *words)
    assert result.exit_code == 0, result.stderr
    found = json.loads(result.stdout)[key]
    assert [row["format"] for row in found["rows"]] == ["semi24_int4"] and "semi24_int4" in found["title"]


def test_bench_in_a_format(tiny_model, tmp_path):
    sizes = ["--prompt-length", 8, "--new-tokens", 2, "--rounds", 1, "-q"]
    result = run("bench", tiny_model, "--format", "semi24_int8", *sizes, "--json", tmp_path / "b.json")
    assert result.exit_code == 0, result.stderr
    rows = json.loads((tmp_path / "b.json").read_text())["benchmark"]["rows"]
    assert {row["format"] for row in rows if "format" in row} == {"semi24_int8"}
    model, _ = load_model(str(tiny_model), device="cpu")
    sk.save(sk.sparsify(model, method="magnitude", progress=False), tmp_path / "packed")
    refused = run("bench", tmp_path / "packed", "--format", "semi24_int8", *sizes)
    assert refused.exit_code == 2 and "is packed as semi24, leave --format out" in refused.stderr


def test_doctor(tiny_model, tmp_path):
    report = tmp_path / "d.json"
    result = run("doctor", tiny_model, "--num-tokens", "1,4", "--max-seconds", 1, "--json", report, "-q")
    assert result.exit_code == 0, result.stderr
    document = json.loads(report.read_text())["doctor"]
    assert len(document["rows"]) == 8 and document["summary"]["backend triton"].startswith("no: ")
    assert "sparse pays at" in result.stdout


@pytest.mark.parametrize("stored, used", [("float16", "bfloat16"), ("float32", "float32")])
@pytest.mark.parametrize("is_named", [True, False])
def test_doctor_and_prune_take_the_same_dtype(stored, used, is_named, tiny_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model, dtype=getattr(torch, stored)).save_pretrained(tmp_path / "m")
    if not is_named:
        config = json.loads((tmp_path / "m" / "config.json").read_text())
        del config["dtype"]
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    loaded, notes = load_model(str(tmp_path / "m"), device="cpu")
    words = ["--device", "cpu", "--num-tokens", "1", "--max-seconds", 1, "--json", "-", "-q"]
    found = json.loads(run("doctor", tmp_path / "m", *words).stdout)["doctor"]
    assert loaded.dtype is getattr(torch, used) and f"semi24 weights in {used} on cpu" in found["title"]
    assert len(notes) == (stored != used) and set(notes) <= set(found["notes"])


def test_transformers_shows_no_bars_of_its_own(tiny_model, text, tmp_path):
    words = ["prune", tiny_model, tmp_path / "out", "--method", "magnitude", "--no-bench"]
    command = [sys.executable, "-m", "sparsekit.cli", *map(str, words)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Loading weights" not in done.stderr and "Writing model shards" not in done.stderr


def test_doctor_alone():
    result = run("doctor", "-q")
    assert result.exit_code == 0 and "memory read, GB/s" in result.stdout


def test_demo_on_a_users_model(tiny_model, text, tiny_shapes, tmp_path):
    report, out = tmp_path / "d.json", tmp_path / "kept"
    words = [
        "--dataset",
        text,
        "--eval-dataset",
        text,
        "--num-calibration-samples",
        4,
        "--shapes",
        "tiny",
        "--out",
        out,
    ]
    result = run("demo", tiny_model, *words, "--json", report, "-q")
    assert result.exit_code == 0, result.stderr
    document = json.loads(report.read_text())
    assert [row["method"] for row in document["quality"]["rows"]] == ["dense", "magnitude", "wanda", "sparsegpt"]
    assert document["saved"]["summary"]["reloaded outputs equal, bit for bit"] is True
    assert document["generated"]["rows"] and document["kernels_bfloat16"]["rows"]
    assert isinstance(sk.load(out), torch.nn.Module)


def test_demo_without_the_checkout_says_what_to_pass(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "CHECKOUT", tmp_path)
    result = run("demo")
    assert result.exit_code == 2
    assert "pass MODEL, --dataset FILE, --eval-dataset FILE" in result.stderr


BAD = {
    "pattern": (["prune", "{model}", "{out}", "--pattern", "2:5x"], "unknown pattern '2:5x'"),
    "method": (["prune", "{model}", "{out}", "--method", "wandaa"], "Did you mean 'wanda'?"),
    "backend": (["prune", "{model}", "{out}", "--backend", "tpu"], "unknown backend 'tpu'"),
    "no dataset": (["prune", "{model}", "{out}", "--method", "wanda"], "needs calibration text"),
    "missing dataset": (["prune", "{model}", "{out}", "--dataset", "none.txt"], "none.txt: there is no such file"),
    "missing folder": (["prune", "./nowhere", "{out}"], "there is no such folder"),
    "missing model": (["prune", "nowhere/at-all", "{out}"], "no model 'nowhere/at-all'"),
    "out is model": (["prune", "{model}", "{model}"], "OUT is MODEL"),
    "out is a file": (["prune", "{model}", "{text}"], "is a file"),
    "targets": (["prune", "{model}", "{out}", "--targets", "Linnear"], "'Linnear'"),
    "sparsity": (["prune", "{model}", "{out}", "--sparsity", "1.5"], "1.5"),
    "samples": (["prune", "{model}", "{out}", "--dataset", "{text}", "--num-calibration-samples", "0"], "at least 1"),
    "dtype": (["eval", "{model}", "--dataset", "{text}", "--dtype", "int9"], "unknown dtype 'int9'"),
    "device": (["eval", "{model}", "--dataset", "{text}", "--device", "abacus"], "unknown device 'abacus'"),
    "chunk": (["eval", "{model}", "--dataset", "{text}", "--max-seq-length", "65"], "64 positions"),
    "eval dataset": (["eval", "{model}", "--dataset", "none.txt"], "no such file"),
    "bench nothing": (["bench"], "one of the two"),
    "bench shapes": (["bench", "--shapes", "llama-9"], "unknown shapes 'llama-9'"),
    "bench format": (["bench", "--shapes", "llama-3-8b", "--format", "int4"], "unknown format 'int4'"),
    "bench blocks": (["bench", "{model}", "--format", "block"], "how many blocks are stored"),
    "bench numbers": (["bench", "--shapes", "llama-3-8b", "--num-tokens", "one"], "whole numbers"),
    "bench rounds": (["bench", "{model}", "--rounds", "0"], "at least 1"),
    "doctor both": (["doctor", "{model}", "--shapes", "llama-3-8b"], "not both"),
    "doctor shapes": (["doctor", "--shapes", "llama-9"], "unknown shapes"),
    "demo dataset": (["demo", "--dataset", "none.txt"], "no such file"),
}


@pytest.mark.parametrize("words, message", BAD.values(), ids=BAD)
def test_bad_arguments(words, message, tiny_model, text, tmp_path):
    places = {"model": str(tiny_model), "text": str(text), "out": str(tmp_path / "out")}
    report = tmp_path / "report.json"
    result = run(*(word.format(**places) for word in words), "--json", report, "-q")
    assert result.exit_code == 2, result.output
    complaint = [
        line for line in result.stderr.splitlines() if line.startswith("sparsekit: ") and "warning" not in line
    ]
    assert len(complaint) == 1 and message in complaint[0], result.stderr
    assert "Traceback" not in result.output
    assert json.loads(report.read_text())["ok"] is False
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["", "text.txt/report.json", "/proc/report.json", "/proc/new/report.json"])
def test_json_that_cannot_be_written_is_told_before_the_work(place, tmp_path, monkeypatch):
    (tmp_path / "text.txt").write_text("x")
    monkeypatch.setattr(sys.modules["sparsekit.doctor"], "doctor", lambda *_, **__: pytest.fail("the work was begun"))
    result = run("doctor", "--json", tmp_path / place, "-q")
    assert result.exit_code == 2 and isinstance(result.exception, SystemExit)
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("sparsekit: --json ")
    assert [file.name for file in tmp_path.iterdir()] == ["text.txt"]


def test_json_that_fails_at_the_end_is_one_line(tmp_path, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sparsekit.cli.output.write_json", full)
    monkeypatch.setattr(sys.modules["sparsekit.doctor"], "doctor", lambda *_, **__: Report("examined"))
    result = run("doctor", "--json", tmp_path / "new" / "report.json", "-q")
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit)
    assert "examined" in result.stdout and result.stderr.count("\n") == 1 and "No space left" in result.stderr


@pytest.mark.parametrize("words", [["prun"], ["prune"], ["eval", "model"], ["bench", "--rounds", "many"], ["--nope"]])
def test_bad_usage(words):
    assert run(*words).exit_code == 2


def test_debug_shows_the_traceback(tiny_model, tmp_path):
    result = run("prune", tiny_model, tmp_path / "out", "--pattern", "x", "--debug")
    assert result.exit_code == 2 and "Traceback" in result.stderr


def test_failures_that_are_not_the_callers_are_1(tiny_model, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    model.save_pretrained(tmp_path / "nan")
    result = run("prune", tmp_path / "nan", tmp_path / "out", "--method", "magnitude", "-q")
    assert result.exit_code == 1 and "layers.1.mlp.up_proj" in result.stderr
    assert not (tmp_path / "out").exists()


def test_interrupt_is_130_and_leaves_nothing(tiny_model, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(sk, "sparsify", interrupted)
    result = run("prune", tiny_model, tmp_path / "out", "--method", "magnitude", "-q")
    assert result.exit_code == 130 and "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_process_ended_by_a_signal_leaves_nothing(tiny_model, text, tmp_path):
    command = [
        sys.executable,
        "-m",
        "sparsekit.cli",
        "prune",
        str(tiny_model),
        str(tmp_path / "out"),
        "--dataset",
        str(text),
    ]
    words = ["--num-calibration-samples", "100000", "--max-seq-length", "16"]
    process = subprocess.Popen(command + words, env=environment(), stderr=subprocess.PIPE, stdout=subprocess.PIPE)
    time.sleep(6)
    process.send_signal(signal.SIGINT)
    # Where the signal comes while an import runs exec(), Python ends by it; to a shell that is 130, too.
    assert process.wait(timeout=30) in (130, -signal.SIGINT), process.stderr.read().decode()
    assert b"nothing was left half-written" in process.stderr.read() or process.returncode < 0
    assert list(tmp_path.iterdir()) == []


def test_a_real_process_prints_json(tiny_model, text):
    command = [sys.executable, "-m", "sparsekit.cli", "eval", str(tiny_model), "--dataset", str(text)]
    done = subprocess.run([*command, "--max-seq-length", "32", "--json", "-"], env=environment(), capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    assert json.loads(done.stdout)["command"] == "eval"


def test_help_names_every_command():
    result = run("--help")
    assert result.exit_code == 0
    assert all(re.search(rf"^  {name} ", result.stdout, re.M) for name in ("prune", "eval", "bench", "doctor", "demo"))
    assert run("--version").stdout.strip() == f"sparsekit {sk.__version__}"
