"""``hf-prefix`` beside the harness's ``hf``: the same requests and weights in one process, alternating."""

from __future__ import annotations

import argparse
import logging
import math
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from reporting import Side, comparison, in_turns, mebibytes, profiled

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM


if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


def parser(description: str, sizes: str, batch_size: str) -> argparse.ArgumentParser:
    """Return a parser of what both comparisons are asked for.

    Args:
        description: Of the command.
        sizes: Batch sizes to choose `hf`'s from, by default.
        batch_size: Of ``hf-prefix``, by default.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--pretrained", help="default: SmolLM2-135M-Instruct")
    parser.add_argument("--limit", type=int, help="documents per task; default: all")
    parser.add_argument("--repeats", type=int, default=3, help="of both sides each")
    parser.add_argument("--hf-batch-sizes", default=sizes, help="to choose hf's from")
    parser.add_argument(
        "--choose-limit", type=int, help="documents to choose it on; default: --limit"
    )
    parser.add_argument("--batch-size", default=batch_size, help="of hf-prefix")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--data", type=Path, help="folder of data under its Hub names")
    parser.add_argument(
        "--profile", action="store_true", help="say where both sides' time goes"
    )
    return parser


class BesideHF:
    """Both model types over one model; `hf` is that of the fastest batch size, once `run` has chosen it.

    Args:
        model: A causal model.
        tokenizer: Its tokenizer.
        batch_size: Of ``hf-prefix``.
        hf_batch_sizes: To choose `hf`'s from, smallest first.
        **settings: More arguments of ``hf-prefix``.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_size: int | str,
        hf_batch_sizes: Sequence[int],
        **settings: Any,
    ) -> None:
        def side(name: str, cls: type[HFLM], size: int | str, **settings: Any) -> Side:
            lm = cls(model, tokenizer=tokenizer, batch_size=size, **settings)
            return Side(name, lm)

        self.dtype = model.dtype
        self.ours = side("hf-prefix", PrefixHFLM, batch_size, **settings)
        self.candidates = [
            side(f"hf, batch size {size}", HFLM, size) for size in hf_batch_sizes
        ]
        self.hf = self.candidates[0]

    @classmethod
    def asked(cls, arguments: argparse.Namespace, **settings: Any) -> BesideHF:
        """Load what `arguments`, of `parser`, ask for."""
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        pretrained = arguments.pretrained or find_default_model()
        if arguments.data:
            if Path(pretrained).exists():
                pretrained = str(Path(pretrained).absolute())
            os.chdir(arguments.data)
        model = transformers.AutoModelForCausalLM.from_pretrained(
            pretrained, dtype=getattr(torch, arguments.dtype)
        ).to(arguments.device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)
        size = arguments.batch_size
        size = size if size.startswith("auto") else int(size)
        sizes = sorted(map(int, arguments.hf_batch_sizes.split(",")))
        return cls(model, tokenizer, size, sizes, **settings)

    def run(
        self,
        answer: Callable[[Side, int | None], object],
        limit: int | None,
        few: int | None,
        repeats: int,
        seconds: float = math.inf,
    ) -> str:
        """Choose `hf`'s batch size, and have both sides answer alternately.

        Args:
            answer: Has a side answer the requests of so many documents; None: of all.
            limit: How many.
            few: How many to choose the batch size on.
            repeats: Of both sides.
            seconds: After which no larger batch size is tried.

        Returns:
            Times and memory, as Markdown.

        Raises:
            RuntimeError: `hf` is out of memory at its smallest batch size.
        """
        tried, said = {}, []
        until = time.perf_counter() + seconds
        for side in self.candidates:
            try:
                answer(side, few)
            except torch.OutOfMemoryError:
                said.append(f"{side.name}, out of memory")
                break
            on_cpu = side.lm.device.type == "cpu"
            tried[side] = (side.cpu_seconds if on_cpu else side.seconds).pop()
            said.append(f"{side.name}, {tried[side]:.2f} s")
            side.clear()
            slower = tried[side] > 1.2 * min(tried.values())
            if slower or time.perf_counter() > until:
                break
        if not tried:
            raise RuntimeError(said[0])
        self.hf = min(tried, key=tried.__getitem__)
        sides = (self.ours, self.hf)
        for side in in_turns(sides, repeats):
            answer(side, limit)
        figures = {
            side.name: {"seconds": side.seconds, "CPU seconds": side.cpu_seconds}
            for side in sides
        }
        first = "; ".join(f"{each.name} {each.seconds[0]:.3g}" for each in sides)
        peaks = "; ".join(f"{each.name} {mebibytes(each.peak)}" for each in sides)
        return (
            f"Chosen from: {'; '.join(said)}.\n\n{comparison(figures)}\n\n"
            f"First run, s: {first}. Peak memory, MiB: {peaks}."
        )


def print_profiles(both: BesideHF, answer: Callable[[Side], object]) -> None:
    """Print the operations that take longest on either side."""
    for side in (both.hf, both.ours):
        place = side.lm.device.type
        with profiled(side.lm.device) as profile:
            answer(side)
        by = f"self_{place}_time_total"
        averages = profile.key_averages()
        print(averages.table(sort_by=by, row_limit=20, max_name_column_width=40))
        print(f"{side.name} while profiled: {side.seconds[-1]:.2f} s")
