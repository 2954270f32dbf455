"""The statistics of `compare` as a script of the harness's, without scipy.

`files/paired_comparison.py` is the script; what it imports from our package is written out
in its place. Distribution functions are its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .inlining import inlined
from .patch import FILES, Patch


if TYPE_CHECKING:
    from pathlib import Path


SCRIPT = "scripts/paired_comparison.py"
TEST = "tests/scripts/test_paired_comparison.py"
#: scipy's functions, and the script's own.
EDITS = {
    "_changed_interval": [
        ("special.betaincinv(", "beta_quantile("),
        ("optimize.brentq(", "root("),
    ],
    "_beta_cdf": [("special.betainc(", "incomplete_beta(")],
}


def write(checkout: Path) -> None:
    """Write the script, its tests and the paragraph in the README."""
    script = inlined(FILES / "paired_comparison.py", EDITS)
    (checkout / SCRIPT).write_text(script, encoding="utf-8")


PATCH = Patch(
    branch="paired-comparison",
    title="A script that compares two runs on the same documents",
    write=write,
    tests=(TEST,),
)
