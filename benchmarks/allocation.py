"""What widths that differ per layer take back of the loss that a uniform cut causes.

Documents of a JSON Lines file are split: every second one is calibration text, and the others
are held out. At each size, every row keeps the same number of neurons, but the one that leaves
layer 0 alone, which keeps more. The table holds the loss on the held documents in nats per
token, the share of the rise by uniform MAW that is taken back, and the p-value of a paired
t-test over documents against uniform MAW.

    python benchmarks/allocation.py --data texts.jsonl

Without `--pretrained` the default model is pruned.
"""

from __future__ import annotations

import argparse

from held_text import add_arguments, losses, print_table, source_of, split_text
from reporting import machine

from lm_eval_pruned import load_pruned


#: Name of a row and its arguments; those that measure losses get the calibration text.
ROWS = {
    "uniform maw": {},
    "uniform act": {"criterion": "act"},
    "uniform best": {"criterion": "best"},
    **{f"random, seed {n}": {"criterion": "random", "seed": n} for n in range(3)},
    "maw, layer 0 left alone": {"skip_layers": 0},
    "global maw": {"allocation": "global"},
    "global act": {"allocation": "global", "criterion": "act"},
    "sensitivity maw": {"allocation": "sensitivity"},
    "sensitivity best": {"allocation": "sensitivity", "criterion": "best"},
}
_NEED_TEXT = ("best", "act", "sensitivity")


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument(
        "--prune_percents", nargs="+", type=int, default=[10, 20, 30, 40, 50]
    )
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS))
    arguments = parser.parse_args(argv)

    load = source_of(arguments)
    with split_text(arguments, load["pretrained"]) as (held, calibration):
        unpruned = losses(load_pruned(**load), held)
        print(f"{machine('cpu')}\n\nunpruned: {unpruned.mean():.3f} nats per token\n")
        for percent in arguments.prune_percents:
            uniform = {**load, "prune_percent": percent}
            rows = {}
            for name in arguments.rows:
                text = {*map(str, ROWS[name].values())} & {*_NEED_TEXT}
                rows[name] = uniform | ROWS[name] | (calibration if text else {})
            print_table(f"{percent} % removed", uniform, rows, held, unpruned)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
