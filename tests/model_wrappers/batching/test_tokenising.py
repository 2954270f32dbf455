"""Tokens that are encoded in batches, and kept for the next model, are `HFLM`'s."""

from __future__ import annotations

import pytest
from lm_eval.models.huggingface import HFLM
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizerFast

from lm_eval_pruned.model_wrappers.batching import tokenising
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from tests.helpers.answering import SCORED, tiny
from tests.helpers.checkpoints import byte_tokenizer


def unigram():
    """Return one like SentencePiece's: a space in front, and a token for the beginning."""
    letters = [chr(c) for c in range(33, 127)]
    pieces = ["<unk>", "<bos>", "<eos>", "▁", "▁yes", "▁question", "answer", *letters]
    tokenizer = Tokenizer(
        models.Unigram([(p, -len(pieces) / len(p)) for p in pieces], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return tokenizer


def merging():
    """Return one whose tokens reach over the end of a context: spaces, and cd of abc + def."""
    symbols = ["<bos>", "<eos>", *map(chr, range(32, 127)), "cd", "? ", "? y"]
    vocabulary = {symbol: number for number, symbol in enumerate(symbols)}
    merges = [("c", "d"), ("?", " "), ("? ", "y")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.normalizer = normalizers.Replace("A", "a")
    return tokenizer


class Own(PreTrainedTokenizerFast):
    """Encodes one text otherwise than it would a batch, as a model's own code may."""

    def encode(self, text, **kwargs):
        return super().encode(text[::-1], **kwargs)


def made(make, kind=PreTrainedTokenizerFast):
    return lambda: kind(tokenizer_object=make(), bos_token="<bos>", eos_token="<eos>")


TOKENIZERS = {
    "bytes": byte_tokenizer,
    "unigram": made(unigram),
    "merging": made(merging),
    "own": made(merging, Own),
}
PAIRS = [
    *SCORED.asked,
    *(("Any question? ", a) for a in ("yes", "no", " yes", "yes")),
    *((c, "answer") for c in ("  ", "<bos>Any", "<bos>", "x\n\n", "Any question?")),
]


@pytest.fixture
def asked(monkeypatch):
    """What the models hand on, with few texts encoded at once."""
    monkeypatch.setattr(tokenising.KeptTokens, "_latest", None)
    monkeypatch.setattr(tokenising, "_CHUNK", 5)
    found = []

    def note(lm, requests, **_):
        found.append([(context, tokens) for _, context, tokens in requests])
        return [(0.0, True)] * len(requests)

    for each in (HFLM, PrefixHFLM):
        monkeypatch.setattr(each, "_loglikelihood_tokens", note)
    return found


def ask(cls=PrefixHFLM, make=byte_tokenizer, **arguments):
    lm = cls(tiny(), tokenizer=make(), device="cpu", max_length=64, **arguments)
    SCORED.ask(lm, PAIRS)
    return lm


@pytest.mark.parametrize("bos", [None, True, False])
@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_tokens_are_those_of_hf(name, bos, asked):
    for cls in (HFLM, PrefixHFLM, PrefixHFLM):
        # A tokenizer for each model, as the sizes of a sweep have.
        lm = ask(cls, TOKENIZERS[name], add_bos_token=bos)
        # Padding that a generating task has set is another state of the same tokenizer.
        lm.tokenizer.pad_token = lm.tokenizer.eos_token
    assert asked[0] == asked[1] == asked[2]


def test_a_text_is_encoded_once_and_once_for_all_models(asked, monkeypatch):
    sent, call = [], PreTrainedTokenizerFast.__call__

    def watched(self, texts, **options):
        sent.extend(texts)
        return call(self, texts, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "__call__", watched)
    monkeypatch.setattr(tokenising, "_CHUNK", 99)
    lm = ask()
    first = len(sent)
    assert first == len(set(sent)) < len(PAIRS) * 1.7
    # They are one list, not one for each answer.
    assert len({id(context) for context, _ in asked[0][:3]}) == 1
    ask()
    assert len(sent) == first
    # A pair that no request has; another tokenizer; one whose energy is measured.
    assert lm._encode_pair("never", "asked") == HFLM._encode_pair(lm, "never", "asked")
    ask(add_bos_token=False)
    assert len(sent) == 2 * first
    monkeypatch.setattr(PrefixHFLM, "keeps_tokens", False)
    ask(add_bos_token=False)
    assert len(sent) == 3 * first
