"""CPU seconds that the texts of scored requests take to become tokens: hf, hf-prefix, and its next model.

    python benchmarks/tokenising.py --data DATA --limit 200

``mmlu_like`` has questions with four answers of one letter each behind about 800 tokens of examples.
The model is a tiny one that is never run; the tokenizer is that of ``--tokenizer``. Tokens are compared.
The task data come from the Hub, or from a folder laid out under the Hub names where `--data` names one.
"""

from __future__ import annotations

import argparse
import logging
import os
import time
from typing import Any

from lm_eval.models.huggingface import HFLM
from loglikelihood import BOOLQ, tasks
from reporting import comparison, in_turns, machine, requests_of
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.model_wrappers.batching.tokenising import KeptTokens
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM


MMLU_LIKE = BOOLQ | {
    "task": "mmlu_like",
    "num_fewshot": 4,
    "doc_to_choice": ["A", "B", "C", "D"],
    "fewshot_config": {"sampler": "first_n"},
}
SIDES = {"hf": HFLM, "hf-prefix": PrefixHFLM, "hf-prefix, next model": PrefixHFLM}


def main() -> None:
    """Measure and print; exit with a message where the tokens differ."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokenizer", help="default: SmolLM2-135M-Instruct's")
    parser.add_argument("--data", help="folder laid out under the Hub names")
    parser.add_argument("--limit", type=int, help="documents per task; default: all")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    name = arguments.tokenizer or find_default_model().pretrained
    tokenizer = AutoTokenizer.from_pretrained(name)
    if arguments.data:
        os.chdir(arguments.data)
    logging.disable(logging.WARNING)
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1}
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **sizes)
    model = LlamaForCausalLM(config)
    print(machine("cpu"), end="\n\n")
    given = {"boolq": tasks("boolq"), "truthfulqa": tasks("truthfulqa")}
    for task, asked in {**given, "mmlu_like": [MMLU_LIKE]}.items():
        requests = requests_of(asked, arguments.limit)
        seconds: dict[str, list[float]] = {side: [] for side in SIDES}
        tokens: dict[str, Any] = {}
        for side in in_turns(list(SIDES), arguments.repeats):
            lm = SIDES[side](model, tokenizer=tokenizer, device="cpu", max_length=2048)
            lm._loglikelihood_tokens = lambda found, **_: found
            if side == "hf-prefix":
                KeptTokens._latest = None
            elif side != "hf":
                lm.loglikelihood(requests, disable_tqdm=True)
            start = time.process_time()
            tokens[side] = lm.loglikelihood(requests, disable_tqdm=True)
            seconds[side].append(time.process_time() - start)
        mean = sum(len(context) for _, context, _ in tokens["hf"]) / len(requests)
        print(f"{task}: {len(requests)} requests, contexts of {mean:.0f} tokens\n")
        columns = {s: {"CPU seconds": each} for s, each in seconds.items()}
        print(comparison(columns), end="\n\n")
        if any(each != tokens["hf"] for each in tokens.values()):
            raise SystemExit(f"{task}: tokens differ")


if __name__ == "__main__":
    main()
