"""The plan of a sweep: its configurations, its units, and what defines them."""

from __future__ import annotations

import shutil

import pytest
from lm_eval.tasks._factory import TaskFactory

from lm_eval_pruned.sweeps import plan
from lm_eval_pruned.sweeps.plan import (
    FLOORS,
    plan_sweep,
)
from lm_eval_pruned.sweeps.tasks import _hash_code, fingerprint
from tests.helpers.sweeping import change, write_tasks


def prints(options, **more):
    """Return the fingerprint of each unit by its names."""
    sweep = plan_sweep({**options, **more})
    return {unit.names: fingerprint(sweep.definition(*unit)) for unit in sweep.units()}


def with_args(options, **more):
    return {**options, "model_args": {**options["model_args"], **more}}


@pytest.mark.parametrize(
    ("changed", "decides"),
    [
        ({"limit": 2.0}, True),
        ({"num_fewshot": 1}, True),
        ({"apply_chat_template": True}, True),
        ({"system_instruction": "Be brief."}, True),
        ({"gen_kwargs": {"max_gen_toks": 2}}, True),
        ({"seed": "7"}, True),
        ({"log_samples": False}, True),
        ({"metadata": {"answer": 1}}, True),
        ({"predict_only": True}, True),
        ({"samples": {"tiny_choice": [0]}}, True),
        ({"batch_size": "8"}, False),
        ({"device": "cuda:1"}, False),
        ({"use_cache": "c"}, False),
        ({"ratios": ["1.50"]}, False),
    ],
)
def test_what_decides_scores_changes_every_unit(options, changed, decides):
    before, after = prints(options), prints(options, **changed)
    assert before.keys() == after.keys()
    same = before.items() & after.items()
    assert len(same) == (0 if decides else len(before))


def test_a_model_is_known_by_its_content(options, tiny_llama, tmp_path):
    model = shutil.copytree(tiny_llama, tmp_path / "model")
    here, before = with_args(options, pretrained=str(model)), prints(options)
    (model / "checkpoint-500").mkdir()
    (model / "checkpoint-500" / "model.safetensors").touch()
    assert prints(here) == before
    content = bytearray((model / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (model / "model.safetensors").write_bytes(content)
    for other in (here, with_args(options, dtype="bfloat16")):
        assert not prints(other).items() & before.items()


@pytest.mark.parametrize(
    ("name", "old", "new", "changed"),
    [
        ("choice.yaml", "version: 1.0", "version: 2.0", {"tiny_choice"}),
        ("utils.py", "import json", "import json  #", {"tiny_choice", "tiny_sentence"}),
        ("questions.jsonl", "even", "odd", {"tiny_choice", "tiny_sentence"}),
        ("both.yaml", "num_fewshot: 0", "num_fewshot: 2", {"tiny_sentence"}),
        # What no code names may be there or not.
        ("README.md", "", "read me", set()),
        ("utils.py~", "", "import json", set()),
        ("load.py", "", "import json", set()),
        ("cache.json", "", "{}", set()),
    ],
)
def test_a_task_is_known_by_its_settings_code_and_data(
    options, tasks, tmp_path, name, old, new, changed
):
    copy = shutil.copytree(tasks, tmp_path / "tasks")
    change(copy, name, old, new)
    same = prints(options).items() & prints(options, include_path=str(copy)).items()
    assert {task for (_, task), _ in same} == {"tiny_choice", "tiny_sentence"} - changed


@pytest.mark.parametrize(
    ("code", "file"),
    [
        ("import rows", "rows.py"),
        ("from tasks.rows import (\n    load_rows\n)", "rows.py"),
        ("import rows", "words.txt"),
        ("FILE = 'data/words.txt'", "words.txt"),
        ("FILES = 'w*.txt'", "words.txt"),
        ("FILE = f'{__name__}.txt'", "words.txt"),
    ],
)
def test_a_task_is_known_by_what_its_code_imports_and_names(tmp_path, code, file):
    (tmp_path / "utils.py").write_text(code)
    (tmp_path / "rows.py").write_text("FILE = 'words.txt'")
    for name in ("words.txt", "notes.md"):
        (tmp_path / name).write_text("old")

    def digest():
        _hash_code.cache_clear()
        return _hash_code(tmp_path / "utils.py")

    before = digest()
    change(tmp_path, "notes.md", "old", "new")
    assert digest() == before
    change(tmp_path, file, "", "#")
    assert digest() != before


@pytest.mark.parametrize(
    "files",
    [
        {
            "a.jsonl": '{"text": "1"}',
            "b.jsonl": '{"text": "1"}',
            "c.jsonl": '{"text": "2"}',
        },
        {
            "a.json": '{"0": 9, "2": 4}',
            "b.csv": "layer,width\n2,4\n0,9",
            "c.json": "[9, 4, 4]",
        },
    ],
)
def test_texts_and_widths_are_known_by_their_content(options, tmp_path, files):
    def defined(name, content):
        (tmp_path / name).write_text(content)
        if name.endswith("jsonl"):
            asked = with_args(options, calibration=str(tmp_path / name))
            return prints(asked, criteria=["act"])
        return prints(options, ratios=[], widths=[str(tmp_path / name)])

    one, same, other = ({*defined(*each).values()} for each in files.items())
    assert one == same
    # The unpruned model has neither.
    assert len(one & other) == 2


@pytest.mark.parametrize("parts", [1, 2, 3, 4, 8])
def test_shards_are_a_partition(options, parts):
    sweep = plan_sweep({**options, "ratios": ["2.5", "2", "1.5"], "floors": True})
    shards = [sweep.units((part, parts)) for part in range(parts)]
    dealt = [unit.names for shard in shards for unit in shard]
    assert sorted(dealt) == sorted(unit.names for unit in sweep.units())
    sizes = [*map(len, shards)]
    assert max(sizes) - min(sizes) <= 1
    if parts == len(sweep.configurations):
        models = [{u[0].id for u in shard if not u[0].floor} for shard in shards]
        assert [*map(len, models)] == [1] * parts


def test_floors_share_nothing_with_the_model_but_the_documents(options):
    options["floors"] = True
    before, ids = prints(options), {floor.id for floor in FLOORS}
    same = before.items() & prints(with_args(options, dtype="bfloat16")).items()
    assert {names[0] for names, _ in same} == ids
    assert not prints(options, limit=2.0).items() & before.items()


INLINE = """\
group: tiny_own
num_fewshot: 1
task:
  - task: one
    custom_dataset: !function utils.load
    output_type: multiple_choice
    test_split: test
    doc_to_text: "{{question}}"
    doc_to_target: answer
    doc_to_choice: ["yes", "no"]
    metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
    metadata: {version: 2.0}
  - tiny_sentence
"""


def test_a_task_that_a_group_defines_in_its_own_yaml_is_a_task_like_others(
    options, tmp_path
):
    folder = write_tasks(tmp_path / "tasks")
    (folder / "own.yaml").write_text(INLINE)
    asked = {**options, "include_path": str(folder), "tasks": ["tiny_own"]}
    sweep = plan_sweep(asked)
    own, other = sweep.tasks
    assert (own.name, other.name) == ("tiny_own::one", "tiny_sentence")
    assert own.metrics == ("acc",)
    before = own.digest
    change(folder, "own.yaml", "yes", "Yes")
    assert plan_sweep(asked).tasks[0].digest != before
    built = own.build(TaskFactory(meta={"seen": 1}))
    assert built.config.num_fewshot == 1
    assert {"version": 2.0, "seen": 1}.items() <= built.config.metadata.items()
    assert len(built.eval_docs) == 4


def test_an_option_that_the_harness_does_not_have_is_refused(options, monkeypatch):
    """As ``trackio_args`` in lm-eval 0.5.0.dev1."""
    monkeypatch.setattr(plan, "OF_HARNESS", ("later_args", *plan.OF_HARNESS))
    with pytest.raises(ValueError, match=r"later_args was given, but lm-eval \d.* has"):
        plan_sweep({**options, "later_args": {}})


def test_a_checkpoint_is_known_without_reading_all_of_it(tmp_path):
    """A file of 1 TB with holes would take minutes to read."""
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.truncate(10**12)
    (tmp_path / "config.json").write_text("{}")
    before = plan._source(str(tmp_path), "config.json", {})
    (tmp_path / "config.json").write_text("[]")
    assert plan._source(str(tmp_path), "config.json", {}) != before
