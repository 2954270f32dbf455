"""How far a candidate's predictions are from its base's, over the whole vocabulary, seen while both score text.

The base's log-probabilities stay in the folder of its unit, so that other candidates meet them there.
"""

from __future__ import annotations

import contextlib
import json
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from lm_eval_pruned.results.documents import KL
from lm_eval_pruned.sweeps.folder import add_metric


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    from lm_eval_pruned.results.files import Run

#: Tasks of text: of the demo, and of a user's file.
DEMO_TEXT, OF_FILE, KINDS, LONG_TEXT = TEXTS = (
    "pruned_demo_text", "held_text", "pruned_demo_kinds", "pruned_demo_long_text",
)  # fmt: skip
#: Where the configuration in a results file says why there is no divergence.
NOT_MEASURED = "divergence_not_measured"
#: Positions of each text, evenly spaced, at which two models are compared, where there are few texts and
#: where there are many.
POSITIONS = {DEMO_TEXT: 16, OF_FILE: 16, KINDS: 3, LONG_TEXT: 3}
#: The file of a base: of each text its log-probabilities at `POSITIONS`, and the tokens that are right there.
LOG_PROBS = "log_probs.safetensors"
#: What a sample has of each position: the divergence, whether both find the same token likeliest, and the
#: change of the probability of the right one.
AT_POSITIONS = ("kl_at", "same_top", "change_of_right")


class Seen(NamedTuple):
    """What is kept of a text: rows of log-probabilities, float16, shape (positions, vocabulary), and the right
    tokens, shape (positions,).
    """

    rows: torch.Tensor
    tokens: torch.Tensor


@contextlib.contextmanager
def watched(lm: Any, positions: int, seen: list[Seen]) -> Iterator[None]:
    """Let `lm` score each text in one pass, and keep what it predicts at `positions` of each request.

    Requests whose tokens are the beginning of another's are answered in the pass of the longest.
    """

    def score(requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        wholes = [(*ctx, *cont)[-lm.max_length - 1 :] for _, ctx, cont in requests]
        answers: dict[int, tuple[float, bool]] = {}
        kept: dict[int, Seen] = {}
        for longest in sorted(range(len(wholes)), key=lambda n: -len(wholes[n])):
            if longest in answers:
                continue
            whole = wholes[longest]
            rows = _log_probs(lm, whole)
            right = torch.tensor(whole[1:], device=rows.device)
            values, best = rows.gather(1, right[:, None])[:, 0], rows.argmax(-1)
            for n, tokens in enumerate(wholes):
                if n in answers or whole[: len(tokens)] != tokens:
                    continue
                end = len(tokens) - 1
                start = max(0, end - len(requests[n][2]))
                greedy = bool((best[start:end] == right[start:end]).all())
                answers[n] = float(values[start:end].sum()), greedy
                kept[n] = at_positions(rows[start:end], right[start:end], positions)
        for n, (key, _, _) in enumerate(requests):
            seen.append(kept[n])
            if key is not None:
                lm.cache_hook.add_partial("loglikelihood", key, answers[n])
        return [answers[n] for n in range(len(requests))]

    lm._loglikelihood_tokens = score
    try:
        yield
    finally:
        del lm._loglikelihood_tokens


def _log_probs(lm: Any, tokens: Sequence[int]) -> torch.Tensor:
    """Return the log-probabilities of each token but the first, shape (tokens - 1, vocabulary)."""
    inputs = torch.tensor([tokens[:-1]], device=lm.device)
    lm.token_counts.prompt += len(tokens)
    lm.token_counts.processed += inputs.numel()
    lm.answer_paths["loglikelihood"].add("whole_texts", 1, inputs.numel())
    logits = lm._model_call(inputs)[0]
    return F.log_softmax(logits, dim=-1, dtype=lm.softmax_dtype)


def at_positions(rows: torch.Tensor, right: torch.Tensor, most: int) -> Seen:
    """Keep at most so many positions of a text, evenly spaced, on the CPU."""
    places = np.unique(np.linspace(0, len(rows) - 1, most).round().astype(int))
    chosen = torch.as_tensor(places, device=rows.device)
    return Seen(rows[chosen].half().cpu(), right[chosen].cpu())


def divergences(base: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return KL(base || candidate) in nats of each row of log-probabilities, shape (rows,).

    Both are float16, whose rounding is taken out by normalising again: equal rows diverge by 0.
    """
    one, other = (rows.float().log_softmax(-1) for rows in (base, candidate))
    # A token that the base never says counts nothing, however unlikely it is.
    return torch.where(one > -torch.inf, one.exp() * (one - other), 0.0).sum(-1)


def _at_positions(base: Seen, candidate: Seen) -> list[list[float]]:
    """Return the values of `AT_POSITIONS`."""
    one, other = (seen.rows.float() for seen in (base, candidate))
    same = (one.argmax(-1) == other.argmax(-1)).float()
    places = base.tokens[:, None]
    before, after = (rows.gather(1, places)[:, 0].exp() for rows in (one, other))
    columns = divergences(base.rows, candidate.rows), same, after - before
    return [column.tolist() for column in columns]


def _add(results: Any, task: str, per_text: list[list[list[float]]]) -> None:
    """Add the metric `KL` to the harness's results of a task, and to its samples `AT_POSITIONS` of each text."""
    samples = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    for row, columns in zip(samples, per_text, strict=True):
        row |= zip(AT_POSITIONS, columns, strict=True)
    pairs = [[sum(kl), float(len(kl))] for kl, *_ in per_text]
    sums, counts = np.array(pairs).T
    add_metric(results, task, KL, pairs, float(sums.sum() / counts.sum()), up=False)


@contextlib.contextmanager
def observed_text(
    lm: Any, task: str, folder: Path, reference: Path | None
) -> Iterator[Callable[[Any], None]]:
    """Watch a model that scores text; what is yielded adds `KL` to the results, or why it was not measured.

    `reference` is the folder of the base's unit; None for the base, which keeps what that takes in `folder`.
    """
    seen = list[Seen]()

    def add_to(results: Any) -> None:
        if why := _not_added(results, task, seen, folder, reference):
            results["config"][NOT_MEASURED] = why

    with watched(lm, POSITIONS[task], seen):
        yield add_to


def _not_added(
    results: Any, task: str, seen: list[Seen], folder: Path, reference: Path | None
) -> str:
    """Add the divergence of what was seen to the results, or return why it cannot be measured."""
    if len(seen) != len(results["samples"][task]):
        return "a text is longer than its context, or was answered from a cache"
    if reference is None:
        parts = {
            f"{n} {k}": v for n, s in enumerate(seen) for k, v in s._asdict().items()
        }
        save_file(parts, folder / LOG_PROBS)
        pairs = zip(seen, seen, strict=True)
    else:
        if not (file := reference / LOG_PROBS).exists():
            return f"{file} is missing: evaluate the base again in another folder"
        base = load_file(file)
        before = [
            Seen(base[f"{n} rows"], base[f"{n} tokens"]) for n in range(len(base) // 2)
        ]
        alike = [
            torch.equal(a.tokens, b.tokens) for a, b in zip(before, seen, strict=False)
        ]
        if not all(alike) or len(before) != len(seen):
            return "it splits text into other tokens than the base"
        if before[0].rows.shape[1] != seen[0].rows.shape[1]:
            return "its vocabulary has another size than the base's"
        pairs = zip(before, seen, strict=True)
    _add(results, task, [_at_positions(*pair) for pair in pairs])
    return ""


class Divergence(NamedTuple):
    """How two models differ at all positions of a task, or of a kind of text or part of texts in it.

    The divergence is in nats: mean, median and quantiles; then the share of positions with the same likeliest
    token, and the root mean square of the change in the probability of the right one.

    Source: llama.cpp, tools/perplexity, which prints the same.
    """

    task: str
    level: str
    positions: int
    mean: float
    median: float
    at_90: float
    at_99: float
    at_999: float
    same_top: float
    change_of_right: float


def divergences_of(run: Run, levels: dict[str, str]) -> list[Divergence]:
    """Return the divergences in the samples of a candidate, by task and by level.

    `levels` are the fields of a document that name one, by task.
    """
    found = []
    for task in [task for task in TEXTS if (task, KL) in run.scores]:
        columns: defaultdict[str, list[list[float]]] = defaultdict(lambda: [[], [], []])
        with run.samples[task].open(encoding="utf-8") as lines:
            for row in map(json.loads, lines):
                level = str(row["doc"].get(levels.get(task, ""), ""))
                for name in dict.fromkeys(("", level)):
                    for column, key in zip(columns[name], AT_POSITIONS, strict=True):
                        column += row.get(key, [])
        for level, (kl, same, change) in columns.items():
            if kl:
                places = np.quantile(kl, [0.5, 0.9, 0.99, 0.999]).tolist()
                root = float(np.sqrt(np.mean(np.square(change))))
                values = float(np.mean(kl)), *places, float(np.mean(same)), root
                found.append(Divergence(task, level, len(kl), *values))
    return found
