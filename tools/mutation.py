"""Mutate a seeded sample of each module that ``[tool.mutmut]`` names, and show which tests notice.

``tox -e mutation -- --sample 10 compare/power gate`` takes 10 mutants of each file with such a name.
mutmut itself takes all mutants, and runs the tests of each in no order.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
from pathlib import Path

from mutmut import __main__ as mutmut
from mutmut.mutation.data import SourceFileMutationData
from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.state import state
from mutmut.stats import status_by_exit_code
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import get_mutant_name
from mutmut.workers.isolation import ForkServerRunner


FOLDER = Path("mutants").resolve()


class FastestFirst(ForkServerRunner):
    """Runs the tests that reach a mutant in the order of how long they take."""

    def submit(
        self, mutant_name: str, tests: list[str], cpu_time_limit: int, estimate: float
    ) -> None:
        """Hand a mutant to the process that runs its tests; both times are in seconds."""
        tests = sorted(tests, key=state().duration_by_test.__getitem__)
        super().submit(mutant_name, tests, cpu_time_limit, estimate)

    def run_clean_tests(self, tests: object) -> int:
        """Return 0: all tests have passed when mutmut noted which functions they reach."""
        return 0


def start_with_mutants() -> None:
    """Copy the package to where mutmut mutates it, and start Python again, which imports it there.

    This process holds the modules that the start-up line of the package imported.
    """
    shutil.rmtree(FOLDER, ignore_errors=True)
    shutil.copytree("lm_eval_pruned", FOLDER / "lm_eval_pruned")
    environment = os.environ | {"PYTHONPATH": str(FOLDER)}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)  # noqa: S606


def sample_of(path: Path, size: int, seed: int) -> list[str]:
    """Draw the names of so many mutants of a file, or of all that it has."""
    mutated = mutate_file_contents(str(path), path.read_text("utf-8"))
    names = sorted(get_mutant_name(path, name) for name in mutated.mutant_names)
    return random.Random(seed).sample(names, min(size, len(names)))


def row_of(path: Path, names: list[str]) -> str:
    """Return a row of Markdown with how many mutants were noticed, and a line for each other one."""
    data = SourceFileMutationData(path=path)
    data.load()
    results = {name: status_by_exit_code[data.exit_code_by_key[name]] for name in names}
    others = {n: r for n, r in results.items() if r not in ("killed", "timeout")}
    noticed = len(names) - len(others)
    row = f"|{path}|{len(names)}|{noticed}|{noticed / len(names):.0%}|"
    return "\n".join([row, *(f"  {name}: {r}" for name, r in others.items())])


def main() -> None:
    """Run the tests on the sample of each file, and print its row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="parts of paths; all, if left out")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if os.environ.get("PYTHONPATH") != str(FOLDER):
        start_with_mutants()
    paths = [
        path
        for path in sorted(walk_mutatable_files())
        if not options.files or any(part in str(path) for part in options.files)
    ]
    drawn = {path: sample_of(path, options.sample, options.seed) for path in paths}
    samples = {path: names for path, names in drawn.items() if names}
    mutmut.get_mutant_runner = lambda workers: FastestFirst(
        workers, mutmut.PytestRunner, {}
    )
    mutmut._run([name for names in samples.values() for name in names], max_children=1)
    for path, names in samples.items():
        print(row_of(path, names))


if __name__ == "__main__":
    main()
