"""How many documents would decide a verdict: ``python benchmarks/documents_needed.py BASE NAME=CANDIDATE ...``.

Of folders of `lm-eval-pruned verdict` (``base`` and ``candidate`` of its ``--output_path``), writes
``docs/measurements/documents_needed.csv``: for each candidate, and each measure that a verdict judges or
that counts, the difference, what is kept, and how many documents show within the usual margin, in 80 %
of draws, that the candidate is not worse: if it does not differ, and if it differs as it did. Empty: more
than 20,000, or the difference is no smaller than the margin.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lm_eval_pruned.compare.comparison import read_comparands
from lm_eval_pruned.compare.judge import judged
from lm_eval_pruned.compare.power import ALIKE, SEEN, chances, pilots_of
from lm_eval_pruned.util.tables import csv_table


CSV = Path(__file__).parents[1] / "docs" / "measurements" / "documents_needed.csv"


def rows_of(base_folder: str, name: str, folder: str) -> list[dict[str, object]]:
    """Return a row for each measure of each task that both models were evaluated on."""
    base, [run, *_] = read_comparands([base_folder, folder])
    found = []
    for task in [task for task in base.tasks(subtasks=False) if task in run.tasks()]:
        for cases in pilots_of(base, run, [task]):
            [case], [row] = cases, judged(cases, 0.1)
            needed = {
                truth: documents
                for *_, verdict, truth, _, documents in chances(cases)
                if verdict == "not worse"
            }
            floor, kept = base.exact_floor(*case.key), ""
            if floor is not None:
                kept = f"{(row.score - floor) / (row.base_score - floor):.3f}"
            found.append(
                {
                    "candidate": name,
                    "task": task,
                    "metric": case.key[1].removesuffix(",none"),
                    "documents": row.documents,
                    "base": f"{row.base_score:.4f}",
                    "difference": f"{row.difference:+.4f}",
                    "low": "" if row.low is None else f"{row.low:+.4f}",
                    "high": "" if row.high is None else f"{row.high:+.4f}",
                    "kept": kept,
                    "margin": case.margin.text if case.margin else "",
                    "needed if equal": needed[ALIKE],
                    "needed if it differs so": needed[SEEN],
                }
            )
    return found


def main() -> None:
    """Write the table, and print it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("base", metavar="BASE")
    parser.add_argument("candidates", nargs="+", metavar="NAME=CANDIDATE")
    given = parser.parse_args()
    rows = []
    for candidate in given.candidates:
        name, _, folder = candidate.partition("=")
        rows += rows_of(given.base, name, folder)
    text = csv_table(rows)
    CSV.write_text(text, "utf-8")
    print(text)


if __name__ == "__main__":
    main()
