"""Width pruning for GLU-MLP models inside EleutherAI's lm-evaluation-harness.

Importing this package imports neither torch nor lm_eval: it runs at every start
of an interpreter in which the package is installed (see ``_autoload``). The
public names are resolved when they are first used.
"""

import os


# In a clone the tasks and the model wrappers lie beside this folder, not in it (setup.cfg maps
# them). A Python started at the root of the clone finds this folder before the installed package.
if not os.path.isdir(os.path.join(__path__[0], "tasks")):
    __path__.append(os.path.dirname(__path__[0]))

TYPE_CHECKING = False
if TYPE_CHECKING:
    from lm_eval_pruned.checkpoints.cost import quality_of
    from lm_eval_pruned.checkpoints.default_model import find_default_model
    from lm_eval_pruned.checkpoints.load import load_pruned
    from lm_eval_pruned.pruning.plan import PrunePlan
    from lm_eval_pruned.pruning.slicing import prune_model

_HOMES = {
    "PrunePlan": "lm_eval_pruned.pruning.plan",
    "find_default_model": "lm_eval_pruned.checkpoints.default_model",
    "load_pruned": "lm_eval_pruned.checkpoints.load",
    "prune_model": "lm_eval_pruned.pruning.slicing",
    "quality_of": "lm_eval_pruned.checkpoints.cost",
}

__all__ = [
    "PrunePlan",
    "find_default_model",
    "load_pruned",
    "prune_model",
    "quality_of",
]


def __getattr__(name: str):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
