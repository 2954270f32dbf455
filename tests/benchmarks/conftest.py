"""What tests of the scripts in `benchmarks/` share."""

from __future__ import annotations

import importlib

import pytest

from tests.helpers import checkpoints


@pytest.fixture(scope="module")
def script():
    """Return a function that imports a script by its name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(checkpoints.ROOT / "benchmarks"))
        yield importlib.import_module
