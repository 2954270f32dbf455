"""``hf-prefix`` answers what ``hf`` answers; tiny random models, nothing is downloaded."""

from __future__ import annotations

import logging
import random

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from lm_eval.models import hf_prefix
from lm_eval.models.hf_prefix import PrefixHFLM
from lm_eval.models.huggingface import HFLM
from lm_eval.models.utils_prefix_tree import Budget, build_tree, next_pack


MAX_LENGTH = 24
VOCABULARY = 32
EOS = "<eos>"
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}


def llama(**config):
    return LlamaForCausalLM(LlamaConfig(**SIZES, num_key_value_heads=2, **config))


def mistral(**config):
    return MistralForCausalLM(MistralConfig(**SIZES, num_key_value_heads=2, **config))


def neox(**config):
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SIZES, **config))


def gpt2(**config):
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=32,
            n_layer=2,
            n_head=4,
            initializer_range=0.3,
            **config,
        )
    )


def make(cls, model, **kwargs):
    words = {f"w{i}": i for i in range(VOCABULARY - 1)} | {EOS: VOCABULARY - 1}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=EOS)),
        eos_token=EOS,
        pad_token=EOS,
    )
    kwargs = {"batch_size": 3, "max_length": MAX_LENGTH, **kwargs}
    return cls(pretrained=model, tokenizer=tokenizer, device="cpu", **kwargs)


def both(model, **kwargs):
    model = model.double().eval()
    # Two requests may split one text differently, which the cache of logits gets wrong.
    kwargs["logits_cache"] = False
    return make(HFLM, model, **kwargs), make(PrefixHFLM, model, **kwargs)


def draw_requests(seed: int, count: int = 40):
    """Requests that share a lot, from three letters; some are too long, some repeat."""
    rng = random.Random(seed)

    def letters(low, high):
        return [rng.randrange(3) for _ in range(rng.randint(low, high))]

    requests = []
    for number in range(count):
        if requests and rng.random() < 0.7:
            context = rng.choice(requests)[1]
            context = context[: rng.randint(1, len(context))] + letters(0, 4)
        else:
            context = letters(1, MAX_LENGTH + 4)
        requests.append((("c", str(number)), context, letters(1, 6)))
    return requests


def check(plain, shared, requests, tolerance=1e-9):
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    got = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert [value for value, _ in got] == pytest.approx(
        [value for value, _ in expected], abs=tolerance
    )


@pytest.fixture(autouse=True)
def always_worth_it(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(hf_prefix, "_least_saving", lambda device: -9.0)
    monkeypatch.setattr(hf_prefix, "_WORTH_CHECKING", 0)


@pytest.mark.parametrize("model", [llama, mistral, neox, gpt2])
@pytest.mark.parametrize("seed", range(3))
def test_answers_are_those_of_hf(model, seed):
    plain, shared = both(model())
    check(plain, shared, draw_requests(seed))
    assert shared.prefix_sharing


@pytest.mark.parametrize("tokens", [1, 2, 7, 60])
def test_answers_do_not_depend_on_how_passes_are_cut(tokens, monkeypatch):
    plain, shared = both(llama())
    budget = Budget(tokens, min(5, tokens), min(9, tokens))
    monkeypatch.setattr(shared, "_budget", lambda _: budget)
    check(plain, shared, draw_requests(tokens))


def test_eager_attention():
    model = llama()
    model.set_attn_implementation("eager")
    # Its code takes the softmax in float32.
    check(*both(model), draw_requests(0), tolerance=1e-4)


def test_less_is_computed(caplog):
    caplog.set_level(logging.INFO, logger="lm_eval.models.hf_prefix")
    shared = make(PrefixHFLM, llama())
    context = list(range(15))
    shared._loglikelihood_tokens(
        [(("c", str(t)), context, [t, t + 1]) for t in range(10)], disable_tqdm=True
    )
    assert (
        "10 requests share their prefixes: 25 tokens are computed instead of 160"
        in (caplog.text)
    )


def test_requests_that_have_nothing_in_common_are_left_to_hf(caplog, monkeypatch):
    monkeypatch.setattr(hf_prefix, "_least_saving", lambda device: 0.05)
    caplog.set_level(logging.INFO, logger="lm_eval.models.hf_prefix")
    plain, shared = both(llama())
    check(plain, shared, [(("c", str(t)), [t, t + 1], [t + 2]) for t in range(8)])
    assert "computed whole: requests have too little in common" in caplog.text


def test_a_window_is_respected():
    """Requests longer than the window take the path of `HFLM`."""
    plain, shared = both(mistral(sliding_window=20))
    check(plain, shared, draw_requests(4))
    assert shared.prefix_sharing


@pytest.mark.parametrize("name", ["rope_parameters", "rope_scaling"])
def test_positions_that_depend_on_the_length_are_left_to_hf(name):
    """They are ``rope_scaling`` in transformers 4 and ``rope_parameters`` in transformers 5."""
    config = LlamaConfig(**SIZES)
    scaling = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    for old in ("rope_parameters", "rope_scaling"):
        if hasattr(config, old):
            setattr(config, old, None)
    config.max_position_embeddings = 16
    setattr(config, name, scaling)
    assert hf_prefix.sequence_limit(config) == 16


def test_a_model_that_does_not_allow_it_says_so_once(caplog):
    shared = make(PrefixHFLM, llama())
    shared.model.config._attn_implementation = "flash_attention_2"
    with caplog.at_level(logging.WARNING, logger="lm_eval.models.hf_prefix"):
        for _ in range(2):
            assert not shared._may_share()
    assert caplog.text.count("takes no mask of its own") == 1


def test_running_out_of_memory_makes_passes_smaller(monkeypatch):
    plain, shared = both(llama())
    run_pack = shared._run_pack

    def run(forward, work, pack, cache):
        if sum(map(len, pack.rows)) > 20:
            raise RuntimeError("CUDA out of memory.")
        run_pack(forward, work, pack, cache)

    monkeypatch.setattr(shared, "_run_pack", run)
    check(plain, shared, draw_requests(5))


def test_passes_visit_every_node_once():
    rng = random.Random(0)
    for _ in range(30):
        texts = [
            [rng.randrange(3) for _ in range(rng.randint(1, 12))] for _ in range(20)
        ]
        tree = build_tree(texts)
        assert len(tree) == len(
            {tuple(t[: i + 1]) for t in texts for i in range(len(t))}
        )
        for text, last in zip(texts, tree.last, strict=True):
            assert tree.tokens[tree.path(int(last))].tolist() == text
        scored = [0] + [i + 1 for i in range(len(tree))]
        start, visited = 0, []
        while start < len(tree):
            pack = next_pack(tree, torch.tensor(scored).numpy(), start, Budget(9, 4, 9))
            visited += [int(node) for row in pack.rows for node in row]
            assert sorted(visited) == list(range(pack.stop))
            start = pack.stop
