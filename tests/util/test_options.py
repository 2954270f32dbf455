"""Options that are declared once, as a command and a mapping give them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from lm_eval_pruned.util.options import DeclaredOptions, add_options, option, row


if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True)
class Cooking(DeclaredOptions):
    """How to cook.

    Args:
        hours: Time on the stove, in
            hours. Not a text.
        pots: Which pots.
        spices: What goes in.
        covered: Whether there is a lid.
        heat: How hot.
    """

    name: str = "soup"
    hours: float = option(float, 1.5, "H", least=0)
    pots: tuple[int, ...] = option(int, (1, 2), "N", least=1)
    spices: Mapping[str, Any] = option(dict, None, "KEY=VALUE,...")
    covered: bool = option(bool, False)
    heat: str = option(
        str, "low", check=lambda _, v: v.lower(), choices=("low", "high")
    )


def parsed(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    tastes = [row("--salt", "", "salty"), row("--sweet", "N", "sweet")]
    add_options(parser, [tastes, *Cooking.rows()])
    return Cooking.parsed(parser.parse_args(words))


def test_a_command_has_them_with_a_line_of_help(capsys):
    with pytest.raises(SystemExit):
        parsed("--help")
    lines = " ".join(capsys.readouterr().out.split())
    assert "[--salt | --sweet N]" in lines
    assert "--hours H time on the stove, in hours (default: 1.5)" in lines
    assert "--pots N [N ...] which pots (default: 1, 2)" in lines
    assert "--name" not in lines
    given = parsed("--pots", "3", "4", "--covered", "--spices", "salt=1e-4,hot=true")
    made = Cooking.of(given, "cook", name="stew")
    assert made == Cooking("stew", 1.5, (3, 4), {"salt": 1e-4, "hot": True}, True)
    assert Cooking.of(parsed("--heat", "HIGH"), "cook").heat == "high"
    for spices in ('{"salt": 1}', {"salt": 1}, ["salt=1"]):
        assert Cooking.of({"spices": spices}, "cook").spices == {"salt": 1}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hour": 1}, "unknown key hour: did you mean hours?"),
        ({"name": "x"}, "unknown key name: known: hours, pots"),
        ({"hours": "long"}, "cook has hours=long: pass a number"),
        ({"hours": True}, "hours=True"),
        ({"pots": 3}, "pots=3: pass a whole number"),
        ({"spices": "{"}, "spices={: pass key=value pairs"),
        ({"spices": "salt"}, "spices=salt: pass key=value pairs"),
        ({"pots": ["0"]}, "pots=0 is too small: pass 1"),
        ({"heat": "x"}, "heat=x is unknown: pass one of low, high"),
    ],
)
def test_what_is_of_no_use_is_refused(given, message):
    with pytest.raises(ValueError) as told:
        Cooking.of(given, "cook")
    assert message in str(told.value)
