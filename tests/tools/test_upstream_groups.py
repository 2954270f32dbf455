"""The groups for the harness are ours without their prefix, described in its own template."""

from __future__ import annotations

import re
from pathlib import Path

import lm_eval.tasks
import pytest
import yaml
from lm_eval.tasks import TaskManager

from tools.upstream_patches import task_groups


#: What we fill in of the harness's template, in the order in which it asks.
TEMPLATE = """\
# Name

## Paper

Title: `a title`

Abstract: `a link`

`The description of paper or benchmark:`

Homepage: `a link`

### Citation

```text
BibTeX goes here
```

#### Groups

* `group_name`: `what it is`

#### Tags

* `tag_name`: `what it is`

#### Tasks

* `task_name`: `what it is`
* `task_name2`: ...

### Checklist

* [ ] Is it known?
  * [ ] Is the paper named?

If other tasks on this dataset are supported:

* [ ] Is the main one named?

### Changelog
"""
INDEX = """\
| Family     | Description     | Language(s)      |
|------------|-----------------|------------------|
| benchmarks | General.        |                  |
| last       | Something.      | English          |
"""


@pytest.fixture
def checkout(tmp_path):
    """A stand-in for a checkout of the harness, with the patch."""
    for name, text in ((task_groups.TEMPLATE, TEMPLATE), (task_groups.INDEX, INDEX)):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(text)
    task_groups.PATCH.write(tmp_path)
    return tmp_path


def test_groups_are_ours_without_prefix_and_checks_of_our_own(checkout):
    folder = checkout / task_groups.FOLDER
    written = {file.stem: file.read_text() for file in folder.glob("*.yaml")}
    assert set(written) == {"truthfulness", "instruction_following", "reasoning"}
    for group, text in written.items():
        assert "pruned" not in text
        assert "!function" not in text
        theirs = yaml.safe_load(text)
        text = (task_groups.TASKS / f"pruned_{group}.yaml").read_text()
        ours = yaml.safe_load(text.replace("!function ", ""))
        assert theirs.pop("group") == ours.pop("group").removeprefix("pruned_")
        for member in ours["task"]:
            member.pop("process_docs", None)
        assert theirs == ours


def test_the_harness_finds_the_groups(checkout):
    manager = TaskManager(
        include_path=str(checkout / task_groups.FOLDER), include_defaults=False
    )
    for group in task_groups.GROUPS:
        assert group in manager.all_groups
        assert f"`{group}`" in (checkout / task_groups.FOLDER / "README.md").read_text()


def test_no_group_takes_a_name_that_the_harness_has():
    taken = re.compile(
        rf"^\s*-? ?(group|task|tag): *['\"]?({'|'.join(task_groups.GROUPS)})\b['\"]?\s*$",
        re.MULTILINE,
    )
    theirs = Path(lm_eval.tasks.__file__).parent
    files = [
        file for file in theirs.rglob("*.yaml") if task_groups.NAME not in str(file)
    ]
    assert len(files) > 1000
    assert not [file for file in files if taken.search(file.read_text("utf-8"))]


def test_the_readme_is_the_template_filled_in(checkout):
    text = (checkout / task_groups.FOLDER / "README.md").read_text()
    for placeholder in ("goes here", "_name`", "a title", "a link", "[ ]", "..."):
        assert placeholder not in text
    assert "Title: `Fragile Knowledge, Robust Instruction-Following" in text
    assert "Abstract: https://arxiv.org/abs/2512.22671\n" in text
    assert re.search(r"```text\n@misc\{martra2025fragile,\n(.*\n)+\}\n```\n", text)
    assert text.count("[x]") == 3
    headings = [line for line in TEMPLATE.splitlines() if line.startswith("##")]
    assert [line for line in text.splitlines() if line.startswith("##")] == headings


def test_the_list_of_tasks_has_one_row_more(checkout):
    before, after = (
        text.splitlines()
        for text in (INDEX, (checkout / task_groups.INDEX).read_text())
    )
    row = after.pop(3)
    assert after == before
    assert row.startswith(
        "| [benchmarks/width_pruning](benchmarks/width_pruning/README.md)"
    )
    assert row.count(" | ") == 2


@pytest.mark.parametrize(
    ("file", "lost", "why"),
    [
        (task_groups.TEMPLATE, "Homepage:", "has 0 parts like '^Homepage"),
        (task_groups.INDEX, "| benchmarks", "has 0 rows for 'benchmarks'"),
    ],
)
def test_another_checkout_is_refused_by_name(file, lost, why):
    write = {
        task_groups.TEMPLATE: task_groups.readme,
        task_groups.INDEX: task_groups.with_row,
    }
    text = {task_groups.TEMPLATE: TEMPLATE, task_groups.INDEX: INDEX}[file]
    with pytest.raises(ValueError, match=re.escape(why)) as caught:
        write[file](text.replace(lost, "x"))
    assert file in str(caught.value)


def test_what_only_our_package_resolves_is_refused(tmp_path, monkeypatch):
    (tmp_path / "pruned_reasoning.yaml").write_text(
        "group: pruned_reasoning\ntask:\n  - task: x\n    process_docs: !function utils.f\n"
    )
    monkeypatch.setattr(task_groups, "TASKS", tmp_path)
    with pytest.raises(ValueError, match="holds '!function'"):
        task_groups.group_yaml("reasoning")
