"""What a phase's steps reported, read from the device now and then: NaN/Inf and spikes go to the log."""

from __future__ import annotations

from collections import Counter

import torch

from tcm_fast.runtime.distributed import Workers
from tcm_fast.training.batch_loader import BatchLoader
from tcm_fast.training.diagnosis import diagnose
from tcm_fast.training.logger import RunLog, timed
from tcm_fast.training.phase import Phase
from tcm_fast.training.step_monitor import Reading, Spike


class StepReports:
    """Reads the steps of a run's phases. Every process has one and calls it alike.

    Args:
        workers: the processes.
        log: of the run.
        spent: seconds that it takes, under "checks".
    """

    def __init__(self, workers: Workers, log: RunLog, spent: Counter[str]) -> None:
        self.workers, self.log, self.spent = workers, log, spent

    def read(self, phase: Phase, loader: BatchLoader) -> Reading:
        """The losses and gradient norms of the steps since the last reading; what is wrong is logged."""
        with timed(self.spent, "checks"):
            first = phase.step - phase.metrics.steps
            rows = phase.metrics.read(self.workers.sum)
            goes_on = phase.monitor.streak > 0
            reading = phase.monitor.update(rows, first)
            phase.skips += len(reading.bad)
            if reading.bad and not (goes_on and reading.bad[0] == first):
                self._report_skipped(phase, loader, reading)
            if reading.spikes:
                self._report_spikes(phase, reading.spikes)
        return reading

    def _report_skipped(self, phase: Phase, loader: BatchLoader, reading: Reading) -> None:
        """Log steps that were skipped, and where the first one's NaN or Inf comes from."""
        first = reading.bad[0]
        scale = phase.optimizer.loss_scale.get_scale()
        found: list[str] = []
        try:
            batches = loader.load(phase, first)
            found = [text for batch in batches if (text := diagnose(phase.inner, batch, scale))]
        except torch.OutOfMemoryError:
            found = ["out of memory when the batch was run again"]
        finally:
            phase.inner.forget_weights()
        causes = [text for texts in self.workers.gather(found[:1]) for text in texts]
        again = "finite when run again with the weights of now"
        if phase.optimizer.loss_scale.is_enabled():
            again += f" and a loss scale of {scale:g}"
        phase.cause = causes[0] if causes else again
        size = phase.config.batch_size
        self.log.warn(
            "bad_numbers",
            f"{phase.name}: skipped {len(reading.bad)} of {len(reading.rows)} steps, whose loss or "
            f"gradient was not finite, the first at images {first * size:,} to "
            f"{(first + 1) * size:,}: {phase.cause}",
            phase=phase.name,
            steps=reading.bad,
            total=phase.skips,
        )

    def _report_spikes(self, phase: Phase, spikes: list[Spike]) -> None:
        worst = max(spikes, key=lambda spike: spike.norm / spike.usual)
        self.log.warn(
            "spike",
            f"{phase.name}: the gradient's norm was {worst.norm:.3g} at image "
            f"{worst.step * phase.config.batch_size:,}, usually {worst.usual:.3g}; where such "
            f"spikes come often the phase is about to diverge: lower --{phase.name}.lr, clip with "
            f"--{phase.name}.grad-clip, or let the next phase begin from an earlier checkpoint "
            "(--init)",
            phase=phase.name,
            steps=[spike.step for spike in spikes],
            norm=worst.norm,
        )
