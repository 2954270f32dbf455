"""Options that a dataclass declares, as a command and a mapping give them."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest

from lm_eval_pruned.util.options import DeclaredOptions, nearest, option


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
    """

    name: str = "soup"
    hours: float = option(float, 1.5, "H", least=0)
    pots: tuple[int, ...] = option(int, (1, 2), "N", least=1)
    spices: Mapping[str, Any] = option(dict, None, "KEY=VALUE,...")
    covered: bool = option(bool, False)


def parsed(*words: str) -> dict:
    parser = argparse.ArgumentParser()
    Cooking.add_to(parser)
    return Cooking.parsed(parser.parse_args(words))


def test_a_command_has_them_with_a_line_of_help():
    parser = argparse.ArgumentParser()
    Cooking.add_to(parser)
    lines = " ".join(parser.format_help().split())
    assert "--hours H time on the stove, in hours (default: 1.5)" in lines
    assert "--pots N [N ...] which pots (default: 1, 2)" in lines
    assert "--name" not in lines
    given = parsed("--pots", "3", "4", "--covered", "--spices", "salt=1,hot=true")
    made = Cooking.of(given, "cook", name="stew")
    assert made == Cooking("stew", 1.5, (3, 4), {"salt": 1, "hot": True}, True)
    assert Cooking.of(parsed(), "cook") == Cooking()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"hour": 1}, "cook has the unknown key hour: did you mean hours?"),
        ({"name": "x"}, "cook has the unknown key name: known: hours, pots"),
        ({"hours": "long"}, "cook has hours=long: pass a number"),
        ({"hours": True}, "cook has hours=True: pass a number"),
        ({"pots": 3}, "cook has pots=3: pass a whole number"),
        ({"covered": 1}, "cook has covered=1: pass true or false"),
        ({"spices": "{"}, "cook has spices={: pass a mapping"),
        ({"pots": ["0"]}, "pots=0 is too small: pass 1 or more"),
    ],
)
def test_what_is_of_no_use_is_refused_in_one_sentence(given, message):
    with pytest.raises(ValueError) as told:
        Cooking.of(given, "cook")
    assert str(told.value).startswith(message)


def test_a_number_of_yaml_that_is_a_text_is_a_number():
    assert Cooking.of({"spices": {"salt": "1e-4"}}, "f").spices == {"salt": 1e-4}


def test_advice_on_a_name():
    assert nearest("ratoi", ["ratio", "width"]) == "did you mean ratio?"
    assert nearest("x", ["ratio", "width"]) == "known: ratio, width."
