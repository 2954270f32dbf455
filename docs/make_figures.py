"""Draw the figures of the README and of the pages on pruning: ``python docs/make_figures.py``.

Reads ``price.csv``, ``probes_kept.csv``, ``recipes.csv`` and ``price_nats.csv`` in ``docs/measurements``, and writes one SVG
beside each of the first three, of recipes another for dark pages. Needs the extra ``report``.
"""

from __future__ import annotations

from pathlib import Path

import altair as alt
import pandas as pd

from lm_eval_pruned.util.figures import HUES, Plot, line_look, lines


ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "measurements"
PRICES = ("uniform maw", "uniform act", "sensitivity maw", "sensitivity best", "random")
#: Rows of ``recipes.csv``, the last three of ``price_nats.csv``, and what the figure calls them.
RECIPES = {
    "maw": "study (maw)",
    "random": "random",
    "fast": "fast",
    "act, no repair": "act, no repair",
    "nats (best), inputs of the unpruned model": "best",
    "nats (uneven), inputs of the unpruned model": "uneven",
}
#: Methods of ``probes_kept.csv``.
KEPT = ("maw", "random", "act", "best")
KEPT_AS = ("study (maw)", "random", "act, no repair", "best")
#: Models of ``recipes.csv``, and the titles of their panels.
MODELS = {"SmolLM2": "SmolLM2-135M-Instruct", "Gemma-3": "Gemma-3-270M"}
REMOVED = alt.X("percent:Q", title="neurons removed, %")


def over_sizes(rows: pd.DataFrame, value: str, names: tuple[str, ...]) -> pd.DataFrame:
    """Return a line for each of `names`, from the unpruned model on; seeds as mean, lowest and highest."""
    of = rows["method"].str.replace(r", seed \d+$", "", regex=True)
    start = rows[of == "unpruned"]
    drawn = [
        pd.concat([start, rows[of == name]]).assign(line=name, value=lambda r: r[value])
        for name in names
        if (of == name).any()
    ]
    by = pd.concat(drawn).groupby(["line", "percent"], as_index=False)["value"]
    return by.agg(value="mean", low="min", high="max")


def level(at: float, y: alt.Y) -> alt.Chart:
    """Return a dotted rule."""
    chart = alt.Chart(pd.DataFrame({"value": [at]}))
    return chart.mark_rule(strokeDash=[2, 2]).encode(y=y)


def look_of(names: tuple[str, ...]) -> dict[str, alt.Color]:
    """Return a colour for each name; chance has that of the text."""
    hues = {name: HUES[n % len(HUES)] for n, name in enumerate(names)}
    return line_look(names, hues | {"random": "var(--ink)"})


def kept() -> Plot:
    """Draw the share of both probes that is kept over the share removed, a row for each model."""
    rows = pd.read_csv(PAGES / "probes_kept.csv", dtype={"level": str})
    rows = rows[(rows["level"] == "all") & (rows["metric"] == "lift")]
    rows = rows.replace({"method": dict(zip(KEPT, KEPT_AS, strict=True))})
    y = alt.Y("value:Q", title="kept", axis=alt.Axis(format="%"))
    start = pd.DataFrame([{"method": "unpruned", "percent": 0, "kept": 1.0}])
    panels = []
    for model, title in MODELS.items():
        for probe in ("knowledge", "instructions"):
            of = rows[(rows["model"] == model) & (rows["probe"] == probe)]
            of = pd.concat([start, of])
            drawn = lines(over_sizes(of, "kept", KEPT_AS), REMOVED, y, look_of(KEPT_AS))
            drawn += level(0, y)
            panel = drawn.properties(title=f"{title}: {probe}", width=260, height=200)
            panels.append(panel)
    said = (
        "Share of the lift (log-likelihood of the right answer beside the wrong ones) that is left. "
        "Dotted: a model that does not read the prompt. Band: five random choices of neurons."
    )
    title = "What is kept of knowledge and of following instructions"
    return Plot("kept", title, said, alt.concat(*panels, columns=2))


def price() -> Plot:
    """Draw the loss of SmolLM2 on held speeches over the share removed."""
    rows = pd.read_csv(PAGES / "price.csv")
    rows = rows[(rows["table"] == "loss") & (rows["model"] == "SmolLM2")]
    scale = alt.Scale(zero=False, domain=[3, 10], clamp=True)
    y = alt.Y("value:Q", title="loss on held speeches, nats per token", scale=scale)
    drawn = lines(over_sizes(rows, "value", PRICES), REMOVED, y, look_of(PRICES))
    drawn += level(rows[rows["method"] == "unpruned"]["value"].iloc[0], y)
    said = (
        "Dotted: the unpruned model. Band: three random choices of neurons. "
        "What lies above 10 is drawn at 10."
    )
    return Plot("price", "SmolLM2-135M-Instruct", said, drawn)


def recipes() -> Plot:
    """Draw the rise in loss on held text by recipe over the share removed, a panel for each model."""
    rows = pd.read_csv(PAGES / "recipes.csv", comment="#")
    unpruned = rows[rows["method"] == "unpruned"].set_index("model")["mean"]
    rows["rise"] = rows["mean"] - rows["model"].map(unpruned)
    # In this file, best has the plain order that it had once, and act half of the text.
    rows = rows[~rows["method"].isin(["act", "best"])]
    # Rises of the other one are over the unpruned model on its own draw of documents.
    rows = pd.concat([rows, pd.read_csv(PAGES / "price_nats.csv", comment="#")])
    rows = rows.rename(columns={"removed": "percent"}).replace({"method": RECIPES})
    names = tuple(RECIPES.values())
    scale = alt.Scale(type="log", domain=[0.1, 10])
    y = alt.Y("value:Q", title="rise in nats per token", scale=scale)
    panels = []
    for model, title in MODELS.items():
        of = rows[rows["model"] == model]
        cut = over_sizes(of, "rise", names)
        # A logarithm has no place for the unpruned model, which rises by 0.
        drawn = lines(cut[cut["percent"] > 0], REMOVED, y, look_of(names))
        panels.append(drawn.properties(title=title, width=300, height=220))
    said = "Mean of seven kinds of text. Calibration read none of them."
    # One below the other, so that letters stay readable on a telephone.
    panel = alt.concat(*panels, columns=1)
    return Plot("recipes", "Rise in loss on held text", said, panel)


def main() -> None:
    """Draw all figures."""
    for plot in (kept(), price(), recipes()):
        (PAGES / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")
    (PAGES / "recipes-dark.svg").write_text(recipes().dark_svg, encoding="utf-8")


if __name__ == "__main__":
    main()
