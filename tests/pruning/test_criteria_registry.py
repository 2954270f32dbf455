"""Criteria that other packages declare under ``lm_eval_pruned.criteria``."""

from __future__ import annotations

import sys

import pytest

from lm_eval_pruned import PrunePlan, load_pruned, prune_model
from lm_eval_pruned.checkpoints.sensitivity import measure_sensitivity
from lm_eval_pruned.pruning.criteria import (
    ALIASES,
    CRITERIA,
    GROUP,
    RANDOM,
    canonical_name,
)
from tests.checkpoints.test_sensitivity import request_of
from tests.helpers import checkpoints, evaluations


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a package with a module and entry points."""

    def install(code: str, *entries: str, name: str = "user_criteria") -> None:
        site = tmp_path / name
        info = site / f"{name}-1.0.dist-info"
        info.mkdir(parents=True)
        (site / f"{name}.py").write_text(code)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text("\n".join([f"[{GROUP}]", *entries]))
        monkeypatch.syspath_prepend(site)
        monkeypatch.delitem(sys.modules, name, raising=False)

    return install


DOCUMENTED = """
def cubic(gate, up):
    # Compares neurons with each other, so it must see all of them.
    size = gate.float().pow(3).abs().sum(dim=1) + up.float().pow(3).abs().sum(dim=1)
    return size - size.mean()
"""


def test_a_packages_criterion_prunes_everywhere(install, tiny_llama, tmp_path):
    install(DOCUMENTED, "cubic = user_criteria:cubic")
    assert canonical_name("cubic") == "cubic"
    loaded = load_pruned(str(tiny_llama), ratio=2, criterion="cubic")
    whole = load_pruned(str(tiny_llama))
    for mlp, kept in zip(
        (layer.mlp for layer in whole.model.layers),
        loaded.prune_record.kept,
        strict=True,
    ):
        size = sum(
            w.float().pow(3).abs().sum(dim=1)
            for w in (mlp.gate_proj.weight, mlp.up_proj.weight)
        )
        assert kept.tolist() == sorted(size.topk(64).indices.tolist())
    pruned = prune_model(whole, ratio=2, criterion="cubic")
    assert pruned.prune_record.digest == loaded.prune_record.digest
    _, config = evaluations.evaluate(
        "pruned-hf", f"pretrained={tiny_llama},ratio=2,criterion=cubic", limit=1
    )
    assert config["pruning"]["criterion"] == "cubic"
    assert config["pruning"]["kept_digest"] == loaded.prune_record.digest


def test_curves_are_measured_each_time(install, tiny_llama, tmp_path, monkeypatch):
    """Nothing tells whether the code of another package is still the same."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    text = tmp_path / "text.jsonl"
    text.write_text('{"text": "The tide comes in twice a day."}\n')

    def losses():
        sys.modules.pop("user_criteria", None)
        found = measure_sensitivity(request_of(tiny_llama), str(text), criteria=("f",))
        return [curve.losses for curve in found.curves]

    code = "def f(gate, up):\n    return gate.abs().sum(1)\n"
    install(code, "f = user_criteria:f")
    first = losses()
    # Another length, by which Python tells that its compiled file is of other source.
    edited = code.replace("gate.abs()", "-gate.abs()")
    (tmp_path / "user_criteria" / "user_criteria.py").write_text(edited)
    assert losses() != first
    (tmp_path / "user_criteria" / "user_criteria.py").write_text(code)
    assert losses() == first


def test_unknown_names_list_what_there_is(install):
    install(DOCUMENTED, "cubic = user_criteria:cubic")
    with pytest.raises(
        ValueError, match=r"criterion=cubist is unknown.*maw_act.*, cubic\."
    ):
        PrunePlan.from_arguments(32, 88, ratio=2, criterion="cubist")


def test_built_in_names_and_aliases_cannot_be_taken(install, tiny_llama):
    before = load_pruned(str(tiny_llama), ratio=2).prune_record.digest
    code = "def zero(gate, up):\n    return gate[:, 0] * 0"
    install(code, "maw = user_criteria:zero", "ppm = user_criteria:zero")
    for name in ("maw", "ppm"):
        loaded = load_pruned(str(tiny_llama), ratio=2, criterion=name)
        assert loaded.prune_record.digest == before


def test_names_can_be_checked_without_importing_the_package(install):
    install("raise RuntimeError('imported')", "broken = user_criteria:f")
    plan = PrunePlan.from_arguments(32, 88, ratio=2, criterion="broken")
    assert plan.criterion == "broken"


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "def f(gate, up): return gate",
            r"shape \(88, 32\).* return 88 finite numbers",
        ),
        ("def f(gate, up): return gate[:80, 0]", r"shape \(80,\)"),
        ("def f(gate, up): return gate[:, 0] / 0", "NaN or infinite"),
        (
            "def f(gate, up): return gate[:, 0].double() * 0 + 1e300",
            "NaN or infinite",
        ),
    ],
)
def test_what_a_criterion_returns_is_checked(install, tiny_llama, code, message):
    install(code, "f = user_criteria:f")
    with pytest.raises(ValueError, match=f"criterion=f .*{message}"):
        load_pruned(str(tiny_llama), ratio=2, criterion="f")


def test_the_example_of_the_documentation(install, tiny_llama):
    text = (checkpoints.ROOT / "docs" / "criteria.md").read_text()
    code = text.split("```toml\n")[0].split("```python\n")[-1].split("```")[0]
    declaration = text.split("```toml\n")[1].split("```")[0]
    name, _, value = declaration.splitlines()[-1].partition(" = ")
    module = value.strip('"').partition(":")[0]
    assert f'"{GROUP}"' in declaration
    assert len(code.strip().splitlines()) <= 10
    install(code, f"{name} = {value.strip(chr(34))}", name=module)
    loaded = load_pruned(str(tiny_llama), ratio=2, criterion=name)
    assert loaded.config.intermediate_size == 64


def test_every_built_in_criterion_is_documented():
    text = (checkpoints.ROOT / "docs" / "criteria.md").read_text().replace("\\|", "|")
    for name in (*CRITERIA, RANDOM, *ALIASES):
        assert f"`{name}`" in text, name
    for name, criterion in CRITERIA.items():
        (row,) = [line for line in text.splitlines() if line.startswith(f"| `{name}`")]
        assert f"| {criterion.formula}" in row
