"""What docs/verdict.md promises."""

from __future__ import annotations

import pytest

from tests.contract.commands import pruned
from tests.helpers.checkpoints import save_tiny
from tests.helpers.sweeping import write_tasks
from tests.sweeps.conftest import quick  # noqa: F401


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks"), documents=40)


@pytest.fixture(scope="module")
def tiny2(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("tiny2"), seed=1)


@pytest.fixture
def verdict(made, tmp_path):
    """Run the command on two models and some of two tasks, always into one folder."""

    def verdict(base, candidate, *tasks):
        models = [f"hf,pretrained={path},dtype=float32" for path in (base, candidate)]
        words = ["--tasks", *tasks, "--include_path", made, "--device", "cpu"]
        words += ["--gen_kwargs", "do_sample=false", "--margin", "10pt"]
        return pruned("verdict", *models, *words, "--output_path", tmp_path / "out")

    return verdict


BOTH = ("tiny_choice", "tiny_sentence")


def scored(done):
    """Return the tasks of the table of scores."""
    table = done.out.partition("## Scores")[2].partition("\n## ")[0]
    return {task for task in BOTH if f"|{task}" in table}


def test_another_candidate_or_base_in_the_same_folder_gets_no_score_of_the_first(
    verdict, tiny_llama, tiny2, tmp_path
):
    assert scored(verdict(tiny_llama, tiny2, *BOTH)) == {*BOTH}
    base = tmp_path / "out" / "base" / "units"
    before = {*base.rglob("results_*.json")}
    second = verdict(tiny_llama, tiny_llama, "tiny_choice")
    assert second.code == 0, second.out + second.err
    assert scored(second) == {"tiny_choice"}
    assert "candidate (tiny_sentence)" in second.out
    assert {*base.rglob("results_*.json")} == before, "the base's results are reused"
    third = verdict(tiny2, tiny2, "tiny_choice")
    assert scored(third) == {"tiny_choice"}
    assert "base (tiny_sentence)" in third.out
