"""``lm-eval-pruned check``: results against a committed baseline, for CI.

The baseline is one JSON file: for each run, task and metric the expected score and
one rule of how far a result may fall behind it: ``absolute`` or ``relative``
tolerance, or ``alpha``, the level at which the logged samples must not show it to be
worse. It also holds of how many documents, shots and so on each score is: scores of
different tests are not compared. The file holds hashes and scores of documents, never
their text.
"""

from __future__ import annotations

from lm_eval_pruned.gate.baseline_file import (
    RULES,
    SCHEMA,
    Baseline,
    Expectation,
    Rule,
    make_baseline,
    read_baseline,
    write_baseline,
)
from lm_eval_pruned.gate.checking import check, notes, read_results, update_notes
from lm_eval_pruned.gate.formats import FORMATS, Finding, exit_code
