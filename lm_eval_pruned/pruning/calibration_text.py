"""Calibration text: a file, a dataset, or what the model itself writes.

A file is JSON Lines. Each line is an object with ``text`` (a string) or ``messages`` (a chat, which
goes through the tokenizer's chat template); so is each row of a dataset. The default is the text
beside this file, which shares no run of eight words with the benchmarks that the study uses.

Source: Williams et al. 2024, "Self-calibration for Language Model Quantization and Pruning",
arXiv 2410.17170, on text that the model writes.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.calibration import progress_bar, watched
from lm_eval_pruned.util.cache import measured_once


if TYPE_CHECKING:
    from collections.abc import Hashable, Iterable, Iterator

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.arguments import PruneArguments
    from lm_eval_pruned.util.cache import Measured

    Text = str | list[dict[str, Any]]

#: Values of ``calibration`` that name no file: text that the model writes, and the prefix of a dataset.
SELF, DATASET = "self", "dataset:"
#: A text longer than this, or than the model's positions, is cut at its end.
MAX_TOKENS = 2048
#: Tokens to read of a dataset, or to write.
_TOKENS = 40_000
#: The model writes so many texts at once, of so many tokens at most. It draws from the likeliest
#: tokens that together have this probability.
_TOGETHER, _WRITTEN, _TOP_P = 32, 256, 0.95


def read_texts(
    file: str, samples: int | None = None, argument: str = "calibration"
) -> list[Text]:
    """Read a string or a list of messages from each line of a JSON Lines file that is not empty.

    `samples` is how many, from the first on; `argument` is what messages call the file.

    Raises:
        ValueError: The file is missing, a line is not such an object, or there are too few.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument}={file} cannot be read ({error}): pass a JSON Lines file in UTF-8."
        ) from None
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    texts = [
        _text_of(_parsed(line), f"{argument}={file}, line {number}")
        for number, line in numbered[:samples]
    ]
    _check_number(len(texts), samples, f"{argument}={file}")
    return texts


def _check_number(texts: int, samples: int | None, where: str) -> None:
    if texts < (samples or 1):
        raise ValueError(
            f"{where} holds {texts} texts, but {samples or 'at least one'} were asked for: pass a "
            "smaller calibration_samples, or one with more text."
        )


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _text_of(entry: Any, where: str) -> Text:
    if isinstance(entry, dict):
        text, messages = entry.get("text"), entry.get("messages")
        if isinstance(text, str) and text:
            return text
        several = isinstance(messages, list) and messages
        if several and all(isinstance(message, dict) for message in several):
            return several
    raise ValueError(
        f'{where} is not a JSON object with "text" (a string) or "messages" (a list of objects '
        "with role and content)."
    )


def dataset_rows(source: str, argument: str = "calibration") -> Iterator[Text]:
    """Yield the texts of a dataset, ``dataset:NAME`` or ``dataset:NAME:CONFIG``, as they arrive.

    Raises:
        ValueError: It cannot be read, or a row has no text; `argument` is what messages call it.
    """
    from datasets import load_dataset

    name, _, config = source.removeprefix(DATASET).partition(":")
    try:
        rows = load_dataset(name, config or None, split="train", streaming=True)
        for number, row in enumerate(rows):
            # Collections of lines, such as WikiText, have empty ones.
            if row.get("text") != "":
                yield _text_of(row, f"{argument}={source}, row {number}")
    except (OSError, ValueError, LookupError) as error:
        reason = str(error).partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{argument}={source} cannot be read ({reason}): pass dataset:NAME or "
            "dataset:NAME:CONFIG of a dataset with a split train, whose rows have text or messages."
        ) from None


def token_ids(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Return the tokens of a text, a chat by way of the tokenizer's chat template."""
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]  # type: ignore[return-value]
    return tokenizer.apply_chat_template(text, return_dict=False)  # type: ignore[return-value]


@dataclass(frozen=True)
class TextSource:
    """Where calibration text comes from, and how much of it is used.

    Attributes:
        name: A file, ``dataset:NAME``, ``dataset:NAME:CONFIG`` or ``self``.
        samples: How many of its texts, the first ones; None for all.
        tokens: After how many tokens no more texts are read; None for all of a file, 40,000 of the
            others.
        seed: Seed of what the model writes.
    """

    name: str
    samples: int | None = None
    tokens: int | None = None
    seed: int = 0

    @classmethod
    def of(cls, arguments: PruneArguments) -> TextSource:
        """Return what arguments that read text ask for."""
        name: Any = arguments.calibration
        samples: Any = arguments.calibration_samples
        tokens: Any = arguments.calibration_tokens
        return cls(name, samples, tokens, int(arguments.seed))

    def check(self) -> None:
        """Refuse a file that cannot be used, or a dataset whose first row cannot.

        Raises:
            ValueError: See `read_texts`.
        """
        if self.name != SELF:
            next(iter(self._texts()))

    def _texts(self) -> Iterator[Text]:
        if not self.name.startswith(DATASET):
            yield from read_texts(self.name, self.samples)
            return
        number = 0
        for text in islice(dataset_rows(self.name), self.samples):
            number += 1
            yield text
        _check_number(number, self.samples, f"calibration={self.name}")

    def read(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        content: Hashable | None = None,
        longest: int = MAX_TOKENS,
        shortest: int = 1,
    ) -> CalibrationText:
        """Read and tokenise the text for a model, or let it write, which runs it where it is.

        A text is cut after `longest` tokens, or after the model's positions, and needs at least
        `shortest`: 2 where each token is predicted from those before it. `content` identifies the
        model for `measured_once`.

        Raises:
            ValueError: The source or a text cannot be used, or the tokenizer is missing.
        """
        if tokenizer is None:
            raise ValueError(
                f"calibration={self.name} is text, and there is no tokenizer to read it with: pass "
                "tokenizer."
            )
        positions = getattr(model.config, "max_position_embeddings", None) or longest
        most = self.tokens
        if self.name == SELF:
            longest = min(_WRITTEN, positions)
            texts: Iterable[list[int]] = self._written(
                model, tokenizer, content, longest
            )
        else:
            longest = min(longest, positions)
            texts = (token_ids(tokenizer, text)[:longest] for text in self._texts())
            most = most or (_TOKENS if self.name.startswith(DATASET) else None)
        tokens: list[Tensor] = []
        number = 0
        for ids in texts:
            if len(ids) < shortest:
                raise ValueError(
                    f"calibration={self.name} has a text of {'one' if ids else 'no'} token, in "
                    f"which nothing is predicted (text {len(tokens) + 1}): remove it."
                )
            tokens.append(torch.tensor([ids]))
            number += len(ids)
            if most is not None and number >= most:
                break
        return CalibrationText(self.name, tokens)

    def _written(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        content: Hashable | None,
        longest: int,
    ) -> list[list[int]]:
        """Return texts that the model writes from the token on which texts begin, or end."""
        first = tokenizer.bos_token_id
        first = tokenizer.eos_token_id if first is None else first
        if first is None:
            raise ValueError(
                f"calibration={SELF} needs a token on which texts begin or end, and the tokenizer "
                "has none: pass a file."
            )
        wanted = self.tokens or _TOKENS

        def measure() -> Measured:
            texts: list[Tensor] = []
            number = 0
            start = torch.full((_TOGETHER, 1), first, device=model.device)
            devices = [model.device] if model.device.type == "cuda" else []
            with (
                watched(model, {}),
                torch.random.fork_rng(devices),
                progress_bar(wanted, "calibration text", unit="token") as bar,
            ):
                torch.manual_seed(self.seed)
                while number < wanted and len(texts) < (self.samples or wanted):
                    rows = model.generate(  # type: ignore[operator]
                        start,
                        attention_mask=torch.ones_like(start),
                        do_sample=True,
                        temperature=1.0,
                        top_p=_TOP_P,
                        top_k=0,
                        max_new_tokens=longest - 1,
                        pad_token_id=first,
                    )
                    before = number
                    for row in rows.cpu():
                        ends = (row[1:] == tokenizer.eos_token_id).nonzero().flatten()
                        text = row[: int(ends[0]) + 2] if len(ends) else row
                        if len(text) > 2:
                            texts.append(text)
                            number += len(text)
                            bar.update(len(text))
                    if number == before:
                        raise ValueError(
                            f"calibration={SELF} gets no text, because the model ends each at "
                            "once: pass a file."
                        )
            return {str(n): text for n, text in enumerate(texts)}, {}

        what = ("written", self.seed, self.samples, wanted, longest, first)
        tensors, _ = measured_once(content, what, measure)
        texts = [tensors[str(n)].tolist() for n in range(len(tensors))]
        return texts[: self.samples]


@dataclass(frozen=True)
class CalibrationText:
    """Calibration text as tokens.

    Attributes:
        name: The file, dataset or ``self``.
        tokens: One tensor for each text, shape (1, tokens), int64.
    """

    name: str
    tokens: list[Tensor]

    @property
    def key(self) -> str:
        """What identifies the source, the tokens and how many there are."""
        return repr((self.as_dict(), [tokens.tolist() for tokens in self.tokens]))

    def as_dict(self) -> dict[str, Any]:
        """Return name and SHA-256 of the file, or of the tokens of another source, and their number."""
        is_file = self.name != SELF and not self.name.startswith(DATASET)
        if is_file:
            content = Path(self.name).read_bytes()
        else:
            content = json.dumps([ids[0].tolist() for ids in self.tokens]).encode()
        return {
            "file": Path(self.name).name if is_file else self.name,
            "sha256": hashlib.sha256(content).hexdigest(),
            "texts": len(self.tokens),
            "tokens": sum(tokens.numel() for tokens in self.tokens),
        }
