"""Training as people watch it: a bar and a live table while it runs, and a plot of the whole of it."""

import math
import time
from dataclasses import dataclass
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
    "target_sparsity": "target",
    "real_sparsity": "sparsity",
    "teacher_sparsity": "teacher's",
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
                f"step {state.global_step}/{state.max_steps}  " + "  ".join(shown),
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        self._update(state)

    def _update(self, state: Any) -> None:
        if self._live is None:
            return
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        columns = {key: heading for key, heading in COLUMNS.items() if any(key in row for row in self._rows)}
        table = Table("step", *columns.values())
        for row in self._rows[-ROWS_SHOWN:]:
            table.add_row(str(row["step"]), *(show(row[key]) if key in row else "" for key in columns))
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


@dataclass(frozen=True)
class Panel:
    """What a panel of the plot shows.

    Attributes:
        curves: key of the log -> name.
        is_log: for numbers that fall through orders of magnitude, to zero maybe.
    """

    title: str
    unit: str
    curves: dict[str, str]
    is_log: bool = False


PANELS = (
    Panel("Training loss", "all terms, nats a token", {"loss": "training loss"}),
    Panel("Perplexity", "of held-out text", {"eval_perplexity": "perplexity"}),
    Panel("Distance from the teacher", "KL, nats a token", {"kd_loss": "KL from the teacher"}),
    Panel("Flips", "share of the weights", {"flip_rate": "at a refresh", "initial_flip_rate": "since the start"}, True),
    Panel("Pull on removed weights", "lambda", {"masked_decay": "lambda"}),
    Panel("What is left of removed weights", "share of the energy", {"masked_energy": "masked energy"}, True),
    Panel(
        "Sparsity",
        "share of the blocks' cost",
        {"target_sparsity": "target", "real_sparsity": "student", "teacher_sparsity": "teacher"},
    ),
    Panel("Lagrange multipliers", "", {"multiplier_linear": "linear", "multiplier_square": "square"}),
)
COLORS, GREY = ("#2563a8", "#d9782d", "#3d8b57"), "#777777"


def plot_training(history: list[dict[str, Any]], freeze_step: int, path: Path) -> None:
    """Write a PNG of what the log holds over the steps: a panel for each kind of number, on an axis of its own.

    Args:
        history: `trainer.state.log_history`.
        freeze_step: marked by a line: masks stay from there on.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    logged = {key for entry in history for key in entry}
    shown = [panel for panel in PANELS if logged & panel.curves.keys()] or list(PANELS[:1])
    rows = math.ceil(len(shown) / 2)
    figure = Figure(figsize=(11, 2.7 * rows + 0.6), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 2, squeeze=False, sharex=True).flatten()
    for panel, panel_axes in zip(shown, axes, strict=False):
        _draw(panel, panel_axes, history)
        line = panel_axes.axvline(freeze_step, color=GREY, linestyle=(0, (2, 2)), linewidth=1)
    for unused in axes[len(shown) :]:
        unused.remove()
    for lowest in axes[max(len(shown) - 2, 0) : len(shown)]:
        lowest.set_xlabel("optimizer step", color=GREY)
        lowest.tick_params(labelbottom=True)
    figure.legend([line], [f"masks stay from step {freeze_step:,} on"], loc="outside lower center", frameon=False)
    figure.savefig(path, dpi=130, format="png")


def _draw(panel: Panel, axes: Any, history: list[dict[str, Any]]) -> None:
    """Draw the curves of a panel, their names above it."""
    values: list[float] = []
    for (key, name), color in zip(panel.curves.items(), COLORS, strict=False):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            marker = "o" if len(points) < 30 else None
            axes.plot(*zip(*points, strict=True), label=name, color=color, linewidth=1.7, marker=marker, markersize=3.5)
        values += [value for _, value in points]
    if panel.is_log and values and min(values) > 0:
        axes.set_yscale("log")
    elif panel.is_log and any(values):
        axes.set_yscale("symlog", linthresh=min(value for value in values if value))
    if panel.is_log and 0 in values:
        axes.set_ylim(bottom=0)
    axes.set_title(panel.title, loc="left", fontsize=11, fontweight="bold")
    axes.set_ylabel(panel.unit, color=GREY)
    if axes.lines:
        axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, frameon=False, fontsize=9, borderaxespad=0.3)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _clock(seconds: float) -> str:
    seconds = math.ceil(seconds)
    return (
        f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}"
        if seconds >= 3600
        else (f"{seconds // 60}:{seconds % 60:02}")
    )
