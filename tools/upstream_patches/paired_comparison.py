"""The statistics of `compare` as a script of the harness's, without scipy.

`files/scripts/paired_comparison.py` is the script; what it imports from our package is written out
in its place. Distribution functions are its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .inlining import inlined
from .merge import Rules
from .patch import FILES, Patch, copy, replace_once


if TYPE_CHECKING:
    from pathlib import Path


SCRIPT = "scripts/paired_comparison.py"
TEST = "tests/scripts/test_paired_comparison.py"
#: scipy's functions, and the script's own.
RULES = {
    "mcnemar": Rules(
        change={
            "return optimize.brentq(": "return root(",
            "            xtol=1e-13,\n": "",
        }
    )
}
#: Where the paragraph goes: between saved results and what draws them.
BEFORE = "## Visualizing Results\n"
README = """\
### Comparing Two Runs

To see whether two models differ by more than chance, evaluate both with `--log_samples` and `--output_path`, then:

```bash
python scripts/paired_comparison.py results_of_base results_of_other
```

Documents are paired by their `doc_hash`: McNemar's mid-p test for metrics that are right or wrong, a paired t test for others, with confidence intervals and p values that are adjusted over the tasks.

"""


def write(checkout: Path) -> None:
    """Write the script, its tests and the paragraph in the README."""
    script = inlined(FILES / SCRIPT, RULES)
    (checkout / SCRIPT).write_text(script, encoding="utf-8")
    copy(TEST, checkout)
    replace_once(checkout / "README.md", BEFORE, README + BEFORE)


PATCH = Patch(
    branch="paired-comparison",
    title="feat(scripts): compare two runs on the same documents",
    write=write,
    tests=(TEST,),
)
