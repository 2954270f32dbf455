"""One scoring, and one pass of text, for all sizes: scores that outlive a load."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from lm_eval_pruned import load_pruned
from lm_eval_pruned.checkpoints.load import load_request
from lm_eval_pruned.checkpoints.planning import plan_rows
from lm_eval_pruned.checkpoints.request import LoadRequest
from lm_eval_pruned.pruning import measuring
from lm_eval_pruned.pruning.arguments import PruneArguments
from lm_eval_pruned.pruning.criteria import CALIBRATED, CRITERIA, RANDOM
from tests.helpers.ways_to_load import assert_same_model, write_texts


@pytest.fixture
def text(tmp_path):
    return {"calibration": write_texts(tmp_path / "texts.jsonl")}


@pytest.fixture
def work(monkeypatch):
    """List what is computed: MLPs that are scored, and passes of text by what they are for."""
    found: list[str] = []
    for module, name in (
        (measuring, "score_neurons"),
        (measuring, "calibrate"),
        (measuring, "block_influence"),
        (measuring, "curvature"),
        (measuring, "errors_of_cuts"),
    ):
        original = getattr(module, name)

        def counted(*args, run=original, what=name, **named):
            found.append(what)
            return run(*args, **named)

        monkeypatch.setattr(module, name, counted)
    return found


@pytest.fixture
def load(tiny_llama, work):
    """Load with the scores of earlier calls; fail unless it is what `load_pruned` gives."""
    known_scores = {}

    def load(folder=tiny_llama, **given):
        arguments = dict(given)
        asked = PruneArguments.taken_from(arguments)
        auto = AutoModelForCausalLM
        request = LoadRequest.resolve(auto, str(folder), asked, arguments)
        model = load_request(request, known_scores=known_scores)
        counted = [*work]
        alone = load_pruned(str(folder), **given)
        assert_same_model(model, alone)
        assert model.prune_record.as_dict() == alone.prune_record.as_dict()
        work[:] = counted

    return load


PERCENTS = [{"prune_percent": percent} for percent in (0, 10, 40, 60)]
DEPTH = {"drop_by": "block_influence"}
RANDOM_1 = {"ratio": 1, "criterion": RANDOM}
SHARED = {"ratio": 2, "criterion": "act", "allocation": "sensitivity"}
#: Loads, and how often what is computed for them: a model has three layers.
LOADS = [
    *(
        ([each | {"criterion": name} for each in PERCENTS], {"score_neurons": 3})
        for name in (*CRITERIA, RANDOM)
    ),
    ([DEPTH | {"drop_layers": count} for count in (1, 2)], {"block_influence": 1}),
    ([RANDOM_1, {"ratio": 1}, RANDOM_1 | {"seed": 7}], {"score_neurons": 9}),
    ([{"ratio": 1, "layers": each} for each in ("0", "0-1")], {"score_neurons": 2}),
    (
        [{"ratio": 2, "dtype": each} for each in (torch.bfloat16, torch.float16)],
        {"score_neurons": 3},
    ),
    (
        [SHARED, SHARED | {"repair": "least_squares"}],
        {"score_neurons": 3, "curvature": 1, "errors_of_cuts": 2},
    ),
]


@pytest.mark.parametrize(("loads", "expected"), LOADS)
def test_several_sizes_are_measured_once(loads, expected, load, work, text):
    needs_text = {*CALIBRATED, *DEPTH.values()}
    for asked in loads:
        load(**asked, **(text if needs_text & {*map(str, asked.values())} else {}))
    if loads[0].get("criterion") in CALIBRATED:
        expected = expected | {"calibrate": 1}
    assert {name: work.count(name) for name in expected} == expected
    assert {*work} == {*expected}


def test_the_plan_of_several_sizes_takes_one_pass_of_text(tiny_llama, text, work):
    plan_rows(str(tiny_llama), "drop_layers", [1, 2], **DEPTH, **text)
    assert work == ["block_influence"]
    sizes = (str(tiny_llama), "prune_percent", [20, 40])
    rows = plan_rows(*sizes, criterion="act", allocation="sensitivity", **text)
    passes = ("calibrate", "curvature", "errors_of_cuts")
    assert [work.count(name) for name in passes] == [1, 1, 1]
    assert all(row.layer_widths for row in rows)
    alike = [row.parameters for row in plan_rows(*sizes)]
    assert [row.parameters for row in rows] == alike
