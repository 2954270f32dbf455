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
from collections import Counter, deque
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from tqdm import tqdm
from transformers import GenerationMixin
from transformers.cache_utils import Cache, DynamicLayer

from .answer_paths import AnswerPaths
from .attention_support import (
    base_model,
    cache_argument,
    config_of,
    sequence_limit,
    trial_disagrees,
    unsupported_reason,
)
from .flags import check_flag
from .forward import Forward
from .generation import end_tokens
from .masks import additive_mask
from .token_counts import TokenCounts


if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from lm_eval.api.instance import Instance

    # The mixin's neighbour among the bases, whose attributes it uses.
    from lm_eval.models.huggingface import HFLM as _Neighbour
    from transformers import PreTrainedModel
else:
    _Neighbour = object

eval_logger = logging.getLogger("lm_eval.models.slot_refilling")

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
# Elements of a pass's mask: 16 MiB in 16 bits. Prompts that need more go in pieces.
_MOST_IN_MASK = 2**23

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

    Attributes:
        token_counts: Grows by what goes through the slots; what takes `HFLM`'s own path is
            for the class to count that measures it.
        answer_paths: How many requests took which path, and why.
    """

    token_counts: TokenCounts
    answer_paths: AnswerPaths

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
        self._refilling_complaints: list[str] = []
        self._most_slots: int | None = None
        # Classes may be combined: totals are of all.
        if not hasattr(self, "token_counts"):
            self.token_counts = TokenCounts()
        if not hasattr(self, "answer_paths"):
            self.answer_paths = AnswerPaths()
        super().__init__(*args, **kwargs)

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        plain = super().generate_until  # type: ignore[misc]
        answers: list[str | None] = [None] * len(requests)
        jobs = self._jobs(requests)
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
            computed = self.token_counts.processed - before
            path.add("slots", len(jobs), computed)
        rest = [i for i, answer in enumerate(answers) if answer is None]
        if rest:
            before = self.token_counts.processed
            others = plain([requests[i] for i in rest], disable_tqdm=disable_tqdm)
            # Zero where the class counts nothing of what `HFLM` computes.
            computed = self.token_counts.processed - before
            reasons = self._refilling_complaints or ["slot_refilling=false"]
            path.add("plain", len(rest), computed or None, *reasons)
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
        limit = sequence_limit(config_of(self))
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
        return jobs if jobs and self._can_refill() else []

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
        if reason in self._refilling_complaints:
            return
        self._refilling_complaints.append(reason)
        if self.rank == 0:
            eval_logger.warning(
                "Slots are not refilled, generation takes the usual path: %s.", reason
            )

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
            reason = trial_disagrees(self.model, _plain_logits, _slot_logits)
            if reason is not None:
                self.slot_refilling = False
                self._complain(reason)
        return self.slot_refilling

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
        counts = self.token_counts
        counts.prompt += sum(len(job.tokens) for job in jobs)
        ends = set(end_tokens(base_model(self.model)))
        waiting = deque(_ordered(jobs))
        slots = self._slots(jobs)
        # Elsewhere attention is the smaller part, and each group costs a launch.
        in_groups = self.device.type == "cpu" and slots >= _LEAST_SLOTS_IN_GROUPS
        forward = Forward.of(self)
        table = _SlotTable(slots, in_groups)
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
                chosen = [
                    token
                    for piece, is_last in _pieces(work)
                    for token in _likeliest(forward, table.cache, piece)
                    if is_last
                ]
            except RuntimeError as error:
                if not should_reduce_batch_size(error) or slots == 1:
                    raise
                if _is_split(base_model(self.model)):
                    # The others wait for this one within the pass.
                    raise RuntimeError(
                        f"Out of memory with {slots} requests at once, and processes that "
                        "share a model (tp_plan) cannot take fewer one by one: give "
                        f"batch_size={slots // 2}"
                    ) from error
                slots = self._most_slots = (slots + 1) // 2
                eval_logger.warning(
                    "Out of memory: going on with at most %d requests at once.", slots
                )
            else:
                counts.processed += sum(len(tokens) for _, tokens, _ in work)
                self.answer_paths.of("generate_until").slots = slots
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
            table = _SlotTable(slots, in_groups)
            clear_device_cache(garbage_collection=True)

    def _prefill_budget(self) -> int:
        """Return how many tokens, with padding, of several prompts run together."""
        return 256 * torch.get_num_threads() if self.device.type == "cpu" else 8192


#: Slot, its new tokens, and the number of tokens that it holds already.
_Row = tuple[int, np.ndarray, int]


def _pass(forward: Forward, cache: _SlotCache, work: list[_Row]) -> torch.Tensor:
    """Run tokens through a model; return the logits after each row's last, [n, vocabulary].

    Args:
        forward: The model.
        cache: Keys and values of the slots.
        work: The rows. A pass of one token each has the slots 0, 1, ...
    """
    longest = max(len(tokens) for _, tokens, _ in work)
    tokens = np.zeros((len(work), longest), dtype=np.int64)
    for row, (_, new, _) in enumerate(work):
        tokens[row, : len(new)] = new
    start = np.array([start for _, _, start in work])
    counts = np.array([len(new) for _, new, _ in work])
    slots = np.array([slot for slot, _, _ in work])
    # One copy to the device for all that a pass needs there.
    host = np.column_stack(
        [tokens, start[:, None] + np.arange(longest), slots, start, counts - 1]
    )
    sent = torch.from_numpy(host).to(forward.device)
    position = sent[:, longest : 2 * longest]
    cache.begin_pass(slots.tolist(), start.tolist(), counts.tolist(), sent[:, -3:-1].T)
    mask = None
    if cache.shows_slots:
        places = torch.arange(cache.width, device=forward.device)
        dtype = forward.autocast_dtype or forward.model.dtype
        mask = additive_mask(places > position[:, :, None], dtype)

    def last(states: torch.Tensor) -> torch.Tensor:
        place = sent[:, -1].to(states.device)
        return states[torch.arange(len(place), device=place.device), place][:, None]

    logits = forward(
        sent[:, :longest],
        position,
        last if longest > 1 else None,
        attention_mask=mask,
        use_cache=True,
        **{cache_argument(forward.model): cache},
    )
    return logits[:, -1]


def _likeliest(forward: Forward, cache: _SlotCache, work: list[_Row]) -> list[int]:
    return _pass(forward, cache, work).float().argmax(-1).tolist()


def _pieces(work: list[_Row]) -> Iterator[tuple[list[_Row], bool]]:
    """Cut a pass into such as need no mask of more than `_MOST_IN_MASK` elements.

    Yields:
        Rows, and whether they go to their prompts' ends.
    """
    longest = max(len(tokens) for _, tokens, _ in work)
    width = max(start + len(tokens) for _, tokens, start in work)
    fitting = _MOST_IN_MASK // (longest * width)
    if longest == 1 or fitting >= len(work) or not any(start for _, _, start in work):
        yield work, True
    elif fitting:
        for row in range(0, len(work), fitting):
            yield work[row : row + fitting], True
    else:
        count = max(1, _MOST_IN_MASK // width)
        for slot, tokens, start in work:
            for begin in range(0, len(tokens), count):
                piece = tokens[begin : begin + count]
                yield [(slot, piece, start + begin)], begin + count >= len(tokens)


def _trial_tokens(model: PreTrainedModel) -> np.ndarray:
    """Return two random sequences that begin alike, [2, 12]."""
    vocabulary = model.config.get_text_config().vocab_size
    tokens = np.random.default_rng(0).integers(0, vocabulary, (2, 12))
    tokens[1, :3] = tokens[0, :3]
    return tokens


def _plain_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return logits of the trial's tokens, [n, vocabulary], each sequence in one pass."""
    with torch.no_grad():
        first, second = (
            model(input_ids=torch.from_numpy(tokens[None])).logits[0]
            for tokens in _trial_tokens(model)
        )
    steps = torch.stack([first[7:11], second[8:12]], 1).flatten(0, 1)
    return torch.cat([first[6:7], second[4:5], steps])


def _slot_logits(model: PreTrainedModel) -> torch.Tensor:
    """Return the same logits from slots: prompts, a shared beginning, steps."""
    first, second = _trial_tokens(model)
    forward = Forward(model, model.device)
    cache = _SlotCache(2, in_groups=True)
    parts = [_pass(forward, cache, [(0, first[:7], 0)])]
    cache.copy(0, 1, 3)
    parts.append(_pass(forward, cache, [(1, second[3:5], 3)]))
    parts.append(_pass(forward, cache, [(0, first[7:8], 7), (1, second[5:9], 5)]))
    for i in range(8, 11):
        step = [(0, first[i : i + 1], i), (1, second[i + 1 : i + 2], i + 1)]
        parts.append(_pass(forward, cache, step))
    return torch.cat(parts)


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

    def __init__(self, slots: int, in_groups: bool = False) -> None:
        self.cache = _SlotCache(slots, in_groups)
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


class _GroupedKeys(torch.Tensor):
    """Keys of which sdpa attention reads each group of slots as far as its longest reaches.

    It is the layer's keys that carry this, so that nothing outside of a pass knows of it.
    """

    groups: list[tuple[int, int, int]]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is F.scaled_dot_product_attention:
                return _grouped_attention(*args, **kwargs)
            result = func(*args, **kwargs)
            if func not in _KEEPING_GROUPS:
                return result
            keys = args[0]
            whole = (len(keys), keys.shape[-2]) == (len(result), result.shape[-2])
            return _in_groups(result, keys.groups) if whole else result


# Queries that share keys: what transformers does to these first.
_KEEPING_GROUPS = {torch.Tensor.__getitem__, torch.Tensor.expand, torch.Tensor.reshape}


def _in_groups(keys: torch.Tensor, groups: list[tuple[int, int, int]]) -> _GroupedKeys:
    grouped = keys.as_subclass(_GroupedKeys)
    grouped.groups = groups
    return grouped


def _grouped_attention(
    query: torch.Tensor,
    key: _GroupedKeys,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    rows, width = len(key), key.shape[-2]
    if (
        attn_mask is None
        or (attn_mask.shape[0], attn_mask.shape[-1]) != (rows, width)
        or not len(query) == len(value) == rows
    ):
        return F.scaled_dot_product_attention(
            query, key, value, attn_mask, *args, **kwargs
        )
    parts = [
        F.scaled_dot_product_attention(
            query[begin:end],
            key[begin:end, :, :longest],
            value[begin:end, :, :longest],
            attn_mask[begin:end, ..., :longest],
            *args,
            **kwargs,
        )
        for begin, end, longest in key.groups
    ]
    return torch.cat(parts)


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
        keys = self._write(self.keys, key_states)
        if self.cache.in_groups and self.cache.groups:
            keys = _in_groups(keys, self.cache.groups)
        return keys, self._write(self.values, value_states)

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
        if cache.groups:
            rows, place = cache.on(states.device)
            stored[rows, :, place] = states[:, :, 0].to(stored.dtype)
            return stored[: len(rows), :, : cache.width]
        for row, (slot, start, count) in enumerate(cache.places):
            stored[slot, :, start : start + count] = states[row, :, :count]
        if not cache.shows_slots:
            return states
        if len(cache.places) == 1:
            slot = cache.places[0][0]
            return stored[slot : slot + 1, :, : cache.width]
        slots, _ = cache.on(stored.device)
        return stored[slots, :, : cache.width]

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
        in_groups: Whether attention reads groups of slots by themselves in a step.
        capacity: Tokens that a slot has room for.
        width: Tokens of the longest slot of a pass, the new ones included.
        places: Slot, first new token and number of new tokens, of each row of a pass.
        groups: First slot, last + 1 and tokens of the longest, in a step: a pass of one
            token for each of the slots 0, 1, ...; else empty.
        shows_slots: Whether the pass sees what slots hold; else new tokens alone.
    """

    layers: list[_SlotLayer]  # type: ignore[assignment]

    def __init__(self, slots: int, in_groups: bool = False) -> None:
        super().__init__(
            layer_class_to_replicate=lambda: _SlotLayer(self)  # type: ignore[arg-type]
        )
        self.slots = slots
        self.in_groups = in_groups
        self.capacity = 0
        self.width = 0
        self.places: list[tuple[int, int, int]] = []
        self.groups: list[tuple[int, int, int]] = []
        self.shows_slots = False
        self._index: dict[torch.device, torch.Tensor] = {}

    def begin_pass(
        self, slots: list[int], start: list[int], count: list[int], index: torch.Tensor
    ) -> None:
        """Say where the new tokens of each row belong.

        Args:
            slots: Slot of each row.
            start: First new token of each row.
            count: New tokens of each row.
            index: `slots` and `start`, [2, rows], on the device of the model.
        """
        self.places = list(zip(slots, start, count, strict=True))
        self._index = {index.device: index}
        ends = [first + new for _, first, new in self.places]
        self.width = max(ends)
        if self.width > self.capacity:
            self.capacity = -(-max(self.width, self.capacity * 5 // 4) // 64) * 64
        self.shows_slots = any(start)
        is_step = max(count) == 1 and slots == list(range(len(slots)))
        self.groups = _groups(ends) if self.shows_slots and is_step else []

    def on(self, device: torch.device) -> torch.Tensor:
        """Return slot and first new token of each row, [2, rows]; sent once in a pass."""
        if device not in self._index:
            self._index[device] = next(iter(self._index.values())).to(device)
        return self._index[device]

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
                new = stored[torch.from_numpy(order).to(stored.device), :, :length]
                stored[: len(order), :, :length] = new


def _rows_in_memory(lm: Any, length: int) -> int:
    """Return how many rows of `length` tokens a third of the free memory holds.

    The same for all processes among which the model's tensors are split.
    """
    model = base_model(lm.model)
    config = config_of(lm).get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or (
        config.hidden_size // config.num_attention_heads
    )
    heads = -(-heads // (getattr(model, "tp_size", None) or 1))
    row = 2 * heads * size * lm.model.dtype.itemsize * length
    rows = min(
        _free_memory(device) // 3 // (row * layers)
        for device, layers in _layers_by_device(lm, config.num_hidden_layers).items()
    )
    if _is_split(model):
        # They run the same passes in step.
        least = torch.tensor(rows, device=lm.device)
        torch.distributed.all_reduce(least, torch.distributed.ReduceOp.MIN)
        rows = int(least)
    return max(1, rows)


def _layers_by_device(lm: Any, layers: int) -> Counter[torch.device]:
    """Return how many layers of a model lie on each device."""
    devices = {
        module.layer_idx: next((p.device for p in module.parameters()), lm.device)
        for module in lm.model.modules()
        if isinstance(getattr(module, "layer_idx", None), int)
    }
    # What is offloaded runs where the model does.
    found = Counter(
        lm.device if device.type in ("meta", "cpu") else device
        for device in devices.values()
    )
    return found or Counter({lm.device: layers})


def _free_memory(device: torch.device) -> int:
    """Return the bytes that a process can have on a device."""
    backend: Any = getattr(torch, device.type, None)
    if device.type == "cpu" or not hasattr(backend, "mem_get_info"):
        return psutil.virtual_memory().available
    # What the allocator keeps for the next tensor is free as well.
    kept = backend.memory_reserved(device) - backend.memory_allocated(device)
    return backend.mem_get_info(device)[0] + kept


def _is_split(model: Any) -> bool:
    """Return whether several processes hold a part of each of a model's tensors."""
    return (getattr(model, "tp_size", None) or 1) > 1


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
