"""What a person reads at the end, and what a program reads from `--json`: one table, headline numbers, and notes."""

import io
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsekit.files import replace_file


@dataclass
class Report:
    """A table with a summary above it and notes below.

    Attributes:
        title: one line.
        rows: one dict a row; columns appear in the order in which keys are first seen.
        summary: headline name -> value.
        notes: sentences the reader must not miss, as what fell back and why.
        numbers: what the summary says in words, as numbers for programs; not printed.
        ok: False when something that was promised does not hold; the command line then exits with 1.
    """

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    ok: bool = True
    numbers: dict[str, Any] = field(default_factory=dict)

    @property
    def columns(self) -> list[str]:
        return list(dict.fromkeys(key for row in self.rows for key in row))

    def to_dict(self) -> dict[str, Any]:
        return {
            "title": self.title,
            "ok": self.ok,
            "summary": self.summary,
            "numbers": self.numbers,
            "rows": self.rows,
            "notes": self.notes,
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """Return the report as JSON, and write it to `path` where one is given; NaN and infinity become text."""
        text = json_text(self.to_dict())
        if path is not None:
            write_json(Path(path), text)
        return text

    def print(self, console: Any = None) -> None:
        """Show the report on `console` (a `rich.console.Console`; the terminal where none is given)."""
        from rich.console import Console
        from rich.markup import escape
        from rich.table import Table

        if console is None:
            console = Console()
            if not console.is_terminal:  # a file or a pipe has no width: do not fold the table to rich's 80
                console = Console(width=160)
        console.print(f"[bold]{escape(self.title)}[/bold]", highlight=False)
        for name, value in self.summary.items():
            console.print(f"  {escape(name)}: {escape(show(value))}", highlight=False)
        if self.rows:
            table = Table()
            for column in self.columns:
                numeric = all(isinstance(row.get(column), int | float | None) for row in self.rows)
                table.add_column(
                    escape(column), justify="right" if numeric else "left", overflow="fold", no_wrap=numeric
                )
            for row in self.rows:
                table.add_row(*(escape(show(row.get(column))) for column in self.columns))
            console.print(table)
        for note in self.notes:
            console.print(f"  • {escape(note)}", highlight=False)

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        self.print(Console(file=text, width=140, color_system=None))
        return text.getvalue().rstrip()


def json_text(document: Any) -> str:
    """Return a document as JSON that every reader takes: what it cannot say, NaN and infinity, stands as text."""
    return json.dumps(_plain(document), indent=2, default=str, allow_nan=False)


def write_json(path: Path, text: str) -> None:
    """Write JSON to a file, whole or not at all; a pipe or a device is written to, not replaced."""
    if path.is_symlink() or (path.exists() and not path.is_file()):
        path.write_text(text + "\n", encoding="utf-8")
    else:
        with replace_file(path) as temporary:
            temporary.write_text(text + "\n", encoding="utf-8")


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def show(value: Any) -> str:
    """Return a cell as people read it: four significant digits, thousands apart, nothing for None."""
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        if value != value or value in (float("inf"), float("-inf")):
            return str(value)
        return f"{value:,.0f}" if abs(value) >= 10_000 else f"{value:.4g}"
    return str(value)
