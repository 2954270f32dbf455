"""Profiles as rows of the page of the dichotomy."""

from __future__ import annotations

import csv
import json

import pytest


def cell(model: str, seconds: float, deltas: dict) -> dict:
    return {
        "model": model,
        "batch_size": 1,
        "mode": "fixed",
        "repeats": 24,
        "seconds_to_first_token": {"mean": 0.2},
        # A model that ends after one token has no second one.
        "seconds_per_output_token": None,
        "seconds_end_to_end": {"mean": seconds},
        "deltas": deltas,
    }


@pytest.fixture
def rows(script, tmp_path):
    """The rows of a profile, as they are read from the table that is written of them."""
    change = {"percent": -10.0, "low": -12.0, "high": -8.0, "verdict": "lower"}
    sizes = [("baseline", 1536), ("ratio=2.4 multiple_of=64", 1344)]
    profile = {
        "models": [
            {
                "name": name,
                "intermediate_size": width,
                "expansion_ratio": width / 576,
                "parameters": 100 * width,
            }
            for name, width in sizes
        ],
        "environment": {"device_name": "some processor", "threads": 1},
        "cells": [
            cell("baseline", 2.0, {}),
            cell("ratio=2.4 multiple_of=64", 1.8, {"seconds_end_to_end": change}),
        ],
    }
    folder = tmp_path / "smollm2" / "latency"
    folder.mkdir(parents=True)
    (folder / "profile.json").write_text(json.dumps(profile))
    files = script("dichotomy.collecting").collect(tmp_path).files()
    return list(csv.DictReader(files["latency.csv"].splitlines()))


def test_the_table_says_what_it_is_the_mean_of(script, rows):
    text = "\n".join(script("dichotomy.comparisons_page").latency_section(rows))
    assert (
        "SmolLM2-135M-Instruct on some processor, 1 thread(s), means of 24 repeats;"
        in text
    )
    assert "|1536|2.67|1|fixed|200||2.00|||" in text
    assert "|1344|2.33|1|fixed|200||1.80|-10 % (-12 to -8)|lower|" in text


def test_profiles_of_other_lengths_are_not_mixed(script, rows):
    fewer = [{**row, "repeats": "6"} for row in rows]
    section = script("dichotomy.comparisons_page").latency_section([*rows, *fewer])
    assert ["means of 24" in block for block in section].count(True) == 1
    assert ["means of 6" in block for block in section].count(True) == 1
