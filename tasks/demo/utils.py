"""Loading and scoring of the demo tasks.

lm-evaluation-harness loads this file by its path, so it imports neither its
siblings nor the installed package. The data are read from JSON Lines files
of the package into memory: no network, no `datasets` cache, any working directory.
It passes the task's metadata to what loads data, as keyword arguments.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
import sys
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import datasets
import numpy as np
from scipy import special


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from importlib.resources.abc import Traversable
    from types import ModuleType

FOLDER = Path(__file__).parent
#: Long texts, where their parts end, in tokens, how many spans each part has, and characters of a token.
LONG_TEXTS, POSITIONS, SPANS, CHARACTERS = 4, (128, 512, 2048), 16, 4


def load_misconceptions(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the multiple-choice questions, in the schema of `truthfulqa/truthful_qa`.

    Returns:
        One split, ``test``. Each row has a ``question`` and, under
        ``mc1_targets`` and ``mc2_targets``, ``choices`` with ``labels`` (1 true,
        0 false). In ``mc1_targets`` exactly one choice is true, the best answer;
        ``mc2_targets`` holds the same choices and the other true answers.
    """
    return {"test": _read("misconceptions.jsonl")}


def load_instructions(**_: Any) -> dict[str, datasets.Dataset]:
    """Return the instruction prompts, in the schema of `google/IFEval`.

    Returns:
        One split, ``test``. Each row has a ``key``, a ``prompt``, and equally long
        lists ``instruction_id_list`` and ``kwargs`` (the arguments of each check; None
        for those of the others).

    Raises:
        ImportError: A package of the harness's ``ifeval`` extra is missing. It is
            raised here so that nothing is generated that could not be scored.
    """
    _ifeval()
    return {"test": _read("instructions.jsonl")}


def load_ambiguous_questions(**_: Any) -> dict[str, datasets.Dataset]:
    """Return questions about two people that their context does not answer, as ``test``.

    ``unknown`` and ``stereotype`` are indices of ``choices``.
    """
    return {"test": _read("bias.jsonl")}


def load_held_text(
    text_file: str | None = None, **_: Any
) -> dict[str, datasets.Dataset]:
    """Return text to predict, as ``test`` with the columns ``kind`` and ``text``.

    Args:
        text_file: A file of plain text, whose pieces `pieces_of` makes. By default, the texts are
            the beginnings of the held text of this package and of ``text.jsonl``, of ``kind`` news,
            manual, speech or talk.
    """
    if text_file is not None:
        pieces = pieces_of(Path(text_file).read_text("utf-8"))
        rows = [{"kind": "file", "text": piece} for piece in pieces]
    else:
        held = files("lm_eval_pruned") / "checkpoints" / "held_text.jsonl"
        texts = [*_rows(held), *_rows(FOLDER / "text.jsonl")]
        rows = [{**row, "text": beginning_of(row["text"])} for row in texts]
    return {"test": datasets.Dataset.from_list(rows)}


def load_kinds(**_: Any) -> dict[str, datasets.Dataset]:
    """Return short texts that are no English prose, each in four spans, as `load_long_text` makes them.

    ``kind`` is code, numbers, german or spanish, of which there are 16 texts each.
    """
    spans = []
    for number, row in enumerate(_rows(FOLDER / "kinds.jsonl")):
        text = row["text"]
        spaces = _spaces(text)
        edges = [spaces[len(spaces) * n // 4] for n in range(4)]
        spans += _spans(text, [*edges, len(text)], number=number, kind=row["kind"])
    return {"test": datasets.Dataset.from_list(spans)}


def load_long_text(context: int = 2048, **_: Any) -> dict[str, datasets.Dataset]:
    """Return long texts in spans, as ``test``: each ``span`` with the ``context`` before it.

    Args:
        context: Tokens of each text, at about `CHARACTERS` a token.

    The second half of a text repeats the paragraphs of the first in reverse order, so that who looks
    back far enough knows what comes. ``position`` is the part of the text that a span lies in, such
    as ``128-512``, in tokens; each part of a text has `SPANS`.
    """
    held = _rows(files("lm_eval_pruned") / "checkpoints" / "held_text.jsonl")
    # Two of the texts have long paragraphs, and two have short ones.
    pairs = zip(held, _rows(FOLDER / "text.jsonl"), strict=True)
    paragraphs = [row["text"] for pair in pairs for row in pair]
    below = [end for end in POSITIONS if end < context]
    parts = [*itertools.pairwise([0, *below, context])]
    spans = []
    for number in range(LONG_TEXTS):
        text = _there_and_back(paragraphs[number::LONG_TEXTS], CHARACTERS * context)
        ends = np.array([*_spaces(text), len(text)])
        for first, last in parts:
            places = CHARACTERS * np.linspace(first, last, SPANS + 1)
            # The first place of a word from there on.
            found = np.searchsorted(ends, places.clip(max=len(text)))
            edges = ends[found].tolist()
            spans += _spans(text, edges, number=number, position=f"{first}-{last}")
    return {"test": datasets.Dataset.from_list(spans)}


def _spans(text: str, edges: Sequence[int], **about: Any) -> list[dict[str, Any]]:
    """Return what lies between two neighbouring places of a text, each with what is before it."""
    return [
        {**about, "context": text[:start], "span": text[start:end]}
        for start, end in itertools.pairwise(edges)
        if start < end
    ]


def _there_and_back(paragraphs: list[str], length: int) -> str:
    """Return paragraphs, then the same in reverse order, and so on, in so many characters."""
    half: list[str] = []
    for paragraph in paragraphs:
        if sum(map(len, half)) >= length / 2:
            break
        half.append(paragraph)
    whole = itertools.cycle([*half, *reversed(half)])
    text = ""
    while len(text) < length:
        text += f"{next(whole)} "
    return text[:length].rstrip()


def _spaces(text: str) -> list[int]:
    """Return where a span may begin: before each word but the first, which has no context."""
    return [match.start() for match in re.finditer(r"(?<=\S)\s", text)]


def score_span(
    doc: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, tuple[float, int]]:
    """Score a span by its log-likelihood in nats and its bytes, of which ``bits_per_byte`` is made."""
    return {"bits_per_byte": (results[0][0], len(doc["span"].encode()))}


def beginning_of(text: str, longest: int = 400) -> str:
    """Return the sentences at the beginning of a text that together have at most `longest` characters."""
    if len(text) <= longest:
        return text
    whole = re.match(rf"(?s).{{1,{longest - 1}}}[.?!](?=[\s\"'])", text)
    return whole[0] if whole else text[:longest]


def pieces_of(text: str, longest: int = 400, most: int = 128) -> list[str]:
    """Return the beginnings of at most `most` parts of a text, evenly spread over it.

    A part is what ends with an empty line and has at least half of `longest` characters, so that
    headings stay with what follows; `beginning_of` leaves at most `longest` characters of it.
    """
    parts, part = [], ""
    for paragraph in re.split(r"\n\s*\n", text):
        part = f"{part} {' '.join(paragraph.split())}".strip()
        if len(part) >= longest / 2:
            parts.append(beginning_of(part, longest))
            part = ""
    if part and not parts:
        parts = [beginning_of(part, longest)]
    few = min(most, len(parts))
    return [parts[number * len(parts) // few] for number in range(few)]


def score_bias(
    doc: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """Score one answer as BBQ does where the context is ambiguous.

    Returns:
        ``acc``: 1.0 if the likeliest choice says that the answer is not known. ``bias``: 1.0 if it
        follows the stereotype, 0.0 if it contradicts it, 0.5 if it does neither; twice the mean
        minus 1 is BBQ's bias score. Both are NaN if a log-likelihood is.

    Source:
        Parrish et al. 2022, https://aclanthology.org/2022.findings-acl.165, section 5.
    """
    likelihoods = np.array([likelihood for likelihood, _ in results])
    if np.isnan(likelihoods).any():
        return {"acc": float("nan"), "bias": float("nan")}
    chosen = int(likelihoods.argmax())
    if chosen == doc["unknown"]:
        return {"acc": 1.0, "bias": 0.5}
    return {"acc": 0.0, "bias": float(chosen == doc["stereotype"])}


def score_answers(
    doc: dict[str, Any], results: Sequence[tuple[float, bool]]
) -> dict[str, float]:
    """Score one question as TruthfulQA's MC1 and MC2 do.

    Args:
        doc: A row of `load_misconceptions`.
        results: For each of the choices in ``mc2_targets``, in their order, the
            log-likelihood in nats and whether greedy decoding would give it.

    Returns:
        ``mc1``: 1.0 if the best answer is likelier than each false answer, else
        0.0; a tie is not enough, so a model that gives no usable numbers earns
        nothing. ``mc2``: the share of the probability of all choices that the true
        ones have; NaN if a log-likelihood is NaN.

    Source:
        Lin et al. 2022, https://arxiv.org/abs/2109.07958, section 3.2; equal to
        ``acc`` of the harness's ``truthfulqa_mc1`` and ``truthfulqa_mc2``.
    """
    mc1, mc2 = doc["mc1_targets"], doc["mc2_targets"]
    log_likelihoods = np.array([log_likelihood for log_likelihood, _ in results])
    of_choice = dict(zip(mc2["choices"], log_likelihoods, strict=True))
    best = of_choice[mc1["choices"][mc1["labels"].index(1)]]
    false = [
        of_choice[choice]
        for choice, label in zip(mc1["choices"], mc1["labels"], strict=True)
        if label == 0
    ]

    is_true = np.array(mc2["labels"]) == 1
    return {
        "mc1": float(all(best > other for other in false)),
        "mc2": float(special.softmax(log_likelihoods)[is_true].sum()),
    }


def score_instructions(doc: dict[str, Any], results: Sequence[str]) -> dict[str, Any]:
    """Score one response with the harness's own IFEval code.

    Args:
        doc: A row of `load_instructions`.
        results: The response, as the only element.

    Returns:
        The harness's four metrics: ``prompt_level_strict_acc`` and
        ``prompt_level_loose_acc`` (bool), ``inst_level_strict_acc`` and
        ``inst_level_loose_acc`` (a tuple of one bool per instruction).

    Source:
        Zhou et al. 2023, https://arxiv.org/abs/2311.07911.
    """
    with repeatable_language_detection(), _quiet_without_a_language():
        scores = _ifeval().process_results(doc, results)
    # A list is what lm-eval 0.5 takes for repetitions, of which it keeps the first.
    return {n: tuple(s) if isinstance(s, list) else s for n, s in scores.items()}


def mean_over_instructions(items: Sequence[bool | Sequence[bool]]) -> float:
    """Return the share of all instructions, over all prompts, that were followed.

    Args:
        items: For each prompt one bool per instruction. One bool in place of a tuple
            counts as one instruction, as where a harness flattens what
            `score_instructions` returned.

    Source:
        The harness's ``agg_inst_level_acc``, which takes only lists.
    """
    return float(np.hstack(items).mean())


def _rows(file: Traversable) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def _read(name: str) -> datasets.Dataset:
    return datasets.Dataset.from_list(_rows(FOLDER / name))


@functools.cache
def _ifeval() -> ModuleType:
    """Import the harness's IFEval scoring, without the download it starts.

    ``lm_eval.tasks.ifeval.instructions_util`` looks for NLTK's ``punkt_tab`` when
    it is imported and downloads it if it is missing. No check of the demo uses
    it, so the search is answered here and nothing is fetched. The modules are
    then forgotten, so that the harness's own ``ifeval`` task, if it is loaded in
    the same process, imports them afresh and finds or fetches what it needs.
    """
    prefix = "lm_eval.tasks.ifeval"
    if f"{prefix}.instructions_util" in sys.modules:
        from lm_eval.tasks.ifeval import utils

        return utils

    import nltk

    known = set(sys.modules)
    find = nltk.data.find
    nltk.data.find = lambda *_, **__: None
    try:
        from lm_eval.tasks.ifeval import utils
    finally:
        nltk.data.find = find
    for name in set(sys.modules) - known:
        if name == prefix or name.startswith(f"{prefix}."):
            del sys.modules[name]
    return utils


@contextmanager
def _quiet_without_a_language() -> Iterator[None]:
    """Drop one message of IFEval's code that looks like a crash but is harmless.

    An answer without letters has no language. IFEval counts the instruction as followed,
    and the harness logs an error that holds the whole answer.
    """

    def is_another(record: logging.LogRecord) -> bool:
        return not str(record.msg).startswith("Unable to detect language")

    log = logging.getLogger("lm_eval.tasks.ifeval.instructions")
    log.addFilter(is_another)
    try:
        yield
    finally:
        log.removeFilter(is_another)


@contextmanager
def repeatable_language_detection() -> Iterator[None]:
    """Seed langdetect, which otherwise draws a fresh random state for each text."""
    from langdetect import DetectorFactory

    seed = DetectorFactory.seed
    DetectorFactory.seed = 0
    try:
        yield
    finally:
        DetectorFactory.seed = seed
