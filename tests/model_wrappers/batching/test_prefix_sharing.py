from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, strategies as st
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from lm_eval_pruned.model_wrappers.batching import prefix_pass, prefix_sharing
from lm_eval_pruned.model_wrappers.batching.token_tree import Budget
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.model_wrappers.pruned_hf import PrunedHFLM
from tests.helpers.checkpoints import byte_tokenizer, tiny_config, tiny_model


MAX_LENGTH = 24


def make(cls, model, **kwargs):
    return cls(
        pretrained=model,
        tokenizer=byte_tokenizer(),
        device="cpu",
        batch_size=3,
        **kwargs,
    )


def tiny(attention="sdpa", dtype=torch.float64, model_type="llama", **overrides):
    config = tiny_config(model_type, **overrides)
    config._attn_implementation = attention
    return tiny_model(config).to(dtype)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def pair(request):
    """HFLM and PrefixHFLM on one tiny float64 model."""
    model = tiny(request.param)
    # HFLM's cache of logits answers wrongly where two requests split one text differently
    # (see test_a_text_split_in_two_ways).
    plain = make(HFLM, model, max_length=MAX_LENGTH, logits_cache=False)
    shared = make(PrefixHFLM, model, max_length=MAX_LENGTH)
    assert shared._can_take(shared._sharing)
    # In float64 the models' own code still takes eager attention's softmax in float32.
    tolerance = {"sdpa": 1e-9, "eager": 2e-5}[request.param]
    return plain, shared, tolerance


TOKENS = st.integers(0, 3)
#: Requests that share a lot: contexts and continuations from three letters, some too long.
REQUESTS = st.lists(
    st.tuples(
        st.lists(TOKENS, min_size=1, max_size=MAX_LENGTH + 6),
        st.lists(TOKENS, min_size=1, max_size=6),
    ),
    min_size=1,
    max_size=14,
).flatmap(
    lambda pairs: st.tuples(
        st.just(pairs),
        st.lists(
            st.tuples(
                st.sampled_from(range(len(pairs))),
                st.integers(0, 4),
                st.lists(TOKENS, min_size=1, max_size=5),
            ),
            max_size=10,
        ),
    )
)


def as_requests(drawn):
    pairs, relatives = drawn
    requests = [(("c", str(i)), list(c), list(t)) for i, (c, t) in enumerate(pairs)]
    for i, (index, cut, tail) in enumerate(relatives):
        context = pairs[index][0]
        context = context[: max(1, len(context) - cut)]
        requests.append((("r", str(i)), list(context), tail))
    return requests


@given(
    drawn=REQUESTS,
    tokens=st.integers(1, 60),
    row=st.integers(1, 30),
    scored=st.integers(1, 30),
    block=st.integers(1, 20),
)
def test_equal_to_the_plain_path(pair, drawn, tokens, row, scored, block):
    plain, shared, tolerance = pair
    requests = as_requests(drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_sharing, "_least_saving", lambda device: -9.0)
        patch.setattr(prefix_pass, "_BLOCK_QUERIES", block)
        patch.setattr(
            shared,
            "_budget",
            lambda _: Budget(tokens, min(row, tokens), min(scored, tokens)),
        )
        got = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [g for _, g in got] == [g for _, g in expected]
    assert [v for v, _ in got] == pytest.approx([v for v, _ in expected], abs=tolerance)


def instances(pairs):
    return [
        Instance(request_type="loglikelihood", doc={}, arguments=pair, idx=i)
        for i, pair in enumerate(pairs)
    ]


@pytest.mark.slow
@given(
    texts=st.lists(
        st.tuples(
            # The harness moves spaces at the end to the continuation.
            st.text("ab ", max_size=MAX_LENGTH + 6).map(str.rstrip),
            st.text("ab", min_size=1, max_size=MAX_LENGTH - 1),
        ),
        min_size=1,
        max_size=8,
    ),
    batch_size=st.sampled_from([1, 3, "auto"]),
)
def test_texts_are_scored_as_by_hf(pair, texts, batch_size):
    """Empty contexts, texts around the longest length, batches of one."""
    plain, shared, tolerance = pair
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_sharing, "_least_saving", lambda device: -9.0)
        patch.setattr(prefix_sharing, "_FEWEST_TOKENS", 1)
        patch.setattr(shared, "batch_size_per_gpu", batch_size)
        got = shared.loglikelihood(instances(texts), disable_tqdm=True)
    expected = plain.loglikelihood(instances(texts), disable_tqdm=True)
    close(got, expected, tolerance)


QUESTIONS = [
    (f"{stem} Q: {q} A:", f" {a}")
    for stem in ("Some examples.",)
    for q in ("one", "two", "three")
    for a in ("yes", "no", "maybe so")
]


@pytest.fixture(scope="module")
def models():
    model = tiny()
    return make(HFLM, model), make(PrefixHFLM, model)


def close(got, expected, tolerance=1e-9):
    assert [g for _, g in got] == [g for _, g in expected]
    assert [v for v, _ in got] == pytest.approx([v for v, _ in expected], abs=tolerance)


@pytest.mark.parametrize(
    "pairs",
    [
        pytest.param(QUESTIONS, id="choices"),
        pytest.param(QUESTIONS * 2 + QUESTIONS[:3], id="duplicates"),
        pytest.param([("", t) for _, t in QUESTIONS] + QUESTIONS, id="empty contexts"),
        pytest.param([("", "<bos>a"), ("", "ab"), ("", "abc")], id="prefix token"),
        pytest.param([(c, t) for c, _ in QUESTIONS for t in "abc"], id="one token"),
        pytest.param([("x", "y")], id="single"),
        pytest.param([(c * 30, t) for c, t in QUESTIONS], id="truncated"),
        pytest.param([], id="none"),
    ],
)
def test_loglikelihood(models, pairs):
    plain, shared = models
    close(
        shared.loglikelihood(instances(pairs), disable_tqdm=True),
        plain.loglikelihood(instances(pairs), disable_tqdm=True),
    )


def test_loglikelihood_rolling(models):
    plain, shared = models
    texts = [
        ("some text" * 3,),
        ("some text that is longer than a window" * 20,),
        ("s",),
    ]
    expected = plain.loglikelihood_rolling(instances(texts), disable_tqdm=True)
    got = shared.loglikelihood_rolling(instances(texts), disable_tqdm=True)
    assert got == pytest.approx(expected, abs=1e-9)


def test_one_text_split_in_two_ways(models):
    # HFLM's cache of logits takes the first logits of the group for the shorter
    # continuation, not the last; without the cache it is right.
    _, shared = models
    plain = make(HFLM, shared.model, logits_cache=False)
    requests = [(None, [1, 2, 3], [4, 5, 6]), (None, [1, 2, 3, 4, 5], [6])]
    close(
        shared._loglikelihood_tokens(requests, disable_tqdm=True),
        plain._loglikelihood_tokens(requests, disable_tqdm=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("softmax_dtype", [None, "float32"])
def test_low_precision(dtype, softmax_dtype):
    model = tiny(dtype=dtype)
    arguments = {"softmax_dtype": softmax_dtype}
    expected = make(HFLM, model, **arguments).loglikelihood(
        instances(QUESTIONS), disable_tqdm=True
    )
    shared = make(PrefixHFLM, model, **arguments)
    got = shared.loglikelihood(instances(QUESTIONS), disable_tqdm=True)
    assert shared.prefix_sharing
    tolerance = {torch.float32: 1e-4, torch.float16: 0.2, torch.bfloat16: 1.5}[dtype]
    assert [v for v, _ in got] == pytest.approx([v for v, _ in expected], abs=tolerance)
    if softmax_dtype is None:
        assert all(torch.tensor(v).to(dtype).item() == v for v, _ in got)


def test_each_node_is_computed_once_and_logits_where_they_are_scored(models):
    _, shared = models
    pairs = [
        ("common context 1", " a"),
        ("common context 1", " b"),
        ("common context 2", " a"),
    ]
    rows, tokens = [], []
    model = shared.model
    hooks = [
        model.lm_head.register_forward_hook(
            lambda m, i, out: rows.append(out[0].shape[:-1])
        ),
        model.model.embed_tokens.register_forward_pre_hook(
            lambda m, i: tokens.append(i[0].numel())
        ),
    ]
    processed = shared.token_counts.processed
    try:
        shared.loglikelihood(instances(pairs), disable_tqdm=True)
    finally:
        for hook in hooks:
            hook.remove()
    # 15 common tokens; '1 ' and '2 ' after them. A text's last token is no input.
    assert shared.token_counts.processed - processed == 15 + 2 + 2 == sum(tokens)
    assert sum(r.numel() for r in rows) == 4


@pytest.mark.parametrize(
    "request_", [(None, [], [1, 2]), (None, [1], []), (None, [1], [2] * 513)]
)
def test_what_hf_refuses_is_refused(models, request_):
    for lm in models:
        with pytest.raises(AssertionError):
            lm._loglikelihood_tokens([request_, (None, [1, 2], [3])], disable_tqdm=True)


def test_results_reach_the_cache_as_they_come(models):
    _, shared = models
    seen = {}

    class Hook:
        def add_partial(self, kind, request, answer):
            seen[kind, request] = answer

    hook, shared.cache_hook = shared.cache_hook, Hook()
    try:
        got = shared.loglikelihood(instances(QUESTIONS), disable_tqdm=True)
    finally:
        shared.cache_hook = hook
    assert seen == {
        ("loglikelihood", pair): answer
        for pair, answer in zip(QUESTIONS, got, strict=True)
    }


def test_out_of_memory_backs_off(models, monkeypatch, caplog):
    plain, _ = models
    shared = make(PrefixHFLM, plain.model)
    assert shared._can_take(shared._sharing)
    run_pack = prefix_sharing.run_pack

    def short_of_memory(forward, work, pack, cache, dtype):
        if pack.stop - pack.start > 20:
            # Half of the pass has been through.
            cache.begin_pass(None)
            raise RuntimeError("CUDA out of memory. Tried to allocate 1 PiB.")
        run_pack(forward, work, pack, cache, dtype)

    monkeypatch.setattr(prefix_sharing, "run_pack", short_of_memory)
    with caplog.at_level(logging.WARNING, "lm_eval.models.prefix_sharing"):
        got = shared.loglikelihood(instances(QUESTIONS), disable_tqdm=True)
    close(got, plain.loglikelihood(instances(QUESTIONS), disable_tqdm=True))
    assert "at most 32 tokens" in caplog.text
    # Learnt for the next call.
    assert shared._budget([(None, [1] * 500, [1])]).tokens <= 32


def test_another_error_is_not_taken_for_lack_of_memory(models, monkeypatch):
    shared = make(PrefixHFLM, models[0].model)
    assert shared._can_take(shared._sharing)

    def broken(*_):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(prefix_sharing, "run_pack", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        shared.loglikelihood(instances(QUESTIONS), disable_tqdm=True)


def test_a_pass_holds_no_more_than_a_batch_of_hf(models, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    shared = make(PrefixHFLM, models[0].model)
    requests = [(None, [1] * 300, [1])]
    assert shared._budget(requests).tokens == 900
    shared.batch_size_per_gpu = 1
    assert shared._budget(requests).tokens == 512
    shared.batch_size_per_gpu = "auto"
    assert shared._budget(requests).tokens == 2048


def no_packs(*_):
    raise AssertionError("a request was packed")


def test_prefix_sharing_false_is_the_plain_path(models, monkeypatch):
    plain, _ = models
    shared = make(PrefixHFLM, plain.model, prefix_sharing=False)
    monkeypatch.setattr(prefix_sharing, "run_pack", no_packs)
    close(
        shared.loglikelihood(instances(QUESTIONS), disable_tqdm=True),
        plain.loglikelihood(instances(QUESTIONS), disable_tqdm=True),
        tolerance=0,
    )


def test_nothing_to_share_is_the_plain_path(models, monkeypatch):
    shared = make(PrefixHFLM, models[0].model)
    assert shared._can_take(shared._sharing)
    monkeypatch.setattr(prefix_sharing, "run_pack", no_packs)
    shared.loglikelihood_rolling(instances([("some text " * 20,)]), disable_tqdm=True)


def test_prefix_sharing_is_a_switch(models):
    with pytest.raises(ValueError, match="prefix_sharing='sometimes'"):
        make(PrefixHFLM, models[0].model, prefix_sharing="sometimes")


@pytest.mark.smoke
def test_pruned_hf_shares_prefixes():
    model = tiny()
    shared = make(PrunedHFLM, model, prune_percent=40)
    assert shared._can_take(shared._sharing)
    plain = make(HFLM, shared.model)
    close(
        shared.loglikelihood(instances(QUESTIONS), disable_tqdm=True),
        plain.loglikelihood(instances(QUESTIONS), disable_tqdm=True),
    )
    asked = sum(len(context) + len(answer) - 1 for context, answer in QUESTIONS)
    assert 0 < shared.token_counts.processed < asked / 2
    assert not make(PrunedHFLM, tiny(), ratio=1.5, prefix_sharing=False).prefix_sharing
