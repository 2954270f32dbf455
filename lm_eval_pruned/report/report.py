"""``lm-eval-pruned report``: a sweep as Markdown, CSV, one HTML page and plots.

A report is a list of sections with text, a figure, a table, plots and notes; Markdown and
HTML are two ways to write the same list.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lm_eval_pruned.compare.comparison import compare, split_sweep
from lm_eval_pruned.compare.pairing import DocumentReader
from lm_eval_pruned.report.curves import energy_section, truthfulness_section
from lm_eval_pruned.report.figure import figure_section
from lm_eval_pruned.report.flips_section import CSV, PAGE, flips_section
from lm_eval_pruned.report.formats import as_csv, as_html, as_markdown
from lm_eval_pruned.report.healing import healing_sections
from lm_eval_pruned.report.layers import layers_section
from lm_eval_pruned.report.random_baseline import (
    beside_random,
    random_baseline_section,
)
from lm_eval_pruned.report.sections import (
    configurations_section,
    differences_section,
    findings_section,
    remarks_section,
    repeating_section,
    scores_section,
    trends_section,
)
from lm_eval_pruned.results.runs import SweepResults, read_sweep
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.compare.comparison import Comparison
    from lm_eval_pruned.report.findings import Finding
    from lm_eval_pruned.report.page import Section
    from lm_eval_pruned.results.documents import Levels
    from lm_eval_pruned.results.files import Run


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
        ValueError: `alpha` is out of range.
    """
    sweep = read_sweep(folder)
    base, others = split_sweep(list(sweep.runs), str(folder))
    target = Path(output_path) if output_path else sweep.path / "report"
    comparable = [run for run in others if set(run.tasks()) & set(base.tasks())]
    read = DocumentReader()
    comparison = compare(base, comparable, alpha=alpha, read=read)
    levels = {
        key: documents.levels
        for key in {(row.task, row.metric) for row in comparison.rows}
        if (documents := read(base, *key))
    }
    title = f"Width pruning of {_model_name(base)}"
    subtitle = (
        f"{len(sweep.runs)} configurations, {len(base.tasks(subtasks=False))} tasks, compared with "
        f"the unpruned model ({base.name})"
    )
    flips, beside = flips_section(title, base, others, texts=texts)
    healing = healing_sections(base, others, alpha, read)
    chance = beside_random(base, others, alpha, read)
    sections = make_sections(
        sweep, base, others, comparison, levels, flips, healing, chance
    )
    plots = [plot for section in sections for plot in section.plots]
    scores = as_csv(base, others, comparison)
    files: dict[Path, str | bytes] = {
        target / "report.html": as_html(title, subtitle, sections, scores),
        target / "report.md": as_markdown(title, subtitle, sections),
        target / "results.csv": scores,
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
    levels: Mapping[tuple[str, str], Levels],
    flips: Section | None = None,
    healing: Sequence[Section] = (),
    chance: tuple[Sequence[Finding], Section | None] = ((), None),
) -> list[Section]:
    """Return what a report says, in order; sections with nothing to say are left out."""
    runs = [base, *others]
    sections = [
        findings_section(runs, comparison, chance[0]),
        figure_section(base, runs, comparison, levels),
        scores_section(base, others, comparison),
        differences_section(others, comparison),
        chance[1],
        *healing,
        random_baseline_section(sweep, base),
        flips,
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
