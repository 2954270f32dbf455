"""Curves of layers as ``sensitivity.json`` holds them, made up."""

from __future__ import annotations

from typing import Any


def made_curves(
    layers: int = 4,
    width: int = 100,
    kept: tuple[int, ...] = (50, 90),
    criteria: tuple[str, ...] = ("maw", "act"),
    seeds: tuple[int, ...] = (0, 1, 2),
    loss: float = 3.0,
) -> dict[str, Any]:
    """Return curves in which ``maw`` misjudges layer 0, and ``act`` no layer.

    A share s of removed neurons costs s at random, 0.1 s more with each seed; by ``maw``
    4 s in layer 0 and 1.05 s elsewhere, by any other criterion 0.1 s.
    """
    slopes: list = [
        (n, None, (4.0, 1.05) if n == "maw" else (0.1, 0.1)) for n in criteria
    ]
    slopes += [("random", seed, (1 + 0.1 * seed, 1 + 0.1 * seed)) for seed in seeds]
    return {
        "format": "lm-eval-pruned sensitivity",
        "version": 1,
        "model": "a model",
        "loss": loss,
        "curves": [
            {
                "layer": layer,
                "width_before": width,
                "criterion": criterion,
                "seed": seed,
                "widths": list(kept),
                "losses": [
                    loss + slope[layer > 0] * (1 - each / width) for each in kept
                ],
            }
            for layer in range(layers)
            for criterion, seed, slope in slopes
        ],
        "file": "text.jsonl",
        "sha256": "0" * 64,
        "texts": 2,
        "tokens": 256,
        "path": "layer by layer",
    }
