"""What a sweep evaluates beside the model: models that know nothing, and get the score they get."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lm_eval_pruned.results.folder import FLOOR


@dataclass(frozen=True)
class Floor:
    """A model that knows nothing, of one of the types ``constant`` and ``echo``.

    Attributes:
        id: Readable and unique, such as ``floor-echo-equal``.
        arguments: Of the model type.
    """

    id: str
    model: str
    arguments: dict[str, Any]

    def as_dict(self) -> dict[str, Any]:
        """Return what ``sweep.json`` says of it."""
        return {"id": self.id, "model": self.model, "arguments": self.arguments}


def _constant(name: str, answer: str, rule: str) -> Floor:
    arguments = {"answer": answer, "loglikelihood": rule}
    return Floor(f"{FLOOR}{name}-{rule}", "constant", arguments)


#: Each with a text for what is generated and a rule for choices, so that few of them do for any task.
#: Not ``first``: data sets such as TruthfulQA list the right answer first, where no model sees it.
FLOORS = (
    _constant("yes", "Yes", "commonest"),
    _constant("dot", ".", "shortest"),
    _constant("the-the", "the the", "longest"),
    Floor(f"{FLOOR}echo-equal", "echo", {"loglikelihood": "equal"}),
)
