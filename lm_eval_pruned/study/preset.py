"""What a study of one model consists of: the options of its sweep, as arXiv 2512.22671 had them."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.configs import clear_errors
from lm_eval_pruned.checkpoints.planning import shipped_config
from lm_eval_pruned.pruning.arguments import CUTS, SEVERAL
from lm_eval_pruned.sweeps.options import read_file
from lm_eval_pruned.sweeps.plan import model_source


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence


def options_of(
    models: Sequence[str], given: Mapping[str, Any], kind: str | None, quick: bool
) -> dict[str, dict[str, Any]]:
    """Return the options of the sweep of each model, by the last part of the model's name.

    Args:
        models: Folders or names on the Hub; without any, the default model.
        given: Options of a sweep, which win over those of the study.
        kind: ``base`` or ``instruct``; default: instruct where the tokenizer has a chat template
            and the name does not say otherwise.
        quick: Few documents, three sizes, one seed.

    Raises:
        ValueError: Two models share a name, or a model is named among the model arguments.
        OSError: The config or the tokenizer of a model cannot be read.
    """
    arguments, found = given.get("model_args") or {}, {}
    if "pretrained" in arguments:
        raise ValueError(
            f"model_args has pretrained={arguments['pretrained']}: name the model as an argument instead, as "
            "in `lm-eval-pruned study MODEL --output_path FOLDER`."
        )
    for model in models or [""]:
        source = model_source({**arguments, "pretrained": model})
        name = Path(source["pretrained"]).name
        if name in found:
            raise ValueError(
                f"{model} is the second model called {name}: pass another --output_path for it."
            )
        options = _preset(kind or _kind_of(**source)) | (
            _preset("quick") if quick else {}
        )
        if any(SEVERAL[each] in CUTS for each in SEVERAL.keys() & given.keys()):
            del options["prune_percents"]
        if "random" not in given.get("criteria", ["random"]):
            del options["seeds"]
        if "samples" in given:
            options.pop("limit", None)
        options |= given
        options["model_args"] = {**arguments, "pretrained": source["pretrained"]}
        options["output_path"] = str(Path(given["output_path"], name))
        found[name] = options
    return found


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
