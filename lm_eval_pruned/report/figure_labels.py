"""What is written into a panel of a report's figure: names of lines, levels, and the unpruned model."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.optimize import isotonic_regression

from lm_eval_pruned.report.figure_data import AXES


if TYPE_CHECKING:
    from collections.abc import Sequence

#: Height of a panel, in pixels.
HEIGHT = 300
#: Height of a line of a name, in pixels.
LINE = 13
#: Letters of a line, so that the names of tasks fit beside a panel.
_LETTERS = 18


def rules_of(measure: str, y: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the lines of the unpruned model, and of chance where all tasks share it."""
    if measure == "raw":
        return []
    fixed = [{measure: 100}] + [{measure: 0}] * (measure == "above_chance")
    return [
        {
            "data": {"values": fixed},
            "mark": {"type": "rule", "color": "var(--ink)", "strokeWidth": 1},
            "encoding": {"y": y},
        }
    ]


def levels_of_panel(
    levels: Sequence[dict[str, Any]], measure: str, y: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return the lines of chance and of the commonest answer, with what they are of."""
    # Relative to unpruned, each task has a chance of its own: too many lines to tell apart.
    if measure != "raw" or not levels:
        return []
    same: dict[tuple[float, str], list[dict[str, Any]]] = {}
    for each in levels:
        same.setdefault((round(each[measure], 1), each["kind"]), []).append(each)
    low, high = y["scale"]["domain"]
    per_pixel = (high - low) / HEIGHT
    rules = [
        {
            "kind": kind,
            measure: place,
            "families": " ".join(sorted({each["family"] for each in of})),
            "text": f"{kind} of {', '.join(each['task'] for each in of)}",
            "label": label * per_pixel,
        }
        for ((place, kind), of), label in zip(
            sorted(same.items()),
            spread(
                [place / per_pixel for place, _ in sorted(same)], [LINE] * len(same)
            ),
            strict=True,
        )
    ]
    dash = {
        "field": "kind",
        "type": "nominal",
        "legend": None,
        "scale": {"domain": ["chance", "majority"], "range": [[7, 4], [1.5, 3]]},
    }
    told = {"tooltip": {"field": "text"}}
    text = {"type": "text", "align": "left", "baseline": "bottom", "dx": 3, "dy": -1}
    written = {
        "x": {"value": 0},
        "y": y | {"field": "label"},
        "text": {"field": "text"},
    }
    looks = (
        # Letters stand on lines and bands: what is around them is cleared first.
        {"stroke": "var(--ground)", "strokeWidth": 3, "strokeOpacity": 0.8},
        {"color": "var(--quiet)"},
    )
    data = {"values": rules}
    rule = {"type": "rule", "strokeWidth": 1.2, "color": "var(--edge)"}
    limit = {"limit": {"expr": "width"}, "fontSize": 10}
    return [
        {"data": data, "mark": rule, "encoding": {"y": y, "strokeDash": dash, **told}},
        *(
            {"data": data, "mark": text | limit | look, "encoding": written | told}
            for look in looks
        ),
    ]


def names_of(
    points: Sequence[dict[str, Any]],
    measure: str,
    domain: tuple[float, float],
    logarithmic: bool,
) -> list[dict[str, Any]]:
    """Return where the name of each task stands, so that no two overlap."""
    last = {point["task"]: point for point in points}
    scale = math.log if logarithmic else float
    low, high = map(scale, domain)
    per_pixel = (high - low) / HEIGHT or 1.0
    ends = sorted(last.values(), key=lambda point: point[measure])
    written = [in_lines(end["task"]) for end in ends]
    heights = spread(
        [(scale(end[measure]) - low) / per_pixel for end in ends],
        [LINE * len(lines) for lines in written],
    )
    names = []
    for end, lines, height in zip(ends, written, heights, strict=True):
        label = low + height * per_pixel
        # Vega puts the first line where it is told, and the others below.
        first = label + (len(lines) - 1) / 2 * LINE * per_pixel
        names.append(
            {
                "task": end["task"],
                "lines": lines,
                "family": end["family"],
                measure: end[measure],
                "label": math.exp(label) if logarithmic else label,
                "first": math.exp(first) if logarithmic else first,
                **{axis: end[axis] for axis in AXES},
            }
        )
    return names


def in_lines(name: str) -> list[str]:
    """Break a name after underscores into lines of at most 18 letters, where that is possible.

    Example:
        >>> in_lines("leaderboard_musr_object_placements")
        ['leaderboard_musr_', 'object_placements']
    """
    lines = [""]
    for part in re.findall("[^_]*_|[^_]+", name):
        if lines[-1] and len(lines[-1] + part) > _LETTERS:
            lines.append("")
        lines[-1] += part
    return lines


def spread(places: Sequence[float], heights: Sequence[float]) -> list[float]:
    """Move places as little as needed until nothing overlaps.

    Args:
        places: Of the middles, in rising order.
        heights: How much room each takes.

    Example:
        >>> spread([0.0, 1.0, 50.0], [10, 10, 10])
        [-4.5, 5.5, 50.0]
    """
    if not places:
        return []
    sizes = np.array(heights, dtype=float)
    # Less the room below each, places that do not overlap are in rising order.
    below = np.cumsum(sizes) - sizes / 2
    return (isotonic_regression(np.array(places) - below).x + below).tolist()
