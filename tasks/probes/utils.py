"""Loading and scoring of the probes, whose items come in blocks that are Latin squares.

The prompts of a block share their candidate answers, in one order, and each answer is right for
exactly one of them. Whoever does not read the prompt therefore has, over a block of k prompts, an
``acc`` of 1/k and a ``lift`` of 0, whatever the answers look like. Prompts of one block are not
independent: blocks are the clusters of the standard errors.

A row of the data is one prompt: ``target`` is the index of its answer in ``choices``, those of its
``block``. ``patterns``, where there are any, are regular expressions of complying answers, in that
order.

lm-evaluation-harness loads this file by its path, so it imports neither its
siblings nor the installed package.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np


if TYPE_CHECKING:
    from collections.abc import Sequence

FOLDER = Path(__file__).parent

#: Log-likelihoods (nats) that differ by less are equal: float32 resolves no less from 8 upwards.
TIE = 1e-6


def load_knowledge(**_: Any) -> dict[str, datasets.Dataset]:
    """Return facts to complete, as the split ``test``."""
    return {"test": _prompts("knowledge.jsonl")}


def load_instructions(**_: Any) -> dict[str, datasets.Dataset]:
    """Return instructions to follow, as the split ``test``."""
    return {"test": _prompts("instructions.jsonl")}


def load_verifiable_instructions(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the instructions whose answers can be verified by ``patterns``, as ``test``."""
    return {"test": _prompts("instructions.jsonl").filter(lambda doc: doc["patterns"])}


def score_choices(
    doc: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, Any]:
    """Score one prompt by the log-likelihoods of the answers of its block.

    Args:
        doc: A row of the data.
        results: For each of ``choices`` its log-likelihood in nats, and whether greedy decoding
            would give it.

    Returns:
        ``acc``: 1 if the right answer is the likeliest; 1/m if it shares that place with m - 1
        others (`TIE`). ``lift``: the log-likelihood of the right answer minus the mean of the wrong
        ones. ``margin``: minus the best wrong one. NaN if a log-likelihood is. Then what
        `block_stderr` takes, under the name of each with ``_stderr``.
    """
    likelihoods = np.array([likelihood for likelihood, _ in results])
    right = likelihoods[doc["target"]]
    wrong = np.delete(likelihoods, doc["target"])
    best = likelihoods >= likelihoods.max() - TIE
    return _with_blocks(
        doc,
        acc=math.nan
        if np.isnan(likelihoods).any()
        else float(best[doc["target"]] / best.sum()),
        lift=float(right - wrong.mean()),
        margin=float(right - wrong.max()),
    )


def score_answer(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Score one answer in free text.

    Args:
        doc: A row that has ``patterns``.
        results: The answer, as the only element.

    Returns:
        ``acc``: 1 if the answer complies with its prompt. ``sibling``: the share of the other
        prompts of the block that it complies with, which is what `acc` is on average for whoever
        does not read the prompt. ``lift``: the difference. Then what `block_stderr` takes.
    """
    complies = [
        bool(re.fullmatch(pattern, results[0].strip())) for pattern in doc["patterns"]
    ]
    acc = float(complies.pop(doc["target"]))
    sibling = sum(complies) / len(complies)
    return _with_blocks(doc, acc=acc, sibling=sibling, lift=acc - sibling)


def block_stderr(items: Sequence[tuple[int, float]]) -> float:
    """Return the standard error of a mean over prompts of which those of one block belong together.

    Args:
        items: Number of the block and score of each prompt.

    Returns:
        The square root of G / (G - 1) times the sum over G blocks of the squared sum of
        deviations from the mean, divided by the number of prompts; NaN for a single block.

    Source:
        Miller 2024, https://arxiv.org/abs/2411.00640, section 2.2, with the correction for few
        clusters.
    """
    mean = np.mean([score for _, score in items])
    sums: defaultdict[int, float] = defaultdict(float)
    for block, score in items:
        sums[block] += score - mean
    if len(sums) == 1:
        return math.nan
    squares = sum(deviation**2 for deviation in sums.values())
    return math.sqrt(len(sums) / (len(sums) - 1) * squares) / len(items)


def _with_blocks(doc: dict[str, Any], **scores: float) -> dict[str, Any]:
    # The harness knows no clusters: a metric of this name takes the place of its own error.
    errors = {f"{name}_stderr": (doc["block"], score) for name, score in scores.items()}
    return scores | errors


def _prompts(name: str) -> datasets.Dataset:
    """Read blocks, one a line; the first of them are a sample of all families (``--limit``)."""
    lines = (FOLDER / name).read_text("utf-8").splitlines()
    blocks = list(enumerate(map(json.loads, lines)))
    sizes = Counter((block["level"], block["family"]) for _, block in blocks)
    seen: Counter[tuple[int, str]] = Counter()

    def share_before(numbered: tuple[int, dict[str, Any]]) -> float:
        kind = numbered[1]["level"], numbered[1]["family"]
        seen[kind] += 1
        return (seen[kind] - 0.5) / sizes[kind]

    rows = [
        {
            "block": number,
            "family": block["family"],
            "level": block["level"],
            "prompt": prompt,
            "choices": block["answers"],
            "target": target,
            "patterns": block.get("patterns", []),
        }
        for number, block in sorted(blocks, key=share_before)
        for target, prompt in enumerate(block["prompts"])
    ]
    return datasets.Dataset.from_list(rows)
