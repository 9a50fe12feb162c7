"""When a run has to stop: signals, its time limit, and peers that are gone."""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from typing import Any

SIGNALS = (
    "SIGINT",
    "SIGTERM",
    "SIGUSR1",
)  # Ctrl-C; a scheduler's end; Slurm's --signal=USR1@SECONDS
TWICE = 1.0  # seconds: torchrun repeats a signal that the terminal has sent already
GRACE = 20.0  # seconds for the first step after a signal, where other processes may be gone


class StopRequest:
    """Takes over the signals that end a program while it is entered, and watches the clock.

    A signal asks for a stop after the step; Ctrl-C once more raises KeyboardInterrupt at once. Only a
    program's main thread may take signals over: elsewhere the clock alone counts.

    Args:
        stop_after: time after which to stop, from now on.
        has_peers: end this process where no step ends within `GRACE` seconds of a signal. One that
            waits for a process that is gone never comes back to Python, where a signal would be heard.
    """

    def __init__(self, stop_after: float | None = None, *, has_peers: bool = False) -> None:
        self.signal = ""
        self._first = 0.0
        self._end = None if stop_after is None else time.monotonic() + 3600 * stop_after
        self._hours, self._has_peers = stop_after, has_peers
        self._handlers: dict[int, Any] = {}
        self._watch: _PeerWatch | None = None

    @property
    def reason(self) -> str:
        """Why to stop; empty to go on."""
        if self.signal:
            return self.signal
        is_over = self._end is not None and time.monotonic() >= self._end
        return f"--stop-after {self._hours:g} hours are over" if is_over else ""

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            if self._has_peers:
                self._watch = _PeerWatch()
            numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
            self._handlers = {n: signal.signal(n, self._on_signal) for n in numbers}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self._handlers = {}
        if self._watch is not None:
            self._watch.close()
            self._watch = None

    def step_ended(self) -> None:
        """Tell that the process gets on."""
        if self._watch is not None:
            self._watch.last = time.monotonic()

    def _on_signal(self, number: int, frame: Any) -> None:
        now = time.monotonic()
        if self.signal and number == signal.SIGINT and now - self._first > TWICE:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        if not self.signal:
            self._first, self.signal = now, signal.Signals(number).name


class _PeerWatch:
    """A thread that hears of signals even while the main thread waits in a library's code: the
    interpreter writes their numbers into a pipe at once."""

    def __init__(self) -> None:
        self.last = 0.0
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._before = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._run, name="peer-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        signal.set_wakeup_fd(self._before)
        os.close(self._write)  # ends the thread's read
        self._thread.join()
        os.close(self._read)

    def _run(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] not in (signal.SIGTERM, signal.SIGUSR1):
                continue
            asked = time.monotonic()
            while self.last < asked:
                if select.select([self._read], [], [], 0.2)[0]:
                    break  # another signal, or closed
                if time.monotonic() - asked > GRACE:
                    print(
                        f"tcm-fast: rank {os.environ.get('RANK', '0')}: no step has ended for {GRACE:g} s "
                        "after the signal to stop, other processes must be gone; the last checkpoint is "
                        "the newest in the run's folder",
                        file=sys.stderr,
                        flush=True,
                    )
                    os._exit(1)
