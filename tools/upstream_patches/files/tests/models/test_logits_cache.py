"""Requests that share their input but split it differently, with ``logits_cache``."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_eval.models.huggingface import HFLM


EOS = "<eos>"


def make(logits_cache: bool) -> HFLM:
    """A tiny random Llama; nothing is downloaded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        initializer_range=0.5,
    )
    words = {f"w{i}": i for i in range(31)} | {EOS: 31}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token=EOS)),
        eos_token=EOS,
        pad_token=EOS,
    )
    return HFLM(
        pretrained=LlamaForCausalLM(config).eval(),
        tokenizer=tokenizer,
        device="cpu",
        batch_size=2,
        logits_cache=logits_cache,
    )


@pytest.mark.parametrize("splits", [(4, 3), (3, 4), (4, 2, 3)], ids=str)
def test_one_text_split_in_several_ways(splits):
    """The answers are those without the cache, in whatever order the requests come."""
    text = [5, 9, 3, 7, 11]
    requests = [((f"c{n}", f"t{n}"), text[:n], text[n:]) for n in splits]
    expected = make(logits_cache=False)._loglikelihood_tokens(
        requests, disable_tqdm=True
    )
    got = make(logits_cache=True)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert [value for value, _ in got] == pytest.approx(
        [value for value, _ in expected], abs=1e-5
    )
