"""Criteria: importance scores of the neurons of a GLU-MLP.

A criterion gives each neuron one score; the neurons with the highest scores are kept.
`CRITERIA` has those of this package. Other packages add criteria under the entry-point
group `GROUP`; ``docs/own.md`` shows how.
Torch is imported only to compute, so that names can be checked without it.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from typing import TYPE_CHECKING


if TYPE_CHECKING:
    from collections.abc import Callable
    from importlib.metadata import EntryPoint

    import numpy as np
    from torch import Tensor

#: The control: scores that do not look at the weights.
RANDOM = "random"
#: Order by what a removal costs after repair; see `lm_eval_pruned.pruning.repair`.
OBS = "obs"
ALIASES = {"ppm": "maw"}
#: Entry-point group under which other packages declare criteria, name -> function.
GROUP = "lm_eval_pruned.criteria"

#: Rows are scored in blocks of about this many elements, which bounds the float32 copy.
_BLOCK_ELEMENTS = 1 << 20
#: As many 16-bit elements fit into an L2 cache.
_CACHED_ELEMENTS = 1 << 18
_TINY = 1e-30


@dataclass(frozen=True)
class Criterion:
    """A way to score neurons.

    Attributes:
        score: Takes gate and up, shape (neurons, H), and for ``activity`` also down, shape
            (H, neurons), and `Calibration.norms`. Returns shape (neurons,), float32.
        needs: ``extremes`` of gate and up only, where no rounding depends on the device, and
            finite scores prove that the weights are finite; ``weights``, all of gate and up;
            or ``activity``, what the neurons do on calibration text.
    """

    score: Callable[..., Tensor]
    needs: str = "weights"


def _sum(of_rows: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: of_rows(gate) + of_rows(up)


def _product(of_rows: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda gate, up: of_rows(gate) * of_rows(up)


def _norm(order: int) -> Callable[[Tensor], Tensor]:
    return lambda rows: rows.float().norm(p=order, dim=1)


def _variance(rows: Tensor) -> Tensor:
    return rows.float().var(dim=1)


def _peak_to_peak(rows: Tensor) -> Tensor:
    highest, lowest = _extremes(rows)
    return highest + lowest.abs()


def _largest_magnitude(rows: Tensor) -> Tensor:
    highest, lowest = _extremes(rows)
    return highest.abs().maximum(lowest.abs())


def _extremes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return the largest and the smallest weight of each row, float32; one is NaN if any is."""
    import numpy as np
    import torch

    words = as_words(rows)
    if words is None:
        return rows.amax(dim=1).float(), rows.amin(dim=1).float()
    # Read as integers, floats with a sign bit are below the others, and above them without
    # sign; among themselves, those that are farther from 0 have the larger bits.
    step = max(1, _CACHED_ELEMENTS // words.shape[1])
    blocks = (words[start : start + step] for start in range(0, len(words), step))
    pairs = [(b.max(axis=1), b.view(np.uint16).max(axis=1)) for b in blocks]
    extremes = [
        np.concatenate(parts).view(np.int16) for parts in zip(*pairs, strict=True)
    ]
    bits = torch.from_numpy(np.stack(extremes))
    highest, lowest = bits.view(rows.dtype).float()
    one_sign = (bits[0] < 0) | (bits[1] >= 0)
    highest[one_sign] = rows[one_sign].amax(dim=1).float()
    lowest[one_sign] = rows[one_sign].amin(dim=1).float()
    return highest, lowest


def as_words(weights: Tensor) -> np.ndarray | None:
    """Return the bits of 16-bit floats on the CPU as int16, in the same memory.

    On them numpy finds extremes and gathers columns two to three times as fast as torch does.
    None for any other tensor, also for subclasses, which may hold their numbers otherwise.
    """
    import torch

    plain = type(weights) in (torch.Tensor, torch.nn.Parameter)
    on_cpu = weights.device.type == "cpu" and weights.is_contiguous()
    if not plain or not on_cpu or weights.element_size() != 2:
        return None
    return weights.detach().view(torch.int16).numpy()


def _maw_act(gate: Tensor, up: Tensor, down: Tensor, activity: Tensor) -> Tensor:
    # p is `_peak_to_peak`; its maxima run over the neurons; s sums over texts the norm in each.
    structure = sum(
        peaks / peaks.max().clamp_min(_TINY)
        for peaks in map(_peak_to_peak, (gate, up, down.T))
    )
    return structure * activity[1].float().to(gate.device)


def _act(gate: Tensor, up: Tensor, down: Tensor, activity: Tensor) -> Tensor:
    # x are the values of the neuron at all tokens: the l2 norm of Wanda's scores by column.
    return down.float().norm(p=2, dim=0) * activity[0].float().to(down.device)


#: The formula of each, and where it comes from: ``docs/criteria.md``.
CRITERIA = {
    "maw": Criterion(_sum(_peak_to_peak), needs="extremes"),
    "max_abs": Criterion(_sum(_largest_magnitude), needs="extremes"),
    "l1": Criterion(_sum(_norm(1))),
    "l2": Criterion(_sum(_norm(2))),
    "vow": Criterion(_sum(_variance)),
    "pon": Criterion(_product(_norm(1))),
    "maw_act": Criterion(_maw_act, needs="activity"),
    "act": Criterion(_act, needs="activity"),
}
#: Criteria that score by what neurons do on text, and those that need calibration text.
ACTIVITY = tuple(
    name for name, criterion in CRITERIA.items() if criterion.needs == "activity"
)
CALIBRATED = (*ACTIVITY, OBS)


_SMOLLM2, _GEMMA3 = "SmolLM2-135M-Instruct", "Gemma-3-270M"
#: In which models, and at which shares of the neurons removed, in percent, the mean loss of random
#: cuts was lower than that of a criterion; 10 to 50 % were measured, some up to 60.
#:
#: Source: ``docs/measurements``, ``recipes.csv`` for maw and ``dichotomy.csv`` for the others.
CHANCE_BEATS: dict[str, dict[str, tuple[int, ...]]] = {
    "maw": {_SMOLLM2: (10, 20), _GEMMA3: (10, 20, 30, 40)},
    "maw, skip_layers=0": {_GEMMA3: (10, 20, 30)},
    "max_abs": {_SMOLLM2: (10, 20, 30), _GEMMA3: (10, 20)},
    "l2": {_SMOLLM2: (10, 20, 30, 40), _GEMMA3: (10, 20, 30, 40, 50, 60)},
    "pon": {_SMOLLM2: (10, 20, 30, 40, 50), _GEMMA3: (10, 20, 30, 40, 50, 60)},
}


def beaten_by_chance(cut: str, removed: float) -> str | None:
    """Return a sentence if a random cut was better where a share, 0 to 1, was removed.

    Args:
        cut: A key of `CHANCE_BEATS`, or another criterion.
        removed: The share. What was measured next to it counts.
    """
    shares_by_model = CHANCE_BEATS.get(cut, {})
    measured = max(10, 10 * round(10 * removed))
    if not any(measured in shares for shares in shares_by_model.values()):
        return None
    where = " and ".join(
        f"{model} ({', '.join(map(str, shares))} % removed)"
        for model, shares in shares_by_model.items()
    )
    default = ", the default, repeats the study and" if cut == "maw" else ""
    return (
        f"criterion={cut}{default} did worse than a random cut in {where}: pass recipe=best if you want "
        "to keep what the model can do."
    )


def canonical_name(criterion: str) -> str:
    """Return the name of a criterion without aliases.

    Raises:
        ValueError: `criterion` is unknown; the message lists the known ones.
    """
    # JSON may hold a list here.
    name = ALIASES.get(str(criterion), str(criterion))
    names = [*CRITERIA, RANDOM, OBS]
    if name not in names and name not in (added := _declared_elsewhere()):
        known = [*names, *ALIASES, *sorted(added)]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise ValueError(
            f"criterion={criterion} is unknown: pass one of {', '.join(known)}{hint}."
        )
    return name


def _declared_elsewhere() -> dict[str, EntryPoint]:
    from importlib.metadata import entry_points

    return {entry.name: entry for entry in entry_points(group=GROUP)}


def score_neurons(
    gate: Tensor,
    up: Tensor,
    criterion: str,
    *,
    layer: int = 0,
    seed: int = 0,
    down: Tensor | None = None,
    activity: Tensor | None = None,
    name: str = "mlp",
) -> Tensor:
    """Score the neurons of one GLU-MLP.

    Args:
        gate: ``gate_proj.weight``, shape (I, H), floating point.
        up: ``up_proj.weight``, shape (I, H), same device.
        criterion: Canonical name of a criterion.
        layer: Position of the MLP in its model; with `seed` it fixes ``random``.
        seed: Seed of ``random``; other criteria ignore it.
        down: ``down_proj.weight``, shape (H, I), for the criteria in `CALIBRATED`.
        activity: What the neurons did on calibration text, for the same criteria: see `Calibration`.
        name: Path of the MLP in its model, for messages.

    Returns:
        Scores, shape (I,), float32: on the CPU where rounding depends on the device, else on that
        of the weights.

    Raises:
        ValueError: A weight is NaN or infinite; the tensor is named. Or a criterion of another
            package returns anything but one finite number per neuron.
    """
    import torch

    gate, up = gate.detach(), up.detach()
    if down is not None:
        down = down.detach()
        check_finite(f"{name}.down_proj.weight", down)
    known, scores = CRITERIA.get(criterion), None
    if known is not None and known.needs == "extremes":
        scores = known.score(gate, up)
    if scores is None or not scores.isfinite().all():
        check_finite(f"{name}.gate_proj.weight", gate)
        check_finite(f"{name}.up_proj.weight", up)
    if scores is not None:
        return scores
    if criterion == RANDOM:
        generator = torch.Generator().manual_seed((seed << 20) + layer)
        order = torch.randperm(gate.shape[0], generator=generator, device="cpu")
        return order.float()
    if known is None:
        # It may compare neurons with each other, so it sees all of them at once.
        scores = _declared_elsewhere()[criterion].load()(gate.cpu(), up.cpu())
        scores = scores.detach().float().cpu()
        if scores.shape != gate.shape[:1] or not scores.isfinite().all():
            raise ValueError(
                f"criterion={criterion} returned scores of shape {tuple(scores.shape)}, some of "
                f"them maybe NaN or infinite: it must return {len(gate)} finite numbers."
            )
        return scores
    if known.needs == "activity":
        return known.score(gate, up, down, activity)
    rows = max(1, _BLOCK_ELEMENTS // gate.shape[1])
    blocks = zip(gate.split(rows), up.split(rows), strict=True)
    return torch.cat([known.score(g.cpu(), u.cpu()) for g, u in blocks])


def check_finite(name: str, weight: Tensor) -> None:
    """Raise ValueError if `weight`, which the message calls `name`, holds NaN or infinity."""
    import torch

    # A finite sum proves that every term is finite; one that overflows proves nothing.
    if weight.sum().isfinite():
        return
    if bad := int((~weight.isfinite()).sum()):
        wider = ", or pass dtype=float32, which holds values above 65504"
        raise ValueError(
            f"{name} holds {bad} NaN or infinite values of {weight.numel()}: use an intact "
            f"checkpoint{wider if weight.dtype == torch.float16 else ''}."
        )


def kept_set(scores: Tensor, width: int) -> Tensor:
    """Return the indices of the `width` highest scores, int64, ascending; ties go to the lower."""
    order = scores.sort(descending=True, stable=True).indices
    return order[:width].sort().values
