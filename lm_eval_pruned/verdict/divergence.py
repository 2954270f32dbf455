"""KL divergence of a candidate from its base over the whole vocabulary, seen while both score text.

The base's log-probabilities stay in the folder of its unit, so that other candidates meet them there.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from lm_eval_pruned.results.documents import KL
from lm_eval_pruned.results.runs import unit_folder
from lm_eval_pruned.sweeps.plan import Sweep


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval_pruned.sweeps.plan import Configuration, Unit
    from lm_eval_pruned.sweeps.tasks import SweepTask

#: Tasks of text: of the demo, and of a user's file.
DEMO_TEXT, OF_FILE = TEXTS = ("pruned_demo_text", "held_text")
#: Where the configuration in a results file says why there is no divergence.
NOT_MEASURED = "divergence_not_measured"
#: Positions of each text, evenly spaced, at which two models are compared.
POSITIONS = 16
#: The file of a base: of each text its tokens' log-likelihoods, and log-probabilities at `POSITIONS`.
LOG_PROBS = "log_probs.safetensors"


@contextlib.contextmanager
def watched(lm: Any, see: Callable[[torch.Tensor], None]) -> Iterator[None]:
    """Let `lm` score texts one by one, and show the log-probabilities of each.

    `see` gets a tensor of shape (tokens, vocabulary) for each text that fits the model's context.
    """
    score, select = lm._loglikelihood_tokens, lm._select_cont_toks

    def score_one_by_one(requests: list[Any], **_: Any) -> list[Any]:
        alone = {"disable_tqdm": True, "override_bs": 1}
        return [answer for request in requests for answer in score([request], **alone)]

    def select_and_see(logits: torch.Tensor, **where: Any) -> torch.Tensor:
        rows = select(logits, **where)
        see(rows)
        return rows

    lm._loglikelihood_tokens, lm._select_cont_toks = score_one_by_one, select_and_see
    try:
        yield
    finally:
        del lm._loglikelihood_tokens, lm._select_cont_toks


def at_positions(log_probs: torch.Tensor) -> torch.Tensor:
    """Return at most `POSITIONS` rows of a tensor, evenly spaced, as float16 on the CPU."""
    tokens = len(log_probs)
    rows = np.unique(np.linspace(0, tokens - 1, POSITIONS).round().astype(int))
    return log_probs[torch.as_tensor(rows, device=log_probs.device)].half().cpu()


def divergences(base: torch.Tensor, candidate: torch.Tensor) -> torch.Tensor:
    """Return KL(base || candidate) in nats of each row of log-probabilities, shape (rows,).

    Both are float16, whose rounding is taken out by normalising again: equal rows diverge by 0.
    """
    one, other = (rows.float().log_softmax(-1) for rows in (base, candidate))
    # A token that the base never says counts nothing, however unlikely it is.
    return torch.where(one > -torch.inf, one.exp() * (one - other), 0.0).sum(-1)


def add_divergence(results: Any, task: str, per_text: list[list[float]]) -> None:
    """Add the metric `KL` to the harness's results of a task, from the sum and the number of rows of each text."""
    name, _, filtered = KL.partition(",")
    samples = sorted(results["samples"][task], key=lambda row: row["doc_id"])
    for row, pair in zip(samples, per_text, strict=True):
        row[name] = pair
        row["metrics"] = [*row["metrics"], name]
    sums, counts = np.array(per_text).T
    of_task = {KL: float(sums.sum() / counts.sum()), f"{name}_stderr,{filtered}": "N/A"}
    results["results"][task] |= of_task
    results["higher_is_better"][task][name] = False


@dataclass(eq=False)
class WatchingSweep(Sweep):
    """A sweep of one model that sees a candidate's divergence from a `base`, or keeps what that takes.

    Neither is done where nobody asks: `base` is None, and the model's name is not ``base``.
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

    @contextlib.contextmanager
    def observed(
        self, unit: Unit, lm: Any, folder: Path
    ) -> Iterator[Callable[[Any], None]]:
        """Watch a model that scores text; what is yielded adds `KL`, or why it was not measured."""
        task, keeps = unit.task.name, self.base or self.baseline.id == "base"
        if task not in TEXTS or unit.configuration.floor or not keeps:
            yield lambda results: None
            return
        if not isinstance(getattr(lm, "model", None), torch.nn.Module):
            why = "its engine does not show the probabilities of the whole vocabulary"
            yield lambda results: results["config"].update({NOT_MEASURED: why})
            return
        reference, seen = None, list[torch.Tensor]()
        if self.base:
            where = Path(self.base.options["output_path"])
            reference = unit_folder(where, self.base.baseline.id, task) / LOG_PROBS

        def add_to(results: Any) -> None:
            if why := _not_added(results, task, seen, folder, reference):
                results["config"][NOT_MEASURED] = why

        with watched(lm, lambda rows: seen.append(at_positions(rows))):
            yield add_to


def _not_added(
    results: Any,
    task: str,
    seen: list[torch.Tensor],
    folder: Path,
    reference: Path | None,
) -> str:
    """Add the divergence of what was seen to the results, or return why it cannot be measured."""
    if len(seen) != len(results["samples"][task]):
        return "a text is longer than its context, or was answered from a cache"
    if reference is None:
        save_file({str(n): rows for n, rows in enumerate(seen)}, folder / LOG_PROBS)
        add_divergence(results, task, [[0.0, float(len(rows))] for rows in seen])
        return ""
    if not reference.exists():
        return f"{reference} is missing: evaluate the base again in another folder"
    base = load_file(reference)
    shapes = [base[str(n)].shape for n in range(len(base))]
    if shapes != [rows.shape for rows in seen]:
        return "it splits text into other tokens than the base"
    pairs = ((base[str(n)], rows) for n, rows in enumerate(seen))
    sums = [[float(divergences(*pair).sum()), float(len(pair[0]))] for pair in pairs]
    add_divergence(results, task, sums)
    return ""
