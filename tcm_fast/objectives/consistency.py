"""What the consistency phases share: the pair's loss, and pairs whose ratio r/t rises in stages."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch

from tcm_fast.config import ConsistencyConfig, RatioConfig
from tcm_fast.kernels.consistency_loss import WEIGHTINGS, consistency_loss
from tcm_fast.kernels.noise_pair import NoisePair, noise_pair
from tcm_fast.networks.precond import Precond
from tcm_fast.objectives.batch import Batch
from tcm_fast.objectives.manifold import DistanceObjective, manifold_loss
from tcm_fast.objectives.noise_levels import IMAGE, TimePlan, inner_level, ratio

MAX_RATE = 2e-3  # of a recipe that is shortened

P = TypeVar("P", bound=ConsistencyConfig)
R = TypeVar("R", bound=RatioConfig)


def euler_step(x_t: torch.Tensor, denoised: torch.Tensor, batch: Batch) -> torch.Tensor:
    """One step t -> r of the probability-flow ODE: x_t + (r - t) (x_t - D) / t."""
    slope = -batch.delta / batch.t
    return x_t + slope.reshape(-1, 1, 1, 1) * (x_t - denoised)


class Consistency(DistanceObjective[P]):
    """w(t,r) d(D(x_t,t), sg D(x_r,r)) with the pseudo-Huber distance d (or the manifold feature distance),
    each target by the one network that it needs."""

    @property
    def c(self) -> float:
        """Constant of the pseudo-Huber distance."""
        return self.config.huber_c

    @classmethod
    def weighting(cls, plan: TimePlan, config: P, sigma_data: float) -> np.ndarray:
        assert plan.r is not None
        assert plan.delta is not None
        t, r, delta = (torch.from_numpy(v.astype(np.float32)) for v in (plan.t, plan.r, plan.delta))
        return WEIGHTINGS[config.weighting](t, r, delta, sigma_data).numpy()

    @classmethod
    def smallest_gap(cls, config: P) -> float:
        return 0.0

    @classmethod
    def shortened(cls, config: P, rate: float, steps: int, share: float) -> dict[str, Any]:
        fewer = config.images / config.batch_size / steps
        return {"lr": max(min(rate * fewer ** (1 / 3), MAX_RATE), min(rate, config.lr))}

    def losses(self, batch: Batch) -> torch.Tensor:
        sd = self.student.sigma_data
        pair = noise_pair(
            batch.images, batch.t, batch.r, batch.key, sigma_data=sd, dtype=self.dtype,
            append_ones=self.append_ones,
        )  # fmt: skip
        x_r, input_r, clean = self.inner_images(pair, batch)
        weights = self._weights()
        output, bias = self._raw_and_bias(
            self.student, pair.input_t, batch, batch.t, slice(None), weights
        )
        with torch.no_grad():
            target, target_bias = self._targets(input_r, clean, batch, weights)
        is_clean = batch.is_clean if batch.has_clean else None
        if self._features is not None:
            return manifold_loss(
                output, pair.x_t, batch.t, target, x_r, batch.r, features=self._features[0],
                weighting=batch.weighting, sigma_data=sd, is_clean=is_clean,
            )  # fmt: skip
        return consistency_loss(
            output, pair.x_t, batch.t, target, x_r, batch.r, delta=batch.delta, c=self.c,
            weighting=batch.weighting, sigma_data=sd, is_clean=is_clean,
            output_bias=bias, target_bias=target_bias,
        )  # fmt: skip

    def _raw_and_bias(self, net: Precond, *given: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Raw output on some rows, and the last convolution's bias where the loss is to add it."""
        if self._features is not None:
            return self._raw(net, *given), None
        inputs, options = self._of_rows(*given)
        return net.raw_and_bias(*inputs, **options)

    def inner_images(
        self, pair: NoisePair, batch: Batch
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """x_r, the network's input at it, and the target of rows whose target is an image."""
        assert pair.x_r is not None
        assert pair.input_r is not None
        return pair.x_r, pair.input_r, pair.y

    def _targets(
        self,
        input_r: torch.Tensor,
        clean: torch.Tensor,
        batch: Batch,
        weights: dict[str, torch.Tensor] | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Raw outputs at (x_r, r), each by the one network that it needs; images where it needs none. And
        the biases [n,C] that the outputs come without, or None."""
        found: list[tuple[torch.Tensor, torch.Tensor | None]] = []
        n = len(input_r)
        if batch.student_rows:
            detached = None if weights is None else {k: v.detach() for k, v in weights.items()}
            rows = slice(0, batch.student_rows)
            found.append(self._raw_and_bias(self.student, input_r, batch, batch.r, rows, detached))
        if batch.has_clean:
            found.append((clean, None))
        if batch.stage1_rows:
            assert self.frozen is not None
            rows = slice(n - batch.stage1_rows, n)
            found.append(self._raw_and_bias(self.frozen, input_r, batch, batch.r, rows, None))
        target = _in_order([output for output, _ in found], batch)
        if all(bias is None for _, bias in found):
            return target, None
        biases = [
            input_r.new_zeros(output.shape[:2], dtype=torch.float32) if bias is None else bias
            for output, bias in found
        ]
        return target, _in_order(biases, batch)


def _in_order(found: list[torch.Tensor], batch: Batch) -> torch.Tensor:
    """The rows of the batch [n, ...] out of those of its networks and images."""
    rows = found[0] if len(found) == 1 else torch.cat(found)
    in_order = len(rows) == len(batch.t) and not batch.has_clean
    if in_order:
        return rows
    if rows.ndim == 4 and rows.is_contiguous(memory_format=torch.channels_last):  # and stays so
        return rows.movedim(1, 3).index_select(0, batch.position).movedim(3, 1)
    return rows.index_select(0, batch.position)


class RatioConsistency(Consistency[R]):
    """A consistency phase whose pairs have a ratio r/t that rises in stages (ECT)."""

    @classmethod
    def complete(
        cls, plan: TimePlan, config: R, rng: np.random.Generator, iteration: int, iterations: int
    ) -> TimePlan:
        r, delta = inner_level(plan.t, ratio(config, iteration), config.r_min)
        source = plan.source.copy()
        source[r <= config.r_min] = IMAGE  # the target is y to within r_min: no network is needed
        return replace(plan, r=r, delta=delta, source=source)

    @classmethod
    def schedule(cls, config: R) -> dict[str, float]:
        return {
            "q": config.q,
            "doubling interval": config.stage_iterations,
            "limit of r/t": config.max_ratio,
        }

    @classmethod
    def smallest_gap(cls, config: R) -> float:
        return 1 - config.max_ratio

    @classmethod
    def with_gap(cls, config: R, gap: float) -> R:
        return replace(config, max_ratio=min(config.max_ratio, 1 - gap))

    @classmethod
    def shortened(cls, config: R, rate: float, steps: int, share: float) -> dict[str, Any]:
        """How close r comes to t, and how fast. The gap 1 - r/t at the end grows as 1/sqrt(steps): what
        remains to be learnt from pairs so close together drowns in the noise of fewer steps. The schedule
        reaches it after the same share of the phase."""
        before = config.images / config.batch_size
        gap = min((1 - config.max_ratio) * math.sqrt(before / steps), 0.25)
        stages = math.log(1 / (1 - config.max_ratio), config.q)
        part = config.stage_iterations * stages / before
        stages = max(math.log(1 / gap, config.q), 1.0)
        schedule = {"max_ratio": 1 - gap, "stage_iterations": max(round(part * steps / stages), 1)}
        return super().shortened(config, rate, steps, share) | schedule

    @classmethod
    def without_schedule(cls, config: R) -> R:
        return replace(config, stage_iterations=1)

    def report(self, losses: np.ndarray, iteration: int) -> dict[str, float]:
        return super().report(losses, iteration) | {"ratio": ratio(self.config, iteration)}
