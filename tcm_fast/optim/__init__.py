"""Optimizers, EMA and learning-rate schedules."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tcm_fast.config import PhaseConfig
from tcm_fast.kernels._backend import extension_for
from tcm_fast.optim.base import TrainingOptimizer
from tcm_fast.optim.ema import Ema
from tcm_fast.optim.fused import FusedOptimizer
from tcm_fast.optim.offload import PiecewiseOptimizer
from tcm_fast.optim.torch_optimizer import TORCH_OPTIMIZERS


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter],
    config: PhaseConfig,
    *,
    emas: Sequence[Ema] = (),
    copies: Sequence[torch.Tensor | None] | None = None,
    normalized: Sequence[bool] | None = None,
    scale: float | None = None,
    growth_interval: int = 2000,
    capturable: bool = False,
    offload: bool = False,
    moments: str = "fp32",
) -> TrainingOptimizer:
    """The phase's optimizer with its constants: fused, or offloaded, where the extension supports the
    parameters' device, else torch's.

    Args:
        parameters: a network's, on one device.
        emas: of just these parameters.
        copies, normalized: a `FusedOptimizer`'s; the extension alone does that.
        scale, growth_interval: the loss scale, None without one.
        capturable: steps will be captured in CUDA graphs.
        offload: moments and EMAs are in host memory.
        moments: fp32, bf16 or 8bit.

    Raises:
        ValueError: `offload` or the moments' form need the extension.
    """
    weights = list(parameters)
    constants: dict[str, Any] = {
        "lr": config.lr,
        "betas": config.betas,
        "max_norm": config.grad_clip,
        "emas": [ema.average for ema in emas],
        "scale": scale,
        "growth_interval": growth_interval,
    }
    if extension_for("fused_step", weights[0].device) is None:
        assert copies is None
        assert not any(normalized or ())
        if offload:
            raise ValueError("offload: needs the extension, see tcm-fast doctor")
        if moments != "fp32":
            raise ValueError(f"moments: {moments} needs the extension, see tcm-fast doctor")
        return TORCH_OPTIMIZERS[config.optimizer](weights, capturable=capturable, **constants)
    fused = PiecewiseOptimizer if offload else FusedOptimizer
    return fused(
        weights,
        config.optimizer,
        copies=copies,
        normalized=normalized,
        moments=moments,
        **constants,
    )
