"""Loading and pruning for another device than the CPU, on a simulated one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch.utils.backend_registration

from tests.helpers import checkpoints


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(
        torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"
    ),
    reason="this torch cannot simulate a device in Python",
)
def test_no_tensor_of_another_device_slips_in():
    # The device stays registered for the rest of a process.
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "tests/helpers/on_the_card.py"],
        cwd=checkpoints.ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
