"""Two results beside each other, and the gate. Samples are recorded or drawn from a seed."""

import copy
import dataclasses
import math
import random

import pytest

from tcm_fast.benchmarks.compare import compare, holm, relative_samples, text
from tcm_fast.benchmarks.results import Results, Row, load

PROVIDERS = ("pytorch", "tcm_fast", "tcm_fast graphs")


def drawn(seed, *, cases=30, samples=15, noise=0.03, factor=lambda case, provider: 1.0):
    """Results of a machine with noise, and now and then an interruption."""
    rng = random.Random(seed)
    rows = []
    for case in range(cases):
        for i, provider in enumerate(PROVIDERS):
            base = 1e-3 * (case + 1) / (i + 1) * factor(case, provider)
            values = [
                base * math.exp(rng.gauss(0, noise)) * (3 if rng.random() < 0.05 else 1)
                for _ in range(samples)
            ]
            rows.append(Row("ops", f"case {case}", provider, values))
    rows.append(Row("memory", "case 0", "tcm_fast", [1e9 * factor(0, "memory")], unit="bytes"))
    return Results({"name": "machine", "device": "cpu", "threads": 1}, {}, rows=rows)


def test_equal_runs_compare_as_equal():
    """A hundred rows of noise, ten times, and not one false alarm."""
    for seed in range(10):
        found = compare(drawn(seed), drawn(seed + 1000))
        assert {c.verdict for c in found.changes} == {"equal"}
        assert not found.failures
        assert not found.cautions


def test_a_planted_slow_down_is_caught():
    slow = drawn(1, factor=lambda case, p: 2.0 if (case, p) == (7, "tcm_fast") else 1.0)
    found = compare(drawn(0), slow)
    (failure,) = found.failures
    assert (failure.case, failure.provider, failure.verdict) == ("case 7", "tcm_fast", "slower")
    assert failure.ratio == pytest.approx(2.0, rel=0.1)
    assert "slower  tcm_fast: case 7 [ops]" in text(found)
    assert [c.verdict for c in compare(slow, drawn(0)).changes if c.verdict != "equal"] == [
        "faster"
    ]
    assert not compare(slow, drawn(0)).failures


def test_ten_per_cent_are_seen_and_two_are_not():
    for factor, verdict in ((1.10, "slower"), (1.02, "equal")):
        changed = drawn(
            1, noise=0.01, factor=lambda c, p, f=factor: f if (c, p) == (3, "tcm_fast") else 1.0
        )
        found = {(c.case, c.provider): c for c in compare(drawn(0, noise=0.01), changed).changes}
        assert found["case 3", "tcm_fast"].verdict == verdict


def test_somebody_elses_slow_down_does_not_close_the_gate():
    slow = drawn(1, factor=lambda case, p: 2.0 if (case, p) == (7, "pytorch") else 1.0)
    found = compare(drawn(0), slow)
    assert [c.verdict for c in found.changes if c.verdict != "equal"] == ["slower"]
    assert not found.failures


def test_wrong_and_lost_rows_close_the_gate():
    a, b = drawn(0), drawn(1)
    b.rows[1] = dataclasses.replace(b.rows[1], samples=[], wrong="result 0 is off by 3")
    del b.rows[4]
    verdicts = {(c.case, c.provider): c.verdict for c in compare(a, b).failures}
    assert verdicts == {("case 0", "tcm_fast"): "wrong", ("case 1", "tcm_fast"): "missing"}
    b.rows = [row for row in b.rows if row.group != "memory"]  # not asked for at all
    assert len(compare(a, b).failures) == 2
    # What was wrong before and is right now is no failure.
    assert not [c for c in compare(b, a).failures if c.case == "case 0"]


def test_more_memory_closes_the_gate():
    found = compare(drawn(0), drawn(1, factor=lambda c, p: 1.2 if p == "memory" else 1.0))
    assert [c.group for c in found.failures] == ["memory"]


def test_another_machine_is_a_caution():
    b = drawn(1)
    b.environment["name"] = "another"
    assert "name differs: machine and another" in text(compare(drawn(0), b))


def test_a_slower_machine_is_told_from_slower_code():
    """Everything takes 1.5 times as long: all ours fail, unless compared with their baselines."""
    slower = drawn(1, samples=30, factor=lambda *_: 1.5)
    found = compare(drawn(0, samples=30), slower)
    assert found.drift == pytest.approx(1.5, rel=0.05)
    assert "the machine itself changed" in found.cautions[0]
    assert found.failures
    relative = compare(drawn(0, samples=30), slower, relative=True)
    assert not [c for c in relative.failures if c.group == "ops"]
    planted = drawn(1, samples=30, factor=lambda c, p: 3.0 if (c, p) == (5, "tcm_fast") else 1.5)
    failures = compare(drawn(0, samples=30), planted, relative=True).failures
    assert [(c.case, c.provider) for c in failures if c.group == "ops"] == [("case 5", "tcm_fast")]


def test_relative_samples_go_round_by_round():
    ours = Row("ops", "x", "tcm_fast", [2.0, 6.0])
    rows = [ours, Row("ops", "x", "a", [1.0, 3.0]), Row("ops", "x", "b", [4.0, 12.0])]
    assert relative_samples(ours, rows) == pytest.approx([1.0, 1.0])
    assert relative_samples(ours, [ours]) == [2.0, 6.0]


def test_holm():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_nothing_in_common_and_bad_tolerances_are_refused():
    empty = Results({}, {})
    with pytest.raises(ValueError, match="no case in common"):
        compare(drawn(0), empty)
    with pytest.raises(ValueError, match="tolerance must be positive, got 0"):
        compare(drawn(0), drawn(1), tolerance=0)


def test_results_survive_a_file(tmp_path):
    results = drawn(0)
    results.skipped.append(("case 1", "liger", "needs a GPU"))
    results.save(tmp_path / "a.json")
    again = load(tmp_path / "a.json")
    assert again.skipped == [("case 1", "liger", "needs a GPU")]
    assert [row.key for row in again.rows] == [row.key for row in results.rows]
    assert again.rows[3].samples == pytest.approx(results.rows[3].samples, rel=1e-6)
    assert {c.verdict for c in compare(results, again).changes} == {"equal"}
    assert compare(copy.deepcopy(again), again).drift == pytest.approx(1.0)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"rows": []}']
)
def test_files_that_hold_no_results(tmp_path, content):
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(ValueError, match=r"x\.json"):
        load(tmp_path / "x.json")
    with pytest.raises(FileNotFoundError, match="no such file"):
        load(tmp_path / "y.json")
