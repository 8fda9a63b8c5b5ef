"""Progress bars on work that takes long enough to wonder."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol


class Progress(Protocol):
    """A bar that has been started."""

    def advance(self, steps: int = 1, text: str | None = None) -> None: ...

    def expect(self, total: int) -> None:
        """Say how many steps there are in all, once that is known."""


class _Silent:
    def advance(self, steps: int = 1, text: str | None = None) -> None:
        """Show nothing."""

    def expect(self, total: int) -> None:
        """Show nothing."""


@contextmanager
def progress_bar(description: str, total: int, enabled: bool = True) -> Iterator[Progress]:
    """Show a bar on stderr while the body runs; `advance(steps, text)` moves it and says what is under way."""
    if not enabled:
        yield _Silent()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[text]}"),
    )
    with RichProgress(*columns, console=Console(stderr=True)) as rich_progress:
        task = rich_progress.add_task(description, total=total, text="")

        class Bar:
            def advance(self, steps: int = 1, text: str | None = None) -> None:
                rich_progress.advance(task, steps)
                if text is not None:
                    rich_progress.update(task, text=text)

            def expect(self, total: int) -> None:
                rich_progress.update(task, total=total)

        yield Bar()
