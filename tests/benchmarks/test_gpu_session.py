"""The session for minutes on a GPU: what it does first, what a cut, a crash or a hang costs, how it goes on.

Time is a number that the tests set: a process takes as long as the test says it does."""

import json
import sys
from pathlib import Path

import pytest
import torch

from tcm_fast.benchmarks import gpu_session, session_cases
from tcm_fast.benchmarks.cases import available_networks, cases
from tcm_fast.benchmarks.gpu_session import (
    CUT,
    DONE,
    FAILED,
    NEVER,
    TIMED_OUT,
    Ending,
    Item,
    Session,
    missing_modules,
)
from tcm_fast.benchmarks.results import Results, Row, load
from tcm_fast.benchmarks.sites import public_operations

ENVIRONMENT = {"name": "machine", "device": "cpu", "threads": 1}


class Machine:
    """Stands in for processes and for the clock. takes: seconds by command; ends: status or a function of
    the result's path."""

    def __init__(self, **takes):
        self.now, self.takes, self.ends, self.ran = 0.0, takes, {}, []

    def clock(self):
        return self.now

    def launch(self, command, seconds):
        name, result = command
        self.ran.append(name)
        self.now += min(seconds, self.takes.get(name, 20.0))
        if seconds < self.takes.get(name, 20.0):
            return Ending(None, "half")
        end = self.ends.get(name, 0)
        return Ending(end if isinstance(end, int) else end(Path(result)) or 0, "a line\nthe last")

    def session(self, out, seconds=1000.0, **options):
        return Session(
            out, seconds, clock=self.clock, launch=self.launch, say=lambda _: None, **options
        )


def item(name, seconds=100.0, **options):
    return Item(name, (name, "{result}"), seconds, **options)


def states(out):
    found = json.loads((out / "session.json").read_text())["items"]
    return {name: record["state"] for name, record in found.items()}


def measured(*rows, **more):
    """What a case leaves: rows of (provider, seconds)."""

    def leave(path):
        Results(
            ENVIRONMENT, {}, rows=[Row("ops", "case", who, [s]) for who, s in rows], **more
        ).save(path)

    return leave


def test_a_hang_or_a_crash_costs_its_item_alone(tmp_path):
    machine = Machine(hang=1e9)
    machine.ends |= {"crash": -11, "fails": 1, "works": measured(("tcm_fast", 1.0))}
    machine.session(tmp_path).run([item(n) for n in ("hang", "crash", "fails", "works")])
    assert states(tmp_path) == {
        "hang": TIMED_OUT, "crash": FAILED, "fails": FAILED, "works": DONE,
    }  # fmt: skip
    assert machine.ran == ["hang", "crash", "fails", "works"]
    assert [row.provider for row in load(tmp_path / "results.json").rows] == ["tcm_fast"]
    table = (tmp_path / "session.md").read_text()
    assert "| crash | failed | 20 | 1 | killed by signal 11; the last |" in table
    assert "| hang | timed out | 100 | 1 |  |" in table
    assert "==== fails: failed\na line" in (tmp_path / "session.log").read_text()


def test_the_session_ends_in_time_and_the_next_goes_on(tmp_path):
    machine = Machine(b=90.0)
    items = [item(name) for name in "abcd"]
    machine.session(tmp_path, seconds=50.0).run(items)
    assert machine.now == 50.0  # a took 20; b was cut; nothing is begun without time
    assert states(tmp_path) == {"a": DONE, "b": CUT, "c": NEVER, "d": NEVER}
    machine.session(tmp_path, seconds=115.0).run(items)
    assert machine.ran == ["a", "b", "b", "c"]
    machine.session(tmp_path).run(items)
    assert machine.ran == ["a", "b", "b", "c", "d"]
    assert set(states(tmp_path).values()) == {DONE}
    machine.session(tmp_path).run(items)
    assert len(machine.ran) == 5


def test_what_failed_is_tried_once_more_after_everything_new(tmp_path):
    machine = Machine(slow=1e9)
    machine.ends["bad"] = 1
    first = [item(name) for name in ("bad", "slow", "good")]
    machine.session(tmp_path).run(first)
    machine.ends["bad"] = 0
    machine.session(tmp_path).run([*first, item("new")])
    machine.session(tmp_path).run([*first, item("new")])
    assert machine.ran == ["bad", "slow", "good", "new", "bad", "slow"]
    assert states(tmp_path) == {"bad": DONE, "slow": TIMED_OUT, "good": DONE, "new": DONE}


def test_results_are_kept_after_every_case_and_the_newest_counts(tmp_path):
    machine = Machine()
    seen = []

    def second(path):
        seen.extend(row.median for row in load(tmp_path / "results.json").rows)
        measured(("tcm_fast", 2.0), ("pytorch", 3.0), notes=["two"])(path)

    machine.ends |= {"one": measured(("tcm_fast", 1.0), notes=["one"]), "two": second}
    machine.session(tmp_path).run([item("one"), item("two")])
    assert seen == [1.0]
    results = load(tmp_path / "results.json")
    assert {row.provider: row.median for row in results.rows} == {"tcm_fast": 2.0, "pytorch": 3.0}
    assert results.notes == ["one", "two"]
    assert "| case | tcm_fast |" in (tmp_path / "report.md").read_text()
    # What a case has measured before it failed is kept too.
    machine.ends["half"] = lambda path: measured(("eager", 4.0))(path) or 1
    machine.session(tmp_path).run([item("half")])
    assert states(tmp_path)["half"] == FAILED
    assert "eager" in {row.provider for row in load(tmp_path / "results.json").rows}


XML = """<testsuites><testsuite tests="4" failures="{failures}" errors="0" skipped="1">
<testcase name="test_good"/><testcase name="test_values"><failure message="AssertionError: off"/></testcase>
{more}</testsuite></testsuites>"""
CRASH = '<testcase name="test_crash"><failure message="RuntimeError: CUDA error"/></testcase>'


@pytest.mark.parametrize(("more", "dry_run", "state"), [
    ("", False, FAILED), ("", True, DONE), (CRASH, False, FAILED), (CRASH, True, FAILED),
])  # fmt: skip
def test_a_dry_run_tells_wrong_values_from_crashes(more, dry_run, state, tmp_path):
    machine = Machine()
    machine.ends["tests"] = lambda path: (
        path.write_text(XML.format(failures=1 + bool(more), more=more)) and 1
    )
    machine.session(tmp_path, dry_run=dry_run).run([item("tests", result="tests.xml")])
    assert states(tmp_path) == {"tests": state}
    table = (tmp_path / "session.md").read_text()
    assert f"{2 - bool(more)} passed, {1 + bool(more)} failed, 1 skipped" in table
    assert ("test_values: AssertionError: off" in table) == (not dry_run)
    assert ("test_crash: RuntimeError: CUDA error" in table) == bool(more)


def test_without_a_module_of_the_report_no_case_is_lost(tmp_path, monkeypatch):
    machine = Machine()
    machine.ends["case"] = measured(("tcm_fast", 1.0))
    monkeypatch.setitem(sys.modules, "tcm_fast.benchmarks.report", None)
    machine.session(tmp_path, missing=["rich"]).run([item("case")])
    assert load(tmp_path / "results-0.json").rows
    assert (tmp_path / "session.md").read_text().startswith("Not installed: rich.\n")


def test_what_is_missing_is_named():
    assert missing_modules(["json", "no_such_module", "no_such_package.module"]) == [
        "no_such_module", "no_such_package.module",
    ]  # fmt: skip


# ---- real processes -----------------------------------------------------------------------------


def python(code, *arguments):
    return [sys.executable, "-c", code, *arguments]


def test_a_process_is_killed_with_its_children_at_its_limit(tmp_path):
    """The child writes on as long as it lives."""
    path = tmp_path / "child"
    child = f"import time\nwhile True: open({str(path)!r}, 'a').write('x'); time.sleep(.01)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    assert gpu_session.launch(python(code), 3.0).status is None
    size = path.stat().st_size if path.exists() else 0
    gpu_session.launch(python("import time; time.sleep(.2)"), 60.0)
    assert (path.stat().st_size if path.exists() else 0) == size


def test_how_a_process_ended():
    code = "import os, sys; print(sys.argv[1]); sys.stdout.flush(); os.kill(os.getpid(), 6)"
    assert gpu_session.launch(python(code, "said"), 60.0) == Ending(-6, "said\n")
    missing = gpu_session.launch(python("import no_such_module"), 60.0)
    assert missing.status == 1
    assert missing.output.strip().endswith("No module named 'no_such_module'")


def test_a_case_in_its_process(tmp_path, monkeypatch):
    """The real command with a case that is small, and one that fails after its first row."""
    from tcm_fast.benchmarks.settings import Settings

    def fails(settings, results):
        results.notes.append("so far")
        raise MemoryError("no more")

    monkeypatch.setitem(gpu_session.CASES, "small", gpu_session.Case(
        session_cases.step("digits", 8, "fp32", "tcm_fast"), 60.0))  # fmt: skip
    monkeypatch.setitem(gpu_session.CASES, "fails", gpu_session.Case(fails, 60.0))
    out = tmp_path / "case.json"
    assert gpu_session.main(
        ["--case", "small", "--out", str(out), "--device", "cpu", "--dry-run"]
    ) == 0  # fmt: skip
    (row,) = load(out).rows
    assert (row.provider, row.images, len(row.samples)) == ("tcm_fast", 8, 1)
    assert Settings(dry_run=True).pace.rounds == 1
    with pytest.raises(MemoryError):
        gpu_session.main(["--case", "fails", "--out", str(out), "--device", "cpu"])
    assert load(out).notes == ["so far"]


# ---- what there is to do ------------------------------------------------------------------------


def test_tests_come_first_and_every_item_has_a_limit():
    tests = gpu_session.ROOT / "tests"
    if not tests.is_dir():
        pytest.skip("needs the checkout: an installed package has no tests")
    items = gpu_session.items(tests)
    names = [item.name for item in items]
    assert len(set(names)) == len(names)
    assert all(0 < item.seconds <= 300 for item in items)
    assert names[0] == "kernels/test_group_norm_silu"
    first_case = names.index(next(iter(gpu_session.FIRST_CASES)))
    assert set(names[:first_case]) == set(gpu_session.FIRST_TESTS)
    assert {"kernels/test_dropout", "networks/test_edm2", "optim/test_offload"} <= set(names)
    assert all(item.shares == ("test_" in item.name) for item in items)
    # What the session is for comes within its first minutes.
    assert names.index("step CIFAR-10 bf16") < names.index("step EDM2-S fp16") < first_case + 6


def test_every_operation_that_networks_call_is_a_case():
    """And no other: such a case would measure nothing. DDPM++'s residual sums are the normalisations'."""
    called = {case.operation for case in cases(available_networks(), [128], [torch.bfloat16])}
    named = set(public_operations().values()) & set(gpu_session.CASES)
    assert named == called | {"conv_bf16x3"}
