"""The steps of the page of the dichotomy: each is one command of this package.

A step writes into ``FOLDER/MODEL/STEP``. Sweeps go on where they stopped, so a step can be
interrupted and given again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dichotomy.tables import MEASURES
from lm_eval_pruned.util.atomic import write_atomically


if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

#: Short name and name of each model. The second is a base model, without a chat template.
MODELS = {"smollm2": "SmolLM2-135M-Instruct", "gemma": "Gemma-3-270M"}
#: The study's sizes, in percent of the neurons of each layer that go.
PERCENTS = (10, 20, 30, 40, 50, 60)
#: Of them, where every second one must do.
FEW = ("--prune_percents", "20", "40", "60")
#: Numbers of layers that have about as many parameters as the percentages of `FEW` have.
DEPTHS = {"smollm2": (4, 9, 13), "gemma": (3, 5, 8)}
#: Percentages that leave as many parameters as these depths, by `lm-eval-pruned plan`.
EQUAL = {"smollm2": ("17.78", "40", "57.82"), "gemma": ("23.64", "39.36", "63")}
#: Expansion ratios of the percentages 10, 40 and 60.
RATIOS = {"smollm2": ("2.4", "1.6", "1.07"), "gemma": ("2.88", "1.92", "1.28")}
SEEDS = ("0", "1", "2")
#: Steps whose cuts are uniform, of which each has another part of the tasks.
UNIFORM = ("choice", "instructions", "reasoning")
#: The step that is as one of them, but for the chat template.
PLAIN = "instructions_plain"
CHOICE = ("truthfulqa_mc1", "truthfulqa_mc2", "boolq", "held_text")
#: How many documents of a task are used, from the first on, where a whole task takes too long.
SUBSETS = {"boolq": 500, "gsm8k": 50}
#: How many characters of each held document are scored.
PASSAGE = 2000
HELD_TASK = """\
task: held_text
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: loglikelihood_rolling
test_split: test
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
should_decontaminate: false
metric_list:
  - metric: word_perplexity
  - metric: byte_perplexity
  - metric: bits_per_byte
metadata:
  version: 1.0
"""


@dataclass(frozen=True)
class Step:
    """One command.

    Attributes:
        name: Of the folder that it fills.
        text: What it is for, as half a sentence.
        tasks: Tasks that it evaluates; empty for a profile.
        options: Further options of the sweep.
        cut: Options that say what is pruned; default: the study's sizes.
        model_args: Further arguments of the model.
        calibrated: Whether it looks at calibration text.
        models: For which models it is.
        profile: Whether it is a profile and no sweep.
        adapters: The step that trains the same adapters, which need not be trained twice.
    """

    name: str
    text: str
    tasks: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    cut: tuple[str, ...] = ("--prune_percents", *map(str, PERCENTS))
    model_args: tuple[str, ...] = ()
    calibrated: bool = False
    models: tuple[str, ...] = tuple(MODELS)
    profile: bool = False
    adapters: str | None = None


def cells_of(step: Step, model: str) -> int:
    """Return how many scores of pruned models a step has when it is finished."""
    options = list(step.options)
    cut = _filled(step.cut, model)
    sizes, depths = (
        len(_values(cut, name)) for name in ("--prune_percents", "--drop_layers")
    )
    ways = 1
    if names := _values(options, "--criteria"):
        ways = len(names)
        if "random" in names:
            ways += len(_values(options, "--seeds")) - 1
    ways *= len(_values(options, "--allocations")) or 1
    if "--heal" in options:
        ways *= 2
    return len(step.tasks) * (sizes * ways + depths)


def _filled(words: Sequence[str], model: str) -> list[str]:
    sizes = {"{depths}": DEPTHS[model], "{equal}": EQUAL[model]}
    return [str(each) for word in words for each in sizes.get(word, (word,))]


def _values(options: list[str], name: str) -> list[str]:
    if name not in options:
        return []
    rest = options[options.index(name) + 1 :]
    ends = [number for number, word in enumerate(rest) if word.startswith("--")]
    return rest[: ends[0]] if ends else rest


_CHANCE = ("random", "--seeds", *SEEDS)
_AGAINST_CHANCE = ("--criteria", "maw", *_CHANCE)
_BEST_AGAINST_CHANCE = ("--criteria", "maw", "best", *_CHANCE)
#: Criteria that are compared with layer 0 and without it.
OF_LAYER_0 = ("maw", "l2", "pon", "max_abs", "act")
#: All criteria, and chance.
CRITERIA = (*OF_LAYER_0, "best", "random")
_SHORT = ("--gen_kwargs", "max_gen_toks=128")
_SENSITIVITY = ("--allocations", "sensitivity", "--criteria", "maw", "best")
_SKIP_0 = ("--criteria", *OF_LAYER_0, *_CHANCE)
_ALIGNED = ("multiple_of=64",)
#: What the trained models of a step are called: the name it begins with, and their loss.
LOSSES = {"healed": "next-token loss", "distilled": "distillation"}


def _trained(name: str, seed: str) -> tuple[str, ...]:
    arguments = (
        f'{{"per_device_train_batch_size": 4, "learning_rate": 1e-3, "seed": {seed}}}'
    )
    return (
        *("--heal", "data={calibration}", "max_steps={steps}", "max_length=256"),
        *(() if name == "healed" else ("teacher_weight=1",)),
        f"training_args={arguments}",
    )


STEPS = (
    Step(
        *("choice", "multiple choice and held text, uniform cuts", CHOICE),
        ("--criteria", *CRITERIA, "--seeds", *SEEDS),
        calibrated=True,
    ),
    Step(
        *("choice_sensitivity", "widths by sensitivity", CHOICE, _SENSITIVITY),
        calibrated=True,
    ),
    Step(
        *("choice_skip0", "layer 0 left alone", CHOICE, _SKIP_0),
        cut=FEW,
        model_args=("skip_layers=0",),
        calibrated=True,
    ),
    Step(
        "choice_depth",
        "whole layers left out, the last but one first, and widths of as many parameters",
        CHOICE,
        ("--criteria", "maw", "best", "--allocations", "uniform", "sensitivity"),
        cut=("--prune_percents", "{equal}", "--drop_layers", "{depths}"),
        calibrated=True,
    ),
    Step(
        *("choice_depth_influence", "whole layers left out by block influence", CHOICE),
        cut=("--drop_layers", "{depths}"),
        model_args=("drop_by=block_influence",),
        calibrated=True,
    ),
    Step(
        *("choice_aligned", "widths that are multiples of 64", CHOICE),
        ("--criteria", "maw"),
        cut=FEW,
        model_args=_ALIGNED,
    ),
    Step(
        *("instructions", "IFEval, uniform cuts", ("ifeval",)),
        ("{template}", *_SHORT, *_BEST_AGAINST_CHANCE),
        calibrated=True,
    ),
    Step(
        *("instructions_skip0", "IFEval, layer 0 left alone", ("ifeval",)),
        ("{template}", *_SHORT, *_AGAINST_CHANCE),
        cut=FEW,
        model_args=("skip_layers=0",),
        calibrated=True,
    ),
    Step(
        *("instructions_sensitivity", "IFEval, widths by sensitivity", ("ifeval",)),
        ("{template}", *_SHORT, *_SENSITIVITY),
        calibrated=True,
    ),
    Step(
        *(PLAIN, "IFEval without a chat template", ("ifeval",)),
        (*_SHORT, "--criteria", "maw"),
        models=("smollm2",),
    ),
    *(
        Step(
            f"instructions_sampled_{seed}",
            f"IFEval, answers sampled at temperature 0.7, seed {seed}",
            ("ifeval",),
            (
                *("{template}", "--gen_kwargs", "max_gen_toks=128", "do_sample=true"),
                *("temperature=0.7", "--criteria", "maw", "--seed", seed),
            ),
            cut=FEW,
        )
        for seed in SEEDS
    ),
    Step(
        *("reasoning", "GSM8K, 5 examples", ("gsm8k",)),
        ("--num_fewshot", "5", *_AGAINST_CHANCE),
        cut=FEW,
    ),
    *(
        Step(
            f"reasoning_draw_{seed}",
            f"GSM8K, 5 other examples, drawn with seed {seed}",
            ("gsm8k",),
            ("--num_fewshot", "5", "--criteria", "maw", "--seed", seed),
            cut=FEW,
        )
        for seed in SEEDS[1:]
    ),
    *(
        Step(
            f"{name}_{seed}",
            f"before and after healing by LoRA, {loss}, seed {seed}",
            *(CHOICE, _trained(name, seed)),
            cut=("--prune_percents", "20", "40"),
        )
        for name, loss in LOSSES.items()
        for seed in SEEDS
    ),
    *(
        Step(
            f"instructions_{name}_{seed}",
            f"IFEval, before and after healing by LoRA, {loss}, seed {seed}",
            *(("ifeval",), ("{template}", *_SHORT, *_trained(name, seed))),
            cut=("--prune_percents", "20", "40"),
            adapters=f"{name}_{seed}",
        )
        for name, loss in LOSSES.items()
        for seed in SEEDS
    ),
    Step("latency", "latency of aligned and of odd widths", profile=True),
)


@dataclass(frozen=True)
class Setting:
    """What all commands have in common.

    Attributes:
        folder: Work folder.
        model: Key of `MODELS`.
        pretrained: Name or folder of the model; None for the default model.
        model_args: Further ``KEY=VALUE`` of the model.
        dtype: Of the weights, or None for the checkpoint's.
        device: Such as ``cpu``, or None for what is there.
        batch_size: Of the sweeps.
        samples: File of documents by task; None for the one of `prepare`.
        limit: Documents per task, in place of `samples`; None for those of `samples`.
        max_steps: Of each training, of 1,024 tokens each.
    """

    folder: Path
    model: str = "smollm2"
    pretrained: str | None = None
    model_args: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    batch_size: str = "16"
    samples: str | None = None
    limit: str | None = None
    max_steps: str = "100"


def place_of(row: Mapping[str, Any]) -> tuple[int, int, str, int]:
    """Return the key that sorts rows of a table by model and step, or by question and task where they have one."""
    model = list(MODELS).index(row["model"])
    if "question" in row:
        return model, 0, row["question"], list(MEASURES).index(row["task"])
    steps = [step.name for step in STEPS]
    step = row.get("step", "")
    return model, steps.index(step) if step in steps else len(steps), "", 0


def words_of(step: Step, setting: Setting) -> list[str]:
    """Return the command of a step, word by word."""
    output = ["--output_path", str(setting.folder / setting.model / step.name)]
    device = [] if setting.device is None else ["--device", setting.device]
    pretrained = [f"pretrained={setting.pretrained}"] if setting.pretrained else []
    arguments = [*pretrained, *setting.model_args]
    arguments += [f"dtype={setting.dtype}"] if setting.dtype else []
    if step.profile:
        words = ["lm-eval-pruned", "profile", "--ratios", *RATIOS[setting.model]]
        words += ["--model_args", *arguments] if arguments else []
        words += ["--multiple_of", "1", "64", "--batch_sizes", "1", "4"]
        words += ["--max_new_tokens", "32", "--limit", "4", "--repeats", "24"]
        words += ["--apply_chat_template"] if setting.model == "smollm2" else []
        return [*words, *device, *output]
    tasks = setting.folder / "tasks"
    calibration = str(tasks / "calibration.jsonl")
    arguments += step.model_args
    if step.calibrated:
        arguments.append(f"calibration={calibration}")
        arguments.append("calibration_samples=16")
    words = ["lm-eval-pruned", "sweep"]
    words += ["--model_args", *arguments] if arguments else []
    words += _filled(step.cut, setting.model)
    for word in ("--tasks", *step.tasks, *step.options):
        if word != "{template}":
            words.append(
                word.replace("{calibration}", calibration).replace(
                    "{steps}", setting.max_steps
                )
            )
        elif setting.model == "smollm2":
            words.append("--apply_chat_template")
    if "held_text" in step.tasks:
        words += ["--include_path", str(tasks)]
    # Steps share unpruned models and sizes, and the two scores of TruthfulQA most answers.
    words += ["--use_cache", str(setting.folder / "answers" / setting.model)]
    if setting.limit is not None:
        words += ["--limit", setting.limit]
    else:
        words += ["--samples", setting.samples or str(tasks / "samples.json")]
    return [*words, "--batch_size", setting.batch_size, *device, *output]


def prepare(data: Path, folder: Path) -> None:
    """Write the held text as a task, the calibration text, and the subsets.

    Lines count from 0: the odd ones are held out, the even ones calibrate.

    Args:
        data: JSON Lines with a key ``text``.
        folder: Work folder; its folder ``tasks`` is written.

    Raises:
        ValueError: `data` is not such a file, or has fewer than two lines.
    """
    texts = []
    for number, line in enumerate(data.read_text("utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            texts.append(str(json.loads(line)["text"]))
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"data={data}, line {number}: not a JSON object with a key 'text'; give JSON Lines "
                "such as those that calibration= takes."
            ) from None
    if len(texts) < 2:
        raise ValueError(
            f"data={data} holds {len(texts)} texts: give at least two, one to be held out and one "
            "for calibration."
        )
    tasks = folder.resolve() / "tasks"
    held = tasks / "held.jsonl"
    write_atomically(held, _lines([text[:PASSAGE] for text in texts[1::2]]))
    write_atomically(tasks / "calibration.jsonl", _lines(texts[::2]))
    write_atomically(tasks / "held_text.yaml", HELD_TASK.format(file=held))
    subsets = {task: list(range(count)) for task, count in SUBSETS.items()}
    write_atomically(tasks / "samples.json", json.dumps(subsets))


def _lines(texts: Sequence[str]) -> str:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts)
