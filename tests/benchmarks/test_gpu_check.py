"""The report of `benchmarks/gpu_check.py`, made on the CPU with tiny shapes."""

from __future__ import annotations

import importlib
import re

import pytest
import torch

from tests.helpers import checkpoints


SECTIONS = [
    "Tests marked gpu",
    "Answers equal to those of hf",
    "Memory while loading, layout by layout",
    "Prune on load, tiny",
    "Log-likelihood, tiny",
    "Generation, tiny",
    "Widths and energy, tiny",
]


@pytest.fixture(scope="module")
def gpu_check():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(checkpoints.ROOT / "benchmarks"))
        yield importlib.import_module("gpu_check")


@pytest.fixture
def on_the_cpu(gpu_check, tmp_path):
    """Return what runs the script on the CPU, giving its exit code and its report."""

    def run(*options):
        report = tmp_path / "report.md"
        code = gpu_check.main(
            ["--device", "cpu", "--tiny", "--output", str(report), *options]
        )
        return code, report.read_text(encoding="utf-8")

    return run


def results(report):
    """Return the result of each section, from the table at the top."""
    return dict(
        re.findall(r"^\|([^|]+)\|(passed|failed|skipped)\|$", report, re.MULTILINE)
    )


def section(report, heading):
    return report.split(f"\n## {heading}\n")[1].split("\n## ")[0]


@pytest.mark.slow
def test_one_command_answers_everything(on_the_cpu, gpu_check, monkeypatch):
    # Energy windows need no second each here.
    monkeypatch.setattr(gpu_check.profiling, "ENERGY_WINDOW_SECONDS", 0)
    code, report = on_the_cpu("--in-process")
    assert results(report) == dict.fromkeys(SECTIONS, "passed") | {
        "Tests marked gpu": "skipped",
        "Memory while loading, layout by layout": "skipped",
    }, report
    assert code == 0
    for fact in ("card", "torch", "transformers", "lm_eval", "command", "date"):
        assert f"|{fact}|" in report
    assert "sh benchmarks/gpu_check.sh --device cpu --tiny" in report
    assert "slots" in section(report, "Answers equal to those of hf")
    assert "pruned on load, 40 %" in section(report, "Prune on load, tiny")
    for heading in ("Log-likelihood, tiny", "Generation, tiny"):
        rows = re.findall(r"^\|(\d+)\|", section(report, heading), re.MULTILINE)
        assert rows == ["1", "4"]
    widths = section(report, "Widths and energy, tiny")
    assert re.findall(
        r"^\|(?:baseline|ratio=[^|]*)\|(\d+)\|\d\.", widths, re.MULTILINE
    ) == [
        "171",
        "103",
        "64",
    ]
    assert "J per output token" in widths
    assert str(checkpoints.ROOT) not in report


def test_a_section_that_fails_leaves_the_others_alone(
    on_the_cpu, gpu_check, monkeypatch
):
    def breaks(self):
        yield "a figure from before"
        raise torch.OutOfMemoryError("the card is full")

    def too_large(self):
        raise gpu_check.Skipped("it needs 90 GiB")

    def works(self):
        yield "a figure"

    monkeypatch.setattr(
        gpu_check.Check,
        "sections",
        lambda self: {
            name: method.__get__(self)
            for name, method in (("A", breaks), ("B", too_large), ("C", works))
        },
    )
    code, report = on_the_cpu("--in-process")
    assert code == 1
    assert results(report) == {"A": "failed", "B": "skipped", "C": "passed"}
    assert "a figure from before" in section(report, "A")
    assert "**Failed**: OutOfMemoryError: the card is full" in section(report, "A")
    assert section(report, "B").strip() == "Skipped: it needs 90 GiB."
    assert section(report, "C").strip() == "a figure"


@pytest.mark.slow
def test_a_section_whose_process_dies_has_failed(gpu_check):
    status, text = gpu_check.run_apart("Tests marked gpu", ["--device", "nowhere"])
    assert status == "failed"
    assert "its process ended with 1" in text


@pytest.mark.slow
def test_a_section_runs_in_a_process_of_its_own(gpu_check, tmp_path):
    options = ["--device", "cpu", "--tiny", "--folder", str(tmp_path)]
    status, text = gpu_check.run_apart("Tests marked gpu", options)
    assert (status, text) == ("skipped", "Skipped: this needs a CUDA device.")


def test_a_shape_that_does_not_fit_is_skipped_with_the_reason(
    gpu_check, tmp_path, monkeypatch
):
    class Little:
        available = 2**30

    monkeypatch.setattr(gpu_check.psutil, "virtual_memory", Little)
    check = gpu_check.Check("cpu", gpu_check.FULL, tmp_path)
    status, text = gpu_check.run_section(check.sections()["Generation, 8B"])
    assert status == "skipped"
    assert "needs about 40 GiB of memory on cpu, and 1 GiB are free" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is about machines without")
def test_without_a_card_it_says_what_would_work(gpu_check, capsys):
    with pytest.raises(SystemExit) as end:
        gpu_check.main([])
    assert end.value.code == 2
    assert "--device cpu --tiny" in capsys.readouterr().err
