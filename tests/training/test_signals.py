"""Signals, the time limit, and peers that are gone."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from tcm_fast.training import signals
from tcm_fast.training.signals import SIGNALS, StopRequest


@pytest.mark.parametrize("name", SIGNALS)
def test_a_signal_asks_for_a_stop(name):
    before = signal.getsignal(getattr(signal, name))
    with StopRequest() as stop:
        assert stop.reason == ""
        os.kill(os.getpid(), getattr(signal, name))
        assert stop.reason == name
    assert signal.getsignal(getattr(signal, name)) == before


def test_ctrl_c_again_does_not_wait(monkeypatch):
    """But not its echo: torchrun sends on what the terminal has sent already."""
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.reason == "SIGINT"
        stop._first -= signals.TWICE
        os.kill(os.getpid(), signal.SIGTERM)  # a scheduler may insist
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_time_limit():
    stop = StopRequest(stop_after=0.5)
    assert stop.reason == ""
    stop._end -= 1800
    assert stop.reason == "--stop-after 0.5 hours are over"


def test_outside_the_main_thread_signals_are_left_alone():
    found = []

    def run():
        with StopRequest(1e-9) as stop:
            found.append((signal.getsignal(signal.SIGTERM), stop.reason))

    before = signal.getsignal(signal.SIGTERM)
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [(before, "--stop-after 1e-09 hours are over")]


STUCK = """
import ctypes, os, sys
from tcm_fast.training import signals
signals.GRACE = 1.0
with signals.StopRequest(has_peers=True) as stop:
    if sys.argv[1] == "gets on":
        stop._watch.last = float("inf")
    print("ready", flush=True)
    for _ in range(8):  # usleep ends early at a signal
        ctypes.CDLL(None).usleep(500_000)
    sys.exit(7)
"""


@pytest.mark.parametrize(("case", "status"), [("is stuck", 1), ("gets on", 7)])
def test_a_process_that_waits_for_the_dead_ends(case, status):
    """Stuck in a library's code, where no signal is heard; one that gets on is left to it."""
    process = subprocess.Popen(
        [sys.executable, "-c", STUCK, case],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=600)
    assert process.returncode == status
    assert ("other processes must be gone" in error) == (case == "is stuck")


def test_it_leaves_neither_threads_nor_descriptors():
    threads, files = threading.active_count(), len(os.listdir("/proc/self/fd"))
    for _ in range(3):
        with StopRequest(has_peers=True) as stop:
            stop.step_ended()
    assert (threading.active_count(), len(os.listdir("/proc/self/fd"))) == (threads, files)
