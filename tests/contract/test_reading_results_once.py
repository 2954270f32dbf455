"""docs/reading-results.md promises that a command reads each file of samples once."""

from __future__ import annotations

import sys
from collections import Counter

import pytest

from tests.contract.commands import pruned
from tests.helpers.results_files import answered, write_sweep, written


RIGHT = [number % 3 for number in range(40)]
#: The files of samples that were opened, while somebody counts; a hook stays until Python ends.
OPENED: Counter[str] | None = None


def count(event, arguments):
    if OPENED is not None and event == "open" and "samples_" in str(arguments[0]):
        OPENED[str(arguments[0])] += 1


sys.addaudithook(count)


@pytest.fixture
def opened_by():
    """Return a function that runs a command and counts how often it opens each file of samples."""

    def opened_by(*words):
        global OPENED
        OPENED = Counter()
        try:
            done = pruned(*words)
            return dict(OPENED), done
        finally:
            OPENED = None

    return opened_by


@pytest.fixture(scope="module")
def sweep(tmp_path_factory):
    """A sweep of two sizes on three tasks, one with two metrics, and a model that knows nothing."""

    def tasks(shift):
        wrong = [(pick + (n % 5 < shift)) % 3 for n, pick in enumerate(RIGHT)]
        return {
            "arc": answered(wrong, RIGHT, (" one", " two", " three")),
            "quiz": answered(wrong, RIGHT, (" a", " b", " c")),
            "free": written([f"Text {shift}"] * 40, [1, 0] * 20)
            | {"strict,none": [1.0, 0.0] * 20},
        }

    runs = {"base": (0, tasks(0)), "p20": (20, tasks(1)), "p40": (40, tasks(3))}
    runs["floor-constant"] = "constant", tasks(4)
    return write_sweep(tmp_path_factory.mktemp("sweep"), runs)


@pytest.mark.parametrize("command", ["compare", "report", "verdict", "check"])
def test_a_command_reads_each_file_of_samples_once(command, sweep, opened_by, tmp_path):
    if command == "report":
        pytest.importorskip("altair", reason="a report needs the extra `report`")
    words = {
        "compare": ("compare", sweep),
        "report": ("report", sweep, "--output_path", tmp_path),
        "verdict": ("verdict", sweep, sweep / "units/p40", "--output_path", tmp_path),
        "check": ("check", sweep, "--baseline", tmp_path / "baseline.json"),
    }[command]
    if command == "check":
        assert pruned(*words, "--update", "--not_worse", "5pt").code == 0
    opened, done = opened_by(*words)
    assert done.code in (0, 1, 2, 3) and not done.err.count("Traceback"), done.err
    assert len(opened) >= 6, done
    assert set(opened.values()) == {1}, {k: n for k, n in opened.items() if n > 1}


@pytest.mark.slow
def test_a_study_reads_each_file_of_samples_once(tiny_llama, made, opened_by, tmp_path):
    pytest.importorskip("altair", reason="a study needs the extra `report`")
    words = ["study", tiny_llama, "--kind", "base", "--tasks", "tiny_choice"]
    words += ["--include_path", made, "--prune_percents", "20", "--criteria", "maw"]
    words += ["--output_path", tmp_path, "--device", "cpu", "--quick"]
    assert pruned(*words).code == 0
    opened, done = opened_by(*words)
    assert done.code == 0, done.err
    assert len(opened) >= 2
    assert set(opened.values()) == {1}, opened
