"""The GPU benchmarks, without a GPU: every stage runs dry, and what is made of their rows is right."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

BENCH = Path(__file__).parent.parent / "bench"
pytest.importorskip("triton", reason="Triton is not installed")


@pytest.fixture(scope="module", autouse=True)
def bench_on_path():
    sys.path.insert(0, str(BENCH))
    yield
    sys.path.remove(str(BENCH))


def module(name):
    return importlib.import_module(name)


def bench_row(way, format, us, layer="8B o", M=1, **more):
    shares = {"share_of_copy": 0.5, "share_of_bf16": 0.1}
    facts = {"gpu": "Test GPU", "torch": "2", "triton": "3", "cuda": "13", "git_sha": "abc", "command": "gpu_bench.py"}
    row = {"benchmark": "gpu_bench", "layer": layer, "M": M, "way": way, "format": format, "median_us": us}
    return row | shares | facts | {"time": "2026-01-02T03:04:05+00:00", "dry_run": False} | more


def verdict_of(rows, label):
    report = module("gpu_report")
    return {line[0]: line for line in report.verdicts(report.Bench(rows), rows)}[label]


def test_floors_are_geometric_means_over_the_faster_dense():
    rows = [
        *(bench_row("dense mm", "dense", us, layer) for layer, us in (("8B o", 20.0), ("8B qkv", 40.0))),
        *(bench_row("dense linear", "dense", us, layer) for layer, us in (("8B o", 16.0), ("8B qkv", 50.0))),
        *(bench_row("auto", "semi24", us, layer) for layer, us in (("8B o", 11.0), ("8B qkv", 16.0))),
        bench_row("mma", "semi24", 10.0, "8B o"),  # faster than auto: it counts
        bench_row("portable", "semi24", 1.0, "8B o"),  # not what a packed layer runs
    ]
    _, floor, reached, verdict, remark = verdict_of(rows, "decode M=1, bf16 2:4 / dense bf16")
    assert floor == 1.6 and reached == pytest.approx((1.6 * 2.5) ** 0.5) and verdict == "PASS+"
    assert remark.startswith("2 of 8 layers; worst 1.60, 8B o")
    # The layer's own choice is held to its own time, and torch.compile is a dense rival where it was measured.
    assert verdict_of(rows, "any M, auto / dense bf16, worst")[2] == pytest.approx(16 / 11)
    compiled = {"benchmark": "gpu_compile", "layer": "8B o", "M": 1, "compiled_over_dense": 0.5}
    rows.append(compiled | {"dry_run": False})
    assert verdict_of(rows, "decode M=1, bf16 2:4 / dense bf16")[2] == pytest.approx((0.8 * 2.5) ** 0.5)
    assert verdict_of(rows, "any M, auto / dense bf16, worst")[3] == "FAIL"


def test_a_dry_run_is_not_judged(tmp_path):
    rows = [bench_row("dense mm", "dense", 10.0, dry_run=True), bench_row("auto", "semi24", 20.0, dry_run=True)]
    rows += [
        bench_row("", format, 1.0, dry_run=True, benchmark="gpu_e2e_decode", how="CUDA graph of the eager step")
        | {"tokens_per_s": speed}
        for format, speed in (("dense", 10.0), ("semi24", 5.0))
    ]
    report, results = module("gpu_report"), tmp_path / "gpu.jsonl"
    found = report.verdicts(report.Bench(rows), rows)
    assert len(found) == 3 and {line[3] for line in found} == {"not judged (dry run)"}
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert not any("FAIL" in line or "PASS" in line for line in report.summary(results))


def test_the_report_says_that_there_is_nothing_to_report(tmp_path, monkeypatch, capsys):
    report, results = module("gpu_report"), tmp_path / "gpu.jsonl"
    results.write_text(json.dumps(bench_row("auto", "semi24", 1.0, dry_run=True)) + "\n")
    monkeypatch.setattr(report, "PAGE", tmp_path / "gpu.md")
    (tmp_path / "gpu.md").write_text("## Results\n")
    monkeypatch.setattr(sys, "argv", ["gpu_report.py", str(results)])
    assert report.main() == 0
    assert "no measurement of a GPU in " in capsys.readouterr().out


def test_the_last_measurement_counts_and_fp8_has_its_own_rival():
    rows = [
        bench_row("dense mm", "dense", 30.0),
        bench_row("dense fp8, rows", "dense fp8", 15.0),
        bench_row("auto", "semi24_fp8", 30.0),
        bench_row("auto", "semi24_fp8", 10.0),
    ]
    assert verdict_of(rows, "decode M=1, fp8 2:4 / dense bf16")[2] == pytest.approx(3.0)
    assert verdict_of(rows, "decode M=1, fp8 2:4 / dense fp8")[2:4] == (pytest.approx(1.5), "PASS+")


def test_page_shows_losses_and_keeps_the_rest(tmp_path):
    report, page, results = module("gpu_report"), tmp_path / "gpu.md", tmp_path / "gpu.jsonl"
    page.write_text("# Title\n\n## Results\n\nyesterday\n\n## After\n\nkept\n")
    rows = [bench_row("dense mm", "dense", 10.0, M=128), bench_row("auto", "semi24", 20.0, M=128)]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report.write_page(page, [results])
    text = page.read_text()
    assert "**0.50**" in text and "Test GPU" in text and "yesterday" not in text and text.endswith("## After\n\nkept\n")
    results.write_text(json.dumps(rows[0] | {"dry_run": True}) + "\n")
    report.write_page(page, [results])
    assert report.NOTHING in page.read_text() and "Test GPU" not in page.read_text()
    page.write_text("# no such section\n")
    with pytest.raises(ValueError, match="has no section"):
        report.write_page(page, [])


def test_the_shipped_page_says_what_the_rows_say(tmp_path):
    report, page = module("gpu_report"), tmp_path / "gpu.md"
    shutil.copy(report.PAGE, page)
    report.write_page(page, sorted(report.RESULTS.glob("*.jsonl")))
    assert page.read_text() == report.PAGE.read_text(), "run python bench/gpu_report.py"


def test_answers_of_the_probes(tmp_path):
    probe = module("gpu_probe")
    rows = [{"probe": name, **row} for name, found in probe.STAND_INS.items() for row in found]
    rows.append({"probe": "mma_sync", "instruction": "mma.sync", "dtype": "int8", "sparse": False, "tflop_s": 10.0})
    rows.append({"probe": "mma_sync", "instruction": "mma.sp.sync", "dtype": "int8", "sparse": True, "tflop_s": 12.0})
    said = probe.answers(rows)
    assert any("in bf16? yes" in line and "2.00 times" in line for line in said)
    assert any("in int8? no" in line and "1.20 times" in line for line in said)
    assert any("256x128 RS" in line for line in said) and any("Streaming 16-bit" in line for line in said)

    log, results = tmp_path / "LOG.md", tmp_path / "gpu.jsonl"
    log.write_text("# Tried\n\n| a |\n")
    facts = {"gpu": "G", "torch": "2", "triton": "3", "cuda": "13", "git_sha": "c", "dry_run": False}
    results.write_text("".join(json.dumps({"benchmark": "gpu_probe", **row, **facts}) + "\n" for row in rows))
    assert probe.write_log(log, [results]) == 0
    once = log.read_text()
    assert once.startswith("# Tried\n\n| a |\n") and once.count("in int8? no") == 1
    assert probe.write_log(log, [results]) == 0 and log.read_text() == once
    results.write_text("")
    assert probe.write_log(log, [results]) == 1 and log.read_text() == once


@pytest.mark.parametrize(
    "spoil, word",
    [
        (lambda y: y + 0.5, "error"),
        (lambda y: torch.where(y == y.max(), y * float("nan"), y), "NaN or infinity in 1 of 240"),
        (lambda y: y[:, :-1], "expected"),
        (lambda y: y.float(), "expected"),
        (lambda y: y.t().contiguous().t(), "not contiguous"),
    ],
)
def test_the_judge_finds_wrong_results(spoil, word):
    check = module("gpu_check")
    torch.manual_seed(0)
    x, w = torch.randn(5, 64).bfloat16(), torch.randn(48, 64).bfloat16()
    y = (x.double() @ w.double().T).bfloat16()
    assert check.judge(y, y.clone(), x, w, {})[0] is None
    bad = spoil(y)
    assert re.search(word, check.judge(bad, bad, x, w, {})[0])
    assert "two calls differ" in check.judge(y, y + 0.01 * y.abs().max(), x, w, {})[0]


def test_random_weights_obey_the_pattern():
    kernels = module("gpu_kernels")
    w = kernels.random24(40, 66, torch.bfloat16, torch.device("cpu"))
    assert module("sparsekit_kernels.layout24").count_violations(w) == 0
    assert 0.4 < (w != 0).float().mean() < 0.5
    blocks = kernels.random_blocks(256, 512, (64, 64), 0.25, torch.float16, torch.device("cpu"))
    assert blocks.view(4, 64, 8, 64).ne(0).any(3).any(1).sum() == 8


def test_operands_of_the_wgmma_wrappers_are_numbered_in_order():
    done = subprocess.run(
        [sys.executable, BENCH / "probes" / "wgmma_forms.py"], capture_output=True, text=True, check=True
    )
    texts = re.findall(r'asm volatile\("(.*)"\n\s+: (.*)\n\s+: (.*)\);', done.stdout)
    assert len(texts) == 2 * 4 * 2 * 2
    for text, outputs, inputs in texts:
        count = len(re.findall(r'"[+=]?[a-z]"', outputs)) + len(re.findall(r'"[a-z]"', inputs))
        used = [int(number) for number in re.findall(r"%(\d+)", text)]
        assert used == list(range(count)), text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
def test_mma_probe_runs_on_the_sparse_tensor_cores(tmp_path):
    import triton

    target = ["-gencode", "arch=compute_90a,code=sm_90a", "-cubin"]
    cubin = tmp_path / "probe.cubin"
    subprocess.run(["nvcc", "-std=c++17", *target, "-o", cubin, BENCH / "probes" / "mma_sync.cu"], check=True)
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.run([tool, "--dump-sass", cubin], capture_output=True, text=True, check=True).stdout
    for instruction in ("HMMA.16816.F32.BF16", "HMMA.SP.16832.F32.BF16", "IMMA.16832.S8", "IMMA.SP.16864.S8"):
        assert instruction in sass, instruction
    assert "LDL" not in sass and "STL" not in sass, "registers are spilled"


DRY_RUN = """
import os, sys
import torch
torch.set_num_threads(1)
import gpu_check, gpu_tune, gpu_bench, gpu_e2e, gpu_dry, kd_loss

def stage(module, *words):
    sys.argv = [module.__file__, "--dry-run", *words]
    status = module.main()
    assert not status, f"{module.__name__} ends with {status}"

gpu_check.SMALL, gpu_check.SMALL_TOKENS = ((18, 72),), (1, 9)
bf16 = gpu_check.units(True)[1:7]  # packers, formats and blocks of one shape
gpu_check.units = lambda small: bf16
stage(gpu_e2e, "--formats", "semi24", "--no-compile")
stage(gpu_check, "--workers", "1")
stage(kd_loss, "--vocabularies", "32000")
stage(gpu_tune, "--layers", "8B o", "--cache", os.environ["OUT"] + "/cache")
stage(gpu_bench, "decode", "prefill", "--layers", "8B o")

# The stand-ins refuse what the kernels would.
kernels, dense = gpu_bench.WAYS, gpu_bench.random24(32, 64, torch.bfloat16, torch.device("cpu"))
weight = gpu_bench.pack(dense, "semi24_int8")
prepared = kernels["mma"].prepare(weight)
x = torch.randn(2, 64).bfloat16()
for spoiled, options in ((prepared, {"colour": 1}), (prepared[:2], {}), ((*prepared[1::-1], prepared[2]), {})):
    try:
        kernels["mma"].linear(x, spoiled, weight, **options)
    except (TypeError, ValueError):
        continue
    raise AssertionError("a wrong call was not refused")
"""


def test_every_stage_runs_dry(tmp_path):
    paths = [str(BENCH), str(BENCH.parent), str(BENCH.parent / "kernels")]
    environment = {**os.environ, "OUT": str(tmp_path), "PYTHONPATH": ":".join(paths), "TRITON_INTERPRET": "0"}
    environment |= {"OMP_NUM_THREADS": "1", "GOMP_SPINCOUNT": "0", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-c", DRY_RUN], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [json.loads(line) for line in (tmp_path / "dry-run.jsonl").read_text().splitlines()]
    benchmarks = {row["benchmark"] for row in rows}
    assert benchmarks >= {"gpu_check", "gpu_tune", "gpu_tune_block", "gpu_bench", "gpu_e2e_decode", "gpu_e2e_prefill"}
    assert {row["way"] for row in rows if row["benchmark"] == "kd_loss"} == {"kernel", "torch", "autograd"}
    assert all(row["command"] and row["torch"] and row["time"] and row["dry_run"] for row in rows)
    assert not [row for row in rows if row["benchmark"] == "gpu_check" and row["failed"]]
    formats = {row["format"] for row in rows if row["benchmark"] == "gpu_bench"}
    assert formats >= {"dense", "semi24", "semi24_fp8", "semi24_int8", "semi24_int4", "block 64x64 75%"}
    # The table is one that the package reads, and its launches are launches.
    from sparsekit_kernels import spmm24_mma, tuning

    gpu, _, table = tuning.read_table(tmp_path / "dry-run-table.json")
    assert gpu == "cpu" and table == tuning.read_table(tmp_path / "configs" / "dry-run.json")[2]
    assert len(list((tmp_path / "cache").rglob("*.json"))) == len(table), "in the cache that the other stages read"
    launches = [row["mma"].config for row in table.values() if row["mma"].config]
    assert launches and all(spmm24_mma.Config(**launch) for launch in launches)


def test_a_short_run_takes_no_tables_place(tmp_path):
    tune, machine = module("gpu_tune"), module("gpu_machine").Machine(torch.device("cpu"), True, 0.0)
    table, shipped = tmp_path / "table.json", tmp_path / "a" / "configs" / "dry-run.json"
    for content, short, expected in (("1", True, "1"), ("2", True, "1"), ("3", False, "3")):
        table.write_text(content)
        tune.install(table, shipped.parent, short, machine)
        assert shipped.read_text() == expected


@pytest.mark.parametrize(
    "words, stages",
    [
        ([], "probe correct tune decode prefill compile e2e train structured sanitize"),
        (["check"], "probe correct pytest sanitize"),
        (["bench"], "decode prefill e2e compile train structured"),
        (["tune"], "tune"),
    ],
)
def test_one_call_runs_every_stage_with_one_cache(words, stages, tmp_path):
    """With an imitation of Python that only writes down how it was called."""
    log, python = tmp_path / "log", tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$SPARSEKIT_TUNING|$*" >> "$LOG"\ncat > /dev/null\n')
    python.chmod(0o755)
    environment = {**os.environ, "PYTHON": str(python), "LOG": str(log), "SECONDS_IN_ALL": "500"}
    done = subprocess.run(
        ["bash", BENCH / "gpu.sh", "--dry-run", *words], env=environment, capture_output=True, text=True, stdin=-3
    )
    assert done.returncode == 0, done.stdout + done.stderr
    shares = [line.split() for line in done.stdout.splitlines() if " up to " in line]
    assert [share[1].strip(":") for share in shares] == stages.split()
    assert sum(int(share[4]) for share in shares) >= 500, "what one leaves the next may use"
    calls = [line.split("|") for line in log.read_text().splitlines()]
    assert len({cache for cache, _ in calls}) == 1 and Path(calls[0][0]).is_dir()
    (tune,) = [call for _, call in calls if "gpu_tune" in call] or [None]
    if tune:
        assert f"--cache {calls[0][0]}" in tune and ("--short" in tune) == (words == [])


def test_script_names_its_stages_and_refuses_others(tmp_path):
    script = BENCH / "gpu.sh"
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    done = subprocess.run(["bash", script, "nonsense"], capture_output=True, text=True)
    assert done.returncode == 2 and "unknown: nonsense" in done.stderr
    for stage in re.findall(r"bench/(gpu_\w+\.py)", script.read_text()):
        assert (BENCH / stage).is_file(), stage


def test_without_a_gpu_a_stage_says_so(monkeypatch, capsys):
    machine = module("gpu_machine")
    monkeypatch.setattr(sys, "argv", ["gpu_bench.py"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="--dry-run"):
        machine.open_machine("a stage")


def test_rows_say_their_command_without_the_places_of_a_machine(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "sys.argv", [str(tmp_path / "bench.py"), "--data", str(tmp_path / "some data"), "--rows", "a/b"]
    )
    row = module("record").record("x", {"value": 1}, tmp_path / "rows.jsonl")
    assert row["command"] == "bench.py --data 'some data' --rows a/b"
    assert str(tmp_path) not in (tmp_path / "rows.jsonl").read_text()
