"""``hf-shared-context`` answers what ``hf`` answers; nothing is downloaded."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
)

from lm_eval.models.hf_shared_context import SharedContextHFLM
from lm_eval.models.huggingface import HFLM


MAX_LENGTH = 24
EOS = "<eos>"
SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
}
GPT2 = {"vocab_size": 32, "n_embd": 32, "n_layer": 2, "n_head": 4}
MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, initializer_range=0.3)),
    "window": lambda: MistralForCausalLM(
        MistralConfig(**SIZES, num_key_value_heads=2, sliding_window=8)
    ),
    "alibi": lambda: BloomForCausalLM(
        BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=4)
    ),
}


def make(cls, model, **kwargs):
    words = {f"w{i}": i for i in range(31)} | {EOS: 31}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=EOS)),
        eos_token=EOS,
        pad_token=EOS,
    )
    return cls(
        pretrained=model,
        tokenizer=tokenizer,
        device="cpu",
        max_length=MAX_LENGTH,
        # Two requests may split one text differently, which the cache of logits gets wrong.
        logits_cache=False,
        **kwargs,
    )


def draw_requests(seed: int):
    """Contexts with one to six continuations in any order; some are too long."""
    rng = random.Random(seed)

    def letters(low, high):
        return [rng.randrange(5) for _ in range(rng.randint(low, high))]

    contexts = [letters(1, MAX_LENGTH + 2) for _ in range(8)]
    requests = [(c, letters(1, 6)) for c in contexts for _ in range(rng.randint(1, 6))]
    rng.shuffle(requests)
    return [(("c", str(i)), c, t) for i, (c, t) in enumerate(requests)]


def tokens_of(model, run):
    """Return how many tokens, padding included, a model gets while `run` runs."""
    count = 0

    def add(module, args, kwargs):
        nonlocal count
        count += kwargs.get("input_ids", args[0] if args else None).numel()

    handle = model.register_forward_pre_hook(add, with_kwargs=True)
    run()
    handle.remove()
    return count


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("name", MODELS)
def test_answers_are_those_of_hf(name, batch_size):
    torch.manual_seed(0)
    model = MODELS[name]().double().eval()
    requests = draw_requests(batch_size)
    plain = make(HFLM, model, batch_size=batch_size)
    shared = make(SharedContextHFLM, model, batch_size=batch_size)
    expected = plain._loglikelihood_tokens(requests, disable_tqdm=True)
    got = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    # Some models' own code computes parts of attention in float32.
    assert [value for value, _ in got] == pytest.approx(
        [value for value, _ in expected], abs=1e-4
    )


def test_equal_contexts_are_computed_once():
    model = MODELS["llama"]().eval()
    requests = [(("c", str(i)), list(range(16)), [i, i + 1]) for i in range(10)]
    shared = make(SharedContextHFLM, model, batch_size=4)
    tokens = tokens_of(
        model, lambda: shared._loglikelihood_tokens(requests, disable_tqdm=True)
    )
    assert tokens == 16 + 10


def test_contexts_of_one_continuation_are_left_to_hf(monkeypatch):
    shared = make(SharedContextHFLM, MODELS["llama"]().eval(), batch_size=4)
    monkeypatch.setattr(shared, "_score_groups", None)
    requests = [(("c", str(i)), [i, 1, 2], [3, 4]) for i in range(5)]
    assert len(shared._loglikelihood_tokens(requests, disable_tqdm=True)) == 5


def test_the_cache_of_answers_gets_each_answer():
    shared = make(SharedContextHFLM, MODELS["llama"]().eval(), batch_size=4)
    kept = {}
    shared.cache_hook = SimpleNamespace(
        add_partial=lambda kind, request, answer: kept.update({request: answer})
    )
    requests = draw_requests(0)
    answers = shared._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [kept[request[0]] for request in requests] == answers


def test_a_recurrent_model_is_left_to_hf():
    model = MODELS["llama"]().eval()
    model._is_stateful = True
    shared = make(SharedContextHFLM, model, batch_size=4)
    assert shared._no_sharing() == "the model keeps a recurrent state"
