"""Calibration: what the neurons of a model do on text that the user provides."""

from __future__ import annotations

import contextlib
import threading
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
    from transformers import PreTrainedModel


#: Seconds after which a bar is drawn again.
_TICK = 1.0


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


@contextlib.contextmanager
def watched(
    model: PreTrainedModel, hooks: Mapping[nn.Module, Callable[..., None]]
) -> Iterator[None]:
    """Put forward hooks on a model, which runs in evaluation mode and without gradients meanwhile.

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
    total: int, what: str, texts: Sequence[Tensor] = (), unit: str = "text"
) -> Iterator[tqdm]:
    """Show on a terminal how far `what` is with `texts`, and the time left; nothing elsewhere.

    The clock goes on while a layer of a large model takes minutes.
    """
    tokens = sum(text.numel() for text in texts)
    label = f"{what}, {tokens:,} tokens" if tokens else what
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


def calibrate(model: PreTrainedModel, texts: Sequence[Tensor]) -> dict[str, Tensor]:
    """Run texts, each of shape (1, tokens), through an unpruned model; return `Calibration.norms`.

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
    run_texts(model, texts, "calibration", hooks)
    for name, total in sums.items():
        if not total.isfinite().all():
            raise ValueError(
                f"The calibration text makes {name} produce NaN or infinite activations: use "
                "another dtype, such as dtype=float32, or other text."
            )
    for total in sums.values():
        total[0].sqrt_()
    return sums


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
