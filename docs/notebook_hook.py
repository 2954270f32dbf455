"""Show the notebooks in ``docs`` as pages of the site, with their outputs; ``mkdocs.yml`` names this file.

A page looks like every other: the text is Markdown of the site, so that its links are checked,
and code, tables and plots have the theme's look. Nothing is run: what was kept is shown.
"""

from __future__ import annotations

import json
import re
from pathlib import PurePosixPath
from typing import Any


#: Added at the end of a page.
DOWNLOAD = "This page is a notebook: [download it]({name}) to run it yourself."


def on_files(files, *, config, **_):
    """Add a page, and a file for each plot, beside every notebook."""
    for notebook in [each for each in files if each.src_uri.endswith(".ipynb")]:
        path = PurePosixPath(notebook.src_uri)
        page, plots = as_markdown(json.loads(notebook.content_string), path.stem)
        page += f"\n\n{DOWNLOAD.format(name=path.name)}\n"
        made = {path.with_suffix(".md"): page}
        made |= {path.with_name(name): svg for name, svg in plots.items()}
        for uri, content in made.items():
            files.append(notebook.generated(config, str(uri), content=content))
    return files


def on_page_markdown(markdown, *, page, **_):
    """Lead links between pages to the page of a notebook; in the repository they name its file."""
    if page.file.generated_by:  # a notebook, which names itself as a download
        return markdown
    return re.sub(r"(\]\((?!https?:)[^)#\s]+)\.ipynb\b", r"\1.md", markdown)


def as_markdown(notebook: dict[str, Any], stem: str) -> tuple[str, dict[str, str]]:
    """Return a notebook as Markdown, and the SVG files that this names.

    Args:
        notebook: Content of a notebook of format 4, executed unless it is for Colab.
        stem: What the names of the files begin with.

    Raises:
        ValueError: A cell was not executed or failed, an output is of a kind that is not
            shown, or a plot has no text alternative.
    """
    parts: list[str] = []
    plots: dict[str, str] = {}
    for number, cell in enumerate(notebook["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        # A notebook for Colab is shown as it is: what it prints depends on the card.
        if cell["execution_count"] is None and "colab" not in notebook["metadata"]:
            raise ValueError(f"{stem}: cell {number} was not executed")
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(_block("".join(output["text"])))
                continue
            kinds = output.get("data", {})
            if "image/svg+xml" in kinds:
                alternative = cell["metadata"].get("alt")
                if not alternative:
                    raise ValueError(f"{stem}: the plot of cell {number} has no alt")
                name = f"{stem}-{len(plots) + 1}.svg"
                plots[name] = "".join(kinds["image/svg+xml"])
                parts.append(f"![{alternative}]({name})")
            elif "text/markdown" in kinds:
                parts.append("".join(kinds["text/markdown"]).strip())
            elif "text/html" in kinds:
                parts.append(_table("".join(kinds["text/html"])))
            elif "text/plain" in kinds:
                parts.append(_block("".join(kinds["text/plain"])))
            else:
                raise ValueError(f"{stem}: cell {number} gives {output}")
    return "\n\n".join(parts), plots


def _block(text: str) -> str:
    return f"``` {{ .text .output .no-copy }}\n{text.rstrip()}\n```"


def _table(html: str) -> str:
    """Return the table of a data frame without its own style, so that it gets the theme's."""
    found = re.search(r"<table.*</table>", html, re.DOTALL)
    if found is None:
        raise ValueError(f"no table: {html[:80]}")
    plain = re.sub(r' (class|border|style)="[^"]*"', "", found[0])
    return f'<div class="narrow">\n{plain}\n</div>'
