"""Which family a task belongs to: what it measures, and whether pruning is known to take that.

The families are those of the groups ``pruned_*``; tasks that are in none of them are found
by their names.
"""

from __future__ import annotations

import re
from dataclasses import dataclass


#: What width pruning takes away in arXiv 2512.22671, and what it leaves or improves there.
TAKEN, LEFT, UNKNOWN = "taken", "left", "unknown"


@dataclass(frozen=True)
class Family:
    """Tasks that measure the same kind of thing.

    Attributes:
        name: As in the name of its group, ``pruned_knowledge``.
        label: In sentences and legends.
        side: Which panel of a figure it is drawn in.
        tasks: What the names of its tasks contain.
    """

    name: str
    label: str
    side: str
    tasks: re.Pattern[str]


def _family(name: str, label: str, side: str, *tasks: str) -> Family:
    return Family(name, label, side, re.compile("|".join(tasks)))


OTHER = _family("other", "The rest", UNKNOWN, "")
#: In the order of legends; the first whose pattern is found counts.
FAMILIES = (
    _family(
        *("knowledge", "Knowledge", TAKEN),
        *("mmlu", "gsm8k", r"(^|_)arc_", "trivia_?qa", "nq_open", "openbookqa", "sciq"),
        *("gpqa", r"(^|_)math(_|$)", "medmcqa", "medqa"),
    ),
    _family(
        *("commonsense", "Commonsense", TAKEN),
        *("hellaswag", "winogrande", "piqa", "boolq", "social_iqa", "commonsense_?qa"),
        r"(^|_)copa",
    ),
    _family(
        *("language_modeling", "Language modelling", TAKEN),
        *(
            "wikitext",
            "lambada",
            r"^held_text",
            r"(^|_)c4(_|$)",
            r"(^|_)pile(_|$)",
            "paloma",
        ),
    ),
    _family("truthfulness", "Truthfulness", LEFT, "truthful"),
    _family(
        *("instruction_following", "Instruction following", LEFT),
        *("ifeval", "instruction"),
    ),
    _family("reasoning", "Multi-step reasoning", LEFT, "musr", r"(^|_)bbh(_|$)"),
    OTHER,
)


def family_of(task: str) -> Family:
    """Return the family of a task; `OTHER` for a task that no family is known of.

    Example:
        >>> family_of("truthfulqa_mc2").label, family_of("glue").label
        ('Truthfulness', 'The rest')
    """
    return next(family for family in FAMILIES if family.tasks.search(task))
