"""Improved consistency training (Song & Dhariwal 2023), a baseline: discrete noise levels."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from tcm_fast.config import IctConfig
from tcm_fast.objectives.consistency import Consistency
from tcm_fast.objectives.noise_levels import TimePlan, ict_grid


class Ict(Consistency[IctConfig]):
    """Neighbouring levels of a grid whose number grows; the pseudo-Huber constant follows from the image
    size."""

    name = "ict"
    time_share = 0.65

    @property
    def c(self) -> float:
        size = self.student.img_channels * self.student.img_resolution**2
        return self.config.huber_c or 0.00054 * math.sqrt(size)

    @classmethod
    def distribution(cls, config: IctConfig) -> str:
        return "karras"

    @classmethod
    def complete(
        cls,
        plan: TimePlan,
        config: IctConfig,
        rng: np.random.Generator,
        iteration: int,
        iterations: int,
    ) -> TimePlan:
        grid = ict_grid(config, iteration, iterations)
        r = grid[np.searchsorted(grid, plan.t) - 1]
        return replace(plan, r=r, delta=plan.t - r)
