"""docs/models.md: which models are pruned, how they are loaded, and what an export is."""

from __future__ import annotations

import json

from tests.contract.commands import pruned
from tests.helpers import layouts
from tests.helpers.checkpoints import save_tiny


def prune(source, output, *words):
    """Run ``lm-eval-pruned prune``, by default with the cut of the study."""
    command = ["prune", "--model_args", f"pretrained={source}", "--output_path", output]
    return pruned(*command, *words)


STUDY = ("--prune_percent", 40, "--recipe", "study")


def test_experts_whose_width_the_grouped_product_refuses_run_one_by_one(tmp_path):
    """Before the cut, too, where the export measures what it costs."""
    source, widths = tmp_path / "source", tmp_path / "widths.json"
    save_tiny(source, "deepseek_v3", **layouts.overrides("deepseek_v3", 35))
    widths.write_text(json.dumps({"1": 20}))
    done = prune(source, tmp_path / "out", "--widths", widths, "--check")
    assert done.code == 0, done.err
    assert "loss, nats per token" in done.out
