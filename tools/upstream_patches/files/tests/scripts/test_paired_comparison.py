import itertools
import json
import math

import numpy as np
import pytest

from scripts.paired_comparison import (
    ResultsError,
    compare,
    false_discovery_rate,
    incomplete_beta,
    main,
    mcnemar,
    read_run,
    student_quantile,
    student_tail,
)


#: Hours of sleep gained with two drugs (Student 1908).
SLEEP = (
    [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0],
    [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4],
)


def write_run(folder, tasks, version=1.0):
    """Write results and samples as `lm_eval --log_samples --output_path` does.

    `tasks` holds by task the values of its documents, or pairs of value and document.
    """
    folder.mkdir()
    data = {"results": {}, "versions": {}, "higher_is_better": {}, "group_subtasks": {}}
    for task, values in tasks.items():
        pairs = [v if isinstance(v, tuple) else (v, {}) for v in values]
        data["results"][task] = {
            "alias": task,
            "acc,none": float(np.mean([value for value, _ in pairs])),
            "acc_stderr,none": 0.01,
        }
        data["versions"][task] = version
        data["higher_is_better"][task] = {"acc": True}
        data["group_subtasks"][task] = []
        rows = [
            {
                "doc_id": number,
                "doc": document,
                "filter": "none",
                "acc": value,
                "doc_hash": f"{number} {document}",
                "prompt_hash": str(number),
            }
            for number, (value, document) in enumerate(pairs)
        ]
        (folder / f"samples_{task}_2026-01-01.jsonl").write_text(
            "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows),
            encoding="utf-8",
        )
    (folder / "results_2026-01-01.json").write_text(json.dumps(data))
    return str(folder)


@pytest.fixture
def compared(tmp_path):
    """Compare two runs, each given as values of one task or as those of several."""
    numbers = itertools.count()

    def compared(base, run, **options):
        runs = (
            write_run(
                tmp_path / str(next(numbers)),
                tasks if isinstance(tasks, dict) else {"task": tasks},
            )
            for tasks in (base, run)
        )
        return compare(*map(read_run, runs), **options)

    return compared


@pytest.mark.parametrize(
    ("few", "many", "p"),
    # Fagerland, Lydersen and Laake 2013, table 1: exact 0.070, mid-p 0.039.
    [(1, 7, 0.0390625), (0, 0, 1.0), (3, 3, 1.0), (0, 5, 2 / 2**6)],
)
def test_mid_p(few, many, p):
    for up, down in ((few, many), (many, few)):
        test = mcnemar(up, down, 40, 0.05)
        assert test.p == pytest.approx(p)
        assert test.low <= (up - down) / 40 <= test.high
        assert (test.low > 0 or test.high < 0) == (p < 0.05)


def test_interval_of_paired_shares():
    # Fagerland, Lydersen and Laake 2014, Statistics in Medicine 33:2850: Tango's interval.
    test = mcnemar(1, 7, 21, 0.05)
    assert (test.low, test.high) == pytest.approx((-0.517, -0.026), abs=5e-4)


def test_paired_t(compared):
    """The figures are those of R's `t.test(extra ~ group, sleep, paired = TRUE)`."""
    (row,), notes = compared(*SLEEP)
    assert row.test == "paired t test over documents"
    assert row.p == pytest.approx(0.002833, abs=5e-7)
    assert (row.low, row.high) == pytest.approx((0.7001142, 2.4598858), abs=5e-8)
    assert (row.q, row.verdict, notes) == (row.p, "better", [])


@pytest.mark.parametrize(
    ("tail", "degrees", "t"),
    [(0.025, 10, 2.228139), (0.025, 120, 1.979930), (0.005, 3, 5.840909)],
)
def test_student(tail, degrees, t):
    assert student_quantile(tail, degrees) == pytest.approx(t, abs=5e-7)
    assert student_tail(t, degrees) == pytest.approx(tail, abs=1e-7)


@pytest.mark.parametrize("n", [1, 7, 60, 600])
def test_incomplete_beta_is_a_tail_of_the_binomial_distribution(n):
    for k in range(0, n, n // 7 + 1):
        tail = sum(math.comb(n, i) for i in range(k + 1))
        assert incomplete_beta(n - k, k + 1, 0.5) == pytest.approx(tail / 2**n)


def test_documents_that_ask_about_one_text_count_once(compared):
    base, run = np.random.default_rng(0).random((2, 30)).round(3).tolist()
    texts = [{"passage": str(number)} for number in range(30)]

    def row(times):
        runs = (
            {"boolq": list(zip(values * times, texts * times, strict=True))}
            for values in (base, run)
        )
        return compared(*runs)[0][0]

    once, thrice = row(1), row(3)
    assert once.test == "paired t test over documents"
    assert thrice.test == "paired t test over clusters"
    assert (thrice.p, thrice.low) == pytest.approx((once.p, once.low))
    assert (once.documents, thrice.documents) == (30, 90)


def test_identical_answers_leave_an_interval(compared):
    (row,), _ = compared([1.0, 0.0] * 30, [1.0, 0.0] * 30)
    assert (row.p, row.verdict) == (1.0, "not shown")
    assert (row.low, row.high) == pytest.approx((-0.06017, 0.06017), abs=5e-6)


def test_one_document(compared):
    (row,), _ = compared([1.0], [0.0])
    assert (row.p, row.test) == (0.5, "McNemar mid-p")
    (row,), _ = compared([0.5], [0.25])
    assert (row.p, row.verdict) == (None, "not tested")
    assert row.test == "none: 1 documents are too few for a test of their mean"


def test_tasks_are_adjusted_together(compared):
    base = {"changed": [1.0] * 20, "same": [1.0, 0.0] * 10}
    run = {"changed": [0.0] * 8 + [1.0] * 12, "same": [1.0, 0.0] * 10}
    rows, _ = compared(base, run)
    assert [row.verdict for row in rows] == ["worse", "not shown"]
    assert rows[0].q == 2 * rows[0].p
    assert false_discovery_rate([0.01, None, 0.04, 0.03, 0.5]) == pytest.approx(
        [0.04, None, 0.16 / 3, 0.16 / 3, 0.5]
    )


def test_documents_are_matched_whatever_their_order(compared, tmp_path):
    before = compared(*SLEEP)
    for file in tmp_path.glob("*/samples_*"):
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(reversed(lines)))
    runs = (read_run(str(tmp_path / name)) for name in "01")
    assert compare(*runs) == before


def test_text_with_line_separators_is_one_line(compared):
    values = [(value, {"text": "a\u2028b\x85c"}) for value in SLEEP[0]]
    (row,), _ = compared(values, values)
    assert row.documents == 10


def test_what_cannot_be_compared(compared, tmp_path):
    with pytest.raises(ResultsError, match=r"1 of 3 only in .*, 0 of 2 only in"):
        compared([1.0, 0.0, 1.0], [1.0, 0.0])
    with pytest.raises(ResultsError, match="no task in common"):
        compared({"one": [1.0]}, {"other": [1.0]})
    old = write_run(tmp_path / "old", {"task": [1.0]}, version=0.0)
    new = write_run(tmp_path / "new", {"task": [1.0]})
    with pytest.raises(SystemExit, match=r"task has version 0.0 in .* and 1.0 in"):
        main([old, new])
    with pytest.raises(SystemExit, match="holds 0 files"):
        main([str(tmp_path / "none"), new])


def test_without_samples_the_standard_errors_are_all_there_is(compared, tmp_path):
    compared([1.0] * 10, [0.0] + [1.0] * 9)
    for file in tmp_path.glob("1/samples_*"):
        file.unlink()
    (row,), notes = compare(*(read_run(str(tmp_path / name)) for name in "01"))
    assert row.test == "unpaired z test on stderrs (weaker)"
    assert "evaluate with --log_samples" in notes[0]
    # As scripts/model_comparator.py: z = -0.1 / sqrt(0.01^2 + 0.01^2).
    assert row.p == pytest.approx(1.537e-12, rel=1e-3)


def test_table_and_json(tmp_path, capsys):
    runs = [
        write_run(tmp_path / name, {"task": values})
        for name, values in zip(("base", "run"), SLEEP, strict=True)
    ]
    main(runs)
    line = capsys.readouterr().out.splitlines()[2]
    assert line == (
        "|task|acc,none|0.7500|2.3300|+1.5800|[+0.7001, +2.4599]|0.0028|0.0028|10|"
        "paired t test over documents|better|"
    )
    main([*runs, "--format", "json"])
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert (row["documents"], row["verdict"]) == (10, "better")
