"""Greedy generation in slots that are refilled, for any model type built on `HFLM`.

`HFLM` generates a fixed batch until its longest answer is done. Here a batch is a
number of slots, each with room for the keys and values of one request: an answer
that is done hands its slot to the next request at once, the tokens of a prompt that
another slot holds already are copied from there, and keys and values are written in
place instead of being copied at each step. Independent of pruning.
"""

from __future__ import annotations

import copy
from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm

from .attention_support import base_model, config_of, sequence_limit
from .fast_path import FastPath, FastPathMixin, end_tokens
from .forward import Forward
from .slots import Row, SlotJob, SlotTable, run_rows, slot_bytes


if TYPE_CHECKING:
    from collections.abc import Callable

    from lm_eval.api.instance import Instance
    from transformers import GenerationConfig


# A step reads all weights, however many slots share it: with 16 a token takes a CPU twice
# as long as with 64, with 1 ten times as long.
_USUAL_SLOTS = 64
# Bytes of keys and values that these may take unasked, the same on every machine.
_SMALL = 2 * 2**30
# What of a generation config plays no part in greedy decoding, or is set by HFLM.
_WITHOUT_EFFECT = {
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "max_length",
    "min_p",
    "pad_token_id",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "use_cache",
}
# Values besides None and False that change nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "cache_implementation": ("dynamic", "hybrid", "static"),
    "diversity_penalty": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "encoder_repetition_penalty": (1,),
    "guidance_scale": (1,),
    "length_penalty": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "no_repeat_ngram_size": (0,),
    "num_beam_groups": (1,),
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "repetition_penalty": (1,),
}


def unsupported_setting(
    generation_config: GenerationConfig, kwargs: dict[str, Any]
) -> str | None:
    """Return what would make generation more than greedy, or None.

    Args:
        generation_config: The model's own.
        kwargs: What a task asks for on top of it, as `normalize_gen_kwargs` returns it.
    """
    if kwargs.get("do_sample") is not False:
        return "do_sample"
    if "max_length" in kwargs:
        return "max_length"
    config = copy.deepcopy(generation_config)
    relevant = {k: v for k, v in kwargs.items() if k not in _WITHOUT_EFFECT}
    for name in config.update(**relevant):
        return name
    for name, value in config.to_diff_dict().items():
        if (
            name not in _WITHOUT_EFFECT
            and not name.startswith("_")
            and value is not None
            and value is not False
            and value not in _NEUTRAL.get(name, ())
        ):
            return f"{name}={value}"
    return None


class SlotRefillingMixin(FastPathMixin):
    """Generates greedily, with the next request in the place of an answer that is done.

    Put it before `HFLM` among the bases. Answers are those of `HFLM` at batch size 1,
    up to tokens whose logits are equal but for rounding. Without ``slots`` there are
    `_USUAL_SLOTS`, or HFLM's ``max_batch_size`` with ``batch_size=auto``; fewer where their
    keys and values are not small, and at least ``batch_size``. Sampling, beams, penalties and
    models whose attention does not allow it take `HFLM`'s own path, and one logged line
    says why.
    """

    def __init__(
        self,
        *args: Any,
        slot_refilling: bool = True,
        slots: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Set up as the next class does.

        Args:
            *args: Passed on.
            slot_refilling: Refill the slots of a generating batch as they become free.
            slots: Most requests to generate for at once; None: see the class.
            **kwargs: Passed on.
        """
        self.slots = slots
        self._refilling = FastPath("slot_refilling", slot_refilling, "requests")
        super().__init__(*args, **kwargs)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        plain = super().generate_until  # type: ignore[misc]
        work = self._jobs(requests)
        jobs = [job for job in work if isinstance(job, SlotJob)]
        reasons = {i: why for i, why in enumerate(work) if isinstance(why, str)}
        answers = [""] * len(work)
        path = self.answer_paths["generate_until"]
        before = self.token_counts.processed
        if jobs:
            with tqdm(
                total=len(jobs),
                disable=disable_tqdm or self.rank != 0,
                desc="Running generate_until requests",
            ) as bar:

                def finish(job: SlotJob) -> None:
                    answer = answers[job.index] = self._text(job)
                    arguments = requests[job.index].args
                    self.cache_hook.add_partial("generate_until", arguments, answer)
                    bar.update()

                self._generate(jobs, finish)
            path.add("slots", len(jobs), self.token_counts.processed - before)
        if reasons:
            before = self.token_counts.processed
            others = plain([requests[i] for i in reasons], disable_tqdm=disable_tqdm)
            computed = self.token_counts.processed - before
            path.add("plain", len(reasons), computed, reasons.values())
            for index, answer in zip(reasons, others, strict=True):
                answers[index] = answer
        return answers

    def _jobs(self, requests: list[Instance]) -> list[SlotJob | str]:
        """Return for each request what runs in a slot, or why `HFLM` has to answer."""
        path = self._refilling
        if (why := self._why_not(path)) is not None:
            return [why] * len(requests)
        work = [self._job(i, *request.args) for i, request in enumerate(requests)]
        for reason in work:
            if isinstance(reason, str):
                self._complain(path, reason)
        return work

    def _job(
        self, index: int, context: str, gen_kwargs: dict[str, Any]
    ) -> SlotJob | str:
        kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        most = kwargs.pop("max_gen_toks")
        if not 0 < most < self.max_length:
            return f"max_gen_toks={most} is asked for"
        setting = unsupported_setting(base_model(self.model).generation_config, kwargs)
        if setting is not None:
            return f"{setting} is asked for"
        tokens, _ = self.tok_batch_encode(
            [context],
            left_truncate_len=self.max_length - most,
            truncation=self.truncation,
        )
        prompt = [int(token) for token in tokens[0].tolist()]
        limit = sequence_limit(config_of(self))
        if not prompt:
            return "a context is empty"
        if limit is not None and len(prompt) + most > limit:
            return (
                f"a request may grow longer than the {limit} tokens up to which "
                "attention is plain"
            )
        # As far back as HFLM looks for the longest of them.
        lengths = [
            len(self.tokenizer.encode(string, add_special_tokens=False)) + 2
            for string in until
        ]
        return SlotJob(index, prompt, most, until, max(lengths, default=0))

    def _text(self, job: SlotJob) -> str:
        """Turn tokens into text as `HFLM.generate_until` does."""
        tokens, think_end = job.generated, self.think_end_token
        if not isinstance(think_end, int):
            text = self.tok_decode(tokens)
            return postprocess_generated_text(text, job.until, think_end)
        if think_end in tokens:
            tokens = tokens[len(tokens) - tokens[::-1].index(think_end) :]
        text = self.tok_decode(tokens).lstrip()
        return postprocess_generated_text(text, job.until, None)

    def _slots(self, jobs: list[SlotJob], length: int) -> int:
        """Return how many requests of up to `length` tokens to run at once."""
        slots = self.slots
        if slots is None:
            by_batch = isinstance(self.batch_size, int)
            usual = _USUAL_SLOTS if by_batch else self.max_batch_size
            slots = min(usual, _SMALL // slot_bytes(self, length))
            if by_batch:
                slots = max(slots, self.batch_size)
        return max(1, min(slots, self._refilling.most or slots, len(jobs)))

    def _generate(self, jobs: list[SlotJob], finish: Callable[[SlotJob], None]) -> None:
        """Run the requests through the model; call `finish` with each when its answer is done."""
        counts = self.token_counts
        counts.prompt += sum(job.prompt for job in jobs)
        ends = set(end_tokens(base_model(self.model)))
        longest = max(job.prompt + job.most for job in jobs)
        forward = Forward(self)
        # From the longest prompt to the shortest: neighbours need little padding, and a
        # lack of memory shows early.
        in_order = sorted(jobs, key=lambda job: (-job.prompt, job.tokens))
        unfinished = {job.index: job for job in in_order}

        def run(slots: int) -> None:
            self.answer_paths["generate_until"].slots = slots
            waiting, table = deque(unfinished.values()), SlotTable(slots, longest)
            while unfinished:
                group = table.admit(waiting, self._prefill_budget()) or table.step()
                rows: list[Row] = [
                    (s, job.tokens[held:], held) for s, job, held in group
                ]
                logits = run_rows(forward, table.cache, rows)
                counts.processed += sum(len(tokens) for _, tokens, _ in rows)
                counts.generated += len(rows)
                chosen = logits.float().argmax(-1).tolist()
                for (slot, job, _), token in zip(group, chosen, strict=True):
                    job.tokens.append(token)
                    if token in ends or self._is_done(job):
                        del table.jobs[slot], unfinished[job.index]
                        finish(job)

        self._run(self._refilling, run, self._slots(jobs, longest))

    def _is_done(self, job: SlotJob) -> bool:
        generated = job.generated
        tail = self.tokenizer.decode(generated[-job.window :])
        return len(generated) >= job.most or any(text in tail for text in job.until)

    def _prefill_budget(self) -> int:
        """Return how many tokens, with padding, of several prompts run together."""
        return 256 * torch.get_num_threads() if self.device.type == "cpu" else 8192
