"""Greedy generation in slots that are refilled, for any model type built on `HFLM`.

`HFLM` generates a fixed batch until its longest answer is done. Here a batch is a
number of slots, each with room for the keys and values of one request: an answer
that is done hands its slot to the next request at once, the tokens of a prompt that
another slot holds already are copied from there, and keys and values are written in
place instead of being copied at each step. Independent of pruning.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import torch
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm
from transformers import GenerationMixin

from .attention_support import (
    base_model,
    config_of,
    sequence_limit,
    unsupported_reason,
)
from .fast_path import FastPath, FastPathMixin
from .flags import check_count
from .forward import Forward
from .generation import end_tokens
from .greedy_settings import StopStrings, unsupported_setting
from .memory import rows_in_memory, rows_that_are_small
from .slot_pass import in_pieces, likeliest
from .slot_table import SlotJob, SlotTable, ordered


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.api.instance import Instance


#: Stop strings, most tokens to generate, and what finds the stop strings.
_Settings = tuple[list[str], int, StopStrings]

# A step reads all weights, however many slots share it: with 16 a token takes a CPU twice
# as long as with 64, with 1 ten times as long.
_USUAL_SLOTS = 64
# Slots below which attention is not worth its groups.
_LEAST_SLOTS_IN_GROUPS = 16


class SlotRefillingMixin(FastPathMixin):
    """Generates greedily, with the next request in the place of an answer that is done.

    Put it before `HFLM` among the bases. Answers are those of `HFLM` at batch size 1,
    up to tokens whose logits are equal but for rounding. ``slots`` is the number of
    slots. Without it there are ``batch_size``, or `_USUAL_SLOTS` if that is more and their
    keys and values are small; with ``batch_size=auto``, HFLM's ``max_batch_size`` or as many
    as the memory holds. Sampling, beams, penalties and models whose attention does not allow it take
    `HFLM`'s own path, and one logged line says why.
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

        Raises:
            ValueError: `slot_refilling` is neither true nor false, or `slots` no count.
        """
        check_count("slots", slots)
        self.slots = slots
        self._refilling = FastPath(
            "slot_refilling",
            slot_refilling,
            "Slots are not refilled, generation takes the usual path",
            unsupported=_unsupported,
            unit="requests",
            smaller="slots={}",
        )
        super().__init__(*args, **kwargs)

    @property
    def slot_refilling(self) -> bool:
        """Whether requests that are greedy run in slots."""
        return bool(self._refilling.is_on)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        plain = super().generate_until  # type: ignore[misc]
        answers: dict[int, str] = {}
        jobs, reasons = self._jobs(requests)
        path = self.answer_paths.of("generate_until")
        before = self.token_counts.processed
        if jobs:
            bar = tqdm(
                total=len(jobs),
                disable=disable_tqdm or self.rank != 0,
                desc="Running generate_until requests",
            )
            for job in self._generate(jobs):
                answer = self._text(job)
                answers[job.index] = answer
                self.cache_hook.add_partial(
                    "generate_until", requests[job.index].args, answer
                )
                bar.update(1)
            bar.close()
            path.add("slots", len(jobs), self.token_counts.processed - before)
        if reasons:
            before = self.token_counts.processed
            others = plain([requests[i] for i in reasons], disable_tqdm=disable_tqdm)
            # Zero where the class counts nothing of what `HFLM` computes.
            computed = self.token_counts.processed - before
            path.add("plain", len(reasons), computed or None, reasons.values())
            answers.update(zip(reasons, others, strict=True))
        return [answers[i] for i in range(len(requests))]

    def _jobs(self, requests: list[Instance]) -> tuple[list[SlotJob], dict[int, str]]:
        """Decide which requests run in slots.

        Returns:
            These, as `HFLM` would read them, and why each other one, by its place among
            the requests, takes `HFLM`'s own path.
        """
        path = self._refilling
        if not self._can_take(path):
            return [], dict.fromkeys(range(len(requests)), path.reason)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        settings: dict[str, _Settings | str] = {}
        jobs: list[SlotJob] = []
        reasons: dict[int, str] = {}
        for index, request in enumerate(requests):
            context, gen_kwargs = request.args
            key = repr(gen_kwargs)
            if key not in settings:
                settings[key] = self._settings(gen_kwargs, eos)
            job = self._job(index, context, settings[key])
            if isinstance(job, SlotJob):
                jobs.append(job)
            else:
                reasons[index] = job
                self._complain(path, job)
        return jobs, reasons

    def _job(
        self, index: int, context: str, settings: _Settings | str
    ) -> SlotJob | str:
        """Return what runs in a slot, or why `HFLM` has to answer."""
        if isinstance(settings, str):
            return settings
        until, most, stops = settings
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
        return SlotJob(index, prompt, most, until, stops)

    def _settings(self, gen_kwargs: Any, eos: str) -> _Settings | str:
        """Return how requests are generated, or why `HFLM` has to answer them."""
        if not isinstance(gen_kwargs, dict):
            return "hf refuses it"
        kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        most = kwargs.pop("max_gen_toks")
        if kwargs.get("do_sample") is not False:
            reason = "do_sample"
        elif "max_length" in kwargs:
            reason = "max_length"
        elif not 0 < most < self.max_length:
            reason = f"max_gen_toks={most}"
        else:
            setting = unsupported_setting(
                base_model(self.model).generation_config, kwargs
            )
            if setting is None:
                return until, most, StopStrings(self.tokenizer, until)
            reason = setting
        return f"{reason} is asked for"

    def _text(self, job: SlotJob) -> str:
        """Turn tokens into text as `HFLM.generate_until` does."""
        tokens = job.generated
        think_end = self.think_end_token
        if isinstance(think_end, int):
            for place in reversed(range(len(tokens))):
                if tokens[place] == think_end:
                    tokens = tokens[place + 1 :]
                    break
        text = self.tok_decode(tokens)
        if isinstance(think_end, int):
            text = text.lstrip()
        return postprocess_generated_text(
            generation=text,
            stop=job.until,
            think_end_token=think_end if isinstance(think_end, str) else None,
        )

    def _can_refill(self) -> bool:
        return self._can_take(self._refilling)

    def _slots(self, jobs: list[SlotJob]) -> int:
        """Return how many requests to run at once."""
        slots = self.batch_size
        longest = max(len(job.tokens) + job.most for job in jobs)
        if self.slots is not None:
            slots = self.slots
        elif isinstance(slots, int):
            slots = max(slots, min(_USUAL_SLOTS, rows_that_are_small(self, longest)))
        else:
            # "auto", with or without a schedule.
            slots = min(self.max_batch_size, rows_in_memory(self, longest))
        if self._refilling.most is not None:
            slots = min(slots, self._refilling.most)
        return max(1, min(slots, len(jobs)))

    def _generate(self, jobs: list[SlotJob]) -> Iterator[SlotJob]:
        """Run the requests through the model; yield each when its answer is done."""
        counts = self.token_counts
        counts.prompt += sum(len(job.tokens) for job in jobs)
        ends = set(end_tokens(base_model(self.model)))
        waiting = deque(ordered(jobs))
        slots = self._slots(jobs)
        # Elsewhere attention is the smaller part, and each group costs a launch.
        in_groups = self.device.type == "cpu" and slots >= _LEAST_SLOTS_IN_GROUPS
        forward = Forward.of(self)
        table = SlotTable(slots, in_groups)

        def run() -> list[tuple[int, int]]:
            return self._advance(forward, table, waiting)

        def shrink(fewer: int) -> None:
            nonlocal slots, table
            slots = fewer
            waiting.extendleft(reversed(table.all_jobs()))
            table = SlotTable(slots, in_groups)

        while waiting or table.busy:
            new_tokens = self._run_or_shrink(self._refilling, run, slots, shrink)
            if new_tokens is None:
                continue
            self.answer_paths.of("generate_until").slots = slots
            counts.generated += len(new_tokens)
            for slot, token in new_tokens:
                job = table.jobs[slot]
                assert job is not None
                job.add(token)
                if token in ends or job.is_done():
                    table.release(slot)
                    yield job

    def _advance(
        self, forward: Forward, table: SlotTable, waiting: deque[SlotJob]
    ) -> list[tuple[int, int]]:
        """Run a group of prompts, or else a step of all slots; return slots and new tokens."""
        group = table.admit(waiting, self._prefill_budget())
        if group:
            work = [(s, job.array()[start:], start) for s, job, start in group]
        else:
            table.compact()
            if table.cache.in_groups:
                table.bring_into_order()
            work = [
                (s, job.array(1), len(job.tokens) - 1)
                for s, job in enumerate(table.jobs)
                if job is not None
            ]
        chosen = [
            token
            for piece, is_last in in_pieces(work)
            for token in likeliest(forward, table.cache, piece)
            if is_last
        ]
        self.token_counts.processed += sum(len(tokens) for _, tokens, _ in work)
        return [(slot, token) for (slot, _, _), token in zip(work, chosen, strict=True)]

    def _prefill_budget(self) -> int:
        """Return how many tokens, with padding, of several prompts run together."""
        return 256 * torch.get_num_threads() if self.device.type == "cpu" else 8192


def _unsupported(lm: Any) -> str | None:
    """Return why slots cannot be refilled on an `HFLM`, or None if nothing speaks against it."""
    reason = unsupported_reason(lm)
    if reason is not None:
        return reason
    model = base_model(lm.model)
    if getattr(type(model), "generate", None) is not GenerationMixin.generate:
        return f"{type(model).__name__} generates in a way of its own"
    accelerator = getattr(lm, "accelerator", None)
    if accelerator is not None and accelerator.distributed_type in (
        "FSDP",
        "DEEPSPEED",
    ):
        return "its weights are spread over processes that have to keep step"
    return None
