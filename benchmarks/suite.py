"""The whole suite: `tcm-fast bench`. Each group makes rows; nothing is timed before it was found right."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from tcm_fast.benchmarks.measure import environment
from tcm_fast.benchmarks.results import Results
from tcm_fast.benchmarks.settings import Say, Settings, release_memory
from tcm_fast.benchmarks.suite_operations import time_host, time_operations, time_optimizers
from tcm_fast.benchmarks.suite_steps import account, measure_memory, time_sampling, time_steps
from tcm_fast.planning.throughput import measure_ceilings

Save = Callable[[Results], None]


def begin(settings: Settings) -> Results:
    """Results without a row: where and what is measured."""
    configuration = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(settings).items()}
    return Results(environment(settings.device), configuration)


def run(settings: Settings, say: Say = print, save: Save = lambda _: None) -> Results:
    """Measure. A provider whose answer is wrong has a row that says so, and no samples. `save` is given
    what there is after every case, so that a run that is cut short loses one case."""
    begun = time.perf_counter()
    results = begin(settings)
    say(f"{results.environment['name']}: measuring ceilings")
    results.ceilings = measure_ceilings(settings.device, quick=settings.quick)
    for group in settings.groups:
        say(f"{group} ...")
        for _ in GROUP_FUNCTIONS[group](settings, results, say):
            save(results)
        release_memory(settings.is_cuda)
    if not settings.is_cuda:
        say("kernels for a GPU, in Triton's interpreter ...")
        results.notes.append(validate_interpreted())
        say(results.notes[-1])
    results.configuration["seconds"] = round(time.perf_counter() - begun)
    return results


# Each makes rows and yields after every case.
GROUP_FUNCTIONS: dict[str, Callable[[Settings, Results, Say], Iterator[None]]] = {
    "ops": time_operations,
    "host": time_host,
    "optimizer": time_optimizers,
    "step": time_steps,
    "sample": time_sampling,
    "memory": measure_memory,
    "roofline": account,
}


# ---- kernels without a GPU ----------------------------------------------------------------------


def validate_interpreted() -> str:
    """Run the kernels' cases at tiny sizes in Triton's interpreter, in a process of their own (whether a
    kernel is interpreted is decided when it is defined). Returns a sentence; a failure raises."""
    command = [sys.executable, "-m", "tcm_fast.benchmarks.validate"]
    variables = {"TRITON_INTERPRET": "1", "TCM_FAST_BACKEND": "kernel", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    sentence = (ran.stdout.strip().splitlines() or [""])[-1]
    if ran.returncode == 0:
        return sentence
    raise RuntimeError(
        f"bench: kernels in the interpreter: {sentence or ran.stderr.strip()[-400:]}"
    )
