"""What a patch for lm-evaluation-harness is to `tools/upstream.py`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable


#: The root of our repository, from which patches are written.
ROOT = Path(__file__).resolve().parents[2]
#: What exists for the harness alone, and cannot be made from sources of ours.
FILES = Path(__file__).resolve().parent / "files"


@dataclass(frozen=True)
class Patch:
    """One branch of a checkout of the harness, which becomes one pull request.

    Attributes:
        branch: Its name, such as ``logits-cache-right-aligned``; also what ``--patches`` takes.
        title: Subject of the commit, and title of the pull request.
        write: Writes the patch into a checkout, given its root. Files that it adds, changes or
            removes are committed as they are then; raises ValueError, with a sentence for
            whoever typed the command, if the checkout is not what the patch was made for.
        tests: Tests of the harness's that the patch adds or changes, as paths below the root of the
            checkout: run on the branch, where they must pass. All other offline tests
            run before and after.
    """

    branch: str
    title: str
    write: Callable[[Path], None]
    tests: tuple[str, ...] = ()
