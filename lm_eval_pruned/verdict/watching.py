"""The sweep of one model of a verdict, which is watched while it scores text and writes answers."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lm_eval_pruned.model_wrappers.batching.attention_support import is_encoder_decoder
from lm_eval_pruned.results.runs import unit_folder
from lm_eval_pruned.sweeps.plan import Sweep
from lm_eval_pruned.verdict.divergence import NOT_MEASURED, TEXTS, observed_text
from lm_eval_pruned.verdict.written import WRITTEN, observed_writing


if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from lm_eval_pruned.sweeps.plan import Configuration, Unit
    from lm_eval_pruned.sweeps.tasks import SweepTask


@dataclass(eq=False)
class WatchingSweep(Sweep):
    """A sweep of one model that sees a candidate's divergence from a `base`, or keeps what that takes.

    Neither is done where nobody asks: `base` is None, and the model's name is not ``base``. Answers of the
    task `WRITTEN` are written as the model is served.
    """

    base: Sweep | None = None

    def definition(
        self, configuration: Configuration, task: SweepTask
    ) -> dict[str, Any]:
        """Return everything that decides a unit's scores, the base of a divergence included."""
        definition = super().definition(configuration, task)
        if self.base and task.name in TEXTS:
            definition["base"] = self.base.model_definition(self.base.baseline)
        return definition

    def observed(
        self, unit: Unit, lm: Any, folder: Path
    ) -> AbstractContextManager[Callable[[Any], None]]:
        """Watch a model; what is yielded adds what was seen to the results, or why nothing was."""
        task = unit.task.name
        scores_text = task in TEXTS and (self.base or self.baseline.id == "base")
        if unit.configuration.floor or not (scores_text or task == WRITTEN):
            return super().observed(unit, lm, folder)
        why = ""
        if not isinstance(getattr(lm, "model", None), torch.nn.Module):
            why = "its engine does not show the probabilities of the whole vocabulary"
        elif is_encoder_decoder(lm):
            why = "it is an encoder-decoder model"
        if why:
            return nullcontext(
                lambda results: results["config"].update({NOT_MEASURED: why})
            )
        if task == WRITTEN:
            templated = bool(self.options.get("apply_chat_template"))
            return observed_writing(lm, templated=templated)
        reference = None
        if self.base:
            where = Path(self.base.options["output_path"])
            reference = unit_folder(where, self.base.baseline.id, task)
        return observed_text(lm, task, folder, reference)
