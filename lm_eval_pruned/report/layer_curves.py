"""What cutting one layer alone costs, as tables: by layer, criterion and share removed.

The curves are those that ``lm-eval-pruned sensitivity`` and sweeps write as
``sensitivity.json``; here they are plain data, whoever measured them. The zero line is
the criterion ``random``: one that does worse than all its seeds misjudges the layer.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.report.page import Cell, Table
from lm_eval_pruned.results.files import ResultsError, finite_or_none


if TYPE_CHECKING:
    from collections.abc import Mapping

#: The control, whose seeds are the range of chance.
RANDOM = "random"
#: The version of the file's entries that is read here.
VERSION = 1


@dataclass(frozen=True)
class LayerCurves:
    """The curves of one model.

    Attributes:
        model: Folder or Hub name of the model.
        loss: Loss of the unpruned model, in nats per token.
        texts: Number of texts on which it was measured.
        tokens: Number of tokens in them.
        layers: Numbers of the layers, ascending.
        criteria: Names of the criteria without ``random``, in the order of the curves.
        shares: Shares of a layer that were removed, in whole percent, ascending.
        seeds: How many seeds of ``random`` every layer was measured with.
        rises: By (layer, criterion, share), the rise of the loss in nats per token;
            for ``random`` one for each seed.
    """

    model: str
    loss: float
    texts: int
    tokens: int
    layers: tuple[int, ...]
    criteria: tuple[str, ...]
    shares: tuple[int, ...]
    seeds: int
    rises: Mapping[tuple[int, str, int], tuple[float, ...]] = field(repr=False)

    @classmethod
    def of(cls, data: Mapping[str, Any], source: str = "the curves") -> LayerCurves:
        """Take curves from what a ``sensitivity.json`` holds.

        Args:
            data: Its content, which is distrusted.
            source: What messages call it.

        Raises:
            ResultsError: It holds no curves, or damaged ones, or those of a version that
                is not known here.
        """
        if data.get("version") != VERSION:
            raise ResultsError(
                f"{source} has sensitivity curves of version {data.get('version')}, and this "
                f"version of lm-eval-pruned reads {VERSION}: measure them again."
            )
        rises: dict[tuple[int, str, int], list[float]] = defaultdict(list)
        try:
            loss = float(data["loss"])
            for curve in data["curves"]:
                for width, value in zip(curve["widths"], curve["losses"], strict=True):
                    share = round(100 * (1 - width / curve["width_before"]))
                    key = int(curve["layer"]), str(curve["criterion"]), share
                    rises[key].append(float(value) - loss)
            if not rises or any(
                finite_or_none(rise) is None for each in rises.values() for rise in each
            ):
                raise ValueError("no loss, or one that is no number")
            texts, tokens = int(data["texts"]), int(data["tokens"])
        except (KeyError, TypeError, ValueError, ZeroDivisionError) as error:
            raise ResultsError(
                f"{source} holds damaged sensitivity curves ({error}): measure them again."
            ) from None
        by_chance = [len(each) for key, each in rises.items() if key[1] == RANDOM]
        return cls(
            str(data.get("model")),
            loss,
            texts,
            tokens,
            tuple(sorted({layer for layer, _, _ in rises})),
            tuple(dict.fromkeys(name for _, name, _ in rises if name != RANDOM)),
            tuple(sorted({share for _, _, share in rises})),
            min(by_chance, default=0),
            {key: tuple(each) for key, each in rises.items()},
        )

    def rise(self, layer: int, criterion: str, share: int) -> float | None:
        """Return the rise of the loss, the mean over seeds; None where it was not measured."""
        found = self.rises.get((layer, criterion, share))
        return fmean(found) if found else None

    def chance(self, layer: int, share: int) -> tuple[float, float] | None:
        """Return the least and the greatest rise over the seeds of ``random``, if any."""
        found = self.rises.get((layer, RANDOM, share))
        return (min(found), max(found)) if found else None

    def verdict(self, layer: int, criterion: str, share: int) -> str:
        """Return ``worse`` or ``better`` than every seed of ``random``, or nothing.

        With n seeds and a criterion that chooses as chance does, either happens once in
        n + 1 layers.
        """
        rise, chance = (
            self.rise(layer, criterion, share),
            self.chance(layer, share),
        )
        if rise is None or chance is None:
            return ""
        return "worse" if rise > chance[1] else "better" if rise < chance[0] else ""

    def misjudged(self, criterion: str, share: int) -> list[int]:
        """Return the layers in which a criterion does worse than every seed of ``random``."""
        return [
            layer
            for layer in self.layers
            if self.verdict(layer, criterion, share) == "worse"
        ]


def rises_table(curves: LayerCurves, share: int) -> Table:
    """Return the rise of the loss by layer and criterion where `share` percent are removed."""
    rows: list[list[Cell | str]] = []
    for layer in curves.layers:
        row: list[Cell | str] = [str(layer)]
        for criterion in curves.criteria:
            rise = curves.rise(layer, criterion, share)
            verdict = curves.verdict(layer, criterion, share)
            mark = {"worse": " \u25bc", "better": " \u25b2"}.get(verdict, "")
            row.append(Cell("-" if rise is None else f"{rise:+.3f}{mark}", verdict))
        if curves.seeds:
            rise, chance = (
                curves.rise(layer, RANDOM, share),
                curves.chance(layer, share),
            )
            row.append(
                "-"
                if rise is None or chance is None
                else f"{rise:+.3f} [{chance[0]:+.3f}, {chance[1]:+.3f}]"
            )
        rows.append(row)
    columns = ["layer", *curves.criteria]
    if curves.seeds:
        columns.append(f"random, {_seeds(curves.seeds)}")
    return Table(f"Rise of the loss at {share} %", columns, rows)


def explanation(curves: LayerCurves) -> list[str]:
    """Return how the numbers are to be read, and what they show, in sentences."""
    first = (
        "Each number is by how much the loss rises, in nats per token, where one layer alone is "
        f"cut and all others are whole: {curves.loss:.3f} unpruned, on {curves.texts} texts with "
        f"{curves.tokens:,} tokens."
    )
    if not curves.seeds:
        missing = (
            "The criterion random was not measured, so nothing says which layers a criterion "
            "misjudges: add random to --criteria."
        )
        return [first, missing]
    chance = (
        f"The zero line is random with {_seeds(curves.seeds)}: \u25bc worse and \u25b2 better than "
        "every seed. A criterion that chooses as chance does is worse than every seed in one of "
        f"{curves.seeds + 1} layers."
    )
    texts = [first, chance]
    for criterion in curves.criteria:
        parts = []
        for share in curves.shares:
            if layers := curves.misjudged(criterion, share):
                parts.append(f"{_layers(layers)} at {share} %")
        said = f"worse than chance in {'; '.join(parts)}" if parts else "nowhere worse"
        texts.append(f"{criterion}: {said}{'' if parts else ' than chance'}.")
    return texts


def _seeds(number: int) -> str:
    return f"{number} seed{'' if number == 1 else 's'}"


def _layers(numbers: list[int]) -> str:
    """Return such as ``layers 0, 3-5``."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and spans[-1][-1] == number - 1:
            spans[-1] = [spans[-1][0], number]
        else:
            spans.append([number])
    text = ", ".join("-".join(map(str, span)) for span in spans)
    return f"layer{'' if len(numbers) == 1 else 's'} {text}"
