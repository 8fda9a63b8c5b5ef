"""Micro-benchmarks that answer what the kernels' design rests on; the answers are sentences, in `<gpu>-answers.md`.

    python bench/gpu_probe.py                 # builds bench/probes/*.cu with nvcc, runs them, writes the answers
    python bench/gpu_probe.py --write-log     # and puts them into bench/LOG.md, from the rows of all runs so far

Asked are: what this machine can do at most; whether mma.sp.sync runs at twice the rate of mma.sync; how fast wgmma.sp
is with the sparse operand in shared memory and in registers; which shape of loads streams packed fragments fastest; and
whether the order of lanes and registers is what the inline assembly of the kernels takes it to be.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from gpu_machine import RESULTS, ROOT, Call, Machine, Variant, nvidia_smi, open_machine, say, time_turns

PROBES = ROOT / "bench" / "probes"
LOG = ROOT / "bench" / "LOG.md"
HEADING = "## What the probes answered"
BUILD_SECONDS, RUN_SECONDS = 120, 60

Row = dict[str, Any]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--write-log", action="store_true", help="only write the answers of past runs to bench/LOG.md")
    if "--write-log" in sys.argv:
        parser.parse_args()
        return write_log(LOG, sorted(RESULTS.glob("*.jsonl")))
    machine, _ = open_machine(__doc__.splitlines()[0], parser)
    say(json.dumps(machine.facts))
    say(nvidia_smi() or "nvidia-smi does not answer")
    rows = [ceilings(machine), lane_order(machine)]
    for row in rows:
        machine.record("gpu_probe", row)
    builds = start_builds(machine)
    for name in builds:
        if machine.is_late(f"probe {name}", needed=machine.size(20, 0)):
            continue
        found = run_probe(name, builds[name], machine)
        for row in found:
            machine.record("gpu_probe", row)
        rows += found
    sentences = answers(rows)
    (machine.out_dir / f"{machine.slug}-answers.md").write_text("\n".join(f"- {line}" for line in sentences) + "\n")
    for line in sentences:
        say(f"* {line}")
    return 0 if builds and len(rows) > 2 else 1


def ceilings(machine: Machine) -> Row:
    """Return the rates of a large copy, and of large products in bf16 and fp8."""
    size, words = machine.size(8192, 64), machine.size(1 << 29, 1 << 12)
    source = torch.randint(-(2**31), 2**31 - 1, (words,), dtype=torch.int32, device=machine.device)
    sink = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=machine.device).bfloat16() for _ in range(2))
    variants: dict[str, Variant] = {
        "copy": Variant([lambda: sink.copy_(source)], 2 * source.nbytes),
        "read": Variant([lambda: source.view(-1, 4096).amax(-1)], source.nbytes),
        "bf16": Variant([lambda: a @ b] * 4, 1 << 30),
    }
    if not machine.dry_run and torch.cuda.get_device_capability(machine.device) >= (8, 9):
        a8, b8, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn), torch.ones((), device=machine.device)
        fp8: Call = lambda: torch._scaled_mm(a8, b8.t(), one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        variants["fp8"] = Variant([fp8] * 4, 1 << 30)
    times = time_turns(variants, machine, rounds=10)
    row: Row = {"probe": "ceilings"}
    for name, result in times.items():
        seconds = result.min_us / 1e6
        if name in ("copy", "read"):
            row[f"{name}_gb_s"] = variants[name].num_bytes / 1e9 / seconds
        else:
            row[f"{name}_tflop_s"] = 2 * size**3 / 1e12 / seconds
            row[f"{name}_tflop_s_median"] = 2 * size**3 / 1e6 / result.median_us
    return row


def lane_order(machine: Machine) -> Row:
    """Return whether inline assembly sees the registers that the kernels take it to see, and the answer in words."""
    if machine.dry_run:
        wrong: list[str] = []
    else:
        from gpu_lanes import wrong_orders  # imports Triton

        wrong = wrong_orders(machine.device)
    verdict = "no: " + "; ".join(wrong) if wrong else "yes"
    question = "Is element i of inline assembly register i % 4 of lane i // 4 % 32 of warp i // 128?"
    return {"probe": "lane_order", "ok": not wrong, "answer": f"{question} {verdict}."}


def start_builds(machine: Machine) -> dict[str, subprocess.Popen[str]]:
    """Start to compile every probe that this GPU can run, all at once."""
    folder = Path(tempfile.mkdtemp())
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    if not Path(nvcc).exists():
        say(f"no nvcc ({nvcc}): the CUDA probes are left out")
        return {}
    forms = subprocess.run([sys.executable, PROBES / "wgmma_forms.py"], capture_output=True, text=True, check=True)
    (folder / "wgmma_forms.cuh").write_text(forms.stdout)
    capability = (9, 0) if machine.dry_run else torch.cuda.get_device_capability(machine.device)
    arch = f"{capability[0]}{capability[1]}" + ("a" if capability >= (9, 0) else "")
    builds: dict[str, subprocess.Popen[str]] = {}
    for source in sorted(PROBES.glob("*.cu")):
        if source.stem == "wgmma_sp" and capability[0] != 9:
            say(f"{source.stem} is left out: wgmma exists on sm_90 alone")
            continue
        target = ["-gencode", f"arch=compute_{arch},code=sm_{arch}"]
        command = [nvcc, "-O3", "-std=c++17", f"-I{folder}", *target, "-o", str(folder / source.stem), str(source)]
        builds[source.stem] = subprocess.Popen(command, stderr=subprocess.STDOUT, stdout=subprocess.PIPE, text=True)
    return builds


def run_probe(name: str, build: subprocess.Popen[str], machine: Machine) -> list[Row]:
    """Wait for the compiler, run the probe, and return its rows; what went wrong is said and costs only this probe."""
    try:
        said, _ = build.communicate(timeout=BUILD_SECONDS)
    except subprocess.TimeoutExpired:
        build.kill()
        say(f"{name}: nvcc took more than {BUILD_SECONDS} s")
        return []
    if build.returncode:
        say(f"{name} does not compile:\n{said}")
        return []
    assert isinstance(build.args, list)
    if machine.dry_run:
        say(f"{name} compiles; stand-in rows are used")
        return [{"probe": name, **row} for row in STAND_INS[name]]
    program = build.args[build.args.index("-o") + 1]
    limit = max(min(RUN_SECONDS, machine.seconds_left()), 1)
    try:
        done = subprocess.run([program], capture_output=True, text=True, timeout=limit)
        output, error = done.stdout, done.stderr if done.returncode else ""
    except subprocess.TimeoutExpired as late:
        output, error = late.stdout or b"", f"stopped after {limit:.0f} s"
        output = output.decode() if isinstance(output, bytes) else output
    if error:
        say(f"{name}: {error}")
    return [json.loads(line) for line in output.splitlines() if line.endswith("}")]


def answers(rows: Iterable[Row]) -> list[str]:
    """Return what the rows say, a sentence for each question that was answered."""
    by_probe: dict[str, list[Row]] = {}
    for row in rows:
        by_probe.setdefault(row["probe"], []).append(row)
    sentences = []
    for row in by_probe.get("ceilings", [])[-1:]:
        rates = [f"copy {row['copy_gb_s']:.0f} GB/s", f"read {row['read_gb_s']:.0f} GB/s"]
        rates += [
            f"{name} {row[f'{name}_tflop_s']:.0f} TFLOP/s" for name in ("bf16", "fp8") if f"{name}_tflop_s" in row
        ]
        sentences.append(f"Ceilings: {', '.join(rates)}.")
    for row in by_probe.get("lane_order", [])[-1:]:
        sentences.append(str(row["answer"]))
    sentences += _mma_sync_answers(by_probe.get("mma_sync", []))
    sentences += _wgmma_answers(by_probe.get("wgmma_sp", []))
    sentences += _stream_answers(by_probe.get("stream", []))
    return sentences


def _mma_sync_answers(rows: list[Row]) -> list[str]:
    sentences = []
    for dtype in ("bf16", "fp16", "int8"):
        rates = {row["instruction"]: row["tflop_s"] for row in rows if row["dtype"] == dtype}
        dense = next((rate for name, rate in rates.items() if ".sp" not in name), None)
        sparse = {name: rate for name, rate in rates.items() if ".sp" in name}
        if dense is None or not sparse:
            continue
        forms = ", ".join(f"{name} {rate:.0f} ({rate / dense:.2f} times)" for name, rate in sparse.items())
        verdict = "yes" if max(sparse.values()) >= 1.9 * dense else "no"
        sentences.append(
            f"Does mma.sp.sync run at twice the rate of mma.sync in {dtype}? {verdict}: "
            f"dense {dense:.0f} TFLOP/s; {forms}."
        )
    return sentences


def _wgmma_answers(rows: list[Row]) -> list[str]:
    sentences = []
    for dtype in ("bf16", "fp8"):
        mine = [row for row in rows if row["dtype"] == dtype]
        dense = max((row["tflop_s"] for row in mine if not row["sparse"]), default=None)
        if dense is None:
            continue
        for copies in (False, True):
            sparse = [row for row in mine if row["sparse"] and row["copies"] is copies]
            cells = [
                f"{r['rows']}x{r['tokens']} {r['form']} {r['tflop_s']:.0f} ({r['tflop_s'] / dense:.2f})" for r in sparse
            ]
            if cells:
                how = "refilled by cp.async.bulk" if copies else "standing still"
                sentences.append(
                    f"wgmma.sp in {dtype}, tiles {how}, TFLOP/s and times the best dense wgmma ({dense:.0f}): "
                    f"{', '.join(cells)}."
                )
    return sentences


def _stream_answers(rows: list[Row]) -> list[str]:
    sentences = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        for chunks in (8, 4, 2):
            mine = [row for row in rows if row["layer"] == layer and row["chunks"] == chunks]
            if not mine:
                continue
            best = max(mine, key=lambda row: row["gb_s"])
            bits = {8: "16", 4: "8", 2: "4"}[chunks]
            sentences.append(
                f"Streaming {bits}-bit fragments of {layer} ({best['bytes'] / 1e6:.1f} MB): at best "
                f"{best['gb_s']:.0f} GB/s ({best['us']:.1f} µs), with {best['warps']} warps a block, {best['steps']} "
                f"step(s) of 256 columns in flight a warp, {best['blocks_per_sm']} blocks an SM "
                f"({best['resident']} resident), {best['policy']}."
            )
    return sentences


def write_log(log: Path, results: list[Path]) -> int:
    """Replace the section of answers in the log by those of the rows in `results`; 1 if there are none."""
    sections = []
    for path in results:
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        rows = [row for row in rows if row["benchmark"] == "gpu_probe" and not row["dry_run"]]
        if rows:
            last = rows[-1]
            versions = f"torch {last['torch']}, Triton {last['triton']}, CUDA {last['cuda']}, commit {last['git_sha']}"
            lines = "\n".join(f"- {sentence}" for sentence in answers(rows))
            sections.append(f"{last['gpu']} ({versions}; `python bench/gpu_probe.py`):\n\n{lines}\n")
    if not sections:
        print("no rows of probes: run bench/gpu.sh probe on a GPU first")
        return 1
    text = log.read_text(encoding="utf-8")
    section = f"{HEADING}\n\n" + "\n".join(sections)
    pattern = re.compile(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    new = pattern.sub(lambda _: section, text) if pattern.search(text) else f"{text.rstrip()}\n\n{section}"
    log.write_text(new.rstrip() + "\n", encoding="utf-8")
    return 0


# Rows like those that the probes print, for the dry run; the numbers mean nothing.
STAND_INS: dict[str, list[Row]] = {
    "mma_sync": [
        {"instruction": "mma.sync.m16n8k16", "dtype": "bf16", "sparse": False, "tflop_s": 1.0},
        {"instruction": "mma.sp.sync.m16n8k32", "dtype": "bf16", "sparse": True, "tflop_s": 2.0},
    ],
    "wgmma_sp": [
        {"dtype": "bf16", "rows": 128, "tokens": 256, "sparse": False, "form": "SS", "copies": False, "tflop_s": 1.0},
        {"dtype": "bf16", "rows": 256, "tokens": 128, "sparse": True, "form": "RS", "copies": True, "tflop_s": 1.5},
    ],
    "stream": [
        {"layer": "8B o", "bytes": 9437184, "policy": "plain", "warps": 4, "chunks": 8, "steps": 1, "blocks_per_sm": 8}
        | {"resident": 16, "us": 3.0, "gb_s": 1.0}
    ],
}

if __name__ == "__main__":
    sys.exit(main())
