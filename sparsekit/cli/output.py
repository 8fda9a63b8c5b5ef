"""What a command shows, and what it writes to `--json`; errors become exit statuses here."""

import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import typer

from sparsekit.benchmarking import environment
from sparsekit.errors import SparsekitError
from sparsekit.files import why_not_writable
from sparsekit.report import Report, json_text, write_json

WIDTH_OF_FILES = 140


class Output:
    """Shows reports as they come, and keeps them for the JSON document.

    Attributes:
        progress: whether to show bars.
    """

    def __init__(self, command: str, json_path: str | None, quiet: bool, errors_only: bool) -> None:
        from rich.console import Console

        # Where the JSON goes to stdout, people read stderr.
        stream = sys.stderr if json_path == "-" else sys.stdout
        self.console = Console(file=stream, width=None if stream.isatty() else WIDTH_OF_FILES, quiet=errors_only)
        self.progress = not quiet
        self.document: dict[str, Any] = {"command": command, "ok": True}
        self._json_path = json_path

    @property
    def is_silent(self) -> bool:
        """Whether errors alone are shown."""
        return self.console.quiet

    def be_silent(self) -> None:
        """From now on show errors alone and write no JSON: of several processes one speaks."""
        self.console.quiet, self.progress, self._json_path = True, False, None

    def add(self, name: str, report: Report, shown: Report | None = None) -> Report:
        """Show a report and keep it as `name`; `shown` is what people see of it where that differs."""
        (shown or report).print(self.console)
        self.console.print()
        self.document[name] = report.to_dict()
        self.document["ok"] = self.document["ok"] and report.ok
        return report

    def say(self, text: str) -> None:
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def warn(
        self,
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        """Show a warning in one line, and keep ours."""
        if category is UserWarning:
            if not self.is_silent:
                _complain(f"warning: {message}")
            self.document.setdefault("warnings", []).append(str(message))

    def write_json(self) -> None:
        if self._json_path is None:
            return
        self.document["environment"] = environment()
        text = json_text(self.document)
        if self._json_path == "-":
            print(text)
        else:
            write_json(Path(self._json_path), text)


@contextmanager
def running(
    command: str, json_path: str | None, quiet: bool, debug: bool, errors_only: bool = False
) -> Iterator[Output]:
    """Yield the `Output` of one command, and end the process with the status that its outcome deserves.

    ValueError and a missing file are the caller's mistakes, 2; everything else that goes wrong is 1.

    Args:
        quiet: no bars.
        errors_only: no reports and warnings either.
    """
    output = Output(command, json_path, quiet, errors_only)
    if json_path is not None and (obstacle := _why_not_writable(json_path)):
        _complain(f"--json {json_path}: {obstacle}")
        raise typer.Exit(2)
    try:
        with warnings.catch_warnings():
            warnings.showwarning = output.warn
            yield output
        status = 0 if output.document["ok"] else 1
    except KeyboardInterrupt as error:
        _complain(" ".join(["interrupted: nothing was left half-written", *_notes(error)]))
        raise typer.Exit(130) from None
    except Exception as error:
        if debug:
            traceback.print_exc()
        mistake = isinstance(error, ValueError | FileNotFoundError | NotADirectoryError)
        status = 2 if mistake and not isinstance(error, SparsekitError) else 1
        message = " ".join([_one_line(error), *_notes(error)])
        _complain(message)
        output.document |= {"ok": False, "error": message}
    try:
        output.write_json()
    except OSError as error:
        _complain(f"--json {json_path} could not be written: {_one_line(error)}")
        status = status or 1
    if status:
        raise typer.Exit(status)


def _why_not_writable(json_path: str) -> str | None:
    """Return what would keep a file from being written there, seen before the work and without leaving a trace."""
    path = Path(json_path)
    try:
        if path.is_dir():
            return "is a folder, name a file"
        if json_path == "-" or (path.exists() and not path.is_file()):
            return None
    except OSError as error:
        return f"cannot be written ({error.strerror or error})"
    return why_not_writable(path)


def _complain(message: str) -> None:
    print(f"sparsekit: {message}", file=sys.stderr)


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    told = isinstance(error, SparsekitError | ValueError | OSError)
    return text if told else f"{type(error).__name__}: {text} (--debug shows where)"


def _notes(error: BaseException) -> list[str]:
    """Return what was added to an error on its way: where the work done so far is."""
    return [f"({note})" for note in getattr(error, "__notes__", [])]
