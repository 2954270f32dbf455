"""The contract of all answer paths: the answers are those of `hf`, whatever a run varies."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from hypothesis import given, strategies as st

from lm_eval_pruned.model_wrappers.batching import (
    prefix_pass,
    prefix_sharing,
    slot_refilling,
    slots as slots_module,
)
from lm_eval_pruned.model_wrappers.batching.slots import SlotCache
from lm_eval_pruned.model_wrappers.batching.token_tree import Budget
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers.answering import (
    GENERATED,
    MAX_LENGTH,
    PROMPTS,
    SCORED,
    STEM,
    assert_close,
    greedy,
    hf,
    ours,
    tiny,
    wrapped,
)
from tests.helpers.checkpoints import tiny_config


if TYPE_CHECKING:
    from collections.abc import Callable


pytestmark = pytest.mark.usefixtures("share_however_little")


def adapted(config):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny(dtype=torch.float32), config).double().eval()


ADAPTERS = {
    **{
        name: peft.LoraConfig(
            r=4,
            target_modules=["k_proj", "down_proj"],
            init_lora_weights=False,
            use_dora=name == "dora",
        )
        for name in ("lora", "dora")
    },
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
}


@dataclass
class Variant:
    """A model, how far the numbers of two paths may lie apart, and arguments of both.

    With `bounds`, passes are as large as that.
    """

    model: Callable = tiny
    tolerance: float = 1e-9
    both: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)
    bounds: Budget | None = None


PRUNED = {"prune_percent": 40}
# Transformers takes the softmax of eager attention in float32 always.
EAGER = partial(Variant, partial(tiny, "eager"), 2e-5)


def in_16_bits(dtype, tolerance, **both):
    return Variant(partial(tiny, dtype=dtype), tolerance, both, PRUNED)


def passes_of(slots, *bounds):
    both = {"max_length": 256}
    return Variant(both=both, ours={"slots": slots}, bounds=Budget(*bounds))


FLOAT32 = {"softmax_dtype": "float32"}
VARIANTS = {
    "sdpa": Variant(),
    "eager": EAGER(),
    "pruned": Variant(ours=PRUNED),
    "float32": Variant(partial(tiny, dtype=torch.float32), 1e-4),
    "float16": in_16_bits(torch.float16, 0.2),
    "bfloat16": in_16_bits(torch.bfloat16, 1.5),
    "wider softmax": in_16_bits(torch.bfloat16, 1.5, **FLOAT32),
    "autocast": in_16_bits(torch.float32, 0.5, mixed_precision_dtype="bfloat16"),
    "narrower softmax": Variant(tolerance=1e-4, both=FLOAT32),
    "as many slots as usual": Variant(ours={"slots": None}),
    **{f"think_end_token={t}": Variant(both={"think_end_token": t}) for t in ("b", 98)},
    **{
        f"batch_size={size}": EAGER(
            ours={"batch_size": size, "max_batch_size": 4, "slots": None}
        )
        for size in (1, 20, "auto", "auto:3")
    },
    **{name: Variant(partial(adapted, config)) for name, config in ADAPTERS.items()},
    "small passes": passes_of(1, 9, 5, 9),
    "passes": passes_of(3, 70, 40, 20),
    "large passes": passes_of(7, 600, 256, 600),
}
MARKS = {
    "pruned": pytest.mark.smoke,
    **dict.fromkeys(
        ["narrower softmax", "think_end_token=b", "think_end_token=98", "dora", "ia3"]
        + ["batch_size=20", "batch_size=auto"],
        pytest.mark.slow,
    ),
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, id=n, marks=MARKS.get(n, ())) for n, v in VARIANTS.items()],
)
def test_answers_are_those_of_hf(kind, variant, monkeypatch):
    if variant.bounds:
        monkeypatch.setattr(PrefixHFLM, "_budget", lambda *_: variant.bounds)
    cls = PrunedHFLM if "prune_percent" in variant.ours else PrefixHFLM
    lm = wrapped(cls, variant.model(), **variant.both, **variant.ours)
    asked, model = copy.deepcopy(kind.asked), lm.model
    got, expected = kind.ask(lm), kind.ask(hf(model, **variant.both))
    assert kind.record(lm)["requests"].keys() == {kind.fast}
    assert kind.asked == asked
    if variant.tolerance < 0.1:
        assert_close(got, expected, variant.tolerance)
    elif kind is SCORED:
        # In 16 bits, flags and texts may differ where two tokens are near.
        values, theirs = ([value for value, _ in each] for each in (got, expected))
        assert values == pytest.approx(theirs, abs=variant.tolerance)
        if not variant.both:
            assert torch.tensor(values).to(model.dtype).tolist() == values
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            assert kind.ask(hf(model)) != got


def test_nothing_asked_is_nothing_answered(kind):
    assert kind.ask(ours(tiny()), []) == []


# --- properties


LETTERS = st.integers(0, 3)


def lists(most, of=LETTERS, least=1):
    return st.lists(of, min_size=least, max_size=most)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def pair(request):
    model = VARIANTS[request.param].model()
    return hf(model), ours(model), VARIANTS[request.param].tolerance


@given(
    # Contexts and continuations of four letters, some too long, and relatives of these.
    pairs=lists(14, st.tuples(lists(30), lists(6))),
    relatives=lists(
        10, st.tuples(st.integers(0, 13), st.integers(0, 4), lists(5)), least=0
    ),
    bounds=st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 30)),
    block=st.integers(1, 20),
)
def test_any_requests_in_any_passes_are_scored_as_by_hf(
    pair, pairs, relatives, bounds, block
):
    plain, shared, tolerance = pair
    for index, cut, tail in relatives:
        context = pairs[index % len(pairs)][0]
        pairs = [*pairs, (context[: max(1, len(context) - cut)], tail)]
    asked = [(("", str(n)), *both) for n, both in enumerate(pairs)]
    tokens, *others = bounds
    budget = Budget(tokens, *(min(other, tokens) for other in others))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_sharing, "_least_saving", lambda device: -9.0)
        patch.setattr(prefix_pass, "_BLOCK_QUERIES", block)
        patch.setattr(shared, "_budget", lambda _: budget)
        for lm in (plain, shared):
            patch.setattr(lm, "_max_length", 24)
        got = shared._loglikelihood_tokens(asked, disable_tqdm=True)
        expected = plain._loglikelihood_tokens(asked, disable_tqdm=True)
    assert_close(got, expected, tolerance)


STOP = st.text(st.characters(max_codepoint=127), min_size=1, max_size=2)
SETTINGS = {"until": lists(3, STOP, least=0), "max_gen_toks": st.integers(1, 40)}


@pytest.mark.slow
@given(
    drawn=lists(
        9,
        st.tuples(
            st.text("ab\n", min_size=1, max_size=MAX_LENGTH + 9),
            st.fixed_dictionaries(SETTINGS),
        ),
    ),
    slots=st.integers(1, 10),
    budget=st.integers(1, 200),
    most_in_mask=st.integers(1, 2000),
    groups=st.integers(1, 5),
    cost_of_order=st.sampled_from([0, 4]),
    failing=st.integers(0, 4),
)
def test_any_requests_in_any_slots_are_answered_as_one_by_one(
    pair, drawn, slots, budget, most_in_mask, groups, cost_of_order, failing
):
    """Also where the memory is too short for one of the copies between slots."""
    plain, refilled, _ = pair
    copy_slot, copies = SlotCache.copy, []

    def short_of_memory(*arguments):
        copies.append(arguments)
        if len(copies) == failing:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB.")
        copy_slot(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refilled, "_prefill_budget", lambda: budget)
        patch.setattr(slots_module, "_MOST_IN_MASK", most_in_mask)
        patch.setattr(slots_module, "_COST_OF_ORDER", cost_of_order)
        patch.setattr(slots_module, "_GROUPS", groups)
        patch.setattr(slots_module, "_WORTH_GROUPS", 0)
        patch.setattr(refilled, "slots", slots)
        patch.setattr(refilled._refilling, "most", None)
        patch.setattr(SlotCache, "copy", short_of_memory)
        got = GENERATED.ask(refilled, drawn)
    assert got == GENERATED.ask(plain, drawn)


# --- how much is computed


@pytest.mark.parametrize(
    ("fast", "asked", "processed", "logits"),
    [
        (
            SCORED,
            [("common text 1", " a"), ("common text 1", " b"), ("common text 2", " a")],
            # 12 common tokens; "1 " and "2 " after them. A text's last token is not an input.
            12 + 2 + 2,
            4,
        ),
        (
            GENERATED,
            greedy(STEM + "one", STEM + "two", STEM + "three", max_gen_toks=1),
            # "three" comes first, "one" takes its place, and "two" has only the stem to copy.
            len(STEM) + 5 + 3 + 3,
            3,
        ),
    ],
    ids=["shared", "slots"],
)
def test_what_is_common_is_computed_once(fast, asked, processed, logits):
    lm, rows = ours(tiny()), []
    lm.model.lm_head.register_forward_hook(
        lambda _, __, out: rows.append(out.shape[:-1].numel())
    )
    fast.ask(lm, asked)
    texts = [part for each in asked for part in each if isinstance(part, str)]
    assert lm.token_counts.prompt == len("".join(texts))
    assert lm.token_counts.processed == processed
    assert sum(rows) == logits


@pytest.mark.parametrize(("ends", "generated"), [(None, 45), ([*range(256)], 5)])
def test_generated_tokens_are_counted_with_the_one_that_ends_a_text(ends, generated):
    lm = ours(tiny())
    lm.model.generation_config.eos_token_id = ends
    GENERATED.ask(lm, [(letter * 7, {"max_gen_toks": 9}) for letter in "xyzvw"])
    counts = lm.token_counts
    assert (counts.prompt, counts.generated) == (35, generated)
    assert counts.processed == 35 + generated - 5


#: Bytes of keys and values of a token in `tiny`: layers, heads, size, float64.
ROW = 2 * tiny_config().num_hidden_layers * tiny_config().num_key_value_heads * 8 * 8


@pytest.mark.parametrize(
    ("arguments", "small", "slots"),
    [
        # Small: as many as are usual. Room for three rows of 64 tokens, or for none.
        ({"batch_size": 1}, 2**31, 5),
        ({"batch_size": 50}, 2**31, len(PROMPTS)),
        ({"batch_size": 1}, 3 * 65 * ROW, 3),
        ({"batch_size": 4}, 3 * 65 * ROW, 4),
        ({"batch_size": 1}, 0, 1),
        ({"batch_size": "auto", "slots": 6}, 0, 6),
    ],
)
def test_slots_depend_on_shapes_and_on_what_is_asked_for(
    arguments, small, slots, monkeypatch
):
    """Neither on the memory that is free nor on a clock: on every machine the same."""
    monkeypatch.setattr(slot_refilling, "_USUAL_SLOTS", 5)
    monkeypatch.setattr(slot_refilling, "_SMALL", small)
    lm = ours(tiny(), **{"slots": None, **arguments})
    GENERATED.ask(lm)
    assert GENERATED.record(lm)["slots"] == slots


# --- what goes wrong, and what happens beside


@pytest.mark.parametrize(
    ("fast", "asked"),
    [
        (SCORED, ("x", "")),
        (SCORED, ("x", "y" * (MAX_LENGTH + 1))),
        (GENERATED, ("x", {"max_gen_toks": MAX_LENGTH})),
    ],
    ids=["nothing to score", "too much to score", "too much to generate"],
)
def test_what_hf_refuses_is_refused(fast, asked):
    model = tiny()
    for lm in (hf(model), ours(model)):
        with pytest.raises(AssertionError):
            fast.ask(lm, [asked, fast.asked[0]])


def test_answers_reach_the_cache_and_the_progress_bar_as_they_come(fast, capsys):
    lm, seen = ours(tiny()), []
    lm.cache_hook.add_partial = lambda *entry: seen.append(repr(entry))
    got = fast.ask(lm, quiet=False)
    entries = zip([fast.request_type] * len(got), fast.asked, got, strict=True)
    assert sorted(seen) == sorted(map(repr, entries))
    error = capsys.readouterr().err
    assert f"Running {fast.request_type} requests" in error
    assert f"{len(got)}/{len(got)}" in error
