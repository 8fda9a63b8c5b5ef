"""Turn the rows of `bench/results/<gpu>.jsonl` into the tables of `docs/gpu.md`, losses beside wins.

    python bench/gpu_report.py                          # of bench/results, into "## Results" of docs/gpu.md
    python bench/gpu_report.py FILE.jsonl --print       # one file, to the screen

Where a measurement was repeated the last one counts. Speed-ups are ratios of medians over the faster of torch.mm,
F.linear and, where it was measured, torch.compile(mode="max-autotune"), of the same run. "ours" is what a packed layer
runs ("auto") or the fragment kernel by name, whichever is faster; for the last floor it is "auto" alone.
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gpu_machine import RESULTS, ROOT, geometric_mean

PAGE = ROOT / "docs" / "gpu.md"
HEADING = "## Results"
OURS = ("auto", "mma", "block")
SHORT = {"semi24": "2:4 bf16", "semi24_fp8": "2:4 fp8", "semi24_int8": "2:4 int8", "semi24_int4": "2:4 int4"}

Row = dict[str, Any]
Cell = tuple[str, int]  # layer, M


@dataclass(frozen=True)
class Floor:
    """What a regime must reach.

    Attributes:
        label: the regime.
        format: of the sparse weight.
        tokens: numbers of tokens it is about, as a test.
        rival: "dense", or the format of a dense rival.
        floor: at least this many times as fast, as a geometric mean over layers and tokens.
        stretch: hoped for.
        each: the floor holds for every layer and number of tokens, and not for their mean.
    """

    label: str
    format: str
    tokens: Callable[[int], bool]
    rival: str
    floor: float
    stretch: float | None = None
    each: bool = False


FLOORS = (
    Floor("decode M=1, bf16 2:4 / dense bf16", "semi24", lambda M: M == 1, "dense", 1.60, 1.80),
    Floor("decode M=16…64, bf16 2:4 / dense bf16", "semi24", lambda M: 16 <= M <= 64, "dense", 1.50, 1.65),
    Floor("decode M=1, fp8 2:4 / dense bf16", "semi24_fp8", lambda M: M == 1, "dense", 2.4, 2.8),
    Floor("decode M=1, fp8 2:4 / dense fp8", "semi24_fp8", lambda M: M == 1, "dense fp8", 1.40, 1.50),
    Floor("decode M=1, int4 2:4 / dense bf16", "semi24_int4", lambda M: M == 1, "dense", 3.2, 4.0),
    Floor("decode M=32, int4 2:4 / dense bf16", "semi24_int4", lambda M: M == 32, "dense", 2.8, 3.5),
    Floor("prefill M>=2048, bf16 2:4 / dense bf16", "semi24", lambda M: M >= 2048, "dense", 1.15, 1.45),
    Floor("prefill M>=2048, bf16 2:4, worst layer", "semi24", lambda M: M >= 2048, "dense", 0.98, None, True),
    Floor("decode, 64x64 blocks, 75 % / dense bf16", "block 64x64 75%", lambda M: M == 1, "dense", 2.6),
    Floor("decode, 64x64 blocks, 90 % / dense bf16", "block 64x64 90%", lambda M: M == 1, "dense", 5.0),
    Floor("any M, auto / dense bf16, worst", "semi24", lambda M: True, "dense", 0.98, None, True),
)
HOWS = ("torch.compile, reduce-overhead", "CUDA graph of the eager step")  # the first that was measured counts
END_TO_END = {"semi24": (1.40, 1.55), "semi24_fp8": (2.0, 2.3), "semi24_int4": (2.4, 2.9)}


def load(path: Path, since: str = "") -> list[Row]:
    """Return the rows of a file that were written at `since` or later."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    return [row for row in rows if row["time"] >= since]


class Bench:
    """The measurements of one GPU, by cell: microseconds of every way and format."""

    def __init__(self, rows: Iterable[Row]) -> None:
        self.us: dict[Cell, dict[tuple[str, str], Row]] = {}
        compiled: dict[Cell, float] = {}
        for row in rows:
            if row["benchmark"] == "gpu_bench":
                self.us.setdefault((row["layer"], row["M"]), {})[row["way"], row["format"]] = row
            elif row["benchmark"] == "gpu_compile":
                compiled[row["layer"], row["M"]] = row["compiled_over_dense"]
        self.compiled = compiled

    def dense_us(self, cell: Cell) -> float | None:
        """The fastest dense bf16 product."""
        found = [row["median_us"] for (_, format), row in self.us[cell].items() if format == "dense"]
        return min(found) * min(self.compiled.get(cell, 1.0), 1.0) if found else None

    def rival_us(self, cell: Cell, rival: str) -> float | None:
        if rival == "dense":
            return self.dense_us(cell)
        return min((row["median_us"] for (_, format), row in self.us[cell].items() if format == rival), default=None)

    def best(self, cell: Cell, format: str, ways: tuple[str, ...] = OURS) -> Row | None:
        """The row of our fastest way to run a format."""
        found = [row for (way, f), row in self.us[cell].items() if f == format and way in ways]
        return min(found, key=lambda row: row["median_us"]) if found else None

    def speedups(self, floor: Floor) -> dict[Cell, float]:
        """Times as fast as the rival, for every layer and number of tokens of a regime."""
        ways = ("auto",) if floor.label.startswith("any M") else OURS
        found = {}
        for cell in self.us:
            ours, rival = self.best(cell, floor.format, ways), self.rival_us(cell, floor.rival)
            if floor.tokens(cell[1]) and ours is not None and rival is not None:
                found[cell] = rival / ours["median_us"]
        return found


def judged(reached: float, floor: float, stretch: float | None, dry: bool) -> str:
    """Return the verdict on one regime; the stand-ins of a dry run have no speed to judge."""
    if dry:
        return "not judged (dry run)"
    return ("PASS" if reached >= floor else "FAIL") + ("+" if stretch is not None and reached >= stretch else "")


def verdicts(bench: Bench, rows: Iterable[Row]) -> list[tuple[str, float, float, str, str]]:
    """Return (regime, floor, reached, verdict, remark) for every floor that was measured."""
    rows, found = list(rows), []
    dry = any(row["dry_run"] for row in rows)
    for floor in FLOORS:
        speedups = bench.speedups(floor)
        if not speedups:
            continue
        worst = min(speedups, key=lambda cell: speedups[cell])
        reached = speedups[worst] if floor.each else geometric_mean(list(speedups.values()))
        verdict = judged(reached, floor.floor, floor.stretch, dry)
        layers = len({layer for layer, _ in speedups})
        remark = f"{layers} of 8 layers; worst {speedups[worst]:.2f}, {worst[0]} M={worst[1]}"
        found.append((floor.label, floor.floor, reached, verdict, remark))
    decode: dict[str, dict[str, Row]] = {}
    for row in rows:
        if row["benchmark"] == "gpu_e2e_decode":
            decode.setdefault(row["format"], {})[row["how"]] = row
    for format, (floor_value, stretch) in END_TO_END.items():
        both = [how for how in HOWS if how in decode.get(format, {}) and how in decode.get("dense", {})]
        if both:
            ours, dense = (decode[side][both[0]]["tokens_per_s"] for side in (format, "dense"))
            verdict = judged(ours / dense, floor_value, stretch, dry)
            remark = f"{ours:.0f} against {dense:.0f} tokens/s; {both[0]}"
            found.append((f"end to end, {SHORT[format]} / dense bf16", floor_value, ours / dense, verdict, remark))
    return found


def summary(path: Path, since: str = "") -> list[str]:
    """Return the floors as short lines for a screen."""
    if not path.exists():
        return ["no rows"]
    rows = load(path, since)
    lines = [
        f"{label:42} floor {floor:4.2f}  reached {reached:5.2f}  {verdict:5} ({remark})"
        for label, floor, reached, verdict, remark in verdicts(Bench(rows), rows)
    ]
    return lines or ["no floor was measured in this run"]


def table(header: list[str], body: Iterable[Iterable[object]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'|'.join(['---', *['--:'] * (len(header) - 1)])}|"]
    lines += [f"| {' | '.join(str(cell) for cell in row)} |" for row in body]
    return "\n".join(lines)


def layer_table(bench: Bench, tokens: list[int], layers: list[str], formats: list[str]) -> str:
    """Speed-ups of each format by layer and M; those below 1 are in bold: there dense is faster."""
    body = []
    for layer in layers:
        for M in tokens:
            if (layer, M) not in bench.us:
                continue
            dense = bench.dense_us((layer, M))
            cells = []
            for format in formats:
                ours = bench.best((layer, M), format)
                if ours is None or dense is None:
                    cells.append("")
                    continue
                ratio = dense / ours["median_us"]
                text = f"{ratio:.2f}" if ratio >= 1 else f"**{ratio:.2f}**"
                cells.append(f"{text} ({max(ours['share_of_copy'], ours['share_of_bf16']):.0%})")
            body.append([layer, M, f"{dense:.1f}" if dense else "", *cells])
    return table(["layer", "M", "dense µs", *(SHORT.get(format, format) for format in formats)], body)


def rival_table(bench: Bench, layers: list[str]) -> str:
    """Every way that is not ours, over dense, as geometric means over the layers that have it."""
    ratios: dict[tuple[str, str], dict[int, list[float]]] = {}
    for (layer, M), ways in bench.us.items():
        dense = bench.dense_us((layer, M))
        for key, row in ways.items():
            if key[0] not in ("mma", "block") and key[1] != "dense" and dense is not None:
                ratios.setdefault(key, {}).setdefault(M, []).append(dense / row["median_us"])
    tokens = sorted({M for by_tokens in ratios.values() for M in by_tokens})
    body = [
        [f"{way}, {SHORT.get(format, format)}", *(f"{geometric_mean(r[M]):.2f}" if M in r else "" for M in tokens)]
        for (way, format), r in sorted(ratios.items())
    ]
    return table(["way", *(f"M={M}" for M in tokens)], body)


def end_to_end_tables(rows: list[Row]) -> list[str]:
    decode = {(row["format"], row["how"]): row for row in rows if row["benchmark"] == "gpu_e2e_decode"}
    prefill = {(row["format"], row["M"]): row for row in rows if row["benchmark"] == "gpu_e2e_prefill"}
    parts = []
    if decode:
        body: list[list[object]] = []
        for (format, how), row in decode.items():
            dense = decode.get(("dense", how))
            ratio = f"{row['tokens_per_s'] / dense['tokens_per_s']:.2f}" if dense else ""
            cells = [f"{row['tokens_per_s']:.1f}", f"{row['median_ms']:.3f}", ratio, f"{row['weights_gb']:.2f}"]
            body.append([f"{SHORT.get(format, format)}, {how}", *cells])
        parts.append(table(["decode, batch 1", "tokens/s", "ms a token", "times dense", "weights, GB"], body))
    if prefill:
        body = []
        for (format, M), row in sorted(prefill.items(), key=lambda item: (item[0][1], item[0][0] != "dense")):
            dense = prefill.get(("dense", M))
            ratio = f"{dense['median_ms'] / row['median_ms']:.2f}" if dense else ""
            body.append([SHORT.get(format, format), M, f"{row['median_ms']:.1f}", ratio, f"{row['peak_gb']:.2f}"])
        parts.append(table(["prefill", "tokens", "ms", "times dense", "peak memory, GB"], body))
    return parts


def page_section(rows: list[Row]) -> str:
    """Return what docs/gpu.md says of one GPU."""
    bench, last = Bench(rows), rows[-1]
    layers = list(dict.fromkeys(layer for layer, _ in bench.us))
    tokens = sorted({M for _, M in bench.us})
    formats = list(dict.fromkeys(f for ways in bench.us.values() for way, f in ways if way in OURS))
    commands = sorted({row["command"] for row in rows})
    parts = [
        f"### {last['gpu']}",
        f"torch {last['torch']}, Triton {last['triton']}, CUDA {last.get('cuda')}, "
        f"commit {last['git_sha']}, {last['time'][:10]}. "
        f"Rows from: {', '.join(f'`{command}`' for command in commands)}.",
    ]
    ceilings = [row for row in rows if row["benchmark"] == "gpu_probe" and row.get("probe") == "ceilings"]
    if ceilings:
        row = ceilings[-1]
        parts.append(
            f"Ceilings measured there: copy {row['copy_gb_s']:.0f} GB/s, bf16 {row['bf16_tflop_s']:.0f} TFLOP/s."
        )
    checks = {row["family"]: row for row in rows if row["benchmark"] == "gpu_check"}
    if checks:
        tried, failed = (sum(row[key] for row in checks.values()) for key in ("tried", "failed"))
        parts.append(f"Correctness: {tried} cases against float64, {failed} wrong.")
    found = verdicts(bench, rows)
    if found:
        body = [[label, f"{floor:.2f}", f"{reached:.2f}", v, remark] for label, floor, reached, v, remark in found]
        parts += [
            "Goals, as geometric means over the layers (PASS+ where the stretch goal is reached too):",
            table(["regime", "goal", "reached", "verdict", "of which"], body),
        ]
    for title, those in (
        ("Few tokens", [M for M in tokens if M <= 64]),
        ("Many tokens", [M for M in tokens if M > 64]),
    ):
        if those:
            parts += [
                f"{title}: times faster than dense bf16, and the share of the ceiling that binds. "
                "**Bold**: dense is faster.",
                layer_table(bench, those, layers, formats),
            ]
    if bench.us:
        parts += [
            "Other ways, ours by name and the rivals', over dense (geometric means over layers):",
            rival_table(bench, layers),
        ]
    host = {(row["way"], row["format"]): row["host_us"] for row in rows if row["benchmark"] == "gpu_host"}
    if host:
        body = [[f"{way}, {SHORT.get(format, format)}", f"{us:.1f}"] for (way, format), us in host.items()]
        parts += ["Host time of one call:", table(["way", "µs"], body)]
    return "\n\n".join(parts + end_to_end_tables(rows))


NOTHING = "**Nothing has been measured on a GPU yet.** No speed is claimed until this section holds numbers."


def is_measured(row: Row) -> bool:
    """Return whether a row was measured on a GPU."""
    return row["benchmark"].startswith("gpu_") and not row["dry_run"]


def write_page(page: Path, results: list[Path]) -> None:
    """Replace the section of results of the page by what the rows say, or by the plain word that there are none."""
    sections = []
    for path in results:
        rows = [row for row in load(path) if is_measured(row)]
        if rows:
            sections.append(page_section(rows))
    body = "\n\n".join(sections) or NOTHING
    text = page.read_text(encoding="utf-8")
    pattern = re.compile(rf"^{re.escape(HEADING)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"{page} has no section {HEADING!r} to replace")
    page.write_text(pattern.sub(lambda _: f"{HEADING}\n\n{body}\n\n", text).rstrip() + "\n", encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="default: all in bench/results")
    parser.add_argument("--print", action="store_true", help="to the screen instead of docs/gpu.md")
    options = parser.parse_args()
    files = options.files or sorted(RESULTS.glob("*.jsonl"))
    if not any(is_measured(row) for path in files for row in load(path)):
        where = ", ".join(map(str, options.files)) or RESULTS.relative_to(ROOT)
        print(f"no measurement of a GPU in {where}: run python bench/gpu_bench.py on a machine that has one")
    if options.print:
        for path in files:
            print(page_section(load(path)))
    else:
        write_page(PAGE, files)
    return 0


if __name__ == "__main__":
    sys.exit(main())
