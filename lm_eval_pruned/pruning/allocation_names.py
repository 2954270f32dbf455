"""Names of allocations, without anything that computes one; see `lm_eval_pruned.pruning.allocation`.

``uniform`` cuts every layer alike. The others keep as many neurons in all, but not the same
number in every layer. Nothing here imports numpy or torch.
"""

from __future__ import annotations

from lm_eval_pruned.pruning.criteria import declared_elsewhere


#: Every layer alike.
UNIFORM = "uniform"
#: Allocations that go by the loss on calibration text with one layer cut at a time.
MEASURED = ("sensitivity",)
#: One ranking of the neurons of all layers, by standardised scores.
GLOBAL = "global"
#: Entry-point group under which other packages declare allocations, name -> function;
#: ``docs/allocation.md`` shows how.
GROUP = "lm_eval_pruned.allocations"


def canonical_allocation(allocation: str) -> str:
    """Return the name of an allocation.

    Raises:
        ValueError: It is unknown; the message lists the known ones.
    """
    own = (UNIFORM, *MEASURED, GLOBAL)
    added = () if allocation in own else declared_elsewhere(GROUP)
    if allocation not in (*own, *added):
        known = ", ".join([*own, *sorted(added)])
        raise ValueError(f"allocation={allocation} is unknown: pass one of {known}.")
    return allocation
