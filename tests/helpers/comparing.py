"""Whether two models are one."""

from __future__ import annotations

import torch


def assert_same_model(one, other):
    """Fail unless two models have the same parameters, bit for bit."""
    ours, theirs = dict(one.named_parameters()), dict(other.named_parameters())
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        assert parameter.dtype == theirs[name].dtype, name
        assert torch.equal(parameter, theirs[name]), name
