"""The loop: phases one after another, each a plain sequence of steps, from images to checkpoints.

    plan times -> fetch images -> loss of each micro-batch -> optimizer and EMA

A step depends on (configuration, seed, images seen) and on the state that a checkpoint holds, on
nothing else; so a resumed run repeats an unbroken one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from tcm_fast.checkpoint import run_folder
from tcm_fast.checkpoint.format import load_network
from tcm_fast.config import Config, changes, require, to_dict
from tcm_fast.data.dataset import class_mapping, load_images
from tcm_fast.evaluation import metrics
from tcm_fast.evaluation.features import feature_space
from tcm_fast.kernels._backend import extension_gap
from tcm_fast.networks import Precond
from tcm_fast.planning.cards import this_device, with_memory
from tcm_fast.planning.memory_estimate import ImageShape
from tcm_fast.planning.memory_planner import choose_optimizations
from tcm_fast.runtime import distributed
from tcm_fast.runtime.arithmetic import training_settings
from tcm_fast.training.batch_loader import BatchLoader
from tcm_fast.training.checkpoint_manager import CheckpointManager
from tcm_fast.training.logger import timed
from tcm_fast.training.micro_batches import MicroBatches
from tcm_fast.training.phase import Phase, PhaseResult, TrainingError
from tcm_fast.training.phase_builder import PhaseBuilder
from tcm_fast.training.roll_back import is_lost, roll_back
from tcm_fast.training.sample_monitor import SampleMonitor
from tcm_fast.training.signals import StopRequest
from tcm_fast.training.step_monitor import summarise
from tcm_fast.training.step_reports import StepReports
from tcm_fast.training.step_runner import StepRunner

TALK_EVERY = 10  # steps after which several processes ask one another whether to stop or save
COMPARED_STEPS = 3  # first steps after which the ranks' weights are compared


class Interrupted(Exception):
    """The run was stopped by a signal or its time limit, after a checkpoint."""


@dataclass
class Window:
    """The steps since the last line of the log.

    Attributes:
        first: the phase's steps before it.
        begun: when it began; moved on by what is not training (samples, checkpoints).
        fetched: seconds in fetching images before it.
        rows: losses and gradient norms of its steps, as far as they have been read.
    """

    first: int
    fetched: float
    begun: float
    rows: list[np.ndarray] = field(default_factory=list)


class Trainer:
    """Trains the phases of a configuration and leaves checkpoints, grids and a log in a folder.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        init: a network file, run or hf:user/repo that the first phase starts from, instead of the
            phase before.
        resume: continue the newest sound checkpoint in `out`, if there is one.

    Attributes:
        spent: seconds that the host spent in "data", "checks", "logging", "saving" and "pictures" so far.

    Raises:
        ValueError, FileNotFoundError: what the user has to change.
        FileExistsError: `out` holds another run, or one that is still going on.
    """

    def __init__(
        self,
        config: Config,
        out: str | Path,
        *,
        init: str | Path | None = None,
        resume: bool | str | Path = False,
    ) -> None:
        self.config, self.out = config, Path(out)
        self.workers = distributed.join(config.device)
        self.device = self.workers.device
        self.stop = StopRequest(config.stop_after, has_peers=self.workers.world > 1)
        data = config.data
        with warnings.catch_warnings():
            if not self.workers.is_main:  # one rank says it
                warnings.simplefilter("ignore")
            self.data = load_images(data.source, **data.reading())
        if config.memory == "auto":
            self.config = config = self._with_optimizations(config)
        self.micro = MicroBatches(self.out, config.micro_batches, self.workers)
        self.builder = PhaseBuilder(config, self.workers, self.data, self.micro)
        opened = self.workers.on_main(lambda: run_folder.open_run(self.out, resume))
        self.resumed = opened.path
        self.init = load_network(init) if init else None
        features = config.eval.features
        self.space = feature_space(features, device=self.device) if features else None
        if self.space is not None:
            metrics.check_enough(self.data)

        self.checkpoints = CheckpointManager(
            self.out,
            config,
            self.workers,
            self.micro,
            self.data.class_names,
            measure=lambda phase: self.samples.frechet_distance(phase),
            resumes=self.resumed is not None,
        )
        self.log, self.spent = self.checkpoints.log, self.checkpoints.spent
        self.runner = StepRunner(config, self.workers, self.micro, self.log)
        self.reports = StepReports(self.workers, self.log, self.spent)
        self.loader: BatchLoader | None = None
        self.samples = SampleMonitor(
            self.out, config, self.data, self.space, self.workers, self.log, self.spent
        )
        if config.network.class_conditional:
            names = self.data.class_names
            self.log.say(f"{len(names)} classes: {class_mapping(names)}")
        for found in opened.passed_over:
            self.log.warn("passed_over", f"resume: passed over {found.path.name}: {found.reason}")
        if gap := extension_gap(self.device):
            self.log.say(
                f"optimizer: torch's, in many passes over the weights instead of one ({gap})"
            )
        if self.micro.count > config.micro_batches:
            self.log.say(f"memory: {self.micro.count} micro-batches, as this run has found out")

    @contextmanager
    def settings(self) -> Iterator[None]:
        """torch's, for the whole program, while this trainer works; cuda:1 becomes the current device."""
        config, on_cuda = self.config, self.device.type == "cuda"
        with (
            training_settings(config.precision, deterministic=config.deterministic),
            torch.cuda.device(self.device) if on_cuda else nullcontext(),
        ):
            yield

    @property
    def image_shape(self) -> ImageShape:
        """Of the training set."""
        data = self.data
        return ImageShape(data.resolution, data.channels, data.num_classes, len(data))

    def _with_optimizations(self, config: Config) -> Config:
        """`memory = "auto"`: memory optimizations with which the run fits, on every rank the same."""
        card = this_device(self.device, measure=False)
        if config.memory_limit:
            card = with_memory(card, config.memory_limit)
        world = self.workers.world
        chosen = self.workers.on_main(
            lambda: choose_optimizations(config, self.image_shape, card, gpus=world)
        )
        return replace(chosen, memory="manual")

    # ---- step by step ---------------------------------------------------------------------------

    def begin(self, name: str, previous: Precond | None = None) -> Phase:
        """A phase from its beginning, for `step`: both inside `with trainer.settings()`.

        Args:
            name: of a phase of the configuration.
            previous: the network that it starts from: `ema_network()` of the phase before, a loaded file.

        Raises:
            ValueError: the phase needs another network than this.
        """
        return self._ready(self.builder.begin(name, previous))

    def step(self, phase: Phase) -> None:
        """Take the phase's next optimizer step, and fetch the next one's images meanwhile. Nothing waits for
        the device: the losses are in `phase.metrics` until they are read.

        Raises:
            ValueError: the phase is at its end, or `phase.metrics` is full: read it.
            TrainingError: out of memory, where nothing helps.
        """
        assert self.loader is not None
        require(phase.step < phase.steps, f"step: {phase.name} has {phase.steps} steps, all taken")
        require(
            not phase.metrics.is_full,
            f"step: phase.metrics must be read every {phase.metrics.size} steps, got "
            f"{phase.metrics.steps} unread",
        )
        self.runner.run(phase, self.loader)
        phase.step += 1
        if phase.step < phase.steps:
            self.loader.batches(phase)

    def _ready(self, phase: Phase) -> Phase:
        """The phase, with its images."""
        self.loader = BatchLoader(
            self.config, self.data, self.workers, self.micro, phase.seed, self.spent
        )
        return phase

    # ---- the run --------------------------------------------------------------------------------

    def run(self) -> list[PhaseResult]:
        """Train every phase that is not done yet.

        Raises:
            Interrupted: a signal came, or the time was up; the run has been saved.
            TrainingError: losses or gradients stay NaN or Inf, or a single image runs out of memory.
            OSError: the run cannot be saved.
        """
        previous, names = self.init, list(self.config.phases)
        results = []
        try:
            with self.stop, self.settings():
                restored = None if self.resumed is None else self._resume(self.resumed)
                if self.resumed is not None:
                    self.workers.on_main(self.checkpoints.save_config)
                if restored is not None and restored.name in names:
                    names = names[names.index(restored.name) :]
                elif restored is not None:  # another phase: these begin with what it has learnt
                    previous, restored = self._handed_on(restored, previous), None
                for name in names:
                    phase = self._train(restored or self.begin(name, previous), previous)
                    restored = None
                    results.append(self._finish(phase))
                    previous = phase.ema_network().to(
                        "cpu"
                    )  # kept for a roll back to a phase's start
                    del phase  # the next one needs the memory
        finally:
            self.checkpoints.close()
        return results

    def _train(self, phase: Phase, previous: Precond | None) -> Phase:
        """One phase, from where it is to its end; `previous` is what it began with."""
        config, log = self.config, self.log
        assert self.loader is not None
        self.checkpoints.start_phase(phase)
        self.samples.draw(phase)
        if note := phase.inner.note(phase.config):
            log.say(f"{phase.name}: {note}")
        log.start_phase(phase.name, phase.steps, phase.step)
        window, saved = self._window(phase), time.monotonic()
        begun, owes_save, stopped = phase.step, False, False
        has_news = phase.steps == 0  # since the last save
        self.runner.warm_up(phase, self.loader)
        while phase.step < phase.steps and not stopped:
            self.step(phase)
            if phase.step - begun <= COMPARED_STEPS:
                self._compare_ranks(phase)
            self.stop.step_ended()
            is_late = 0 < config.save_minutes * 60 < time.monotonic() - saved
            stopped, is_late = self._agreed(phase.step, bool(self.stop.reason), is_late)
            is_last = phase.step == phase.steps or stopped
            owes_save |= is_late or phase.step % config.save_every == 0
            logs = phase.step % config.log_every == 0 or is_last
            may_save = owes_save and (phase.monitor.streak == 0 or logs)
            if logs or may_save or phase.metrics.is_full:
                window.rows.append(self.reports.read(phase, self.loader).rows)
                has_news = True
                if is_lost(phase, config.guard, is_last=is_last and not stopped):
                    self.runner.free(phase)
                    phase = roll_back(phase, previous, self.builder, self.checkpoints)
                    window = self._window(phase)
                    begun, owes_save, stopped = phase.step, False, False
                    continue
            if logs:
                self._log_step(phase, window)
                window = self._window(phase)
            log.step(phase.step)
            pause = time.monotonic()
            if phase.step % config.grid_every == 0 and not is_last:
                self.samples.draw(phase)
            if may_save and phase.monitor.streak == 0 and not is_last:
                self._compare_ranks(phase)
                self.checkpoints.save(phase)
                saved, owes_save = time.monotonic(), False
            self.checkpoints.check_last_save()
            every = config.snapshot_every
            if every and (phase.step % every == 0 or phase.step == phase.steps):
                self.checkpoints.snapshot(phase)
            window.begun += time.monotonic() - pause
        log.end_phase()
        if has_news:
            self._compare_ranks(phase)
            self.checkpoints.save(phase, is_last=True)
        log.write("spent", phase=phase.name, training=phase.seconds, **self.spent)
        if stopped:
            raise Interrupted(
                f"{phase.name}: stopped after {phase.images:,} images, saved "
                f"({self.stop.reason or 'another process was asked to'})"
            )
        return phase

    def _resume(self, path: Path) -> Phase:
        """The phase as its checkpoint left it."""
        phase = self.builder.restore(path)
        self.log.say(f"resumed {phase.name} after {phase.images:,} images from {path}")
        if changed := changes(run_folder.read_state(path)["config"], to_dict(self.config)):
            self.log.say(f"settings that differ from those before: {', '.join(changed)}")
            self.log.write("settings", changed=changed)
        return self._ready(phase)

    def _handed_on(self, phase: Phase, init: Precond | None) -> Precond:
        """The network that a phase in the run's folder hands to a phase trained singly."""
        if phase.step < phase.steps and init is None:
            raise ValueError(
                f"phases: {phase.name} in {self.out} has {phase.step} of {phase.steps} steps, finish it "
                f"first (--phase {phase.name} --resume auto) or give --init FILE"
            )
        return init or phase.ema_network().to("cpu")

    def _finish(self, phase: Phase) -> PhaseResult:
        """The grid and the quality at the end of a phase."""
        net = phase.ema_network()
        self.samples.draw(phase, net)
        result = PhaseResult(
            phase.name, phase.images, phase.seconds, self.samples.final_report(phase, net)
        )
        self.workers.barrier()
        return result

    # ---- the log and the other processes --------------------------------------------------------

    def _window(self, phase: Phase) -> Window:
        return Window(phase.step, self.spent["data"], time.monotonic())

    def _log_step(self, phase: Phase, window: Window) -> None:
        """Log the mean losses of a window's steps and what goes with them."""
        seconds = time.monotonic() - window.begun
        with timed(self.spent, "logging"):
            means = summarise(np.concatenate(window.rows))
            values = phase.inner.report(means.losses, phase.iteration - 1)
            values["lr"] = float(phase.optimizer.param_groups[0]["lr"])
            values |= {"grad_norm": means.norm, "grad_norm_max": means.largest}
            images = (phase.step - window.first) * phase.config.batch_size
            values["images_per_second"] = images / max(seconds, 1e-9)
            fetched = self.spent["data"] - window.fetched
            values["data_share"] = min(fetched / max(seconds, 1e-9), 1.0)
            if means.skipped:
                values |= {"skipped": means.skipped, "skipped_total": phase.skips}
            self.log.metrics(phase.name, phase.images, values)
        phase.seconds += seconds

    def _agreed(self, step: int, *flags: bool) -> tuple[bool, ...]:
        """Flags that any process has set; several processes ask one another every few steps."""
        if self.workers.world == 1:
            return flags
        return self.workers.any(*flags) if step % TALK_EVERY == 0 else (False,) * len(flags)

    def _compare_ranks(self, phase: Phase) -> None:
        """TrainingError where the processes' weights, equal at first, have drifted apart."""
        named = [(n, p) for n, p in phase.student.named_parameters() if p.numel()]
        index = self.workers.first_difference(p for _, p in named)
        if index is not None:
            raise TrainingError(
                f"{phase.name}: the ranks' weights differ after step {phase.step:,}, first in "
                f"{named[index][0]}: gradients are not exchanged, or a device computes wrongly; nothing was "
                "saved since. Go on from the last checkpoint with --resume auto, or with one process"
            )

    def measure(self, name: str, *, seconds: float = 3.0) -> float:
        """Images per second at the end of a phase's schedule, by steps on weights that are thrown away."""
        with self.settings():
            phase = self.begin(name, self.builder.build(name))
            assert self.loader is not None
            phase.step = max(phase.steps - 1, 0)
            self.runner.warm_up(phase, self.loader)
            steps, begun = -3, time.monotonic()  # three to warm up, or to capture a graph
            while steps < 1 or time.monotonic() - begun < seconds:
                if steps == 0:
                    begun = time.monotonic()
                self.runner.run(phase, self.loader)
                self.loader.load(phase, phase.step)  # what the host does in a step
                phase.metrics.read(self.workers.sum)
                steps += 1
            return steps * phase.config.batch_size / (time.monotonic() - begun)
