"""Batches of a run's images, in an order that depends on nothing but (seed, images seen)."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial

import numpy as np
import torch

from tcm_fast.data.dataset import ImageData, permutation

MOST_AHEAD = 256  # batches that are read in advance


class ImageStream:
    """An endless stream of images: one epoch after another, each in an order of its own.

    Epoch e is the permutation that sorts the output of Philox keyed by SeedSequence([seed, e]),
    which is stable over NumPy versions. Whether position i of the stream is mirrored is a hash of
    (seed, i). So what a position holds depends on nothing but the seed: not on batch size, number
    of ranks or whether the run was resumed.

    On CUDA the images are resident when they take less than a quarter of the free memory; otherwise
    each batch is gathered into pinned host memory and copied without waiting. A thread gathers
    the positions given to `prefetch` meanwhile: the pages of a mapped file may have to come from a disk.

    Args:
        data: the images.
        seed: non-negative.
        device: where batches are wanted.
        flip: mirror half of the images left to right.
    """

    def __init__(
        self, data: ImageData, *, seed: int, device: torch.device | str, flip: bool = False
    ) -> None:
        if seed < 0:
            raise ValueError(f"data: the seed must not be negative, got {seed}")
        self.data, self.flip = data, flip
        self.device = torch.device(device)
        # Two epochs are all that a batch of a large set can touch, and two its bank.
        self._permutation = lru_cache(maxsize=4)(partial(permutation, seed, len(data)))
        self._flip_key = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint64)
        images = torch.from_numpy(np.require(data.images, requirements=("C", "W")))
        self.resident = self.device.type != "cuda" or _fits(images, self.device)
        self._images = images.to(self.device) if self.resident else images
        self._ahead: dict[bytes, Future[torch.Tensor]] = {}
        self._reader = ThreadPoolExecutor(1, "images") if not self.resident else None

    def indices(self, start: int, count: int) -> np.ndarray:
        """Dataset indices int64 [count] of the images start … start+count-1 of the stream."""
        return self.index_of(np.arange(start, start + count))

    def index_of(self, positions: np.ndarray) -> np.ndarray:
        """Dataset indices int64 [n] of stream positions int64 [n], all >= 0."""
        epochs, offset = np.divmod(np.asarray(positions, np.int64), len(self.data))
        distinct, row = np.unique(epochs, return_inverse=True)
        if not len(distinct):
            return np.empty(0, np.int64)
        return np.stack([self._permutation(int(e)) for e in distinct])[row, offset]

    def flipped(self, positions: np.ndarray) -> np.ndarray:
        """Whether stream positions int64 [n] are mirrored, bool [n]."""
        # SplitMix64 (Steele, Lea, Flood 2014): its state after `position` steps, mixed.
        z = np.asarray(positions).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self._flip_key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z >> np.uint64(63)).astype(bool)

    def batch(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images at stream positions int64 [n], in the given order.

        Returns:
            images uint8 [n,C,R,R] on the device (channels_last strides) and one-hot labels fp32
            [n,K], or None where the data have none.
        """
        index = self.index_of(positions)
        labels = np.zeros_like(index) if self.data.labels is None else self.data.labels[index]
        flips = self.flipped(positions) if self.flip else np.zeros(len(index), bool)
        table = torch.from_numpy(np.stack([index, labels, flips]).astype(np.int64))
        if self.device.type == "cuda":
            table = table.pin_memory()
        table = table.to(self.device, non_blocking=True)
        images = self._gather(torch.from_numpy(index), table[0]).permute(0, 3, 1, 2)
        if self.flip:
            images = torch.where(table[2].bool()[:, None, None, None], images.flip(3), images)
        if self.data.labels is None:
            return images, None
        one_hot = torch.zeros(len(index), self.data.num_classes, device=self.device)
        return images, one_hot.scatter_(1, table[1][:, None], 1.0)

    def prefetch(self, positions: np.ndarray) -> None:
        """Read the images at these positions in the background: the next batch but one of a set that is
        not resident. Nothing for one that is."""
        if self._reader is not None:
            index = torch.from_numpy(self.index_of(positions))
            key = index.numpy().tobytes()
            if key not in self._ahead:
                self._ahead[key] = self._reader.submit(self._read, index)
            while len(self._ahead) > MOST_AHEAD:  # asked for and never fetched
                self._ahead.pop(next(iter(self._ahead)))

    def _gather(self, index: torch.Tensor, index_on_device: torch.Tensor) -> torch.Tensor:
        """uint8 [n,R,R,C] on the device."""
        if self.resident:
            return self._images.index_select(0, index_on_device)
        ready = self._ahead.pop(index.numpy().tobytes(), None)
        read = self._read(index) if ready is None else ready.result()
        return read.to(self.device, non_blocking=True)

    def _read(self, index: torch.Tensor) -> torch.Tensor:
        """uint8 [n,R,R,C] on the host, in pinned memory for a GPU."""
        shape, pinned = (len(index), *self._images.shape[1:]), self.device.type == "cuda"
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        return torch.index_select(self._images, 0, index, out=rows)


def _fits(images: torch.Tensor, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes < free / 4
