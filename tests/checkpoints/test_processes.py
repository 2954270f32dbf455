"""Several processes, several devices: the same kept set, the same scores."""

from __future__ import annotations

import sys

import pytest
import torch.utils.backend_registration

from tests.helpers import evaluations
from tests.helpers.checkpoints import ROOT


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.slow
@pytest.mark.skipif(
    not hasattr(
        torch.utils.backend_registration, "_setup_privateuseone_for_python_backend"
    ),
    reason="this torch cannot simulate a device in Python",
)
def test_no_tensor_of_another_device_slips_in():
    command = [sys.executable, "-m", "pytest", "-q", "tests/helpers/on_the_card.py"]
    evaluations.run(command, ROOT, check=True, timeout=None)
