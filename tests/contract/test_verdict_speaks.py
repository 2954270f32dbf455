"""What docs/verdict.md promises of written answers, long text, kinds of text and files beside the weights."""

from __future__ import annotations

import json
import re
import shutil

import pytest

from tests.contract.commands import pruned
from tests.helpers.checkpoints import ROOT, save_tiny
from tests.helpers.results_files import write_run
from tests.sweeps.conftest import quick  # noqa: F401


TASKS = "pruned_probe_written", "pruned_demo_kinds", "pruned_demo_long_text"
TEMPLATE = "{{ strftime_now('%H:%M:%S.%f') }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = save_tiny(tmp_path_factory.mktemp("base"), max_position_embeddings=1024)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="module")
def said(base, tmp_path_factory):
    """Return a function that judges a copy of the base whose files were changed."""
    out = tmp_path_factory.mktemp("out")

    def said(tasks=TASKS, copy=None, words=(), **changed):
        folder = tmp_path_factory.mktemp("copy")
        shutil.copytree(base, folder, dirs_exist_ok=True)
        for name, content in changed.items():
            file = folder / name.replace("__", ".")
            if isinstance(content, dict):
                content = json.dumps(json.loads(file.read_text()) | content)
            file.write_text(content)
        both = [f"hf,pretrained={path},dtype=float32" for path in (base, folder)]
        where = "--include_path", ROOT / "tasks", "--device", "cpu"
        tasks = "--tasks", *tasks, "--output_path", out
        return pruned("verdict", *both, *tasks, *where, *words)

    said.out = out
    return said


def rows_of(said, name, task):
    (file,) = (said.out / name / "units" / name / task).glob("samples_*")
    with file.open(encoding="utf-8") as lines:
        return [*map(json.loads, lines)]


@pytest.fixture(scope="module")
def alike(said):
    """The verdict on a copy in which nothing was changed."""
    return said()


def test_answers_are_written_in_the_chat_template_and_end_as_the_generation_config_says(
    said, alike, base
):
    end = json.loads((base / "generation_config.json").read_text())["eos_token_id"]
    rows = rows_of(said, "candidate", "pruned_probe_written")
    assert len(rows) == 288
    for row in rows:
        assert len(row["tokens"]) <= 24
        assert row["ended"] == (row["tokens"][-1] == end)
        before = [row["tokens"][max(0, n - 4) : n] for n in range(len(row["tokens"]))]
        again = [t in seen for t, seen in zip(row["tokens"], before, strict=True)]
        assert row["repeated"] == pytest.approx(sum(again) / len(again))
    assert re.search(r"\|pruned_probe_written *\|ended ", alike.out), alike.out


def test_long_text_is_judged_by_position_and_other_kinds_of_text_by_kind(said, alike):
    # 1,024 tokens are all that the config allows.
    positions = [r["doc"]["position"] for r in rows_of(said, "base", TASKS[2])]
    assert {p: positions.count(p) for p in positions} == {
        "0-128": 64,
        "128-512": 64,
        "512-1024": 64,
    }
    kinds = [row["doc"]["kind"] for row in rows_of(said, "base", TASKS[1])]
    assert {kind: kinds.count(kind) for kind in kinds} == dict.fromkeys(
        ("code", "numbers", "german", "spanish"), 64
    )
    assert "context beyond 1,024 tokens" in alike.out
    for part in ("512-1024", "german"):
        assert re.search(rf"\|{part} *\| *192\|0.0000\|", alike.out), alike.out


@pytest.mark.parametrize(
    ("name", "changed"),
    [
        ("chat template", {"chat_template__jinja": TEMPLATE.replace("<", "[")}),
        ("ends of an answer", {"generation_config__json": {"eos_token_id": 7}}),
        (
            "generation config",
            {"generation_config__json": {"repetition_penalty": 50.0}},
        ),
    ],
)
def test_a_file_that_changes_answers_is_named_in_the_first_line_and_never_ships(
    name, changed, said, alike
):
    assert " not as in the base" not in alike.out
    done = said(TASKS[:1], **changed)
    (first,) = re.findall(r"(?m)^(?:not decided|do not ship).*", done.out)
    assert f"{name} not as in the base" in first
    assert done.code in (1, 3)
    assert f"- {name}: " in done.out


def test_check_says_of_files_what_verdict_says(tmp_path):
    right = {"acc,none": [1.0] * 300 + [0.0] * 100}
    paths = []
    for name, ends in (("old", [2]), ("new", [7])):
        config = {"model": "hf", "served_with": {"ends of an answer": ends}}
        run = write_run(tmp_path / name, {"task": right}, config=config)
        paths.append(run.parent)
    judged = "--margin", "5pt", "--output_path", tmp_path / "out"
    old, new = paths
    assert pruned("verdict", old, old, *judged).code == 0
    done = pruned("verdict", old, new, *judged)
    assert done.code == 3
    assert "not decided: ends of an answer not as in the base" in done.out
    baseline = "--baseline", tmp_path / "baseline.json"
    pruned("check", old, *baseline, "--update", "--not_worse", "5pt")
    assert pruned("check", old, *baseline).code == 0
    done = pruned("check", new, *baseline)
    assert done.code == 3
    assert "Served otherwise than the baseline: ends of an answer." in done.out


def test_text_that_one_long_pass_answers_has_the_harness_s_scores(said, alike, base):
    import lm_eval
    from lm_eval.tasks import TaskManager

    metadata, task = {"context": 1024}, "pruned_demo_long_text"
    tasks = TaskManager(
        include_path=str(ROOT / "tasks"), include_defaults=False, metadata=metadata
    )
    results = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(base), "dtype": "float32"},
        tasks=[task],
        task_manager=tasks,
        device="cpu",
        metadata=metadata,
        bootstrap_iters=0,
    )
    ours = [row["bits_per_byte"] for row in rows_of(said, "base", task)]
    theirs = [row["bits_per_byte"] for row in results["samples"][task]]
    for one, other in zip(ours, theirs, strict=True):
        assert one[0] == pytest.approx(other[0], abs=1e-2)
