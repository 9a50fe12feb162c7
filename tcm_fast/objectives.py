"""The objectives: a batch and its TimePlan -> the loss of its share of the global batch.

The trainer knows only `Objective`; which network computes a target, what is drawn and how the
distance is weighted is decided here. Mathematics: Lee et al. 2025 (TCM), Geng et al. 2024 (ECT),
Karras et al. 2022 (EDM), Song & Dhariwal 2023 (iCT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from tcm_fast.config import ConsistencyConfig, EdmConfig, IctConfig, PhaseConfig
from tcm_fast.kernels.consistency_loss import consistency_loss
from tcm_fast.kernels.dropout import DropoutKey
from tcm_fast.kernels.noise_pair import network_input, noise_pair
from tcm_fast.kernels.precondition import denoise
from tcm_fast.networks.precond import Precond
from tcm_fast.times import IMAGE, STAGE1, STUDENT, TimePlan


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device, sorted by where its targets come from.

    images: uint8 [n,C,H,W]; labels: one-hot fp32 [n,K] or None; t, r, delta, share: float64 [n]
    (r, delta None in pre-training); boundary: bool [n]; counts: numbers of rows whose target is
    computed by the student, by the stage-1 network, and given by the image, known to the host; key:
    seed, step and global sample numbers of noise and dropout.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    t: torch.Tensor
    r: torch.Tensor | None
    delta: torch.Tensor | None
    boundary: torch.Tensor
    share: torch.Tensor
    counts: tuple[int, int, int]
    key: DropoutKey


def make_batch(
    plan: TimePlan,
    part: np.ndarray,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    seed: int,
    step: int,
) -> Batch:
    """The samples `part` of a plan with their images [n,C,H,W] (and labels), in one host-to-device copy."""
    device = images.device
    zeros = np.zeros_like(plan.t)
    columns = [
        plan.t,
        zeros if plan.r is None else plan.r,
        zeros if plan.delta is None else plan.delta,
    ]
    columns += [plan.boundary, plan.share, np.arange(len(plan.t))]
    table = torch.from_numpy(np.stack([np.asarray(c, np.float64)[part] for c in columns]))
    if device.type == "cuda":
        table = table.pin_memory()
    t, r, delta, boundary, share, sample = table.to(device, non_blocking=True)
    source = plan.source[part]
    assert (np.diff(source) >= 0).all()
    return Batch(
        images=images,
        labels=labels,
        t=t,
        r=None if plan.r is None else r,
        delta=None if plan.delta is None else delta,
        boundary=boundary > 0,
        share=share,
        counts=tuple(int((source == kind).sum()) for kind in (STUDENT, STAGE1, IMAGE)),  # type: ignore[arg-type]
        key=DropoutKey(seed=seed, step=step, layer=0, sample=sample.to(torch.int64)),
    )


class Objective(nn.Module):
    """A phase's loss, with the student as its only trainable sub-module.

    `frozen` is the stage-1 network of `tcm` (train mode: its dropout shares the student's masks) or
    the teacher of `cd` (eval mode). It is kept out of the module tree, so that neither the optimizer
    nor DistributedDataParallel nor a state dict sees it.
    """

    def __init__(
        self,
        name: str,
        config: PhaseConfig,
        student: Precond,
        frozen: Precond | None = None,
        *,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.name, self.config, self.dtype = name, config, dtype
        self.student = student
        needs_frozen = name in ("tcm", "cd")
        if needs_frozen != (frozen is not None):
            raise ValueError(
                f"objective: {name} {'needs a' if needs_frozen else 'has no'} frozen network"
            )
        if frozen is not None:
            frozen.requires_grad_(False).train(name == "tcm")
        self._frozen = (frozen,)
        image_size = student.img_channels * student.img_resolution**2
        self.c = getattr(config, "c", 0.0)
        if isinstance(config, IctConfig) and self.c == 0:
            self.c = 0.00054 * math.sqrt(image_size)

    @property
    def frozen(self) -> Precond | None:
        return self._frozen[0]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's part of the step's loss (a scalar with a gradient), and of the mean loss off and
        on the boundary (two numbers for the log, [2])."""
        is_edm = isinstance(self.config, EdmConfig)
        losses = self._denoising(batch) if is_edm else self._consistency(batch)
        shares = losses * batch.share.to(losses.dtype)
        consistency, boundary = (shares * ~batch.boundary).sum(), (shares * batch.boundary).sum()
        loss = consistency + getattr(self.config, "boundary_weight", 0.0) * boundary
        return loss, torch.stack([consistency, boundary]).detach()

    def _raw(self, net: Precond, x: torch.Tensor, batch: Batch, t: torch.Tensor, rows: slice):
        """Raw output of a network on some rows, with the rows' labels and dropout masks."""
        labels = None if batch.labels is None else batch.labels[rows]
        key = batch.key.select(rows)
        device = x.device.type
        with torch.autocast(device, dtype=self.dtype, enabled=self.dtype != torch.float32):
            return net.raw(x[rows], t[rows].to(torch.float32), labels, dropout_key=key)

    def _denoising(self, batch: Batch) -> torch.Tensor:
        """w(t) ‖D(y + t eps, t) - y‖², w = (t²+sd²)/(t sd)², summed over the image: [n]."""
        net, sd = self.student, self.student.sigma_data
        noisy = noise_pair(batch.images, batch.t, None, batch.key, sigma_data=sd)
        output = self._raw(net, noisy.input_t, batch, batch.t, slice(None))
        error = denoise(output, noisy.x_t, batch.t, sd) - noisy.y
        weight = (batch.t.square() + sd**2) / (batch.t * sd).square()
        return weight.to(error.dtype) * error.square().sum((1, 2, 3))

    def _consistency(self, batch: Batch) -> torch.Tensor:
        """w(t,r) d(D(x_t,t), sg D(x_r,r)) for each sample: [n]."""
        config, sd = self.config, self.student.sigma_data
        assert isinstance(config, ConsistencyConfig)
        assert batch.r is not None
        assert batch.delta is not None
        pair = noise_pair(batch.images, batch.t, batch.r, batch.key, sigma_data=sd)
        x_r, input_r, clean = pair.x_r, pair.input_r, pair.y
        if self.name == "cd":
            x_r = self._euler_step(pair.x_t, pair.input_t, batch)
            input_r, clean = network_input(x_r, batch.r, sd, torch.float32), x_r
        output = self._raw(self.student, pair.input_t, batch, batch.t, slice(None))

        # Every target needs exactly one network, and those at r = r_min need none.
        first, second = batch.counts[0], batch.counts[0] + batch.counts[1]
        rows = ((self.student, slice(0, first)), (self.frozen, slice(first, second)))
        with torch.no_grad():
            targets = [
                self._raw(net, input_r, batch, batch.r, part)
                for net, part in rows
                if net is not None and part.stop > part.start
            ]
            target = torch.cat([*targets, clean[second:]])
        is_clean = torch.zeros_like(batch.boundary)
        is_clean[second:] = True
        return consistency_loss(
            output, pair.x_t, batch.t, target, x_r, batch.r, delta=batch.delta, c=self.c,
            weighting=config.weighting, sigma_data=sd, is_clean=is_clean,
        )  # fmt: skip

    @torch.no_grad()
    def _euler_step(self, x_t: torch.Tensor, input_t: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One step of the teacher's probability-flow ODE: x_t + (r - t) (x_t - D(x_t,t)) / t."""
        assert self.frozen is not None
        assert batch.delta is not None
        output = self._raw(self.frozen, input_t, batch, batch.t, slice(None))
        denoised = denoise(output, x_t, batch.t, self.frozen.sigma_data)
        slope = -batch.delta / batch.t
        return x_t + slope.to(x_t.dtype).reshape(-1, 1, 1, 1) * (x_t - denoised)
