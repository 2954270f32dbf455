"""Tokens of scored requests: each text is encoded once, many at a time, and kept for the next model.

`HFLM` encodes the context and the whole text of each request by itself, so the context of a
question once for each answer, and all of it again for each size of a sweep. Independent of pruning.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from itertools import islice
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from lm_eval.models.utils import has_bos_prefix
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval.api.instance import Instance

    # The mixin's neighbour among the bases, whose attributes it uses.
    from lm_eval.models.huggingface import HFLM as _Neighbour

    #: Context and continuation, and their tokens.
    Pair = tuple[str, str]
    Encoded = tuple[list[int], list[int]]
else:
    _Neighbour = object


# Pairs whose texts are encoded together: enough for all cores, few enough for a progress bar.
_CHUNK = 512
# Most tokens to keep for the next model: 128 MiB, and about as much text.
_MOST_KEPT = 2**25


class KeptTokens:
    """Tokens that one tokenizer has made of pairs, in 4 bytes each, as long as there is room."""

    # The last one asked for: the sizes of a sweep have one tokenizer.
    _latest: ClassVar[tuple[str, KeptTokens] | None] = None

    def __init__(self) -> None:
        self._room = _MOST_KEPT
        self._pairs: dict[Pair, list[bytes]] = {}
        self._distinct: dict[bytes, bytes] = {}

    @classmethod
    def of(cls, tokenizer: str) -> KeptTokens:
        """Return those of a tokenizer; another one's are forgotten."""
        latest = cls._latest
        if latest is None or latest[0] != tokenizer:
            latest = cls._latest = tokenizer, cls()
        return latest[1]

    def add(self, encoded: dict[Pair, Encoded]) -> None:
        for pair, both in encoded.items():
            # What came first stays: the next model asks for it first.
            if self._room <= 0:
                return
            packed = [np.asarray(tokens, np.int32).tobytes() for tokens in both]
            self._room -= sum(len(p) // 4 for p in packed if p not in self._distinct)
            self._pairs[pair] = [self._distinct.setdefault(p, p) for p in packed]

    def find(self, pairs: list[Pair]) -> dict[Pair, Encoded]:
        """Return what is known of `pairs`; equal contexts are one list."""
        tokens = lru_cache(len(pairs))(lambda p: np.frombuffer(p, np.int32).tolist())
        known = ((pair, self._pairs.get(pair)) for pair in pairs)
        return {pair: (tokens(p[0]), tokens(p[1])) for pair, p in known if p}


class TokenisingMixin(_Neighbour):
    """Encodes each context and each whole text of `loglikelihood` once; put it before `HFLM`.

    `HFLM`'s ``_encode_pair`` still decides what to encode and where to cut.
    """

    # Whether the next model gets the tokens. Not where energy is measured: only the
    # first model of a sweep would pay for them.
    keeps_tokens: bool = True

    _kept: KeptTokens | None = None
    _coming: Iterator[Pair] = iter(())
    # Pairs of this call, and texts of those that are being cut.
    _pairs: dict[Pair, Encoded] | None = None
    _texts: dict[str, list[int]] | None = None

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        self._coming = iter(dict.fromkeys(r.args for r in requests if r.args[0]))
        self._pairs = {}
        name = self._tokenizer_name() if self.keeps_tokens else None
        self._kept = KeptTokens.of(name) if name else None
        try:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)  # type: ignore[misc]
        finally:
            self._pairs = self._texts = None

    def _encode_pair(self, context: str, continuation: str) -> Encoded:
        pair, cut = (context, continuation), super()._encode_pair  # type: ignore[misc]
        if self._pairs is not None and pair not in self._pairs:
            pairs = list(islice(self._coming, _CHUNK))
            known = self._kept.find(pairs) if self._kept else {}
            new = [each for each in pairs if each not in known]
            self._texts = self._encode_texts(new)
            encoded = {each: cut(*each) for each in new}
            self._texts = None
            self._pairs |= known | encoded
            if self._kept:
                self._kept.add(encoded)
        return (self._pairs or {}).get(pair) or cut(*pair)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        if self._texts and add_special_tokens is None and string in self._texts:
            return self._texts[string]
        return super().tok_encode(string, add_special_tokens, **kwargs)  # type: ignore[misc]

    def _encode_texts(self, pairs: list[Pair]) -> dict[str, list[int]]:
        """Return what `HFLM.tok_encode` makes of texts; Rust encodes them in parallel."""
        texts = {context.rstrip() for context, _ in pairs}
        if self.backend == "causal":
            texts |= {"".join(pair) for pair in pairs}
        one = super().tok_encode  # type: ignore[misc]
        if not self._is_plain_and_fast:
            return {text: one(text) for text in texts}
        bos = self.tokenizer.decode(self.prefix_token_id)
        plain: dict[str, Any] = dict.fromkeys(
            ("return_attention_mask", "verbose"), False
        )
        if self.add_bos_token is not None:
            plain["add_special_tokens"] = self.add_bos_token
        encoded: dict[str, list[int]] = {}
        for more in ({}, {"add_special_tokens": False}):
            group = [text for text in texts if has_bos_prefix(text, bos) == bool(more)]
            if group:
                rows = self.tokenizer(group, **plain | more)["input_ids"]
                encoded |= zip(group, rows, strict=True)
        return encoded

    @property
    def _is_plain_and_fast(self) -> bool:
        """Whether the tokenizer is Rust's, and encodes a batch as it does one text."""
        kind, fast = type(self.tokenizer), PreTrainedTokenizerFast
        same = getattr(kind, "_encode_plus", None) is fast._encode_plus
        return same and kind.encode is PreTrainedTokenizerBase.encode

    def _tokenizer_name(self) -> str | None:
        """Return what identifies all that decides the tokens of a pair; None: unknown."""
        if not self._is_plain_and_fast:
            return None
        tokenizer, settings = self.tokenizer, (self.backend, self.add_bos_token)
        # Undoes what the last call has set of truncation and padding.
        tokenizer.encode("")
        rest = self.prefix_token_id, getattr(tokenizer, "split_special_tokens", None)
        state = f"{type(tokenizer)} {settings} {rest} {tokenizer.backend_tokenizer.to_str()}"
        return hashlib.sha256(state.encode()).hexdigest()
