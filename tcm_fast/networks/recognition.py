"""What is common to finding out a network's architecture from somebody's file: names and shapes of its
weights, and the arguments that were recorded."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

STEM = re.compile(r"(?:^|\.)enc\.(\d+)x\1_conv\.weight$")
"""The name of the first convolution of EDM's U-Nets ends so."""


@dataclass(frozen=True)
class Weights:
    """A network in a file, of which nothing was built.

    shapes: of the weights, by EDM's names. options: recorded arguments of its constructor, unchecked.
    load: the value of a weight. shown: makes something out of the file fit to be printed.
    """

    shapes: Mapping[str, tuple[int, ...]]
    options: Mapping[str, Any]
    load: Callable[[str], torch.Tensor]
    shown: Callable[[object], str]

    def number(self, name: str, default: float) -> float:
        """A recorded number. ValueError for what is none."""
        value = self.options.get(name, default)
        if not isinstance(value, int | float) or not math.isfinite(value):
            raise ValueError(f"its argument {name} is {self.shown(value)}, not a number")
        return value

    def resolutions(self, *names: str) -> list[int] | None:
        """A recorded list of resolutions, under whichever of the names; None where there is none."""
        found = (self.options[name] for name in names if self.options.get(name) is not None)
        value = next(found, None)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or not all(type(item) is int for item in value):
            raise ValueError(f"a list of resolutions is {self.shown(value)}")
        return list(value)


@dataclass(frozen=True)
class Level:
    """Blocks and output channels of a level of the encoder."""

    resolution: int
    blocks: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.resolution}x{self.resolution}"


def encoder_levels(weights: Weights, resolution: int, last: str) -> list[Level]:
    """The levels of the encoder, whose blocks end in the convolution `last`."""
    levels = []
    while True:
        name, blocks = f"{resolution}x{resolution}", 0
        while f"model.enc.{name}_block{blocks}.{last}.weight" in weights.shapes:
            blocks += 1
        if blocks == 0:
            break
        width = weights.shapes[f"model.enc.{name}_block0.{last}.weight"][0]
        levels.append(Level(resolution, blocks, width))
        resolution //= 2
    if not levels:
        raise ValueError("its encoder has no blocks")
    return levels


def multiples(widths: Sequence[int], unit: int) -> list[int]:
    """The widths in units. ValueError where they are no multiples."""
    if unit < 1 or any(width % unit for width in widths):
        raise ValueError(f"its widths {list(widths)} are no multiples of {unit}")
    return [width // unit for width in widths]


def filter_taps(weights: Weights, name: str) -> list[int]:
    """The taps of a resampling filter, which is kept as their normalised outer product [1,1,k,k]."""
    shape = weights.shapes[name]
    if len(shape) != 4 or shape[2] != shape[3] or shape[2] > 16:
        raise ValueError(f"a resampling filter is {list(shape)}")
    taps = weights.load(name).double()[0, 0].diagonal().clamp(min=1e-12).sqrt()
    return [max(1, min(round(tap), 1000)) for tap in (taps / taps.min()).nan_to_num(1.0).tolist()]
