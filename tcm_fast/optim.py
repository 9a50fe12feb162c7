"""Optimizers, learning-rate schedules and weight averages."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from tcm_fast.config import PhaseConfig


def build_optimizer(
    parameters: Iterable[torch.nn.Parameter], config: PhaseConfig, *, capturable: bool = False
) -> torch.optim.Optimizer:
    """torch's RAdam, Adam or AdamW with the phase's constants; `capturable` keeps the step count and
    the learning rate on the device, for CUDA graphs."""
    kinds = {"radam": torch.optim.RAdam, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    weights = list(parameters)
    rate = torch.tensor(config.lr, device=weights[0].device) if capturable else config.lr
    return kinds[config.optimizer](
        weights,
        lr=rate,
        capturable=capturable,
        betas=config.betas,
        eps=config.eps,
        weight_decay=config.weight_decay,
        foreach=True,
    )


def learning_rate(config: PhaseConfig, images: int, iteration: int) -> float:
    """Learning rate of the step that starts after `images` images of the phase and `iteration` steps
    (counted on through stage 2): lr · min(images/warmup, 1) / √max(iteration/decay_start, 1)."""
    lr = config.lr
    if config.warmup_images:
        lr *= min(images / config.warmup_images, 1.0)
    if config.decay_start:
        lr /= math.sqrt(max(iteration / config.decay_start, 1.0))
    return lr


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Give a parameter group its learning rate, in place where a graph reads it from the device."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate


@dataclass(frozen=True)
class EmaRule:
    """How an average forgets: constant:BETA, halflife:IMAGES (EDM) or power:GAMMA (EDM2)."""

    kind: str
    value: float

    @classmethod
    def parse(cls, text: str) -> EmaRule:
        """From 'kind:value'. ValueError for anything else."""
        kind, _, value = text.partition(":")
        limits = {"constant": (0.0, 1.0), "halflife": (0.0, math.inf), "power": (-1.0, math.inf)}
        try:
            number = float(value)
        except ValueError:
            number = math.nan
        if kind not in limits or not limits[kind][0] <= number < limits[kind][1]:
            raise ValueError(
                "ema: must be constant:BETA in [0,1), halflife:IMAGES or power:GAMMA > -1, "
                f"got {text!r}"
            )
        return cls(kind, number)

    def beta(self, iteration: int, images: int, batch_size: int) -> float:
        """The share of the old average that stays.

        Args:
            iteration: optimizer steps so far, this one included, counted on through stage 2.
            images: images of this phase so far, this step's included.
            batch_size: images of this step.
        """
        if self.kind == "constant":
            return self.value
        if self.kind == "power":  # Karras et al. 2024, eq. 125: relative width independent of i
            return (1 - 1 / iteration) ** (self.value + 1)
        halflife = min(self.value, images * 0.05)  # EDM's ramp: at most 5 % of what was seen
        return 0.5 ** (batch_size / max(halflife, 1e-8))


class Ema:
    """An exponential average of a network's parameters, kept beside them in fp32."""

    def __init__(self, rule: str, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.rule = EmaRule.parse(rule)
        self.source = list(parameters)
        self.average = [p.detach().clone() for p in self.source]

    @torch.no_grad()
    def update(self, iteration: int, images: int, batch_size: int) -> None:
        """Move the average towards the parameters, after an optimizer step."""
        beta = self.rule.beta(iteration, images, batch_size)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.source], 1 - beta)
