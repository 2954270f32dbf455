"""Compare generation in refilled slots (``hf-prefix``) with the harness's ``hf``.

Both sides answer the same requests with the same weights in one process, taking
turns; times are those of ``generate_until``, tokenising included. ``hf`` runs at the
fastest of the batch sizes given. The run says how many answers are the same text, and
for each other one how far apart the two likeliest tokens are where the answers part; it
fails where that is more than rounding explains.

    python benchmarks/generation.py --task ifeval --limit 24 --max-gen-toks 128

The stock tasks read their data from the Hub, or from a folder laid out under the
Hub names where `--data` names one. The task uniform needs no data.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from beside_hf import BesideHF, parser, print_profiles
from lm_eval.api.instance import Instance
from reporting import LOGITS, agreement, gap_where_they_part, machine, requests_of


if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM
    from reporting import Side


def uniform(lm: HFLM, documents: int, max_gen_toks: int | None) -> list[Instance]:
    """Return made-up prompts of one length, whose answers all run to the end."""
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(len(lm.tokenizer) // 2, (documents, 40), generator=generator)
    settings = {
        "until": ["\0"],
        "do_sample": False,
        "max_gen_toks": max_gen_toks or 256,
    }
    return [
        Instance("generate_until", {}, (lm.tok_decode(row), settings), index)
        for index, row in enumerate(words)
    ]


def main(argv: list[str] | None = None) -> None:
    """Compare and print; exit with a message where the sides differ."""
    reader = parser(__doc__, sizes="8,32", batch_size="1")
    reader.add_argument(
        "--task", required=True, help="a generation task of the harness, or 'uniform'"
    )
    reader.add_argument("--num-fewshot", type=int)
    reader.add_argument(
        "--fixed-examples",
        action="store_true",
        help="the same few-shot examples in each prompt",
    )
    reader.add_argument("--chat", action="store_true", help="apply the chat template")
    reader.add_argument("--max-gen-toks", type=int, help="default: the task's")
    reader.add_argument("--slots", type=int, help="of hf-prefix; default: it chooses")
    arguments = reader.parse_args(argv)
    both = BesideHF.asked(arguments, slots=arguments.slots)
    if arguments.task == "uniform":
        requests = uniform(both.ours.lm, arguments.limit or 32, arguments.max_gen_toks)
    else:
        requests = requests_of(
            [arguments.task],
            arguments.limit,
            chat=both.ours.lm if arguments.chat else None,
            num_fewshot=arguments.num_fewshot,
            fixed_examples=arguments.fixed_examples,
            max_gen_toks=arguments.max_gen_toks,
        )

    def generate(side: Side, limit: int | None) -> None:
        side.timed(side.lm.generate_until, requests[:limit])

    print(f"{machine(arguments.device)}, {arguments.dtype}\n")
    few = arguments.choose_limit or arguments.limit
    print(both.run(generate, arguments.limit, few, arguments.repeats), end="\n\n")
    ours, hf = both.ours.answers, both.hf.answers
    # The text is encoded anew: it was cut at a stop string.
    lengths = [len(both.hf.lm.tok_encode(text)) for text in ours]
    print(
        f"{len(requests)} requests: {agreement(ours, hf)}; {sum(lengths)} tokens, median "
        f"{statistics.median(lengths):g}, most {max(lengths)}; "
        f"{both.ours.lm.answer_paths.of('generate_until').slots} slots."
    )
    gaps = [
        gap_where_they_part(both.hf.lm, request.args[0], a, b)
        for request, a, b in zip(requests, ours, hf, strict=True)
        if a != b
    ]
    if gaps:
        shown = " ".join(f"{gap:.1e}" for gap in gaps)
        print(f"Logit gap where the others diverge: {shown}")
    if arguments.profile:
        print_profiles(both, lambda side: generate(side, arguments.limit))
    if max(gaps, default=0) > LOGITS[both.dtype]:
        raise SystemExit(f"answers diverge at gaps of more than {LOGITS[both.dtype]}")


if __name__ == "__main__":
    main()
