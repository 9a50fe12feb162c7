"""NaN, Inf and spikes: noted on the device in the step itself, looked at on the host now and then.

A step writes its losses and its gradient's norm into a row on the device; the host reads the rows of
many steps at once, so that no step waits for it.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

ROWS = 100  # steps after which the host reads at the latest
MEMORY = 200  # gradient norms whose median a spike is measured by
ENOUGH = 20  # norms before spikes are reported
SPIKE = 10.0  # times the median: a gradient that is reported


class StepMetrics:
    """Losses [2] and gradient norm of each step since the last reading, on the device.

    Writing keeps its places in memory and can be captured in a graph.

    Attributes:
        steps: steps since the last reading; whoever takes one counts it.
    """

    def __init__(self, device: torch.device, rows: int = ROWS) -> None:
        self.size, self.steps = rows, 0
        self._rows = torch.zeros(rows, 3, dtype=torch.float64, device=device)
        self._next = torch.zeros(1, dtype=torch.int64, device=device)

    def write(self, losses: torch.Tensor, norm: torch.Tensor) -> None:
        """Note a step: mean losses off and on the boundary [2], norm of the gradient."""
        row = torch.cat([losses.double(), norm.double().reshape(1)])
        self._rows.index_copy_(0, self._next, row[None])
        self._next += 1

    @property
    def is_full(self) -> bool:
        return self.steps == self.size

    def set_back(self) -> None:
        """Overwrite what a step wrote that failed."""
        self._next.fill_(self.steps)

    def read(self, over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> np.ndarray:
        """float64 [steps,3] of the steps since the last reading: losses summed over the processes, and
        norms, which are equal on all. Waits for the device."""
        rows = self._rows[: self.steps]
        rows = torch.cat([over_ranks(rows[:, :2].contiguous()), rows[:, 2:]], 1)
        self._next.zero_()
        self.steps = 0
        return rows.cpu().numpy()


@dataclass(frozen=True)
class Spike:
    """A gradient far larger than usual."""

    step: int
    norm: float
    usual: float


@dataclass(frozen=True)
class Reading:
    """What the rows of some steps say.

    rows: as `StepMetrics.read` gave them.
    bad: the steps whose losses or gradient were NaN or Inf.
    """

    rows: np.ndarray
    bad: list[int]
    spikes: list[Spike]


@dataclass(frozen=True)
class Summary:
    """Good steps in short: mean losses [2], median and largest norm of the gradient, NaN where no step
    was good; and the number of the others."""

    losses: np.ndarray
    norm: float
    largest: float
    skipped: int


def summarise(rows: np.ndarray) -> Summary:
    """Rows as `StepMetrics.read` gives them."""
    is_good = np.isfinite(rows).all(1)
    good = rows[is_good] if is_good.any() else np.full((1, 3), np.nan)
    return Summary(
        losses=good[:, :2].mean(0),
        norm=float(np.median(good[:, 2])),
        largest=float(good[:, 2].max()),
        skipped=int((~is_good).sum()),
    )


class StepMonitor:
    """Counts NaN/Inf steps in a row, and finds spikes of the gradient's norm.

    Attributes:
        streak: NaN/Inf steps in a row by now.
    """

    def __init__(self) -> None:
        self.streak = 0
        self._norms: deque[float] = deque(maxlen=MEMORY)

    def update(self, rows: np.ndarray, first: int) -> Reading:
        """Rows as `StepMetrics.read` gives them; the first is that of step number `first`."""
        is_good = np.isfinite(rows).all(1)
        bad, spikes = [], []
        for number, (row, good) in enumerate(zip(rows, is_good, strict=True), start=first):
            self.streak = 0 if good else self.streak + 1
            if not good:
                bad.append(number)
                continue
            usual = statistics.median(self._norms) if len(self._norms) >= ENOUGH else 0.0
            if usual and row[2] > SPIKE * usual:
                spikes.append(Spike(number, float(row[2]), usual))
            self._norms.append(float(row[2]))
        return Reading(rows, bad, spikes)


def nan_if_not_finite(loss: torch.Tensor, factor: float = 1) -> torch.Tensor:
    """The factor, or NaN for a NaN or Inf loss: its gradient then is NaN too, even where the way there would
    have lost it, and the optimizer skips the step."""
    return factor + 0 * loss.detach()
