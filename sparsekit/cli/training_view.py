"""Training as people watch it: a bar and a live table while it runs, and a plot of the whole of it."""

import math
import time
from pathlib import Path
from typing import Any, cast

from transformers import TrainerCallback

from sparsekit.report import show

COLUMNS = {
    "loss": "loss",
    "perplexity": "perplexity",
    "kd_loss": "KL",
    "flip_rate": "flips",
    "initial_flip_rate": "since start",
    "revived": "revived",
    "masked_energy": "masked energy",
    "masked_decay": "lambda",
    "learning_rate": "learning rate",
}
"""Key of the log -> heading. Perplexity is that of the evaluation text, as often as it is read."""

ROWS_SHOWN = 12


class TrainingView(TrainerCallback):
    """Shows the log of a run; use as `with TrainingView(trainer, console, live) as view: trainer.add_callback(view)`.

    Args:
        console: a `rich.console.Console`; None shows nothing, as on all processes but the first.
        live: a bar and a table that move, where the console is a terminal; else a line for each entry of the log.
    """

    def __init__(self, trainer: Any, console: Any, live: bool) -> None:
        self._console, self._live = console, cast(Any, None)
        self._rows: list[dict[str, Any]] = []
        self._started = time.monotonic()
        self._wants_live = live and console is not None and console.is_terminal

    def __enter__(self) -> "TrainingView":
        if self._wants_live:
            from rich.live import Live

            self._live = Live(console=self._console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._update(state)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        entry = {"step": state.global_step, **(logs or {})}
        if "eval_perplexity" in entry:
            entry = {"step": state.global_step, "perplexity": entry["eval_perplexity"]}
        elif "loss" not in entry:
            return
        if self._rows and self._rows[-1]["step"] == state.global_step:
            self._rows[-1] |= entry
        else:
            self._rows.append(entry)
        if self._console is not None and self._live is None:
            shown = (f"{heading} {show(entry[key])}" for key, heading in COLUMNS.items() if key in entry)
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown), markup=False, highlight=False
            )
        self._update(state)

    def _update(self, state: Any) -> None:
        if self._live is None:
            return
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        table = Table("step", *COLUMNS.values())
        for row in self._rows[-ROWS_SHOWN:]:
            table.add_row(str(row["step"]), *(show(row[key]) if key in row else "" for key in COLUMNS))
        passed = time.monotonic() - self._started
        left = passed / max(state.global_step, 1) * (state.max_steps - state.global_step)
        text = f"step {state.global_step} of {state.max_steps}, {_clock(passed)} passed, about {_clock(left)} left"
        bar = ProgressBar(total=state.max_steps, completed=state.global_step)
        self._live.update(Group(table, bar, text))


def refuse_without_matplotlib() -> None:
    """Raise ValueError where plots cannot be drawn: now, and not after hours of training."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ValueError(
            "the plot of training needs matplotlib: pip install 'sparsekit-torch[train]', or --no-plot"
        ) from error


def plot_training(history: list[dict[str, Any]], freeze_step: int, path: Path) -> None:
    """Write a PNG with loss and perplexity, flip rates, and lambda over the steps.

    Args:
        history: `trainer.state.log_history`.
        freeze_step: marked by a line: masks stay from there on.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 9), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(3, 1, sharex=True)
    groups = (
        ("loss", {"loss": "training loss", "kd_loss": "KL from the teacher", "eval_loss": "held-out cross entropy"}),
        ("share of the weights", {"flip_rate": "flips at a refresh", "initial_flip_rate": "since the start"}),
        ("pull on removed weights", {"masked_decay": "lambda", "masked_energy": "masked energy"}),
    )
    for panel, (title, keys) in zip(panels, groups, strict=True):
        for key, label in keys.items():
            points = [(entry["step"], entry[key]) for entry in history if key in entry]
            target = panel
            if key == "masked_energy" and points:
                target = panel.twinx()
                target.set_ylabel(label)
                target.set_yscale("log")
            if points:
                target.plot(
                    *zip(*points, strict=True),
                    label=label,
                    marker="." if len(points) < 30 else None,
                    color="tab:orange" if target is not panel else None,
                )
        panel.set_ylabel(title)
        panel.axvline(freeze_step, color="grey", linestyle=":", label="masks stay")
        panel.legend(loc="upper right")
    panels[1].set_yscale("symlog", linthresh=1e-6)
    panels[-1].set_xlabel("optimizer step")
    figure.savefig(path, dpi=120, format="png")


def _clock(seconds: float) -> str:
    seconds = math.ceil(seconds)
    return (
        f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        if seconds >= 3600
        else (f"{seconds // 60}:{seconds % 60:02}")
    )
