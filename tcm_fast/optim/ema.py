"""Exponential moving averages (EMA) of a network's parameters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class EmaRule:
    """The decay of an EMA: constant:BETA, halflife:IMAGES (EDM) or power:GAMMA (EDM2)."""

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
        """The decay of a step: the share of the old average that stays.

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
    """An EMA of a network's parameters: its rule, and its tensors (`average`) in fp32. An optimizer of
    this package updates them in its step; beside any other one, call `update`."""

    def __init__(self, rule: str, parameters: Iterable[torch.nn.Parameter]) -> None:
        self.rule = EmaRule.parse(rule)
        self.source = list(parameters)
        self.average = [p.detach().clone() for p in self.source]

    def update(self, iteration: int, images: int, batch_size: int) -> None:
        """Move the EMA towards the parameters, after an optimizer step."""
        update_ema(self.average, self.source, self.rule.beta(iteration, images, batch_size))


@torch.no_grad()
def update_ema(
    average: list[torch.Tensor], parameters: Iterable[torch.Tensor], beta: float
) -> None:
    """average := beta · average + (1 - beta) · parameters, in place."""
    torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - beta)
