from __future__ import annotations

import logging
import threading
from collections import deque
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from hypothesis import given, strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama4 import Llama4TextConfig

from lm_eval_pruned.model_wrappers.batching import (
    slot_refilling,
    slot_table,
    slots as slots_module,
)
from lm_eval_pruned.model_wrappers.batching.answer_paths import AnswerPaths
from lm_eval_pruned.model_wrappers.batching.slot_table import SlotJob, SlotTable
from lm_eval_pruned.model_wrappers.batching.slots import SlotCache
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers.checkpoints import TINY, byte_tokenizer, tiny_config, tiny_model
from tests.helpers.layouts import overrides
from tests.model_wrappers.batching.test_prefix_sharing_architectures import shrunk


MAX_LENGTH = 64


def make(cls, model, batch_size=3, **kwargs):
    kwargs = {"max_length": MAX_LENGTH, **kwargs}
    if cls is not HFLM and isinstance(batch_size, int):
        kwargs = {"slots": batch_size, **kwargs}
    return cls(
        pretrained=model,
        tokenizer=byte_tokenizer(),
        device="cpu",
        batch_size=batch_size,
        **kwargs,
    )


def tiny(attention="sdpa", dtype=torch.float64):
    config = tiny_config()
    config._attn_implementation = attention
    model = tiny_model(config).to(dtype)
    # End-of-text tokens come at random times: every eighth byte is one.
    model.generation_config.eos_token_id = [257, *range(0, 256, 8)]
    return model


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def pair(request):
    """HFLM, and HFLM with refilled slots, on one tiny float64 model."""
    model = tiny(request.param)
    plain = make(HFLM, model, batch_size=1)
    refilled = make(PrefixHFLM, model)
    return plain, refilled


def instances(pairs):
    return [
        Instance(request_type="generate_until", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]


def generate(lm, pairs):
    return lm.generate_until(instances(pairs), disable_tqdm=True)


def watch_passes(monkeypatch, look):
    """Call `look` with the rows of each pass before it runs."""
    run = slot_refilling.run_rows

    def watched(forward, cache, work):
        look(work)
        return run(forward, cache, work)

    monkeypatch.setattr(slot_refilling, "run_rows", watched)


LETTERS = "ab\n"
REQUESTS = st.lists(
    st.tuples(
        st.text(LETTERS, min_size=1, max_size=MAX_LENGTH + 9),
        st.fixed_dictionaries(
            {
                "until": st.lists(
                    st.text(st.characters(max_codepoint=127), min_size=1, max_size=2),
                    max_size=3,
                ),
                "max_gen_toks": st.integers(1, 40),
            }
        ),
    ),
    min_size=1,
    max_size=9,
)


@pytest.mark.slow
@given(
    drawn=REQUESTS,
    slots=st.integers(1, 10),
    budget=st.integers(1, 200),
    most_in_mask=st.integers(1, 2000),
    groups=st.integers(1, 5),
    cost_of_order=st.sampled_from([0, 4]),
)
def test_equal_to_one_by_one(
    pair, drawn, slots, budget, most_in_mask, groups, cost_of_order
):
    plain, refilled = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refilled, "_prefill_budget", lambda: budget)
        patch.setattr(slot_table, "_MOST_IN_MASK", most_in_mask)
        patch.setattr(slot_table, "_COST_OF_ORDER", cost_of_order)
        patch.setattr(slots_module, "_GROUPS", groups)
        patch.setattr(slots_module, "_WORTH_GROUPS", 0)
        refilled.slots = slots
        got = generate(refilled, drawn)
    assert got == generate(plain, drawn)
    assert not refilled._refilling.logged


PROMPTS = [
    "One example. And a question",
    "One example. Another question, a longer one",
    "x",
    "One example. And a question",
    "Something else",
    "One example. Yet another",
    "A long text " * 4,
]


#: Bytes of keys and values of a token in `tiny`: layers, heads, size, float64.
ROW = 2 * tiny_config().num_hidden_layers * tiny_config().num_key_value_heads * 8 * 8


def prompts(**settings):
    settings = {"until": ["\n"], "max_gen_toks": 12} | settings
    return [(prompt, dict(settings)) for prompt in PROMPTS]


@pytest.mark.parametrize("batch_size", [1, 2, 3, 20, "auto", "auto:3"])
def test_batch_sizes(pair, batch_size):
    plain, refilled = pair
    refilled = make(PrefixHFLM, refilled.model, batch_size)
    assert generate(refilled, prompts()) == generate(plain, prompts())


def test_no_more_rows_than_slots(pair, monkeypatch):
    _, refilled = pair
    rows = []
    watch_passes(monkeypatch, lambda work: rows.append(len(work)))
    refilled.slots = 2
    generate(refilled, prompts())
    assert max(rows) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "small", "slots"),
    [
        # Small: as many as are usual, whatever the batch size below that.
        ({"batch_size": 1}, 2**31, 5),
        ({"batch_size": 2}, 2**31, 5),
        ({"batch_size": 6}, 2**31, 6),
        ({"batch_size": 50}, 2**31, 7),
        # Room for three rows of 60 tokens, or for none.
        ({"batch_size": 1}, 3 * 61 * ROW, 3),
        ({"batch_size": 4}, 3 * 61 * ROW, 4),
        ({"batch_size": 1}, 0, 1),
        # What is asked for.
        ({"batch_size": 1, "slots": 2}, 2**31, 2),
        ({"batch_size": 4, "slots": 1}, 2**31, 1),
        ({"batch_size": "auto", "slots": 6}, 0, 6),
    ],
)
def test_slots_depend_on_shapes_and_on_what_is_asked_for(
    pair, arguments, small, slots, monkeypatch
):
    """Neither on the memory that is free nor on a clock: on every machine the same."""
    plain, refilled = pair
    monkeypatch.setattr(slot_refilling.psutil, "virtual_memory", None)
    monkeypatch.setattr(slot_refilling, "_USUAL_SLOTS", 5)
    monkeypatch.setattr(slot_refilling, "_SMALL", small)
    lm = make(PrefixHFLM, refilled.model, **{"slots": None, **arguments})
    assert generate(lm, prompts()) == generate(plain, prompts())
    assert path_of(lm).slots == slots


@pytest.mark.parametrize("slots", [0, -1, 1.5, "many", True])
def test_slots_are_a_count(pair, slots):
    with pytest.raises(ValueError, match=f"slots={slots!r} is not understood"):
        make(PrefixHFLM, pair[0].model, slots=slots)


def test_steps_are_as_few_as_the_slots_allow(pair, monkeypatch):
    _, refilled = pair
    model = refilled.model
    monkeypatch.setattr(model.generation_config, "eos_token_id", None)
    steps = []
    watch_passes(
        monkeypatch, lambda work: steps.append([len(tokens) for _, tokens, _ in work])
    )
    refilled.slots = 2
    lengths = [9, 3, 3, 3]
    generate(
        refilled,
        [
            (f"{i}" * 5, {"until": ["\0\0\0"], "max_gen_toks": n})
            for i, n in enumerate(lengths)
        ],
    )
    decoding = [step for step in steps if max(step) == 1]
    # The first token of an answer comes with its prompt.
    assert sum(map(sum, decoding)) == sum(lengths) - len(lengths)
    assert len(decoding) == 8


@pytest.mark.smoke
def test_a_common_beginning_is_computed_once():
    lm = make(PrunedHFLM, tiny(), prune_percent=40, max_length=512)
    stem = "The same examples in front of each question. " * 4
    pairs = [(stem + end, {"max_gen_toks": 1}) for end in ("one", "two", "three")]
    lm.generate_until(instances(pairs), disable_tqdm=True)
    assert lm.token_counts.prompt == 3 * len(stem) + 11
    # "three" comes first, "one" takes its place, and "two" has only the stem to copy.
    assert lm.token_counts.processed == len(stem) + 5 + 3 + 3
    assert lm.token_counts.generated == 3


def test_tokens_are_counted():
    lm = make(PrunedHFLM, tiny(), prune_percent=40)
    shortened = make(HFLM, lm.model, 1)
    pairs = [(letter * 7, {"max_gen_toks": 9}) for letter in "xyzvw"]
    counted = 0
    generate_tokens = shortened._model_generate

    def counting(context, **kwargs):
        nonlocal counted
        output = generate_tokens(context, **kwargs)
        counted += output.shape[1] - context.shape[1]
        return output

    shortened._model_generate = counting
    assert generate(lm, pairs) == generate(shortened, pairs)
    assert lm.token_counts.generated == counted
    assert lm.token_counts.prompt == 35
    assert lm.token_counts.processed == 35 + counted - 5


def test_results_reach_the_cache_as_they_come(pair):
    _, refilled = pair
    seen = {}

    class Hook:
        def add_partial(self, kind, request, answer):
            seen[kind, request[0], str(request[1])] = answer

    hook, refilled.cache_hook = refilled.cache_hook, Hook()
    try:
        got = generate(refilled, prompts())
    finally:
        refilled.cache_hook = hook
    assert seen == {
        ("generate_until", prompt, str(settings)): answer
        for (prompt, settings), answer in zip(prompts(), got, strict=True)
    }


def test_requests_are_left_as_they_are(pair):
    pairs = prompts()
    generate(pair[1], pairs)
    assert pairs == prompts()


@pytest.mark.slow
@pytest.mark.parametrize("think_end", ["b", 98])
def test_thinking_is_cut_off(pair, think_end):
    plain, refilled = (
        make(cls, pair[0].model, 1, think_end_token=think_end)
        for cls in (HFLM, PrefixHFLM)
    )
    pairs = prompts(max_gen_toks=40, until=[])
    assert generate(refilled, pairs) == generate(plain, pairs)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"do_sample": True, "temperature": 0.7}, "do_sample"),
        ({"temperature": 0.7}, "do_sample"),
        ({"num_beams": 2}, "num_beams=2"),
        ({"repetition_penalty": 1.3}, "repetition_penalty=1.3"),
        ({"no_repeat_ngram_size": 2}, "no_repeat_ngram_size=2"),
        ({"suppress_tokens": [65]}, "suppress_tokens"),
        ({"min_new_tokens": 2}, "min_new_tokens=2"),
        ({"max_length": 80}, "max_length"),
        ({"logits_processor": []}, "logits_processor"),
    ],
)
def test_more_than_greedy_takes_the_plain_path(pair, settings, reason, caplog):
    plain, refilled = pair
    # One by one: in float64, eager attention makes NaN of the padding in a batch.
    refilled = make(PrefixHFLM, plain.model, 1)
    pairs = [*prompts(**settings)[:3], *prompts()[3:]]
    torch.manual_seed(0)
    expected = generate(plain, pairs)
    torch.manual_seed(0)
    with caplog.at_level(logging.WARNING, "lm_eval.models.slot_refilling"):
        got = generate(refilled, pairs)
    assert got == expected
    lines = [r.message for r in caplog.records if "Slots are not" in r.message]
    assert len(lines) == 1
    assert reason in lines[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    "settings",
    [
        {"num_beams": 1},
        {"repetition_penalty": 1.0},
        {"temperature": 0.0},
        {"do_sample": False, "top_p": 0.9},
    ],
)
def test_neutral_settings_do_not(pair, settings):
    plain, refilled = pair
    assert generate(refilled, prompts(**settings)) == generate(plain, prompts())
    assert not refilled._refilling.logged


def test_the_models_own_settings_count(pair, monkeypatch):
    plain = make(HFLM, pair[0].model)
    monkeypatch.setattr(plain.model.generation_config, "repetition_penalty", 1.4)
    refilled = make(PrefixHFLM, plain.model)
    assert generate(refilled, prompts()) == generate(plain, prompts())
    assert refilled._refilling.logged == ["repetition_penalty=1.4 is asked for"]


def test_more_tokens_than_the_model_takes_is_hfs_error(pair):
    plain, refilled = pair
    for lm in (plain, make(PrefixHFLM, refilled.model)):
        with pytest.raises(AssertionError, match="must be less than"):
            generate(lm, prompts(max_gen_toks=MAX_LENGTH))


@pytest.mark.slow
def test_an_encoder_decoder_takes_the_plain_path():
    model = tiny_model(tiny_config("t5", **overrides("t5", 64)))
    plain, refilled = (
        make(cls, model, 2, backend="seq2seq") for cls in (HFLM, PrefixHFLM)
    )
    assert generate(refilled, prompts()) == generate(plain, prompts())
    assert refilled._refilling.logged == ["the model is an encoder-decoder"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "more", "refills"),
    [
        ("qwen2", {"use_sliding_window": False}, True),
        ("gemma2", {"sliding_window": 128}, True),
        ("gemma2", {"sliding_window": 16}, False),
        ("mistral", {"sliding_window": 16}, False),
        ("gpt2", {}, True),
        ("gpt_neox", {}, True),
        ("phi", {}, True),
        ("olmo2", {}, True),
        ("qwen3", {"use_sliding_window": False}, True),
        ("bloom", {}, False),
        ("mamba", {}, False),
    ],
)
def test_architectures(model_type, more, refills):
    config = shrunk(model_type, **more)
    # Gemma 2 has a soft cap on its attention, which sdpa does not know.
    without_sdpa = ("bloom", "gemma2", "mamba")
    config._attn_implementation = "eager" if model_type in without_sdpa else "sdpa"
    model = tiny_model(config)
    plain = make(HFLM, model, 1)
    refilled = make(PrefixHFLM, model, 3)
    pairs = prompts(until=[])
    assert generate(refilled, pairs) == generate(plain, pairs)
    assert bool(refilled._refilling.logged) is not refills


@pytest.mark.slow
@pytest.mark.parametrize("failing", [1, 2, 3, 4])
def test_no_request_is_lost_where_a_copy_runs_out_of_memory(pair, monkeypatch, failing):
    """Prompts that begin alike are copied; so are answers that move up as others end."""
    plain, _ = pair
    refilled = make(PrefixHFLM, plain.model, 4)
    copy = SlotCache.copy
    copies = 0

    def short_of_memory(*arguments):
        nonlocal copies
        copies += 1
        if copies == failing:
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB.")
        copy(*arguments)

    monkeypatch.setattr(SlotCache, "copy", short_of_memory)
    stem = "The same examples in front of each question. "
    pairs = [(stem + c, {"max_gen_toks": n}) for n, c in enumerate("abcdefg", 1)]
    assert generate(refilled, pairs) == generate(plain, pairs)
    assert copies > failing
    assert path_of(refilled).requests == {"slots": len(pairs)}


def test_attention_reads_each_group_to_its_end(pair, monkeypatch):
    plain, refilled = pair
    if refilled.config._attn_implementation != "sdpa":
        pytest.skip("only sdpa attention is grouped")
    monkeypatch.setattr(slots_module, "_GROUPS", 2)
    monkeypatch.setattr(plain.model.generation_config, "eos_token_id", None)
    groups = []
    grouped = slots_module.groups_of

    def watched(lengths):
        groups.append([(r.stop - r.start, width) for r, width in grouped(lengths)])
        return grouped(lengths)

    monkeypatch.setattr(slots_module, "groups_of", watched)
    refilled.slots = 4
    pairs = [
        (c * n, {"max_gen_toks": 2})
        for c, n in zip("abcd", (30, 20, 9, 5), strict=True)
    ]
    assert generate(refilled, pairs) == generate(plain, pairs)
    assert groups[-1] == [(2, 31), (2, 10)]


def test_two_models_in_two_threads(monkeypatch):
    before = dict(ALL_ATTENTION_FUNCTIONS)
    local = dict(ALL_ATTENTION_FUNCTIONS._local_mapping)
    models = [make(PrefixHFLM, tiny_model(tiny_config(), seed)) for seed in (0, 1)]
    expected = [generate(make(HFLM, lm.model, 1), prompts()) for lm in models]
    meeting = threading.Barrier(2)
    seen = []

    def meet(work):
        # The first passes of one run while those of the other do.
        seen.append(dict(ALL_ATTENTION_FUNCTIONS))
        if len(seen) <= 8:
            meeting.wait(60)

    watch_passes(monkeypatch, meet)
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(lambda lm: generate(lm, prompts()), models))
    assert got == expected
    assert all(functions == before for functions in seen)
    assert dict(ALL_ATTENTION_FUNCTIONS) == before
    assert ALL_ATTENTION_FUNCTIONS._local_mapping == local


ADAPTERS = {
    "lora": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "v_proj", "down_proj"], init_lora_weights=False
    ),
    "dora": lambda: peft.LoraConfig(
        r=4,
        target_modules=["k_proj", "up_proj"],
        init_lora_weights=False,
        use_dora=True,
    ),
    "ia3": lambda: peft.IA3Config(
        target_modules=["k_proj", "v_proj", "down_proj"],
        feedforward_modules=["down_proj"],
        init_ia3_weights=False,
    ),
}


def with_adapter(config):
    torch.manual_seed(0)
    return peft.get_peft_model(tiny(dtype=torch.float32), config).double().eval()


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_adapters_refill(adapter):
    model = with_adapter(ADAPTERS[adapter]())
    with model.disable_adapter():
        without = generate(make(HFLM, model, 1), prompts(until=[]))
    lm = make(PrefixHFLM, model)
    got = generate(lm, prompts(until=[]))
    assert got == generate(make(HFLM, model, 1), prompts(until=[]))
    assert got != without
    assert path_of(lm).requests == {"slots": len(PROMPTS)}


def test_an_adapter_with_virtual_tokens_does_not():
    model = with_adapter(
        peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    )
    lm = make(PrefixHFLM, model)
    assert not any(isinstance(job, SlotJob) for job in lm._jobs(instances(prompts())))
    assert "(PROMPT_TUNING) may look at the whole row" in lm._refilling.logged[0]


def test_end_tokens_are_those_of_the_model_in_an_adapter():
    model = with_adapter(ADAPTERS["lora"]())
    model.get_base_model().generation_config.eos_token_id = list(range(256))
    lm = make(PrefixHFLM, model)
    generate(lm, prompts(until=[]))
    assert lm.token_counts.generated == len(PROMPTS)


@pytest.mark.slow
def test_attention_whose_temperature_follows_the_cache_is_left_alone():
    """Llama 4 takes a token's place in the cache for its position."""
    config = Llama4TextConfig(
        **{**TINY, "num_hidden_layers": 4},
        intermediate_size_mlp=48,
        num_local_experts=2,
        floor_scale=50,
        attn_scale=5.0,
    )
    config._attn_implementation = "sdpa"
    model = tiny_model(config)
    # One by one: padding in front counts, too.
    plain, lm = make(HFLM, model, 1), make(PrefixHFLM, model, 1)
    pairs = prompts(until=[], max_gen_toks=8)
    expected = generate(plain, pairs)
    assert generate(lm, pairs) == expected
    taken = path_of(lm)
    assert taken.requests == {"slots": 2, "plain": 5}
    assert "attention is plain" in next(iter(taken.by_reason))


def path_of(lm):
    return lm.answer_paths.of("generate_until")


def test_what_answered_is_recorded():
    lm = make(PrefixHFLM, tiny(), 2)
    generate(lm, prompts()[:3])
    info = lm.get_model_info()["answer_paths"]["generate_until"]
    assert info == {
        "requests": {"slots": 3},
        "tokens_computed": {"slots": lm.token_counts.processed},
        "reasons": [],
        "slots": 2,
    }
    # Whoever reads the record ends an evaluation.
    generate(lm, prompts(do_sample=True, temperature=1.0)[:2])
    info = lm.get_model_info()["answer_paths"]["generate_until"]
    assert info["requests"] == {"plain": 2}
    # Nobody counts what HFLM computes here.
    assert info["tokens_computed"]["plain"] is None
    assert info["reasons"] == ["do_sample is asked for"]


@pytest.mark.slow
def test_each_request_has_its_own_reason():
    lm = make(PrefixHFLM, tiny(), 2)
    sampled = prompts(do_sample=True, temperature=1.0)
    generate(lm, [*sampled[:2], *prompts()[2:4], *prompts(num_beams=2)[:1]])
    assert path_of(lm).by_reason == {
        "do_sample is asked for": 2,
        "num_beams=2 is asked for": 1,
    }
    # What was logged in an earlier evaluation is no reason in the next.
    lm.answer_paths = AnswerPaths()
    generate(lm, prompts(num_beams=2)[:3])
    assert path_of(lm).by_reason == {"num_beams=2 is asked for": 3}


def test_the_plain_path_is_recorded_with_the_tokens_that_are_counted():
    lm = make(PrunedHFLM, tiny(), 2, prune_percent=40, slot_refilling=False)
    generate(lm, prompts()[:2])
    path = path_of(lm)
    assert path.requests == {"plain": 2}
    assert list(path.by_reason) == ["slot_refilling=false"]
    assert path.slots is None
    assert path.tokens_computed == {"plain": lm.token_counts.processed or None}


def test_no_requests(pair):
    assert generate(pair[1], []) == []


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 2), min_size=1, max_size=9), st.integers(1, 6)
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_slots_hold_what_they_should(drawn, slots, budget):
    # This test plays the model: a slot's keys are the tokens written to it.
    jobs = [
        SlotJob(i, list(prompt), most, [], 0) for i, (prompt, most) in enumerate(drawn)
    ]
    waiting, done = deque(jobs), []
    table = SlotTable(slots, 20)
    held = [[] for _ in range(slots)]

    def copy(source, target, length):
        held[target] = held[source][:length]

    def permute(order, length):
        assert max(len(tokens) for tokens in held) >= length - 1
        held[: len(order)] = [held[slot][:length] for slot in order]

    table.cache.copy, table.cache.permute = copy, permute
    table.cache.on_cpu = True
    while waiting or table.jobs:
        group = table.admit(waiting, budget)
        if not group:
            group = table.step()
            assert [slot for slot, _, _ in group] == list(range(len(table.jobs)))
        for slot, job, start in group:
            assert held[slot][:start] == job.tokens[:start]
            assert start < len(job.tokens)
            held[slot] = list(job.tokens)
            job.tokens.append(7)
            if len(job.generated) == job.most:
                del table.jobs[slot]
                done.append(job)
    assert sorted(job.index for job in done) == list(range(len(jobs)))
    assert all(len(job.generated) == job.most for job in done)


@pytest.mark.parametrize(
    ("shared", "most_in_mask", "start"),
    [(2, 2**26, 0), (8, 2**26, 8), (40, 2**26, 40), (40, 24 * 64 - 1, 0)],
)
def test_a_few_shared_tokens_are_not_worth_a_mask_and_nothing_a_huge_one(
    shared, most_in_mask, start, monkeypatch
):
    monkeypatch.setattr(slot_table, "_MOST_IN_MASK", most_in_mask)
    first = list(range(64))
    second = first[:shared] + list(range(100, 164 - shared))
    jobs = [SlotJob(n, tokens, 1, [], 0) for n, tokens in enumerate((first, second))]
    table = SlotTable(2, 65)
    copied = []
    table.cache.copy = lambda *copy: copied.append(copy)
    assert [row[2] for row in table.admit(deque(jobs[:1]), 64)] == [0]
    assert [row[2] for row in table.admit(deque(jobs[1:]), 64)] == [start]
    assert copied == ([(0, 1, start)] if start else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_slots_begin_as_zeros(dtype):
    cache = SlotCache(3, 64)
    cache.row_slots, cache.row_places = torch.tensor([[0]]), torch.arange(5)[None]
    states = torch.ones(1, 2, 5, 8, dtype=dtype)
    cache.update(states, states, 0)
    keys = cache.layers[0].keys
    assert (keys.dtype, keys.shape) == (dtype, (3, 2, 64, 8))
    assert keys.sum() == states.numel()
    assert keys[0, :, :5].eq(1).all()
