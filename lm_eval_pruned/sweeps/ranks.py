"""One sweep in several processes that share each unit, as `accelerate launch` starts them.

The harness splits a unit's documents among the processes and gathers the scores
in the first one. That one alone reads and writes the sweep's folder; here is what
the others have to hear from it, and it from them.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from typing import TypeVar


T = TypeVar("T")


class Ranks:
    """The processes of this launch; a process on its own needs no other.

    Attributes:
        main: Whether this process keeps the results.
    """

    def __init__(self) -> None:
        """Meet the other processes.

        Raises:
            ValueError: A launcher announced several, and they cannot find each other.
        """
        self._several = int(os.environ.get("WORLD_SIZE") or 1) > 1
        self.main = True
        if self._several:
            from accelerate import Accelerator, InitProcessGroupKwargs

            # As HFLM has it: processes wait for the slowest, however long it takes.
            patience = InitProcessGroupKwargs(timeout=timedelta(weeks=52))
            accelerator = Accelerator(kwargs_handlers=[patience])
            if accelerator.num_processes == 1:
                raise ValueError(
                    f"WORLD_SIZE={os.environ['WORLD_SIZE']} announces several processes, but "
                    "accelerate sees one: set ACCELERATE_USE_CPU=true for processes on CPUs."
                )
            self.main = accelerator.is_main_process

    def from_main(self, value: T) -> T:
        """Return the main process's `value` in every process."""
        if not self._several:
            return value
        from accelerate.utils import broadcast_object_list

        (value,) = broadcast_object_list([value])
        return value

    def first_error(self, error: dict[str, str] | None) -> dict[str, str] | None:
        """Return, in every process, the error of the first one that has any."""
        if not self._several:
            return error
        from accelerate.utils import gather_object

        return next((each for each in gather_object([error]) if each), None)


def device_failed(error: BaseException | None) -> bool:
    """Return whether the accelerator failed, after which this process can use it no more.

    torch's releases before 2.8 raise a plain RuntimeError. Too little memory is no such failure.
    """
    while error is not None:
        if isinstance(error, RuntimeError) and re.match(
            r"(CUDA|HIP|XPU)( driver)? error: (?!out of memory)", str(error)
        ):
            return True
        error = error.__cause__ or error.__context__
    return False
