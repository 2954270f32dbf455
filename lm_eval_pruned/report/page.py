"""The one page of `report` and `verdict`: sections as HTML and Markdown, with their plots."""

from __future__ import annotations

import base64
import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.util.atomic import write_atomically
from lm_eval_pruned.util.palette import STYLE
from lm_eval_pruned.util.tables import Column, Table


if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from lm_eval_pruned.results.files import Run
    from lm_eval_pruned.util.figures import Plot


@dataclass(frozen=True)
class Section:
    """One section; any of its parts may be missing.

    `scripts` draw one of the plots at a time, as a reader chooses; `code` is JSON that the page shows
    when a reader clicks at `folded`, `links` are texts with the names of files beside the report.
    """

    heading: str
    paragraphs: Sequence[str] = ()
    table: Table | None = None
    plots: Sequence[Plot] = ()
    scripts: Sequence[str] = ()
    code: str = ""
    folded: str = ""
    notes: Sequence[str] = ()
    links: Sequence[tuple[str, str]] = ()


def table_section(
    heading: str,
    paragraphs: Sequence[str],
    columns: Sequence[Column],
    rows: Sequence[Any],
    notes: Sequence[str] = (),
) -> Section | None:
    """Return a section of one table that has its heading; None without rows."""
    table = Table(heading, columns, rows)
    return Section(heading, paragraphs, table, notes=notes) if rows else None


def run_label(run: Run) -> str:
    """Return what a run is called where its size matters, such as ``p20 (3.20)``."""
    if (ratio := run.expansion_ratio) is None:
        return run.name
    return f"{run.name} ({'unpruned, ' * run.is_baseline}{ratio:.2f})"


def rendered(template: str, **values: Any) -> str:
    """Return one page that needs no other file and no network, in the colours of reports."""
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("lm_eval_pruned.report", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    shared = {"colours": STYLE, "only_these": only_these}
    page = environment.get_template(template).render(values, **shared)
    # What models write may hold halves of characters.
    return page.encode("utf-8", "replace").decode("utf-8")


def only_these(scripts: Sequence[str]) -> str:
    """Return the ``script-src`` of a page's policy that runs these scripts and no other.

    Example:
        >>> only_these([])
        "'none'"
    """
    digests = (hashlib.sha256(script.encode("utf-8")).digest() for script in scripts)
    sources = [f"'sha256-{base64.b64encode(code).decode()}'" for code in digests]
    return " ".join(sources) or "'none'"


def write_page(
    folder: Path,
    stem: str,
    title: str,
    subtitle: str,
    sections: Sequence[Section],
    scores: str,
) -> list[Path]:
    """Write a page as HTML and as Markdown, and its plots; return the files, the HTML first.

    `scores` are the CSV that the HTML hands on.
    """
    scripts = [script for section in sections for script in section.scripts]
    shown: Any = {"title": title, "subtitle": subtitle, "sections": sections}
    csv = base64.b64encode(scores.encode("utf-8")).decode("ascii")
    page = rendered("template.html", **shown, scores=csv, scripts=scripts)
    files: dict[str, str | bytes] = {f"{stem}.html": page}
    files[f"{stem}.md"] = as_markdown(**shown)
    for plot in (plot for section in sections for plot in section.plots):
        files |= plot.files("plots/")
    for name, content in files.items():
        write_atomically(folder / name, content)
    return [folder / name for name in files]


#: GitHub looks for names to notify in the text that it shows, so that an entity for @ hides nothing.
_ESCAPES = {"&": "&amp;", "<": "&lt;", "@": "@&#8203;", "!": "&#33;"}


def as_markdown(
    title: str, subtitle: str, sections: Sequence[Section], *, terminal: bool = False
) -> str:
    """Return a report as Markdown; the plots are links to files below ``plots/``.

    For a `terminal`, tables are padded, and what would be HTML is left as it is. Elsewhere texts of strangers
    show no image, and nobody is told that a comment names them.
    """
    escapes = {} if terminal else str.maketrans(_ESCAPES)
    in_line = escapes | str.maketrans({"|": "\\|", "\n": " "})
    plain = lambda text: text.translate(in_line)
    parts = [f"# {plain(title)}", plain(subtitle)]
    for section in sections:
        parts += [f"## {section.heading}", *map(plain, section.paragraphs)]
        parts += [f"[{plain(text)}]({file})" for text, file in section.links]
        if section.table:
            parts.append(section.table.markdown(padded=terminal, escapes=escapes))
        for plot in section.plots:
            text = f"{plot.title}. {plot.description}".translate({91: "(", 93: ")"})
            parts.append(f"![{plain(text)}](plots/{plot.name}.png)")
        if section.code:
            parts.append(f"```json\n{section.code}\n```")
        if section.notes:
            parts.append("\n".join(f"- {plain(note)}" for note in section.notes))
    return "\n\n".join(parts) + "\n"
