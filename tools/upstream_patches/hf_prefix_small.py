"""Equal contexts computed once, and nothing else: the version that is read in ten minutes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .patch import Patch, copy, describe, register


if TYPE_CHECKING:
    from pathlib import Path

MODULE = "lm_eval/models/hf_shared_context.py"
TEST = "tests/models/test_hf_shared_context.py"


def write(root: Path) -> None:
    """Add the module, its test, the name of the model type and a section of the README."""
    copy(MODULE, root)
    copy(TEST, root)
    register(
        root, "hf-shared-context", "lm_eval.models.hf_shared_context:SharedContextHFLM"
    )
    describe(root, "hf_shared_context.md")


PATCH = Patch(
    branch="hf-shared-context",
    title="feat(models): hf-shared-context computes equal contexts once",
    write=write,
    tests=(TEST,),
)
