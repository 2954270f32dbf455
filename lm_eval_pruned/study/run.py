"""``lm-eval-pruned study``: the sweep of each model, its profile, its report, and one page of all."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.results.files import ResultsError, read_json
from lm_eval_pruned.results.folder import is_sweep
from lm_eval_pruned.results.runs import read_sweep
from lm_eval_pruned.study.estimate import estimate, missing, operations_per_second
from lm_eval_pruned.study.preset import INSTRUCT, Study, studies_of
from lm_eval_pruned.sweeps.options import parse_number
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.sweeps.run import run_sweep


if TYPE_CHECKING:
    from collections.abc import Sequence


def run_study(
    models: Sequence[str],
    given: dict[str, Any],
    *,
    kind: str | None = None,
    quick: bool = False,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    dry_run: bool = False,
) -> int:
    """Study each model into a folder of its own, and write the page of all; see `studies_of`.

    Returns:
        Exit code: 0 where everything is done, 1 where a unit failed, 130 after Ctrl-C.

    Raises:
        ValueError: An option or a size is of no use.
        OSError: A model cannot be read.
    """
    for model in models:
        if needs := missing(model):
            print(f"{model}:", *needs, sep="\n- ")
    studies = studies_of(models, given, kind, quick)
    # All are planned before one is run, so that what is wrong with the last is said at once.
    sweeps = [Sweep(study.options) for study in studies]
    if dry_run:
        for study, sweep in zip(studies, sweeps, strict=True):
            dtype = study.options["model_args"].get("dtype")
            speed = operations_per_second(given.get("device"), dtype)
            print(estimate(study, sweep, speed))
        return 0
    # Needs packages that a machine which only evaluates can lack: said before anything is run.
    from lm_eval_pruned.report.report import write_report
    from lm_eval_pruned.study.findings import read_findings
    from lm_eval_pruned.study.page import write_page

    del sweeps
    code = 0
    for study in studies:
        ended = run_sweep(study.options, shard=shard, retry_failed=retry_failed)
        if ended == 130:
            return ended
        code = max(code, ended)
    if int(os.environ.get("RANK") or 0) or not any(is_sweep(s.folder) for s in studies):
        return code
    alone = not given.get("ray") and int(os.environ.get("WORLD_SIZE") or 1) == 1
    found, profiles = {}, {}
    for study in studies:
        try:
            found[study.name] = read_findings(read_sweep(study.folder), 0.05)
            write_report(study.folder)
        except ResultsError as error:
            print(f"{study.name} is not on the page: {error}", file=sys.stderr)
            continue
        if (shard is None or shard[0] == 0) and alone:
            profile_into(study)
        file = study.folder / "profile" / "profile.json"
        if file.is_file():
            profiles[study.name] = read_json(file)
    if found:
        kinds = {study.name: study.kind for study in studies}
        files = write_page(Path(given["output_path"]), found, profiles, kinds)
        print(f"Written: {files[0]}")
    return code or int(len(found) < len(studies))


def profile_into(study: Study) -> None:
    """Measure energy and latency of a model at its sizes, unless its folder holds that."""
    import torch

    from lm_eval_pruned.energy.meter import CodecarbonMeter
    from lm_eval_pruned.energy.monitor import EnergyMonitor
    from lm_eval_pruned.profiling import report
    from lm_eval_pruned.profiling.measure import profile
    from lm_eval_pruned.profiling.options import ProfileRequest
    from lm_eval_pruned.profiling.prompts import demo_prompts

    folder, options = study.folder / "profile", study.options
    file = folder / "profile.json"
    sizes = {n: options[n] for n in ("ratios", "prune_percents") if n in options}
    if not sizes or (file.is_file() and not read_json(file)["interrupted"]):
        return
    arguments = dict(options["model_args"])
    device = options.get("device") or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = profile(
            ProfileRequest(
                arguments.pop("pretrained"),
                **{name: [*map(parse_number, of)] for name, of in sizes.items()},
                device=device,
                dtype=arguments.pop("dtype", None),
                load_arguments=arguments,
                batch_sizes=(1,),
                max_new_tokens=16 if study.quick else 50,
                repeats=3 if study.quick else 5,
                apply_chat_template=study.kind == INSTRUCT,
            ),
            demo_prompts()[: 2 if study.quick else 8],
            monitor=EnergyMonitor(CodecarbonMeter()),
        )
    except (RuntimeError, ValueError, OSError) as error:
        print(f"Energy and latency were not measured: {error}", file=sys.stderr)
        return
    report.write(found, folder)
