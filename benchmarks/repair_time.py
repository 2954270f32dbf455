"""What one layer of `recipe=best` takes, at any shape, and by arithmetic the whole model.

    OMP_NUM_THREADS=1 python benchmarks/repair_time.py
    OMP_NUM_THREADS=1 python benchmarks/repair_time.py --hidden 4096 --intermediate 14336 --layers 32

A Llama of one layer with random weights is cut with the calibration text of the package, and one
of two layers tells what the pass with gradients takes for a layer, and besides for the head. The
tokens are those of SmolLM2. Seconds are those of the processor, which take longer beside other
work: a product of 1,024 tokens and 4,096 neurons in float32 says how much.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import torch
from reporting import machine
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.pruning import moments, repair
from lm_eval_pruned.pruning.arguments import OWN_TEXT
from lm_eval_pruned.pruning.calibration_text import TextSource
from lm_eval_pruned.pruning.curvature import curvature, enough
from lm_eval_pruned.pruning.layouts import find_glu_mlps
from lm_eval_pruned.pruning.moments import TextMoments


if TYPE_CHECKING:
    from collections.abc import Callable


def time_calls(owner: Any, name: str, part: str, seconds: Counter[str]) -> None:
    """Have each call of a function add to what a part of the work takes."""
    function: Callable[..., Any] = getattr(owner, name)

    def timed(*positional, **named) -> Any:
        start = time.process_time()
        result = function(*positional, **named)
        seconds[part] += time.process_time() - start
        return result

    setattr(owner, name, timed)


def main() -> None:
    """Print seconds of each part, for one layer and for all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--intermediate", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--prune_percent", type=int, default=40)
    options = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(find_default_model())

    def made(layers: int) -> Any:
        config = LlamaConfig(
            hidden_size=options.hidden,
            intermediate_size=options.intermediate,
            num_attention_heads=options.heads,
            num_key_value_heads=max(1, options.heads // 4),
            num_hidden_layers=layers,
            vocab_size=options.vocabulary,
            tie_word_embeddings=True,
        )
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config, dtype=options.dtype)

    seconds: Counter[str] = Counter()
    curved = []
    for layers in (2, 1):
        model, start = made(layers), time.process_time()
        texts = TextSource(str(OWN_TEXT)).read(model, tokenizer).tokens
        mlps = find_glu_mlps(model)
        few = enough(texts, mlps)
        roots = curvature(model, few, mlps).roots
        curved.append(time.process_time() - start)
    head = 2 * curved[1] - curved[0]
    time_calls(moments.Moments, "add", "sums over tokens", seconds)
    time_calls(repair, "regularised", "order", seconds)
    time_calls(repair, "weighted", "order", seconds)
    time_calls(repair, "order_by_cost", "order", seconds)
    time_calls(repair, "repaired", "repair", seconds)
    (mlp,), start = mlps, time.process_time()
    width = mlp.width - mlp.width * options.prune_percent // 100
    repair.cut_layer_by_layer(
        TextMoments(model, texts),
        mlps,
        {mlp.name: width},
        {},
        roots,
        "least_squares",
        lambda *_: None,
    )
    rest = time.process_time() - start - sum(seconds.values())
    seconds["forward pass"] = rest
    seconds["pass with gradients"] = curved[0] - curved[1]
    once = head
    x = torch.randn(1024, 4096)
    start = time.process_time()
    _ = x.T @ x
    product = time.process_time() - start
    print(f"# {machine('cpu')}")
    print(f"# {sum(t.numel() for t in texts)} tokens, {sum(t.numel() for t in few)}")
    print("part,seconds a layer")
    for part, value in seconds.items():
        print(f"{part},{value:.1f}")
    whole = options.layers * sum(seconds.values()) + once
    print(f"once for all layers,{once:.1f}")
    print(f"all of {options.layers} layers,{whole:.0f}")
    print(f"the product,{product:.2f}")


if __name__ == "__main__":
    main()
