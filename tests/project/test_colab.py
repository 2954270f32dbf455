"""`docs/colab.ipynb`, as far as a machine without a card goes: its commands parse in `test_docs_commands`."""

from __future__ import annotations

import shlex

import nbformat
import pytest

from lm_eval_pruned.cli import main
from tests.helpers.checkpoints import ROOT


NOTEBOOK = nbformat.read(ROOT / "docs" / "colab.ipynb", as_version=4)


@pytest.mark.slow
def test_its_studies_can_be_planned(tiny_llama, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    start = "!lm-eval-pruned study meta-llama/Llama-3.2-1B "
    sources = [each.source for each in NOTEBOOK.cells if each.cell_type == "code"]
    studies = [each[len(start) :] for each in sources if each.startswith(start)]
    assert len(studies) == 2
    plans = []
    for words in map(shlex.split, studies):
        offline = ["--tasks", "pruned_demo", "--device", "cpu", "--dry_run"]
        assert main(["study", str(tiny_llama), *words, *offline]) == 0
        plans.append(capsys.readouterr().out)
    assert plans[0] == plans[1]
    assert "Tasks: pruned_demo_truthfulness, " in plans[0]
