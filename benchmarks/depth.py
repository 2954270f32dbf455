"""Width against depth: losses of narrow and of shallow models of as many parameters.

At each number of layers left out, every other row is narrowed to the expansion ratio that
`lm-eval-pruned plan` gives for as many parameters. The table holds the loss on held documents
in nats per token, the share of the rise by uniform MAW that is taken back, and the p-value of a
paired t-test over documents against uniform MAW.

    python benchmarks/depth.py --data texts.jsonl

Without `--pretrained` the default model is pruned.
"""

from __future__ import annotations

import argparse

from held_text import add_arguments, losses, print_table, source_of, split_text
from reporting import machine

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.planning import SOURCE_ARGUMENTS, plan_rows


#: Name of a row, its arguments, and whether it looks at text.
WIDTHS = {
    "width, maw": ({}, False),
    "width, l2": ({"criterion": "l2"}, False),
    "width, act": ({"criterion": "act"}, True),
    **{
        f"width, random, seed {n}": ({"criterion": "random", "seed": n}, False)
        for n in range(3)
    },
    "width, maw by sensitivity": ({"allocation": "sensitivity"}, True),
    "width, best by sensitivity": (
        {"allocation": "sensitivity", "criterion": "best"},
        True,
    ),
}
DEPTHS = {
    "depth, last but one first": ({}, False),
    "depth, block influence": ({"drop_by": "block_influence"}, True),
}


def main(argv: list[str] | None = None) -> int:
    """Run the benchmark; return its exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_arguments(parser)
    parser.add_argument("--drop_layers", nargs="+", type=int, default=[2, 4, 6, 8])
    rows = WIDTHS | DEPTHS
    parser.add_argument("--rows", nargs="+", choices=rows, default=list(rows))
    arguments = parser.parse_args(argv)

    load = source_of(arguments)
    source = {k: load[k] for k in ("pretrained", *SOURCE_ARGUMENTS) if k in load}
    plan = plan_rows(argument="drop_layers", values=arguments.drop_layers, **source)
    with split_text(arguments, load["pretrained"]) as (held, calibration):
        unpruned = losses(load_pruned(**load), held)
        print(f"{machine('cpu')}\n\nunpruned: {unpruned.mean():.3f} nats per token\n")
        for number, planned in zip(arguments.drop_layers, plan, strict=True):
            uniform = {**load, "ratio": planned.equal_ratio}
            shallow = {**load, "drop_layers": number}
            asked = {}
            for name in arguments.rows:
                more, text = rows[name]
                size = shallow if name in DEPTHS else uniform
                asked[name] = size | more | (calibration if text else {})
            title = f"{number} layers, or a ratio of {planned.equal_ratio}"
            print_table(title, uniform, asked, held, unpruned)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
