"""Pre-training: denoising at every noise level (Karras et al. 2022)."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from tcm_fast.config import EdmConfig
from tcm_fast.data.augment import AUGMENT_DIM, augment
from tcm_fast.kernels.noise_pair import noise_pair
from tcm_fast.kernels.precondition import denoise
from tcm_fast.networks.precond import Precond
from tcm_fast.objectives.base import Objective
from tcm_fast.objectives.batch import Batch
from tcm_fast.objectives.noise_levels import TimePlan


class Edm(Objective[EdmConfig]):
    """w(t) ‖D(y + t eps, t) - y‖², w = (t²+sd²)/(t sd)², summed over the image. With a learned log-variance
    u(t) (EDM2), e^-u times that, and u for every element."""

    name = "edm"
    is_consistency = False
    sampling_steps = (None,)
    time_share = 0.35

    @classmethod
    def distribution(cls, config: EdmConfig) -> str:
        return "lognormal"

    @classmethod
    def weighting(cls, plan: TimePlan, config: EdmConfig, sigma_data: float) -> np.ndarray:
        t = plan.t.astype(np.float32)
        return (np.square(t) + sigma_data**2) / np.square(t * sigma_data)

    @classmethod
    def check(cls, config: EdmConfig, student: Precond) -> None:
        """ValueError where images are augmented and the network cannot be told how."""
        layer = student.model.augmentation
        found = 0 if layer is None else layer.in_features
        if cls.augments(config) and found != AUGMENT_DIM:
            raise ValueError(
                f"edm.augment: needs network.augment_dim {AUGMENT_DIM} (ddpmpp, ncsnpp, adm), got {found}"
            )

    @classmethod
    def learns_variance(cls, config: EdmConfig) -> bool:
        return config.learned_variance

    @classmethod
    def augments(cls, config: EdmConfig) -> bool:
        return config.augment > 0

    @classmethod
    def shortened(cls, config: EdmConfig, rate: float, steps: int, share: float) -> dict[str, Any]:
        return {"lr": rate, "warmup_images": int(config.warmup_images * share)}

    def losses(self, batch: Batch) -> torch.Tensor:
        net, sd = self.student, self.student.sigma_data
        images, how = batch.images, None
        if self.augments(self.config):
            images = images.to(torch.float32) / 127.5 - 1
            images, how = augment(images, batch.key, self.config.augment)
        options = {"sigma_data": sd, "dtype": self.dtype, "append_ones": self.append_ones}
        noisy = noise_pair(images, batch.t, None, batch.key, **options)
        rows, weights = slice(None), self._weights()
        output = self._raw(net, noisy.input_t, batch, batch.t, rows, weights, how)
        error = denoise(output, noisy.x_t, batch.t, sd) - noisy.y
        loss = batch.weighting * error.square().sum((1, 2, 3))
        variance = net.log_variance(batch.t)
        if variance is None:
            return loss
        return loss * (-variance).exp() + variance * error[0].numel()
