"""What prefix sharing and slot refilling are built on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .answer_paths import AnswerPaths
from .token_counts import TokenCounts


if TYPE_CHECKING:
    # The mixins' neighbour among the bases, whose attributes they use.
    from lm_eval.models.huggingface import HFLM as _Neighbour
else:
    _Neighbour = object


class FastPathMixin(_Neighbour):
    """Keeps what a model worked on, and which way its answers were computed.

    It comes before `HFLM` among the bases, behind all mixins that are built on it.

    Attributes:
        token_counts: Totals since the model was loaded. Of what `HFLM` computes itself the
            prompts of scored requests alone; a class that measures more adds it.
        answer_paths: How many requests took which path, and why.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.token_counts = TokenCounts()
        self.answer_paths = AnswerPaths()
        super().__init__(*args, **kwargs)

    def get_model_info(self) -> dict[str, Any]:
        """Return `HFLM`'s model information and what answered, under ``answer_paths``."""
        info = super().get_model_info()
        return {**info, "answer_paths": self.answer_paths.as_dict(self.model)}
