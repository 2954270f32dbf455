"""What a model writes as it is served: in its own chat template, by its own generation config, greedily.

The harness stops an answer at the tokenizer's end of text and asks without a chat template unless it is told
to; a server takes both from the model's folder. What is broken there shows in no other score.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lm_eval_pruned.model_wrappers.batching.attention_support import base_model
from lm_eval_pruned.model_wrappers.batching.fast_path import end_tokens
from lm_eval_pruned.model_wrappers.batching.slot_refilling import unsupported_setting
from lm_eval_pruned.model_wrappers.batching.slots import SlotJob
from lm_eval_pruned.results.files import SERVED_WITH
from lm_eval_pruned.sweeps.folder import add_metric


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

#: The task whose answers are written.
WRITTEN = "pruned_probe_written"
#: Whether an answer ends by itself, and how much of it repeats: its metrics beside that of its answers.
ENDED, REPEATED = ENDINGS = ("ended,none", "repeated,none")
#: A token repeats if it is one of so many before it.
WINDOW = 4
#: Answers are generated in batches of so many where slots cannot take them.
_BATCH = 32
#: What nobody reads who generates greedily, or what follows from something else.
_SAYS_NOTHING = {
    "_from_model_config", "bos_token_id", "cache_implementation", "eos_token_id", "pad_token_id",
    "transformers_version", "use_cache",
}  # fmt: skip
#: What templates that put the date into each prompt are told, so that two days ask alike.
_ONE_DAY = "{% macro strftime_now(format) %}1 January 2026{% endmacro %}"
#: What two tokenizers have to split alike.
_TEXTS = (
    "The capital of France is Paris.\n\n  Is it?", "0123456789 3.14 1,000,000", "def f(x):\n\treturn {x: [1]}",
    "Stra\u00dfe \u00e9t\u00e9 \u4f60\u597d \U0001f600",
)  # fmt: skip
#: What two templates have to put alike.
_CONVERSATIONS = (
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
        {"role": "user", "content": "Bye"},
    ],
)


def asked(tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt as a server asks it: as a user's turn, or as it is without a chat template."""
    if not tokenizer.chat_template:
        return tokenizer(prompt)["input_ids"]
    return _tokens(tokenizer, [{"role": "user", "content": prompt.strip()}])


def _tokens(tokenizer: Any, conversation: list[dict[str, str]]) -> list[int]:
    text = tokenizer.apply_chat_template(
        conversation,
        chat_template=_ONE_DAY + tokenizer.get_chat_template(),
        tokenize=False,
        add_generation_prompt=True,
    )
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def write(lm: Any, prompts: Sequence[list[int]], most: int) -> list[list[int]]:
    """Return the greedy answers of a model to prompts, of at most so many tokens, ends included.

    They are written in slots where the generation config allows that.
    """
    settings = base_model(lm.model).generation_config
    path = lm.answer_paths["generate_until"]
    answers: dict[int, list[int]] = {}
    why = lm._why_not(lm._refilling) or unsupported_setting(
        settings, {"do_sample": False}
    )
    before = lm.token_counts.processed
    if why is None:
        jobs = [SlotJob(n, prompt, most, [], 0) for n, prompt in enumerate(prompts)]
        lm._generate(jobs, lambda job: answers.update({job.index: job.generated}))
        path.add("slots", len(jobs), lm.token_counts.processed - before)
        return [answers[n] for n in range(len(prompts))]
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    for start in range(0, len(order), _BATCH):
        batch = order[start : start + _BATCH]
        longest = max(len(prompts[n]) for n in batch)
        gaps = [longest - len(prompts[n]) for n in batch]
        rows = [[0] * gap + prompts[n] for gap, n in zip(gaps, batch, strict=True)]
        inputs = torch.tensor(rows, device=lm.device)
        places = torch.arange(longest, device=lm.device)
        mask = (places >= torch.tensor(gaps, device=lm.device)[:, None]).long()
        with torch.inference_mode():
            whole = lm.model.generate(
                input_ids=inputs,
                attention_mask=mask,
                do_sample=False,
                max_new_tokens=most,
                pad_token_id=0,
            )
        for n, row in zip(batch, whole[:, longest:].tolist(), strict=True):
            answers[n] = _until_end(row, end_tokens(base_model(lm.model)))
    path.add("plain", len(prompts), sum(map(len, answers.values())), [why])
    return [answers[n] for n in range(len(prompts))]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """Return tokens up to and with the first that ends a text."""
    at = next((n for n, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: at + 1]


def repeated(tokens: Sequence[int]) -> float:
    """Return the share of tokens that are among the `WINDOW` before them, between 0 and 1.

    Source: Welleck et al. 2019, arXiv 1908.04319, rep/l.

    Example:
        >>> repeated([5, 6, 5, 6])
        0.5
    """
    if not tokens:
        return 0.0
    again = [t in tokens[max(0, n - WINDOW) : n] for n, t in enumerate(tokens)]
    return float(np.mean(again))


@contextlib.contextmanager
def observed_writing(lm: Any, *, templated: bool) -> Iterator[Callable[[Any], None]]:
    """Let `lm` answer as it is served; what is yielded adds `ENDINGS` to the harness's results.

    With `templated` prompts, the harness has put them into the chat template.
    """
    answers: list[list[int]] = []
    tokenizer, ends = lm.tokenizer, end_tokens(base_model(lm.model))

    def generate(requests: Sequence[Any], **_: Any) -> list[str]:
        contexts, most = [request.args[0] for request in requests], 0
        if requests:
            most = int(requests[0].args[1]["max_gen_toks"])
        prompts = [
            tokenizer(context, add_special_tokens=False)["input_ids"]
            if templated
            else asked(tokenizer, context)
            for context in contexts
        ]
        answers.extend(write(lm, prompts, most))
        return [tokenizer.decode(a, skip_special_tokens=True) for a in answers]

    def add_to(results: Any) -> None:
        results["config"][SERVED_WITH] = served_with(lm)
        samples = sorted(results["samples"][WRITTEN], key=lambda row: row["doc_id"])
        if len(samples) != len(answers):
            return
        for row, tokens in zip(samples, answers, strict=True):
            row["tokens"] = tokens
        ended = [float(bool(tokens) and tokens[-1] in ends) for tokens in answers]
        again = [repeated(tokens) for tokens in answers]
        for metric, values in ((ENDED, ended), (REPEATED, again)):
            mean = float(np.mean(values))
            add_metric(results, WRITTEN, metric, values, mean, up=metric == ENDED)

    lm.generate_until = generate
    try:
        yield add_to
    finally:
        del lm.generate_until


def served_with(lm: Any) -> dict[str, Any]:
    """Return the settings of a model that decide, apart from its weights, how it is served; by their names on the page.

    `files.CHANGES_ANSWERS` are those that change what is generated.
    """
    tokenizer, model = lm.tokenizer, base_model(lm.model)
    config, settings = model.config.get_text_config(), model.generation_config
    rope = getattr(config, "rope_parameters", None) or getattr(
        config, "rope_scaling", None
    )
    template = None
    if tokenizer.chat_template:
        try:
            template = [
                tokenizer.decode(_tokens(tokenizer, conversation))
                for conversation in _CONVERSATIONS
            ]
        except Exception as error:  # noqa: BLE001
            template = [f"fails: {error}"]
    return {
        "tokenizer": [tokenizer(text)["input_ids"] for text in _TEXTS],
        "chat template": template,
        "special tokens": dict(tokenizer.special_tokens_map),
        "ends of an answer": sorted(end_tokens(model)),
        "generation config": {
            name: value
            for name, value in settings.to_diff_dict().items()
            if name not in _SAYS_NOTHING and value is not None
        },
        "rope": {"theta": getattr(config, "rope_theta", None)} | (rope or {}),
        "window": getattr(config, "sliding_window", None),
        "context": getattr(config, "max_position_embeddings", None),
        "dtype": str(model.dtype),
    }
