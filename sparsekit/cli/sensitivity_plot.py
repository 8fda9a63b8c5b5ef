"""What the removal of each layer's units costs, and where the cut was made: one picture."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor

from sparsekit.archs import Width
from sparsekit.plan import Cut

GREY, LEFT, GONE = "#777777", "#2563a8", "#d9782d"
_TITLES = {"heads": "Attention heads", "channels": "MLP channels"}


def has_matplotlib() -> bool:
    """Return whether plots can be drawn here."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        return False
    return True


@dataclass(frozen=True)
class WidthLine:
    """A width in the picture.

    Attributes:
        kind: "heads" or "channels".
        num, kept: units before and after.
        curve: what the answers suffer with n units left, [num + 1]; None where that is not known.
    """

    kind: str
    num: int
    kept: int
    curve: Tensor | None


def width_lines(widths: Sequence[Width], cuts: Mapping[str, Cut], sensitivity: Mapping[str, Tensor]) -> list[WidthLine]:
    """Return the lines of a model's widths, in the order of its layers."""
    return [
        WidthLine(
            width.kind,
            width.num_units,
            len(cuts[width.name].kept) if width.name in cuts else width.num_units,
            sensitivity.get(width.name),
        )
        for width in widths
    ]


def draw_widths(lines: Sequence[WidthLine], title: str) -> bytes:
    """Return a PNG: for each kind, the curve of each layer with a dot at its cut, and below what each layer keeps."""
    from matplotlib import colormaps

    kinds = [kind for kind in _TITLES if any(line.kind == kind for line in lines)]
    has_curves = any(line.curve is not None for line in lines)
    figure, axes = _figure(1 + has_curves, len(kinds), title, shared="row" if has_curves else "all")
    for column, kind in enumerate(kinds):
        own = [line for line in lines if line.kind == kind]
        colors = colormaps["viridis"]([place / max(len(own) - 1, 1) * 0.9 for place in range(len(own))])
        if has_curves:
            _draw_curves(axes[0][column], own, colors)
        _draw_kept(axes[-1][column], own, colors)
        axes[0][column].set_title(_TITLES[kind], loc="left", fontsize=11, fontweight="bold")
        axes[-1][column].set_xlabel(
            f"layer (colours as above, {len(own)} layers)" if has_curves else "layer", color=GREY
        )
    if has_curves:
        axes[0][0].set_ylabel("divergence of the answers (KL, nats; or squared error)", color=GREY)
        axes[0][0].set_ylim(_range(lines))
    axes[-1][0].set_ylabel("kept, %", color=GREY)
    return _png(figure)


def draw_blocks(costs: Sequence[float], gone: Sequence[int], title: str, what: str) -> bytes:
    """Return a PNG with a bar for each block, those that went in another colour.

    Args:
        costs: of each block.
        gone: places of the blocks that went.
        what: the costs are.
    """
    figure, ((axes,),) = _figure(1, 1, title, shared="all")
    for label, color, places in (
        ("stays", LEFT, [place for place in range(len(costs)) if place not in gone]),
        ("taken out", GONE, list(gone)),
    ):
        axes.bar(places, [costs[place] for place in places], color=color, label=label)
    axes.set_xlabel("block", color=GREY)
    axes.set_ylabel(what, color=GREY)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.legend(frameon=False)
    return _png(figure)


def _draw_curves(axes: Any, lines: Sequence[WidthLine], colors: Any) -> None:
    """Draw what each layer's answers cost over the share of its units that is left."""
    for line, color in zip(lines, colors, strict=True):
        if line.curve is None:
            continue
        numbers = range(1, line.num)  # with all units nothing is lost, and a logarithm has no place for that
        axes.plot([100 * n / line.num for n in numbers], line.curve[1 : line.num], color=color, linewidth=1.3)
        if line.kept < line.num:
            axes.plot(
                100 * line.kept / line.num, line.curve[line.kept], "o", color=color, markersize=6, mec="white", zorder=3
            )
    axes.set_yscale("log")
    axes.set_xlabel("units left in this layer alone, % (dot: where it was cut)", color=GREY)
    axes.set_xlim(100, 0)


def _range(lines: Sequence[WidthLine]) -> tuple[float, float]:
    """Return what the curves span, without what the last few units of a layer cost, which is next to nothing."""
    known = [(line.curve, line.num) for line in lines if line.curve is not None and line.num > 1]
    lows = [float(curve[min(round(0.95 * num), num - 1)]) for curve, num in known]
    return min(lows, default=0.5) / 2, max((float(curve[1]) for curve, _ in known), default=0.5) * 2


def _draw_kept(axes: Any, lines: Sequence[WidthLine], colors: Any) -> None:
    """Draw what each layer keeps."""
    axes.bar(range(len(lines)), [100 * line.kept / line.num for line in lines], color=colors)
    axes.set_ylim(0, 100)
    axes.xaxis.get_major_locator().set_params(integer=True)


def _figure(rows: int, columns: int, title: str, shared: Literal["row", "all"]) -> tuple[Any, Any]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1)
    figure = Figure(figsize=(5.5 * columns + 0.5, 3.0 * rows + 0.7), layout=layout)
    FigureCanvasAgg(figure)
    ratios = [1.6, 1][:rows] if rows > 1 else None
    axes = figure.subplots(rows, columns, squeeze=False, sharey=shared, height_ratios=ratios)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    for each in axes.flatten():
        each.grid(color="#ececec", linewidth=0.8)
        each.set_axisbelow(True)
        each.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format="png")
    return buffer.getvalue()
