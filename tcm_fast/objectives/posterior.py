"""Variance-reduced targets (stable consistency tuning): x_r by the posterior mean, not by the one image."""

from __future__ import annotations

from typing import TypeVar

import torch

from tcm_fast.config import TargetConfig
from tcm_fast.kernels.noise_pair import NoisePair, network_input
from tcm_fast.kernels.posterior_mean import posterior_mean
from tcm_fast.objectives.batch import Batch
from tcm_fast.objectives.consistency import RatioConsistency, euler_step

T = TypeVar("T", bound=TargetConfig)


class PosteriorTarget(RatioConsistency[T]):
    """With `target = "posterior"`, x_r = x_t - (t - r) (x_t - E[y|x_t]) / t (Wang et al. 2024, "Stable
    Consistency Tuning"; the mean's estimate is that of Xu et al. 2023, "Stable Target Field").

    The mean is over the image that x_t was made from and a bank of others, drawn anew for each step, of the
    same class where the network is given classes. With the one image in place of the mean that is the usual
    x_r. Given x_t and all these images, each is the one that x_t was made from with just its weight: so x_r
    has the mean that the usual one has given x_t, with a bank of any size, and no larger variance. Rows
    whose target is an image (r ~ 0) get x_r, which is the posterior mean to within r.
    """

    @classmethod
    def bank_size(cls, config: T) -> int:
        return config.bank_size if config.target == "posterior" else 0

    def inner_images(
        self, pair: NoisePair, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        if not self.bank_size(self.config):
            return super().inner_images(pair, batch)
        if batch.bank is None:
            raise ValueError(f"{self.name}.target: posterior needs a batch with a bank, got none")
        classes = None if batch.labels is None else batch.labels.argmax(1)
        mean = posterior_mean(
            pair.x_t, batch.t, batch.images, batch.bank, classes, batch.bank_classes
        )
        x_r = euler_step(pair.x_t, mean, batch)
        sd, ones = self.student.sigma_data, self.append_ones
        return x_r, network_input(x_r, batch.r, sd, self.dtype, ones), x_r
