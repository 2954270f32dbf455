"""docs/reference.md: the commands, the model types and the public names."""

from __future__ import annotations

import re
import sys

import pytest
from lm_eval.api.registry import get_model

import lm_eval_pruned
from tests.contract.commands import pruned
from tests.helpers import evaluations
from tests.helpers.checkpoints import ROOT


PAGE = (ROOT / "docs" / "reference.md").read_text("utf-8")
IMPORTED = re.findall(
    r"\w+", re.search(r"from lm_eval_pruned import \(([^)]*)\)", PAGE)[1]
)


def test_each_command_prints_itself_with_help():
    every = pruned("--help")
    assert every.code == 0
    names = re.findall(r"(?m)^    (\w+)  ", every.out)
    assert {"plan", "prune", "sweep", "compare", "verdict", "heal"} <= {*names}
    for name in names:
        done = pruned(name, "--help")
        assert (done.code, done.err) == (0, "")
        assert done.out.startswith(f"usage: lm-eval-pruned {name} ")


def test_the_model_types_are_those_of_the_table():
    rows = re.findall(r"(?m)^\| (`[a-z`, -]+) \|", PAGE)
    names = {name.strip("`") for row in rows for name in row.split(", ")}
    assert names == {"pruned-hf", "pruned-vllm", "hf-prefix", "constant", "echo"}
    for name in names - {"pruned-vllm"}:
        assert get_model(name).__module__.startswith("lm_eval_pruned.")


def test_five_names_are_public():
    assert sorted(lm_eval_pruned.__all__) == sorted(IMPORTED)
    assert len(IMPORTED) == 5
    with pytest.raises(AttributeError, match="no attribute 'load_prund'"):
        lm_eval_pruned.load_prund  # noqa: B018


@pytest.mark.parametrize(
    "line", ["import lm_eval_pruned", "from lm_eval_pruned import PrunePlan"]
)
def test_importing_loads_neither_torch_nor_the_harness(line):
    code = f"import sys; {line}; print(*sys.modules)"
    done = evaluations.run([sys.executable, "-c", code], check=True)
    assert "lm_eval_pruned" in done.stdout.split()
    assert not {"torch", "lm_eval"} & {*done.stdout.split()}
