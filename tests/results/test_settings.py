"""What `compare` says of settings that two runs do not share."""

from __future__ import annotations

import pytest

from lm_eval_pruned.compare.comparison import compare
from lm_eval_pruned.results.runs import read_run
from tests.helpers.results_files import pruning, write_run


TASKS = {"tf": {"acc,none": [1.0, 0.0] * 10}, "boolq": {"acc,none": [1.0, 0.0] * 10}}
GROUP = {"groups": {"both": [*TASKS]}, "group_scores": {"both": {"acc,none": 0.5}}}
HASHES = {"task_hashes": {"tf": "a", "boolq": "b"}}


def noted(folder, one, other, tasks=(TASKS, TASKS)):
    """Write two runs and return what is noted of the second, or nothing."""
    runs = [
        read_run(write_run(folder / name, each, **sections), name)
        for name, each, sections in zip("ab", tasks, (one, other), strict=True)
    ]
    notes = compare(runs[0], runs[1:]).notes
    return "".join(note for note in notes if "different settings than a" in note)


def config(**options) -> dict:
    return {"config": {"model": "pruned-hf"} | options}


def paths(name: str, tokens: int) -> dict:
    path = {"requests": {name: tokens}, "tokens_computed": {name: tokens}}
    return config(answer_paths={"loglikelihood": path, "linear": "torch"})


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        (config(), config(fewshot_seed=7), "(fewshot_seed), so"),
        (config(), config(model_dtype="torch.bfloat16"), "(dtype)"),
        (config(), config(gen_kwargs={"temperature": 1}), "(gen_kwargs)"),
        (paths("shared", 40), paths("plain", 40), "(answer_paths)"),
        ({}, {"lm_eval_version": "0.4.12"}, "(lm_eval_version)"),
        ({}, HASHES, "(task_hash)"),
        ({}, {"n-shot": {"tf": 0, "boolq": 5}}, "(num_fewshot) on boolq, so"),
        ({}, {"chat_template_sha": "f00"}, "(chat_template)"),
        # A group has the settings of its members.
        (GROUP | HASHES, GROUP | {"task_hashes": {"tf": "a"}}, "(task_hash)"),
        (GROUP, GROUP | {"n-shot": {"tf": 1, "boolq": 0}}, "(num_fewshot)"),
        # What is off is not another setting, and neither are other numbers on one path.
        ({}, {"fewshot_as_multiturn": False, "chat_template_sha": None}, ""),
        (paths("shared", 900), paths("shared", 700), ""),
    ],
)
def test_settings_that_differ_are_named(tmp_path, one, other, said):
    found = noted(tmp_path, one, other)
    assert (said in found, bool(found)) == (True, bool(said))


def test_runs_that_only_their_repair_tells_apart_have_other_settings(tmp_path):
    """The neurons that stay are the same; their down projections are not."""
    text = {"calibration": {"sha256": "a", "tokens": 9}}
    repairs = ({}, {"repair": "mean", **text}, {"repair": "ols", **text})
    found = []
    for n, repair in enumerate(repairs):
        sections = config(pruning={**pruning(40), **repair})
        run = read_run(write_run(tmp_path / str(n), TASKS, **sections))
        found.append(run.settings["tf"])
    assert found[0]["kept_digest"] == found[1]["kept_digest"] == found[2]["kept_digest"]
    assert found[0] != found[1] != found[2]
