"""The colours of pages and figures, on a light and on a dark ground.

Text stands out from its ground by a contrast of 4.5 or more, marks by 3 or more, as WCAG 2.2
asks; a test computes both from what stands here.
"""

from __future__ import annotations


#: By scheme: what a page is made of. `quiet` is for second things, `line` for rules between rows.
PAGE = {
    "light": {
        "ink": "#1b1b1b",
        "quiet": "#5a5a5a",
        "ground": "#ffffff",
        "band": "#f4f4f4",
        "line": "#d0d0d0",
        "edge": "#767676",
        "better": "#0060a0",
        "worse": "#b34a00",
    },
    "dark": {
        "ink": "#e8e8e8",
        "quiet": "#a8a8a8",
        "ground": "#16181b",
        "band": "#1f2226",
        "line": "#3a3d42",
        "edge": "#8a8f96",
        "better": "#6cc0f0",
        "worse": "#ff9c52",
    },
}
#: By scheme: families of tasks. Cool colours are what pruning takes, warm ones what it leaves.
FAMILIES = {
    "light": {
        "knowledge": "#0060a0",
        "commonsense": "#00704f",
        "language_modeling": "#6344b0",
        "truthfulness": "#b34a00",
        "instruction_following": "#a52a75",
        "reasoning": "#775900",
        "other": "#5a5a5a",
    },
    "dark": {
        "knowledge": "#6cc0f0",
        "commonsense": "#4ecaa4",
        "language_modeling": "#b9a3f5",
        "truthfulness": "#ff9c52",
        "instruction_following": "#f58fc8",
        "reasoning": "#d9bd4e",
        "other": "#a8a8a8",
    },
}
#: By scheme: lines that are of no family, in the order of the hues of Okabe and Ito 2008.
LINES = {
    "light": ("#0072b2", "#c25200", "#00805c", "#b0558a", "#8a6500", "#5b5bb5"),
    "dark": ("#56b4e9", "#ff8a3d", "#2fc79a", "#e495c0", "#e6b53a", "#a5a5f5"),
}


def variables(scheme: str) -> dict[str, str]:
    """Return the colours of a scheme by the names that a page's styles call them.

    Args:
        scheme: ``light`` or ``dark``.

    Example:
        >>> variables("light")["family-knowledge"], variables("dark")["line-0"]
        ('#0060a0', '#56b4e9')
    """
    lines = {f"line-{number}": each for number, each in enumerate(LINES[scheme])}
    families = {f"family-{name}": each for name, each in FAMILIES[scheme].items()}
    return PAGE[scheme] | families | lines


def contrast(one: str, other: str) -> float:
    """Return the contrast of two colours, from 1 to 21.

    Source: WCAG 2.2, relative luminance and contrast ratio.

    Args:
        one: Such as ``#16181b``.
        other: The other.

    Example:
        >>> contrast("#000000", "#ffffff")
        21.0
    """
    lower, higher = sorted((_luminance(one), _luminance(other)))
    return (higher + 0.05) / (lower + 0.05)


def _luminance(colour: str) -> float:
    parts = (int(colour[start : start + 2], 16) / 255 for start in (1, 3, 5))
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in parts
    ]
    return sum(
        weight * part
        for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True)
    )
