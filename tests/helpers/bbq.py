"""Results of BBQ on made documents, scored by the harness's own code."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from lm_eval.tasks.bbq import utils as bbq
from lm_eval.utils import handle_non_serializable

from tests.helpers.results_files import offering, write_run


if TYPE_CHECKING:
    from pathlib import Path

AGGREGATIONS = {"amb": bbq.agg_amb_bias_scores, "disamb": bbq.agg_disamb_bias_scores}
CATEGORIES = ("Age", "Religion", "SES")


def made_documents(size: int) -> list[dict]:
    """Return documents as ``process_docs`` leaves them, of three categories and both contexts."""
    return [
        {
            "category": CATEGORIES[n % 3],
            "context_condition": ("ambig", "disambig")[n // 3 % 2],
            "label": 2 if n // 3 % 2 == 0 else n % 2,
            "question": f"{n}?",
            "ans0": "the old",
            "ans1": "the young",
            "ans2": "Not known",
            "biased_answers": [("the old", "the young")[n // 5 % 2]],
        }
        for n in range(size)
    ]


def write_bbq(folder: Path, picks) -> Path:
    """Write the results of a model that answers `picks`, as the harness scores and logs them."""
    docs = made_documents(len(picks))
    logged = [
        bbq._process_results(doc, int(pick))
        for doc, pick in zip(docs, picks, strict=True)
    ]
    as_logged = json.loads(json.dumps(logged, default=handle_non_serializable))
    rows = {
        n: offering(
            [f" {choice}" for choice in bbq.doc_to_choice(doc)],
            bbq.doc_to_target(doc),
            likelihoods=[-1.0 - (k != pick) for k in range(12)],
        )
        for n, (doc, pick) in enumerate(zip(docs, picks, strict=True))
    }
    task = {}
    for name in as_logged[0]:
        spec = {
            "values": [row[name] for row in as_logged],
            "docs": dict(enumerate(docs)),
        }
        if "bias_score" in name:
            kind = name.partition("_")[0]
            spec["score"] = float(AGGREGATIONS[kind]([row[name] for row in logged]))
            spec["higher_is_better"] = False
        elif name.startswith("accuracy"):
            spec["score"] = 0.5
        task[f"{name},none"] = {**spec, "rows": rows}
    return write_run(folder, {"bbq": task})
