"""Distances with an error bar: several sets of samples of a network, and what they say of a difference."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

from tcm_fast.evaluation.metrics import Report

CONFIDENCE = 0.95
ROUGH = 0.1  # of a distance: an error above it hides what recipes usually differ by


@dataclass(frozen=True)
class Repeats:
    """Reports of several sets of samples of one network, a seed each."""

    reports: tuple[Report, ...]

    def values(self, name: str) -> np.ndarray:
        """A metric, or a field of `Report`, of every set: float64 [S]."""
        of = [r.metrics[name] if name in r.metrics else getattr(r, name) for r in self.reports]
        return np.array(of, np.float64)

    def mean(self, name: str) -> float:
        return float(self.values(name).mean())

    def deviation(self, name: str) -> float:
        """Standard deviation of one set's value (of S - 1 degrees of freedom); nan for a single set."""
        return _deviation(self.values(name))

    def least_difference(self, name: str) -> float:
        """Below it the means of two networks with so many sets each are not told apart, at 95 %, where the
        seeds are not paired; nan for a single set."""
        num = len(self.reports)
        return _quantile(2 * (num - 1)) * self.deviation(name) * math.sqrt(2 / num)

    def is_rough(self, name: str) -> bool:
        """Whether there are too few images, or sets, to tell similar networks apart: the error is more than
        a tenth of the distance, or unknown."""
        return not self.least_difference(name) <= ROUGH * self.mean(name)


def _deviation(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else math.nan


def _quantile(freedom: int) -> float:
    """Of Student's t, two-sided."""
    return float(stdtrit(freedom, (1 + CONFIDENCE) / 2)) if freedom > 0 else math.nan


def interval(values: np.ndarray) -> float:
    """Half of the 95 % confidence interval of the mean of values [S]; nan for a single one."""
    return _quantile(len(values) - 1) * _deviation(values) / math.sqrt(len(values))


def mean_and_deviation(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Of values over seeds; None where a space has no such value, and for the deviation of a single one."""
    known = np.array([v for v in values if v is not None], np.float64)
    if not len(known):
        return None, None
    return float(known.mean()), _deviation(known) if len(known) > 1 else None


# ---- two networks -------------------------------------------------------------------------------

TRAINING_SPREAD = 0.2
"""Relative standard deviation of a distance over the seeds of a training, about that of the digits' kernel
distance (docs/evaluation.md)."""


@dataclass(frozen=True)
class Difference:
    """How far a network's distance lies above another's."""

    value: float
    """Mean over the seeds; above 0 the network is worse than the other."""
    of_samples: float
    """Half of its 95 % confidence interval: what other samples of the same two networks change; nan for one
    seed."""
    of_training: float
    """What two trainings of one recipe differ by at most, at 95 %."""

    @property
    def is_of_networks(self) -> bool:
        """Whether these two networks differ, whatever the samples."""
        return abs(self.value) > self.of_samples

    @property
    def is_of_recipes(self) -> bool:
        """Whether they differ by more than two trainings of one recipe do."""
        return abs(self.value) > math.hypot(self.of_samples, self.of_training)


def difference(
    network: Repeats, other: Repeats, name: str, *, spread: float = TRAINING_SPREAD
) -> Difference:
    """Compare two networks by a metric of which less is better; their sets of samples are of the same seeds,
    in the same order, and so of the same noise: what it makes of both alike drops out.

    Args:
        name: of a metric of their reports.
        spread: standard deviation of the metric over the seeds of a training, relative to what it is above
            that of real images; 0 asks about these networks alone.

    Raises:
        ValueError: different numbers of sets; a negative spread.
    """
    if len(network.reports) != len(other.reports):
        raise ValueError(
            "difference: both networks need as many sets of samples, got "
            f"{len(network.reports)} and {len(other.reports)}"
        )
    if not spread >= 0:
        raise ValueError(f"difference: spread must not be negative, got {spread}")
    paired = network.values(name) - other.values(name)
    real = max(network.reports[0].metrics_real[name], 0.0)
    size = max((network.mean(name) + other.mean(name)) / 2 - real, 0.0)
    return Difference(
        value=float(paired.mean()),
        of_samples=interval(paired),
        of_training=_quantile(10**6) * math.sqrt(2) * spread * size,
    )
