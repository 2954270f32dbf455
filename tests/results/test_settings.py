"""What `compare` says of settings, at the command line."""

from __future__ import annotations

import pytest

from lm_eval_pruned import cli
from tests.helpers.results_files import write_run


TASKS = {"tf": {"acc,none": [1.0, 0.0] * 10}, "boolq": {"acc,none": [1.0, 0.0] * 10}}
GROUP = {"groups": {"both": [*TASKS]}, "group_scores": {"both": {"acc,none": 0.5}}}


@pytest.fixture
def note(tmp_path, capsys):
    """Write two runs and return what is noted of the second, or nothing."""

    def compared(one, other, tasks=(TASKS, TASKS)):
        for name, each, sections in zip("ab", tasks, (one, other), strict=True):
            write_run(tmp_path / name, each, **sections)
        assert cli.main(["compare", *(str(tmp_path / name) for name in "ab")]) == 0
        lines = capsys.readouterr().out.splitlines()
        return "".join(line for line in lines if "other settings than a" in line)

    return compared


def config(**options) -> dict:
    model = {"model": "pruned-hf", "model_args": {"pretrained": "tiny"}}
    return {"config": model | options}


def paths(name: str, tokens: int) -> dict:
    path = {"requests": {name: tokens}, "tokens_computed": {name: tokens}}
    return config(answer_paths={"loglikelihood": path, "linear": "torch"})


HASHES = {"task_hashes": {"tf": "a", "boolq": "b"}}


@pytest.mark.parametrize(
    ("one", "other", "said"),
    [
        ({}, config(fewshot_seed=7), "(fewshot_seed), so"),
        ({}, config(torch_seed=7), "(torch_seed)"),
        ({}, config(model_dtype="torch.bfloat16"), "(dtype)"),
        ({}, config(gen_kwargs={"temperature": 1}), "(gen_kwargs)"),
        (paths("shared", 40), paths("plain", 40), "(answer paths)"),
        ({}, {"lm_eval_version": "0.4.12"}, "(lm_eval_version)"),
        ({}, {"transformers_version": "5.0"}, "(transformers_version)"),
        ({}, HASHES, "(task_hash)"),
        ({}, {"n-shot": {"tf": 5, "boolq": 5}}, "(num_fewshot), so"),
        ({}, {"n-shot": {"tf": 0, "boolq": 5}}, "(num_fewshot) on boolq, so"),
        ({}, {"chat_template_sha": "f00"}, "(chat template)"),
        ({}, {"system_instruction_sha": "f00"}, "(system instruction)"),
        ({}, {"fewshot_as_multiturn": True}, "(fewshot_as_multiturn)"),
        # A group has the settings of its members.
        (
            GROUP | HASHES,
            GROUP | {"task_hashes": {"tf": "a", "boolq": "c"}},
            "(task_hash)",
        ),
        (GROUP, GROUP | {"n-shot": {"tf": 1, "boolq": 0}}, "(num_fewshot)"),
        # What is off is not another setting, and neither are other numbers on one path.
        ({}, {"fewshot_as_multiturn": False, "chat_template_sha": None}, ""),
        ({}, config(gen_kwargs=None), ""),
        (paths("shared", 900), paths("shared", 700), ""),
    ],
)
def test_settings_that_differ_are_named(note, one, other, said):
    found = note(one, other)
    assert said in found
    assert bool(said) == bool(found)


def test_without_samples_other_numbers_of_documents_are_named(note):
    few, many = (
        {"tf": {"acc,none": {"values": [1.0, 0.0] * n, "stderr": 0.1}}} for n in (1, 9)
    )
    assert "(documents)" in note({"samples": False}, {"samples": False}, (many, few))
