"""Criteria: importance scores of the neurons of a GLU-MLP.

A criterion takes the rows of ``gate_proj`` and ``up_proj`` and returns one score
per neuron; the neurons with the highest scores are kept. Those in `CALIBRATED` also
take ``down_proj`` and what the neurons did on calibration text. Other packages add
criteria under the entry-point group `GROUP`; ``docs/criteria.md`` shows how.

This module imports torch only to compute, so that names can be checked without it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import inspect
from typing import TYPE_CHECKING, Any


if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint

    from torch import Tensor

    from lm_eval_pruned.pruning.calibration import NeuronActivity

    Criterion = Callable[[Tensor, Tensor], Tensor]
    CalibratedCriterion = Callable[[Tensor, Tensor, Tensor, NeuronActivity], Tensor]

#: Rows are scored in blocks of about this many elements, which bounds the float32 copy.
_BLOCK_ELEMENTS = 1 << 20


def _peak_to_peak(rows: Tensor) -> Tensor:
    highest, lowest = _extremes(rows)
    return highest + lowest.abs()


def _largest_magnitude(rows: Tensor) -> Tensor:
    highest, lowest = _extremes(rows)
    return highest.abs().maximum(lowest.abs())


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    from lm_eval_pruned.pruning.arrays import row_extremes

    # Conversions keep the order of numbers, so only 2 * I values are converted.
    highest, lowest = row_extremes(rows)
    return highest.float(), lowest.float()


def maw(gate: Tensor, up: Tensor) -> Tensor:
    """Peak-to-peak magnitude, the criterion of the study.

    score = (max g + abs(min g)) + (max u + abs(min u)) over the rows g and u.

    Args:
        gate: Rows of ``gate_proj``, shape (neurons, H), floating point.
        up: Rows of ``up_proj``, shape (neurons, H), floating point.

    Returns:
        Scores, shape (neurons,), float32.

    Source: arXiv 2512.22671, equation 5. Its first version calls the score
    Maximum Absolute Weight, its later one Peak-to-Peak Magnitude.
    """
    return _peak_to_peak(gate) + _peak_to_peak(up)


def max_abs(gate: Tensor, up: Tensor) -> Tensor:
    """Largest absolute weight, literally: max(abs(g)) + max(abs(u)).

    Shapes and dtype as in `maw`.
    """
    return _largest_magnitude(gate) + _largest_magnitude(up)


def l1(gate: Tensor, up: Tensor) -> Tensor:
    """Sum of the l1 norms of the two rows. Shapes and dtype as in `maw`."""
    return gate.float().norm(p=1, dim=1) + up.float().norm(p=1, dim=1)


def l2(gate: Tensor, up: Tensor) -> Tensor:
    """Sum of the l2 norms of the two rows. Shapes and dtype as in `maw`."""
    return gate.float().norm(p=2, dim=1) + up.float().norm(p=2, dim=1)


def vow(gate: Tensor, up: Tensor) -> Tensor:
    """Sum of the variances of the weights of the two rows (divisor H - 1).

    Shapes and dtype as in `maw`. Source: arXiv 2512.22671, section 3.2.
    """
    return gate.float().var(dim=1) + up.float().var(dim=1)


def pon(gate: Tensor, up: Tensor) -> Tensor:
    """Product of the l1 norms of the two rows.

    Shapes and dtype as in `maw`. Source: arXiv 2512.22671, section 3.2.
    """
    return gate.float().norm(p=1, dim=1) * up.float().norm(p=1, dim=1)


def maw_act(gate: Tensor, up: Tensor, down: Tensor, activity: NeuronActivity) -> Tensor:
    """Peak-to-peak magnitude of all three slices, times how active the neuron is.

    score_i = (p(g) / max p(g) + p(u) / max p(u) + p(d) / max p(d)) * s_i, where p is
    max + abs(min) over the rows of gate and up and the columns of down, max is over
    the neurons of the MLP, and s_i sums the l2 norms of x_i in each text.

    Args:
        gate: Shape (I, H).
        up: Shape (I, H).
        down: Shape (H, I).
        activity: What the neurons did on the calibration text.

    Returns:
        Scores, shape (I,), float32.

    Source: the data-driven mode of optipfair 0.4.2, after CFSP (arXiv 2409.13199),
    with one text per batch.
    """
    structure = sum(
        peaks / peaks.max().clamp_min(_TINY)
        for peaks in map(_peak_to_peak, (gate, up, down.T))
    )
    return structure * activity.summed_norms.float().to(gate.device)


def act(gate: Tensor, up: Tensor, down: Tensor, activity: NeuronActivity) -> Tensor:
    """Norm of what a neuron adds to the residual stream, Wanda's score by column.

    score_i = l2(d_i) * l2(x_i), where d_i is column i of down and x_i holds the
    values of neuron i at all tokens of all texts. It is the l2 norm of Wanda's
    scores abs(d_ij) * l2(x_i) over the column.

    Shapes and dtype as in `maw_act`. Source: arXiv 2306.11695, equation 1.
    """
    return down.float().norm(p=2, dim=0) * activity.norm.float().to(down.device)


_TINY = 1e-30

CRITERIA: dict[str, Criterion] = {
    "maw": maw,
    "max_abs": max_abs,
    "l1": l1,
    "l2": l2,
    "vow": vow,
    "pon": pon,
}
#: Criteria that are a sum over gate and up of something of each row's extremes.
_OF_EXTREMES = {"maw": _peak_to_peak, "max_abs": _largest_magnitude}
#: Criteria that need calibration text.
CALIBRATED: dict[str, CalibratedCriterion] = {"maw_act": maw_act, "act": act}
ALIASES = {"ppm": "maw"}
#: The control: scores that do not look at the weights.
RANDOM = "random"
#: The wish to have the criterion chosen layer by layer; see `lm_eval_pruned.pruning.allocation`.
BEST = "best"
#: Entry-point group under which other packages declare criteria, name -> function.
GROUP = "lm_eval_pruned.criteria"


def canonical_name(criterion: str, *, or_best: bool = False) -> str:
    """Return the name of a criterion without aliases.

    Args:
        criterion: The name.
        or_best: Whether ``best`` will do, which stands for one of several.

    Raises:
        ValueError: `criterion` is unknown; the message lists the known ones.
    """
    name = ALIASES.get(criterion, criterion)
    if name == BEST and or_best:
        return name
    if name == RANDOM or name in CRITERIA or name in CALIBRATED:
        return name
    added = declared_elsewhere(GROUP)
    if name not in added:
        own = [*CRITERIA, *CALIBRATED, RANDOM, *([BEST] if or_best else []), *ALIASES]
        known = ", ".join([*own, *sorted(added)])
        raise ValueError(f"criterion={criterion} is unknown: pass one of {known}.")
    return name


def declared_elsewhere(group: str) -> dict[str, list[EntryPoint]]:
    """Return what other packages declare in a group of entry points, by name."""
    from importlib.metadata import entry_points

    found: dict[str, list[EntryPoint]] = {}
    for entry_point in entry_points(group=group):
        found.setdefault(entry_point.name, []).append(entry_point)
    return found


def load_declared(group: str, argument: str, name: str) -> Callable[..., Any]:
    """Import the function that another package declares under `name`.

    Args:
        group: Group of entry points.
        argument: What the user calls it by, such as ``criterion``.
        name: Name in the group.

    Raises:
        ValueError: It is declared twice, or cannot be imported, or is no function.
    """
    found = declared_elsewhere(group)[name]
    declared = {entry_point.value: entry_point for entry_point in found}
    if len(declared) > 1:
        raise ValueError(
            f"{argument}={name} is declared by several packages ({', '.join(sorted(declared))}): "
            "uninstall all but one."
        )
    ((value, entry_point),) = declared.items()
    try:
        function = entry_point.load()
        if not callable(function):
            raise TypeError(f"it is a {type(function).__name__}, not a function")
    except Exception as error:
        raise ValueError(
            f"{argument}={name} is declared as {value}, which cannot be imported "
            f"({type(error).__name__}: {error}): repair the package that declares it."
        ) from error
    return function


def code_behind(criterion: str) -> str | None:
    """Identify the code of a criterion as it was when it was first asked for.

    Args:
        criterion: Canonical name.

    Returns:
        Of another package's criterion, package and version, and the SHA-256 of the module
        that holds it where there is source; empty for a criterion of this package. None
        where nothing tells one code from another.

    Raises:
        ValueError: See `load_declared`.
    """
    if criterion == RANDOM or criterion in CRITERIA or criterion in CALIBRATED:
        return ""
    function = load_declared(GROUP, "criterion", criterion)
    package = declared_elsewhere(GROUP)[criterion][0].dist
    known = None if package is None else f"{package.name} {package.version}"
    with contextlib.suppress(OSError, TypeError):
        known = f"{known} {_source_digest(function)}"
    return known


@functools.cache
def _source_digest(function: Callable[..., Any]) -> str:
    # Remembered: a file may change after it was imported.
    module = inspect.getmodule(function)
    source = inspect.getsource(function if module is None else module)
    return hashlib.sha256(source.encode()).hexdigest()


def _checked(scores: Tensor, criterion: str, neurons: int) -> Tensor:
    """Return the scores of a criterion that this package did not write, as float32.

    Raises:
        ValueError: They are no finite vector with one number per neuron.
    """
    import torch

    expected = f"it must return a finite real tensor of shape ({neurons},)"
    is_tensor = isinstance(scores, torch.Tensor)
    if not is_tensor or scores.shape != (neurons,) or scores.is_complex():
        found = (
            f"a tensor of shape {tuple(scores.shape)} and {scores.dtype}"
            if is_tensor
            else f"a {type(scores).__name__}"
        )
        raise ValueError(f"criterion={criterion} returned {found}: {expected}.")
    scores = scores.detach().float()
    bad = int((~scores.isfinite()).sum())
    if bad:
        raise ValueError(
            f"criterion={criterion} returned {bad} scores that are NaN or infinite in float32: "
            f"{expected}."
        )
    return scores


def score_neurons(
    gate: Tensor,
    up: Tensor,
    criterion: str,
    *,
    layer: int = 0,
    seed: int = 0,
    down: Tensor | None = None,
    activity: NeuronActivity | None = None,
) -> Tensor:
    """Score the neurons of one GLU-MLP.

    Args:
        gate: ``gate_proj.weight``, shape (I, H), floating point.
        up: ``up_proj.weight``, shape (I, H), same device.
        criterion: Canonical name of a criterion.
        layer: Position of the MLP in its model; with `seed` it fixes ``random``.
        seed: Seed of ``random``; other criteria ignore it.
        down: ``down_proj.weight``, shape (H, I); read by the criteria in `CALIBRATED`.
        activity: What the neurons did on calibration text; likewise.

    Returns:
        Scores, shape (I,), float32. Where rounding depends on the device, they are
        computed on the CPU and stay there: weights elsewhere are fetched in blocks,
        but those of another package's criterion all at once. Exact and calibrated
        ones are computed on the device of the weights.

    Raises:
        ValueError: A criterion of another package cannot be imported, or returns
            anything but one finite number per neuron.
    """
    import torch

    if criterion == RANDOM:
        generator = torch.Generator().manual_seed((seed << 20) + layer)
        order = torch.randperm(gate.shape[0], generator=generator, device="cpu")
        return order.float()
    if criterion in CALIBRATED:
        if down is None or activity is None:
            raise ValueError(
                f"criterion={criterion} needs down_proj and the activity of its neurons."
            )
        return CALIBRATED[criterion](gate, up, down, activity)
    if criterion in _OF_EXTREMES:
        part = _OF_EXTREMES[criterion]
        return part(gate) + part(up)
    if criterion not in CRITERIA:
        function = load_declared(GROUP, "criterion", criterion)
        # It may compare neurons with each other, so it sees all of them at once.
        scores = function(gate.cpu(), up.cpu())
        return _checked(scores, criterion, gate.shape[0]).cpu()
    function = CRITERIA[criterion]
    rows = max(1, _BLOCK_ELEMENTS // gate.shape[1])
    return torch.cat(
        [
            function(gate_rows.cpu(), up_rows.cpu())
            for gate_rows, up_rows in zip(gate.split(rows), up.split(rows), strict=True)
        ]
    )


def proves_finite(criterion: str) -> bool:
    """Return whether a criterion looks at the extremes of rows alone.

    Then finite scores prove that gate and up are finite, and no weight is copied.
    """
    return criterion in _OF_EXTREMES


def kept_set(scores: Tensor, width: int) -> Tensor:
    """Return the kept neurons in their original order; ties go to the lower index.

    Args:
        scores: Shape (I,), floating point, finite.
        width: Kept width k, 1 <= k <= I.

    Returns:
        Indices, shape (k,), int64, ascending.
    """
    order = scores.sort(descending=True, stable=True).indices
    return order[:width].sort().values
