"""``lm-eval-pruned study``: a sweep, a profile, and a report that begins with what they show."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.study.preset import checked_families, options_of
from lm_eval_pruned.sweeps.plan import plan_sweep
from lm_eval_pruned.sweeps.run import run_sweep


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


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
    from lm_eval_pruned.study.findings import read_findings
    from lm_eval_pruned.study.sections import study_sections

    try:
        sweep = read_sweep(folder)
        within = Margin("equivalent", margin)
        comparison = compared(sweep, margin=within)
        findings = read_findings(sweep, comparison, families)
        opening = study_sections(
            Path(options["model_args"]["pretrained"]).name, findings
        )
        page, *_ = write_report(sweep, comparison, opening=opening)
    except ResultsError as error:
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
