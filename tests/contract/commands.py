"""The commands as a user types them: in this process, which saves importing torch for each."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import struct
import sys
from fcntl import ioctl
from pathlib import Path
from termios import TIOCSWINSZ
from threading import Thread
from typing import TYPE_CHECKING, Any, NamedTuple
from unittest import mock


if TYPE_CHECKING:
    from collections.abc import Callable


class Done(NamedTuple):
    """What a command left in the terminal, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """Return what a refused command says: its exit code is 2, and it printed one line."""
        assert self.code == 2, self.out + self.err
        *above, last = self.err.strip().splitlines()
        assert not any("Traceback" in line for line in above), self.err
        return last


def pruned(*words: Any) -> Done:
    """Run ``lm-eval-pruned WORDS``."""
    from lm_eval_pruned.cli import main

    return _run(lambda: main([*map(str, words)]))


def in_a_terminal(*words: Any, stream: Any = contextlib.redirect_stdout) -> str:
    """Run ``lm-eval-pruned WORDS`` and return what a terminal showed of one stream."""
    from lm_eval_pruned.cli import main

    ours, theirs = os.openpty()
    # 24 lines of 80 columns; a new terminal has none.
    ioctl(theirs, TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    shown: list[bytes] = []

    def read() -> None:
        # The end of a terminal is an error.
        with contextlib.suppress(OSError):
            while part := os.read(ours, 4096):
                shown.append(part)

    reader = Thread(target=read)
    reader.start()
    with open(theirs, "w") as screen, stream(screen):
        assert not main([*map(str, words)])
    reader.join()
    os.close(ours)
    return b"".join(shown).decode().replace("\r", "")


def lm_eval(*words: Any) -> Done:
    """Run the stock command ``lm_eval WORDS``."""
    from lm_eval.__main__ import cli_evaluate

    with mock.patch.object(sys, "argv", ["lm_eval", *map(str, words)]):
        return _run(cli_evaluate)


def compared(*words: Any) -> dict[str, Any]:
    """Return what ``lm-eval-pruned compare WORDS --format json`` says."""
    done = pruned("compare", *words, "--format", "json")
    assert done.code == 0, done.err
    return json.loads(done.out, parse_constant=_refuse)


def results_in(folder: str | Path) -> dict[str, Any]:
    """Return the only results file below `folder`."""
    (path,) = Path(folder).rglob("results_*.json")
    return json.loads(path.read_text(encoding="utf-8"))


def _refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _run(call: Callable[[], Any]) -> Done:
    out, err = io.StringIO(), io.StringIO()
    # Log handlers of an earlier command write to its terminal, which is gone.
    gone = mock.patch.object(logging, "raiseExceptions", False)
    with gone, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = call() or 0
        except SystemExit as ending:
            code = ending.code or 0
            if not isinstance(code, int):  # Python prints it.
                err.write(f"{code}\n")
                code = 1
    return Done(code, out.getvalue(), err.getvalue())
