"""Task groups by capability, for the three that a study of width-pruned models found kept.

Groups are ours without their prefix; what the README says of the paper is what ours says. Its
form is the harness's own template, filled in.
"""

from __future__ import annotations

import re
import textwrap
from typing import TYPE_CHECKING

from .patch import ROOT, Patch


if TYPE_CHECKING:
    from pathlib import Path


TASKS = ROOT / "tasks"
#: What every name of a group of ours begins with.
PREFIX = "pruned_"
#: By group, without the prefix: what its row in the README says.
GROUPS = {
    "truthfulness": "TruthfulQA as one and as several right answers: `truthfulqa_mc1` and "
    "`truthfulqa_mc2`, 0-shot (their prompt always holds six question and answer pairs)",
    "instruction_following": "`ifeval`, 0-shot",
    "reasoning": "`leaderboard_musr`, 0-shot, with the group score of `leaderboard_musr`: "
    "murder mysteries, object placements, team allocation",
}
NAME = "width_pruning"
FOLDER = f"lm_eval/tasks/benchmarks/{NAME}"
TEMPLATE = "templates/new_yaml_task/README.md"
INDEX = "lm_eval/tasks/README.md"
DESCRIPTION = (
    "Truthfulness, instruction following and multi-step reasoning as one group each, as a study of "
    "width-pruned Llama-3.2 models evaluates them."
)
#: Lines of ours that make sense beside our package only: a check before IFEval's own download.
LEFT_OUT = re.compile(r"^ *process_docs: !function nltk_resources\..*\n", re.MULTILINE)


def write(checkout: Path) -> None:
    """Write groups, README and the row in the list of tasks."""
    folder = checkout / FOLDER
    folder.mkdir(parents=True)
    for group in GROUPS:
        (folder / f"{group}.yaml").write_text(group_yaml(group), encoding="utf-8")
    template = (checkout / TEMPLATE).read_text(encoding="utf-8")
    (folder / "README.md").write_text(readme(template), encoding="utf-8")
    index = checkout / INDEX
    listed = with_row(index.read_text(encoding="utf-8"))
    index.write_text(listed, encoding="utf-8")


def group_yaml(group: str) -> str:
    """Return the configuration of one of `GROUPS`, made from ours.

    Raises:
        ValueError: Ours says something that only our package can resolve.
    """
    ours = TASKS / f"{PREFIX}{group}.yaml"
    text = LEFT_OUT.sub("", ours.read_text(encoding="utf-8"))
    text = text.replace(f"group: {PREFIX}{group}\n", f"group: {group}\n")
    for foreign in (PREFIX, "!function"):
        if foreign in text:
            raise ValueError(
                f"{ours} holds {foreign!r}, which the harness cannot resolve: name a rule for it in "
                "tools/upstream_patches/task_groups.py."
            )
    return text


def readme(template: str) -> str:
    """Fill in the harness's template for the README of a task.

    Args:
        template: Its text.

    Raises:
        ValueError: A part of the template that is filled in is not there.
    """
    ours = (TASKS / "README.md").read_text(encoding="utf-8")
    paper = {
        field: _only(rf"^{field}: (.+?)$", ours)
        for field in ("Title", "Abstract", "Homepage")
    }
    summary = _only(r"^The paper (narrows.*?)\. The groups", ours)
    groups = "\n".join(f"* `{group}`: {text}" for group, text in GROUPS.items())
    parts = {
        r"^# .*$": "# Width pruning: truthfulness, instruction following, reasoning",
        r"^Title: .*$": f"Title: `{paper['Title']}`",
        r"^Abstract: .*$": f"Abstract: {paper['Abstract']}",
        r"^`[^`]*description of paper.*$": _paragraph(
            f"The paper {summary}. Each group below is one of the three capabilities that held up "
            "there, "
            "with the tasks and few-shot counts of the paper. They suit any change to a model whose "
            "cost may differ between capabilities, such as quantisation or distillation."
        ),
        r"^Homepage: .*$": f"Homepage: {paper['Homepage']}",
        r"^(?<=```text\n)BibTeX.*$": _only(r"^(@misc\{.*?^\})$", ours),
        r"^\* `group_name`.*$": groups,
        r"^\* `tag_name`.*$": "None.",
        r"^\* `task_name`.*\n\* `task_name2`.*$": _paragraph(
            "No tasks of their own: all members are tasks of the harness, by reference, with "
            "nothing changed but `num_fewshot`."
        )
        + "\n\n"
        + _paragraph(
            f"`lm_eval --tasks {','.join(GROUPS)}` runs all three. A group has a score of its own "
            "only where one metric means the same in every member."
        ),
        r"^(?=If other tasks on this dataset)": _paragraph(
            "The groups refer to tasks that are here already. Task names and few-shot counts are "
            "those of `BENCHMARKS_BASE` and `BENCHMARKS_INSTRUCT` in `utils.py` of the paper's "
            "repository (see Homepage), which evaluates with this harness: `lm_eval --tasks GROUP` "
            "prints the counts to compare in its column `n-shot`."
        )
        + "\n\n",
        r"^### Changelog\n*\Z": "### Changelog\n\n* Version 1.0: first version of the groups.\n",
    }
    text = template
    for pattern, filling in parts.items():
        text, found = re.subn(
            pattern, lambda _, filling=filling: filling, text, flags=re.MULTILINE
        )
        if found != 1:
            raise ValueError(
                f"{TEMPLATE} of the checkout has {found} parts like {pattern!r} to fill in, not "
                "one: it is not the template that this patch was made for."
            )
    return text.replace("[ ]", "[x]")


def with_row(index: str) -> str:
    """Return the list of tasks with a row for the groups, after that of the benchmarks.

    Raises:
        ValueError: The list has no such row.
    """
    lines = index.splitlines(keepends=True)
    rows = [n for n, line in enumerate(lines) if line.startswith("| benchmarks ")]
    if len(rows) != 1:
        raise ValueError(
            f"{INDEX} of the checkout has {len(rows)} rows for 'benchmarks', not one: it is not the "
            "list that this patch was made for."
        )
    widths = [len(cell) - 2 for cell in lines[rows[0]].strip().strip("|").split("|")]
    cells = (
        f"[benchmarks/{NAME}](benchmarks/{NAME}/README.md)",
        DESCRIPTION,
        "English",
    )
    padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
    lines.insert(rows[0] + 1, f"| {' | '.join(padded)} |\n")
    return "".join(lines)


def _paragraph(text: str) -> str:
    return textwrap.fill(text, 100, break_on_hyphens=False)


def _only(pattern: str, text: str) -> str:
    """Return the group of a pattern that must match, in one paragraph."""
    match = re.search(pattern, text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise ValueError(f"tasks/README.md has no part like {pattern!r}.")
    return match[1]


PATCH = Patch(
    branch="capability-groups",
    title="feat(tasks): truthfulness, instruction following and reasoning as groups",
    write=write,
)
