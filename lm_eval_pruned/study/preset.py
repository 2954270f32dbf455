"""What a study of one model consists of: the options of its sweep, as arXiv 2512.22671 had them."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.pruning.arguments import CUTS, SEVERAL
from lm_eval_pruned.sweeps.options import read_file
from lm_eval_pruned.sweeps.plan import model_source


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

#: What a sweep has of each kind of model, and what is different with ``--quick``: files of options,
#: as ``sweep --config`` takes them.
KINDS, QUICK = ("base", "instruct"), "quick"
#: The expansion ratio of Llama-3.2-1B, by whose ratios the study names its sizes.
STUDY_RATIO = 4


def options_of(
    models: Sequence[str], given: Mapping[str, Any], kind: str | None, quick: bool
) -> dict[str, dict[str, Any]]:
    """Return the options of the sweep of each model, by the last part of the model's name.

    Args:
        models: Folders or names on the Hub; without any, the default model.
        given: Options of a sweep, which win over those of the study.
        kind: One of `KINDS`; default: instruct where the tokenizer has a chat template and the
            name does not say otherwise.
        quick: Few documents, three sizes, one seed.

    Raises:
        ValueError: Two models share a name, or a model is named among the model arguments.
        OSError: The config or the tokenizer of a model cannot be read.
    """
    arguments, found = given.get("model_args") or {}, {}
    if "pretrained" in arguments:
        raise ValueError(
            f"model_args has pretrained={arguments['pretrained']}: name the model first instead, as "
            "in `lm-eval-pruned study MODEL --output_path FOLDER`."
        )
    for model in models or [""]:
        source = model_source({**arguments, "pretrained": model})
        name = Path(source["pretrained"]).name
        if name in found:
            raise ValueError(
                f"{model} is the second model called {name}: study it into another --output_path."
            )
        options = _preset(kind or kind_of(**source)) | (_preset(QUICK) if quick else {})
        if any(SEVERAL[each] in CUTS for each in SEVERAL.keys() & given.keys()):
            del options["prune_percents"]
        if "random" not in given.get("criteria", ["random"]):
            del options["seeds"]
        if "samples" in given:
            options.pop("limit", None)
        options |= given
        options["model_args"] = {**arguments, "pretrained": source["pretrained"]}
        options["output_path"] = str(Path(given["output_path"], name))
        found[name] = _fitted(name, options, source)
    return found


def _preset(name: str) -> dict[str, Any]:
    return read_file(str(Path(__file__).with_name(f"{name}.yaml")))


def kind_of(pretrained: str, **source: Any) -> str:
    """Return which of `KINDS` a model is, by its name and its tokenizer."""
    from transformers import AutoTokenizer

    if re.search(r"(?i)[-_.](base|pt)\b", Path(pretrained).name):
        return "base"
    tokenizer = AutoTokenizer.from_pretrained(pretrained, **source)
    return "instruct" if tokenizer.chat_template else "base"


def _fitted(
    name: str, options: dict[str, Any], source: dict[str, Any]
) -> dict[str, Any]:
    """Return options whose ratios are shares instead, where one is above the model's own.

    They are then the ratios of a model of `STUDY_RATIO`: 3.6 is 10 percent.
    """
    ratios = options.get("ratios", [])
    (whole,) = plan_rows(argument="prune_percent", values=["0"], **source)
    if all(float(each) <= whole.expansion_ratio for each in ratios):
        return options
    shares = [f"{float(100 - 100 * Fraction(each) / STUDY_RATIO):g}" for each in ratios]
    print(
        f"ratios={' '.join(ratios)} do not fit {name}, whose own is {whole.expansion_ratio:.4g}: it "
        f"is pruned by prune_percents={' '.join(shares)}, as a model of ratio {STUDY_RATIO} would be."
    )
    del options["ratios"]
    return options | {"prune_percents": [*options.get("prune_percents", []), *shares]}
