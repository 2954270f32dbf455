"""What a study of one model consists of: the options of its sweep, as arXiv 2512.22671 had them."""

from __future__ import annotations

import re
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.configs import clear_errors
from lm_eval_pruned.checkpoints.planning import plan_rows, shipped_config
from lm_eval_pruned.results.groups import FAMILIES
from lm_eval_pruned.sweeps.options import OF_SIZES, read_file
from lm_eval_pruned.sweeps.plan import model_source


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


#: The expansion ratio at which arXiv 2512.22671 (v3) sees its gain.
EQUILIBRIUM = Fraction("2.4")


def options_of(
    model: str | None, given_options: Mapping[str, Any], kind: str | None, quick: bool
) -> dict[str, Any]:
    """Return the options of the sweep of a model.

    Args:
        model: A folder or a name on the Hub; without one, the default model.
        given_options: Options of a sweep, which win over those of the study.
        kind: ``base`` or ``instruct``; default: instruct where the tokenizer has a chat template
            and the name does not say otherwise.
        quick: Tasks that come with this package, two sizes, no other criteria.

    Raises:
        ValueError: The model is named among the model arguments.
        OSError: The config or the tokenizer of the model cannot be read.
    """
    arguments = given_options.get("model_args") or {}
    if "pretrained" in arguments:
        raise ValueError(
            f"model_args has pretrained={arguments['pretrained']}: name the model as an argument instead, as "
            "in `lm-eval-pruned study MODEL --output_path FOLDER`."
        )
    source = model_source({**arguments, "pretrained": model})
    options = _preset(kind or _kind_of(**source)) | (_preset("quick") if quick else {})
    if OF_SIZES.keys() & given_options.keys():
        del options["prune_percents"], options["ratios"]
    elif not _adds_equilibrium(options["prune_percents"], source):
        del options["ratios"]
    if "random" not in given_options.get("criteria", ["random"]):
        del options["seeds"]
    model_args = {**arguments, "pretrained": source["pretrained"]}
    return {**options, **given_options, "model_args": model_args}


def checked_families(named_families: Mapping[str, str]) -> dict[str, str]:
    """Return the family of each task that declares none; ValueError for an unknown family."""
    import yaml

    names = [family.name for family in FAMILIES[:-1]]
    for task, family in named_families.items():
        if family not in names:
            raise ValueError(
                f"--families {task}={family} names no family: pass one of {', '.join(names)}."
            )
    text = Path(__file__).with_name("families.yaml").read_text(encoding="utf-8")
    return {**yaml.safe_load(text), **named_families}


def _adds_equilibrium(percents: Sequence[str], source: Mapping[str, Any]) -> bool:
    """Return whether a model is wider than `EQUILIBRIUM`, and none of the `percents` leaves it."""
    sizes = [0.0, *map(float, percents)]
    whole, *rows = plan_rows(argument="prune_percent", values=sizes, **source)
    if whole.expansion_ratio <= EQUILIBRIUM:
        return False
    (row,) = plan_rows(argument="ratio", values=[float(EQUILIBRIUM)], **source)
    return row.intermediate_size not in [size.intermediate_size for size in rows]


def _preset(name: str) -> dict[str, Any]:
    return read_file(str(Path(__file__).with_name(f"{name}.yaml")))


def _kind_of(pretrained: str, **source: Any) -> str:
    from transformers import AutoTokenizer

    if shipped_config(pretrained):
        return "instruct" if pretrained.endswith("-Instruct") else "base"
    if re.search(r"(?i)[-_.](base|pt)\b", Path(pretrained).name):
        return "base"
    with clear_errors(pretrained):
        tokenizer = AutoTokenizer.from_pretrained(pretrained, **source)
    return "instruct" if tokenizer.chat_template else "base"
