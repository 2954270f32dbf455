"""Criteria that other packages declare under ``lm_eval_pruned.criteria``."""

from __future__ import annotations

import sys

import pytest

from lm_eval_pruned import PrunePlan, load_pruned, prune_model
from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity
from lm_eval_pruned.pruning.criteria import ALIASES, CRITERIA, GROUP, RANDOM
from tests.checkpoints.test_sensitivity import request_of
from tests.helpers import by_hand, checkpoints, evaluations
from tests.helpers.ways_to_load import write_texts


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with a module and entry points."""

    def install(code: str, *entries: str, name: str = "user_criteria"):
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(code)
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        (info / "METADATA").write_text(metadata)
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *entries]))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, name, raising=False)
        return site / f"{name}.py"

    return install


CUBIC = """
def cubic(gate, up):
    # Compares neurons with each other, so it must see all of them.
    size = gate.float().pow(3).abs().sum(dim=1) + up.float().pow(3).abs().sum(dim=1)
    return size - size.mean()
"""


def test_a_packages_criterion_prunes_everywhere(install, tiny_llama):
    install(CUBIC, "cubic = user_criteria:cubic")
    loaded = load_pruned(str(tiny_llama), ratio=2, criterion="cubic").prune_record
    whole = load_pruned(str(tiny_llama))
    for layer, kept in zip(whole.model.layers, loaded.kept, strict=True):
        rows = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        size = sum(weight.abs().pow(3).sum(dim=1) for weight in rows)
        assert kept.equal(by_hand.top(size.tolist(), 64))
    pruned = prune_model(whole, ratio=2, criterion="cubic")
    assert pruned.prune_record.digest == loaded.digest
    arguments = f"pretrained={tiny_llama},ratio=2,criterion=cubic"
    _, config = evaluations.evaluate("pruned-hf", arguments, limit=1)
    assert config["pruning"]["criterion"] == "cubic"
    assert config["pruning"]["kept_digest"] == loaded.digest


def test_curves_are_measured_each_time(install, tiny_llama, tmp_path, monkeypatch):
    """Nothing tells whether the code of another package is still the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = write_texts(tmp_path / "text.jsonl")
    code = "def f(gate, up):\n    return gate.abs().sum(1)\n"
    file, found = install(code, "f = user_criteria:f"), []
    # Of another length, by which Python tells that its compiled file is of other source.
    for each in (code, code.replace("gate.abs()", "-gate.abs()"), code):
        file.write_text(each)
        sys.modules.pop("user_criteria", None)
        found.append(measure_sensitivity(request_of(tiny_llama), text, criteria=("f",)))
    assert found[0] == found[2] != found[1]


def test_names_are_known_without_importing_and_ours_cannot_be_taken(install):
    names = ("broken", "maw", "ppm")
    entries = [f"{name} = user_criteria:f" for name in names]
    install("raise RuntimeError('imported')", *entries)
    plans = [PrunePlan.from_arguments(32, 88, ratio=2, criterion=n) for n in names]
    assert [plan.criterion for plan in plans] == ["broken", "maw", "maw"]
    with pytest.raises(ValueError, match=r"criterion=x is unknown.*maw_act.*, broken"):
        PrunePlan.from_arguments(32, 88, ratio=2, criterion="x")


@pytest.mark.parametrize(
    ("returned", "word"),
    [
        ("gate", r"shape \(88, 32\).* return 88 finite"),
        ("gate[:80, 0]", r"shape \(80,\)"),
        ("gate[:, 0].double() * 0 + 1e300", "NaN or infinite"),
    ],
)
def test_what_a_criterion_returns_is_checked(install, tiny_llama, returned, word):
    install(f"def f(gate, up): return {returned}", "f = user_criteria:f")
    with pytest.raises(ValueError, match=f"criterion=f .*{word}"):
        load_pruned(str(tiny_llama), ratio=2, criterion="f")


def test_the_example_of_the_documentation(install, tiny_llama):
    text = (checkpoints.ROOT / "docs" / "own.md").read_text()
    code = text.split("```toml\n")[0].split("```python\n")[-1].split("```")[0]
    declaration = text.split("```toml\n")[1].split("```")[0]
    entry = declaration.split(f'"{GROUP}"]\n')[1].splitlines()[0]
    name, _, value = entry.replace('"', "").partition(" = ")
    install(code, f"{name} = {value}", name=value.partition(":")[0])
    loaded = load_pruned(str(tiny_llama), ratio=2, criterion=name)
    assert loaded.config.intermediate_size == 64


def test_every_built_in_criterion_is_documented_with_its_formula():
    text = (checkpoints.ROOT / "docs" / "criteria.md").read_text().replace("\\|", "|")
    assert all(f"`{name}`" in text for name in (*CRITERIA, RANDOM, *ALIASES))
    for name, criterion in CRITERIA.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        assert f"| {criterion.formula}" in row
