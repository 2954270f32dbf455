"""``lm-eval-pruned report``: a sweep as Markdown, CSV, one HTML page and plots.

A report is a list of sections with text, a table, plots and notes; Markdown and HTML
are two ways to write the same list.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.analysis.comparison import compare, split_sweep
from lm_eval_pruned.analysis.random_baseline import random_baseline_section
from lm_eval_pruned.analysis.report_curves import (
    capabilities_section,
    energy_section,
    truthfulness_section,
)
from lm_eval_pruned.analysis.report_flips import CSV, PAGE, flips_section
from lm_eval_pruned.analysis.report_formats import as_csv, as_html, as_markdown
from lm_eval_pruned.analysis.report_layers import layers_section
from lm_eval_pruned.analysis.report_sections import (
    configurations_section,
    remarks_section,
    repeating_section,
    scores_section,
    trends_section,
)
from lm_eval_pruned.analysis.sweep_results import SweepResults, read_sweep
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Sequence

    from lm_eval_pruned.analysis.comparison_rows import Comparison
    from lm_eval_pruned.analysis.report_page import Section
    from lm_eval_pruned.analysis.results_file import Run


def write_report(
    folder: str | Path,
    output_path: str | Path | None = None,
    *,
    alpha: float = 0.05,
    texts: bool = True,
) -> list[Path]:
    """Write ``report.md``, ``results.csv``, ``report.html``, ``plots/`` and pages beside them.

    Args:
        folder: Sweep folder.
        output_path: Where; default: ``report`` in the sweep folder.
        alpha: Level of the tests.
        texts: Whether ``flips.html`` shows the texts of documents and answers.

    Returns:
        The files, the page first.

    Raises:
        ResultsError: The folder holds no sweep that can be read, or no baseline.
        ValueError: matplotlib is not installed, or `alpha` is out of range.
    """
    if find_spec("matplotlib") is None:
        raise ValueError(
            "The plots of a report need matplotlib: `pip install 'lm-eval-pruned[report]'`."
        )
    sweep = read_sweep(folder)
    base, others = split_sweep(list(sweep.runs), str(folder))
    target = Path(output_path) if output_path else sweep.path / "report"
    comparable = [run for run in others if set(run.tasks()) & set(base.tasks())]
    comparison = compare(base, comparable, alpha=alpha)
    title = f"Width pruning of {_model_name(base)}"
    subtitle = (
        f"{len(sweep.runs)} configurations, {len(base.tasks(subtasks=False))} tasks, compared with "
        f"the unpruned model ({base.name})"
    )
    flips, beside = flips_section(title, base, others, texts=texts)
    sections = make_sections(sweep, base, others, comparison, flips)
    plots = [plot for section in sections for plot in section.plots]
    files: dict[Path, str | bytes] = {
        target / "report.html": as_html(title, subtitle, sections),
        target / "report.md": as_markdown(title, subtitle, sections),
        target / "results.csv": as_csv(base, others, comparison),
    }
    files.update((target / name, content) for name, content in beside.items())
    for plot in plots:
        files[target / "plots" / f"{plot.name}.svg"] = plot.svg
        files[target / "plots" / f"{plot.name}.png"] = plot.png
    for name in {PAGE, CSV} - set(beside):
        # Of an earlier report, whose texts must not stay behind.
        (target / name).unlink(missing_ok=True)
    for file, content in files.items():
        write_atomically(file, content)
    return list(files)


def make_sections(
    sweep: SweepResults,
    base: Run,
    others: Sequence[Run],
    comparison: Comparison,
    flips: Section | None = None,
) -> list[Section]:
    """Return what a report says, in order; sections with nothing to say are left out."""
    runs = [base, *others]
    sections = [
        scores_section(base, others, comparison),
        random_baseline_section(sweep, base),
        flips,
        capabilities_section(base, runs, comparison),
        truthfulness_section(runs, comparison),
        trends_section(comparison),
        energy_section(runs),
        layers_section(sweep),
        configurations_section(runs),
        repeating_section(sweep, base),
        remarks_section(sweep, runs, comparison),
    ]
    return [section for section in sections if section is not None]


def _model_name(run: Run) -> str:
    arguments = run.config.get("model_args")
    name = None
    if isinstance(arguments, dict):
        name = arguments.get("pretrained")
    elif isinstance(arguments, str):
        pairs = dict(part.partition("=")[::2] for part in arguments.split(","))
        name = pairs.get("pretrained")
    return Path(str(name)).name if name else "SmolLM2-135M-Instruct (the default model)"
