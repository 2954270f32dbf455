"""What a study of one model consists of: the options of its sweep, as arXiv 2512.22671 had them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.pruning.arguments import CUTS, DECLARED, SEVERAL
from lm_eval_pruned.sweeps.plan import model_source


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

BASE, INSTRUCT = KINDS = ("base", "instruct")
#: The study's sizes, in percent of the neurons of each layer that go.
PERCENTS = {BASE: "10 20 30 40 50 60", INSTRUCT: "10 40 60"}
TASKS = {BASE: "pruned_dichotomy", INSTRUCT: "pruned_dichotomy_instruct"}
#: The expansion ratio of Llama-3.2-1B, whose ratios the study names its sizes by.
STUDY_RATIO = 4
#: What the ids of configurations that know nothing begin with.
FLOOR = "floor-"
#: What is different with ``--quick``.
QUICK: dict[str, Any] = {
    "tasks": ["lambada_openai", "piqa", "pruned_demo"],
    "prune_percents": ["20", "40", "60"],
    "seeds": ["0"],
    "limit": 50.0,
}


@dataclass(frozen=True)
class Study:
    """A study of one model.

    Attributes:
        name: Last part of the model's name, by which tables and the study's data call it.
        kind: ``base``, asked without a chat template, or ``instruct``, with its own.
        options: Those of the sweep; see `lm_eval_pruned.sweeps.options`.
        quick: Whether it is the short one.
    """

    name: str
    kind: str
    options: dict[str, Any]
    quick: bool = False

    @property
    def folder(self) -> Path:
        """Where the sweep of this model lies."""
        return Path(self.options["output_path"])


def studies_of(
    models: Sequence[str], given: Mapping[str, Any], kind: str | None, quick: bool
) -> list[Study]:
    """Return the study of each model, the default model where none is named.

    Args:
        models: Folders or names on the Hub.
        given: Options of a sweep that win over those of the study.
        kind: One of `KINDS`; default: instruct where the tokenizer has a chat template and the
            model is not called a base model.
        quick: Few documents, three sizes, one seed.

    Raises:
        ValueError: A model is named twice, or among the model arguments.
        OSError: The config or the tokenizer of a model cannot be read.
    """
    arguments = dict(given.get("model_args") or {})
    if "pretrained" in arguments:
        raise ValueError(
            f"model_args has pretrained={arguments['pretrained']}: name the model before the "
            "options instead, as in `lm-eval-pruned study MODEL --output_path FOLDER`."
        )
    found: list[Study] = []
    for model in models or [""]:
        named = {**arguments, "pretrained": model} if model else arguments
        source = model_source(named)
        each = _study({**named, "pretrained": source["pretrained"]}, given, kind, quick)
        if each.name in (other.name for other in found):
            raise ValueError(
                f"{model} is the second model called {each.name}: study it into another "
                "--output_path."
            )
        found.append(each)
    return found


def _study(
    arguments: dict[str, Any], given: Mapping[str, Any], kind: str | None, quick: bool
) -> Study:
    kind = kind or kind_of(model_source(arguments))
    options: dict[str, Any] = {
        "tasks": [TASKS[kind]],
        "prune_percents": PERCENTS[kind].split(),
        "criteria": ["maw", "random"],
        "seeds": ["0", "1", "2"],
        "batch_size": "16",
        **({"apply_chat_template": True} if kind == INSTRUCT else {}),
        **(QUICK if quick else {}),
    }
    if any(SEVERAL[name] in CUTS for name in SEVERAL.keys() & given.keys()):
        del options["prune_percents"]
    if "samples" in given:
        options.pop("limit", None)
    if "random" not in given.get("criteria", ["random"]):
        del options["seeds"]
    if "recipe" in DECLARED and "recipe" not in arguments:
        options["beside"] = [{"recipe": "best"}]
    name = Path(arguments["pretrained"]).name
    options |= {**given, "model_args": arguments}
    options["output_path"] = str(Path(given["output_path"], name))
    return Study(name, kind, _fitted(options), quick)


def kind_of(source: Mapping[str, Any]) -> str:
    """Return which of `KINDS` a model is, by its name and its tokenizer."""
    from transformers import AutoTokenizer

    if re.search(r"(?i)[-_.](base|pt)\b", Path(source["pretrained"]).name):
        return BASE
    name, *others = source
    tokenizer = AutoTokenizer.from_pretrained(
        source[name], **{each: source[each] for each in others}
    )
    return INSTRUCT if tokenizer.chat_template else BASE


def _fitted(options: dict[str, Any]) -> dict[str, Any]:
    """Return options whose ratios, where one is above the model's own, are shares instead.

    The ratios are then taken for those of a model of `STUDY_RATIO`: 3.6 is 10 percent.
    """
    ratios = [Fraction(each) for each in options.get("ratios", [])]
    source = model_source(options["model_args"])
    (whole,) = plan_rows(argument="prune_percent", values=["0"], **source)
    if not any(ratio > Fraction(str(whole.expansion_ratio)) for ratio in ratios):
        return options
    if max(ratios) > STUDY_RATIO:
        raise ValueError(
            f"ratios={float(max(ratios)):g} is above {whole.expansion_ratio:.4g}, the model's own: "
            "pass --prune_percents."
        )
    shares = [f"{float(100 - 100 * ratio / STUDY_RATIO):g}" for ratio in ratios]
    print(
        f"{Path(source['pretrained']).name} has an expansion ratio of {whole.expansion_ratio:.4g}: "
        f"ratios={' '.join(options['ratios'])} become prune_percents={' '.join(shares)}, which they "
        "are for a model of ratio 4."
    )
    rest = {name: value for name, value in options.items() if name != "ratios"}
    return {**rest, "prune_percents": [*rest.get("prune_percents", []), *shares]}
