"""The parts of ``gpu_check.py``; each runs in a separate process, and nothing else touches the card."""

from __future__ import annotations

import argparse
import gc
import json
import logging
import sys
import time
import traceback
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, NamedTuple

import gpu_cards
import psutil
import reporting
import rounding
import torch
from beside_hf import BesideHF
from gpu_check import SKIPPED
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from prune_on_load import LLAMA_3_2_1B
from reporting import Side, in_turns, mebibytes, on_the_fast_path, spread
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.attention import SDPBackend
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast

from lm_eval_pruned import load_pruned, prune_model
from lm_eval_pruned.checkpoints.export import export_pruned
from lm_eval_pruned.healing.options import Budget, HealingOptions
from lm_eval_pruned.healing.training import Training
from lm_eval_pruned.model_wrappers.batching.forward import kernel_of_shared_keys
from lm_eval_pruned.util.atomic import appearing_whole
from lm_eval_pruned.util.tables import markdown_table


if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from transformers import PreTrainedModel

PERCENT = 40
OF_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32}
OF_8B |= {"head_dim": 128, "tie_word_embeddings": False}
TINY = {"hidden_size": 64, "intermediate_size": 171, "num_hidden_layers": 2}
TINY |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
SHAPES: dict[str, dict[str, Any]] = {
    "1B": LLAMA_3_2_1B,
    "8B": {**LLAMA_3_2_1B, **OF_8B},
    "tiny": {**TINY, "vocab_size": 300},
}
#: Seconds after which no larger batch size of `hf` is tried.
CHOOSING = 40


class Scale(NamedTuple):
    """Tokens that all questions begin with, questions, prompts, tokens of an answer, and repeats."""

    preamble: int
    questions: int
    prompts: int
    new_tokens: int
    repeats: int


QUICK, FULL = Scale(256, 32, 32, 64, 2), Scale(256, 64, 96, 128, 5)
REHEARSAL = Scale(24, 6, 8, 32, 1)


class Skipped(Exception):
    """A part cannot run here; the message says why."""


class Parts:
    """What `gpu_check` runs, one method at a time; each yields Markdown."""

    def __init__(self, device: str, scale: Scale, shape: str, folder: Path) -> None:
        self.device = torch.device(device)
        self.on_cuda = self.device.type == "cuda"
        self.scale = scale
        self.folder = folder / shape
        self.values = SHAPES.get(shape, {})
        old = self.on_cuda and torch.cuda.get_device_capability(self.device) < (8, 0)
        self.dtype = torch.float16 if old else torch.bfloat16

    def facts(self) -> Iterator[str]:
        """Say what the figures depend on, as JSON."""
        found = {"card": self.device.type, "dtype": _name(self.dtype)}
        if self.on_cuda:
            import pynvml

            pynvml.nvmlInit()
            card = torch.cuda.get_device_properties(self.device)
            found["card"] = (
                f"{card.name}, {card.total_memory / 2**30:.0f} GiB, compute capability "
                f"{card.major}.{card.minor}, one of {torch.cuda.device_count()}"
            )
            found["driver"] = str(pynvml.nvmlSystemGetDriverVersion())
        yield json.dumps({**found, "machine": reporting.machine(str(self.device))})

    def equality(self) -> Iterator[str]:
        """Compare answers in float32 and in 16 bits; what differs has to be rounding."""
        # Four layers show what differs, and fit a small card in float32, twice.
        self.values = {**self.values, "num_hidden_layers": 4}
        self._need(4 + 2 + 4)
        rows = list(self._differences())
        cells = [(what, f"{value:.2g}", f"{limit:.2g}") for what, value, limit in rows]
        yield markdown_table(("in 4 layers of the shape", "measured", "limit"), cells)
        for what, value, limit in rows:
            if not value <= limit:
                raise RuntimeError(f"{what}: {value:.2g} exceeds {limit:.2g}")

    def _differences(self) -> Iterator[tuple[str, float, float]]:
        model, exact = self._model(self.dtype), self._model(torch.float32)
        exact.load_state_dict(model.state_dict())
        questions, prompts = self._questions(), self._prompts()
        both = BesideHF(exact, self.tokenizer, 8, [8])
        scores = [
            _answers(side, "loglikelihood", questions) for side in (both.ours, both.hf)
        ]
        nats = reporting.NATS[torch.float32]
        yield "float32, shared prefixes, nats", reporting.worst(*scores), nats
        _, hf, ours = rounding.distances(model, self.tokenizer, questions).values()
        said = f"distance from float32 / that of hf in batches ({hf:.3f} nats)"
        yield f"{_name(self.dtype)}, {said}", ours / hf, rounding.LIMIT
        tokens = self.tokenizer(prompts[0].args[0], return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            logits = [each(tokens.to(self.device)).logits for each in (exact, model)]
        rounded = float((logits[0] - logits[1]).abs().max())
        limits = reporting.LOGITS[torch.float32], 2 * rounded
        for of, limit in zip((exact, model), limits, strict=True):
            both = BesideHF(of, self.tokenizer, 8, [8])
            texts = [
                _answers(side, "generate_until", prompts)
                for side in (both.ours, both.hf)
            ]
            gaps = [
                reporting.gap_where_they_part(both.hf.lm, prompt.args[0], a, b)
                for prompt, a, b in zip(prompts, *texts, strict=True)
                if a != b
            ]
            said = f"{reporting.agreement(*texts)}; logit gap where others diverge"
            yield f"{_name(of.dtype)}, slots: {said}", max(gaps, default=0.0), limit

    def load(self) -> Iterator[str]:
        """Time three ways to load, and bound the memory of pruning on load."""
        self._need(2)
        folder, ours = str(self._checkpoint()), f"pruned on load, {PERCENT} %"
        where = {"dtype": self.dtype, "device_map": {"": str(self.device)}}

        def whole() -> PreTrainedModel:
            return AutoModelForCausalLM.from_pretrained(folder, **where)

        ways: dict[str, Callable[[], PreTrainedModel]] = {
            ours: lambda: load_pruned(folder, prune_percent=PERCENT, **where),
            "whole": whole,
            "whole, then pruned": lambda: prune_model(whole(), prune_percent=PERCENT),
        }
        seconds: dict[str, list[float]] = {name: [] for name in ways}
        sizes, above = dict.fromkeys(ways, 0), dict.fromkeys(ways, 0)
        for name in in_turns(list(ways), 1 + self.scale.repeats):
            self._release()
            with reporting.memory_of(self.device) as memory:
                begin = time.perf_counter()
                model = ways[name]()
                reporting.synchronise(self.device)
                seconds[name].append(time.perf_counter() - begin)
            sizes[name] = model.get_memory_footprint()
            above[name] = max(above[name], memory.peak - memory.before - sizes[name])
            del model
        layer = 3 * self.values["hidden_size"] * self.values["intermediate_size"] * 2
        columns = ("", "first, s", "then, s", "model, MiB", "peak above it, MiB")
        yield markdown_table(
            columns,
            [
                (name, *_first(taken), mebibytes(sizes[name]), mebibytes(above[name]))
                for name, taken in seconds.items()
            ],
        )
        yield f"The MLP of one layer takes {mebibytes(layer)} MiB at full width."
        if self.on_cuda and above[ours] > layer:
            raise RuntimeError(
                "pruning on load took more than one layer above the model"
            )

    def speed(self) -> Iterator[str]:
        """Time prefix sharing and slots against `hf` at the best batch size that it has."""
        self._need(2)
        model = self._model(self.dtype)
        kernel = kernel_of_shared_keys(model.config, self.device, self.dtype)
        grouped = kernel == SDPBackend.EFFICIENT_ATTENTION
        yield (
            f"Under a mask, torch's choice for keys that heads share: {kernel}; hf-prefix "
            f"{'groups them' if grouped else 'has them copied for each head'}."
        )
        for kind, requests in self._work().items():

            def answer(
                side: Side,
                few: int | None = 8,
                kind: str = kind,
                requests: list[Instance] = requests,
            ) -> None:
                _answers(side, kind, requests[:few])

            both = BesideHF(model, self.tokenizer, "auto", (1, 8, 32, 64))
            few, repeats = len(requests) // 2, 1 + self.scale.repeats
            found = both.run(answer, None, few, repeats, seconds=CHOOSING)
            same = reporting.agreement(both.ours.answers, both.hf.answers)
            yield f"### {kind}\n\n{len(requests)} requests, {same}. {found}"
            for side in (both.ours, both.hf):
                calls = reporting.attention_of(partial(answer, side))
                yield f"{side.name}, calls of attention for 8 requests: {calls}."

    def engine(self) -> Iterator[str]:
        """Time ``pruned-vllm`` against ``pruned-hf``, where vLLM is installed."""
        if find_spec("vllm") is None:
            raise Skipped("vLLM is not installed")
        self._need(2 * 2)
        sides: dict[str, dict[str, Any]] = {
            "pruned-hf": {"device": str(self.device), "batch_size": "auto"},
            "pruned-vllm": {"gpu_memory_utilization": 0.5, "max_model_len": 1024},
        }
        folder, rows = str(self._checkpoint()), []
        answers: dict[str, list[Any]] = {}
        for name, own in sides.items():
            begin = time.perf_counter()
            own |= {"pretrained": folder, "prune_percent": PERCENT}
            lm = get_model(name)(dtype=_name(self.dtype), **own)
            loaded = spread([time.perf_counter() - begin])
            for kind, requests in self._work().items():
                seconds = []
                for _ in range(1 + self.scale.repeats):
                    begin = time.perf_counter()
                    found = getattr(lm, kind)(requests, disable_tqdm=True)
                    seconds.append(time.perf_counter() - begin)
                answers.setdefault(kind, []).append(found)
                rows.append((name, loaded, kind, *_first(seconds)))
            del lm
            self._release()
        columns = ("", "load, s", "requests", "first, s", "then, s")
        yield markdown_table(columns, rows, "lrlrr")
        for kind, both in answers.items():
            yield f"{kind}: {reporting.agreement(*both)}."

    def cards(self) -> Iterator[str]:
        """Compare the scores of several cards with those of one, by the documented commands."""
        if self.count < 2:
            raise Skipped("one card is visible")
        # So few tokens that rounding hardly changes a text.
        self.scale = self.scale._replace(prompts=8, new_tokens=8)
        self._need(4)
        pruned = f"prune_percent={PERCENT},multiple_of={8 * self.count}"
        model_args = f"pretrained={self._checkpoint()},dtype=float32,{pruned}"
        heads = self.values["num_key_value_heads"]
        with TemporaryDirectory(dir=self.folder.parent) as folder:
            asked = self._questions(), self._prompts("w77")
            gpu_cards.write_tasks(Path(folder), *asked)
            given = model_args, Path(folder), str(self.device), self.count, heads
            yield from gpu_cards.beside_one_card(*given)

    def distillation(self) -> Iterator[str]:
        """Time the unpruned model's reading and the steps of a distillation."""
        self._need(16)
        source, folder = self._checkpoint(), self.folder.with_name("distilled")
        generator, length = torch.Generator().manual_seed(2), 256
        text = folder.with_suffix(".txt")
        tokens = 512 * 4 * self.scale.repeats
        text.write_text(self._words(2 * tokens, generator), encoding="utf-8")
        options = HealingOptions(training_args={"use_cpu": not self.on_cuda})
        budget = Budget(tokens=tokens)
        training = Training(options, folder, [str(text)], "text", budget)
        where: dict[str, Any] = {"device": self.device, "training": training}
        size = {"prune_percent": PERCENT}
        export_pruned(str(source), folder, **where, prune_arguments=size)
        record = training.record
        trained = record["seconds"] - record["teacher_seconds"]
        rates = (
            record["data"]["tokens"] / record["teacher_seconds"],
            record["tokens_seen"] / trained,
        )
        read, stepped = (f"{rate:,.0f}" for rate in rates)
        yield (
            f"The unpruned model reads {read} tokens per second; training of the MLPs, cut by {PERCENT} %, "
            f"takes {stepped} tokens per second, in steps of 2 blocks of {length}, with all checkpoints."
        )

    @property
    def count(self) -> int:
        """Return how many cards are visible."""
        return torch.cuda.device_count() if self.on_cuda else 1

    def _need(self, per_weight: int) -> None:
        """Raise Skipped where so many bytes per weight, and what a run needs, do not fit.

        A run keeps keys and values of 64 slots, and logits of 2,048 positions: in 16 bits once and
        in float32 twice.
        """
        of = self._config()
        with torch.device("meta"):
            weights = AutoModelForCausalLM.from_config(of).num_parameters() * per_weight
        tokens = 64 * (64 + self.scale.new_tokens) + self.scale.preamble
        keys = 4 * of.num_hidden_layers * of.num_key_value_heads * of.head_dim
        need = weights + tokens * keys + 2048 * of.vocab_size * (2 + 4 + 4)
        free = psutil.virtual_memory().available
        if self.on_cuda:
            free, _ = torch.cuda.mem_get_info(self.device)
        if free < need:
            raise Skipped(
                f"it needs about {need / 2**30:.1f} GiB of memory on {self.device.type}, of "
                f"which {weights / 2**30:.1f} are weights, and {free / 2**30:.1f} GiB are free"
            )

    def _config(self) -> LlamaConfig:
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        return LlamaConfig(**self.values, **special, max_position_embeddings=4096)

    def _model(self, dtype: torch.dtype) -> PreTrainedModel:
        torch.manual_seed(0)
        with self.device:
            return AutoModelForCausalLM.from_config(self._config(), dtype=dtype).eval()

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """Return a tokenizer of the words w0, w1, ...: text and tokens say the same."""
        words = {f"w{number}": number for number in range(self.values["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))  # noqa: S106
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = dict.fromkeys(("eos_token", "pad_token"), "w2")
        return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)

    def _checkpoint(self) -> Path:
        """Return the folder of a checkpoint, written at the first use."""
        if not self.folder.exists():
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with appearing_whole(self.folder) as unfinished:
                self._model(self.dtype).save_pretrained(unfinished)
                self.tokenizer.save_pretrained(unfinished)
            self._release()
        return self.folder

    def _release(self) -> None:
        gc.collect()
        if self.on_cuda:
            torch.cuda.empty_cache()

    def _work(self) -> dict[str, list[Instance]]:
        return {
            "loglikelihood": self._questions(),
            "generate_until": self._prompts(until="w77"),
        }

    def _words(self, count: int, generator: torch.Generator) -> str:
        most = self.values["vocab_size"]
        numbers = torch.randint(3, most, (count,), generator=generator)
        return " ".join(f"w{number}" for number in numbers.tolist())

    def _questions(self) -> list[Instance]:
        """Return four answers to each question, behind a preamble that all begin with."""
        generator = torch.Generator().manual_seed(0)
        preamble = self._words(self.scale.preamble, generator)
        requests: list[Instance] = []
        for _ in range(self.scale.questions):
            question = f"{preamble} {self._words(24, generator)}"
            for _ in range(4):
                pair = (question, f" {self._words(8, generator)}")
                requests.append(_request("loglikelihood", pair, len(requests)))
        return requests

    def _prompts(self, until: str = "\0") -> list[Instance]:
        """Return prompts of 16 to 64 tokens."""
        generator = torch.Generator().manual_seed(1)
        most = self.scale.new_tokens
        settings = {"until": [until], "do_sample": False, "max_gen_toks": most}
        lengths = torch.randint(16, 65, (self.scale.prompts,), generator=generator)
        return [
            _request("generate_until", (self._words(n, generator), settings), index)
            for index, n in enumerate(lengths.tolist())
        ]


def _request(kind: Any, arguments: tuple[Any, ...], number: int) -> Instance:
    """Return a request as lm-eval 0.4 and 0.5 make it."""
    named: Any = {
        "task_name": "part",
        "doc_id": number,
        "metadata": ("part", number, 1),
    }
    return Instance(kind, {}, arguments, idx=number, **named)


def _answers(side: Side, kind: str, requests: list[Instance]) -> list[Any]:
    with on_the_fast_path(side.lm):
        return side.timed(getattr(side.lm, kind), requests, disable_tqdm=True)


def _first(seconds: list[float]) -> tuple[str, str]:
    return spread(seconds[:1]), spread(seconds[1:])


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def main(argv: list[str] | None = None) -> int:
    """Run one part; return its exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true")
    for name in ("--device", "--part", "--shape"):
        parser.add_argument(name, required=True)
    parser.add_argument("--page", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path())
    given = parser.parse_args(argv)
    # What they say of tasks, and of each model that is handed over.
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    scale = REHEARSAL if given.shape == "tiny" else QUICK if given.quick else FULL
    with given.page.open("w", encoding="utf-8") as page:
        try:
            parts = Parts(given.device, scale, given.shape, given.folder)
            for chunk in getattr(parts, given.part)():
                print(chunk, file=page, end="\n\n", flush=True)
        except Skipped as reason:
            print(f"Skipped: {reason}.", file=page)
            return SKIPPED
        except Exception as error:  # noqa: BLE001 - the page says what went wrong
            traceback.print_exc()
            print(f"**Failed**: {type(error).__name__}: {error}", file=page)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
