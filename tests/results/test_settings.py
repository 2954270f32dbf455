"""What `compare` says of settings, at the command line."""

from __future__ import annotations

import pytest

from lm_eval_pruned import cli
from lm_eval_pruned.results import settings
from tests.helpers.results_files import write_run, write_sweep


TASKS = {"tf": {"acc,none": [1.0, 0.0] * 10}, "boolq": {"acc,none": [1.0, 0.0] * 10}}


@pytest.fixture
def notes(capsys):
    def run(*paths):
        assert cli.main(["compare", *map(str, paths)]) == 0
        lines = capsys.readouterr().out.splitlines()
        return [line for line in lines if line.startswith("Note: ")]

    return run


def config(**options) -> dict:
    return {"model": "pruned-hf", "model_args": {"pretrained": "tiny"}, **options}


@pytest.mark.parametrize(
    ("sections", "name"),
    [
        ({"config": config(fewshot_seed=7)}, "fewshot_seed"),
        ({"config": config(torch_seed=7)}, "torch_seed"),
        ({"config": config(model_dtype="torch.bfloat16")}, "dtype"),
        ({"config": config(gen_kwargs={"temperature": 1})}, "gen_kwargs"),
        (
            {
                "config": config(
                    answer_paths={"loglikelihood": {"requests": {"plain": 40}}}
                )
            },
            "answer paths",
        ),
        ({"lm_eval_version": "0.4.12"}, "lm_eval_version"),
        ({"transformers_version": "5.0"}, "transformers_version"),
        ({"task_hashes": {"tf": "a", "boolq": "b"}}, "task_hash"),
        ({"n-shot": {"tf": 5, "boolq": 5}}, "num_fewshot"),
        ({"chat_template_sha": "f00"}, "chat template"),
        ({"system_instruction_sha": "f00"}, "system instruction"),
        ({"fewshot_as_multiturn": True}, "fewshot_as_multiturn"),
    ],
)
def test_each_setting_is_named(tmp_path, notes, sections, name):
    write_run(tmp_path / "a", TASKS)
    write_run(tmp_path / "b", TASKS, **sections)
    (note,) = notes(tmp_path / "a", tmp_path / "b")
    assert f"b was evaluated with other settings than a ({name}), so" in note


def test_what_is_off_is_not_another_setting(tmp_path, notes):
    write_run(tmp_path / "a", TASKS)
    off = {"fewshot_as_multiturn": False, "chat_template_sha": None}
    write_run(tmp_path / "b", TASKS, config=config(gen_kwargs=None), **off)
    assert notes(tmp_path / "a", tmp_path / "b") == []


def test_other_numbers_on_one_path_are_no_other_setting(tmp_path, notes):
    for name, tokens in (("a", 900), ("b", 700)):
        path = {"requests": {"shared": tokens}, "tokens_computed": {"shared": tokens}}
        paths = {"loglikelihood": path, "linear": "torch"}
        write_run(tmp_path / name, TASKS, config=config(answer_paths=paths))
    assert notes(tmp_path / "a", tmp_path / "b") == []


def test_without_samples_other_numbers_of_documents_are_named(tmp_path, notes):
    few = {"tf": {"acc,none": {"values": [1.0, 0.0], "stderr": 0.3}}}
    many = {"tf": {"acc,none": {"values": [1.0, 0.0] * 40, "stderr": 0.05}}}
    write_run(tmp_path / "a", many, samples=False)
    write_run(tmp_path / "b", few, samples=False)
    assert (
        "other settings than a (documents)" in notes(tmp_path / "a", tmp_path / "b")[0]
    )


def test_tasks_are_named_where_only_some_differ(tmp_path, notes):
    write_run(tmp_path / "a", TASKS)
    write_run(tmp_path / "b", TASKS, **{"n-shot": {"tf": 0, "boolq": 5}})
    (note,) = notes(tmp_path / "a", tmp_path / "b")
    assert "(num_fewshot) on boolq, so" in note


def test_a_group_has_the_settings_of_its_members(tmp_path, notes):
    def write(name, **sections):
        write_run(
            tmp_path / name,
            TASKS,
            groups={"both": list(TASKS)},
            group_scores={"both": {"acc,none": 0.5}},
            **sections,
        )
        return tmp_path / name

    one = write("a", task_hashes={"tf": "a", "boolq": "b"})
    two = write(
        "b", task_hashes={"tf": "a", "boolq": "c"}, **{"n-shot": {"tf": 1, "boolq": 0}}
    )
    (note,) = notes(one, two)
    assert "(num_fewshot, task_hash)" in note


def test_configurations_without_results_are_named(tmp_path, notes):
    runs = {"base": (0, TASKS), "p20": (20, TASKS), "p40": (40, {}), "p60": (60, {})}
    write_sweep(tmp_path, runs, p40="tf")
    (note,) = notes(tmp_path)
    assert "holds no finished unit of p40, p60." in note


def test_hashes_are_cut_in_messages():
    assert settings.shown("a" * 64) == "a" * 12
    assert settings.shown({"temperature": 1}) == str({"temperature": 1})
    assert settings.shown(None) == "none"
    assert settings.listed(list("abcdefg")) == "a, b, c, d, e and 2 more"
