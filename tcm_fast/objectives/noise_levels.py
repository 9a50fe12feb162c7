"""Which noise levels a step uses: their distributions, the pairs t -> r, and the plan of a batch.

Everything here runs on the host in float64 and is a pure function of (seed, images seen,
configuration): the device never has to be asked which network a sample needs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from scipy import special

from tcm_fast.config import EctConfig, EdmConfig, IctConfig, PhaseConfig, RatioConfig, TcmConfig

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


def karras_grid(levels: int, t_min: float = 0.002, t_max: float = 80.0) -> np.ndarray:
    """levels + 1 noise levels from t_min to t_max, float64 (Karras et al. 2022, eq. 5, rho = 7)."""
    ramp = np.linspace(0, 1, levels + 1)
    return (t_min ** (1 / 7) + ramp * (t_max ** (1 / 7) - t_min ** (1 / 7))) ** 7


# ---- t -> r -------------------------------------------------------------------------------------


def ratio(config: RatioConfig, iteration: int) -> float:
    """r/t far from zero: min(1 - 1/q^(stage+1), limit) with stage = iteration // double (ECT)."""
    stage = iteration // config.double
    return min(1 - config.q ** -(stage + 1.0), config.limit)


def inner_level(t: np.ndarray, ratio: float, r_min: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """r = max(t - Δ, r_min) with Δ = t (1-ratio) (1 + 8 sigmoid(-t)); returns r and Δ := t - r."""
    if not 0 < ratio < 1:
        raise ValueError(f"times: the ratio r/t must lie in (0, 1), got {ratio:g}")
    r = np.maximum(t - t * (1 - ratio) * (1 + 8 * special.expit(-t)), r_min)
    return r, t - r


def ict_levels(config: IctConfig, iteration: int, iterations: int) -> int:
    """Number of noise levels min(s0 2^floor(k/K'), s1) at iteration k of K (Song & Dhariwal 2023)."""
    doublings = math.floor(math.log2(config.s1 // config.s0)) + 1
    period = max(iterations // doublings, 1)
    return min(config.s0 * 2 ** (iteration // period), config.s1)


def _draw_ict(
    config: IctConfig, levels: int, rng: np.random.Generator, count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Neighbouring levels (t, r) of the Karras grid, drawn from a discretised log-normal."""
    grid = karras_grid(levels, config.t_min, config.t_max)
    cdf = special.ndtr((np.log(grid) - config.t_mean) / config.t_std)
    probability = np.diff(cdf) / (cdf[-1] - cdf[0])
    index = rng.choice(levels, size=count, p=probability)
    return grid[index + 1], grid[index]


# ---- the plan of a batch ------------------------------------------------------------------------


@dataclass(frozen=True)
class TimePlan:
    """The noise levels of one optimizer step, for every sample of the global batch.

    t, r, delta (= t - r): float64 [B]; r and delta are None in pre-training.
    boundary: bool [B], the samples at t'.
    share: float64 [B], a sample's part in the mean over the global batch's boundary samples, or over
        its others: sums over ranks and micro-batches are means over the global batch.
    source: int8 [B], where the target comes from: STUDENT, STAGE1 (r < t') or IMAGE (r = r_min).
    """

    t: np.ndarray
    r: np.ndarray | None
    delta: np.ndarray | None
    boundary: np.ndarray
    share: np.ndarray
    source: np.ndarray

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


def plan_times(
    config: PhaseConfig,
    *,
    seed: int,
    images_seen: int,
    iteration: int = 0,
    iterations: int = 1,
) -> TimePlan:
    """The TimePlan of images [images_seen, images_seen + batch_size) of a run.

    Args:
        config: the phase: EdmConfig, EctConfig (or CdConfig), TcmConfig or IctConfig.
        seed: of the run and phase.
        images_seen: images before this step.
        iteration: optimizer steps before this one, counted on through stage 2.
        iterations: length of the run in optimizer steps (ict's schedule needs it).

    Raises:
        ValueError: a batch too small for one boundary sample.
    """
    rng = np.random.Generator(np.random.Philox(key=np.array([seed, images_seen], np.uint64)))
    size = config.batch_size
    boundary = np.zeros(size, bool)
    share = np.full(size, 1 / size)
    source = np.zeros(size, np.int8)
    if isinstance(config, EdmConfig):
        t = draw_t(rng.random(size), mean=config.t_mean, std=config.t_std)
        return TimePlan(t, None, None, boundary, share, source)
    if isinstance(config, IctConfig):
        t, r = _draw_ict(config, ict_levels(config, iteration, iterations), rng, size)
        return TimePlan(t, r, t - r, boundary, share, source)

    assert isinstance(config, RatioConfig)
    t = _draw_outer(config, rng, size)
    if isinstance(config, TcmConfig):
        quota = math.floor(config.rho * size)
        if quota == 0:
            raise ValueError(
                f"batch_size: must leave at least one boundary sample, rho={config.rho:g} of "
                f"{size} is less than one"
            )
        boundary[rng.permutation(size)[:quota]] = True
        t[boundary] = config.t_prime
        share = np.where(boundary, 1 / quota, 1 / (size - quota))
    r, delta = inner_level(t, ratio(config, iteration), config.r_min)
    if isinstance(config, TcmConfig):
        source[r < config.t_prime] = STAGE1
    source[r <= config.r_min] = IMAGE  # the target is y to within r_min: no network is needed
    return TimePlan(t, r, delta, boundary, share, source)


def _draw_outer(config: RatioConfig, rng: np.random.Generator, size: int) -> np.ndarray:
    u = rng.random(size)
    if isinstance(config, TcmConfig):
        return draw_t(
            u, mean=config.t_mean, std=config.t_std, df=config.df,
            low=config.t_prime, high=config.t_max,
        )  # fmt: skip
    assert isinstance(config, EctConfig)
    if config.truncate:
        return draw_t(u, mean=config.t_mean, std=config.t_std, low=config.t_min, high=config.t_max)
    return draw_t(u, mean=config.t_mean, std=config.t_std)
