"""The objectives: a batch and its TimePlan -> the loss of its share of the global batch.

The trainer knows only `Objective`; which network computes a target, what is drawn and how the
distance is weighted is decided here. Mathematics: Lee et al. 2025 (TCM), Geng et al. 2024 (ECT),
Karras et al. 2022 (EDM), Song & Dhariwal 2023 (iCT).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from tcm_fast.config import ConsistencyConfig, EdmConfig, IctConfig, PhaseConfig
from tcm_fast.data.augment import AUGMENT_DIM, augment
from tcm_fast.kernels.consistency_loss import consistency_loss
from tcm_fast.kernels.dropout import DropoutKey
from tcm_fast.kernels.noise_pair import network_input, noise_pair
from tcm_fast.kernels.precondition import denoise
from tcm_fast.networks.precision import (
    cast_weights,
    in_precision,
    is_derived,
)
from tcm_fast.networks.precond import Precond
from tcm_fast.objectives.noise_levels import IMAGE, STAGE1, STUDENT, TimePlan


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device, sorted by where its targets come from: rows of the student first,
    rows whose target is the image in the middle, rows of the stage-1 network last.

    packed: the memory of all that follows but images and labels, uint8.
    images: uint8 [n,C,H,W]; labels: one-hot fp32 [n,K] or None.
    t, r, delta: fp32 [n] (r, delta zero in pre-training; delta was formed in float64).
    weights: fp32 [3,n], what each row's loss counts for in the step's loss, in the mean off the boundary
        and in the mean on it.
    is_clean: bool [n], rows whose target is the image.
    position: int64 [n], the place of each row's target among those of the student's rows, of all images
        and of the stage-1 network's rows, put one after another.
    student_rows, stage1_rows, has_clean: how many rows from the front and from the back the two networks
        compute, and whether any target is an image: known to the host.
    key: seed, step and global sample numbers of noise and dropout.
    """

    packed: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor | None
    t: torch.Tensor
    r: torch.Tensor
    delta: torch.Tensor
    weights: torch.Tensor
    is_clean: torch.Tensor
    position: torch.Tensor
    student_rows: int
    stage1_rows: int
    has_clean: bool
    key: DropoutKey

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What a step's course depends on besides the shapes."""
        return self.student_rows, self.stage1_rows, self.has_clean

    def at(self, packed: torch.Tensor, images: torch.Tensor, labels: torch.Tensor | None) -> Batch:
        """A batch of the same kind that lies in other memory."""

        def moved(field: torch.Tensor) -> torch.Tensor:
            size = field.element_size()
            start = field.storage_offset() * size
            return packed[start : start + field.numel() * size].view(field.dtype).view(field.shape)

        seed, step = torch.as_tensor(self.key.seed), torch.as_tensor(self.key.step)
        key = DropoutKey(seed=moved(seed), step=moved(step), sample=moved(self.key.sample))
        return replace(
            self, packed=packed, images=images, labels=labels, t=moved(self.t), r=moved(self.r),
            delta=moved(self.delta), weights=moved(self.weights), is_clean=moved(self.is_clean),
            position=moved(self.position), key=key,
        )  # fmt: skip


def make_batch(
    plan: TimePlan,
    part: np.ndarray,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    seed: int,
    step: int,
    boundary_weight: float = 0.0,
    granule: int = 1,
) -> Batch:
    """The samples `part` of a plan with their images [n,C,H,W] (and labels), in one host-to-device copy.

    The numbers of rows that each network computes are rounded up to a multiple of `granule` (at most
    n): so few shapes occur that graphs and tuned convolutions are used again."""
    n, source = len(part), plan.source[part]
    assert (np.diff(source) >= 0).all()
    student, clean, stage1 = ((source == kind).sum() for kind in (STUDENT, IMAGE, STAGE1))
    front, back = (min(-(-int(count) // granule) * granule, n) for count in (student, stage1))
    row = np.arange(n)
    position = np.where(source == STAGE1, row - (n - back) + front, row)
    if clean:  # all images stand between the two networks' rows
        position += np.where(source == STUDENT, 0, np.where(source == IMAGE, front, n))
    share, boundary = plan.share[part], plan.boundary[part]
    parts = [share * np.where(boundary, boundary_weight, 1.0), share * ~boundary, share * boundary]
    levels = [np.zeros(n) if v is None else v[part] for v in (plan.t, plan.r, plan.delta)]
    packed, (t, r, delta, weights, is_clean, place, sample, keys) = _to_device(
        images.device,
        *(level.astype(np.float32) for level in levels),
        np.stack(parts).astype(np.float32),
        source == IMAGE,
        position.astype(np.int64),
        part.astype(np.int64),
        np.array([seed, step], np.int64),
    )
    key = DropoutKey(seed=keys[0], step=keys[1], layer=0, sample=sample)
    return Batch(
        packed=packed, images=images, labels=labels, t=t, r=r, delta=delta, weights=weights,
        is_clean=is_clean, position=place, student_rows=front, stage1_rows=back,
        has_clean=bool(clean), key=key,
    )  # fmt: skip


def _to_device(
    device: torch.device, *columns: np.ndarray
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Arrays of any dtypes and shapes as tensors on the device, by one copy that nothing waits for:
    the memory, uint8, and the arrays as views of it."""
    starts = np.cumsum([0] + [-(-column.nbytes // 16) * 16 for column in columns])
    is_cuda = device.type == "cuda"
    packed = torch.empty(int(starts[-1]), dtype=torch.uint8, pin_memory=is_cuda)
    for start, column in zip(starts[:-1], columns, strict=True):
        packed.numpy()[start : start + column.nbytes] = np.frombuffer(column.tobytes(), np.uint8)
    packed = packed.to(device, non_blocking=True)
    return packed, [
        packed[int(start) : int(start) + column.nbytes]
        .view(torch.from_numpy(column[:0]).dtype)
        .view(column.shape)
        for start, column in zip(starts[:-1], columns, strict=True)
    ]


def row_granule(batch_size: int, device: torch.device) -> int:
    """To what multiple each network's rows are rounded up. Rows too many cost a forward pass each, so
    2 (granule - 1) of them stay below 3 % of a step's 4 batch_size where that is 128 or more."""
    if device.type != "cuda":
        return 1  # nothing there is captured or tuned by shape
    return max(8, int(0.06 * batch_size) // 8 * 8)


def check_augmentation(config: PhaseConfig, net: Precond) -> None:
    """ValueError where a phase augments its images and the network cannot be told how."""
    if not getattr(config, "augment", 0.0):
        return
    layer = net.model.augmentation
    found = 0 if layer is None else layer.in_features
    if found != AUGMENT_DIM:
        raise ValueError(
            f"edm.augment: needs network.augment_dim {AUGMENT_DIM} (ddpmpp, ncsnpp, adm), got {found}"
        )


class Objective(nn.Module):
    """A phase's loss, with the student as its only trainable sub-module.

    `frozen` is the stage-1 network of `tcm` (train mode: its dropout shares the student's masks) or
    the teacher of `cd` (eval mode); below fp32, and where its rows are normalised, a copy of it is kept
    that is ready to compute with. It is kept out of the module tree, so that neither the optimizer nor
    DistributedDataParallel nor a state dict sees it.
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
            frozen = in_precision(frozen, dtype).requires_grad_(False).train(name == "tcm")
        self._frozen = (frozen,)
        self.copies: list[torch.Tensor | None] | None = None
        """The weights that the student computes with, where the optimizer keeps them (`make_copies`)."""
        self.folded = False
        """Whether the optimizer takes the gradients of normalised rows as they are (`cast_weights`)."""
        self._derives = is_derived(student, dtype)
        self.apart = False
        """Gradients go to the weights one by one, where memory is short (`cast_weights`)."""
        self._cast: tuple[tuple[int, bool], dict[str, torch.Tensor]] | None = None
        image_size = student.img_channels * student.img_resolution**2
        check_augmentation(config, student)
        self.c = getattr(config, "c", 0.0)
        if isinstance(config, IctConfig) and self.c == 0:
            self.c = 0.00054 * math.sqrt(image_size)

    @property
    def frozen(self) -> Precond | None:
        return self._frozen[0]

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's part of the step's loss (a scalar with a gradient), and of the mean loss off and
        on the boundary (two numbers for the log, [2])."""
        losses = self.losses(batch)
        return torch.dot(losses, batch.weights[0]), batch.weights[1:] @ losses.detach()

    def losses(self, batch: Batch) -> torch.Tensor:
        """The loss of each row, weighted for its noise level: [n]."""
        is_edm = isinstance(self.config, EdmConfig)
        return self._denoising(batch) if is_edm else self._consistency(batch)

    def _weights(self) -> dict[str, torch.Tensor] | None:
        """The weights that the student computes with, derived when an optimizer has changed its own."""
        if not self._derives:
            return None
        state = (sum(p._version for p in self.student.parameters()), torch.is_grad_enabled())
        if self._cast is None or self._cast[0] != state:
            ready = cast_weights(
                self.student, self.dtype, self.copies, folded=self.folded, apart=self.apart
            )
            self._cast = (state, ready)
        return self._cast[1]

    def forget_weights(self) -> None:
        """Let go of the derived weights, at the end of a step: they keep its autograd graph alive, and a
        step that failed must not lend them to the next."""
        self._cast = None

    def _raw(
        self,
        net: Precond,
        x: torch.Tensor,
        batch: Batch,
        t: torch.Tensor,
        rows: slice,
        weights: dict[str, torch.Tensor] | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Raw output of a network on some rows, with the rows' labels and dropout masks."""
        labels = None if batch.labels is None else batch.labels[rows]
        return net.raw(
            x[rows], t[rows], labels, augment_labels=augment_labels,
            dropout_key=batch.key.select(rows), weights=weights,
        )  # fmt: skip

    def _denoising(self, batch: Batch) -> torch.Tensor:
        """w(t) ‖D(y + t eps, t) - y‖², w = (t²+sd²)/(t sd)², summed over the image: [n]. With a learned
        log-variance u(t), e^-u times that, and u for every element."""
        net, sd = self.student, self.student.sigma_data
        images, how = batch.images, None
        p = getattr(self.config, "augment", 0.0)
        if p > 0:
            images, how = augment(images.to(torch.float32) / 127.5 - 1, batch.key, p)
        noisy = noise_pair(images, batch.t, None, batch.key, sigma_data=sd, dtype=self.dtype)
        rows, weights = slice(None), self._weights()
        output = self._raw(net, noisy.input_t, batch, batch.t, rows, weights, how)
        error = denoise(output, noisy.x_t, batch.t, sd) - noisy.y
        weight = (batch.t.square() + sd**2) / (batch.t * sd).square()
        loss = weight * error.square().sum((1, 2, 3))
        variance = net.log_variance(batch.t)
        if variance is None:
            return loss
        return loss * (-variance).exp() + variance * error[0].numel()

    def _consistency(self, batch: Batch) -> torch.Tensor:
        """w(t,r) d(D(x_t,t), sg D(x_r,r)) for each sample: [n]."""
        config, sd = self.config, self.student.sigma_data
        assert isinstance(config, ConsistencyConfig)
        pair = noise_pair(
            batch.images, batch.t, batch.r, batch.key, sigma_data=sd, dtype=self.dtype
        )
        assert pair.x_r is not None
        assert pair.input_r is not None
        x_r, input_r, clean = pair.x_r, pair.input_r, pair.y
        if self.name == "cd":
            x_r = self._euler_step(pair.x_t, pair.input_t, batch)
            input_r, clean = network_input(x_r, batch.r, sd, self.dtype), x_r
        weights = self._weights()
        output = self._raw(self.student, pair.input_t, batch, batch.t, slice(None), weights)
        with torch.no_grad():
            target = self._targets(input_r, clean, batch, weights)
        return consistency_loss(
            output, pair.x_t, batch.t, target, x_r, batch.r, delta=batch.delta, c=self.c,
            weighting=config.weighting, sigma_data=sd,
            is_clean=batch.is_clean if batch.has_clean else None,
        )  # fmt: skip

    def _targets(
        self,
        input_r: torch.Tensor,
        clean: torch.Tensor,
        batch: Batch,
        weights: dict[str, torch.Tensor] | None,
    ) -> torch.Tensor:
        """Raw outputs at (x_r, r), each by the one network that it needs; images where it needs none."""
        found, n = [], len(input_r)
        if batch.student_rows:
            detached = None if weights is None else {k: v.detach() for k, v in weights.items()}
            rows = slice(0, batch.student_rows)
            found.append(self._raw(self.student, input_r, batch, batch.r, rows, detached))
        if batch.has_clean:
            found.append(clean)
        if batch.stage1_rows:
            assert self.frozen is not None
            rows = slice(n - batch.stage1_rows, n)
            found.append(self._raw(self.frozen, input_r, batch, batch.r, rows, None))
        target = found[0] if len(found) == 1 else torch.cat(found)
        in_order = len(target) == n and not batch.has_clean
        return target if in_order else target.index_select(0, batch.position)

    @torch.no_grad()
    def _euler_step(self, x_t: torch.Tensor, input_t: torch.Tensor, batch: Batch) -> torch.Tensor:
        """One step of the teacher's probability-flow ODE: x_t + (r - t) (x_t - D(x_t,t)) / t."""
        assert self.frozen is not None
        output = self._raw(self.frozen, input_t, batch, batch.t, slice(None), None)
        denoised = denoise(output, x_t, batch.t, self.frozen.sigma_data)
        slope = -batch.delta / batch.t
        return x_t + slope.reshape(-1, 1, 1, 1) * (x_t - denoised)
