"""`lm-eval-pruned --version`, and what it must not cost the other options."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest

from lm_eval_pruned.cli import main


def test_the_version_is_the_installed_one(capsys):
    with pytest.raises(SystemExit) as left:
        main(["--version"])
    assert left.value.code == 0
    assert capsys.readouterr().out == f"lm-eval-pruned {version('lm-eval-pruned')}\n"


def test_help_names_it_and_does_not_look_it_up():
    code = (
        "import sys; from lm_eval_pruned.cli import main\n"
        "try: main(['--help'])\n"
        "finally: assert 'importlib.metadata' not in sys.modules"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert "--version" in done.stdout
