"""``hf-prefix`` beside the harness's ``hf``: the same requests and weights, in one process, by turns."""

from __future__ import annotations

import argparse
import logging
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from lm_eval.models.huggingface import HFLM
from reporting import Side, comparison, in_turns, machine, mebibytes

from lm_eval_pruned.checkpoints.default_model import find_default_model
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM


if TYPE_CHECKING:
    from collections.abc import Callable


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
        arguments: Of `parser`.
        **settings: More arguments of ``hf-prefix``.
    """

    def __init__(self, arguments: argparse.Namespace, **settings: Any) -> None:
        logging.getLogger("lm_eval").setLevel(logging.WARNING)
        pretrained = arguments.pretrained or find_default_model().pretrained
        if arguments.data:
            if Path(pretrained).exists():
                pretrained = str(Path(pretrained).absolute())
            os.chdir(arguments.data)
        self.arguments = arguments
        self.dtype = getattr(torch, arguments.dtype)
        self.model = transformers.AutoModelForCausalLM.from_pretrained(
            pretrained, dtype=self.dtype
        ).to(arguments.device)
        tokenizer = transformers.AutoTokenizer.from_pretrained(pretrained)

        def side(name: str, cls: type[HFLM], size: int | str, **settings: Any) -> Side:
            lm = cls(self.model, tokenizer=tokenizer, batch_size=size, **settings)
            return Side(name, lm)

        size = arguments.batch_size
        size = size if size.startswith("auto") else int(size)
        self.ours = side("hf-prefix", PrefixHFLM, size, **settings)
        self.candidates = [
            side(f"hf, batch size {size}", HFLM, int(size))
            for size in arguments.hf_batch_sizes.split(",")
        ]
        self.hf = self.candidates[0]

    def run(self, answer: Callable[[Side, int | None], object]) -> None:
        """Choose `hf`'s batch size, have both sides answer by turns, and print times and memory.

        Args:
            answer: Has a side answer the requests of so many documents.
        """
        of = self.arguments
        for candidate in self.candidates:
            answer(candidate, of.choose_limit or of.limit)
        on_cpu = of.device == "cpu"

        def first(side: Side) -> float:
            return (side.cpu_seconds if on_cpu else side.seconds)[0]

        self.hf = min(self.candidates, key=first)
        chosen = ", ".join(
            f"{each.name} {first(each):.2f} s" for each in self.candidates
        )
        for figures in (self.hf.seconds, self.hf.cpu_seconds):
            figures.clear()
        self.hf.peak = 0
        sides = (self.ours, self.hf)
        for side in in_turns(sides, of.repeats):
            answer(side, of.limit)
        print(f"{machine(of.device)}, {of.dtype}\n\nChosen from: {chosen}.\n")
        figures = {
            side.name: {"seconds": side.seconds, "CPU seconds": side.cpu_seconds}
            for side in sides
        }
        print(comparison(figures), end="\n\n")
        peaks = ", ".join(f"{each.name} {mebibytes(each.peak)}" for each in sides)
        print(f"Peak memory, MiB: {peaks}.")
        if of.profile:
            for side in (self.hf, self.ours):
                self._profile(side, answer)

    def _profile(
        self, side: Side, answer: Callable[[Side, int | None], object]
    ) -> None:
        place = torch.device(self.arguments.device).type
        kinds = {torch.profiler.ProfilerActivity.CPU}
        kinds.add(getattr(torch.profiler.ProfilerActivity, place.upper()))
        with torch.profiler.profile(activities=kinds) as profile:
            answer(side, self.arguments.limit)
        averages = profile.key_averages()
        by = f"self_{place}_time_total"
        print(averages.table(sort_by=by, row_limit=20, max_name_column_width=40))
        print(f"{side.name} while profiled: {side.seconds[-1]:.2f} s")
