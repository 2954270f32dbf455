"""What a profile is asked for, and the models that it comes to."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS, plan_rows
from lm_eval_pruned.pruning.argument_values import written_source
from lm_eval_pruned.pruning.arguments import PruneArguments


if TYPE_CHECKING:
    from collections.abc import Iterator

    from lm_eval_pruned.pruning.arguments import Number

logger = logging.getLogger("lm_eval.pruned.profiling")


@dataclass(frozen=True)
class ProfileRequest:
    """What to measure.

    Attributes:
        pretrained: Folder or Hub name of the unpruned model.
        ratios: Expansion ratios to measure beside the unpruned model.
        prune_percents: Shares of neurons to remove, for one more model each.
        widths: Files with the width of each layer, as
            `lm_eval_pruned.pruning.argument_values` reads them, for one more model each.
        multiple_of: Each size is measured at its widths rounded down to each of these.
        batch_sizes: Prompts per batch.
        max_new_tokens: Output tokens of the fixed length, and most of the natural one.
        repeats: How often everything is measured.
        seed: Seed of torch and of the criterion ``random``.
        criterion: Importance score; see `lm_eval_pruned.pruning.criteria`.
        device: Where the models run.
        dtype: Weight dtype; None keeps the checkpoint's.
        apply_chat_template: Whether prompts are wrapped as a user's turn.
        load_arguments: Anything else `lm_eval_pruned.load_pruned` takes.
    """

    pretrained: str
    ratios: tuple[Number, ...] = ()
    prune_percents: tuple[Number, ...] = ()
    widths: tuple[str, ...] = ()
    multiple_of: tuple[int, ...] = (1,)
    batch_sizes: tuple[int, ...] = (1,)
    max_new_tokens: int = 50
    repeats: int = 5
    seed: int = 0
    criterion: str = PruneArguments.criterion
    device: str = "cpu"
    dtype: str | None = None
    apply_chat_template: bool = False
    load_arguments: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ValueError for a number that is out of range, and where no size is named."""
        if not (self.ratios or self.prune_percents or self.widths):
            raise ValueError(
                "No size was given to measure beside the unpruned model: pass ratios, "
                "prune_percents or widths."
            )
        for name, least in (("max_new_tokens", 2), ("repeats", 1)):
            if getattr(self, name) < least:
                raise ValueError(
                    f"{name}={getattr(self, name)} measures nothing: pass at least {least}."
                )
        for size in self.batch_sizes:
            if size < 1:
                raise ValueError(f"batch_sizes={size} is no batch: pass at least 1.")

    def source(self) -> dict[str, Any]:
        """Return the arguments that say where config and tokenizer come from."""
        return {k: v for k, v in self.load_arguments.items() if k in SOURCE_ARGUMENTS}


@dataclass
class ProfiledModel:
    """One model of the profile.

    Attributes:
        name: ``baseline`` or such as ``ratio=2.4 multiple_of=64``.
        asked: Arguments of `load_pruned` that make it; empty for the baseline.
        intermediate_size: Kept width, in neurons; the mean where the layers differ.
        expansion_ratio: Kept width / hidden size.
        parameters: Number of parameters; tied ones count once.
        model_bytes: Weights and buffers in memory, in bytes; None before it was loaded.
        layer_widths: Kept width of each layer, such as ``0:1200,1-29:900``; empty where
            all are alike.
    """

    name: str
    asked: dict[str, Any]
    intermediate_size: int | float
    expansion_ratio: float
    parameters: int
    model_bytes: int | None = None
    layer_widths: str = ""


def plan_models(request: ProfileRequest) -> list[ProfiledModel]:
    """Resolve the sizes to widths, without reading weights; the baseline comes first.

    Sizes that come to the widths of one before them are left out, with a line in the log.

    Raises:
        ValueError: A size or multiple is out of range.
        UnsupportedModelError: The model cannot be pruned.
        OSError: The config cannot be read.
    """
    models: dict[tuple[float, str], ProfiledModel] = {}
    for name, argument, value, multiple in _sizes(request):
        asked = {argument: value, "multiple_of": multiple}
        given = {"multiple_of": multiple, **request.source()}
        (row,) = plan_rows(request.pretrained, argument, [value], **given)
        # A file may give all layers one width.
        by_layer = row.layer_widths if "," in row.layer_widths else ""
        widths = (row.intermediate_size, by_layer)
        if widths in models:
            logger.info(
                "%s has the width of %s, %s: it is measured once.",
                *(name, models[widths].name, by_layer or row.intermediate_size),
            )
            continue
        models[widths] = ProfiledModel(
            name,
            asked if models else {},
            row.intermediate_size,
            row.expansion_ratio,
            row.parameters,
            layer_widths=by_layer,
        )
    return list(models.values())


def _sizes(request: ProfileRequest) -> Iterator[tuple[str, str, Any, int]]:
    """Yield name, argument, its value and the multiple of each model."""
    yield "baseline", "prune_percent", 0, 1
    files = [written_source(file) for file in request.widths]
    named: list[tuple[str, str, Any]] = [("ratio", str(r), r) for r in request.ratios]
    named += [("prune_percent", str(p), p) for p in request.prune_percents]
    for name, file in zip(files, request.widths, strict=True):
        # Files in different folders may have one name.
        named.append(("widths", name if files.count(name) == 1 else str(file), file))
    for argument, written, value in named:
        for multiple in request.multiple_of:
            rounded = f" multiple_of={multiple}" if multiple != 1 else ""
            yield f"{argument}={written}{rounded}", argument, value, multiple
