from __future__ import annotations

import logging

import pytest
import torch
from hypothesis import given, settings, strategies as st
from lm_eval.models.huggingface import HFLM
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.token_tree import Budget

from .checkpoints import byte_tokenizer, tiny_config, tiny_model


MAX_LENGTH = 24


def make(cls, model, **kwargs):
    return cls(
        pretrained=model, tokenizer=byte_tokenizer(), device="cpu", batch_size=3, **kwargs
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
    assert shared._can_share()
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
        st.lists(st.tuples(st.sampled_from(range(len(pairs))), st.integers(0, 4), st.lists(TOKENS, min_size=1, max_size=5)), max_size=10),
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


@pytest.fixture
def always_share(monkeypatch):
    monkeypatch.setattr("lm_eval_pruned.model_wrappers.prefix_sharing._LEAST_SAVING", -9.0)


@given(drawn=REQUESTS, tokens=st.integers(1, 60), row=st.integers(1, 30), scored=st.integers(1, 30))
def test_equal_to_the_plain_path(pair, drawn, tokens, row, scored):
    plain, shared, tolerance = pair
    requests = as_requests(drawn)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lm_eval_pruned.model_wrappers.prefix_sharing._LEAST_SAVING", -9.0)
        patch.setattr(shared, "_budget", lambda _: Budget(tokens, min(row, tokens), min(scored, tokens)))
        got = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [g for _, g in got] == [g for _, g in expected]
    assert [v for v, _ in got] == pytest.approx([v for v, _ in expected], abs=tolerance)
