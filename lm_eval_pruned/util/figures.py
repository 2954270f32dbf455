"""How every figure looks, and the files that it becomes.

Colours are those of the palette, on white ground; no two lines differ in colour alone. Needs matplotlib (the extra ``report``).
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any, Literal

import matplotlib
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.ticker import ScalarFormatter

from lm_eval_pruned.util.palette import LINES


if TYPE_CHECKING:
    from collections.abc import Iterable
    from contextlib import AbstractContextManager

    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = LINES["light"]
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
STYLES: tuple[Literal["-", "--", "-.", ":"], ...] = ("-", "--", "-.", ":")
#: Drawn in this colour is what a page draws in the colour of its text.
INK = "#010203"

_SETTINGS: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "legend.frameon": False,
    "svg.fonttype": "none",
    "text.color": INK,
    # Names of tasks and models are text, whatever characters they hold.
    "text.parse_math": False,
    "xtick.color": INK,
    "ytick.color": INK,
}


def style(name: str, font_size: float = 9) -> AbstractContextManager[None]:
    """Let figures that are made in a ``with`` block look like all others.

    Args:
        name: Name of the figure: the same figure of this name gives the same SVG.
        font_size: Size of its text, in points.
    """
    return matplotlib.rc_context(
        {**_SETTINGS, "svg.hashsalt": name, "font.size": font_size}
    )


def line_look(number: int) -> dict[str, Any]:
    """Return what distinguishes a line from those with other numbers, for ``Axes.plot``."""
    return {
        "color": COLOURS[number % len(COLOURS)],
        "marker": MARKERS[number % len(MARKERS)],
        "linestyle": STYLES[number // len(COLOURS) % len(STYLES)],
    }


def over_ratios(axes: Axes, ratios: Iterable[float]) -> None:
    """Make the horizontal axis that of the expansion ratio, which falls to the right."""
    ticks = sorted(set(ratios))
    span = (ticks[-1] - ticks[0]) or 1.0
    # Ratios that are closer than a label is wide share one.
    spread = [ticks[0]]
    for tick in ticks[1:]:
        if tick - spread[-1] > span / 20:
            spread.append(tick)
    axes.set_xticks(spread, [f"{tick:.2f}" for tick in spread])
    axes.set_xlabel("expansion ratio (intermediate size / hidden size)")
    axes.invert_xaxis()


def as_svg(figure: Figure, *, transparent: bool = False) -> str:
    """Return an SVG file without a date, on white ground unless it is `transparent`."""
    _finish(figure)
    data = io.StringIO()
    metadata = {"Date": None, "Creator": None, "Format": None, "Type": None}
    ground = {"transparent": True} if transparent else {"facecolor": "white"}
    figure.savefig(data, format="svg", metadata=metadata, **ground)
    return data.getvalue()


def as_png(figure: Figure) -> bytes:
    """Return a PNG file on white ground, 200 dpi."""
    _finish(figure)
    data = io.BytesIO()
    metadata = {"Software": None}
    figure.savefig(data, format="png", dpi=200, metadata=metadata, facecolor="white")
    return data.getvalue()


def _finish(figure: Figure) -> None:
    for axes in figure.axes:
        formatter = axes.yaxis.get_major_formatter()
        if isinstance(formatter, ScalarFormatter):
            formatter.set_useOffset(False)
    FigureCanvasAgg(figure)
