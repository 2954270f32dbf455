"""Calibration: what the neurons of a model do on text that the user provides.

The text is a JSON Lines file. Each line is an object with ``text`` (a string) or
``messages`` (a chat, which goes through the tokenizer's chat template). There is no
default text: whatever stood here could be what the evaluation measures.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.layouts import (
    GluMlp,
    UnsupportedModelError,
    describe,
    find_glu_mlps,
)
from lm_eval_pruned.util.progress import steps


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lm_eval_pruned.pruning.layerwise import LayeredModel

    Text = str | list[dict[str, Any]]

logger = logging.getLogger("lm_eval.pruned.calibration")

#: A text longer than this, or than the model's positions, is cut at its end.
MAX_TOKENS = 2048
#: A loss is measured on this many tokens of each text.
LENGTH = 128


@dataclass(frozen=True)
class NeuronActivity:
    """How strongly the neurons of one GLU-MLP fired, x being the input of down.

    Attributes:
        norm: l2 norm of x over all tokens of all texts, shape (I,), float64.
        summed_norms: Sum over the texts of the l2 norm of x over the tokens of
            each, shape (I,), float64.
    """

    norm: Tensor
    summed_norms: Tensor


@dataclass(frozen=True)
class Calibration:
    """One pass of a model over calibration text.

    Attributes:
        file: Name of the file, without its folder.
        sha256: SHA-256 of the file.
        texts: Number of texts that were used.
        tokens: Number of tokens in them, after cutting.
        activity: Activity by name of the GLU-MLP.
    """

    file: str
    sha256: str
    texts: int
    tokens: int
    activity: Mapping[str, NeuronActivity]

    def as_dict(self) -> dict[str, Any]:
        """Return what the results file holds (JSON types only)."""
        return {
            "file": self.file,
            "sha256": self.sha256,
            "texts": self.texts,
            "tokens": self.tokens,
        }


def read_texts(
    file: str, samples: int | None = None, argument: str = "calibration"
) -> list[Text]:
    """Read calibration texts.

    Args:
        file: JSON Lines file.
        samples: How many texts to take, from the first on; default: all.
        argument: What named the file, for messages.

    Returns:
        A string or a list of messages for each line; empty lines are passed over.

    Raises:
        ValueError: The file is missing, a line is no such object, or it holds fewer
            texts than `samples`.
    """
    try:
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{argument}={file} cannot be read ({error}): pass a JSON Lines file in UTF-8."
        ) from None
    texts: list[Text] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(texts) == samples:
            break
        texts.append(_text_of(line, f"{argument}={file}, line {number}"))
    if len(texts) < (samples or 1):
        raise ValueError(
            f"{argument}={file} holds {len(texts)} texts, but "
            f"{samples or 'at least one'} {'were' if samples else 'was'} asked for: pass "
            f"{'a smaller calibration_samples' if texts else 'a file with text'}."
        )
    return texts


def _text_of(line: str, where: str) -> Text:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{where} is not JSON ({error}).") from None
    if isinstance(entry, dict):
        text, messages = entry.get("text"), entry.get("messages")
        if isinstance(text, str) and text:
            return text
        if (
            isinstance(messages, list)
            and messages
            and all(isinstance(message, dict) for message in messages)
        ):
            return messages
    raise ValueError(
        f'{where} has neither "text" (a string) nor "messages" (a list of objects with role and '
        "content)."
    )


@dataclass(frozen=True)
class CalibrationText:
    """Calibration text as tokens.

    Attributes:
        path: The file.
        tokens: One tensor for each text, shape (1, tokens), int64.
    """

    path: Path
    tokens: list[Tensor]

    @classmethod
    def of(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        file: str,
        samples: int | None = None,
        longest: int = MAX_TOKENS,
    ) -> CalibrationText:
        """Read and tokenise calibration text.

        Args:
            model: The model that will read it, possibly without weights.
            tokenizer: Its tokenizer.
            file: JSON Lines file; see `read_texts`.
            samples: How many texts to use, from the first on; default: all.
            longest: A text is cut after this many tokens, or after the model's positions.

        Raises:
            ValueError: The file is not as `read_texts` wants it, or a text is empty once
                it is tokenised.
        """
        positions = getattr(model.config, "max_position_embeddings", None)
        longest = min(longest, positions or longest)
        texts = read_texts(file, samples)
        return cls(
            Path(file), [_tokenize(tokenizer, text, longest, file) for text in texts]
        )

    @property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def check_predictable(self) -> None:
        """Refuse a text in which no token is predicted from another.

        Raises:
            ValueError: There is one.
        """
        if min(tokens.numel() for tokens in self.tokens) < 2:
            raise ValueError(
                f"calibration={self.path} has a text of one token among its first "
                f"{len(self.tokens)}, in which nothing is predicted: remove it."
            )

    @property
    def count(self) -> int:
        """Number of tokens in all texts."""
        return sum(tokens.numel() for tokens in self.tokens)

    def seen_by(self, activity: Mapping[str, NeuronActivity]) -> Calibration:
        """Return what neurons did on this text, `activity` by name of the GLU-MLP."""
        logger.info(
            "Calibrated on %d texts (%d tokens) of %s.",
            len(self.tokens),
            self.count,
            self.path,
        )
        return Calibration(
            self.path.name, self.sha256, len(self.tokens), self.count, activity
        )


class Observer:
    """Sums over texts what the neurons of some GLU-MLPs do."""

    def __init__(self, mlps: Iterable[GluMlp]):
        self._mlps = list(mlps)
        self._squares = {
            mlp.name: torch.zeros(mlp.width, dtype=torch.float64, device="cpu")
            for mlp in self._mlps
        }
        self._norms = {
            name: torch.zeros_like(total) for name, total in self._squares.items()
        }

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Take every pass through the MLPs for one text more."""
        handles = [
            mlp.projection("down_proj").register_forward_hook(self._hook(mlp.name))
            for mlp in self._mlps
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def activity(self) -> dict[str, NeuronActivity]:
        """Return what was seen, by name of the MLP.

        Raises:
            ValueError: An activation was NaN or infinite.
        """
        for name, total in self._squares.items():
            if not total.isfinite().all():
                raise ValueError(
                    f"The calibration text makes {name} produce NaN or infinite activations: use "
                    "another dtype, such as dtype=float32, or other text."
                )
        return {
            name: NeuronActivity(total.sqrt(), self._norms[name])
            for name, total in self._squares.items()
        }

    def _hook(self, name: str) -> Callable[..., None]:
        def observe(module, arguments, output) -> None:
            values = arguments[0].reshape(-1, arguments[0].shape[-1])
            norm = values.float().norm(p=2, dim=0).cpu().double()
            self._norms[name] += norm
            self._squares[name] += norm.square()

        return observe


@torch.no_grad()
def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str,
    samples: int | None = None,
) -> Calibration:
    """Run calibration text through a model and record what its neurons do.

    Each text is a batch of its own, without padding, in evaluation mode and in the
    model's dtype; sums are kept in float64, so that the same file on the same
    machine gives the same numbers.

    Args:
        model: A decoder-only model with its GLU-MLPs unpruned.
        tokenizer: Its tokenizer.
        file: JSON Lines file; see `read_texts`.
        samples: How many texts to use, from the first on; default: all.

    Raises:
        ValueError: The file is not as `read_texts` wants it, or a text is empty once
            it is tokenised, or an activation is NaN or infinite.
        UnsupportedModelError: Activations cannot be observed in the model.
    """
    check_observable(model)
    text = CalibrationText.of(model, tokenizer, file, samples)
    observer = Observer(find_glu_mlps(model))
    training = model.training
    model.eval()
    try:
        with observer.watching(), steps(len(text.tokens), "calibration") as step:
            for tokens in text.tokens:
                model(input_ids=tokens.to(model.device), use_cache=False)
                step(1)
    finally:
        model.train(training)
    return text.seen_by(observer.activity())


def calibrate_by_layer(
    layers: LayeredModel,
    text: CalibrationText,
    seen: Callable[[GluMlp, NeuronActivity], None],
) -> Calibration:
    """Do what `calibrate` does with one layer in memory at a time, and the same numbers.

    Hidden states are kept for as many texts at once as `lm_eval_pruned.pruning.layerwise.HIDDEN_BYTES`
    hold; for more text, the layers are read again.

    Args:
        layers: The unpruned model.
        text: The text.
        seen: Called with each GLU-MLP, its weights in memory, and what its neurons did.

    Raises:
        ValueError: An activation is NaN or infinite.
    """
    observers = [Observer(mlps) for mlps in layers.mlps]
    activity: dict[str, NeuronActivity] = {}
    blocks = layers.blocks(text.tokens)
    with steps(len(layers) * len(text.tokens), "calibration") as step:
        for number, block in enumerate(blocks, 1):
            states, calls = layers.enter_all(block)
            for layer, observer in enumerate(observers):
                with observer.watching():
                    for index, hidden in enumerate(states):
                        call = calls[index][layer]
                        states[index] = layers.run(layer, hidden, call)
                if number == len(blocks):
                    found = observer.activity()
                    activity |= found
                    for mlp in layers.mlps[layer]:
                        seen(mlp, found[mlp.name])
                step(len(block))
    return text.seen_by(activity)


def check_observable(model: PreTrainedModel, instead: str = "criterion=maw") -> None:
    """Refuse a model whose activations hooks cannot see.

    Args:
        model: A model, possibly on the meta device.
        instead: What would work, as an argument.

    Raises:
        UnsupportedModelError: It has an encoder, or experts whose down projections
            are no modules of their own.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{describe(model)} has an encoder, and calibration text has no target for its "
            f"decoder: choose by weights alone, such as {instead}."
        )
    for mlp in find_glu_mlps(model):
        if "down_proj" not in mlp.linears:
            raise UnsupportedModelError(
                f"{describe(model)} keeps the down projection of {mlp.name} stacked with others, "
                f"where its input cannot be observed: choose by weights alone, such as {instead}."
            )


def token_ids(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Return the tokens of a text, a chat by way of the tokenizer's chat template."""
    tokens: Any
    if isinstance(text, str):
        tokens = tokenizer(text)["input_ids"]
    else:
        tokens = tokenizer.apply_chat_template(text, tokenize=True, return_dict=False)
    return tokens


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: Text, longest: int, file: str
) -> Tensor:
    tokens = token_ids(tokenizer, text)
    if not tokens:
        raise ValueError(
            f"calibration={file} has a text without tokens, {text!r}: remove it."
        )
    return torch.tensor([tokens[:longest]])
