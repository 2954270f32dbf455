from __future__ import annotations

import argparse
import json
import shlex
from typing import Any

import pytest

from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.criteria import RANDOM
from lm_eval_pruned.report import random_baseline
from lm_eval_pruned.report.random_baseline import (
    command_with_random,
    random_baseline_section,
    sizes_without_random,
)
from lm_eval_pruned.results.sweep_results import read_sweep
from lm_eval_pruned.sweeps.options import OPTIONS, add_arguments, read_options
from tests.helpers.results_files import pruning, write_sweep


def configurations(*arguments: dict[str, Any]) -> dict[str, Any]:
    return {
        "configurations": [
            {"id": str(number), "arguments": each}
            for number, each in enumerate(({}, *arguments))
        ]
    }


def parsed(command: str) -> dict[str, Any]:
    """Return the options that a command means to the sweep."""
    program, name, *words = shlex.split(command)
    assert (program, name) == ("lm-eval-pruned", "sweep")
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return read_options(parser.parse_args(words))


def test_the_words_are_those_of_other_rooms():
    assert RANDOM == random_baseline.RANDOM
    assert PruneArguments.criterion == random_baseline._DEFAULT
    assert set(random_baseline.TAKE_FALSE) == {
        option.name for option in OPTIONS if option.kind == "boolean"
    }
    assert set(random_baseline._HOW) <= {
        option.name for option in OPTIONS if option.decides == "how"
    }


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], []),
        ([{"ratio": 2.0}], ["ratio 2.0"]),
        ([{"ratio": 2.0}, {"ratio": 2.0, "criterion": "random", "seed": 1}], []),
        (
            [{"ratio": 2.0, "criterion": "act"}, {"ratio": 2.0, "criterion": "random"}],
            [],
        ),
        (
            [{"prune_percent": 20}, {"prune_percent": 20, "criterion": "random"}]
            + [{"prune_percent": 40}, {"prune_percent": 40, "criterion": "l1"}],
            ["prune_percent 40"],
        ),
    ],
)
def test_sizes_without_random(arguments, missing):
    assert sizes_without_random(configurations(*arguments)) == missing


@pytest.mark.parametrize(
    "options",
    [
        {"tasks": ["boolq"], "ratios": ["2.4", "2.0"]},
        {
            "model": "pruned-hf",
            "model_args": {"pretrained": "a/b-1.5", "dtype": "float32"},
            "tasks": ["boolq", "pruned_demo"],
            "prune_percents": ["10", "20"],
            "criteria": ["act", "maw"],
            "limit": 4.0,
        },
        {
            "model_args": {
                "pretrained": "it's a folder, with a comma",
                "calibration": '"quoted".jsonl',
                "layers": [0, 2],
                "revision": "12",
                "parallelize": False,
                "gguf_file": "x=y.gguf",
                "max_length": 128,
            },
            "tasks": ["boolq"],
            "ratios": ["1/2"],
            "criteria": ["random"],
            "seeds": ["7", "8"],
            "samples": {"boolq": [0, 3]},
            "gen_kwargs": {"until": ["\n"], "temperature": 0.5},
            "log_samples": False,
            "fewshot_as_multiturn": True,
            "apply_chat_template": True,
            "trust_remote_code": True,
            "system_instruction": "Say 'yes'; $HOME `no`",
            "seed": "0,1234,1234,1234",
            "metadata": {"a": {"b": None}},
        },
        {"tasks": ["t"], "ratios": ["2"], "apply_chat_template": "rag"},
    ],
)
def test_the_command_means_the_same_sweep_with_random(options):
    """Content as ``sweep.json`` holds it, whoever typed it or wrote it in a file."""
    definition = json.loads(json.dumps({"definition": options}))
    command = command_with_random(
        definition, "a folder", {"batch_size": 8, "device": "cuda:0"}
    )
    found = parsed(command)
    criteria = options.get("criteria", ["maw"])
    assert found.pop("criteria") == [*criteria, *{"random"}.difference(criteria)]
    given = options.get("seeds", [])
    seeds = found.pop("seeds")
    assert seeds[: len(given)] == given
    assert len(set(seeds)) == 3
    assert found.pop("output_path") == "a folder"
    assert (found.pop("batch_size"), found.pop("device")) == ("8", "cuda:0")
    assert found == {
        name: value
        for name, value in options.items()
        if name not in ("criteria", "seeds")
    }


def test_what_is_off_stays_off_and_defaults_are_not_said():
    options = {"tasks": ["t"], "ratios": ["2"], "trust_remote_code": False}
    command = command_with_random(
        {"definition": options}, "s", {"batch_size": 1, "device": None}
    )
    assert command == (
        "lm-eval-pruned sweep --tasks t --ratios 2 --criteria maw random --seeds 0 1 2 "
        "--output_path s"
    )


SCORES = {"boolq": {"acc,none": [0.0, 1.0] * 20}}


class TestReport:
    @pytest.fixture
    def sweep(self, tmp_path):
        return write_sweep(
            tmp_path / "sweep", {"base": (0, SCORES), "p20": (20, SCORES)}
        )

    def define(self, sweep, *arguments):
        file = sweep / "sweep.json"
        data = json.loads(file.read_text())
        data["definition"] = {"tasks": ["boolq"], "prune_percents": ["20", "40"]}
        named = configurations(*arguments)["configurations"]
        for each, identifier in zip(named, ("base", "p20", "p40"), strict=False):
            each["id"] = identifier
        data["configurations"] = named
        file.write_text(json.dumps(data))

    def test_it_says_so_with_the_command(self, sweep):
        pytest.importorskip("altair", reason="plots need the extra `report`")
        from lm_eval_pruned.report.report import write_report

        self.define(sweep, {"prune_percent": 20})
        write_report(sweep)
        text = (sweep / "report/report.md").read_text()
        assert "This sweep has no random baseline: nothing" in text
        block = text.partition("```bash\n")[2].partition("\n```")[0]
        assert parsed(block)["criteria"] == ["maw", "random"]
        assert parsed(block)["output_path"] == str(sweep)
        page = (sweep / "report/report.html").read_text()
        assert "--criteria maw random --seeds 0 1 2" in page

    def test_with_random_at_every_size_nothing_is_said(self, sweep):
        size = {"prune_percent": 20}
        self.define(sweep, size, {**size, "criterion": "random"})
        found = read_sweep(sweep)
        assert random_baseline_section(found, found.runs[0]) is None

    def test_it_says_whether_the_criterion_beats_random(self, tmp_path):
        pytest.importorskip("altair", reason="plots need the extra `report`")
        from lm_eval_pruned.report.report import write_report

        def scores(quiz, same=20):
            shares = {"quiz": quiz, "same": same}
            return {
                task: {"acc,none": [float(n < share) for n in range(40)]}
                for task, share in shares.items()
            }

        chance = {
            f"r{percent}_{seed}": (
                pruning(percent, criterion="random", seed=seed),
                scores(10 + seed),
            )
            for percent in (20, 40)
            for seed in (0, 1)
        }
        sweep = write_sweep(
            tmp_path / "sweep",
            {"base": (0, scores(40)), "p20": (20, scores(36)), "p40": (40, scores(11))}
            # No random one has this size.
            | {"p60": (60, scores(9))}
            | chance,
        )
        write_report(sweep)
        text = (sweep / "report/report.md").read_text()
        assert (
            "- **maw beside pruning at random: better on quiz**: of the comparisons by size and "
            "seed, quiz better in 2 of 4; same no difference shown in 4."
        ) in text
        _, _, section = text.partition("## Against pruning at random\n")
        rows = [
            line.split("|")[1:9]
            for line in section.partition("\n## ")[0].splitlines()
            if line.startswith("|quiz")
        ]
        assert rows == [
            ["quiz", "acc", "p20 (3.20)", "1.0000", "0.2500 (seed 0)", "0.9000"]
            + ["+0.6500", "\u25b2 significant"],
            ["quiz", "acc", "p20 (3.20)", "1.0000", "0.2750 (seed 1)", "0.9000"]
            + ["+0.6250", "\u25b2 significant"],
            ["quiz", "acc", "p40 (2.40)", "1.0000", "0.2500 (seed 0)", "0.2750"]
            + ["+0.0250", "\u25cb no difference shown"],
            ["quiz", "acc", "p40 (2.40)", "1.0000", "0.2750 (seed 1)", "0.2750"]
            + ["+0.0000", "\u25cb no difference shown"],
        ]
        with_random = (sweep / "report/report.html").read_text()
        assert "Against pruning at random</h2>" in with_random

    def test_sizes_that_lack_it_are_named(self, sweep):
        self.define(
            sweep,
            {"prune_percent": 20, "criterion": "random"},
            {"prune_percent": 40},
        )
        found = read_sweep(sweep)
        section = random_baseline_section(found, found.runs[0])
        assert "no random baseline for prune_percent 40:" in section.paragraphs[0]
