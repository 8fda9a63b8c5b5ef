"""The models of one run in a picture: what each sparsity costs, and what it gains in time."""

import io
from collections.abc import Sequence
from typing import Any

GREY, DENSE = "#777777", "#777777"
COLORS = {"prefill ms": "#2563a8", "decode ms": "#d9782d"}


def draw_family(rows: Sequence[dict[str, Any]], title: str) -> bytes:
    """Return a PNG: perplexity against sparsity, and against the time of a prompt and of a token.

    Args:
        rows: the dense model first; "sparsity", "perplexity", and times as "prefill ms" where they were measured.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    rows = [row for row in rows if "perplexity" in row]
    timed = [key for key in COLORS if all(key in row for row in rows)]
    figure = Figure(figsize=(4.6 * (1 + len(timed)), 3.6), layout=ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1))
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    panels = figure.subplots(1, 1 + len(timed), squeeze=False, sharey=True)[0]
    _draw(panels[0], [100 * row["sparsity"] for row in rows], rows, "#2563a8", "sparsity of the blocks, %")
    for key, axes in zip(timed, panels[1:], strict=True):
        what = "prompt" if key.startswith("prefill") else "decoded token"
        _draw(axes, [row[key] for row in rows], rows, COLORS[key], f"milliseconds for a {what}, batch 1")
    panels[0].set_ylabel("perplexity of held-out text", color=GREY)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()


def _draw(axes: Any, places: Sequence[float], rows: Sequence[dict[str, Any]], color: str, what: str) -> None:
    """Draw one curve with a dot for each model; that of the dense one is hollow."""
    values = [row["perplexity"] for row in rows]
    order = sorted(range(len(rows)), key=lambda index: places[index])
    axes.plot([places[i] for i in order], [values[i] for i in order], color=color, linewidth=1.7)
    axes.plot(places[1:], values[1:], "o", color=color, markersize=5)
    axes.plot(places[:1], values[:1], "o", color=DENSE, markerfacecolor="white", markersize=6, label="dense")
    axes.axhline(values[0], color=GREY, linestyle=(0, (2, 2)), linewidth=1)
    axes.set_xlabel(what, color=GREY)
    axes.legend(frameon=False, fontsize=9)
    axes.grid(color="#ececec", linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
