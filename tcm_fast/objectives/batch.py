"""A TimePlan's samples on the device, in the order in which an objective computes them."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.objectives.noise_levels import IMAGE, STAGE1, STUDENT, TimePlan


@dataclass(frozen=True)
class Batch:
    """One micro-batch on the device, sorted by where its targets come from: rows of the student first,
    rows whose target is the image in the middle, rows of the stage-1 network last.

    packed: the memory of all that follows but images and labels, uint8.
    images: uint8 [n,C,H,W]; labels: one-hot fp32 [n,K] or None.
    t, r, delta: fp32 [n] (r, delta zero in pre-training; delta was formed in float64).
    weighting: fp32 [n], the weighting function at (t, r).
    weights: fp32 [3,n], what each row's loss counts for in the step's loss, in the mean off the boundary
        and in the mean on it.
    is_clean: bool [n], rows whose target is the image.
    position: int64 [n], the place of each row's target among those of the student's rows, of all images
        and of the stage-1 network's rows, put one after another.
    student_rows, stage1_rows, has_clean: how many rows from the front and from the back the two networks
        compute, and whether any target is an image: known to the host.
    key: seed, step and global sample numbers of noise and dropout.
    bank, bank_classes: uint8 [M,C,H,W], other images that the objective asks for (`bank_size`), and their
        classes int64 [M] where the batch has labels; the same in all of a step's micro-batches, or None.
    """

    packed: torch.Tensor
    images: torch.Tensor
    labels: torch.Tensor | None
    t: torch.Tensor
    r: torch.Tensor
    delta: torch.Tensor
    weighting: torch.Tensor
    weights: torch.Tensor
    is_clean: torch.Tensor
    position: torch.Tensor
    student_rows: int
    stage1_rows: int
    has_clean: bool
    key: PhiloxKey
    bank: torch.Tensor | None = None
    bank_classes: torch.Tensor | None = None

    @property
    def kind(self) -> tuple[int, int, bool]:
        """What a step's course depends on besides the shapes."""
        return self.student_rows, self.stage1_rows, self.has_clean

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The memory that the batch lies in."""
        optional = (self.labels, self.bank, self.bank_classes)
        return [self.packed, self.images, *(v for v in optional if v is not None)]

    def at(self, *tensors: torch.Tensor) -> Batch:
        """A batch of the same kind that lies in other memory: `tensors` of another."""
        packed, images, *others = tensors
        rest = iter(others)
        labels, bank, bank_classes = (
            None if v is None else next(rest) for v in (self.labels, self.bank, self.bank_classes)
        )

        def moved(field: torch.Tensor) -> torch.Tensor:
            size = field.element_size()
            start = field.storage_offset() * size
            return packed[start : start + field.numel() * size].view(field.dtype).view(field.shape)

        seed, step = torch.as_tensor(self.key.seed), torch.as_tensor(self.key.step)
        key = PhiloxKey(seed=moved(seed), step=moved(step), sample=moved(self.key.sample))
        return replace(
            self, packed=packed, images=images, labels=labels, t=moved(self.t), r=moved(self.r),
            delta=moved(self.delta), weighting=moved(self.weighting), weights=moved(self.weights),
            is_clean=moved(self.is_clean), position=moved(self.position), key=key, bank=bank,
            bank_classes=bank_classes,
        )  # fmt: skip


def make_batch(
    plan: TimePlan,
    part: np.ndarray,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    *,
    seed: int,
    step: int,
    row_multiple: int = 1,
    bank: tuple[torch.Tensor, torch.Tensor | None] | None = None,
) -> Batch:
    """The samples `part` of a plan with their images [n,C,H,W] (and labels), in one host-to-device copy.

    The numbers of rows that each network computes are rounded up to a multiple of `row_multiple` (at most
    n): so few shapes occur that graphs and tuned convolutions are used again. bank: images of the step's
    bank and their classes, where there is one."""
    n, source = len(part), plan.source[part]
    assert (np.diff(source) >= 0).all()
    student, clean, stage1 = ((source == kind).sum() for kind in (STUDENT, IMAGE, STAGE1))
    front, back = (
        min(-(-int(count) // row_multiple) * row_multiple, n) for count in (student, stage1)
    )
    row = np.arange(n)
    position = np.where(source == STAGE1, row - (n - back) + front, row)
    if clean:  # all images stand between the two networks' rows
        position += np.where(source == STUDENT, 0, np.where(source == IMAGE, front, n))
    share, boundary = plan.share[part], plan.boundary[part]
    counts = np.where(boundary, plan.boundary_weight, 1.0)
    parts = [share * counts, share * ~boundary, share * boundary]
    levels = [
        np.zeros(n) if v is None else v[part] for v in (plan.t, plan.r, plan.delta, plan.weighting)
    ]
    packed, (t, r, delta, weighting, weights, is_clean, place, sample, keys) = _to_device(
        images.device,
        *(level.astype(np.float32) for level in levels),
        np.stack(parts).astype(np.float32),
        source == IMAGE,
        position.astype(np.int64),
        part.astype(np.int64),
        np.array([seed, step], np.int64),
    )
    key = PhiloxKey(seed=keys[0], step=keys[1], layer=0, sample=sample)
    return Batch(
        packed=packed, images=images, labels=labels, t=t, r=r, delta=delta, weighting=weighting,
        weights=weights, is_clean=is_clean, position=place, student_rows=front, stage1_rows=back,
        has_clean=bool(clean), key=key, bank=None if bank is None else bank[0],
        bank_classes=None if bank is None else bank[1],
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


def row_multiple_for(batch_size: int, device: torch.device) -> int:
    """To what multiple each network's rows are rounded up. Rows too many cost a forward pass each, so
    2 (row_multiple - 1) of them stay below 3 % of a step's 4 batch_size where that is 128 or more."""
    if device.type != "cuda":
        return 1  # nothing there is captured or tuned by shape
    return max(8, int(0.06 * batch_size) // 8 * 8)
