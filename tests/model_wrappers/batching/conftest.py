from __future__ import annotations

import pytest

from lm_eval_pruned.model_wrappers.batching import prefix_sharing
from tests.helpers.answering import GENERATED, ROLLING, SCORED


@pytest.fixture(params=[SCORED, ROLLING, GENERATED], ids=lambda k: k.request_type)
def kind(request):
    """Every type of request."""
    return request.param


@pytest.fixture(params=[SCORED, GENERATED], ids=lambda k: k.fast)
def fast(request):
    """One type of request for each fast path."""
    return request.param


@pytest.fixture
def share_however_little(monkeypatch):
    monkeypatch.setattr(prefix_sharing, "_least_saving", lambda device: -9.0)
