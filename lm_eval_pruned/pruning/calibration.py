"""Calibration: what the neurons of a model do on text that the user provides.

The text is a JSON Lines file. Each line is an object with ``text`` (a string) or
``messages`` (a chat, which goes through the tokenizer's chat template). There is no
default text: whatever stood here could be what the evaluation measures.
"""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    describe,
    find_glu_mlps,
)


if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Text = str | list[dict[str, Any]]

logger = logging.getLogger("lm_eval.pruned.calibration")

#: A text longer than this, or than the model's positions, is cut at its end.
MAX_TOKENS = 2048


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


def read_texts(file: str, samples: int | None = None) -> list[Text]:
    """Read calibration texts.

    Args:
        file: JSON Lines file.
        samples: How many texts to take, from the first on; default: all.

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
            f"calibration={file} cannot be read ({error}): pass a JSON Lines file in UTF-8."
        ) from None
    texts: list[Text] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        if len(texts) == samples:
            break
        texts.append(_text_of(line, f"calibration={file}, line {number}"))
    if len(texts) < (samples or 1):
        raise ValueError(
            f"calibration={file} holds {len(texts)} texts, but "
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
    texts = read_texts(file, samples)
    mlps = find_glu_mlps(model)
    check_observable(model)
    longest = min(
        MAX_TOKENS, getattr(model.config, "max_position_embeddings", None) or MAX_TOKENS
    )
    inputs = [_tokenize(tokenizer, text, longest, file) for text in texts]
    squares = {
        mlp.name: torch.zeros(mlp.width, dtype=torch.float64, device="cpu")
        for mlp in mlps
    }
    norms = {name: torch.zeros_like(total) for name, total in squares.items()}

    def observer(name: str) -> Callable[..., None]:
        def observe(module, arguments, output) -> None:
            values = arguments[0].reshape(-1, arguments[0].shape[-1])
            norm = values.float().norm(p=2, dim=0).cpu().double()
            norms[name] += norm
            squares[name] += norm.square()

        return observe

    handles = [
        mlp.projection("down_proj").register_forward_hook(observer(mlp.name))
        for mlp in mlps
    ]
    training = model.training
    model.eval()
    try:
        for tokens in inputs:
            model(input_ids=tokens.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
        model.train(training)
    for name, total in squares.items():
        if not total.isfinite().all():
            raise ValueError(
                f"The calibration text makes {name} produce NaN or infinite activations: use "
                "another dtype, such as dtype=float32, or other text."
            )
    tokens_seen = sum(tokens.numel() for tokens in inputs)
    logger.info(
        "Calibrated on %d texts (%d tokens) of %s.", len(texts), tokens_seen, file
    )
    return Calibration(
        Path(file).name,
        hashlib.sha256(Path(file).read_bytes()).hexdigest(),
        len(texts),
        tokens_seen,
        {name: NeuronActivity(squares[name].sqrt(), norms[name]) for name in squares},
    )


def check_observable(model: PreTrainedModel) -> None:
    """Refuse a model whose activations hooks cannot see.

    Args:
        model: A model, possibly on the meta device.

    Raises:
        UnsupportedModelError: It has an encoder, or experts whose down projections
            are no modules of their own.
    """
    if model.config.is_encoder_decoder:
        raise UnsupportedModelError(
            f"{describe(model)} has an encoder, and calibration text has no target for its "
            "decoder: choose a criterion that looks at weights alone, such as criterion=maw."
        )
    for mlp in find_glu_mlps(model):
        if "down_proj" not in mlp.linears:
            raise UnsupportedModelError(
                f"{describe(model)} keeps the down projection of {mlp.name} stacked with others, "
                "where its input cannot be observed: choose a criterion that looks at weights "
                "alone, such as criterion=maw."
            )


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: Text, longest: int, file: str
) -> Tensor:
    if isinstance(text, str):
        tokens = tokenizer(text)["input_ids"]
    else:
        tokens = tokenizer.apply_chat_template(text, tokenize=True, return_dict=False)
    if not tokens:
        raise ValueError(
            f"calibration={file} has a text without tokens, {text!r}: remove it."
        )
    return torch.tensor([tokens[:longest]])
