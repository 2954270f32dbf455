"""Compare generation in refilled slots (``hf-prefix``) with the harness's ``hf``.

Both sides answer the same requests with the same weights in one process, taking
turns; times are those of ``generate_until``, tokenising included. ``hf`` runs at the
fastest of the batch sizes given. The run says how many answers are the same text, and
for each other one how far apart the two likeliest tokens are where the answers part.

    python benchmarks/generation.py --task ifeval --limit 24 --max-gen-toks 128

The stock tasks read their data from the Hub, or from a folder laid out under the
Hub names where `--data` names one.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
from pathlib import Path
from typing import Any

import reporting
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.api.samplers import FirstNSampler
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from reporting import machine, print_profile, spread

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM


#: Answers that part where the likeliest tokens are no further apart are equal but for
#: rounding, in logits by dtype.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.25, torch.bfloat16: 1.0}


class Side(reporting.Side):
    """One model type, and the tokens of its answers."""

    def __init__(self, name: str, lm: HFLM) -> None:
        super().__init__(name, lm)
        #: Tokens of the texts that were generated.
        self.tokens: dict[str, list[int]] = {}
        self._decode = lm.tok_decode
        lm.tok_decode = self._noted

    def _noted(self, tokens: list[int] | int, **kwargs: Any) -> str:
        text = self._decode(tokens, **kwargs)
        # The harness asks for the text of the end-of-text token, too: a number.
        if isinstance(tokens, list):
            self.tokens[text] = tokens
        return text

    def tokens_of(self, answer: str) -> list[int]:
        """Return the tokens that `answer` was cut from."""
        return next(t for text, t in self.tokens.items() if text.startswith(answer))

    def run(self, requests: list[Instance]) -> float:
        """Answer `requests` once; return the seconds that took."""
        self.timed(self.lm.generate_until, requests)
        return self.seconds[-1]


class ContinuousBatchingHFLM(HFLM):
    """HFLM that generates through transformers' own continuous batching."""

    def generate_until(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[str]:
        settings = requests[0].args[1]
        if settings["until"]:
            raise SystemExit("--generate-batch knows no stop strings: use ifeval")
        most = settings["max_gen_toks"]
        config = transformers.GenerationConfig(
            max_new_tokens=most,
            do_sample=False,
            eos_token_id=self.model.generation_config.eos_token_id,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        prompts = [self.tok_encode(request.args[0]) for request in requests]
        before = self.model.config._attn_implementation
        done = self.model.generate_batch(prompts, generation_config=config)
        self.model.set_attn_implementation(before)
        return [self.tok_decode(output.generated_tokens) for output in done.values()]


def requests_of(task: str, lm: HFLM, arguments: argparse.Namespace) -> list[Instance]:
    """Return the requests of a stock task, the generation settings replaced as asked."""
    if task == "uniform":
        # Answers that all run to the end, as those to made-up prompts of one length.
        generator = torch.Generator().manual_seed(0)
        words = torch.randint(
            1000, 20000, (arguments.limit or 32, 40), generator=generator
        )
        prompts = [lm.tok_decode(row) for row in words]
        settings: dict[str, Any] = {"until": ["\0"], "do_sample": False}
    else:
        loaded = TaskManager().load([task])["tasks"][task]
        if arguments.num_fewshot is not None:
            loaded.set_config("num_fewshot", arguments.num_fewshot)
        if arguments.fixed_examples:
            # The sampler that the config names was made with the task.
            loaded.sampler = FirstNSampler(loaded.sampler.df)
        loaded.set_fewshot_seed(1234)
        template = {
            "apply_chat_template": True,
            "chat_template": lm.apply_chat_template,
        }
        loaded.build_all_requests(
            limit=arguments.limit,
            tokenizer_name=lm.tokenizer_name,
            **(template if arguments.chat else {}),
        )
        prompts = [request.args[0] for request in loaded.instances]
        settings = dict(loaded.instances[0].args[1])
    if arguments.max_gen_toks is not None:
        settings["max_gen_toks"] = arguments.max_gen_toks
    return [
        Instance("generate_until", {}, (prompt, settings), index)
        for index, prompt in enumerate(prompts)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--task", required=True, help="a generation task of the harness, or 'uniform'"
    )
    parser.add_argument("--pretrained", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--limit", type=int, help="documents; default: all")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument(
        "--fixed-examples",
        action="store_true",
        help="the same few-shot examples in each prompt",
    )
    parser.add_argument("--chat", action="store_true", help="apply the chat template")
    parser.add_argument("--max-gen-toks", type=int, help="default: the task's")
    parser.add_argument("--repeats", type=int, default=3, help="of both sides each")
    parser.add_argument("--hf-batch-sizes", default="8,32", help="to choose hf's from")
    parser.add_argument(
        "--choose-limit", type=int, help="documents to choose it on; default: --limit"
    )
    parser.add_argument(
        "--generate-batch",
        action="store_true",
        help="run transformers' continuous batching, too; stops at end tokens only",
    )
    parser.add_argument("--batch-size", default="1", help="of hf-prefix")
    parser.add_argument(
        "--slots", type=int, help="of hf-prefix; default: as it chooses"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data", type=Path, help="folder of data under its Hub names")
    parser.add_argument(
        "--profile", action="store_true", help="say where both sides' time goes"
    )
    arguments = parser.parse_args()
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    if arguments.data:
        os.chdir(arguments.data)

    pretrained = arguments.pretrained or find_default_model().pretrained
    model = transformers.AutoModelForCausalLM.from_pretrained(
        pretrained, dtype=getattr(torch, arguments.dtype)
    ).to(arguments.device)
    tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)

    def side(
        name: str, cls: type[HFLM], batch_size: int | str, **settings: Any
    ) -> Side:
        lm = cls(model, tokenizer=tokenizer, batch_size=batch_size, **settings)
        return Side(name, lm)

    batch_size = arguments.batch_size
    batch_size = batch_size if batch_size.startswith("auto") else int(batch_size)
    ours = side("hf-prefix", PrefixHFLM, batch_size, slots=arguments.slots)
    sizes = [int(size) for size in arguments.hf_batch_sizes.split(",")]
    candidates = {size: side(f"hf, batch size {size}", HFLM, size) for size in sizes}
    requests = requests_of(arguments.task, ours.lm, arguments)
    few = requests[: arguments.choose_limit]
    first = {size: candidate.run(few) for size, candidate in candidates.items()}
    hf = candidates[min(first, key=first.__getitem__)]
    if len(few) < len(requests):
        hf.seconds.clear()
    sides = [ours, hf]
    if arguments.generate_batch:
        sides.append(side("generate_batch", ContinuousBatchingHFLM, 1))
    for repeat in range(arguments.repeats):
        for each in sides:
            # What chose hf's batch size is its first repeat where it is of all requests.
            if len(each.seconds) <= repeat:
                each.run(requests)

    print(
        f"task          {arguments.task}, {len(requests)} requests, "
        f"{requests[0].args[1]}"
    )
    print(f"model         {pretrained}, {arguments.dtype}")
    print(f"machine       {machine(arguments.device)}")
    print(
        "hf chosen by  " + ", ".join(f"batch {b}: {s:.2f} s" for b, s in first.items())
    )
    for each in sides:
        print(f"{each.name:22} s    {spread(each.seconds)}")
    for each in sides[1:]:
        ratios = [b / a for a, b in zip(ours.seconds, each.seconds, strict=True)]
        print(f"ratio {each.name} / hf-prefix   {spread(ratios)}")
    print(
        "peak memory   "
        + ", ".join(f"{each.name} {each.peak / 2**20:.0f} MiB" for each in sides)
    )
    tokens = [len(tokens) for tokens in map(ours.tokens_of, ours.answers)]
    print(
        f"answers       {sum(tokens)} tokens, median {statistics.median(tokens):g}, "
        f"most {max(tokens)}"
    )
    pairs = list(zip(requests, ours.answers, hf.answers, strict=True))
    parting = [(r, a, b) for r, a, b in pairs if a != b]
    print(f"same text     {len(pairs) - len(parting)} of {len(pairs)}")
    gaps = [
        gap_where_they_part(hf.lm, r.args[0], ours.tokens_of(a), hf.tokens_of(b))
        for r, a, b in parting
    ]
    if gaps:
        print(
            "gap of logits where the others part  " + " ".join(f"{g:.1e}" for g in gaps)
        )
    tolerance = TOLERANCE[getattr(torch, arguments.dtype)]
    near = sum(gap <= tolerance for gap in gaps)
    print(
        f"near-ties     {near} of {len(gaps)} others part where the two likeliest tokens "
        f"are no more than {tolerance} apart"
    )
    print(
        f"slots         {ours.lm.answer_paths.of('generate_until').slots}, linear layers: "
        f"{ours.lm.get_model_info()['answer_paths']['linear']}"
    )
    if arguments.profile:
        for each in (hf, ours):
            print_profile(lambda each=each: each.run(requests), arguments.device)
            print(f"{each.name} while profiled: {each.seconds[-1]:.2f} s")
    if near < len(gaps):
        raise SystemExit(f"answers part at tokens further apart than {tolerance}")


def gap_where_they_part(
    lm: HFLM, prompt: str, first: list[int], second: list[int]
) -> float:
    """Return how far apart the two likeliest tokens are where two answers part, in logits."""
    context = lm.tok_batch_encode([prompt])[0][0].tolist()
    common = 0
    while common < min(len(first), len(second)) and first[common] == second[common]:
        common += 1
    tokens = torch.tensor([context + first[:common]], device=lm.device)
    top = lm._model_call(tokens)[0, -1].float().topk(2).values
    return float(top[0] - top[1])


if __name__ == "__main__":
    main()
