"""``lm-eval-pruned study``: the sweep of each model, its profile and report, and one page of all."""

from __future__ import annotations

import sys
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.compare.margins import Margin
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.study.estimate import estimate, missing, operations_per_second
from lm_eval_pruned.study.preset import MARGIN, checked_families, options_of
from lm_eval_pruned.sweeps.plan import plan_sweep
from lm_eval_pruned.sweeps.run import run_sweep


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


def run_study(
    models: Sequence[str],
    given: Mapping[str, Any],
    measure: Callable[..., int],
    *,
    kind: str | None = None,
    quick: bool = False,
    dry_run: bool = False,
    margin: str = MARGIN,
    families: Mapping[str, str] = MappingProxyType({}),
    **which: Any,
) -> int:
    """Study each model in a separate folder, and write the page of all.

    `measure` is ``lm-eval-pruned`` as a function of words, for the profiles; `margin` and
    `families` are what `read_findings` takes, and `which` units run what `run_sweep` takes; for the
    others see `options_of`.

    Returns:
        Exit code: 0 where everything is done, 1 where something failed, 130 after Ctrl-C.

    Raises:
        ValueError: A margin or a family is none, or see `options_of` and `plan_sweep`.
    """
    Margin("margin", margin)
    families = checked_families(families)
    for line in (line for model in models for line in missing(model)):
        print(line, file=sys.stderr)
    studies = options_of(models, given, kind, quick)
    # All are planned before one is run: what is wrong with the last is said at once.
    sweeps = {name: plan_sweep(options) for name, options in studies.items()}
    if dry_run:
        for name, sweep in sweeps.items():
            dtype = studies[name]["model_args"].get("dtype")
            speed = operations_per_second(given.get("device"), dtype)
            print(estimate(name, studies[name], sweep, speed))
        return 0
    # Needs the extra `report`, without which a dry run works.
    from lm_eval_pruned.report.report import write_report
    from lm_eval_pruned.study.findings import read_findings, sentences
    from lm_eval_pruned.study.page import write_study

    code, findings = 0, {}
    for sweep in sweeps.values():
        code = max(code, run_sweep(sweep, **which))
        if code == 130:
            return code
    for name, options in studies.items():
        folder = Path(options["output_path"])
        file = folder / "profile" / "profile.json"
        elsewhere = given.get("ray") or which.get("shard")
        measured = file.is_file() and not read_json(file)["interrupted"]
        try:
            read = DocumentReader()
            write_report(folder, read=read)
            if not measured and not elsewhere:
                ended = measure(_profile_words(options, file.parent, quick))
                if ended == 130:
                    return ended
                code = code or ended
            findings[name] = read_findings(
                read_sweep(folder), margin=margin, families=families, read=read
            )
        except ResultsError as error:
            print(f"{name} is not on the page yet: {error}", file=sys.stderr)
    for name, of_model in findings.items():
        print(sentences(name, of_model)[0])
    if findings:
        print(f"Written: {write_study(Path(given['output_path']), findings)[0]}")
    return code or int(len(findings) < len(studies))


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
