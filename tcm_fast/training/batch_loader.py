"""The micro-batches of a phase's steps: noise levels planned, images fetched, on their way to the device."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch

from tcm_fast.config import Config
from tcm_fast.data.dataset import ImageData
from tcm_fast.data.stream import ImageStream
from tcm_fast.objectives.batch import Batch, make_batch, row_multiple_for
from tcm_fast.objectives.noise_levels import TimePlan
from tcm_fast.runtime.distributed import Workers
from tcm_fast.training.logger import timed
from tcm_fast.training.micro_batches import MicroBatches
from tcm_fast.training.phase import Phase

BANK = 1 << 48  # images of the stream before the first bank


class BatchLoader:
    """What one process computes in each step, a function of (seed, images seen) alone.

    Args:
        config: of the run.
        data: its images.
        workers: its processes.
        micro: how many passes a batch is cut into.
        seed: of the phase, which decides the order of the images.
        spent: seconds that fetching images takes, under "data".
    """

    def __init__(
        self,
        config: Config,
        data: ImageData,
        workers: Workers,
        micro: MicroBatches,
        seed: int,
        spent: Counter[str],
    ) -> None:
        self.config, self.workers, self.micro, self.spent = config, workers, micro, spent
        self.stream = ImageStream(data, seed=seed, device=workers.device, flip=config.data.flip)
        self._ready: tuple[tuple[str, int, int], list[Batch]] | None = None

    def batches(self, phase: Phase) -> list[Batch]:
        """This process's micro-batches of the phase's next step. Asked for while the device is busy with the
        step before, they are ready when it begins."""
        key = phase.name, phase.step, self.micro.count
        if self._ready is None or self._ready[0] != key:
            self._ready = key, self.load(phase, phase.step)
        return self._ready[1]

    def load(self, phase: Phase, step: int) -> list[Batch]:
        """This process's micro-batches of any step."""
        size = phase.config.batch_size
        seen, iteration = step * size, phase.first_iteration + step
        plan, parts = self.plan(phase, step)
        batches, bank = [], self._bank(phase, step)
        for part in parts:
            with timed(self.spent, "data"):
                images, labels = self.stream.batch(seen + plan.images(part))
            if not self.config.network.class_conditional:
                labels = None
            batch = make_batch(
                plan, part, images, labels, seed=phase.seed, step=iteration,
                row_multiple=row_multiple_for(len(part), self.workers.device), bank=bank,
            )  # fmt: skip
            batches.append(batch)
        if not self.stream.resident and step + 1 < phase.steps:
            plan, parts = self.plan(phase, step + 1)
            for part in parts:
                self.stream.prefetch(seen + size + plan.images(part))
            if len(ahead := self._bank_positions(phase, step + 1)):
                self.stream.prefetch(ahead)
        return batches

    def _bank_positions(self, phase: Phase, step: int) -> np.ndarray:
        """Where in the stream the images of a step's bank lie: parts of whole epochs, far behind all that the
        run trains on. So no image is in a bank twice, and banks have an order and mirrored images of
        their own."""
        count = len(self.stream.data)
        size = min(phase.inner.bank_size(phase.config), count)
        if not size:
            return np.empty(0, np.int64)
        epoch, part = divmod(step, count // size)
        return (BANK // count + epoch) * count + part * size + np.arange(size)

    def _bank(self, phase: Phase, step: int) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """The images of a step's bank and their classes, the same for every process and micro-batch; None
        where the objective asks for none."""
        positions = self._bank_positions(phase, step)
        if not len(positions):
            return None
        with timed(self.spent, "data"):
            images, labels = self.stream.batch(positions)
        if labels is None or not self.config.network.class_conditional:
            return images, None
        return images, labels.argmax(1)

    def plan(self, phase: Phase, step: int) -> tuple[TimePlan, list[np.ndarray]]:
        """The noise levels of a step, and the samples of each of this process's micro-batches."""
        plan = phase.inner.plan(
            phase.config,
            seed=phase.seed,
            images_seen=step * phase.config.batch_size,
            iteration=phase.first_iteration + step,
            iterations=phase.first_iteration + phase.steps,
            sigma_data=phase.student.sigma_data,
        )
        micro = self.micro.of(phase.config.batch_size)
        parts = plan.parts(self.workers.world * micro)
        return plan, parts[self.workers.rank * micro :][:micro]
