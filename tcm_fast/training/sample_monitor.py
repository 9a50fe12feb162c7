"""What a run shows of its samples while it goes: pictures, and how far they are from the images."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch

from tcm_fast.config import Config
from tcm_fast.data.dataset import ImageData
from tcm_fast.evaluation import denoising, metrics
from tcm_fast.evaluation.features import FeatureSpace
from tcm_fast.networks import Precond
from tcm_fast.runtime.distributed import Workers
from tcm_fast.sampling.image_io import save_grid
from tcm_fast.sampling.sampler import sample
from tcm_fast.training.logger import RunLog, timed
from tcm_fast.training.phase import Phase

COLLAPSED = 0.25  # share of their widest spread below which one-step samples are nearly alike
INFLATED = 1.1  # multiple of the data's spread above which they have left the data
GRID = 64  # images of a sample grid, at most: its rows are full


class SampleMonitor:
    """Draws and evaluates samples of a run's phases. Every process has one and calls it alike.

    Args:
        out: the run's folder.
        config: of the run.
        data: its images.
        space: where distances are measured, or None.
        workers: its processes; the main one draws and evaluates, all sample for it.
        log: of the run.
        spent: where the time goes, under "pictures".
    """

    def __init__(
        self,
        out: Path,
        config: Config,
        data: ImageData,
        space: FeatureSpace | None,
        workers: Workers,
        log: RunLog,
        spent: Counter[str],
    ) -> None:
        self.out, self.config, self.data, self.space = out, config, data, space
        self.workers, self.log, self.spent = workers, log, spent

    def draw(self, phase: Phase, net: Precond | None = None) -> None:
        """Samples of the first EMA as a picture; a warning where they are all alike. Training goes on
        where memory for them is short, or the disk is full."""
        if not self.workers.is_main:
            return
        with timed(self.spent, "pictures"):
            try:
                self._draw(phase, net or phase.ema_network())
            except torch.OutOfMemoryError:
                self.log.warn(
                    "grid_failed", "out of memory for a grid of samples; training goes on"
                )

    def _draw(self, phase: Phase, net: Precond) -> None:
        steps = phase.inner.sampling_steps[0]
        classes = phase.student.label_dim
        columns = classes if 0 < classes <= 16 else 8  # a column for each of few classes
        images = sample(net, GRID // columns * columns, steps=steps)
        if phase.step:
            name = f"{phase.name}-{phase.images:09d}.png"
            try:
                save_grid(images, self.out / "grids" / name, columns, overwrite=True)
            except OSError as error:
                self.log.warn("grid_failed", f"{error}; training goes on")
        if phase.inner.is_consistency:
            self.watch_spread(phase, metrics.spread(images.numpy()))
            self.watch_denoising(phase, net)

    def watch_spread(self, phase: Phase, spread: float) -> None:
        """Warn where one-step samples become nearly alike, or vary more than the data: a consistency
        function that nothing ties to the data drifts to one that only agrees with itself."""
        self.log.write("spread", phase=phase.name, images=phase.images, samples=spread)
        phase.widest_spread = max(phase.widest_spread, spread)
        data_spread = metrics.spread(self.data.images)
        if COLLAPSED * phase.widest_spread <= spread <= INFLATED * data_spread:
            return
        how = "are nearly alike" if spread < data_spread else "vary more than the data"
        self.log.warn(
            "collapse",
            f"{phase.name}: one-step samples {how} after {phase.images:,} images (standard deviation "
            f"{spread:.2g}, once {phase.widest_spread:.2g}, the data's {data_spread:.2g}): the "
            f"consistency function is collapsing; lower --{phase.name}.lr (in stage 2, or raise "
            "--tcm.boundary-weight)",
        )

    def watch_denoising(self, phase: Phase, net: Precond) -> None:
        """Log how well the first EMA denoises in one call, at the noise levels it is trained for."""
        if self.space is None:
            return
        lowest = phase.inner.lowest_time(phase.config) or 0.0
        times = [t for t in denoising.TIMES if t >= lowest]
        found = denoising.distances(net, self.data, self.space, times=times)
        distances = {f"{t:g}": distance for t, distance in found.items()}
        self.log.write(denoising.EVENT, phase=phase.name, images=phase.images, distances=distances)

    def evaluate(self, net: Precond, steps: int | None) -> metrics.Report:
        """Quality in so many steps, None for the Heun solver; all processes have to call it."""
        assert self.space is not None
        return metrics.evaluate_network(
            net, self.data, self.space, steps=steps, num=self.config.eval.num,
            names=(metrics.FRECHET,), workers=self.workers,
        )  # fmt: skip

    def frechet_distance(self, phase: Phase) -> float:
        """Of the first EMA's samples, for the choice of the best checkpoint."""
        steps = phase.inner.sampling_steps[0]
        with timed(self.spent, "pictures"):
            distance = self.evaluate(phase.ema_network(), steps).frechet
        self.log.write(
            "eval", phase=phase.name, images=phase.images, frechet={str(steps or "heun"): distance}
        )
        return distance

    def final_report(self, phase: Phase, net: Precond) -> dict[int | None, metrics.Report]:
        """Quality by number of steps at the end of a phase; nothing without a feature space."""
        if self.space is None:
            return {}
        reports = {k: self.evaluate(net, k) for k in phase.inner.sampling_steps}
        frechet = {str(k or "heun"): r.frechet for k, r in reports.items()}
        self.log.write("eval", phase=phase.name, images=phase.images, frechet=frechet)
        return reports
