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


def mean_and_deviation(values: Iterable[float | None]) -> tuple[float | None, float | None]:
    """Of values over seeds; None where a space has no such value, and for the deviation of a single one."""
    known = np.array([v for v in values if v is not None], np.float64)
    if not len(known):
        return None, None
    return float(known.mean()), _deviation(known) if len(known) > 1 else None
