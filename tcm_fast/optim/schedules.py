"""Learning-rate schedules."""

from __future__ import annotations

import math

from tcm_fast.config import PhaseConfig


def learning_rate(config: PhaseConfig, images: int, iteration: int) -> float:
    """Learning rate of the step that starts after `images` images of the phase and `iteration` steps
    (counted on through stage 2): lr · min(images/warmup, 1) / √max(iteration/decay_start, 1)."""
    lr = config.lr
    if config.warmup_images:
        lr *= min(images / config.warmup_images, 1.0)
    if config.decay_start:
        lr /= math.sqrt(max(iteration / config.decay_start, 1.0))
    return lr
