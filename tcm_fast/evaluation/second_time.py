"""The second noise level of two-step sampling, found by trying: a grid over ln t, then finer around the best.

All times are tried with the same noise (sampling is by image number), so that few samples tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from tcm_fast.data.dataset import ImageData
from tcm_fast.evaluation.features import FeatureSpace
from tcm_fast.evaluation.metrics import frechet_distance
from tcm_fast.networks import Precond
from tcm_fast.objectives import is_consistency
from tcm_fast.sampling.sampler import sample
from tcm_fast.sampling.solvers import T

LOWEST, COARSE, ROUNDS = 0.1, 7, 3


def search_second_time(
    net: Precond,
    data: ImageData,
    space: FeatureSpace,
    *,
    num: int = 512,
    seed: int = 0,
    lowest: float | None = None,
    tried: Callable[[float, float], None] = lambda t, distance: None,
) -> dict[float, float]:
    """Fréchet distances of two-step samples by the second time, in the order of the times; the smallest
    is the one to take.

    Args:
        net: a consistency model.
        data: images to compare with, and for the classes of conditional samples.
        space: where distances are measured.
        num: samples of each time.
        lowest: where to begin; by default 0.1, or t' of a truncated network.
        tried: told of each time and its distance.

    Raises:
        ValueError: a pre-trained network, whose second step has no such time; a range without times.
    """
    info = getattr(net, "info", {})
    if not is_consistency(info.get("phase")):
        raise ValueError("search-times: needs a consistency model, got a pre-trained network")
    lowest = lowest or max(LOWEST, info.get("t_prime") or 0.0)
    if not 0 < lowest < T / 2:
        raise ValueError(f"search-times: lowest must lie in (0, {T / 2:g}), got {lowest:g}")
    if num < 2:
        raise ValueError(f"search-times: num must be at least 2, got {num}")
    chosen = np.linspace(0, len(data) - 1, min(4 * num, len(data))).astype(np.int64)
    real = space.features(data.images[chosen])
    found: dict[float, float] = {}

    def distance(t: float) -> float:
        if t not in found:
            images = sample(net, num, times=[t], seed=seed)
            found[t] = frechet_distance(space.features(images), real)
            tried(t, found[t])
        return found[t]

    step = math.log(T / 2 / lowest) / (COARSE - 1)
    times = [lowest * math.exp(i * step) for i in range(COARSE)]
    for _ in range(ROUNDS):
        best = min(times, key=distance)
        step /= 2
        near = [best * math.exp(-step), best * math.exp(step)]
        times = [best, *(t for t in near if lowest <= t <= T / 2)]
    min(times, key=distance)
    return dict(sorted(found.items()))
