"""What ``mkdocs build`` cannot know by itself; ``mkdocs.yml`` names this file.

- setup.cfg maps two folders of the repository into the package, so mkdocstrings is shown a
  copy in which they are where an installation has them.
- The page of the command line is what its parsers print.
- A page that would load anything from another host fails the build.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import sys
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
#: mkdocs.yml names it as mkdocstrings' search path.
AS_INSTALLED = ROOT / "build" / "as_installed"
#: Where the page of the command line takes the help texts.
PLACE = "<!-- help of every command -->"
#: What a browser fetches without being asked to; links that a reader may follow are none.
FETCHED = re.compile(
    r"""<(?:script|img|iframe|source)\b[^>]*\bsrc=["'](?:https?:)?//"""
    r"""|<link\b[^>]*\brel=["'](?:stylesheet|preconnect|preload)["'][^>]*\bhref=["'](?:https?:)?//""",
    re.IGNORECASE,
)


def on_startup(**_):
    """Show mkdocstrings the package as it is installed."""
    package = AS_INSTALLED / "lm_eval_pruned"
    sys.path.insert(0, str(ROOT))
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.rmtree(AS_INSTALLED, ignore_errors=True)
    shutil.copytree(ROOT / "lm_eval_pruned", package, ignore=no_caches)
    for folder in ("model_wrappers", "tasks"):
        shutil.copytree(ROOT / folder, package / folder, ignore=no_caches)
    for path in package.rglob("*.py"):
        # Google's style has both names for the section; mkdocstrings knows the plural alone.
        source = path.read_text(encoding="utf-8")
        plural = re.sub(r"^( +)Example:$", r"\1Examples:", source, flags=re.MULTILINE)
        path.write_text(plural, encoding="utf-8")


def on_page_markdown(markdown, **_):
    """Put the help of every command where the page asks for it."""
    return markdown.replace(PLACE, commands()) if PLACE in markdown else markdown


def on_post_page(output, *, page, **_):
    """Refuse a page that would load something from elsewhere."""
    found = FETCHED.search(output)
    if found:
        raise ValueError(f"{page.file.src_uri} loads from another host: {found[0]}")
    return output


def commands() -> str:
    """Return the help of ``lm-eval-pruned`` and of each of its commands, as Markdown."""
    overview = printed("--help")
    names = re.findall(r"^    ([a-z][a-z-]+)(?: |$)", overview, re.MULTILINE)
    assert names, overview
    sections = [f"```text\n{overview}```"]
    sections += [
        f"## {name}\n\n```text\n{printed(name, '--help')}```" for name in names
    ]
    return "\n\n".join(sections)


def printed(*arguments: str) -> str:
    """Return what the command prints; it needs nothing but Python for its help."""
    sys.path.insert(0, str(ROOT))
    before = dict(os.environ)
    os.environ.update(COLUMNS="74", NO_COLOR="1")
    text = io.StringIO()
    try:
        from lm_eval_pruned.cli import main

        with contextlib.redirect_stdout(text), contextlib.suppress(SystemExit):
            main(list(arguments))
    finally:
        os.environ.clear()
        os.environ.update(before)
        sys.path.remove(str(ROOT))
    return text.getvalue()
