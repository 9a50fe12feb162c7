"""How time is taken: warmed up by time, providers in turn, the cache emptied, every sample kept.

On a GPU a sample is the time between two events around one call, which is captured as a CUDA graph where
it can be, so that gaps between launches do not hide a kernel; before each the L2 cache is overwritten.
On a CPU it is the host's clock around as many calls as make a millisecond.
"""

from __future__ import annotations

import gc
import json
import platform
import random
import statistics
import subprocess
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

Work = Callable[[], object]


@dataclass(frozen=True)
class Pace:
    """How long to measure: seconds of warming up for each provider, samples of each; after `most` seconds
    five samples have to do."""

    warm_up: float = 0.3
    rounds: int = 50
    most: float = 120.0

    @classmethod
    def of(cls, quick: bool) -> Pace:
        return cls(0.03, 15, 8.0) if quick else cls()


@dataclass
class Timing:
    """Samples of one provider, in seconds a call; how: graph, events or clock."""

    samples: list[float] = field(default_factory=list)
    how: str = "clock"

    @property
    def median(self) -> float:
        return statistics.median(self.samples)


def spread(samples: list[float]) -> tuple[float, float, float]:
    """20th percentile, median, 80th percentile."""
    if len(samples) < 2:
        return samples[0], samples[0], samples[0]
    p20, _, _, p80 = statistics.quantiles(samples, n=5, method="inclusive")
    return p20, statistics.median(samples), p80


# ---- one provider -------------------------------------------------------------------------------


class _OnClock:
    """Calls on the CPU, as many at once as make a millisecond."""

    how = "clock"

    def __init__(self, work: Work, pace: Pace) -> None:
        begun, calls = time.perf_counter(), 0
        while calls < 2 or time.perf_counter() - begun < pace.warm_up:
            mark = time.perf_counter()
            work()
            last = time.perf_counter() - mark
            calls += 1
        self.work, self.calls = work, max(1, round(1e-3 / max(last, 1e-7)))

    def sample(self) -> Callable[[], float]:
        begun = time.perf_counter()
        for _ in range(self.calls):
            self.work()
        seconds = (time.perf_counter() - begun) / self.calls
        return lambda: seconds


class _OnDevice:
    """A call on the GPU between two events, replayed as a graph where it can be captured."""

    def __init__(self, work: Work, pace: Pace, flush: Work, capture: bool) -> None:
        self.flush, self.work, self.how = flush, work, "events"
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):  # as a capture wants it
            begun, calls = time.perf_counter(), 0
            while calls < 3 or time.perf_counter() - begun < pace.warm_up:
                work()
                stream.synchronize()
                calls += 1
        torch.cuda.synchronize()
        if capture:
            self._capture(work)

    def _capture(self, work: Work) -> None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.kept = work()  # results stay where the graph writes them
        except RuntimeError:  # it waits for the device, or draws from a generator that cannot
            torch.cuda.synchronize()
            return
        self.graph, self.work, self.how = graph, graph.replay, "graph"
        graph.replay()
        torch.cuda.synchronize()

    def sample(self) -> Callable[[], float]:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.flush()  # also gives the host a head start
        start.record()
        self.work()
        end.record()
        return lambda: start.elapsed_time(end) / 1e3


def l2_flush(device: torch.device) -> Work:
    """Overwrites the L2 cache: a buffer of twice its size."""
    size = torch.cuda.get_device_properties(device).L2_cache_size
    buffer = torch.empty(max(2 * size, 1 << 26), dtype=torch.uint8, device=device)
    return lambda: buffer.fill_(1)


def time_in_turn(
    works: Mapping[str, Work],
    device: torch.device | str,
    pace: Pace,
    *,
    capture: bool = True,
    clock: bool = False,
) -> dict[str, Timing]:
    """Samples of each provider, taken round by round in changing order, so that whatever else the
    machine does disturbs all alike.

    Args:
        works: name -> one call.
        capture: try CUDA graphs. clock: the host's clock on a GPU too (works that wait at their end).
    """
    device = torch.device(device)
    if device.type == "cuda" and not clock:
        flush = l2_flush(device)
        runners: dict[str, Any] = {
            name: _OnDevice(work, pace, flush, capture) for name, work in works.items()
        }
    else:
        runners = {name: _OnClock(work, pace) for name, work in works.items()}
    timings = {name: Timing(how=runner.how) for name, runner in runners.items()}
    order = random.Random(0)
    was_collecting = gc.isenabled()
    gc.disable()
    try:
        begun = time.perf_counter()
        for turn in range(pace.rounds):
            if turn >= 5 and time.perf_counter() - begun > pace.most:
                break
            names = list(works)
            order.shuffle(names)
            readings = {name: runners[name].sample() for name in names}
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            for name, reading in readings.items():
                timings[name].samples.append(reading())
    finally:
        if was_collecting:
            gc.enable()
    return timings


def host_seconds(
    work: Work, device: torch.device | str, pace: Pace, calls: int = 50
) -> list[float]:
    """Seconds of host time a call takes to be issued, the device kept from being waited for."""
    device = torch.device(device)
    for _ in range(5):
        work()
    samples = []
    for _ in range(pace.rounds):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begun = time.perf_counter()
        for _ in range(calls):
            work()
        samples.append((time.perf_counter() - begun) / calls)
    return samples


# ---- what a step does besides taking time -------------------------------------------------------


def peak_memory(work: Work, device: torch.device | str) -> int:
    """Most bytes of the device's memory in use at once, allocated before or by `work`."""
    device = torch.device(device)
    assert device.type == "cuda"
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device)


def host_waits(work: Work) -> int:
    """How often `work` makes the host wait for the GPU, by torch's own count."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(w.message) for w in caught)


# ---- where and with what ------------------------------------------------------------------------


def _run(*command: str) -> str:
    try:
        ran = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return ran.stdout.strip() if ran.returncode == 0 else ""


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def environment(device: torch.device | str) -> dict[str, Any]:
    """What a result must say of where it comes from."""
    device = torch.device(device)
    here = str(Path(__file__).parent)
    commit = _run("git", "-C", here, "rev-parse", "HEAD")
    found: dict[str, Any] = {
        "device": device.type,
        "name": _processor(),
        "commit": commit or None,
        "modified": bool(commit and _run("git", "-C", here, "status", "--porcelain", "-uno")),
        "python": platform.python_version(),
        "platform": platform.system(),
        "threads": torch.get_num_threads(),
    }
    for name in ("tcm-fast", "torch", "triton", "numpy"):
        found[name] = _version(name)
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        query = _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        found |= {
            "name": properties.name,
            "driver": query.splitlines()[0] if query else None,
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            "capability": f"{properties.major}.{properties.minor}",
            "memory": properties.total_memory,
            "multiprocessors": properties.multi_processor_count,
        }
    return found


def write_record(path: Path, what: str, machine: str, **found: Any) -> None:
    """Write what a study found, as JSON, with where it comes from."""
    here = environment("cpu")
    record = {
        "what": what,
        "commit": here["commit"] or "",
        "torch": torch.__version__,
        "python": here["python"],
        "machine": machine,
        **found,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(record, indent=1) + "\n")
