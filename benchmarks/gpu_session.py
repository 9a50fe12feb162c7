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
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tcm_fast.benchmarks.results import Results
    from tcm_fast.benchmarks.suite import Settings

ROOT = Path(__file__).parents[1]
LEAST = 10.0  # seconds: nothing is begun with less left
TRIES = 2
PATIENCE = 10  # times an item's limit in a dry run, which is on a slower machine
LOG_TAIL = 20_000  # characters of an item's output that are kept
NO_TESTS = 5  # pytest's status where nothing was chosen
DONE, FAILED, TIMED_OUT, CUT, NEVER = "done", "failed", "timed out", "cut", "not reached"


# ---- cases: each is run by `--case NAME` in its own process -------------------------------------

Measure = Callable[["Settings", "Results"], None]


def _network(name: str) -> Any:
    from tcm_fast.benchmarks import cases

    by_name = {"ddpmpp": cases.CIFAR10, "digits": cases.DIGITS, "narrow": cases.NARROW}
    return by_name.get(name) or next(n for n in cases.available_networks() if n.name == name)


def _step_case(settings: Settings, network: str, batch: int, precision: str, phase: str) -> Any:
    from tcm_fast.benchmarks.steps import StepCase

    return StepCase(_network(network), batch, precision, phase, settings.device)


def step(network: str, batch: int, precision: str, *names: str, phase: str = "tcm") -> Measure:
    """A training step by the providers of these names."""

    def measure(settings: Settings, results: Results) -> None:
        from tcm_fast.benchmarks import suite

        case = _step_case(settings, network, batch, precision, phase)
        suite.time_step(case, settings, results, names)

    return measure


def operation(name: str, batch: int = 128, most: int = 2) -> Measure:
    """An operation in bf16 at the sites of each network with the most work."""

    def measure(settings: Settings, results: Results) -> None:
        import torch

        from tcm_fast.benchmarks import cases, suite

        dtype = torch.bfloat16 if settings.is_cuda else torch.float32
        networks = cases.available_networks() if settings.is_cuda else [cases.DIGITS]
        for case in suite.largest(cases.cases(networks, [batch], [dtype]), most):
            if case.operation == name:
                suite.time_operation(case, settings, results)

    return measure


def group(name: str, only: str = "") -> Measure:
    """A group of `tcm-fast bench`, its quick cases."""

    def measure(settings: Settings, results: Results) -> None:
        from dataclasses import replace

        from tcm_fast.benchmarks import suite

        for _ in suite.GROUP_FUNCTIONS[name](replace(settings, only=only), results, print):
            pass

    return measure


def sample(network: str, batch: int, steps: int, precision: str = "fp16") -> Measure:
    def measure(settings: Settings, results: Results) -> None:
        from tcm_fast.benchmarks import suite
        from tcm_fast.benchmarks.steps import SampleCase

        case = SampleCase(_network(network), batch, steps, precision, settings.device)
        suite.time_sample(case, settings, results)

    return measure


def ceilings(settings: Settings, results: Results) -> None:
    from tcm_fast.planning.throughput import measure_ceilings

    results.ceilings = measure_ceilings(settings.device, quick=settings.quick)


def roofline(network: str, batch: int, precision: str = "bf16") -> Measure:
    def measure(settings: Settings, results: Results) -> None:
        from tcm_fast.benchmarks import suite

        ceilings(settings, results)
        suite.account_for(_step_case(settings, network, batch, precision, "tcm"), results)

    return measure


def peaks(network: str, batch: int, precision: str = "bf16") -> Measure:
    def measure(settings: Settings, results: Results) -> None:
        from tcm_fast.benchmarks import suite

        case = _step_case(settings, network, batch, precision, "tcm")
        suite.measure_peaks(case, settings, results)

    return measure


def capped(preset: str, gib: int, **changes: Any) -> Measure:
    """A recipe's stage-2 step where torch may take `gib` GiB, with the memory settings that `plan` chooses
    for such a card: what it takes beside what was predicted."""

    def measure(settings: Settings, results: Results) -> None:
        from dataclasses import replace

        import numpy as np
        import torch

        from tcm_fast.benchmarks.levers import held
        from tcm_fast.benchmarks.results import Row
        from tcm_fast.config import load_preset
        from tcm_fast.planning.cards import this_device, with_memory
        from tcm_fast.planning.memory_estimate import ImageShape, memory
        from tcm_fast.planning.memory_planner import choose_levers

        device = torch.device(settings.device)
        config = replace(load_preset(preset), phases=("tcm",), device=settings.device, **changes)
        side, classes = (64, 1000) if preset.startswith("imagenet64") else (32, 10)
        classes = classes if config.network.class_conditional else 0
        card = with_memory(this_device(device, measure=False), f"{gib}GiB")
        if settings.is_cuda:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, card.usable / total))
        with tempfile.TemporaryDirectory() as folder:
            count = 2 * config.tcm.batch_size
            images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), np.uint8)
            labels = {"labels": np.arange(count) % classes} if classes else {}
            np.savez(f"{folder}/images.npz", images=images, **labels)
            data = replace(config.data, source=f"{folder}/images.npz")
            config = replace(config, data=data, eval=replace(config.eval, features=""))
            shape = ImageShape(side, 3, classes, count)
            chosen = choose_levers(config, shape, card)
            predicted = memory(chosen, "tcm", shape, on_gpu=card.on_gpu).total
            measured = held(chosen, "tcm", f"{folder}/run")
        name = f"{preset} tcm batch {config.tcm.batch_size} {config.precision} within {gib} GiB"
        for provider, value in (("plan", predicted), ("tcm_fast", measured)):
            results.rows.append(
                Row("memory", name, provider, [float(value)], unit="bytes", how="allocator",
                    images=config.tcm.batch_size, precision=config.precision, operation="tcm",
                    extra={"micro_batches": chosen.micro_batches, "offload": chosen.offload})
            )  # fmt: skip

    return measure


def digits(images: int) -> Measure:
    """The digits recipe from beginning to end, shortened: that a whole run works, and what it learns."""

    def measure(settings: Settings, results: Results) -> None:
        from dataclasses import replace

        from tcm_fast.config import load_preset
        from tcm_fast.training.trainer import Trainer

        config = replace(load_preset("digits"), device=settings.device, grid_every=10**9)
        for name in config.phases:
            phase = replace(config.phase(name), images=images)
            config = replace(config, **{name: phase})
        with tempfile.TemporaryDirectory() as folder:
            for done in Trainer(config, folder).run():
                distances = ", ".join(
                    f"{'Heun' if steps is None else f'{steps}-step'} {report.frechet:.2f}"
                    for steps, report in done.reports.items()
                )
                results.notes.append(
                    f"digits {done.phase}: {done.images:,} images in {done.seconds:.1f} s, Fréchet "
                    f"distances {distances or 'not measured'}"
                )

    return measure


@dataclass(frozen=True)
class Case:
    """What is measured, and the most seconds that it may take, the process's start included."""

    measure: Measure
    seconds: float


STYLE = ("official_style", "official_style same precision", "official_style channels_last")
OURS = ("tcm_fast", "tcm_fast graphs")
COMPILED = ("official_style channels_last compiled", "tcm_fast graphs")
# In the order of their value.
FIRST_CASES: dict[str, Case] = {
    "ceilings": Case(ceilings, 60),
    "digits, a whole run": Case(digits(32_000), 120),
    "step CIFAR-10 bf16": Case(step("ddpmpp", 128, "bf16", *STYLE, *OURS), 120),
    "step EDM2-S fp16": Case(step("edm2", 64, "fp16", *STYLE, *OURS), 120),
    "group_norm_silu": Case(operation("group_norm_silu"), 120),
    "qkv_attention": Case(operation("qkv_attention"), 120),
    "step CIFAR-10 bf16 compiled": Case(step("ddpmpp", 128, "bf16", *COMPILED), 240),
    "optimizer": Case(group("optimizer"), 90),
    "sample CIFAR-10, 1": Case(sample("ddpmpp", 1, 1), 45),
    "sample CIFAR-10, 512": Case(sample("ddpmpp", 512, 1), 45),
    "CIFAR-10 within 24 GiB": Case(capped("cifar10", 24), 120),
    "CIFAR-10 within 8 GiB": Case(capped("cifar10", 8), 120),
    "step CIFAR-10 fp32": Case(step("ddpmpp", 128, "fp32", STYLE[0], *OURS), 90),
}
LATER_CASES: dict[str, Case] = {
    "step EDM2-S fp16 compiled": Case(step("edm2", 64, "fp16", *COMPILED), 300),
    "where time goes, CIFAR-10": Case(roofline("ddpmpp", 128), 90),
    "where time goes, EDM2-S": Case(roofline("edm2", 64, "fp16"), 90),
    "ImageNet-64 S within 24 GiB": Case(capped("imagenet64-s", 24), 150),
    "peaks CIFAR-10": Case(peaks("ddpmpp", 128), 60),
    "peaks EDM2-S": Case(peaks("edm2", 64, "fp16"), 60),
    "host": Case(group("host"), 45),
    "step CIFAR-10 bf16, stage 1": Case(step("ddpmpp", 128, "bf16", *STYLE, *OURS, phase="ect"), 90),
    "step CIFAR-10 fp16": Case(step("ddpmpp", 128, "fp16", *STYLE, *OURS), 90),
    "step CIFAR-10 tf32": Case(step("ddpmpp", 128, "tf32", *STYLE, *OURS), 90),
    "step CIFAR-10 bf16, 512": Case(step("ddpmpp", 512, "bf16", *STYLE, *OURS), 120),
    "step CIFAR-10 bf16, 16": Case(step("ddpmpp", 16, "bf16", *STYLE, *OURS), 60),
    "step ADM bf16": Case(step("adm", 64, "bf16", *OURS), 120),
    **{
        name: Case(operation(name, most=1), 90)
        for name in (
            "consistency_loss", "noise_pair", "denoise_to_uint8", "residual", "mp_sum",
            "mp_cat_mp_silu", "modulate_mp_silu", "pixel_norm_mp_silu", "resample",
        )
    },
    "sample EDM2-S, 512": Case(sample("edm2", 512, 1), 60),
    "sample CIFAR-10, 512, 2 steps": Case(sample("ddpmpp", 512, 2), 45),
}  # fmt: skip
CASES = FIRST_CASES | LATER_CASES


def run_case(name: str, out: Path, device: str, dry_run: bool) -> None:
    """A case's results into a file, also where it fails half-way."""
    from tcm_fast.benchmarks import suite

    settings = suite.Settings(quick=True, device=device, dry_run=dry_run)
    results = suite.begin(settings)
    try:
        CASES[name].measure(settings, results)
    finally:
        results.save(out)


# ---- the session --------------------------------------------------------------------------------


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
                self._judge(record, ending, result, was_cut=limit < item.seconds)
                record.seconds = round(seconds, 1)
                self.say(f"{record.state:10} {seconds:5.0f} s  {item.name}  {record.detail}")
                with open(self.out / "session.log", "a", encoding="utf-8") as log:
                    log.write(f"==== {item.name}: {record.state}\n{ending.output[-LOG_TAIL:]}\n")
                self._merge(result)
                self._keep()

    def _judge(self, record: Record, ending: Ending, result: Path, *, was_cut: bool) -> None:
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
        """Write down how everything stands."""
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
    "kernels/test_group_norm_silu", "kernels/test_qkv_attention", "kernels/test_fused_step",
    "kernels/test_consistency_loss", "kernels/test_noise_pair", "kernels/test_residual",
    "kernels/test_philox", "kernels/test_modulate_mp_silu", "kernels/test_mp_cat_mp_silu",
    "kernels/test_pixel_norm_mp_silu", "kernels/test_mp_sum", "kernels/test_resample", "test_graphs",
    "test_trainer",
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
