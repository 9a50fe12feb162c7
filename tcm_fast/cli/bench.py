"""`tcm-fast bench`: arguments and words. torch is imported when it runs."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from tcm_fast.cli import FAILED

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import Positional

BenchGroup = Literal["ops", "step", "sample", "memory", "all", "profile", "compare"]


@dataclass
class Bench:
    """Measure this machine: operations, training steps, sampling and memory beside plainly written
    baselines, and a report of it. `compare A.json B.json` compares two results and ends with status 1
    where ours got slower or wrong; `profile` writes a trace of one step."""

    what: Positional[BenchGroup] = "all"
    files: Positional[tuple[Path, ...]] = ()
    """For compare: two results.json."""
    quick: bool = False
    """A few minutes: fewer cases and samples."""
    out: Path = Path("bench")
    """Folder of results.json, report.md and report.html."""
    only: str = ""
    """Cases whose name contains this."""
    official: Path | None = None
    """A checkout of NVlabs/TCM, to be timed beside."""
    fastgen: Path | None = None
    """A checkout of NVlabs/FastGen, to be timed beside."""
    compiled: bool | None = None
    """Time torch.compile among the operations too; by default on a GPU only."""
    tolerance: float = 0.05
    """compare: share of the median below which no difference counts."""
    relative: bool = False
    """compare: against the baselines of the same run, where the machine itself was slower or faster."""
    device: str = "auto"


def run_bench(args: Bench) -> int:
    if args.what == "compare":
        return compare_results(args)
    if args.files:
        raise ValueError(f"bench: only compare takes files, got {args.files[0]}")
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # no notes of the profiler; before torch comes
    from tcm_fast.benchmarks import report, suite, suite_steps
    from tcm_fast.benchmarks.settings import Settings
    from tcm_fast.runtime.distributed import pick_device

    groups = {
        "ops": ("ops", "host", "optimizer"), "step": ("step", "roofline"), "sample": ("sample",),
        "memory": ("memory",),
    }  # fmt: skip
    settings = Settings(
        quick=args.quick, device=pick_device(args.device).type, compiled=args.compiled, only=args.only,
        official=args.official, fastgen=args.fastgen,
    )  # fmt: skip
    if args.what == "profile":
        trace = suite_steps.profile(settings, args.out)
        print(f"trace for chrome://tracing or ui.perfetto.dev in {trace}")
        return 0
    if args.what in groups:
        settings = replace(settings, groups=groups[args.what])
    results = suite.run(
        settings,
        say=lambda line: print(line, file=sys.stderr),
        save=lambda results: report.write_numbers(results, args.out),
    )
    page = report.write(results, args.out)
    print(report.terminal(results))
    print(f"report in {page}")
    return FAILED if results.wrong else 0


def compare_results(args: Bench) -> int:
    from tcm_fast.benchmarks import results
    from tcm_fast.benchmarks.compare import compare, text

    if len(args.files) != 2:
        raise ValueError(f"bench compare: needs A.json and B.json, got {len(args.files)} files")
    before, after = map(results.load, args.files)
    comparison = compare(before, after, tolerance=args.tolerance, relative=args.relative)
    print(text(comparison))
    return FAILED if comparison.failures else 0
