"""Depth: which decoder layers of a model stay, as pure data.

Leaving out whole layers is the control for narrowing all of them: both take parameters
away, and a table at equal parameters says what each of them costs. A count drops the
layers before the last one, which is what a model bears best of all places (Gromov et al.
2024, arXiv 2403.17887), or those of least block influence (Men et al. 2024, arXiv
2403.03853); a list drops any layers. How a model loses them is in
`lm_eval_pruned.pruning.dropping`, the influence in `lm_eval_pruned.pruning.measuring`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lm_eval_pruned.pruning.argument_values import written_layers


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from lm_eval_pruned.pruning.arguments import PruneArguments


@dataclass(frozen=True)
class Depth:
    """Which layers stay.

    Attributes:
        before: Number of layers of the unpruned model.
        kept: Numbers of those that stay, ascending, as the unpruned model counts them.
            The layer ``kept[i]`` becomes layer i.
        asked: What the user asked for, as ``{argument: value}``.
        influence: Block influence of each layer of the unpruned model, where it decided.
        measured_on: Name, SHA-256, texts and tokens of the text of `influence`.

    Example:
        >>> from lm_eval_pruned.pruning.arguments import PruneArguments
        >>> Depth.of(PruneArguments(drop_layers=2), 6).kept
        (0, 1, 2, 5)
    """

    before: int
    kept: tuple[int, ...]
    asked: dict[str, str]
    influence: tuple[float, ...] | None = None
    measured_on: Mapping[str, Any] | None = None

    @classmethod
    def of(
        cls,
        arguments: PruneArguments,
        layers: int,
        influence: Sequence[float] | None = None,
        measured_on: Mapping[str, Any] | None = None,
    ) -> Depth | None:
        """Resolve the user's arguments against a model's layers.

        Args:
            arguments: The arguments.
            layers: Number of layers of the model.
            influence: Block influence of each, where `arguments` choose by it. Without it
                layers are chosen by their place, so that their number can be checked.
            measured_on: The text behind it.

        Returns:
            None where all layers stay.

        Raises:
            ValueError: A layer does not exist, or none would stay.
        """
        asked: Any = arguments.drop_layers
        if asked is None:
            return None
        counted = isinstance(asked, int)
        written = str(asked) if counted else written_layers(asked)
        said = {"drop_layers": written if counted else f"[{written}]"}
        dropped = asked
        if counted:
            if arguments.measures_depth:
                said["drop_by"] = arguments.drop_by
            order = list(range(layers - 2, -1, -1))
            if influence is not None:
                # Of layers alike, the later goes.
                order = sorted(range(layers), key=lambda n: (influence[n], -n))
            dropped = order[:asked]
        elif asked[-1] >= layers:
            raise ValueError(
                f"drop_layers={written} names layer {asked[-1]}, but the layers of this model are "
                f"0-{layers - 1}."
            )
        if (asked if counted else len(asked)) >= layers:
            instead = "leave out at least one of them"
            if counted:
                most = f"a number from 1 to {layers - 1}"
                instead = f"pass {most if layers > 1 else 'a model of more layers'}"
            raise ValueError(
                f"drop_layers={written} leaves none of the {layers} layers of this model: {instead}."
            )
        kept = tuple(n for n in range(layers) if n not in dropped)
        decided = None if influence is None else tuple(influence)
        return cls(layers, kept, said, decided, measured_on)

    @property
    def dropped(self) -> tuple[int, ...]:
        """Numbers of the layers that go, ascending."""
        return tuple(n for n in range(self.before) if n not in self.kept)

    def as_dict(self) -> dict[str, Any]:
        """Return what the results file holds (JSON types only)."""
        found: dict[str, Any] = {
            "layers_before": self.before,
            "layers_dropped": written_layers(self.dropped),
            "layers_kept": written_layers(self.kept),
        }
        if self.influence is not None:
            found["block_influence"] = {
                str(n): round(value, 8) for n, value in enumerate(self.influence)
            }
        if self.measured_on is not None:
            found["influence_measured_on"] = dict(self.measured_on)
        return found
