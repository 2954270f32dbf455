"""Everything that needs a CUDA card, in one command and one Markdown report.

    sh benchmarks/gpu_check.sh

writes ``docs/measurements/gpu-CARD.md``: whether the fast paths answer as `hf` does, what
pruning on load takes in time and memory, how fast prefix sharing and slot refilling are
beside `hf`, and what odd widths cost in time and energy. Models have random weights in
the shapes of Llama-3.2-1B and Llama-3.1-8B, so nothing is downloaded.

Each section runs in a process of its own: one that fails is reported with its error, the
others still run, and the exit code is 1. A section that this machine cannot run is
reported as skipped, with the reason.

Without a card, ``--device cpu --tiny`` runs the same code on a shape of a few thousand
weights. It shows that the script works, and measures nothing.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import gc
import json
import logging
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import generation
import loglikelihood
import psutil
import rounding
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from prune_on_load import LLAMA_3_2_1B
from reporting import Side, on_the_fast_path, peak_memory, synchronise
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedTokenizerFast,
)

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.energy.meter import CodecarbonMeter
from lm_eval_pruned.energy.monitor import EnergyMonitor
from lm_eval_pruned.model_wrappers.hf_prefix import PrefixHFLM
from lm_eval_pruned.profiling import measure as profiling, report as profile_report
from lm_eval_pruned.util.atomic import appearing_whole, write_atomically
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ROOT = Path(__file__).resolve().parents[1]
DTYPE = torch.bfloat16
PERCENT = 40
LLAMA_3_1_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "tie_word_embeddings": False,
}


@dataclass(frozen=True)
class Scale:
    """How much is asked of a model.

    Attributes:
        shapes: Config of each model, by name.
        preamble: Tokens that all questions begin with, as few-shot examples.
        questions: Questions, of four answers each.
        prompts: Prompts to go on from.
        new_tokens: Most tokens of an answer.
        batch_sizes: Of both sides.
        repeats: Of everything, after one that is not counted.
    """

    shapes: dict[str, dict[str, Any]]
    preamble: int
    questions: int
    prompts: int
    new_tokens: int
    batch_sizes: tuple[int, ...]
    repeats: int


FULL = Scale(
    shapes={"1B": LLAMA_3_2_1B, "8B": LLAMA_3_1_8B},
    preamble=256,
    questions=64,
    prompts=96,
    new_tokens=128,
    batch_sizes=(1, 8, 32),
    repeats=3,
)
SMALL = Scale(
    shapes={
        # 40 % pruned it keeps an odd width, too.
        "tiny": {
            "hidden_size": 64,
            "intermediate_size": 171,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "vocab_size": 300,
            "tie_word_embeddings": False,
        }
    },
    preamble=24,
    questions=6,
    prompts=8,
    new_tokens=32,
    batch_sizes=(1, 4),
    repeats=1,
)


class Skipped(Exception):
    """A section cannot run here; the message says why."""


class Check:
    """The sections, for one device, scale, and folder for checkpoints."""

    def __init__(self, device: str, scale: Scale, folder: Path) -> None:
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        if self.on_cuda:
            torch.cuda.set_device(self.device.index or 0)
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.scale = scale
        self.folder = folder

    def sections(self) -> dict[str, Callable[[], Iterator[str]]]:
        """Return what yields each section's Markdown, by heading."""
        found: dict[str, Callable[[], Iterator[str]]] = {
            "Tests marked gpu": self.tests,
            "Answers equal to those of hf": self.equality,
            "Memory while loading, layout by layout": self.layouts,
        }
        for shape in self.scale.shapes:
            found |= {
                f"{heading}, {shape}": partial(section, shape)
                for heading, section in (
                    ("Prune on load", self.loading),
                    ("Log-likelihood", self.likelihood),
                    ("Generation", self.generation),
                    ("Widths and energy", self.widths),
                )
            }
        return found

    def tests(self) -> Iterator[str]:
        """Run the test suite's part for a card."""
        return self._run("-m", "pytest", "-q", "-m", "gpu", "-rfEs", "tests")

    def layouts(self) -> Iterator[str]:
        """Bound the memory of loading, for each way to store gate, up and down."""
        return self._run("benchmarks/load_memory.py", "--device", str(self.device))

    def _run(self, *command: str) -> Iterator[str]:
        """Run another command of the repository that is about a card."""
        if not self.on_cuda:
            raise Skipped("this needs a CUDA device")
        run = subprocess.run(
            [sys.executable, *command],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        lines = run.stdout.strip().splitlines()
        yield "```\n" + "\n".join(lines[-40:]) + "\n```"
        if run.returncode:
            last = (run.stderr.strip().splitlines() or [""])[-1]
            raise RuntimeError(f"exit code {run.returncode}. {last}")

    def equality(self) -> Iterator[str]:
        """Compare answers in float32 and in `DTYPE`; what differs has to be rounding."""
        shape = next(iter(self.scale.shapes))
        self._need(shape, bytes_per_weight=12)
        tokenizer = word_tokenizer(self.scale.shapes[shape]["vocab_size"])
        prompts = self._prompts(until="\0")[:24]
        model = self._random_model(shape, torch.float32)
        rows = _in_float32(model, tokenizer, self._questions(), prompts)
        rows += _in_16_bits(model, tokenizer, self._questions(), prompts)
        yield markdown_table(
            ("what", "measured", "limit"),
            [(what, f"{value:.2g}", f"{limit:.2g}") for what, value, limit in rows],
        )
        for what, value, limit in rows:
            if not value <= limit:
                raise RuntimeError(f"{what}: {value:.2g} exceeds {limit:.2g}")

    def loading(self, shape: str) -> Iterator[str]:
        """Time three ways to load, and bound the memory of pruning on load."""
        self._need(shape, bytes_per_weight=4)
        folder = self._checkpoint(shape)
        arguments = {"dtype": DTYPE, "device_map": {"": str(self.device)}}

        def whole() -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(folder, **arguments)

        def pruned_on_load() -> PreTrainedModel:
            return load_pruned(str(folder), prune_percent=PERCENT, **arguments)

        def pruned_afterwards() -> PreTrainedModel:
            model = whole()
            prune_model(model, prune_percent=PERCENT)
            return model

        ways = {
            "whole, transformers": whole,
            f"pruned on load, {PERCENT} %": pruned_on_load,
            f"whole, then pruned, {PERCENT} %": pruned_afterwards,
        }
        sides = {name: _Load(load, self.device) for name, load in ways.items()}
        for _ in range(1 + self.scale.repeats):
            for side in sides.values():
                side.run()
        config = self.scale.shapes[shape]
        layer = 3 * config["hidden_size"] * config["intermediate_size"] * DTYPE.itemsize
        yield markdown_table(
            ("way", "s", "model, MiB", "peak above the model, MiB"),
            [
                (
                    name,
                    spread(side.seconds[1:]),
                    mebibytes(side.model),
                    mebibytes(side.peak - side.model),
                )
                for name, side in sides.items()
            ],
        )
        yield (
            f"Memory is {self._memory}. The three projections of one layer at full width take "
            f"{mebibytes(layer)} MiB. The file was read before, so it comes from the page cache "
            "where that holds it."
        )
        ours = sides[f"pruned on load, {PERCENT} %"]
        if self.on_cuda and ours.peak > ours.model + layer:
            raise RuntimeError(
                "pruning on load took more than the pruned model and one layer: "
                f"{mebibytes(ours.peak)} MiB"
            )

    def likelihood(self, shape: str) -> Iterator[str]:
        """Time prefix sharing against `hf`."""
        yield from self._compare(
            shape,
            self._questions(),
            "loglikelihood",
            f"{self.scale.questions} questions of 4 answers behind {self.scale.preamble} tokens "
            "that all begin with.",
        )

    def generation(self, shape: str) -> Iterator[str]:
        """Time slots against `hf`."""
        yield from self._compare(
            shape,
            self._prompts(until="77"),
            "generate_until",
            f"{self.scale.prompts} prompts of 16 to 64 tokens; answers of at most "
            f"{self.scale.new_tokens} tokens end where a stop string appears.",
        )

    def widths(self, shape: str) -> Iterator[str]:
        """Profile the model whole, at an odd width, and at the next multiple of 64."""
        self._need(shape, bytes_per_weight=6)
        folder = self._checkpoint(shape)
        config = self.scale.shapes[shape]
        width = config["intermediate_size"]
        kept = width - width * PERCENT // 100
        request = profiling.ProfileRequest(
            str(folder),
            # The kept width is rounded up from it.
            ratios=(f"{(kept - 0.5) / config['hidden_size']:.4f}",),
            multiple_of=(1, 64),
            batch_sizes=self.scale.batch_sizes[:2],
            max_new_tokens=self.scale.new_tokens // 2,
            repeats=self.scale.repeats,
            device=str(self.device),
            dtype=_name(DTYPE),
        )
        prompts = [prompt.args[0] for prompt in self._prompts(until="\0")[:16]]
        found = profiling.profile(
            request, prompts, monitor=EnergyMonitor(CodecarbonMeter())
        )
        joules = [cell["joules"]["both"]["gpu"] for cell in found["cells"]]
        # Texts of random weights do not end, so natural length says the same once more.
        fixed = [cell for cell in found["cells"] if cell["mode"] == "fixed"]
        text = profile_report.as_markdown({**found, "cells": fixed})
        # The first line names a temporary folder.
        text = text.split("\n", 1)[1].strip()
        yield re.sub("^##", "###", text, flags=re.MULTILINE)
        source = (found["energy"]["sources"] or {}).get("gpu")
        if self.on_cuda and (
            source is None or source["kind"] != "measured" or not all(joules)
        ):
            raise RuntimeError(f"the card's energy was not measured: {source}")

    def _compare(
        self, shape: str, requests: list[Instance], method: str, what: str
    ) -> Iterator[str]:
        self._need(shape, bytes_per_weight=4)
        model = self._random_model(shape, DTYPE)
        tokenizer = word_tokenizer(self.scale.shapes[shape]["vocab_size"])

        def side(cls: type[HFLM], size: int | str) -> Side:
            return Side(cls.__name__, cls(model, tokenizer=tokenizer, batch_size=size))

        pairs = {
            size: (side(HFLM, size), side(PrefixHFLM, size))
            for size in self.scale.batch_sizes
        }
        auto = side(PrefixHFLM, "auto")
        sides = [*(side for pair in pairs.values() for side in pair), auto]
        for _ in range(1 + self.scale.repeats):
            for each in sides:
                with on_the_fast_path(each.lm):
                    each.timed(getattr(each.lm, method), requests, disable_tqdm=True)
        for each in sides:
            # The first run compiles, chooses kernels, and checks the fast path.
            del each.seconds[0]

        def row(name: Any, hf: Side, ours: Side) -> tuple[Any, ...]:
            ratios = [a / b for a, b in zip(hf.seconds, ours.seconds, strict=True)]
            if method == "loglikelihood":
                difference = rounding.root_mean_square(
                    *([value for value, _ in one.answers] for one in (ours, hf))
                )
                agreement = f"{difference:.2g} nats"
            else:
                same = sum(
                    a == b for a, b in zip(ours.answers, hf.answers, strict=True)
                )
                agreement = f"{same} of {len(requests)} texts"
            return (
                *(name, spread(hf.seconds), spread(ours.seconds), spread(ratios)),
                *(mebibytes(hf.peak), mebibytes(ours.peak), agreement),
            )

        fastest = min(pairs, key=lambda size: sorted(pairs[size][0].seconds))
        rows = [row(size, *pair) for size, pair in pairs.items()]
        rows.append(row(f"{fastest}, hf-prefix auto", pairs[fastest][0], auto))
        yield (
            f"{what} {_name(DTYPE)}, {self.scale.repeats} repeats, the "
            "sides taking turns, after one that does not count."
        )
        yield markdown_table(
            (
                *("batch size", "hf, s", "hf-prefix, s", "hf / hf-prefix"),
                *("hf, MiB", "hf-prefix, MiB", "difference or same"),
            ),
            rows,
        )
        yield f"Memory is {self._memory}, weights included."

    @property
    def _memory(self) -> str:
        if self.on_cuda:
            return "the most that torch had allocated on the card"
        return "the most that was resident in the process"

    def _need(self, shape: str, bytes_per_weight: int) -> None:
        """Raise Skipped where the weights, and a third more, do not fit."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self._config(shape))
        need = model.num_parameters() * bytes_per_weight * 4 // 3
        free = (
            torch.cuda.mem_get_info(self.device)[0]
            if self.on_cuda
            else psutil.virtual_memory().available
        )
        if free < need:
            raise Skipped(
                f"it needs about {need / 2**30:.0f} GiB of memory on {self.device.type}, and "
                f"{free / 2**30:.0f} GiB are free"
            )

    def _config(self, shape: str) -> LlamaConfig:
        return LlamaConfig(
            **self.scale.shapes[shape],
            max_position_embeddings=4096,
            bos_token_id=1,
            eos_token_id=2,
            pad_token_id=0,
        )

    def _random_model(self, shape: str, dtype: torch.dtype) -> PreTrainedModel:
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(
                self._config(shape), dtype=dtype
            ).eval()

    def _checkpoint(self, shape: str) -> Path:
        """Return the folder of a checkpoint, written at the first use."""
        folder = self.folder / shape
        if not folder.exists():
            model = self._random_model(shape, DTYPE)
            size = model.get_memory_footprint()
            self.folder.mkdir(parents=True, exist_ok=True)
            free = psutil.disk_usage(str(self.folder)).free
            if free < size:
                raise Skipped(
                    f"its checkpoint takes {size / 2**30:.0f} GiB, and {self.folder} has "
                    f"{free / 2**30:.0f} GiB left: name another place by --folder"
                )
            with appearing_whole(folder) as unfinished:
                model.save_pretrained(unfinished)
                word_tokenizer(model.config.vocab_size).save_pretrained(unfinished)
            del model
            release(self.device)
        return folder

    def _words(self, count: int, generator: torch.Generator) -> str:
        vocabulary = next(iter(self.scale.shapes.values()))["vocab_size"]
        numbers = torch.randint(3, vocabulary, (count,), generator=generator)
        return " ".join(f"w{number}" for number in numbers.tolist())

    def _questions(self) -> list[Instance]:
        generator = torch.Generator().manual_seed(0)
        preamble = self._words(self.scale.preamble, generator)
        requests = []
        for _ in range(self.scale.questions):
            question = f"{preamble} {self._words(24, generator)}"
            for _ in range(4):
                arguments = (question, f" {self._words(8, generator)}")
                requests.append(Instance("loglikelihood", {}, arguments, len(requests)))
        return requests

    def _prompts(self, until: str) -> list[Instance]:
        generator = torch.Generator().manual_seed(1)
        settings = {
            "until": [until],
            "do_sample": False,
            "max_gen_toks": self.scale.new_tokens,
        }
        lengths = torch.randint(
            16, 65, (self.scale.prompts,), generator=generator
        ).tolist()
        return [
            Instance(
                "generate_until", {}, (self._words(length, generator), settings), index
            )
            for index, length in enumerate(lengths)
        ]


class _Load:
    """One way to load a model: its times in seconds, and bytes."""

    def __init__(
        self, load: Callable[[], PreTrainedModel], device: torch.device
    ) -> None:
        self.load = load
        self.device = device
        self.seconds: list[float] = []
        self.model = 0
        self.peak = 0

    def run(self) -> None:
        release(self.device)
        before = (
            torch.cuda.memory_allocated(self.device)
            if self.device.type == "cuda"
            else psutil.Process().memory_info().rss
        )
        with peak_memory(self.device) as peaks:
            begin = time.perf_counter()
            model = self.load()
            synchronise(self.device)
            self.seconds.append(time.perf_counter() - begin)
        self.model = model.get_memory_footprint()
        self.peak = max(self.peak, max(peaks) - before)


def _in_float32(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Instance],
    prompts: list[Instance],
) -> list[tuple[str, float, float]]:
    """Return what differs between `hf` and ``hf-prefix``, how much, and how much it may."""
    hf = HFLM(model, tokenizer=tokenizer, batch_size=8)
    ours = PrefixHFLM(model, tokenizer=tokenizer, batch_size=8)
    with on_the_fast_path(ours):
        got = ours.loglikelihood(questions, disable_tqdm=True)
    pairs = list(zip(got, hf.loglikelihood(questions, disable_tqdm=True), strict=True))
    with on_the_fast_path(ours):
        texts = ours.generate_until(prompts, disable_tqdm=True)
    gaps = [
        generation.gap_where_they_part(
            hf, prompt.args[0], tokenizer.encode(a), tokenizer.encode(b)
        )
        for prompt, a, b in zip(
            prompts,
            texts,
            hf.generate_until(prompts, disable_tqdm=True),
            strict=True,
        )
        if a != b
    ]
    return [
        (
            "float32, prefix sharing: largest difference, nats per answer",
            max(abs(a - b) for (a, _), (b, _) in pairs),
            loglikelihood.TOLERANCE[torch.float32],
        ),
        (
            (
                f"float32, slots, {len(gaps)} of {len(prompts)} texts differ: largest gap of "
                "two logits where they part"
            ),
            max(gaps, default=0),
            generation.TOLERANCE[torch.float32],
        ),
    ]


def _in_16_bits(
    reference: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: list[Instance],
    prompts: list[Instance],
) -> list[tuple[str, float, float]]:
    """Return how far ``hf-prefix`` lies from float32, and how far it may.

    `reference` is left with weights that are rounded to `DTYPE`.
    """
    model = copy.deepcopy(reference).to(DTYPE)
    reference.load_state_dict(model.state_dict())
    found = rounding.distances(model, tokenizer, questions)
    _, batched, shared = found.values()
    ours = PrefixHFLM(model, tokenizer=tokenizer, batch_size=8)
    with on_the_fast_path(ours):
        texts = ours.generate_until(prompts, disable_tqdm=True)
    regret = error = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        context, answer = map(tokenizer.encode, (prompt.args[0], text))
        if not answer:
            continue
        tokens = torch.tensor([context + answer], device=reference.device)
        with torch.inference_mode():
            exact, rounded = (
                one(tokens).logits[0, len(context) - 1 : -1].float()
                for one in (reference, model)
            )
        chosen = exact.gather(1, tokens[0, len(context) :, None])
        regret = max(regret, float((exact.amax(1, keepdim=True) - chosen).max()))
        error = max(error, float((exact - rounded).abs().max()))
    figures = ", ".join(f"{name} {value:.3f}" for name, value in found.items())
    return [
        (
            (
                f"{_name(DTYPE)}, prefix sharing: distance from float32, relative to hf in batches "
                f"({figures} nats)"
            ),
            shared / batched,
            rounding.LIMIT,
        ),
        (
            (
                f"{_name(DTYPE)}, slots: how far a chosen token lies below float32's likeliest, in "
                "logits (limit: twice the most that rounding changes a logit)"
            ),
            regret,
            2 * error,
        ),
    ]


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer of the words w0, w1, ...: text and tokens say the same."""
    words = {f"w{number}": number for number in range(vocabulary)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = dict.fromkeys(("eos_token", "pad_token"), "w2")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def release(device: torch.device) -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def spread(values: list[float]) -> str:
    """Return minimum / median / maximum."""
    three = min(values), statistics.median(values), max(values)
    return " / ".join(f"{value:.3g}" for value in three)


def mebibytes(size: float) -> str:
    """Return a number of bytes in MiB."""
    return f"{size / 2**20:,.0f}"


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def run_section(section: Callable[[], Iterator[str]]) -> tuple[str, str]:
    """Return ``passed``, ``failed`` or ``skipped``, and Markdown, with the reason in it."""
    chunks = []
    try:
        chunks += section()
    except Skipped as reason:
        return "skipped", f"Skipped: {reason}."
    except Exception as error:  # noqa: BLE001 - the other sections are still wanted
        traceback.print_exc()
        chunks.append(f"**Failed**: {type(error).__name__}: {error}")
        return "failed", "\n\n".join(chunks)
    return "passed", "\n\n".join(chunks)


def run_apart(heading: str, options: list[str]) -> tuple[str, str]:
    """Return what `run_section` says of a section in a process of its own.

    A device error leaves a process that can do no more with the card.
    """
    with tempfile.TemporaryDirectory() as folder:
        outcome = Path(folder, "outcome.json")
        run = subprocess.run(
            [
                *(sys.executable, __file__, *options),
                *("--section", heading, "--outcome", str(outcome)),
            ],
            check=False,
        )
        if not outcome.exists():
            return "failed", f"**Failed**: its process ended with {run.returncode}."
        status, text = json.loads(outcome.read_text(encoding="utf-8"))
        return status, text


def card(device: torch.device) -> str:
    """Return the name of the device."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return device.type


def environment(device: torch.device) -> dict[str, str]:
    """Return what the figures depend on."""
    found = {"card": card(device)}
    if device.type == "cuda":
        import pynvml

        properties = torch.cuda.get_device_properties(device)
        found["card"] += (
            f", {properties.total_memory / 2**30:.0f} GiB, compute capability "
            f"{properties.major}.{properties.minor}"
        )
        pynvml.nvmlInit()
        found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        found["CUDA of torch"] = str(torch.version.cuda)
    found["processor"] = platform.processor() or platform.machine()
    for package in ("torch", "transformers", "lm_eval", "lm-eval-pruned"):
        found[package] = version(package)
    return found


def write_report(
    file: Path,
    facts: dict[str, str],
    outcomes: dict[str, tuple[str, str]],
) -> None:
    """Write what there is so far."""
    chunks = [
        f"# GPU check: {facts['card'].split(',')[0]}",
        markdown_table(("", ""), list(facts.items()), "ll"),
        markdown_table(
            ("section", "result"),
            [(heading, status) for heading, (status, _) in outcomes.items()],
            "ll",
        ),
    ]
    for heading, (_, text) in outcomes.items():
        chunks += [f"## {heading}", text]
    write_atomically(file, "\n\n".join(chunks) + "\n")


def main(argv: list[str] | None = None) -> int:
    """Run the sections and write the report; return the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--tiny", action="store_true", help="small shapes, to try the script itself"
    )
    parser.add_argument(
        "--output", type=Path, help="default: docs/measurements/gpu-CARD.md"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        help="for the checkpoints, about 20 GB; default: a temporary one",
    )
    parser.add_argument(
        "--in-process",
        action="store_true",
        help="run all sections in one process, which starts faster",
    )
    parser.add_argument("--section", help=argparse.SUPPRESS)
    parser.add_argument("--outcome", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.device.startswith("cuda") and not torch.cuda.is_available():
        parser.error(
            f"--device {arguments.device}: torch finds no CUDA device here. "
            "--device cpu --tiny tries the script without one."
        )
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    # It warns of each model that is handed over.
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    scale = SMALL if arguments.tiny else FULL
    if arguments.section is not None:
        check = Check(arguments.device, scale, arguments.folder)
        outcome = run_section(check.sections()[arguments.section])
        write_atomically(arguments.outcome, json.dumps(outcome))
        return 0

    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        check = Check(arguments.device, scale, folder)
        options = ["--device", arguments.device, *["--tiny"] * arguments.tiny]
        facts = environment(check.device)
        facts["command"] = f"`sh benchmarks/gpu_check.sh {' '.join(options)}`"
        facts["date"] = datetime.date.today().isoformat()
        slug = re.sub(r"[^a-z0-9]+", "-", card(check.device).lower()).strip("-")
        output = arguments.output or ROOT / "docs" / "measurements" / f"gpu-{slug}.md"
        outcomes = {}
        for heading, section in check.sections().items():
            print(f"{heading} ...", flush=True)
            outcomes[heading] = (
                run_section(section)
                if arguments.in_process
                else run_apart(heading, [*options, "--folder", str(folder)])
            )
            release(check.device)
            print(f"{heading}: {outcomes[heading][0]}", flush=True)
            write_report(output, facts, outcomes)
    print(f"The report is in {output}.")
    return int(any(status == "failed" for status, _ in outcomes.values()))


if __name__ == "__main__":
    raise SystemExit(main())
