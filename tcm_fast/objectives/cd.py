"""Consistency distillation, a baseline: the pre-trained network takes one Euler step t -> r."""

from __future__ import annotations

import torch

from tcm_fast.config import CdConfig
from tcm_fast.kernels.noise_pair import NoisePair, network_input
from tcm_fast.kernels.precondition import denoise
from tcm_fast.objectives.batch import Batch
from tcm_fast.objectives.consistency import RatioConsistency, euler_step


class Cd(RatioConsistency[CdConfig]):
    """Stage 1's pairs, whose x_r the teacher computes; in eval mode."""

    name = "cd"
    time_share = 0.40
    frozen_file = "teacher"
    needs = "a teacher: train edm first"
    needs_denoiser = True

    @classmethod
    def distribution(cls, config: CdConfig) -> str:
        return "truncated_lognormal"

    def inner_images(
        self, pair: NoisePair, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        x_r = self._euler_step(pair.x_t, pair.input_t, batch)
        sd, ones = self.student.sigma_data, self.append_ones
        return x_r, network_input(x_r, batch.r, sd, self.dtype, ones), x_r

    @torch.no_grad()
    def _euler_step(self, x_t: torch.Tensor, input_t: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One step of the teacher's probability-flow ODE."""
        assert self.frozen is not None
        output = self._raw(self.frozen, input_t, batch, batch.t, slice(None), None)
        return euler_step(x_t, denoise(output, x_t, batch.t, self.frozen.sigma_data), batch)
