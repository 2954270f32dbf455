"""The colours of pages and figures, on a light and on a dark ground.

Text has a contrast of 4.5 or more to its ground, marks one of 3 or more, as WCAG 2.2 asks;
a test computes both.
"""

from __future__ import annotations


#: What a page is made of, light and dark: `quiet` is for second things, `line` for rules between rows.
PAGE = {
    "ink": ("#1b1b1b", "#e8e8e8"),
    "quiet": ("#5a5a5a", "#a8a8a8"),
    "ground": ("#ffffff", "#16181b"),
    "band": ("#f4f4f4", "#1f2226"),
    "line": ("#d0d0d0", "#3a3d42"),
    "edge": ("#767676", "#8a8f96"),
    "better": ("#0060a0", "#6cc0f0"),
    "worse": ("#b34a00", "#ff9c52"),
}
#: Hues of families of tasks. Lines that belong to no family take the same ones in this order.
FAMILIES = {
    "knowledge": ("#0060a0", "#6cc0f0"),
    "truthfulness": ("#b34a00", "#ff9c52"),
    "commonsense": ("#00704f", "#4ecaa4"),
    "instruction_following": ("#a52a75", "#f58fc8"),
    "language_modeling": ("#6344b0", "#b9a3f5"),
    "reasoning": ("#775900", "#d9bd4e"),
    "other": ("#5a5a5a", "#a8a8a8"),
}


def variables(scheme: str) -> dict[str, str]:
    """Return the colours of a scheme, ``light`` or ``dark``, by the names of a page's variables.

    Example:
        >>> variables("light")["family-knowledge"], variables("dark")["ground"]
        ('#0060a0', '#16181b')
    """
    every = PAGE | {f"family-{name}": hues for name, hues in FAMILIES.items()}
    number = ("light", "dark").index(scheme)
    return {name: colours[number] for name, colours in every.items()}


def style() -> str:
    """Return the style sheet that gives a page these variables, as its reader's screen is."""
    light, dark = (
        " ".join(f"--{name}: {colour};" for name, colour in variables(scheme).items())
        for scheme in ("light", "dark")
    )
    return f":root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
