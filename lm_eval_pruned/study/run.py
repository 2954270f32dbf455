"""``lm-eval-pruned study``: a sweep, a profile, and a report that begins with what they show."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.configs import clear_errors
from lm_eval_pruned.checkpoints.planning import plan_rows, shipped_config
from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.pruning.arguments import SEVERAL_SIZES
from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.groups import FAMILIES
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.study.findings import read_findings
from lm_eval_pruned.study.sections import EQUILIBRIUM, study_sections
from lm_eval_pruned.sweeps.options import read_file
from lm_eval_pruned.sweeps.plan import model_source, plan_sweep
from lm_eval_pruned.sweeps.run import run_sweep


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def run_study(
    model: str | None,
    given_options: Mapping[str, Any],
    measure: Callable[..., int],
    *,
    margin: str,
    kind: str | None = None,
    quick: bool = False,
    families: Mapping[str, str] = MappingProxyType({}),
    **how: Any,
) -> int:
    """Study a model in a sweep folder.

    Args:
        model, given_options, kind, quick: See `options_of`.
        measure: ``lm-eval-pruned`` as a function of words, for the profile.
        margin: How far a score may be away from the unpruned model's and is kept.
        families: The family of each task that declares none.
        **how: What `run_sweep` takes.

    Returns:
        Exit code: 0 where everything is done, 1 where something failed, 130 after Ctrl-C.

    Raises:
        ValueError: A margin or a family is none, or see `options_of` and `plan_sweep`.
    """
    Margin("margin", margin)
    families = checked_families(families)
    options = options_of(model, given_options, kind, quick)
    code = run_sweep(plan_sweep(options), **how)
    if code == 130 or how["dry_run"]:
        return code
    folder = Path(options["output_path"])
    profile = folder / "profile" / "profile.json"
    measured = profile.is_file() and not read_json(profile)["interrupted"]
    if not measured and not options.get("ray") and not how["shard"]:
        ended = measure(_profile_words(options, profile.parent, quick))
        if ended == 130:
            return ended
        code = code or ended
    # Needs the extra `report`, without which a dry run works.
    from lm_eval_pruned.report.report import compared, write_report

    try:
        sweep = read_sweep(folder)
        within = Margin("equivalent", margin)
        comparison = compared(sweep, margin=within)
        findings = read_findings(sweep, comparison, families)
        opening = study_sections(
            Path(options["model_args"]["pretrained"]).name, findings
        )
        page, *_ = write_report(sweep, comparison, opening=opening)
    except (ResultsError, OSError) as error:
        print(f"There is no report yet: {error}", file=sys.stderr)
        return 1
    print(f"{opening[0].paragraphs[0]}\nWritten: {page}")
    return code


def _profile_words(options: Mapping[str, Any], folder: Path, quick: bool) -> list[str]:
    """Return the command that measures energy and latency at the sizes of a study."""
    words = ["profile", "--output_path", str(folder)]
    words += ["--model_args", *(f"{k}={v}" for k, v in options["model_args"].items())]
    for name in ("ratios", "prune_percents"):
        words += [f"--{name}", *options[name]] if options.get(name) else []
    words += ["--device", options["device"]] if options.get("device") else []
    words += ["--apply_chat_template"] if options.get("apply_chat_template") else []
    short = ("--max_new_tokens", "16", "--repeats", "3", "--limit", "2")
    return [*words, *(short if quick else ("--limit", "8"))]


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
    if SEVERAL_SIZES.keys() & given_options.keys():
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
