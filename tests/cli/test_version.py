"""`lm-eval-pruned --version`."""

from __future__ import annotations

from importlib.metadata import version

import pytest

from lm_eval_pruned.cli import main


def test_the_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"lm-eval-pruned {version('lm-eval-pruned')}\n"
