"""The stock ``lm_eval`` command in a process of its own."""

from __future__ import annotations

import pytest

from tests.helpers import checkpoints, evaluations, made_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    folder = made_tasks.write_choice_task(tmp_path_factory.mktemp("tasks"))
    return made_tasks.write_text_tasks(folder)


@pytest.mark.slow
def test_single_and_sharded_checkpoints_score_alike(
    tiny_llama, tiny_llama_sharded, tasks, tmp_path
):
    found = []
    for checkpoint in (tiny_llama, tiny_llama_sharded):
        output = tmp_path / checkpoint.name
        run = evaluations.lm_eval(
            *("--model", "pruned-hf", "--device", "cpu"),
            *("--model_args", f"pretrained={checkpoint},ratio=1.5,criterion=l2"),
            *("--tasks", "tiny_choice,tiny_rolling,tiny_generation"),
            *("--include_path", tasks, "--output_path", output),
            cwd=tmp_path,
        )
        assert "|intermediate size|            88|            48|" in run.stderr
        assert "tiny_choice" in run.stdout
        found.append(evaluations.results(output))
    one, other = found
    assert one["results"] == other["results"]
    assert one["config"]["pruning"] == other["config"]["pruning"]
    assert one["config"]["pruning"]["criterion"] == "l2"
    assert one["config"]["pruning"]["expansion_ratio_after"] == 1.5


@pytest.mark.slow
@pytest.mark.parametrize("limit", [40])
def test_the_real_model_on_truthfulqa(real_model, shared_data, limit, tmp_path):
    """The figures of an independent trial on all 817 questions bound what 40 can show."""
    scores = {}
    for arguments in ("prune_percent=0", "prune_percent=40"):
        output = tmp_path / arguments
        evaluations.lm_eval(
            *("--model", "pruned-hf", "--device", "cpu", "--batch_size", 8),
            *("--model_args", f"pretrained={real_model},{arguments}"),
            *("--tasks", "truthfulqa_mc2", "--limit", limit, "--output_path", output),
            cwd=shared_data,
        )
        results = evaluations.results(output)
        scores[arguments] = results["results"]["truthfulqa_mc2"]
        assert results["config"]["pruning"]["intermediate_size_before"] == 1536
    assert results["config"]["pruning"]["intermediate_size_after"] == 922
    for percent, full_set in (("0", 0.4476), ("40", 0.4943)):
        score = scores[f"prune_percent={percent}"]
        assert abs(score["acc,none"] - full_set) < 4 * score["acc_stderr,none"]


@pytest.mark.slow
def test_a_saved_real_model_scores_as_stock_hf_does(real_model, tasks, tmp_path):
    from transformers import AutoTokenizer

    from lm_eval_pruned import load_pruned

    saved = tmp_path / "saved"
    load_pruned(real_model, ratio="1.5").save_pretrained(saved)
    AutoTokenizer.from_pretrained(real_model).save_pretrained(saved)
    found = []
    for model, arguments in (
        ("pruned-hf", f"pretrained={real_model},ratio=1.5"),
        ("hf", f"pretrained={saved}"),
    ):
        output = tmp_path / model
        evaluations.lm_eval(
            *("--model", model, "--model_args", arguments, "--device", "cpu"),
            *("--tasks", "tiny_choice,tiny_rolling,tiny_generation"),
            *("--include_path", tasks, "--output_path", output),
            cwd=tmp_path,
        )
        found.append(evaluations.results(output)["results"])
    assert found[0] == found[1]


@pytest.mark.slow
def test_the_command_lists_our_groups_and_tasks_from_the_repository_root():
    root = checkpoints.ROOT
    listed = evaluations.lm_eval("ls", "groups", cwd=root).stdout
    assert "|pruned_dichotomy " in listed
    assert (
        "|pruned_demo_truthfulness "
        in evaluations.lm_eval("ls", "tasks", cwd=root).stdout
    )
