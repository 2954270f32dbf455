"""The contract of all answer paths: the answers are those of `hf`, whatever a run varies."""

from __future__ import annotations

import copy
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import peft
import pytest
import torch
from hypothesis import given, strategies as st
from lm_eval.models.huggingface import HFLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lm_eval_pruned.model_wrappers.batching import (
    prefix_pass,
    prefix_sharing,
    slot_refilling,
    slot_table,
    slots as slots_module,
)
from lm_eval_pruned.model_wrappers.batching.token_tree import Budget
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
    "lora": peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    ),
    "dora": peft.LoraConfig(
        r=4,
        target_modules=["k_proj", "up_proj"],
        init_lora_weights=False,
        use_dora=True,
    ),
    "ia3": peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
}


@dataclass
class Variant:
    """A model, how far the numbers of two paths may lie apart, and arguments of both."""

    model: Callable = tiny
    tolerance: float = 1e-9
    both: dict[str, Any] = field(default_factory=dict)
    ours: dict[str, Any] = field(default_factory=dict)


# Transformers takes the softmax of eager attention in float32 always.
EAGER = partial(Variant, partial(tiny, "eager"), 2e-5)
VARIANTS = {
    "sdpa": Variant(),
    "eager": EAGER(),
    "float32": Variant(partial(tiny, dtype=torch.float32), 1e-4),
    "narrower softmax": Variant(tolerance=1e-4, both={"softmax_dtype": "float32"}),
    "as many slots as usual": Variant(ours={"slots": None}),
    "think_end_token=b": Variant(both={"think_end_token": "b"}),
    "think_end_token=98": Variant(both={"think_end_token": 98}),
    **{
        f"batch_size={size}": EAGER(
            ours={"batch_size": size, "max_batch_size": 4, "slots": None}
        )
        for size in (1, 20, "auto", "auto:3")
    },
    **{name: Variant(partial(adapted, config)) for name, config in ADAPTERS.items()},
}


SLOW = {
    *("narrower softmax", "think_end_token=b", "think_end_token=98", "dora", "ia3"),
    *("batch_size=20", "batch_size=auto"),
}


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param(v, id=name, marks=pytest.mark.slow if name in SLOW else ())
        for name, v in VARIANTS.items()
    ],
)
def test_answers_are_those_of_hf(kind, variant):
    model = variant.model()
    lm = ours(model, **variant.both, **variant.ours)
    asked = copy.deepcopy(kind.asked)
    got = kind.ask(lm)
    assert_close(got, kind.ask(hf(model, **variant.both)), variant.tolerance)
    assert kind.record(lm)["requests"].keys() == {kind.fast}
    assert kind.asked == asked
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            assert kind.ask(hf(model)) != got


@pytest.mark.parametrize("percent", [0, pytest.param(40, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("dtype", "arguments", "tolerance"),
    [
        (torch.float16, {}, 0.2),
        (torch.bfloat16, {}, 1.5),
        (torch.bfloat16, {"softmax_dtype": "float32"}, 1.5),
        (torch.float32, {"mixed_precision_dtype": "bfloat16"}, 0.5),
    ],
    ids=["float16", "bfloat16", "softmax", "autocast"],
)
def test_16_bit_types_take_the_fast_path_and_round(
    kind, dtype, arguments, tolerance, percent
):
    """Near what `hf` says, in numbers of the type; a text may differ where two tokens are near."""
    lm = wrapped(PrunedHFLM, tiny(dtype=dtype), prune_percent=percent, **arguments)
    got = kind.ask(lm)
    assert kind.record(lm)["requests"].keys() == {kind.fast}
    if kind is SCORED:
        values = [value for value, _ in got]
        expected = [value for value, _ in kind.ask(hf(lm.model, **arguments))]
        assert values == pytest.approx(expected, abs=tolerance)
        if not arguments:
            assert torch.tensor(values).to(dtype).tolist() == values


def test_nothing_asked_is_nothing_answered(kind):
    assert kind.ask(ours(tiny()), []) == []


@pytest.mark.smoke
def test_a_pruned_model_shares_and_refills(fast):
    lm = wrapped(PrunedHFLM, tiny(), prune_percent=40)
    assert_close(fast.ask(lm), fast.ask(hf(lm.model)))
    assert 0 < lm.token_counts.processed < lm.token_counts.prompt


# --- properties

TOKENS = st.integers(0, 3)
#: Contexts and continuations of four letters, some too long, and relatives of these.
DRAWN = st.tuples(
    st.lists(
        st.tuples(
            st.lists(TOKENS, min_size=1, max_size=30),
            st.lists(TOKENS, min_size=1, max_size=6),
        ),
        min_size=1,
        max_size=14,
    ),
    st.lists(
        st.tuples(
            st.integers(0, 13),
            st.integers(0, 4),
            st.lists(TOKENS, min_size=1, max_size=5),
        ),
        max_size=10,
    ),
)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def pair(request):
    model = VARIANTS[request.param].model()
    return hf(model), ours(model), VARIANTS[request.param].tolerance


@given(
    drawn=DRAWN,
    bounds=st.tuples(st.integers(1, 60), st.integers(1, 30), st.integers(1, 30)),
    block=st.integers(1, 20),
)
def test_any_requests_in_any_passes_are_scored_as_by_hf(pair, drawn, bounds, block):
    plain, shared, tolerance = pair
    pairs, relatives = drawn
    for index, cut, tail in relatives:
        context = pairs[index % len(pairs)][0]
        pairs = [*pairs, (context[: max(1, len(context) - cut)], tail)]
    asked = [(("", str(n)), *both) for n, both in enumerate(pairs)]
    tokens, *others = bounds
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_sharing, "_least_saving", lambda device: -9.0)
        patch.setattr(prefix_pass, "_BLOCK_QUERIES", block)
        budget = Budget(tokens, *(min(other, tokens) for other in others))
        patch.setattr(shared, "_budget", lambda _: budget)
        for lm in (plain, shared):
            patch.setattr(lm, "_max_length", 24)
        got = shared._loglikelihood_tokens(asked, disable_tqdm=True)
        expected = plain._loglikelihood_tokens(asked, disable_tqdm=True)
    assert_close(got, expected, tolerance)


@pytest.mark.slow
@given(
    drawn=st.lists(
        st.tuples(
            st.text("ab\n", min_size=1, max_size=MAX_LENGTH + 9),
            st.fixed_dictionaries(
                {
                    "until": st.lists(
                        st.text(
                            st.characters(max_codepoint=127), min_size=1, max_size=2
                        ),
                        max_size=3,
                    ),
                    "max_gen_toks": st.integers(1, 40),
                }
            ),
        ),
        min_size=1,
        max_size=9,
    ),
    slots=st.integers(1, 10),
    budget=st.integers(1, 200),
    most_in_mask=st.integers(1, 2000),
    groups=st.integers(1, 5),
    cost_of_order=st.sampled_from([0, 4]),
)
def test_any_requests_in_any_slots_are_answered_as_one_by_one(
    pair, drawn, slots, budget, most_in_mask, groups, cost_of_order
):
    plain, refilled, _ = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refilled, "_prefill_budget", lambda: budget)
        patch.setattr(slot_table, "_MOST_IN_MASK", most_in_mask)
        patch.setattr(slot_table, "_COST_OF_ORDER", cost_of_order)
        patch.setattr(slots_module, "_GROUPS", groups)
        patch.setattr(slots_module, "_WORTH_GROUPS", 0)
        patch.setattr(refilled, "slots", slots)
        got = GENERATED.ask(refilled, drawn)
    assert got == GENERATED.ask(plain, drawn)


# --- how much is computed


@pytest.mark.parametrize(
    ("fast", "asked", "processed", "logits"),
    [
        (
            SCORED,
            [("common text 1", " a"), ("common text 1", " b"), ("common text 2", " a")],
            # 12 common tokens; "1 " and "2 " after them. A text's last token is no input.
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
    lm = ours(tiny())
    rows = []
    lm.model.lm_head.register_forward_hook(
        lambda _, __, out: rows.append(out.shape[:-1].numel())
    )
    fast.ask(lm, asked)
    assert lm.token_counts.processed == processed
    assert lm.token_counts.prompt == sum(
        len("".join(part for part in each if isinstance(part, str))) for each in asked
    )
    assert sum(rows) == logits


def test_generated_tokens_are_counted_as_hf_generates_them():
    lm, plain = ours(tiny()), wrapped(HFLM, tiny(), batch_size=1)
    asked = [(letter * 7, {"max_gen_toks": 9}) for letter in "xyzvw"]
    counted, generate = [], plain._model_generate

    def counting(context, **kwargs):
        output = generate(context, **kwargs)
        counted.append(output.shape[1] - context.shape[1])
        return output

    plain._model_generate = counting
    assert GENERATED.ask(lm, asked) == GENERATED.ask(plain, asked)
    assert vars(lm.token_counts) == {
        "prompt": 35,
        "generated": sum(counted),
        "processed": 35 + sum(counted) - 5,
    }


def test_end_tokens_are_those_of_the_model_in_an_adapter():
    model = adapted(ADAPTERS["lora"])
    model.get_base_model().generation_config.eos_token_id = list(range(256))
    lm = ours(model)
    GENERATED.ask(lm)
    assert lm.token_counts.generated == len(PROMPTS)


def test_no_pass_exceeds_a_batch_of_one(monkeypatch):
    # The floor of a pass is for the speed of real models.
    monkeypatch.setattr(prefix_sharing, "_FEWEST_TOKENS", 1)
    lm = ours(tiny(), batch_size=1, max_length=256)
    sizes = []

    def watch(_module, _inputs, kwargs):
        cache = kwargs.get("past_key_values")
        sizes.append((kwargs["input_ids"].numel(), cache.length if cache else 0))

    lm.model.register_forward_pre_hook(watch, with_kwargs=True)
    asked = [
        (None, [*range(100), question, *range(20)], [answer] * 5)
        for question in range(12)
        for answer in range(3)
    ]
    lm._loglikelihood_tokens(asked, disable_tqdm=True)
    assert max(map(max, sizes)) <= 100 + 1 + 20 + 5 - 1
    # The preamble once, and each question with its answers once.
    assert sum(tokens for tokens, _ in sizes) < 100 + 12 * (21 + 3 * 4) * 1.5


#: Bytes of keys and values of a token in `tiny`: layers, heads, size, float64.
ROW = 2 * tiny_config().num_hidden_layers * tiny_config().num_key_value_heads * 8 * 8


@pytest.mark.parametrize(
    ("arguments", "small", "slots"),
    [
        # Small: as many as are usual, whatever the batch size below that.
        ({"batch_size": 1}, 2**31, 5),
        ({"batch_size": 6}, 2**31, 6),
        ({"batch_size": 50}, 2**31, len(PROMPTS)),
        # Room for three rows of 64 tokens, or for none.
        ({"batch_size": 1}, 3 * 65 * ROW, 3),
        ({"batch_size": 4}, 3 * 65 * ROW, 4),
        ({"batch_size": 1}, 0, 1),
        # What is asked for.
        ({"batch_size": 4, "slots": 1}, 2**31, 1),
        ({"batch_size": "auto", "slots": 6}, 0, 6),
    ],
)
def test_slots_depend_on_shapes_and_on_what_is_asked_for(
    arguments, small, slots, monkeypatch
):
    """Neither on the memory that is free nor on a clock: on every machine the same."""
    monkeypatch.setattr(slot_refilling.psutil, "virtual_memory", None)
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


def test_answers_reach_the_cache_as_they_come(fast):
    lm = ours(tiny())
    seen = []
    lm.cache_hook.add_partial = lambda *entry: seen.append(repr(entry))
    got = fast.ask(lm)
    assert sorted(seen) == sorted(
        repr((fast.request_type, asked, answer))
        for asked, answer in zip(fast.asked, got, strict=True)
    )


def test_the_progress_bar_counts_requests(fast, capsys):
    fast.ask(ours(tiny()), quiet=False)
    error = capsys.readouterr().err
    assert f"Running {fast.request_type} requests" in error
    assert f"{len(fast.asked)}/{len(fast.asked)}" in error


def test_two_models_in_two_threads(fast, monkeypatch):
    models = [tiny(attention="sdpa", hidden_size=size) for size in (32, 64)]
    lms = [ours(model) for model in models]
    expected = [fast.ask(hf(model)) for model in models]
    before = dict(ALL_ATTENTION_FUNCTIONS)
    meeting, seen = threading.Barrier(2), []

    def meet(*_):
        # The first passes of one run while those of the other do.
        seen.append(dict(ALL_ATTENTION_FUNCTIONS))
        if len(seen) <= 4:
            meeting.wait(60)

    for model in models:
        model.model.layers[1].register_forward_pre_hook(meet)
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(fast.ask, lms))
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
    assert all(functions == before for functions in seen)
