"""Calibration: what the neurons of a model do on text that the user provides.

The text is a JSON Lines file. Each line is an object with ``text`` (a string) or
``messages`` (a chat, which goes through the tokenizer's chat template). The default is the text
beside this file, which shares no run of eight words with the benchmarks that the study uses.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from tqdm import tqdm

from lm_eval_pruned.pruning.layouts import (
    UnsupportedModelError,
    describe,
    find_glu_mlps,
)
from lm_eval_pruned.pruning.stacked import runnable


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from torch import Tensor, nn
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    Text = str | list[dict[str, Any]]

#: Seconds after which a bar is drawn again.
_TICK = 1.0
#: A text longer than this, or than the model's positions, is cut at its end.
MAX_TOKENS = 2048


class Calibration(NamedTuple):
    """What the neurons of a model do on some text, as `measured_once` keeps it.

    Attributes:
        norms: How strongly the neurons of each GLU-MLP fired, by its name, shape (2, I), float64:
            the l2 norm of what goes into down over all tokens of all texts; and the sum over the
            texts of its l2 norm over the tokens of each.
        measured_on: `CalibrationText.as_dict` of the text, and the device unless it is the CPU.
    """

    norms: dict[str, Tensor]
    measured_on: dict[str, Any]


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
        _text_of(line, f"{argument}={file}, line {number}")
        for number, line in numbered[:samples]
    ]
    if len(texts) < (samples or 1):
        raise ValueError(
            f"{argument}={file} holds {len(texts)} texts, but {samples or 'at least one'} were "
            "asked for: pass a smaller calibration_samples, or a file with more text."
        )
    return texts


def _text_of(line: str, where: str) -> Text:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError:
        entry = None
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


def token_ids(tokenizer: PreTrainedTokenizerBase, text: Text) -> list[int]:
    """Return the tokens of a text, a chat by way of the tokenizer's chat template."""
    if isinstance(text, str):
        return tokenizer(text)["input_ids"]  # type: ignore[return-value]
    return tokenizer.apply_chat_template(text, return_dict=False)  # type: ignore[return-value]


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
        """Read and tokenise the first `samples` texts of `file` for a model; see `read_texts`.

        A text is cut after `longest` tokens, or after the model's positions, and needs at least
        `shortest`: 2 where each token is predicted from those before it.

        Raises:
            ValueError: The file or a text cannot be used, or there is no tokenizer.
        """
        if tokenizer is None:
            raise ValueError(
                f"calibration={file} is text, and there is no tokenizer to read it with: pass "
                "tokenizer."
            )
        positions = getattr(model.config, "max_position_embeddings", None)
        tokens = []
        for text in read_texts(file, samples):
            ids = token_ids(tokenizer, text)[: min(longest, positions or longest)]
            if len(ids) < shortest:
                raise ValueError(
                    f"calibration={file} has a text of {'one' if ids else 'no'} token, {text!r}, "
                    "in which nothing is predicted: remove it."
                )
            tokens.append(torch.tensor([ids]))
        return cls(Path(file), tokens)

    @property
    def key(self) -> str:
        """What identifies the file, the tokens and how many there are."""
        return repr((self.as_dict(), [tokens.tolist() for tokens in self.tokens]))

    def as_dict(self) -> dict[str, Any]:
        """Return name and SHA-256 of the file, and the number of texts and tokens."""
        return {
            "file": self.path.name,
            "sha256": hashlib.sha256(self.path.read_bytes()).hexdigest(),
            "texts": len(self.tokens),
            "tokens": sum(tokens.numel() for tokens in self.tokens),
        }


@contextlib.contextmanager
def watched(
    model: PreTrainedModel, hooks: Mapping[nn.Module, Callable[..., None]]
) -> Iterator[None]:
    """Have a model that can run, in evaluation mode, without gradients, and with forward hooks.

    The hooks are given arguments by name as well.
    """
    training = model.training
    model.eval()
    handles = [
        module.register_forward_hook(hook, with_kwargs=True)
        for module, hook in hooks.items()
    ]
    try:
        with torch.no_grad(), runnable(model):
            yield
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def progress_bar(
    total: int, what: str, texts: Sequence[Tensor], unit: str = "text"
) -> Iterator[tqdm]:
    """Show on a terminal how far `what` is with `texts`, and the time left; nothing elsewhere.

    The clock goes on while a layer of a large model takes minutes.
    """
    label = f"{what}, {sum(text.numel() for text in texts):,} tokens"
    ended = threading.Event()
    with tqdm(total=total, desc=label, unit=unit, leave=False, disable=None) as bar:

        def tick() -> None:
            while not ended.wait(_TICK):
                bar.refresh()

        ticking = threading.Thread(target=tick, daemon=True)
        if not bar.disable:
            ticking.start()
        try:
            yield bar
        finally:
            ended.set()
            if not bar.disable:
                ticking.join()


def run_texts(
    model: PreTrainedModel,
    texts: Sequence[Tensor],
    what: str,
    hooks: Mapping[nn.Module, Callable[..., None]] | None = None,
    run: Callable[[Tensor], object] | None = None,
) -> None:
    """Run texts, each of shape (1, tokens), int64, through a `watched` model.

    Each text is a separate batch, without padding, so that the same texts on the same machine
    give the same numbers. `what` is the label of the bar; `run` is called with each text, by
    default for one forward pass.
    """
    run = run or (lambda tokens: model(input_ids=tokens, use_cache=False))
    with watched(model, hooks or {}), progress_bar(len(texts), what, texts) as bar:
        for text in texts:
            run(text.to(model.device))
            bar.update()


def unless_cpu(device: torch.device) -> dict[str, str]:
    """Return what a record says of the device on which text ran: nothing of the CPU."""
    return {} if device.type == "cpu" else {"device": str(device)}


def calibrate(model: PreTrainedModel, text: CalibrationText) -> Calibration:
    """Run calibration text through an unpruned model and record what its neurons do.

    Norms are float32 for a text, and their sums float64.

    Raises:
        ValueError: An activation is NaN or infinite.
        UnsupportedModelError: Activations cannot be observed in the model.
    """
    check_observable(model)
    hooks: dict[nn.Module, Callable[..., None]] = {}
    # Of each MLP, over the texts, the sums of squared norms and of norms.
    sums: dict[str, Tensor] = {}
    for mlp in find_glu_mlps(model):
        total = torch.zeros(2, mlp.width, dtype=torch.float64, device="cpu")

        def add(module, arguments, named, output, total=total) -> None:
            values = arguments[0].flatten(0, -2)
            norm = values.float().norm(p=2, dim=0).cpu().double()
            total += torch.stack([norm.square(), norm])

        sums[mlp.name], hooks[mlp.projection("down_proj")] = total, add
    run_texts(model, text.tokens, "calibration", hooks)
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(
                f"The calibration text makes {name} produce NaN or infinite activations: use "
                "another dtype, such as dtype=float32, or other text."
            )
    for total in sums.values():
        total[0].sqrt_()
    return Calibration(sums, text.as_dict() | unless_cpu(model.device))


def check_observable(
    model: PreTrainedModel, instead: str = "criterion=maw", stacked: bool = False
) -> None:
    """Refuse a model, possibly on the meta device, whose activations hooks cannot see.

    `stacked` says that experts need not be separate modules.

    Raises:
        UnsupportedModelError: It has an encoder, or experts whose down projections
            are not separate modules; the message offers the argument `instead`.
    """
    if model.config.is_encoder_decoder:
        why = "has an encoder, and calibration text has no target for its decoder"
    else:
        apart = (m for m in find_glu_mlps(model) if m.projection("down_proj") is None)
        if stacked or (mlp := next(apart, None)) is None:
            return
        why = (
            f"keeps the down projection of {mlp.name} stacked with others, where its input cannot "
            "be observed"
        )
    raise UnsupportedModelError(
        f"{describe(model)} {why}: choose by weights only, such as {instead}."
    )
