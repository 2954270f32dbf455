"""The page beside a report that shows changed answers, document by document.

Texts of data sets and models are data: they stand in one block of JSON, which no text in it
can end, and the page's script writes them with ``textContent`` alone.
"""

from __future__ import annotations

import json
import os.path
import re
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.report.flips import KINDS
from lm_eval_pruned.report.page import only_these, run_label


if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from lm_eval_pruned.report.flips import Changed
    from lm_eval_pruned.results.documents import Answer
    from lm_eval_pruned.results.files import Run

#: What ends a script element, opens a comment in one, or is no character of its own.
_NOT_IN_A_SCRIPT = re.compile("[<>&\u2028\u2029\ud800-\udfff]")
#: A shorter beginning that prompts share is no few-shot context.
_LEAST_SHARED = 80


def as_flips_page(
    title: str,
    base: Run,
    others: Sequence[Run],
    changed: Sequence[Changed],
    *,
    texts: bool = True,
) -> str:
    """Return one page that needs no other file and no network.

    Args:
        title: Heading of the report.
        base: The unpruned model.
        others: Runs that `changed` names.
        changed: From `flips.find_flips`.
        texts: Whether the page holds the texts of documents and answers; without them
            it names documents by ``doc_id`` and ``doc_hash``.
    """
    from jinja2 import Environment, PackageLoader

    loader = PackageLoader("lm_eval_pruned.report", ".")
    environment = Environment(loader=loader, autoescape=True, trim_blocks=True)
    script = loader.get_source(environment, "flips_page.js")[0]
    return environment.get_template("flips_page.html").render(
        title=title,
        data=script_json(_data(base, others, changed, texts)),
        script=script,
        allowed=only_these([script]),
    )


def script_json(value: Any) -> str:
    """Return JSON that stays data inside of a ``script`` element, whatever texts it holds."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return _NOT_IN_A_SCRIPT.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _data(
    base: Run, others: Sequence[Run], changed: Sequence[Changed], texts: bool
) -> dict[str, Any]:
    leaves = _numbered(each.leaf for each in changed)
    tasks = _numbered(each.task for each in changed)
    runs = {run.name: number for number, run in enumerate(others)}
    shared = _shared_beginnings(changed) if texts else {}
    documents: list[list[Any]] = []
    rows: list[list[Any]] = []
    known: dict[tuple[str, int], int] = {}
    # What was lost comes first.
    for each in sorted(changed, key=lambda each: KINDS.index(each.kind)):
        # One object for each document of a task, whichever runs changed its answer.
        key = each.task, id(each.question)
        if key not in known:
            known[key] = len(documents)
            question = each.question
            document = [leaves[each.leaf], question.number, question.digest[:16]]
            if texts:
                prompt = question.prompt[len(shared.get(each.leaf, "")) :]
                choices = list(question.choices)
                document += [prompt, question.target, choices, *_answer(each.before)]
            documents.append(document)
        row = [known[key], runs[each.run], tasks[each.task], KINDS.index(each.kind)]
        rows.append([*row, *_answer(each.after)] if texts else row)
    return {
        "texts": texts,
        "base": run_label(base),
        "runs": [run_label(run) for run in others],
        "tasks": list(tasks),
        "leaves": list(leaves),
        "shared": [shared.get(leaf, "") for leaf in leaves],
        "kinds": KINDS,
        "documents": documents,
        "changes": rows,
    }


def _numbered(names: Iterable[str]) -> dict[str, int]:
    return {name: number for number, name in enumerate(dict.fromkeys(names))}


def _answer(answer: Answer) -> list[str | None]:
    """Return what was chosen, and what was written unless that is the same."""
    same = answer.text in ("", answer.chosen)
    return [answer.chosen, None if same else answer.text]


def _shared_beginnings(changed: Sequence[Changed]) -> dict[str, str]:
    """Return by task the whole lines that all its prompts begin with: few-shot examples."""
    prompts: dict[str, set[str]] = {}
    for each in changed:
        prompts.setdefault(each.leaf, set()).add(each.question.prompt)
    shared = {}
    for leaf, several in prompts.items():
        beginning = os.path.commonprefix(list(several)) if len(several) > 1 else ""  # noqa: RUF071
        beginning = beginning[: beginning.rfind("\n") + 1]
        if len(beginning) >= _LEAST_SHARED:
            shared[leaf] = beginning
    return shared
