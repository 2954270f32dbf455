"""How many functions of this package a reader meets on two walks: ``python -m tests.project.walk``.

The first walk is a `ratio` from the arguments of the model type to the sliced tensors, on a tiny
Llama; the second a finished unit of each model through ``lm-eval-pruned verdict``. Every function
that Python enters is noted by `sys.setprofile`, not what only an import or a comprehension runs.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tempfile
import threading
from dataclasses import dataclass, field
from inspect import CO_NEWLOCALS
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_pruned import cli
from tests.helpers.checkpoints import ROOT, save_tiny
from tests.helpers.results_files import write_run


if TYPE_CHECKING:
    from collections.abc import Callable

OURS = tuple(
    f"{ROOT / folder}/" for folder in ("lm_eval_pruned", "model_wrappers", "tasks")
)
#: Documents of the finished unit: some functions are entered once for each.
DOCUMENTS = 100


@dataclass
class Walk:
    """What one call of a function of ours entered.

    Attributes:
        functions: Calls by file and qualified name, in the order in which they are met.
        moves: Calls from one file into another.
    """

    functions: dict[tuple[str, str], int] = field(default_factory=dict)
    moves: int = 0

    @property
    def files(self) -> set[str]:
        """The files of the functions."""
        return {file for file, _ in self.functions}

    def __str__(self) -> str:
        return (
            f"{len(self.functions)} functions in {len(self.files)} files, and {self.moves:,} calls "
            "from one file into another"
        )


def traced(run: Callable[[], Any]) -> Walk:
    """Return the walk of a function that imports nothing any more."""
    walk, here = Walk(), threading.local()

    def note(frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        is_function = code.co_flags & CO_NEWLOCALS and not code.co_name.startswith("<")
        is_ours = code.co_filename.startswith(OURS) and code.co_filename.endswith(".py")
        if not is_function or not is_ours:
            return
        stack = vars(here).setdefault("stack", [])
        if event == "call":
            # Python 3.10 knows no qualified names.
            name = getattr(code, "co_qualname", code.co_name)
            key = code.co_filename, name
            walk.functions[key] = walk.functions.get(key, 0) + 1
            walk.moves += stack[-1:] not in ([], [code.co_filename])
            stack.append(code.co_filename)
        elif event == "return" and stack:
            stack.pop()

    before = sys.getprofile()
    # Of threads that start in the meantime as well: tensors are sliced in several.
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(before)
        threading.setprofile(None)  # type: ignore[arg-type]
    return walk


def load_walk(folder: Path) -> Walk:
    """Return the walk of a `ratio`, when ``pruned-hf`` loads a checkpoint from `folder`."""
    from lm_eval.api.registry import get_model

    def load() -> None:
        get_model("pruned-hf").create_from_arg_string(arguments, {"device": "cpu"})

    arguments = f"pretrained={save_tiny(folder / 'tiny')},ratio=2.0"
    load()
    return traced(load)


def verdict_walk(folder: Path) -> Walk:
    """Return the walk of one finished task of two models through ``verdict``."""
    for name, right in (("base", 0.8), ("candidate", 0.7)):
        scores = [float(n < right * DOCUMENTS) for n in range(DOCUMENTS)]
        write_run(folder / name, {"boolq": {"acc,none": scores}})
    paths = [str(folder / name) for name in ("base", "candidate", "out")]

    def judge() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            cli.main(["verdict", *paths[:2], "--output_path", paths[2]])

    judge()
    return traced(judge)


def main() -> None:
    """Print every function of both walks, and how often it was entered."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        walks = {
            "A ratio, until its model is loaded": load_walk(folder),
            "A finished unit, until its verdict": verdict_walk(folder),
        }
    for title, walk in walks.items():
        print(f"{title}: {walk}")
        for (file, function), calls in walk.functions.items():
            print(f"{calls:7}  {Path(file).relative_to(ROOT)}  {function}")


if __name__ == "__main__":
    main()
