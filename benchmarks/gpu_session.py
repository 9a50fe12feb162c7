"""What matters most on a GPU that is there for minutes only: tests first, then cases in the order of their
value.

    python -m tcm_fast.benchmarks.gpu_session --minutes 8 --out DIR

Each item runs in a process of its own under its own time limit, so that a hang, a crash or a lack of memory
costs that item alone. After every one DIR holds all there is: `session.json` (what was done, and how it
ended), `results.json` and `report.md` (as of `tcm-fast bench`), `session.md`, `session.log`. The same command
with the same DIR goes on: what was not reached comes first, what failed once is tried once more. Nothing is
built here; kernels that were compiled elsewhere (`precompile.py`) are taken from Triton's cache.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from tcm_fast.benchmarks.session_cases import CASES, FIRST_CASES, LATER_CASES, Case, run_case

ROOT = Path(__file__).parents[1]
LEAST = 10.0  # seconds: nothing is begun with less left
TRIES = 2
PATIENCE = 10  # times an item's limit in a dry run, which is on a slower machine
LOG_TAIL = 20_000  # characters of an item's output that are kept
NO_TESTS = 5  # pytest's status where nothing was chosen
DONE, FAILED, TIMED_OUT, CUT, NEVER = "done", "failed", "timed out", "cut", "not reached"


@dataclass(frozen=True)
class Item:
    """A process to run. seconds: the most that it may take. shares: others may run at the same time.
    result: the file that it leaves, put in the place of {result} in the command."""

    name: str
    command: tuple[str, ...]
    seconds: float
    shares: bool = False
    result: str = "results.json"


@dataclass
class Record:
    """How an item ended: DONE, FAILED, TIMED_OUT (by its own limit), CUT (by the session's end)."""

    state: str = NEVER
    tries: int = 0
    seconds: float = 0.0
    detail: str = ""


@dataclass
class Ending:
    """Of a process: its status (None: killed at the limit) and what it printed."""

    status: int | None
    output: str


Launch = Callable[[Sequence[str], float], Ending]


def launch(command: Sequence[str], seconds: float) -> Ending:
    """Run a command; after so many seconds it and its children are killed."""
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=True
        )
        status = None
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            pass
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # a process that the driver holds
                process.wait(10)
        output.seek(0)
        return Ending(status, output.read())


@dataclass
class Session:
    """Runs items until the time is up; see the module's description.

    out: where everything goes. seconds: the most to take. clock, launch: replaced in tests.
    dry_run: on a device that computes nothing, wrong values are no failure.
    """

    out: Path
    seconds: float
    jobs: int = 1
    dry_run: bool = False
    clock: Callable[[], float] = time.monotonic
    launch: Launch = launch
    say: Callable[[str], None] = print
    records: dict[str, Record] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def run(self, items: Sequence[Item]) -> None:
        self.out.mkdir(parents=True, exist_ok=True)
        self._load()
        self.end = self.clock() + self.seconds
        known = [self.records.setdefault(item.name, Record()) for item in items]
        pairs = list(zip(items, known, strict=True))
        new = [item for item, record in pairs if record.state in (NEVER, CUT)]
        again = [i for i, r in pairs if r.state in (FAILED, TIMED_OUT) and r.tries < TRIES]
        with ThreadPoolExecutor(self.jobs) as pool:
            for shares, block in itertools.groupby(new, lambda item: item.shares):
                # What failed for want of a quiet device has its second try alone.
                list((pool.map if shares else map)(self._attempt, block))
        for item in again:
            self._attempt(item)
        self._keep()

    def _attempt(self, item: Item) -> None:
        left = self.end - self.clock()
        if left < LEAST:
            return
        limit, begun = min(item.seconds, left), self.clock()
        with tempfile.TemporaryDirectory() as folder:
            result = Path(folder) / item.result
            ending = self.launch([a.format(result=result) for a in item.command], limit)
            seconds = self.clock() - begun
            with self._lock:
                record = self.records[item.name]
                self._set_state(record, ending, result, was_cut=limit < item.seconds)
                record.seconds = round(seconds, 1)
                self.say(f"{record.state:10} {seconds:5.0f} s  {item.name}  {record.detail}")
                with open(self.out / "session.log", "a", encoding="utf-8") as log:
                    log.write(f"==== {item.name}: {record.state}\n{ending.output[-LOG_TAIL:]}\n")
                self._merge(result)
                self._keep()

    def _set_state(self, record: Record, ending: Ending, result: Path, *, was_cut: bool) -> None:
        if ending.status is None and was_cut:
            record.state, record.detail = CUT, "the session's time was up"
            return
        record.tries += 1
        if ending.status is None:
            record.state, record.detail = TIMED_OUT, ""
            return
        tests, failures = read_tests(result)
        if tests and self.dry_run:
            failures = [line for line in failures if "AssertionError" not in line]
        allowed = {0, NO_TESTS} | ({1} if tests and not failures else set())
        has_passed = ending.status in allowed
        record.state = DONE if has_passed else FAILED
        lines = [line for line in ending.output.splitlines() if line.strip()]
        why = lines[-1][:300] if lines else ""
        if ending.status < 0:
            why = f"killed by signal {-ending.status}; {why}"
        record.detail = "; ".join([tests, *failures]) if tests else "" if has_passed else why

    def _load(self) -> None:
        with suppress(FileNotFoundError):
            found = json.loads((self.out / "session.json").read_text(encoding="utf-8"))
            self.records = {name: Record(**record) for name, record in found["items"].items()}

    def _keep(self) -> None:
        """Write the state of every item."""
        items = {name: asdict(record) for name, record in self.records.items()}
        written = {"missing": self.missing, "items": items}
        self._write("session.json", json.dumps(written, indent=1) + "\n")
        lines = ["| item | | seconds | tries | |", "|---|---|---:|---:|---|"]
        for name, r in self.records.items():
            detail = r.detail.replace("|", "\\|")
            lines.append(f"| {name} | {r.state} | {r.seconds:.0f} | {r.tries} | {detail} |")
        if self.missing:
            lines.insert(0, f"Not installed: {', '.join(self.missing)}.\n")
        self._write("session.md", "\n".join([*lines, ""]))

    def _write(self, name: str, text: str) -> None:
        temporary = self.out / f".{name}"
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, self.out / name)

    def _merge(self, result: Path) -> None:
        """Add a case's results to those that are there; a row that is measured again replaces the old."""
        if result.suffix != ".json" or not result.is_file():
            return
        try:
            report = importlib.import_module("tcm_fast.benchmarks.report")
            from tcm_fast.benchmarks.results import load
        except ModuleNotFoundError as error:  # then what the case left is kept as it is
            self.say(f"no report: {error}")
            number = len(list(self.out.glob("results-*.json")))
            shutil.copy(result, self.out / f"results-{number}.json")
            return
        new, path = load(result), self.out / "results.json"
        if path.is_file():
            old = load(path)
            keys = {row.key for row in new.rows}
            new.rows = [row for row in old.rows if row.key not in keys] + new.rows
            new.skipped = list(dict.fromkeys(map(tuple, [*old.skipped, *new.skipped])))  # type: ignore[arg-type]
            new.notes = list(dict.fromkeys([*old.notes, *new.notes]))
            new.roofline = old.roofline | new.roofline
            new.ceilings = new.ceilings or old.ceilings
        report.write_numbers(new, self.out)


def read_tests(path: Path) -> tuple[str, list[str]]:
    """From pytest's XML: what was counted, and a line for each test that failed; empty where it is none."""
    try:
        root = ElementTree.parse(path).getroot()
    except (OSError, ElementTree.ParseError):
        return "", []
    suites = list(root.iter("testsuite"))
    total, failed, errors, skipped = (
        sum(int(s.get(key, 0)) for s in suites)
        for key in ("tests", "failures", "errors", "skipped")
    )
    lines = []
    for case in root.iter("testcase"):
        for problem in [*case.findall("failure"), *case.findall("error")]:
            said = " ".join((problem.get("message") or "").split())[:160]
            lines.append(f"{case.get('name')}: {said}")
    passed = total - failed - errors - skipped
    return f"{passed} passed, {failed + errors} failed, {skipped} skipped", lines


# ---- what there is to do ------------------------------------------------------------------------

# Tests whose failure would make the numbers worthless, in the order of their weight.
FIRST_TESTS = (
    "kernels/test_group_norm_silu", "kernels/test_conv_bf16x3", "kernels/test_qkv_attention",
    "kernels/test_fused_step",
    "kernels/test_consistency_loss", "kernels/test_noise_pair", "kernels/test_residual",
    "kernels/test_residual_conv1x1",
    "kernels/test_philox", "kernels/test_modulate_mp_silu", "kernels/test_mp_cat_mp_silu",
    "kernels/test_pixel_norm_mp_silu", "kernels/test_mp_sum", "kernels/test_resample",
    "runtime/test_cuda_graphs", "training/test_trainer",
)  # fmt: skip
TEST_SECONDS = 150.0
NEEDED = (
    "torch", "triton", "numpy", "safetensors", "PIL", "rich", "scipy", "pytest", "hypothesis",
    "sklearn", "tyro", "matplotlib", "tcm_fast._C",
)  # fmt: skip


def missing_modules(names: Sequence[str] = NEEDED) -> list[str]:
    """Of these modules the ones that are not installed."""

    def has(name: str) -> bool:
        try:
            return importlib.util.find_spec(name) is not None
        except ImportError:
            return False

    return [name for name in names if not has(name)]


def test_files(folder: Path) -> Iterator[tuple[str, Path]]:
    """(name, file) of the test files that have something to run on a GPU, the weightiest first."""
    first = [folder / f"{name}.py" for name in FIRST_TESTS]
    rest = [path for path in sorted(folder.rglob("test_*.py")) if path not in first]
    for path in (*first, *rest):
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            if "mark.gpu" in text or "triton_device" in text:
                yield path.relative_to(folder).with_suffix("").as_posix(), path


def items(tests: Path, device: str = "cuda", dry_run: bool = False) -> list[Item]:
    """Everything, in the order of its value."""
    patience = PATIENCE if dry_run else 1
    pytest = (sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider")
    pytest += ("-m", "gpu and not slow", "--junitxml={result}")
    found = {
        name: Item(
            name, (*pytest, str(path)), patience * TEST_SECONDS, shares=True, result="tests.xml"
        )
        for name, path in test_files(tests)
    }
    case = (sys.executable, "-m", "tcm_fast.benchmarks.gpu_session", "--device", device)
    case += ("--dry-run",) * dry_run

    def of(cases: dict[str, Case]) -> list[Item]:
        return [
            Item(name, (*case, "--case", name, "--out", "{result}"), patience * c.seconds)
            for name, c in cases.items()
        ]

    first = [found.pop(name) for name in FIRST_TESTS if name in found]
    return [*first, *of(FIRST_CASES), *found.values(), *of(LATER_CASES)]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="tests and benchmarks for minutes on a GPU")
    parser.add_argument("--minutes", type=float, default=8.0, help="the most that all may take")
    parser.add_argument("--out", type=Path, default=Path("gpu_session"), help="a folder")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--jobs", type=int, default=max(1, min(8, (os.cpu_count() or 1) // 2)),
                        help="test files at a time")  # fmt: skip
    parser.add_argument("--only", default="", help="items whose name contains this")
    parser.add_argument("--list", action="store_true", help="say what there is to do")
    parser.add_argument(
        "--dry-run", action="store_true",
        help="on a device that computes nothing: each case once, and wrong values are no failure",
    )  # fmt: skip
    parser.add_argument("--case", choices=[*CASES], help=argparse.SUPPRESS)
    given = parser.parse_args(argv)
    if given.case:
        run_case(given.case, given.out, given.device, given.dry_run)
        return 0
    found = items(ROOT / "tests", given.device, given.dry_run)
    found = [item for item in found if given.only in item.name]
    if given.list:
        for item in found:
            print(f"{item.seconds:5.0f} s at most  {item.name}")
        return 0
    missing = missing_modules()
    if missing:
        print(f"not installed, what needs it will fail: {', '.join(missing)}")
    session = Session(given.out, 60 * given.minutes, given.jobs, given.dry_run, missing=missing)
    session.run(found)
    states = [session.records[item.name].state for item in found]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)))
    return 0 if all(state == DONE for state in states) else 1


if __name__ == "__main__":
    sys.exit(main())
