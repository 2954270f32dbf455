"""What becomes of a load that narrows a checkpoint while it is read.

It goes through, the route is declined and the model pruned in memory, the checkpoint has
other widths than its config says, or it fails with one sentence that says why.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, TypeVar

from lm_eval_pruned.checkpoints.damage import clear_load_errors


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from lm_eval_pruned.checkpoints.request import LoadRequest
    from lm_eval_pruned.checkpoints.session import Session

Result = TypeVar("Result")


#: Why a class that goes past the session is pruned in memory.
OWN_WAY = "its model class loads checkpoints in its own way"


class RouteDeclined(Exception):
    """The checkpoint cannot be pruned while it loads; nothing was read yet."""


class WidthsDiffer(Exception):
    """The layers of the checkpoint differ in width; nothing was read yet."""

    def __init__(self, actual: dict[str, int]):
        super().__init__(str(actual))
        self.actual = actual


def with_stored_widths(
    request: LoadRequest, read: Callable[[LoadRequest], Result]
) -> Result:
    """Return what `read` makes of `request`; anew if the checkpoint has other widths."""
    try:
        return read(request)
    except WidthsDiffer as found:
        return read(request.with_widths(found.actual))


@contextlib.contextmanager
def clear_errors(session: Session, request: LoadRequest) -> Iterator[None]:
    """Turn what escapes from a load into one sentence, or into `session.declined`."""
    try:
        yield
    except RouteDeclined as reason:
        session.declined = str(reason)
    except WidthsDiffer:
        raise
    except Exception as error:
        if (
            session.error is None
            and not session.opened
            and isinstance(error, RuntimeError)
        ):
            # A class with a loader of its own went past the session and met narrow shapes.
            session.declined = OWN_WAY
            return
        with clear_load_errors(request.pretrained, request.model_arguments):
            if session.error is not None:
                raise session.error from None
            raise
    else:
        if session.error is not None:
            raise session.error
