"""How far 16-bit log-likelihoods lie from float32, with shared prefixes and without.

For each dtype and share of pruned neurons one model is loaded. Four ways score the same
answers with the same weights: its copy in float32, which is the reference; `hf` at batch
size 1; `hf` at a larger batch size; and ``hf-prefix``. The table holds the root mean
square of their differences from the reference, in nats per answer. Two ways of computing
the same thing round in different places, so what sharing may cost is what batching
costs: the run fails where sharing lies more than 1.25 times as far off as `hf` at the
larger batch size.

What all answers begin with is computed once where it is shared, so its rounding is drawn
once for all of them, and where a pass ends changes the draw. Sharing is therefore scored
with the requests in one call, and in two, three and four; its figure is of all four.

    python benchmarks/rounding.py --data FOLDER --limit 4

Without `--data` it scores the demo questions of this package, which need no download.
"""

from __future__ import annotations

import argparse
import copy
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import transformers
from faster import TASKS, tasks
from lm_eval.models.huggingface import HFLM
from reporting import machine, on_the_fast_path, requests_of, root_mean_square

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from lm_eval.api.instance import Instance
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

#: Sharing is scored with the requests in so many calls, because one draw says little.
CALLS = (1, 2, 3, 4)
#: How much further than `hf` in batches sharing may lie from the reference.
LIMIT = 1.25


def distances(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: list[Instance],
    batch_size: int = 8,
) -> dict[str, float]:
    """Measure how far three ways to score with `model` lie from its float32 copy.

    Args:
        model: A causal model, in the dtype to measure.
        tokenizer: Its tokenizer.
        requests: Requests of type ``loglikelihood``.
        batch_size: Of the second way.

    Returns:
        Root mean squares of the differences of log-likelihoods, in nats per request, of
        `hf` at batch size 1, `hf` at `batch_size`, and ``hf-prefix``, in this order.

    Raises:
        RuntimeError: Prefixes were not shared.
    """

    def score(
        cls: type[HFLM], of: PreTrainedModel, size: int | str, calls: int = 1
    ) -> list[float]:
        lm = cls(of, tokenizer=tokenizer, batch_size=size)
        step = -(-len(requests) // calls)
        answers = []
        with on_the_fast_path(lm):
            for begin in range(0, len(requests), step):
                some = requests[begin : begin + step]
                answers += lm.loglikelihood(some, disable_tqdm=True)
        return [value for value, _ in answers]

    reference = score(HFLM, copy.deepcopy(model).float(), batch_size)
    shared = [v for calls in CALLS for v in score(PrefixHFLM, model, "auto", calls)]
    found = {
        f"hf, batch size {size}": root_mean_square(score(HFLM, model, size), reference)
        for size in (1, batch_size)
    }
    return {**found, "hf-prefix": root_mean_square(shared, reference * len(CALLS))}


def main(argv: list[str] | None = None) -> None:
    """Measure and print; exit with a message where sharing lies too far off."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--data", type=Path, help="folder of data under its Hub names")
    parser.add_argument(
        "--task", choices=TASKS, help="default: truthfulqa with --data, else demo"
    )
    parser.add_argument("--limit", type=int, help="documents per task; default: all")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--percents", nargs="+", type=float, default=[0, 40])
    parser.add_argument("--batch-size", type=int, default=8, help="the larger of hf's")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args(argv)
    # They say how tasks are built, and warn of each model that is handed over.
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    pretrained = arguments.pretrained or find_default_model()
    if arguments.data:
        pretrained = str(Path(pretrained).absolute())
        os.chdir(arguments.data)
    task = arguments.task or ("truthfulqa" if arguments.data else "demo")
    asked = requests_of(tasks(task), arguments.limit)
    # TruthfulQA asks for most answers twice.
    requests = list({request.args: request for request in asked}.values())
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)

    rows, worst = [], 0.0
    for dtype in arguments.dtypes:
        for percent in arguments.percents:
            model = load_pruned(
                pretrained,
                prune_percent=percent or None,
                dtype=dtype,
                device=arguments.device,
            )
            found = distances(model, tokenizer, requests, arguments.batch_size)
            _, batched, shared = found.values()
            worst = max(worst, shared / batched)
            figures = (f"{value:.3f}" for value in found.values())
            rows.append((dtype, f"{percent:g}", *figures, f"{shared / batched:.2f}"))
            print(*rows[-1], file=sys.stderr, flush=True)
    print(f"{machine(arguments.device)}\n\n{task}, {len(requests)} answers\n")
    columns = ("dtype", "pruned, %", *found, "hf-prefix / hf in batches")
    print(markdown_table(columns, rows))
    if not worst <= LIMIT:
        raise SystemExit(
            f"\nSharing lies {worst:.2f} times as far from float32 as hf in batches: more than "
            f"{LIMIT}."
        )


if __name__ == "__main__":
    main()
