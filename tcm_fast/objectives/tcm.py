"""Stage 2: truncated consistency training (Lee et al., ICLR 2025)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from tcm_fast.config import EctConfig, PhaseConfig, TcmConfig
from tcm_fast.objectives.ect import Ect
from tcm_fast.objectives.noise_levels import IMAGE, STAGE1, TimePlan
from tcm_fast.objectives.posterior import PosteriorTarget


class Tcm(PosteriorTarget[TcmConfig]):
    """The student for t >= t', the frozen stage-1 network below: a share rho of the batch lies exactly at t',
    where the target is the stage-1 network's. Its dropout stays on, with the student's masks."""

    name = "tcm"
    frozen_file = "stage1"
    frozen_trains = True
    needs = "a stage-1 network: train ect first"
    time_share = 0.25

    @classmethod
    def distribution(cls, config: TcmConfig) -> str:
        return "truncated_student_t"

    @classmethod
    def complete(
        cls,
        plan: TimePlan,
        config: TcmConfig,
        rng: np.random.Generator,
        iteration: int,
        iterations: int,
    ) -> TimePlan:
        size = config.batch_size
        quota = math.floor(config.boundary_fraction * size)
        if quota == 0:
            raise ValueError(
                f"batch_size: must leave at least one boundary sample, rho={config.boundary_fraction:g} of "
                f"{size} is less than one"
            )
        boundary = np.zeros(size, bool)
        boundary[rng.permutation(size)[:quota]] = True
        t = np.where(boundary, config.t_prime, plan.t)
        share = np.where(boundary, 1 / quota, 1 / (size - quota))
        plan = replace(
            plan, t=t, boundary=boundary, share=share, boundary_weight=config.boundary_weight
        )
        plan = super().complete(plan, config, rng, iteration, iterations)
        assert plan.r is not None
        below = (plan.r < config.t_prime) & (plan.source != IMAGE)
        return replace(plan, source=np.where(below, np.int8(STAGE1), plan.source))

    @classmethod
    def lowest_time(cls, config: TcmConfig) -> float | None:
        return config.t_prime

    @classmethod
    def schedule(cls, config: TcmConfig) -> dict[str, float]:
        return super().schedule(config) | {"t'": config.t_prime}

    @classmethod
    def continued(cls, config: TcmConfig, before: Mapping[str, PhaseConfig]) -> TcmConfig:
        """One schedule over both stages, counted on."""
        stage1 = before.get(Ect.name)
        if not isinstance(stage1, EctConfig):
            return config
        return replace(
            config, q=stage1.q, stage_iterations=stage1.stage_iterations, max_ratio=stage1.max_ratio
        )

    def report(self, losses: np.ndarray, iteration: int) -> dict[str, float]:
        consistency, boundary = losses.tolist()
        loss = float(losses[0] + self.config.boundary_weight * losses[1])
        means = {"loss": loss, "consistency": consistency, "boundary": boundary}
        return means | {"ratio": super().report(losses, iteration)["ratio"]}
