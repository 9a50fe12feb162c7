"""A long recipe scaled to a short budget, by rule.

Every quantity follows from the ratio of the images (or arithmetic) at hand to those of the long recipe, with
exponents chosen so that one rule gives both the published CIFAR-10 recipe (at its own length) and what was
tuned by hand for the built-in digits, at a two-thousandth of the images. Nothing here is claimed for a
budget that has not been run: see benchmarks/results.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tcm_fast.config import Config, PhaseConfig
from tcm_fast.objectives import OBJECTIVES

SMALLEST_BATCH, SMALLEST_WIDTH = 64, 32
WIDTH_EXPONENT = 1 / 8  # of the arithmetic: 16 times less of it, a network 1.4 times narrower
BATCH_EXPONENT = 1 / 3  # of the images: the rest of the shortening falls on the number of steps
EPOCHS_OF_DROPOUT = 1000  # a network that sees an image less often needs less of it
TF32_GAP = 0.004  # 1 - r/t from which on tf32's rounding stays well below the signal


def scale_width(width: int, arithmetic: float, multiple: int = 32) -> int:
    """A network's width for a share `arithmetic` (at most 1) of the recipe's operations: a multiple of 32, so
    that 32 groups divide the widths of all joined levels."""
    if arithmetic >= 1:
        return width
    wanted = width * arithmetic**WIDTH_EXPONENT
    return min(max(round(wanted / multiple) * multiple, SMALLEST_WIDTH), width)


def scale_recipe(
    config: Config,
    images: Mapping[str, int],
    *,
    width: int | None = None,
    count: int = 50_000,
    tf32: bool = False,
) -> Config:
    """The recipe for so many images of each phase; at the recipe's own lengths it stays what it is.

    Args:
        config: the long recipe.
        images: of each of its phases that is to be run.
        width: of the network; None leaves it.
        count: images of the training set, which say how often each is seen.
        tf32: compute so, and let r come no closer to t than leaves it enough signal.
    """
    phases = tuple(name for name in config.phases if name in images)
    given = config.network.model_channels
    narrow = 1.0 if width is None or given is None else width / given
    network = config.network if width is None else replace(config.network, model_channels=width)
    scaled: dict[str, Any] = {"phases": phases, "network": network}
    for name in phases:
        phase = config.phase(name)
        own = _scale_phase(name, phase, min(images[name], phase.images), narrow, count)
        if tf32:
            own = OBJECTIVES[name].with_gap(own, TF32_GAP)
        scaled[name] = OBJECTIVES[name].continued(own, scaled)
    if tf32:
        scaled["precision"] = "tf32"
    steps = [math.ceil(scaled[n].images / scaled[n].batch_size) for n in phases]
    every = max(min(steps, default=1) // 4, 50)
    scaled |= {
        "save_every": min(config.save_every, every),
        "grid_every": min(config.grid_every, every),
        "log_every": min(config.log_every, max(every // 10, 1)),
    }
    return replace(config, **scaled)


def leaves_signal_to_tf32(config: Config) -> bool:
    """Whether a recipe's pairs are far enough apart for its rounding; ict's are not known to be."""
    gaps = [OBJECTIVES[name].smallest_gap(config.phase(name)) for name in config.phases]
    return min(gaps, default=1.0) >= TF32_GAP


def _scale_phase(
    name: str, phase: PhaseConfig, images: int, narrow: float, count: int
) -> PhaseConfig:
    share = images / phase.images
    if share == 1 and narrow == 1:
        return phase
    power = round(math.log2(phase.batch_size * share**BATCH_EXPONENT))
    batch = min(max(2**power, SMALLEST_BATCH), phase.batch_size)
    steps = max(images // batch, 1)
    dropout = phase.dropout * min(1.0, images / count / EPOCHS_OF_DROPOUT)
    rate = phase.lr / narrow * math.sqrt(batch / phase.batch_size)
    changes: dict[str, Any] = {
        "images": steps * batch,
        "batch_size": batch,
        "dropout": round(dropout, 2),
        "ema": tuple(_scale_average(rule, steps) for rule in phase.ema),
    }
    return replace(phase, **changes, **OBJECTIVES[name].shortened(phase, rate, steps, share))


def _scale_average(rule: str, steps: int) -> str:
    """An average that remembers a tenth of the phase at most: one of a relative width where a constant
    rate would remember more. A half-life in images adapts itself."""
    kind, _, value = rule.partition(":")
    if kind == "constant" and 1 / (1 - float(value)) > steps / 10:
        return "power:6.94"
    return rule


def images_for(
    seconds: float, rates: Mapping[str, float], phases: tuple[str, ...]
) -> dict[str, int]:
    """Images of each phase in a span of time, at so many images per second."""
    shares = {name: OBJECTIVES[name].time_share for name in phases}
    total = sum(shares.values())
    return {name: int(seconds * shares[name] / total * rates[name]) for name in phases}
