"""Mutate a seeded sample of each module that ``[tool.mutmut]`` names, and show which tests notice.

``tox -e mutation -- --sample 10 compare/power gate`` takes 10 mutants of each file with such a name.
mutmut has no sample, and starts with the modules that the package's start-up line imported: so this copies
the package to where mutmut mutates it, before a Python that finds it there is started.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents
from mutmut.utils.file_utils import walk_mutatable_files
from mutmut.utils.format_utils import get_mutant_name


#: Of pytest: a test failed, an internal error, and too long a time.
NOTICED = {1, 3, 24, 36, 152, 255, -24}


def names_of(path: Path) -> list[str]:
    """Return the names of the mutants of a file."""
    mutated = mutate_file_contents(str(path), path.read_text("utf-8"))
    return sorted(get_mutant_name(path, name) for name in mutated.mutant_names)


def main() -> None:
    """Write ``mutants/`` anew, run a sample in it, and print a row for each file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", help="parts of paths; all, if left out")
    parser.add_argument("--sample", type=int, default=40, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    chosen = {}
    for path in sorted(walk_mutatable_files()):
        if not asked.files or any(part in str(path) for part in asked.files):
            names = names_of(path)
            size = min(asked.sample, len(names))
            chosen[path] = random.Random(asked.seed).sample(names, size)
    shutil.rmtree("mutants", ignore_errors=True)
    shutil.copytree("lm_eval_pruned", "mutants/lm_eval_pruned")
    mutmut = [Path(sys.executable).with_name("mutmut"), "run", "--max-children", "1"]
    every = [name for names in chosen.values() for name in names]
    environment = os.environ | {"PYTHONPATH": str(Path("mutants").resolve())}
    subprocess.run([*mutmut, *every], env=environment, check=True)  # noqa: S603
    for path, names in chosen.items():
        if names:
            found = json.loads(Path("mutants", f"{path}.meta").read_text("utf-8"))
            codes = found["exit_code_by_key"]
            survived = [name for name in names if codes[name] not in NOTICED]
            print(f"|{path}|{len(names)}|{len(names) - len(survived)}|", *survived)


if __name__ == "__main__":
    main()
