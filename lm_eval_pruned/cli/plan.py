"""Print kept width, expansion ratio, parameters and checkpoint bytes at several sizes. Reads only
the config of a model, unless an allocation needs its weights.
"""

from itertools import product

from lm_eval_pruned.cli import model_args as loading
from lm_eval_pruned.pruning.arguments import DECLARED, SEVERAL_SIZES, SIZES, option_row
from lm_eval_pruned.util.options import merged, row


#: What else decides how wide each layer becomes.
_SHARING = [name for name in DECLARED if name not in SIZES]
OPTIONS = (
    loading.MODEL_ARGS,
    [option_row(name, several=True) for name in SEVERAL_SIZES],
    *map(option_row, _SHARING),
    loading.TRUST_REMOTE_CODE,
    row(
        "--format",
        None,
        "form of the output (default: table)",
        choices=("table", "csv", "json"),
        default="table",
    ),
)


def run(arguments) -> None:
    """Print a row for each size."""
    from lm_eval_pruned.checkpoints import planning

    source = planning.SOURCE_ARGUMENTS
    model_args, pruning = loading.read_with_pruning(arguments, _SHARING, source)
    options = {
        name: getattr(arguments, option) for option, name in SEVERAL_SIZES.items()
    }
    options = {name: values for name, values in options.items() if values is not None}
    sizes = merged({n: [pruning.pop(n)] for n in SIZES if n in pruning}, options)
    if not sizes:
        raise ValueError(
            f"No size was given: pass one of --{', --'.join(SEVERAL_SIZES)}."
        )
    model = loading.with_default_model(model_args, weights=False) | pruning
    # Sizes of two kinds are refused by the arguments of pruning, in one sentence.
    first, *others = sizes
    rows = []
    for values in product(*(sizes[name] for name in others)):
        fixed = model | dict(zip(others, values, strict=True))
        rows += planning.plan_rows(argument=first, values=sizes[first], **fixed)
    print(planning.FORMATS[arguments.format](rows), end="")
