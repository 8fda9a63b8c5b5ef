"""One JSON row a result, with all that is needed to judge it later.

    from record import record
    record("spmm24", {"M": 1, "N": 4096, "K": 4096, **timing.to_dict()})

Rows go to `bench/results/<device>.jsonl`, or to $SPARSEKIT_RESULTS; the same row is printed as the last line of a run.
"""

import json
import os
import re
import shlex
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from sparsekit.benchmarking import environment

RESULTS = Path(__file__).resolve().parent / "results"


def record(benchmark: str, result: dict[str, Any], path: Path | None = None) -> dict[str, Any]:
    """Append one row, print it, and return it: the result, the command, hardware, versions and commit."""
    facts = environment()
    script = Path(sys.argv[0]).name
    row = {
        "benchmark": benchmark,
        **result,
        "command": shlex.join([script, *map(_without_place, sys.argv[1:])]),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        **facts,
    }
    path = path or _path(facts)
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(row, default=str)
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
    print(line)
    return row


def _without_place(word: str) -> str:
    """Return an argument, an absolute path by its last part alone: where it lay means nothing on another machine."""
    return Path(word).name if Path(word).is_absolute() else word


def _path(facts: dict[str, Any]) -> Path:
    if chosen := os.environ.get("SPARSEKIT_RESULTS"):
        return Path(chosen)
    device = re.sub(r"[^a-z0-9]+", "-", str(facts["gpu"] or f"{facts['cpu']} {facts['isa']}").lower()).strip("-")
    return RESULTS / f"{device}.jsonl"
