"""What a run says while it goes: progress on the terminal, log.jsonl, and the loggers of `log.to`."""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from tcm_fast.config import Config
from tcm_fast.training.loggers import open_loggers, reopened

QUIET_INTERVAL = 15.0  # seconds between lines where there is no terminal to draw a bar on


class RunLog:
    """Writes a run's events; on ranks other than 0 it does nothing (`active=False`).

    Raises:
        ModuleNotFoundError, ValueError: a logger is not installed, or cannot begin.
    """

    def __init__(
        self, directory: Path, config: Config | None = None, *, active: bool = True
    ) -> None:
        self.active, self.config = active, config or Config()
        self.console = Console(stderr=True, quiet=not active)
        self._path = directory / "log.jsonl"
        self._loggers = open_loggers(directory, self.config) if active else {}
        self._file = self._path.open("a", encoding="utf-8") if active else None
        self._lost = 0
        self._progress: Progress | None = None
        self._last_line = 0.0

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def warn(self, event: str, text: str, **fields: Any) -> None:
        """A warning, on the terminal and in the log."""
        self.say(f"warning: {text}")
        self.write(event, message=text, **fields)

    def write(self, event: str, **fields: Any) -> None:
        """One line of log.jsonl."""
        if self._file is None:
            return
        record: dict[str, Any] = {"event": event, "time": round(time.time(), 3), **fields}
        if self._lost:
            record["lines_lost_before"] = self._lost
        try:
            self._file.write(json.dumps(record) + "\n")
            self._file.flush()
            self._lost = 0
        except OSError as error:  # a line is not worth a run
            if not self._lost:
                self.say(f"warning: {self._path}: {error.strerror}, lines are lost")
            self._lost += 1
            self.reopen(anyway=True)

    def reopen(self, *, anyway: bool = False) -> None:
        """Go on in a new file where the old one was deleted (or did not take a line)."""
        if self._file is None or (self._path.exists() and not anyway):
            return
        with suppress(OSError):
            self._file.close()
        with suppress(OSError):
            self._path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._path.open("a", encoding="utf-8")

    def start_phase(self, name: str, steps: int, done: int) -> None:
        """Open the progress bar of a phase."""
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[status]}"),
        )
        self._progress = Progress(*columns, console=self.console, disable=not self._is_live)
        self._task = self._progress.add_task(name, total=steps, completed=done, status="")
        self._progress.start()
        self._last_line = time.monotonic()

    def step(self, done: int) -> None:
        """Move the bar."""
        if self._progress is not None:
            self._progress.update(self._task, completed=done)

    def metrics(self, phase: str, images: int, values: dict[str, float]) -> None:
        """Log the numbers of the last steps."""
        self.write("train", phase=phase, images=images, **values)
        self._draw({f"{phase}/{key}": value for key, value in values.items()}, images)
        shown = ("loss", "consistency", "boundary", "images_per_second")
        text = "  ".join(
            f"{k.replace('_per_second', '/s')} {values[k]:.4g}" for k in shown if k in values
        )
        if self._is_live and self._progress is not None:
            self._progress.update(self._task, status=text)
        elif time.monotonic() - self._last_line > QUIET_INTERVAL:
            self._last_line = time.monotonic()
            self.say(f"{phase}: {images:,} images  {text}")

    def _draw(self, values: dict[str, float], images: int) -> None:
        """Points of the loggers' curves; one that fails is not worth a run."""
        for name, logger in [*self._loggers.items()]:
            try:
                logger.metrics(values, images)
            except Exception as error:  # TensorBoard: its thread's, perhaps of an earlier point
                self.say(f"warning: {self._path.parent}: {error}, points of {name} are lost")
                with suppress(Exception):
                    self._loggers.pop(name).close()
                self._loggers |= reopened(name, self._path.parent, self.config)

    def end_phase(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def close(self) -> None:
        self.end_phase()
        if self._file is not None:
            with suppress(OSError):
                self._file.close()
        while self._loggers:
            with suppress(Exception):
                self._loggers.popitem()[1].close()

    @property
    def _is_live(self) -> bool:
        return self.console.is_terminal and self.active


@contextmanager
def timed(spent: Counter[str], what: str) -> Iterator[None]:
    """Add the seconds that something takes to its account."""
    begun = time.perf_counter()
    try:
        yield
    finally:
        spent[what] += time.perf_counter() - begun  # type: ignore[assignment]
