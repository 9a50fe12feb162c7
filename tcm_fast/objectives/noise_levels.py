"""Which noise levels a step uses: their distributions by name, the pairs t -> r, and the plan of a batch.

Everything here runs on the host in float64 and is a pure function of (seed, images seen,
configuration): the device never has to be asked which network a sample needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from scipy import special

from tcm_fast.config import T_MAX, T_MIN, CmtConfig, IctConfig, RatioConfig

# Where a sample's target comes from, in the order in which a batch is sorted: each network has one end
# of the batch, so that either may take some rows too many and its number of rows stay the same.
STUDENT, IMAGE, STAGE1 = 0, 1, 2

TABLE_SIZE = 1 << 16


# ---- distributions of t -------------------------------------------------------------------------


@lru_cache(maxsize=16)
def _inverse_cdf(
    df: float | None, mean: float, std: float, low: float, high: float
) -> tuple[np.ndarray, np.ndarray]:
    """Nodes (u, ln t) of the inverse CDF of ln t, normal (df None) or Student-t, on [low, high]."""
    log_t = np.linspace(low, high, TABLE_SIZE + 1)
    z = (log_t - mean) / std
    cdf = special.ndtr(z) if df is None else special.stdtr(df, z)
    span = cdf[-1] - cdf[0]
    if not span > 0:
        raise ValueError(
            f"times: the distribution of ln t (mean {mean:g}, std {std:g}) has no mass between "
            f"{low:g} and {high:g}"
        )
    return (cdf - cdf[0]) / span, log_t


def draw_t(
    u: np.ndarray,
    *,
    mean: float,
    std: float,
    df: float | None = None,
    low: float = 0.0,
    high: float = math.inf,
) -> np.ndarray:
    """Map uniform numbers to noise levels t by the tabulated inverse CDF of ln t.

    Args:
        u: uniform numbers in [0, 1), any shape.
        mean, std: location and scale of ln t.
        df: degrees of freedom of a Student-t distribution; None is a normal one.
        low, high: t is truncated to [low, high]. An open normal distribution ends at eight standard
            deviations (probability 1e-15).

    Returns:
        float64 noise levels of u's shape, all within [low, high].
    """
    open_low, open_high = mean - 8 * std, mean + 8 * std
    log_low = math.log(low) if low > 0 else open_low
    log_high = math.log(high) if high < math.inf else open_high
    t = np.exp(np.interp(u, *_inverse_cdf(df, mean, std, log_low, log_high)))
    return np.clip(t, low, high)  # exp(log(x)) can miss x by an ulp


def karras_grid(levels: int, t_min: float = T_MIN, t_max: float = T_MAX) -> np.ndarray:
    """levels + 1 noise levels from t_min to t_max, float64 (Karras et al. 2022, eq. 5, rho = 7)."""
    ramp = np.linspace(0, 1, levels + 1)
    return (t_min ** (1 / 7) + ramp * (t_max ** (1 / 7) - t_min ** (1 / 7))) ** 7


def ict_levels(config: IctConfig, iteration: int, iterations: int) -> int:
    """Number of noise levels min(s0 2^floor(k/K'), s1) at iteration k of K (Song & Dhariwal 2023)."""
    doublings = math.floor(math.log2(config.s1 // config.s0)) + 1
    period = max(iterations // doublings, 1)
    return min(config.s0 * 2 ** (iteration // period), config.s1)


def ict_grid(config: IctConfig, iteration: int, iterations: int) -> np.ndarray:
    """The noise levels of iCT at an iteration, float64, rising."""
    return karras_grid(ict_levels(config, iteration, iterations), T_MIN, T_MAX)


Distribution = Callable[[np.ndarray, Any, int, int], np.ndarray]
"""Uniform numbers in [0, 1) [B], the phase's configuration, the iteration and the number of iterations ->
noise levels t, float64 [B]."""


def lognormal(u: np.ndarray, config: Any, *_: int) -> np.ndarray:
    """ln t ~ N(t_mean, t_std²)."""
    return draw_t(u, mean=config.t_mean, std=config.t_std)


def truncated_lognormal(u: np.ndarray, config: Any, *_: int) -> np.ndarray:
    """ln t ~ N(t_mean, t_std²) on [0.002, 80]."""
    return draw_t(u, mean=config.t_mean, std=config.t_std, low=T_MIN, high=T_MAX)


def truncated_student_t(u: np.ndarray, config: Any, *_: int) -> np.ndarray:
    """ln t ~ Student-t with df degrees of freedom, location t_mean and scale t_std, on [t_prime, 80]."""
    return draw_t(
        u, mean=config.t_mean, std=config.t_std, df=config.student_t_df, low=config.t_prime, high=T_MAX
    )  # fmt: skip


def karras(u: np.ndarray, config: IctConfig, iteration: int, iterations: int) -> np.ndarray:
    """The upper one of two neighbouring levels of iCT's grid, ln t from a discretised normal."""
    grid = ict_grid(config, iteration, iterations)
    cdf = special.ndtr((np.log(grid) - config.t_mean) / config.t_std)
    shares = np.cumsum(np.diff(cdf) / (cdf[-1] - cdf[0]))
    return grid[np.searchsorted(shares / shares[-1], u, side="right") + 1]


def trajectory(u: np.ndarray, config: CmtConfig, *_: int) -> np.ndarray:
    """A point of each sample's trajectory: of the samples that share one, each draws from a part of its own
    of all points but the last, T_MIN."""
    part = np.arange(len(u)) // (len(u) // config.sharing)
    point = np.floor((part + u) * config.steps / config.sharing).astype(int)
    return karras_grid(config.steps)[1:][np.minimum(point, config.steps - 1)]


DISTRIBUTIONS: dict[str, Distribution] = {
    "lognormal": lognormal,
    "truncated_lognormal": truncated_lognormal,
    "truncated_student_t": truncated_student_t,
    "karras": karras,
    "trajectory": trajectory,
}


# ---- t -> r -------------------------------------------------------------------------------------


def ratio(config: RatioConfig, iteration: int) -> float:
    """r/t far from zero: min(1 - 1/q^(stage+1), limit) with stage = iteration // double (ECT)."""
    stage = iteration // config.stage_iterations
    return min(1 - config.q ** -(stage + 1.0), config.max_ratio)


def inner_level(t: np.ndarray, ratio: float, r_min: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """r = max(t - Δ, r_min) with Δ = t (1-ratio) (1 + 8 sigmoid(-t)); returns r and Δ := t - r."""
    if not 0 < ratio < 1:
        raise ValueError(f"times: the ratio r/t must lie in (0, 1), got {ratio:g}")
    r = np.maximum(t - t * (1 - ratio) * (1 + 8 * special.expit(-t)), r_min)
    return r, t - r


# ---- the plan of a batch ------------------------------------------------------------------------


@dataclass(frozen=True)
class TimePlan:
    """The noise levels of one optimizer step, for every sample of the global batch.

    t, r, delta (= t - r): float64 [B]; r and delta are None in pre-training.
    weighting: float32 [B], the weighting function at (t, r); None while the plan is being made.
    boundary: bool [B], the samples at t'.
    share: float64 [B], a sample's part in the mean over the global batch's boundary samples, or over
        its others: sums over ranks and micro-batches are means over the global batch.
    source: int8 [B], where the target comes from: STUDENT, STAGE1 (r < t') or IMAGE (r = r_min).
    boundary_weight: of the boundary's mean in the loss.
    image: int64 [B], which of the step's images each sample takes; None is its own.
    """

    t: np.ndarray
    r: np.ndarray | None
    delta: np.ndarray | None
    weighting: np.ndarray | None
    boundary: np.ndarray
    share: np.ndarray
    source: np.ndarray
    boundary_weight: float = 0.0
    image: np.ndarray | None = None

    def images(self, part: np.ndarray) -> np.ndarray:
        """The numbers of a part's images among the step's, int64."""
        return part if self.image is None else self.image[part]

    def parts(self, count: int) -> list[np.ndarray]:
        """Cut the batch into `count` parts of sample numbers (ranks x micro-batches), equal in size
        and, to within one sample, in the work of each network; each is sorted by source."""
        size = len(self.t)
        if size % count:
            raise ValueError(
                f"batch_size: must be divisible by ranks x micro-batches = {count}, got {size}"
            )
        order = np.argsort(self.source, kind="stable")
        return [order[part::count] for part in range(count)]
