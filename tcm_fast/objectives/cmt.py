"""Mid-training between edm and ect (Hu et al., "CMT: Mid-Training for Efficient Learning of Consistency, Mean
Flow, and Flow Map Models", ICLR 2026, arXiv 2509.24526)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import numpy as np
import torch

from tcm_fast.config import T_MAX, T_MIN, CmtConfig
from tcm_fast.kernels.consistency_loss import consistency_loss
from tcm_fast.kernels.noise_pair import NOISE_LAYER, network_input
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.kernels.precondition import denoise
from tcm_fast.objectives.batch import Batch
from tcm_fast.objectives.manifold import DistanceObjective, manifold_loss
from tcm_fast.objectives.noise_levels import IMAGE, TimePlan, karras_grid


class Cmt(DistanceObjective[CmtConfig]):
    """d(D(x_t,t), x_0): the student at a point x_t of a trajectory of the teacher, in eval mode, against the
    trajectory's end x_0. Trajectories start at T eps, T = 80, and end at 0.002.

    They are solved when they are needed, by DPM-Solver++(2M), one pass of the teacher a step (Heun's method
    takes two): used at all its points, a trajectory costs one pass for each sample, beside three of the
    student; keeping it would save that at most, for steps + 1 fp32 images each. Sample i of the batch takes
    a point of trajectory i mod N, of N = batch_size / sharing: a cut into M parts (`TimePlan.parts`) has
    N / gcd(N, M) trajectories in each, whole ones where M divides N. The iteration count of the phase after
    it begins with that phase, since there are no pairs here whose r/t it could go on with."""

    name = "cmt"
    counts_on = False
    time_share = 0.40
    frozen_file = "teacher"
    needs = "a teacher: train edm first"
    needs_denoiser = True

    @classmethod
    def distribution(cls, config: CmtConfig) -> str:
        return "trajectory"

    @classmethod
    def complete(
        cls,
        plan: TimePlan,
        config: CmtConfig,
        rng: np.random.Generator,
        iteration: int,
        iterations: int,
    ) -> TimePlan:
        """The targets are images, at T_MIN; those that share a trajectory share its first one's label."""
        size = len(plan.t)
        return replace(
            plan, r=np.full(size, T_MIN), delta=plan.t - T_MIN, source=np.full(size, IMAGE, np.int8),
            image=np.arange(size) % (size // config.sharing),
        )  # fmt: skip

    @classmethod
    def weighting(cls, plan: TimePlan, config: CmtConfig, sigma_data: float) -> np.ndarray:
        return np.ones(len(plan.t), np.float32)

    @classmethod
    def note(cls, config: CmtConfig) -> str:
        passes = config.steps / config.sharing
        return (
            f"each step solves trajectories of {config.steps} steps, each for {config.sharing} samples: "
            f"{passes:g} x a pass of the teacher for a sample; none are kept"
        )

    def losses(self, batch: Batch) -> torch.Tensor:
        x, end = self.points(batch)
        given = network_input(x, batch.t, self.student.sigma_data, self.dtype, self.append_ones)
        output = self._raw(self.student, given, batch, batch.t, slice(None), self._weights())
        return DISTANCES[self.config.distance](self, output, x, end, batch)

    @torch.no_grad()
    def points(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """Each row's point of its trajectory, at batch.t, and its trajectory's end: fp32 [n,C,H,W].

        DPM-Solver++(2M) of Lu et al. 2022 (arXiv 2211.01095, algorithm 2) with lambda = -ln t."""
        net, n = self.frozen, len(batch.t)
        assert net is not None
        total = self.config.batch_size // self.config.sharing
        own = total // math.gcd(
            total, self.config.batch_size // n
        )  # those of rows m and m + own are one
        sample = batch.key.sample[:own] % total
        size = (net.img_channels, net.img_resolution, net.img_resolution)
        x = T_MAX * philox_normal(batch.key.seed, batch.key.step, NOISE_LAYER, sample, size)

        def of_rows(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x] * (n // own))

        t = batch.t.reshape(-1, 1, 1, 1)
        found, nearest = of_rows(x), math.inf
        before, last_step = None, 1.0
        for level, lower in pairwise(karras_grid(self.config.steps)[::-1].tolist()):
            if before is not None:
                found = torch.where(t < nearest, of_rows(x), found)
            levels = batch.t.new_full((own,), level)
            given = network_input(x, levels, net.sigma_data, self.dtype, self.append_ones)
            output = self._raw(net, given, batch, levels, slice(0, own), None)
            denoised = denoise(output, x, levels, net.sigma_data)
            step = math.log(level / lower)
            ahead = denoised
            if before is not None:
                ahead = denoised + step / (2 * last_step) * (denoised - before)
            x = ahead.lerp(x, lower / level)
            before, last_step, nearest = denoised, step, math.sqrt(level * lower)
        return found, of_rows(x)


Distance = Callable[[Cmt, torch.Tensor, torch.Tensor, torch.Tensor, Batch], torch.Tensor]
"""The objective, the student's raw output at x [n,C,H,W], x, the trajectories' ends and the batch -> weighted
losses [n], fp32, with a gradient to the output."""


def pixel(
    cmt: Cmt, output: torch.Tensor, x: torch.Tensor, end: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """w |D(x_t,t) - x_0|², summed over the image."""
    error = denoise(output, x, batch.t, cmt.student.sigma_data) - end
    return batch.weighting * error.square().sum((1, 2, 3))


def huber(
    cmt: Cmt, output: torch.Tensor, x: torch.Tensor, end: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """w (sqrt(|D(x_t,t) - x_0|² + c²) - c)."""
    return consistency_loss(
        output, x, batch.t, end, x, batch.r, delta=batch.delta, c=cmt.config.huber_c,
        weighting=batch.weighting, sigma_data=cmt.student.sigma_data, is_clean=batch.is_clean,
    )  # fmt: skip


def manifold(
    cmt: Cmt, output: torch.Tensor, x: torch.Tensor, end: torch.Tensor, batch: Batch
) -> torch.Tensor:
    """w √(Σ_l ‖φ_l(D(x_t,t)) - φ_l(x_0)‖²), with the gradient of `manifold_loss`."""
    assert cmt._features is not None
    return manifold_loss(
        output, x, batch.t, end, x, batch.r, features=cmt._features[0],
        weighting=batch.weighting, sigma_data=cmt.student.sigma_data, is_clean=batch.is_clean,
    )  # fmt: skip


DISTANCES: dict[str, Distance] = {"pixel": pixel, "huber": huber, "manifold": manifold}
