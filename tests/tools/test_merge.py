"""Modules for the harness, put together from sources of ours."""

from __future__ import annotations

import pytest

from tests.helpers import checkpoints


FIRST = '''\
"""First."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING, Any

from .second import helper, unused


if TYPE_CHECKING:
    from collections.abc import Iterator

    from .second import Alias

# Why it is three.
THREE = 3


class Root:
    """What the harness uses."""

    def kept(self, values: Alias) -> Iterator[Any]:
        yield helper(math.sqrt(THREE))

    def gone(self):
        return unused(os)


def not_needed():
    pass
'''
SECOND = '''\
"""Second."""

from __future__ import annotations

from typing import TYPE_CHECKING


if TYPE_CHECKING:
    #: What it stands for.
    Alias = list[int]


def helper(value):
    return value


def unused(module):
    return module
'''


@pytest.fixture
def merge(monkeypatch):
    monkeypatch.syspath_prepend(str(checkpoints.ROOT / "tools"))
    from upstream_patches import merge

    return merge


@pytest.fixture
def sources(tmp_path):
    (tmp_path / "first.py").write_text(FIRST)
    (tmp_path / "second.py").write_text(SECOND)
    return tmp_path


def rules(merge, **changes):
    return {"first": merge.Rules(leave_out=("Root.gone",), **changes)}


def test_what_nothing_needs_stays_here(merge, sources):
    target = merge.Target("lm_eval.one", "One.", ("second", "first"))
    texts = merge.merge(sources, [target], [("first", "Root")], rules(merge))
    (path,) = texts
    assert path == "lm_eval/one.py"
    text = texts[path]
    compile(text, path, "exec")
    assert text.startswith('"""One."""\nfrom __future__')
    assert "# Why it is three.\nTHREE = 3" in text
    assert "    #: What it stands for.\n    Alias = list[int]" in text
    assert "import math" in text
    for name in ("unused", "not_needed", "import os", ".second"):
        assert name not in text


def test_targets_import_from_each_other(merge, sources):
    one = merge.Target("lm_eval.one", "One.", ("first",))
    two = merge.Target("lm_eval.two", "Two.", ("second",), before="VERSION = 2\n")
    texts = merge.merge(sources, [one, two], [("first", "Root")], rules(merge))
    head, typing = texts["lm_eval/one.py"].split("if TYPE_CHECKING:")
    assert "from lm_eval.two import helper\n" in head
    assert "from lm_eval.two import Alias\n" in typing
    assert texts["lm_eval/two.py"].index("VERSION") < texts["lm_eval/two.py"].index(
        "import TYPE_CHECKING"
    )


def test_a_change_takes_the_place_of_a_text(merge, sources):
    target = merge.Target("lm_eval.one", "One.", ("second", "first"))
    changed = rules(merge, change={"THREE = 3": "THREE = 1 + 2"})
    texts = merge.merge(sources, [target], [("first", "Root")], changed)
    assert "THREE = 1 + 2" in texts["lm_eval/one.py"]


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"change": {"FOUR = 4": ""}}, "first holds 0 times what a rule replaces"),
        ({"change": {"yield": ""}}, "first holds 2 times what a rule replaces"),
        ({"leave_out": ("Root.unheard",)}, r"first has no Root\.unheard"),
    ],
)
def test_a_rule_that_fits_no_more_is_named(merge, sources, rule, message):
    target = merge.Target("lm_eval.one", "One.", ("second", "first"))
    (sources / "first.py").write_text(f"{FIRST}# yield\n")
    with pytest.raises(ValueError, match=message):
        merge.merge(
            sources, [target], [("first", "Root")], {"first": merge.Rules(**rule)}
        )


def test_a_name_that_no_target_holds_is_named(merge, sources):
    target = merge.Target("lm_eval.one", "One.", ("first",))
    with pytest.raises(
        ValueError, match=r"Root of first uses .* of second, which is in no"
    ):
        merge.merge(sources, [target], [("first", "Root")], rules(merge))


def test_two_sources_may_not_use_one_name(merge, sources):
    (sources / "second.py").write_text(
        f"{SECOND}\n\ndef THREE():\n    pass\n".replace("return value", "return THREE")
    )
    target = merge.Target("lm_eval.one", "One.", ("second", "first"))
    with pytest.raises(ValueError, match="second and first both define THREE"):
        merge.merge(sources, [target], [("first", "Root")], rules(merge))
