"""From noise to images: consistency sampling in few steps, Heun's method for diffusion networks, and the
noise levels that each visits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import torch

T = 80.0  # the largest noise level, where sampling starts
LOWEST_TIME = 0.821  # where two-step sampling returns to, unless t' is above it
SIGMA_MIN, RHO, HEUN_STEPS = 0.002, 7.0, 18  # Karras et al. 2022, table 1

Noise = Callable[[int], torch.Tensor]  # sampling step -> unit Gaussian [n,C,H,W]
Denoiser = Callable[[torch.Tensor, float], torch.Tensor]  # x [n,C,H,W], noise level -> D(x,t)
# noise, the denoiser and the noise level of each step, and what else the solver takes for each image
# -> images [n,C,H,W] in [-1,1]
Solver = Callable[..., torch.Tensor]


def default_times(steps: int, t_prime: float | None = None) -> list[float]:
    """Noise levels of k-step sampling: T alone, or a geometric sequence from T down to 0.821 (the
    published two-step time), or to t' where that is higher, since a truncated network ends there.

    Geometric, because equal ratios divide ln t evenly, which is the networks' input and what training
    draws; equal differences would spend nearly all steps at noise that hides everything
    but the coarsest shapes. For more than two steps nothing is published for these networks."""
    return geometric_levels(steps, T, max(LOWEST_TIME, t_prime or 0.0))


def geometric_levels(steps: int, first: float, lowest: float) -> list[float]:
    """Noise levels in a geometric sequence from `first` down to `lowest`, for one step the first alone.
    ValueError for fewer steps than 1."""
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    if steps == 1:
        return [first]
    ratio = lowest / first
    return [first * ratio ** (i / (steps - 1)) for i in range(steps - 1)] + [lowest]


def heun_levels(steps: int) -> list[float]:
    """Noise levels of the ODE solver (Karras et al. 2022, eq. 5, rho = 7), from 80 to 0.002,
    without the final 0. ValueError for fewer than 2 steps."""
    if steps < 2:
        raise ValueError(
            f"steps: a pre-trained network (phase edm) needs at least 2, {HEUN_STEPS} are usual, "
            f"got {steps}"
        )
    first, last = T ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(first + i / (steps - 1) * (last - first)) ** RHO for i in range(steps)]


def multistep(noise: Noise, denoisers: Sequence[Denoiser], times: Sequence[float]) -> torch.Tensor:
    """Consistency sampling: denoise, add noise of the next level, denoise again. [n,C,H,W]"""
    y = denoisers[0](times[0] * noise(0), times[0])
    for i, (denoiser, t) in enumerate(zip(denoisers[1:], times[1:], strict=True), start=1):
        y = denoiser(y + t * noise(i), t)
    return y


def heun(noise: Noise, denoisers: Sequence[Denoiser], levels: Sequence[float]) -> torch.Tensor:
    """The probability-flow ODE dx/dt = (x - D(x,t))/t from levels[0] to 0 with Heun's second-order
    steps, the last one Euler's. [n,C,H,W]"""
    denoise = denoisers[0]
    x = levels[0] * noise(0)
    for t, t_next in pairwise([*levels, 0.0]):
        slope = (x - denoise(x, t)) / t
        x_next = x + (t_next - t) * slope
        if t_next > 0:
            slope_next = (x_next - denoise(x_next, t_next)) / t_next
            x_next = x + (t_next - t) / 2 * (slope + slope_next)
        x = x_next
    return x
