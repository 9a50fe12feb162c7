"""How time is taken. Clocks are replaced: a busy machine must not decide a test."""

import contextlib
import time
import types
import warnings

import pytest
import torch

from tcm_fast.benchmarks import measure
from tcm_fast.benchmarks.measure import (
    Pace,
    environment,
    host_seconds,
    host_waits,
    peak_memory,
    spread,
    time_in_turn,
)


class Clock:
    """A clock that work moves on."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(measure.time, "perf_counter", lambda: self.now)

    def work(self, seconds):
        def run():
            self.now += seconds

        return run


def test_spread():
    assert spread([3.0]) == (3.0, 3.0, 3.0)
    low, middle, high = spread([float(i) for i in range(101)])
    assert (low, middle, high) == (20.0, 50.0, 80.0)


def test_providers_take_turns(monkeypatch):
    """In every round each once, and not always in the same order."""
    clock, order = Clock(monkeypatch), []

    def of(name, seconds):
        work = clock.work(seconds)
        return lambda: (order.append(name), work())

    works = {"a": of("a", 0.5), "b": of("b", 1.0), "c": of("c", 0.1)}
    timings = time_in_turn(works, "cpu", Pace(warm_up=2.0, rounds=20))
    assert timings["a"].samples == pytest.approx([0.5] * 20)
    assert timings["b"].median == pytest.approx(1.0)
    assert timings["c"].how == "clock"
    rounds = [tuple(order[-60:][i : i + 3]) for i in range(0, 60, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(rounds)) > 1


def test_warming_up_goes_by_time(monkeypatch):
    clock, calls = Clock(monkeypatch), []
    work = clock.work(0.5)
    time_in_turn({"a": lambda: (calls.append(1), work())}, "cpu", Pace(warm_up=3.0, rounds=1))
    assert len(calls) == 6 + 1


def test_short_calls_are_timed_many_at_once(monkeypatch):
    clock, calls = Clock(monkeypatch), []
    work = clock.work(1e-5)
    timings = time_in_turn(
        {"a": lambda: (calls.append(1), work())}, "cpu", Pace(warm_up=0.0, rounds=3)
    )
    assert len(calls) == 2 + 3 * 100
    assert timings["a"].samples == pytest.approx([1e-5] * 3)


def test_host_time_is_that_of_one_call(monkeypatch):
    clock = Clock(monkeypatch)
    assert host_seconds(clock.work(0.25), "cpu", Pace(rounds=2), calls=4) == [0.25, 0.25]


def test_real_clocks_see_a_slow_down():
    """A sleep may take longer on a busy machine, never less."""
    works = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    timings = time_in_turn(works, "cpu", Pace(warm_up=0.0, rounds=5))
    assert min(timings["slow"].samples) >= 0.02
    assert min(timings["fast"].samples) < 0.02


def test_the_environment_names_what_a_reader_needs():
    found = environment("cpu")
    assert found["torch"] == torch.__version__
    assert found["name"]
    assert found["threads"] == torch.get_num_threads()
    assert found["commit"] is None or len(found["commit"]) == 40


# ---- the GPU's paths, on a stand-in -------------------------------------------------------------


class Gpu:
    """Stands in for torch.cuda: a device whose clock work moves on, in milliseconds."""

    def __init__(self, monkeypatch, captures=True):
        self.now, self.log, self.captures = 0.0, [], captures
        gpu = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = gpu.now

            def elapsed_time(self, end):
                return end.at - self.at

        class Stream:
            def synchronize(self):
                gpu.log.append("synchronize")

        class Graph:
            def replay(self):
                self.work()

        @contextlib.contextmanager
        def graph(captured):
            if not gpu.captures:
                raise RuntimeError("operation not permitted when stream is capturing")
            before = gpu.now
            yield
            captured.work = gpu.last
            gpu.now = before

        for name, value in {
            "Event": Event, "Stream": Stream, "CUDAGraph": Graph, "graph": graph,
            "stream": lambda s: contextlib.nullcontext(),
            "synchronize": lambda device=None: gpu.log.append("synchronize"),
            "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=1 << 20),
            "reset_peak_memory_stats": lambda device: gpu.log.append("reset"),
            "max_memory_allocated": lambda device: 123,
            "set_sync_debug_mode": lambda mode: gpu.log.append(mode),
        }.items():  # fmt: skip
            monkeypatch.setattr(torch.cuda, name, value)

    def work(self, milliseconds):
        def run():
            self.now += milliseconds
            self.last = run
            return "result"

        return run


@pytest.mark.parametrize("captures", [True, False])
def test_device_time_leaves_the_flush_out(monkeypatch, captures):
    gpu = Gpu(monkeypatch, captures)
    flushed = []

    def flush():
        flushed.append(1)
        gpu.now += 50

    monkeypatch.setattr(measure, "l2_flush", lambda device: flush)
    works = {"a": gpu.work(2.0), "b": gpu.work(3.0)}
    timings = time_in_turn(works, "cuda", Pace(warm_up=0.0, rounds=4))
    assert timings["a"].samples == pytest.approx([2e-3] * 4)
    assert timings["b"].samples == pytest.approx([3e-3] * 4)
    assert timings["a"].how == ("graph" if captures else "events")
    assert len(flushed) == 8


def test_nothing_is_captured_where_it_must_not_be(monkeypatch):
    gpu = Gpu(monkeypatch)
    monkeypatch.setattr(measure, "l2_flush", lambda device: lambda: None)
    timings = time_in_turn({"a": gpu.work(1.0)}, "cuda", Pace(warm_up=0.0, rounds=1), capture=False)
    assert timings["a"].how == "events"


def test_the_flush_is_twice_the_cache(monkeypatch):
    Gpu(monkeypatch)
    made = []
    empty = torch.empty
    monkeypatch.setattr(
        torch, "empty", lambda size, dtype, device: made.append(size) or empty(16, dtype=dtype)
    )
    measure.l2_flush(torch.device("cuda"))()
    assert made == [1 << 26]
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda d: types.SimpleNamespace(L2_cache_size=50 << 20)
    )
    measure.l2_flush(torch.device("cuda"))
    assert made[1] == 100 << 20


def test_memory_and_waits(monkeypatch):
    gpu = Gpu(monkeypatch)
    assert peak_memory(gpu.work(1.0), "cuda") == 123
    assert gpu.log[:2] == ["synchronize", "reset"]

    def waits():
        for _ in range(3):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("something else", stacklevel=1)

    assert host_waits(waits) == 3
    assert gpu.log[-2:] == ["warn", "default"]
