"""Allocations that other packages declare under ``lm_eval_pruned.allocations``."""

from __future__ import annotations

import sys

import pytest

from lm_eval_pruned import load_pruned
from lm_eval_pruned.pruning.allocation_names import GROUP, canonical_allocation
from tests.helpers.checkpoints import ROOT


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Return a function that installs a module and one entry point."""

    def install(code: str, entry: str) -> None:
        module = entry.partition(" = ")[2].strip('"').partition(":")[0]
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (tmp_path / f"{module}.py").write_text(code)
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text(
            f"[{GROUP}]\n{entry.replace(chr(34), '')}"
        )
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, module, raising=False)

    return install


def test_the_example_of_the_documentation(install, tiny_llama):
    text = (ROOT / "docs" / "allocation.md").read_text("utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    entry = text.split("```toml\n")[1].split("```")[0].splitlines()[-1]
    install(code, entry)
    assert canonical_allocation("tapered") == "tapered"
    record = load_pruned(str(tiny_llama), ratio=2, allocation="tapered").prune_record
    widths = [width for _, width in record.plan.layer_widths]
    assert sum(widths) == 64 * len(widths)
    assert widths == sorted(widths, reverse=True)
    assert widths[0] > widths[-1]


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        ("[1]", r"returned \[1\], 1 in all: it must return 3 whole numbers"),
        ("[64.0] * 3", r"returned \[64.0, 64.0, 64.0\]: it must"),
        ("[0, 96, 96]", r"returned \[0, 96, 96\], 192 in all: it must"),
        ("['a']", r"returned \['a'\]: it must"),
        ("None", "returned a NoneType: it must"),
    ],
)
def test_what_is_no_allocation_is_refused(install, tiny_llama, returned, message):
    install(f"def f(scores, **bounds):\n    return {returned}\n", "odd = odd_one:f")
    with pytest.raises(ValueError, match=f"^allocation=odd {message}"):
        load_pruned(str(tiny_llama), ratio=2, allocation="odd")


def test_what_cannot_be_imported_is_named(install, tiny_llama):
    install("", "gone = gone_one:f")
    with pytest.raises(ValueError, match=r"^allocation=gone is declared as gone_one:f"):
        load_pruned(str(tiny_llama), ratio=2, allocation="gone")
