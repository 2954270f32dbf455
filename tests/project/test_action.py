"""The steps of the GitHub Action, run as the shell would, with programs that stand in."""

from __future__ import annotations

import os
import subprocess

import pytest
import yaml

from tests.helpers.checkpoints import ROOT


ACTION = yaml.safe_load((ROOT / "action.yml").read_text("utf-8"))
STEPS = {step.get("id", "upload"): step for step in ACTION["runs"]["steps"]}
MODEL = 'hf,pretrained=$(touch ran),x={"a": 1}'
PROGRAM = """#!/bin/bash
printf '<%s>' "$@" >> calls
if [ "$1" = verdict ]; then echo '# May it be shipped? Ship' > "$5/verdict.md"; fi
if [ "$1" = api ]; then printf %s "$OLD"; else echo said; fi
exit ${CODE:-0}
"""


@pytest.fixture
def step(tmp_path):
    """Return what runs a step with variables: its exit code, all calls so far, the summary."""
    for name in ("lm-eval-pruned", "gh"):
        (tmp_path / name).write_text(PROGRAM)
        (tmp_path / name).chmod(0o755)

    def step(name, **values):
        # As the runner starts bash.
        bash = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c"]
        places = {"GITHUB_OUTPUT": "outputs", "GITHUB_STEP_SUMMARY": "summary"}
        given = {**dict.fromkeys(STEPS[name]["env"], ""), "FOLDER": "out", **places}
        given |= {"NAME": ACTION["inputs"]["name"]["default"]}
        given |= {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | values
        command = [*bash, STEPS[name]["run"]]
        done = subprocess.run(command, cwd=tmp_path, env=given, check=False)
        files = (tmp_path / each for each in ("calls", "summary"))
        written = (each.read_text() if each.exists() else "" for each in files)
        return done.returncode, *written

    return step


@pytest.mark.parametrize("code", ["0", "3"])
def test_a_verdict_is_commented_and_its_exit_code_handed_on(step, tmp_path, code):
    words = "--tasks\narc_* --limit 9"
    given = {"BASE": MODEL, "CANDIDATE": "b c", "ARGUMENTS": words, "CODE": code}
    status, calls, summary = step("answer", COMMAND="verdict", **given)
    expected = ["verdict", MODEL, "b c", "--output_path", "out", *words.split()]
    assert (status, calls) == (0, "".join(f"<{word}>" for word in expected))
    assert (tmp_path / "outputs").read_text() == f"code={code}\n"
    assert "# May it be shipped? Ship" in summary
    assert not (tmp_path / "ran").exists()
    assert step("end", CODE=code)[0] == int(code)


def test_without_a_page_the_log_is_commented(step):
    given = {"RESULTS": "sweep", "BASELINE": "b.json", "CODE": "70"}
    _, calls, summary = step("answer", COMMAND="check", **given)
    assert "<check><sweep><--baseline><b.json>" in calls
    assert "exit code 70\n\n```\nsaid\n" in summary
    status, _, summary = step("answer", COMMAND="rm")
    assert status == 0
    assert "exit code 2\n\n```\ncommand=rm is neither verdict nor check" in summary


@pytest.mark.parametrize(
    ("old", "place"),
    [
        ("", "<repos/me/it/issues/7/comments>"),
        ("5\n6\n", "<-X><PATCH><repos/me/it/issues/comments/5>"),
    ],
)
@pytest.mark.parametrize("name", ["lm-eval-pruned", "int 4"])
def test_one_comment_of_each_name_is_kept_up_to_date(step, tmp_path, old, place, name):
    given = {"REPOSITORY": "me/it", "NUMBER": "7", "OLD": old, "NAME": name}
    _, calls, _ = step("comment", **given)
    assert calls.endswith(f"<api>{place}<-F><body=@out/comment.md>")
    # It is looked for as it begins.
    step("answer", COMMAND="verdict", NAME=name)
    first = (tmp_path / "out" / "comment.md").read_text().partition("\n")[0]
    assert first == f"<!-- {name} -->"
    assert f'startswith("{first}")' in calls


def test_the_pages_of_another_candidate_in_the_folder_do_not_stay(step, tmp_path):
    (tmp_path / "out").mkdir()
    for kind in ("md", "html", "csv"):
        (tmp_path / "out" / f"verdict.{kind}").touch()
    step("answer", COMMAND="rm")
    assert not [*(tmp_path / "out").glob("verdict.*")]


def test_two_candidates_have_artefacts_of_their_own():
    """A second artefact of one name is refused with the status 409."""
    assert STEPS["upload"]["with"]["name"] == "${{ inputs.name }}"


@pytest.mark.parametrize("name", ["", "a/b", 'a" or true', "a-->b", "$(touch ran)"])
def test_a_name_that_no_artefact_can_have_is_refused_before_the_work(
    step, tmp_path, name
):
    status, calls, _ = step("answer", COMMAND="verdict", NAME=name)
    assert (status, calls) == (2, "")
    assert (tmp_path / "outputs").read_text() == "code=2\n"
    assert not (tmp_path / "ran").exists()


def test_no_input_is_put_into_a_script():
    assert not [name for name, step in STEPS.items() if "${{" in step.get("run", "")]
    assert STEPS["upload"]["if"] == "always()"
