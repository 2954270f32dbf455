"""The colours of pages and figures, on a light and on a dark ground.

Text has a contrast of 4.5 or more to its ground, marks one of 3 or more, as WCAG 2.2 asks;
a test computes both.
"""

_BLUE = "#0060a0", "#6cc0f0"
_ORANGE = "#b34a00", "#ff9c52"
_GREY = "#5a5a5a", "#a8a8a8"
#: What a page is made of, light and dark: `quiet` is for second things, `line` for rules between rows.
PAGE = {
    "ink": ("#1b1b1b", "#e8e8e8"),
    "quiet": _GREY,
    "ground": ("#ffffff", "#16181b"),
    "band": ("#f4f4f4", "#1f2226"),
    "line": ("#d0d0d0", "#3a3d42"),
    "edge": ("#767676", "#8a8f96"),
    "better": _BLUE,
    "worse": _ORANGE,
}
#: Hues of families of tasks. Lines that belong to no family take the same ones in this order.
FAMILIES = {
    "knowledge": _BLUE,
    "truthfulness": _ORANGE,
    "commonsense": ("#00704f", "#4ecaa4"),
    "instruction_following": ("#a52a75", "#f58fc8"),
    "language_modeling": ("#6344b0", "#b9a3f5"),
    "reasoning": ("#775900", "#d9bd4e"),
    "other": _GREY,
}
_EVERY = PAGE | {f"family-{name}": hues for name, hues in FAMILIES.items()}
#: The colours of both schemes, by the names of a page's variables.
VARIABLES = {
    scheme: {name: hues[number] for name, hues in _EVERY.items()}
    for number, scheme in enumerate(("light", "dark"))
}
_LIGHT, _DARK = (
    " ".join(f"--{name}: {colour};" for name, colour in colours.items())
    for colours in VARIABLES.values()
)
#: The style sheet that gives a page these variables, as its reader's screen is.
STYLE = f":root {{ {_LIGHT} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"
