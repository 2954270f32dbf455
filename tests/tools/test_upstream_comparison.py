"""The script for the harness says what `lm-eval-pruned compare` says, without scipy."""

from __future__ import annotations

import ast
import functools
import importlib.util
import json
import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st
from scipy import special, stats

from lm_eval_pruned.analysis import comparison, comparison_table, statistics
from lm_eval_pruned.analysis.results_file import ResultsError
from lm_eval_pruned.analysis.runs import read_run
from tests.helpers.results_files import write_run
from tools.upstream_patches import inlining, paired_comparison
from tools.upstream_patches.merge import Rules


N = 40
#: What the script's table shows of ours.
COLUMNS = ["task", "metric", "base", "score", "difference", "95% interval", "p", "q"]
COLUMNS += ["documents", "test", "verdict"]


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """The patch, in a stand-in for a checkout of the harness."""
    folder = tmp_path_factory.mktemp("checkout")
    (folder / "scripts").mkdir()
    (folder / "scripts" / "__init__.py").touch()
    (folder / "README.md").write_text("# Harness\n\n## Visualizing Results\n")
    paired_comparison.PATCH.write(folder)
    return folder


@functools.cache
def loaded(file: Path):
    spec = importlib.util.spec_from_file_location("paired_comparison_script", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def script(checkout):
    return loaded(checkout / paired_comparison.SCRIPT)


def draw(seed: int, *size: int) -> np.ndarray:
    return np.random.default_rng(seed).random(size or N)


def binary(seed: int, share: float = 0.6, n: int = N) -> list[float]:
    return (draw(seed, n) < share).astype(float).tolist()


def changed(values: list[float], every: int) -> list[float]:
    return [1 - v if i % every == 0 else v for i, v in enumerate(values)]


def both(before: dict, after: dict) -> tuple[dict, dict]:
    return before, after


def group(weighted: bool) -> tuple[dict, dict]:
    """Return what `write_run` takes for a group of three tasks, scored in two runs."""
    runs = []
    for seed in (1, 2):
        parts = [binary(seed * 10 + part, n=12 + 9 * part) for part in range(3)]
        flat = [value for part in parts for value in part]
        score = np.mean(flat) if weighted else np.mean([np.mean(p) for p in parts])
        runs.append(
            {
                "tasks": {f"part{n}": {"acc,none": p} for n, p in enumerate(parts)},
                "groups": {"whole": ["part0", "part1", "part2"]},
                "group_scores": {"whole": {"acc,none": float(score)}},
            }
        )
    return runs[0], runs[1]


def one_task(
    task: str, metric: str, before: object, after: object
) -> tuple[dict, dict]:
    return tuple({"tasks": {task: {metric: values}}} for values in (before, after))


def passages(values: list[float], field: str) -> dict:
    docs = {n: {field: n // 3, "question": n} for n in range(len(values))}
    return {"values": values, "docs": docs}


def items(seed: int) -> list[list[bool]]:
    """Return what IFEval logs: some instructions of each prompt were followed."""
    counts = np.random.default_rng(0).integers(1, 4, N)
    rng = np.random.default_rng(seed)
    return [(rng.random(count) < 0.6).tolist() for count in counts]


def words(seed: int, scale: float = 5) -> list[list[float]]:
    counts = np.random.default_rng(0).integers(20, 90, N)
    logs = -scale * counts * (1 + draw(seed))
    return [list(pair) for pair in zip(logs.tolist(), counts.tolist(), strict=True)]


def spec(values: list, aggregation: str, better: bool | None = True) -> dict:
    return {
        "values": values,
        "aggregation": aggregation,
        "higher_is_better": better,
    }


RUNS = {
    "right or wrong": one_task("a", "acc,none", binary(1), changed(binary(1), 5)),
    "one way": one_task("a", "acc,none", [1.0] * N, [0.0] * 9 + [1.0] * 31),
    "all equal": one_task("a", "acc,none", binary(1), binary(1)),
    "all equal, no bits": one_task("a", "f,none", draw(1), draw(1)),
    "all changed alike": one_task("a", "f,none", draw(1), draw(1) + 0.25),
    "one document": one_task("a", "acc,none", [1.0], [0.0]),
    "one document, equal": one_task("a", "acc,none", [1.0], [1.0]),
    "few, no bits": one_task("a", "f,none", draw(1)[:9], draw(2)[:9]),
    "ten, no bits": one_task("a", "f,none", draw(1)[:10], draw(2)[:10]),
    "no bits": one_task("a", "f,none", draw(1), draw(2)),
    "too large": one_task("a", "f,none", draw(1), draw(2) * 1e150),
    "passages": one_task(
        "boolq",
        "acc,none",
        passages(binary(1), "passage"),
        passages(binary(2), "passage"),
    ),
    "stories": one_task(
        "leaderboard_musr_x",
        "acc_norm,none",
        passages(binary(1), "narrative"),
        passages(binary(2), "narrative"),
    ),
    "instructions": one_task(
        "ifeval",
        "inst_level_strict_acc,none",
        spec(items(1), "pooled"),
        spec(items(2), "pooled"),
    ),
    "perplexity": one_task(
        "lambada",
        "perplexity,none",
        spec((-5 * draw(1)).tolist(), "perplexity", False),
        spec((-5 * draw(2)).tolist(), "perplexity", False),
    ),
    "word perplexity": one_task(
        "wikitext",
        "word_perplexity,none",
        spec(words(1), "weighted", False),
        spec(words(2), "weighted", False),
    ),
    "bits per byte": one_task(
        "wikitext",
        "bits_per_byte,none",
        spec(words(1), "bits", None),
        spec(words(2), "bits", None),
    ),
    "group, weighted by size": group(True),
    "group, mean of means": group(False),
    "no known aggregation": one_task(
        "a",
        "f1,none",
        {"values": binary(1), "score": 0.71, "stderr": 0.03},
        {"values": binary(2), "score": 0.61, "stderr": 0.04},
    ),
    "nothing to test with": one_task(
        "a", "f1,none", {"values": [1.0], "score": 0.7}, {"values": [1.0], "score": 0.6}
    ),
    "stderr of 0": one_task(
        "a",
        "f1,none",
        {"values": [1.0], "score": 0.7, "stderr": 0.0},
        {"values": [1.0], "score": 0.6, "stderr": 0.0},
    ),
    "not a number": one_task(
        "a", "acc,none", {"values": [1.0, 0.0], "score": float("nan")}, [1.0, 0.0]
    ),
    "other prompts": one_task(
        "a", "acc,none", binary(1), {"values": binary(2), "prompts": {3: "x", 4: "y"}}
    ),
    "repeated documents": one_task(
        "a",
        "acc,none",
        {"values": binary(1), "docs": dict.fromkeys(range(8), "same")},
        {"values": binary(2), "docs": dict.fromkeys(range(8), "same")},
    ),
    "several metrics and tasks": tuple(
        {
            "tasks": {
                "a": {"acc,none": binary(seed), "acc_norm,none": binary(seed + 5)},
                "b": {"acc,none": changed([1.0] * N, seed + 2)},
                "c": {"f,none": draw(seed), "acc,none": binary(3)},
                **({"only here": {"acc,none": [1.0]}} if seed == 1 else {}),
            }
        }
        for seed in (1, 2)
    ),
}


def write_both(folder: Path, runs: tuple[dict, dict], **options) -> list[str]:
    for name, run in zip(("base", "run"), runs, strict=True):
        write_run(folder / name, **(run | options))
    return [str(folder / "base"), str(folder / "run")]


def table(text: str) -> list[dict[str, str]]:
    """Return the rows of the first Markdown table."""
    lines = [line[1:-1].split("|") for line in text.splitlines() if line[:1] == "|"]
    header, _, *rows = lines
    return [dict(zip(header, row, strict=True)) for row in rows]


def close(value: float | None, expected: float | None) -> bool:
    """Return whether two figures are one, as far as both searches for an end are exact."""
    if value is None or expected is None:
        return value is expected
    return math.isclose(value, expected, rel_tol=1e-9, abs_tol=1e-11)


def over_tasks(ours):
    """Return our comparison with q over the tasks, as the script of two runs adjusts it."""
    qs = statistics.false_discovery_rate(
        [r.p if r.primary else None for r in ours.rows]
    )
    rows = []
    for row, q in zip(ours.rows, qs, strict=True):
        shown = q is None or q < ours.alpha
        rows.append(replace(row, q=q, verdict=row.verdict if shown else "not shown"))
    return replace(ours, rows=tuple(rows))


@pytest.mark.parametrize(
    ("kind", "subtasks"),
    [(kind, False) for kind in RUNS] + [(k, True) for k in RUNS if "group" in k],
)
@pytest.mark.parametrize("samples", [True, False])
def test_figures_are_those_of_compare(kind, samples, subtasks, script, tmp_path):
    paths = write_both(tmp_path, RUNS[kind], samples=samples)
    ours = over_tasks(
        comparison.compare(read_run(paths[0]), [read_run(paths[1])], subtasks=subtasks)
    )
    rows, notes = script.compare(*map(script.read_run, paths), subtasks=subtasks)
    printed = table(script.as_table(rows, notes, 0.05))
    expected = [
        {column: row[column] for column in COLUMNS}
        for row in table(comparison_table.as_table(ours))
    ]
    assert [row | {"score": row.pop("run")} for row in printed] == expected
    for row, other in zip(rows, ours.rows, strict=True):
        for name in ("low", "high", "p", "q"):
            assert close(getattr(row, name), getattr(other, name)), name
    prompts = [note for note in ours.notes if "another prompt" in note]
    assert sum("another prompt" in note for note in notes) == len(prompts)


@given(
    st.lists(st.tuples(*[st.sampled_from([0, 0.5, 1])] * 2), min_size=1, max_size=80),
    st.sampled_from([1, 3]),
    st.sampled_from(["mean", "perplexity", "bits_per_byte"]),
    st.sampled_from([0.2, 0.05, 0.001]),
)
@settings(deadline=None, max_examples=60)
def test_tests_are_those_of_our_statistics(script, pairs, size, transform, alpha):
    base, run = np.array(pairs, dtype=float).T
    n = len(base)
    clusters = [str(i // size) for i in range(n)]
    keys = [(f"task {i // 30}", str(i), 0) for i in range(n)]
    clusters = [f"{task} {c}" for (task, *_), c in zip(keys, clusters, strict=True)]
    weights = np.ones(n)
    one, other = (
        script.Documents(keys, values, weights, clusters, transform, [None] * n)
        for values in (base, run)
    )
    test = script.paired_test(one, other, alpha)
    expected = statistics.paired_difference(
        base,
        run,
        clusters=clusters,
        strata=[task for task, *_ in keys],
        transform=transform,
        alpha=alpha,
    )
    assert test.method == expected.method
    for name in ("low", "high", "p"):
        assert close(getattr(test, name), getattr(expected, name)), name


@pytest.mark.parametrize(("up", "down"), [(0, 0), (310, 260), (1404, 1210), (0, 60)])
def test_mcnemar_of_thousands_of_documents(up, down, script):
    n = 14042
    base = np.r_[np.zeros(up), np.ones(n - up)]
    run = np.r_[np.ones(up), np.zeros(down), np.ones(n - up - down)]
    expected = statistics.paired_difference(base, run)
    test = script.mcnemar(up, down, n, 0.05)
    assert test.p == pytest.approx(expected.p, rel=1e-9)
    assert (test.low, test.high) == pytest.approx(
        (expected.low, expected.high), abs=1e-10
    )


def test_distribution_functions_are_those_of_scipy(script):
    x = np.r_[0, 1e-12, np.linspace(0.001, 0.999, 97), 1 - 1e-12, 1]
    for a in (0.5, 1, 3.5, 40, 900.5, 7000):
        for b in (0.5, 1, 12, 650, 7000.5):
            assert script.incomplete_beta(a, b, x) == pytest.approx(
                special.betainc(a, b, x), rel=1e-9, abs=1e-13
            )
    for degrees in (1, 2, 9, 30, 800, 14041):
        for t in (0, 1e-6, 0.3, 1, 2.5, 8, 30):
            assert script.student_tail(t, degrees) == pytest.approx(
                stats.t.sf(t, degrees), rel=1e-9, abs=1e-15
            )
        for tail in (0.4, 0.1, 0.025, 1e-4):
            assert script.student_quantile(tail, degrees) == pytest.approx(
                stats.t.isf(tail, degrees), rel=1e-9
            )


def other_documents(folder, script):
    paths = write_both(folder, one_task("a", "acc,none", binary(1), binary(1)[:-1]))
    return paths, "1 of 40 only in "


def other_texts(folder, script):
    after = {"values": binary(1), "docs": {3: {"question": "another"}}}
    paths = write_both(folder, one_task("a", "acc,none", binary(1), after))
    return paths, "1 of 40 only in "


def other_versions(folder, script):
    runs = one_task("a", "acc,none", binary(1), binary(2))
    runs[1]["versions"] = {"a": 2.0}
    return write_both(folder, runs), "a has version 1.0 in "


def no_common_task(folder, script):
    runs = ({"tasks": {name: {"acc,none": [1.0]}}} for name in "ab")
    return write_both(folder, tuple(runs)), "no task in common"


def cut_off(folder, script):
    paths = write_both(folder, one_task("a", "acc,none", binary(1), binary(2)))
    (file,) = (folder / "run").glob("samples_*")
    file.write_text(file.read_text()[:-20])
    return paths, "line 40: not a whole sample"


def lost_lines(folder, script):
    paths = write_both(folder, one_task("a", "acc,none", binary(1), binary(2)))
    (file,) = (folder / "run").glob("samples_*")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    return paths, "holds 39 documents of a, and the results file says 40"


def no_results(folder, script):
    paths = write_both(folder, one_task("a", "acc,none", [1.0], [1.0]))
    (folder / "base" / "results_2026-01-02T03-04-05.678901.json").write_text("[]")
    return paths, "no results file"


def several_results(folder, script):
    runs = one_task("a", "acc,none", [1.0], [1.0])
    write_run(folder / "run", {"a": {"acc,none": [1.0]}}, date="2026-02-02T03-04-05.6")
    return write_both(folder, runs), "holds 2 files results_*.json"


@pytest.mark.parametrize(
    "made",
    [other_documents, other_texts, other_versions, no_common_task]
    + [cut_off, lost_lines, no_results, several_results],
)
def test_what_is_refused(made, checkout, script, tmp_path):
    """In one sentence, and where `compare` refuses as well."""
    paths, why = made(tmp_path, script)
    with pytest.raises(SystemExit) as caught:
        script.main(paths)
    assert why in str(caught.value)
    assert str(caught.value).startswith("error: ")
    assert "\n" not in str(caught.value)
    if made is not several_results:
        with pytest.raises(ResultsError):
            comparison.compare(read_run(paths[0]), [read_run(paths[1])])


def test_it_runs_with_numpy_and_the_standard_library_alone(checkout, tmp_path):
    file = checkout / paired_comparison.SCRIPT
    imports = [
        name
        for node in ast.walk(ast.parse(file.read_text()))
        for name in (
            [each.name for each in node.names]
            if isinstance(node, ast.Import)
            else [node.module]
            if isinstance(node, ast.ImportFrom)
            else []
        )
    ]
    foreign = {name.split(".")[0] for name in imports} - sys.stdlib_module_names
    assert foreign == {"numpy"}
    paths = write_both(tmp_path, RUNS["right or wrong"])
    block = "import sys; sys.modules.update(scipy=None, pandas=None, torch=None, lm_eval=None)"
    run = f"{block}; sys.argv[0] = {str(file)!r}; import runpy"
    run += "; runpy.run_path(sys.argv[0], run_name='__main__')"
    done = subprocess.run(
        [sys.executable, "-c", run, *paths, "--format", "json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["rows"][0]["test"] == "McNemar mid-p"


def test_its_own_tests_pass(checkout):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        + ["--rootdir", ".", paired_comparison.TEST],
        cwd=checkout,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("command", [["check"], ["format", "--check"]])
def test_it_is_clean(command, checkout):
    """Under our rules, which are the harness's."""
    ruff = Path(sys.executable).parent / "ruff"
    files = [paired_comparison.SCRIPT, paired_comparison.TEST]
    rules = Path(__file__).parents[2] / "pyproject.toml"
    done = subprocess.run(
        [ruff, *command, "--config", rules, "--config", "lint.ignore=['I001']", *files],
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


def test_a_rule_that_no_longer_fits_is_named(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        "import math\n\nfrom lm_eval_pruned.analysis.statistics.mcnemar import _mid_p\n"
    )
    rules = {"mcnemar": Rules(change={"betaln(": "other("})}
    with pytest.raises(ValueError, match=r"mcnemar holds 0 times .* 'betaln\('"):
        inlining.inlined(script, rules)
    with pytest.raises(ValueError, match="scipy is needed for stats"):
        inlining.inlined(script, {})


def test_definitions_stand_where_they_were_imported(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            '''
            """Says something."""

            import math

            A = 1


            from lm_eval_pruned.analysis.results_file import is_number


            def last(x):
                return is_number(x)
            '''
        ).lstrip()
    )
    text = inlining.inlined(script, {})
    places = [text.index(part) for part in ("A = 1", "def is_number", "def last")]
    assert places == sorted(places)
    assert "lm_eval_pruned" not in text
    # Of the script's own imports, those that it reads stay.
    assert "import math" not in text
    assert "if TYPE_CHECKING:\n    from typing import TypeGuard\n" in text
