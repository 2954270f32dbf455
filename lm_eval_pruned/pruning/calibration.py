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
from lm_eval_pruned.util.progress import steps


if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping, Sequence

    from torch import Tensor
    from torch.utils.hooks import RemovableHandle
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
    """What the neurons of a model did on calibration text.

    Attributes:
        measured_on: The text; see `CalibrationText.as_dict`.
        activity: Activity by name of the GLU-MLP.
    """

    measured_on: dict[str, Any]
    activity: Mapping[str, NeuronActivity]


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
    numbered = [(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    texts = [
        _text_of(line, f"{argument}={file}, line {number}")
        for number, line in numbered[:samples]
    ]
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


def token_ids(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Return the tokens of a text, a chat by way of the tokenizer's chat template."""
    tokens: Any
    if isinstance(text, str):
        tokens = tokenizer(text)["input_ids"]
    else:
        tokens = tokenizer.apply_chat_template(text, tokenize=True, return_dict=False)
    return tokens


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
        tokenizer: PreTrainedTokenizerBase | None,
        file: str,
        samples: int | None = None,
        longest: int = MAX_TOKENS,
        shortest: int = 1,
    ) -> CalibrationText:
        """Read and tokenise calibration text.

        Args:
            model: The model that will read it, possibly without weights.
            tokenizer: Its tokenizer.
            file: JSON Lines file; see `read_texts`.
            samples: How many texts to use, from the first on; default: all.
            longest: A text is cut after this many tokens, or after the model's positions.
            shortest: Tokens of a text at least: 2 where they are predicted from each other.

        Raises:
            ValueError: The file is not as `read_texts` wants it, a text has too few tokens, or
                there is no tokenizer.
        """
        if tokenizer is None:
            raise ValueError(
                f"calibration={file} is text, and there is no tokenizer to read it with: pass "
                "tokenizer."
            )
        positions = getattr(model.config, "max_position_embeddings", None)
        longest = min(longest, positions or longest)
        tokens = []
        for text in read_texts(file, samples):
            ids = token_ids(tokenizer, text)
            if not ids:
                raise ValueError(
                    f"calibration={file} has a text without tokens, {text!r}: remove it."
                )
            tokens.append(torch.tensor([ids[:longest]]))
        if min(each.numel() for each in tokens) < shortest:
            raise ValueError(
                f"calibration={file} has a text of one token among its first {len(tokens)}, in "
                "which nothing is predicted: remove it."
            )
        return cls(Path(file), tokens)

    def as_dict(self) -> dict[str, Any]:
        """Return name and SHA-256 of the file, and the number of texts and tokens."""
        return {
            "file": self.path.name,
            "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "texts": len(self.tokens),
            "tokens": sum(tokens.numel() for tokens in self.tokens),
        }


def run_texts(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    what: str,
    hooks: Iterable[RemovableHandle] = (),
    run: Callable[[Tensor], object] | None = None,
) -> None:
    """Run texts through a model while hooks watch its modules.

    Each text is a batch of its own, without padding, in evaluation mode and in the
    model's dtype, so that the same texts on the same machine give the same numbers.

    Args:
        model: The model.
        texts: Tokens, each of shape (1, tokens), int64.
        what: Label of the bar on a terminal.
        hooks: Handles of the hooks, which are removed at the end.
        run: Called with the tokens of each text; default: one forward pass.
    """
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), steps(len(texts), what) as step:
            for tokens in (text.to(model.device) for text in texts):
                if run is None:
                    model(input_ids=tokens, use_cache=False)
                else:
                    run(tokens)
                step(1)
    finally:
        model.train(training)
        for hook in hooks:
            hook.remove()


def calibrate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    file: str,
    samples: int | None = None,
) -> Calibration:
    """Run calibration text through a model and record what its neurons do.

    Args:
        model: A decoder-only model with its GLU-MLPs unpruned.
        tokenizer: Its tokenizer.
        file: JSON Lines file; see `read_texts`.
        samples: How many texts to use, from the first on; default: all.

    Returns:
        The text, and the activity of each GLU-MLP: float32 for a text, its sums float64.

    Raises:
        ValueError: See `CalibrationText.of`; or an activation is NaN or infinite.
        UnsupportedModelError: Activations cannot be observed in the model.
    """
    check_observable(model)
    text = CalibrationText.of(model, tokenizer, file, samples)
    mlps = find_glu_mlps(model)
    norms = {
        mlp.name: torch.zeros(mlp.width, dtype=torch.float64, device="cpu")
        for mlp in mlps
    }
    squares = {name: torch.zeros_like(total) for name, total in norms.items()}

    def watch(name: str) -> Callable[..., None]:
        def add(module, arguments, output) -> None:
            values = arguments[0].flatten(0, -2)
            norm = values.float().norm(p=2, dim=0).cpu().double()
            norms[name] += norm
            squares[name] += norm.square()

        return add

    hooks = [
        mlp.projection("down_proj").register_forward_hook(watch(mlp.name))
        for mlp in mlps
    ]
    run_texts(model, text.tokens, "calibration", hooks)
    for name, total in squares.items():
        if not total.isfinite().all():
            raise ValueError(
                f"The calibration text makes {name} produce NaN or infinite activations: use "
                "another dtype, such as dtype=float32, or other text."
            )
    activity = {
        name: NeuronActivity(total.sqrt(), norms[name])
        for name, total in squares.items()
    }
    on = text.as_dict()
    logger.info(
        "Calibrated on %d texts (%d tokens) of %s.", on["texts"], on["tokens"], file
    )
    return Calibration(on, activity)


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
