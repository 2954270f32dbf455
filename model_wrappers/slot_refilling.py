"""Greedy generation in slots that are refilled, for any model type built on `HFLM`.

`HFLM` generates a fixed batch until its longest answer is done. Here a batch is a
number of slots, each with room for the keys and values of one request: an answer
that is done hands its slot to the next request at once, the tokens of a prompt that
another slot holds already are copied from there, and keys and values are written in
place instead of being copied at each step. Independent of pruning.
"""

from __future__ import annotations

import copy
import logging
from collections import deque
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_pruned.generation import end_tokens
from lm_eval_pruned.model_wrappers.attention_support import (
    base_model,
    cache_argument,
    rounding,
    sequence_limit,
    unsupported_reason,
)
from lm_eval_pruned.model_wrappers.cpu_linear import fast_cpu_linears
from lm_eval_pruned.model_wrappers.hf_arguments import check_flag
from lm_eval_pruned.model_wrappers.token_counts import TokenCounts


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from lm_eval.api.instance import Instance

    # The mixin's neighbour among the bases, whose attributes it uses.
    from lm_eval.models.huggingface import HFLM as _Neighbour
else:
    _Neighbour = object

eval_logger = logging.getLogger("lm_eval.models.slot_refilling")

# The first use compares a few tokens with a plain pass; requests that may generate
# fewer tokens than this in all are not worth that.
_WORTH_CHECKING = 256
# A prompt waits for another that begins alike if that saves so many tokens.
_WORTH_WAITING = 32
# The order of texts is worth leaving that of lengths if this much more of the prompts
# is shared with the prompt before.
_WORTH_SORTING = 0.2
# Prompts go through the model together if the shortest is this much of the longest.
_LEAST_FILLING = 0.75
# Groups of slots whose attention ends with the group's longest, not the batch's.
_GROUPS = 4
_LEAST_SLOTS_IN_GROUPS = 16
# Bringing slots into order moves each token about as often as so many steps read it.
_COST_OF_ORDER = 4

# What of a generation config has no part in greedy decoding, or is set by HFLM.
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
# Values that change nothing.
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


class SlotRefillingMixin(_Neighbour):
    """Generates greedily, with the next request in the place of an answer that is done.

    Put it before `HFLM` among the bases. Answers are those of `HFLM` at batch size 1,
    up to tokens whose logits are equal but for rounding. ``batch_size`` is the number
    of slots; ``auto`` takes HFLM's ``max_batch_size``, or as many as the memory holds.
    Sampling, beams, penalties and models whose attention does not allow it take
    `HFLM`'s own path, and one logged line says why.
    """

    def __init__(self, *args: Any, slot_refilling: bool = True, **kwargs: Any) -> None:
        """Set up as the next class does.

        Args:
            *args: Passed on.
            slot_refilling: Refill the slots of a generating batch as they become free.
            **kwargs: Passed on.

        Raises:
            ValueError: `slot_refilling` is neither true nor false.
        """
        check_flag("slot_refilling", slot_refilling)
        self.slot_refilling = bool(slot_refilling)
        self._refilling_checked = False
        self._refilling_complaints: set[str] = set()
        self._most_slots: int | None = None
        super().__init__(*args, **kwargs)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        plain = super().generate_until  # type: ignore[misc]
        answers: list[str | None] = [None] * len(requests)
        jobs = self._jobs(requests)
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
        rest = [i for i, answer in enumerate(answers) if answer is None]
        if rest:
            others = plain([requests[i] for i in rest], disable_tqdm=disable_tqdm)
            for i, answer in zip(rest, others, strict=True):
                answers[i] = answer
        return answers  # type: ignore[return-value]

    def _jobs(self, requests: list[Instance]) -> list[_Job]:
        """Return the requests that can run in slots, as `HFLM` would read them."""
        if self.slot_refilling and (reason := _unsupported(self)) is not None:
            self.slot_refilling = False
            self._complain(reason)
        if not self.slot_refilling:
            return []
        limit = sequence_limit(self.config)
        eos = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        settings: dict[str, Any] = {}
        stops: dict[tuple[str, ...], _Stops] = {}
        jobs = []
        for index, request in enumerate(requests):
            context, gen_kwargs = request.args
            key = repr(gen_kwargs)
            if key not in settings:
                settings[key] = self._settings(gen_kwargs, eos)
            if settings[key] is None:
                continue
            until, most = settings[key]
            if tuple(until) not in stops:
                stops[tuple(until)] = _Stops(self.tokenizer, until)
            tokens, _ = self.tok_batch_encode(
                [context],
                left_truncate_len=self.max_length - most,
                truncation=self.truncation,
            )
            prompt = [int(token) for token in tokens[0].tolist()]
            if not prompt:
                self._complain("a context is empty")
            elif limit is not None and len(prompt) + most > limit:
                self._complain(
                    f"a request may grow longer than the {limit} tokens up to which "
                    "attention is plain"
                )
            else:
                jobs.append(_Job(index, prompt, most, until, stops[tuple(until)]))
        if not self._refilling_checked and (
            sum(job.most for job in jobs) < _WORTH_CHECKING
        ):
            return []
        return jobs if self._can_refill() else []

    def _settings(self, gen_kwargs: Any, eos: str) -> tuple[list[str], int] | None:
        """Return stop strings and most tokens, or None where `HFLM` has to answer."""
        if not isinstance(gen_kwargs, dict):
            return None
        kwargs = normalize_gen_kwargs(gen_kwargs, self.max_gen_toks)
        until = handle_stop_sequences(kwargs.pop("until", None), eos=eos)
        most = kwargs.pop("max_gen_toks")
        reason = None
        if kwargs.get("do_sample") is not False:
            reason = "do_sample"
        elif "max_length" in kwargs:
            reason = "max_length"
        elif not 0 < most < self.max_length:
            reason = f"max_gen_toks={most}"
        else:
            reason = self._unsupported_setting(kwargs)
        if reason is not None:
            self._complain(f"{reason} is asked for")
            return None
        return until, most

    def _unsupported_setting(self, kwargs: dict[str, Any]) -> str | None:
        """Return what would make generation more than greedy, or None."""
        config = copy.deepcopy(base_model(self.model).generation_config)
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

    def _complain(self, reason: str) -> None:
        if reason not in self._refilling_complaints and self.rank == 0:
            eval_logger.warning(
                "Slots are not refilled, generation takes the usual path: %s.", reason
            )
        self._refilling_complaints.add(reason)

    def _text(self, job: _Job) -> str:
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
        """Try it out, the first time."""
        if self.slot_refilling and not self._refilling_checked:
            self._refilling_checked = True
            reason = self._slots_disagree()
            if reason is not None:
                self.slot_refilling = False
                self._complain(reason)
        return self.slot_refilling

    def _slots_disagree(self) -> str | None:
        """Compare a few random tokens with a plain pass; return what differs."""
        vocabulary = self.config.get_text_config().vocab_size
        first = np.random.default_rng(0).integers(0, vocabulary, 9)
        second = np.concatenate([first[:3], first[::-1][:4]])
        padded = np.stack([first, np.append(second, [0, 0])])
        logits = self._model_call(torch.from_numpy(padded).to(self.device))
        expected = logits[[0, 0, 1, 1], [7, 8, 5, 6]]
        try:
            cache = _SlotCache(2)
            with fast_cpu_linears(self.model):
                parts = [
                    self._pass(cache, [(0, first[:8], 0)]),
                    self._shared_pass(cache, second[:6]),
                    self._pass(cache, [(0, first[8:], 8), (1, second[6:], 6)]),
                ]
        except Exception as error:  # noqa: BLE001 - whatever a model's code raises
            return f"the model's code rejects them ({type(error).__name__}: {error})"
        got = torch.cat(parts)[[0, 2, 1, 3]]
        got, expected = got.double(), expected.double()
        spread = expected.std(-1).mean().item()
        difference = (got - expected).square().mean().sqrt().item()
        if not difference <= rounding(logits.dtype) * spread:
            return (
                f"the model's logits change with them (by {difference:.1e}, of a spread "
                f"of {spread:.1e}, on random tokens)"
            )
        return None

    def _shared_pass(self, cache: _SlotCache, tokens: np.ndarray) -> torch.Tensor:
        cache.copy(0, 1, 3)
        return self._pass(cache, [(1, tokens[3:], 3)])

    def _slots(self, jobs: list[_Job]) -> int:
        """Return how many requests to run at once."""
        slots = self.batch_size
        if not isinstance(slots, int):
            # "auto", with or without a schedule.
            longest = max(len(job.tokens) + job.most for job in jobs)
            slots = min(self.max_batch_size, _rows_in_memory(self, longest))
        if self._most_slots is not None:
            # What a shortage of memory left of them earlier.
            slots = min(slots, self._most_slots)
        return max(1, min(slots, len(jobs)))

    def _generate(self, jobs: list[_Job]) -> Iterator[_Job]:
        """Run the requests through the model; yield each when its answer is done."""
        counts = getattr(self, "token_counts", TokenCounts())
        counts.prompt += sum(len(job.tokens) for job in jobs)
        ends = set(end_tokens(base_model(self.model)))
        waiting = deque(_ordered(jobs))
        slots = self._slots(jobs)
        # Elsewhere attention is the smaller part, and each group costs a launch.
        in_groups = self.device.type == "cpu" and slots >= _LEAST_SLOTS_IN_GROUPS
        table = _SlotTable(slots)
        while waiting or table.busy:
            try:
                group = table.admit(waiting, self._prefill_budget())
                if group:
                    work = [(s, job.array()[start:], start) for s, job, start in group]
                else:
                    table.compact()
                    if in_groups:
                        table.bring_into_order()
                    work = [
                        (s, job.array(1), len(job.tokens) - 1)
                        for s, job in enumerate(table.jobs)
                        if job is not None
                    ]
                with (
                    fast_cpu_linears(self.model),
                    _attention_in_groups(table.cache, in_groups),
                ):
                    logits = self._pass(table.cache, work)
                chosen = logits.float().argmax(-1).tolist()
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or slots == 1:
                    raise
                slots = self._most_slots = (slots + 1) // 2
                eval_logger.warning(
                    "Out of memory: going on with at most %d requests at once.", slots
                )
            else:
                counts.processed += sum(len(tokens) for _, tokens, _ in work)
                counts.generated += len(chosen)
                for (slot, _, _), token in zip(work, chosen, strict=True):
                    job = table.jobs[slot]
                    assert job is not None
                    job.add(token)
                    if token in ends or job.is_done():
                        table.release(slot)
                        yield job
                continue
            # Outside the handler, whose traceback holds on to the failed pass's tensors.
            waiting.extendleft(reversed(table.all_jobs()))
            table = _SlotTable(slots)
            clear_device_cache(garbage_collection=True)

    def _prefill_budget(self) -> int:
        """Return how many tokens, with padding, of several prompts run together."""
        return 256 * torch.get_num_threads() if self.device.type == "cpu" else 8192

    def _pass(
        self, cache: _SlotCache, work: list[tuple[int, np.ndarray, int]]
    ) -> torch.Tensor:
        """Run tokens through the model; return the logits after each one's last, [n, vocabulary].

        Args:
            cache: Keys and values of the slots.
            work: Slot, its new tokens, and the number of tokens that it holds already.
                A pass of one token each has the slots 0, 1, ...
        """
        device = self.device
        longest = max(len(tokens) for _, tokens, _ in work)
        tokens = np.zeros((len(work), longest), dtype=np.int64)
        for row, (_, new, _) in enumerate(work):
            tokens[row, : len(new)] = new
        start = np.array([start for _, _, start in work])
        position = torch.from_numpy(start[:, None] + np.arange(longest)).to(device)
        counts = [len(new) for _, new, _ in work]
        width = int((start + counts).max())
        cache.begin_pass([slot for slot, _, _ in work], start.tolist(), counts, width)
        mask = None
        if cache.shows_slots:
            hidden = torch.arange(width, device=device) > position[:, :, None]
            mask = torch.zeros(hidden.shape, dtype=self.model.dtype, device=device)
            mask = mask.masked_fill_(hidden, float("-inf"))[:, None]

        rows = torch.arange(len(work))
        last = torch.tensor(counts) - 1

        def keep_last(
            _module: torch.nn.Module, inputs: tuple[Any, ...]
        ) -> tuple[Any, ...]:
            states, *others = inputs
            return (states[rows, last][:, None], *others)

        hook = None
        if longest > 1:
            hook = self.model.get_output_embeddings().register_forward_pre_hook(
                keep_last
            )
        try:
            with (
                torch.no_grad(),
                torch.autocast(
                    device_type=device.type,
                    dtype=self.mixed_precision_dtype,
                    enabled=self.mixed_precision_dtype is not None,
                ),
            ):
                logits = self.model(
                    input_ids=torch.from_numpy(tokens).to(device),
                    position_ids=position,
                    attention_mask=mask,
                    use_cache=True,
                    **{cache_argument(self.model): cache},
                ).logits
        finally:
            if hook is not None:
                hook.remove()
        return logits[:, -1]


@dataclass
class _Job:
    """A request and the answer so far.

    Attributes:
        index: Its place among the requests of the call.
        tokens: Its prompt, and what was generated.
        most: Most tokens to generate.
        until: Strings at which the answer is cut.
        stops: Finds these strings.
        prompt: Tokens of the prompt.
    """

    index: int
    tokens: list[int]
    most: int
    until: list[str]
    stops: _Stops
    prompt: int = field(init=False)

    def __post_init__(self) -> None:
        self.prompt = len(self.tokens)

    @property
    def generated(self) -> list[int]:
        return self.tokens[self.prompt :]

    def array(self, last: int = 0) -> np.ndarray:
        """Return all tokens, or the `last`."""
        return np.array(self.tokens[-last:])

    def add(self, token: int) -> None:
        self.tokens.append(token)

    def is_done(self) -> bool:
        return len(self.tokens) - self.prompt >= self.most or self.stops.found(self)


class _Stops:
    """Finds stop strings where `lm_eval.models.utils_hf.MultiTokenEOSCriteria` does."""

    def __init__(self, tokenizer: Any, until: list[str]) -> None:
        self.tokenizer = tokenizer
        #: Stop strings by the number of last tokens to look for them in.
        self.windows: dict[int, list[str]] = {}
        for string in until:
            length = len(tokenizer.encode(string, add_special_tokens=False)) + 2
            self.windows.setdefault(length, []).append(string)

    def found(self, job: _Job) -> bool:
        for length, strings in self.windows.items():
            begin = max(job.prompt, len(job.tokens) - length)
            text = self.tokenizer.decode(job.tokens[begin:])
            if any(string in text for string in strings):
                return True
        return False


class _SlotTable:
    """Which request is in which slot, and what the slots' keys and values stand for."""

    def __init__(self, slots: int) -> None:
        self.cache = _SlotCache(slots)
        self.jobs: list[_Job | None] = [None] * slots
        #: Tokens that a slot began with; a released slot keeps them for others to copy.
        self.begun: list[np.ndarray] = [np.zeros(0, np.int64)] * slots
        self._excess = 0

    @property
    def busy(self) -> bool:
        return any(job is not None for job in self.jobs)

    def all_jobs(self) -> list[_Job]:
        return [job for job in self.jobs if job is not None]

    def release(self, slot: int) -> None:
        self.jobs[slot] = None

    def admit(self, waiting: deque[_Job], budget: int) -> list[tuple[int, _Job, int]]:
        """Move requests to free slots, as many as go through the model together.

        Returns:
            Slot, request and the number of its tokens that the slot holds already.
        """
        group: list[tuple[int, _Job, int]] = []
        free = [slot for slot, job in enumerate(self.jobs) if job is None]
        begun: list[np.ndarray] = []
        lengths: list[int] = []
        while waiting and free:
            tokens = waiting[0].array()
            common = [_common(tokens, other) for other in self.begun]
            source = max(range(len(common)), key=lambda s: (common[s], s in free))
            start = min(common[source], len(tokens) - 1)
            new = [*lengths, len(tokens) - start]
            if group and (
                max(_common(tokens, other) for other in begun) >= start + _WORTH_WAITING
                or max(new) * len(new) > budget
                or min(new) < _LEAST_FILLING * max(new)
            ):
                break
            slot = source if source in free else free[0]
            free.remove(slot)
            if slot != source:
                self.cache.copy(source, slot, start)
            job = waiting.popleft()
            group.append((slot, job, start))
            # Nothing to copy from before the pass is through.
            self.begun[slot] = tokens[:start]
            begun.append(tokens)
            lengths = new
        for (slot, job, _), tokens in zip(group, begun, strict=True):
            self.jobs[slot] = job
            self.begun[slot] = tokens
        return group

    def compact(self) -> None:
        """Move requests to the first slots; the batch becomes as small as what is left."""
        while self.jobs and self.jobs[-1] is None:
            self.jobs.pop()
        for slot in range(len(self.jobs)):
            if slot < len(self.jobs) and self.jobs[slot] is None:
                job = self.jobs.pop()
                assert job is not None
                self.cache.copy(len(self.jobs), slot, len(job.tokens) - 1)
                self.jobs[slot] = job
                while self.jobs[-1] is None:
                    self.jobs.pop()
        del self.begun[len(self.jobs) :]

    def bring_into_order(self) -> None:
        """Put the longest first once disorder has cost as much as order does.

        Needs a request in each slot.
        """
        lengths = np.array([len(job.tokens) for job in self.all_jobs()])
        order = np.argsort(-lengths, kind="stable")
        self._excess += _tokens_read(lengths) - _tokens_read(lengths[order])
        if self._excess > _COST_OF_ORDER * lengths.sum():
            self._excess = 0
            self.cache.permute(order, int(lengths.max()))
            self.jobs = [self.jobs[slot] for slot in order]
            self.begun = [self.begun[slot] for slot in order]


def _groups(lengths: Sequence[int] | np.ndarray) -> list[tuple[int, int, int]]:
    """Return first slot, last + 1 and the longest's length of each group of slots."""
    count = min(_GROUPS, len(lengths))
    bounds = [len(lengths) * i // count for i in range(count + 1)]
    return [
        (begin, end, int(max(lengths[begin:end]))) for begin, end in pairwise(bounds)
    ]


def _tokens_read(lengths: Sequence[int] | np.ndarray) -> int:
    return sum((end - begin) * width for begin, end, width in _groups(lengths))


@contextmanager
def _attention_in_groups(cache: _SlotCache, wanted: bool) -> Iterator[None]:
    """Let sdpa attention read each group of slots as far as its longest reaches."""
    if not wanted:
        yield
        return
    plain = ALL_ATTENTION_FUNCTIONS["sdpa"]
    ALL_ATTENTION_FUNCTIONS["sdpa"] = partial(_grouped_attention, cache, plain)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
        if ALL_ATTENTION_FUNCTIONS["sdpa"] is not plain:
            ALL_ATTENTION_FUNCTIONS["sdpa"] = plain


def _grouped_attention(
    cache: _SlotCache,
    plain: Callable[..., Any],
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    rows, width = len(query), cache.width
    if (
        cache.steps is None
        or attention_mask is None
        or attention_mask.shape != (rows, 1, 1, width)
        or not len(key) == len(value) == rows
        or not key.shape[-2] == value.shape[-2] == width
        or kwargs.get("position_bias") is not None
    ):
        return plain(module, query, key, value, attention_mask, **kwargs)
    parts = [
        plain(
            module,
            query[begin:end],
            key[begin:end, :, :longest],
            value[begin:end, :, :longest],
            attention_mask[begin:end, ..., :longest],
            **kwargs,
        )[0]
        for begin, end, longest in cache.groups
    ]
    return torch.cat(parts), None


def _common(a: np.ndarray, b: np.ndarray) -> int:
    """Return how many tokens `a` and `b` begin with in common."""
    length = min(len(a), len(b))
    differ = a[:length] != b[:length]
    return int(differ.argmax()) if differ.any() else length


def _ordered(jobs: list[_Job]) -> list[_Job]:
    """Return the requests in the order in which to run them.

    From the longest prompt to the shortest, so that those side by side are alike and
    a lack of memory shows early; by text where that puts more side by side that share.
    """
    by_length = sorted(jobs, key=lambda job: (-len(job.tokens), job.tokens))
    by_text = sorted(jobs, key=lambda job: job.tokens)
    gain = _shared(by_text) - _shared(by_length)
    worth_it = gain > _WORTH_SORTING * sum(len(job.tokens) for job in jobs)
    return by_text if worth_it else by_length


def _shared(jobs: list[_Job]) -> int:
    """Return how many tokens the requests have in common with the one before, in all."""
    return sum(_common(a, b) for a, b in pairwise([job.array() for job in jobs]))


class _SlotLayer(DynamicLayer):
    """Keys and values of the slots in one layer, [slots, heads, capacity, size]."""

    # Tensors once something was written.
    keys: Any
    values: Any

    def __init__(self, cache: _SlotCache) -> None:
        super().__init__()
        self.cache = cache

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self.keys = self._fitting(self.keys, key_states)
        self.values = self._fitting(self.values, value_states)
        self.is_initialized = True
        return (
            self._write(self.keys, key_states),
            self._write(self.values, value_states),
        )

    def _fitting(
        self, stored: torch.Tensor | None, states: torch.Tensor
    ) -> torch.Tensor:
        cache = self.cache
        if stored is not None and stored.shape[-2] >= cache.capacity:
            return stored
        _, heads, _, size = states.shape
        # Zeros: what is masked is multiplied by 0, which not every number survives.
        larger = states.new_zeros(cache.slots, heads, cache.capacity, size)
        if stored is not None:
            larger[:, :, : stored.shape[-2]] = stored
        return larger

    def _write(self, stored: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        cache = self.cache
        if cache.steps is not None:
            rows, place = (index.to(states.device) for index in cache.steps)
            stored[rows, :, place] = states[:, :, 0].to(stored.dtype)
            return stored[: len(rows), :, : cache.width]
        for row, (slot, start, count) in enumerate(cache.places):
            stored[slot, :, start : start + count] = states[row, :, :count]
        if not cache.shows_slots:
            return states
        if len(cache.places) == 1:
            slot = cache.places[0][0]
            return stored[slot : slot + 1, :, : cache.width]
        slots = torch.tensor([slot for slot, _, _ in cache.places])
        return stored[slots.to(stored.device), :, : cache.width]

    # What a model asks for that makes a mask of its own, in a pass without a past.

    def get_seq_length(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        # Older versions pass the positions themselves.
        return query_length if isinstance(query_length, int) else len(query_length), 0


class _SlotCache(Cache):
    """Keys and values of a number of slots, written in place; see `_SlotLayer`.

    Attributes:
        slots: How many.
        capacity: Tokens that a slot has room for.
        width: Tokens of the longest slot of a pass, the new ones included.
        places: Slot, first new token and number of new tokens, of each row of a pass.
        steps: Slots and places of the new tokens, if each row has one, else None.
        groups: First slot, last + 1 and tokens of the longest, in a pass of steps.
        shows_slots: Whether the pass sees what slots hold; else new tokens alone.
    """

    layers: list[_SlotLayer]  # type: ignore[assignment]

    def __init__(self, slots: int) -> None:
        super().__init__(
            layer_class_to_replicate=lambda: _SlotLayer(self)  # type: ignore[arg-type]
        )
        self.slots = slots
        self.capacity = 0
        self.width = 0
        self.places: list[tuple[int, int, int]] = []
        self.steps: tuple[torch.Tensor, torch.Tensor] | None = None
        self.groups: list[tuple[int, int, int]] = []
        self.shows_slots = False

    def begin_pass(
        self, slots: list[int], start: list[int], count: list[int], width: int
    ) -> None:
        """Say where the new tokens of each row belong."""
        self.places = list(zip(slots, start, count, strict=True))
        self.width = width
        if width > self.capacity:
            self.capacity = -(-max(width, self.capacity * 5 // 4) // 64) * 64
        self.shows_slots = any(start)
        self.steps = None
        if self.shows_slots and max(count) == 1 and slots == list(range(len(slots))):
            self.steps = torch.tensor(slots), torch.tensor(start)
            self.groups = _groups([place + 1 for place in start])

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` tokens of one slot to another."""
        for layer in self.layers:
            if length and layer.keys is not None:
                layer.keys[target, :, :length] = layer.keys[source, :, :length]
                layer.values[target, :, :length] = layer.values[source, :, :length]

    def permute(self, order: np.ndarray, length: int) -> None:
        """Put the first `length` tokens of slot ``order[i]`` into slot i."""
        for layer in self.layers:
            for stored in (layer.keys, layer.values):
                new = stored[torch.from_numpy(order), :, :length]
                stored[: len(order), :, :length] = new


def _rows_in_memory(lm: Any, length: int) -> int:
    """Return how many rows of `length` tokens a third of the free memory holds."""
    config = lm.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    token = 2 * config.num_hidden_layers * heads * size * lm.model.dtype.itemsize
    if lm.device.type == "cuda":
        free = torch.cuda.mem_get_info(lm.device)[0]
    else:
        free = psutil.virtual_memory().available
    return max(1, free // 3 // (token * length))


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
