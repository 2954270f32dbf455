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
        tests: The test files that the patch adds, as paths below the root of the checkout. They
            must pass on the branch.
        mends: Whether one of them must fail without the patch, as for the mending of a defect.
    """

    branch: str
    title: str
    write: Callable[[Path], None]
    tests: tuple[str, ...] = ()
    mends: bool = False


def replace_once(file: Path, old: str, new: str) -> None:
    """Replace a text that a file of the checkout holds exactly once.

    Raises:
        ValueError: It does not hold it, or holds it more than once: the patch has to be looked at.
    """
    text = file.read_text(encoding="utf-8")
    if text.count(old) != 1:
        raise ValueError(
            f"{file.name} holds {text.count(old)} times what is to be replaced: {old!r}"
        )
    file.write_text(text.replace(old, new), encoding="utf-8")


def copy(name: str, root: Path) -> None:
    """Copy a file of `FILES` to the same place of a checkout."""
    target = root / name
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_bytes((FILES / name).read_bytes())


def register(root: Path, name: str, place: str) -> None:
    """Add a model type to the harness's list, behind the other variants of ``hf``."""
    after = '    "huggingface": "lm_eval.models.huggingface:HFLM",\n'
    models = root / "lm_eval" / "models" / "__init__.py"
    replace_once(models, after, f'    "{name}": "{place}",\n{after}')


def describe(root: Path, name: str) -> None:
    """Put a section of `FILES` into the README, before the one on steered models."""
    after = "### Steered Hugging Face `transformers` models\n"
    section = (FILES / name).read_text(encoding="utf-8")
    replace_once(root / "README.md", after, f"{section}\n{after}")
