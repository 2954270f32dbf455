"""What docs/verdict.md says of broken copies of SmolLM2, and of copies that were changed honestly.

`benchmarks/saboteurs.py` breaks them, and evaluates each on all tasks of the demo, which takes half an hour. Here
each is asked what shows it.
"""

from __future__ import annotations

import re
import runpy
import shutil

import pytest

from tests.contract.commands import pruned
from tests.helpers.checkpoints import ROOT
from tests.sweeps.conftest import quick  # noqa: F401


pytestmark = pytest.mark.slow

WRITTEN, KINDS, LONG = (
    "pruned_probe_written", "pruned_demo_kinds", "pruned_demo_long_text",
)  # fmt: skip
#: Which task shows what was done.
SHOWN_BY = {
    WRITTEN: [
        "EOS id lost",
        "repetition penalty 50",
        "chat template of another model",
        "system prompt dropped from the template",
    ],
    KINDS: [
        "noise on digits",
        "noise on tokens of code",
        "noise on tokens of German",
        "last norm x 0.8",
        "head rounded to 3 bits",
    ],
    LONG: [
        "rope theta / 10",
        "rope wrong beyond 1,024",
        "four far-looking heads at zero",
    ],
}


@pytest.fixture
def said(real_model, tmp_path):
    """Return a function that judges a changed copy on some tasks."""
    script = runpy.run_path(str(ROOT / "benchmarks" / "saboteurs.py"))
    changes = script["BROKEN"] | script["HONEST"]

    def said(name, *tasks):
        folder = tmp_path / re.sub(r"\W", "_", name)
        shutil.copytree(real_model, folder)
        candidate = changes[name](folder) or f"hf,pretrained={folder},dtype=float32"
        both = f"hf,pretrained={real_model},dtype=float32", candidate
        where = "--include_path", ROOT / "tasks", "--device", "cpu"
        words = "--tasks", *tasks, *where, "--output_path", tmp_path / "out"
        done = pruned("verdict", *both, *words)
        shutil.rmtree(folder)
        return done

    said.broken = {*script["BROKEN"]}
    return said


@pytest.mark.parametrize("task", SHOWN_BY)
def test_a_broken_copy_is_not_shipped(task, said):
    assert said.broken == {name for names in SHOWN_BY.values() for name in names}
    codes = {name: said(name, task).code for name in SHOWN_BY[task]}
    assert {name: code in (1, 3) for name, code in codes.items()} == dict.fromkeys(
        SHOWN_BY[task], True
    ), codes


@pytest.mark.parametrize("name", ["neurons in another order", "int8 by torchao"])
def test_an_honest_change_is_shipped(name, said):
    done = said(name, WRITTEN, KINDS, LONG)
    assert done.code == 0, done.out
