"""The loop: phases one after another, each a plain sequence of steps, from images to checkpoints.

    plan times -> fetch images -> loss of each micro-batch -> optimizer -> averages

A step depends on (configuration, seed, images seen) and on the state that a checkpoint holds, on
nothing else; so a resumed run repeats an unbroken one.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch.nn.parallel import DistributedDataParallel

from tcm_fast.checkpoint import run_folder
from tcm_fast.checkpoint.format import load_network
from tcm_fast.config import Config, RatioConfig, changes, to_dict
from tcm_fast.data.dataset import class_mapping, load_images
from tcm_fast.data.stream import ImageStream
from tcm_fast.evaluation import metrics
from tcm_fast.evaluation.features import feature_space
from tcm_fast.kernels._backend import extension_gap
from tcm_fast.kernels._triton import compiling_together, runs_triton
from tcm_fast.networks import Precond, force_rows
from tcm_fast.objectives.noise_levels import TimePlan, plan_times, ratio
from tcm_fast.objectives.objective import Batch, make_batch, row_granule
from tcm_fast.optim.fused import FusedOptimizer, learning_rate, set_rate
from tcm_fast.planning.cards import this_device, with_memory
from tcm_fast.planning.memory_estimate import ImageShape
from tcm_fast.planning.memory_planner import choose_levers
from tcm_fast.runtime import distributed
from tcm_fast.runtime.arithmetic import training_settings
from tcm_fast.runtime.cuda_graphs import CaptureError
from tcm_fast.training.checkpoint_manager import Keeper
from tcm_fast.training.diagnosis import diagnose
from tcm_fast.training.logger import timed
from tcm_fast.training.micro_batches import MicroBatches
from tcm_fast.training.phase import Phase, PhaseResult, TrainingError
from tcm_fast.training.phase_builder import Assembly
from tcm_fast.training.sample_monitor import Gallery
from tcm_fast.training.signals import StopRequest
from tcm_fast.training.step_monitor import Reading, poison, summarise

TALK_EVERY = 10  # steps after which several processes ask one another whether to stop or save
COMPARED_STEPS = 3  # first steps after which the ranks' weights are compared
LAST_STREAK = 5  # bad steps in a row at which a phase does not end well
LOWERED = 0.5  # by which a roll-back multiplies the learning rate or the loss scale


class Interrupted(Exception):
    """The run was stopped by a signal or its time limit, after a checkpoint."""


class Trainer:
    """Trains the phases of a configuration and leaves checkpoints, grids and a log in a folder.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        init: a network file (or run) that the first phase starts from, instead of the phase before.
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
        self.stop = StopRequest(config.max_hours, has_peers=self.workers.world > 1)
        data = config.data
        with warnings.catch_warnings():
            if not self.workers.is_main:  # one rank says it
                warnings.simplefilter("ignore")
            self.data = load_images(data.source, **data.reading())
        if config.memory == "auto":
            self.config = config = self._with_levers(config)
        self.micro = MicroBatches(self.out, config.micro_batches, self.workers)
        self.assembly = Assembly(config, self.workers, self.data, self.micro)
        opened = self.workers.on_main(lambda: run_folder.open_run(self.out, resume))
        self.resumed = opened.path
        self.init = load_network(init, device=self.device) if init else None
        features = config.eval.features
        self.space = feature_space(features, device=self.device) if features else None
        if self.space is not None:
            metrics.check_enough(self.data)

        self.keeper = Keeper(
            self.out,
            config,
            self.workers,
            self.data.class_names,
            measure=lambda phase: self.gallery.frechet_distance(phase),
        )
        self.log, self.spent = self.keeper.log, self.keeper.spent
        self._fetched: float = 0.0  # seconds in "data" when a line was logged last
        self.gallery = Gallery(
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
    def _settings(self) -> Iterator[None]:
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

    def _with_levers(self, config: Config) -> Config:
        """`memory = "auto"`: the levers with which the run fits the device, for every rank the same."""
        card = this_device(self.device, measure=False)
        if config.memory_limit:
            card = with_memory(card, config.memory_limit)
        world = self.workers.world
        chosen = self.workers.on_main(
            lambda: choose_levers(config, self.image_shape, card, gpus=world)
        )
        return replace(chosen, memory="given")

    def measure(self, name: str, *, seconds: float = 3.0) -> float:
        """Images per second at the end of a phase's schedule, by steps on weights that are thrown away."""
        with self._settings():
            return self._measure(name, seconds)

    def _measure(self, name: str, seconds: float) -> float:
        phase = self.assembly.begin(name, self.assembly.build(self.config.phase(name)))
        phase.step = max(phase.steps - 1, 0)
        stream = ImageStream(self.data, seed=0, device=self.device, flip=self.config.data.flip)
        batches = self._prepare(phase, stream)
        self._compile_kernels(phase, batches)
        steps, begun = -3, time.monotonic()  # three to warm up, or to capture a graph
        while steps < 1 or time.monotonic() - begun < seconds:
            if steps == 0:
                begun = time.monotonic()
            self._step_within_memory(phase, stream, batches, row=0)
            batches = self._prepare(phase, stream)
            phase.gauge.read(1, self.workers.sum)
            steps += 1
        return steps * phase.config.batch_size / (time.monotonic() - begun)

    # ---- the run --------------------------------------------------------------------------------

    def run(self) -> list[PhaseResult]:
        """Train every phase that is not done yet.

        Raises:
            Interrupted: a signal came, or the time was up; the run has been saved.
            TrainingError: the numbers went bad, or memory does not suffice.
            OSError: the run cannot be saved.
        """
        previous, names = self.init, list(self.config.phases)
        results = []
        try:
            with self.stop, self._settings():
                restored = None if self.resumed is None else self._resume(self.resumed)
                if restored is not None and restored.name in names:
                    names = names[names.index(restored.name) :]
                elif restored is not None:  # another phase: these begin with what it has learnt
                    previous, restored = self._handed_on(restored, previous), None
                for name in names:
                    phase = self._train(restored or self.assembly.begin(name, previous), previous)
                    restored = None
                    results.append(self._finish(phase))
                    previous = phase.average()
                    del phase  # the next one needs the memory
        finally:
            self.keeper.close()
        return results

    def _handed_on(self, phase: Phase, init: Precond | None) -> Precond:
        """The network that a phase in the run's folder hands to a phase trained singly."""
        if phase.step < phase.steps and init is None:
            raise ValueError(
                f"phases: {phase.name} in {self.out} has {phase.step} of {phase.steps} steps, finish it "
                f"first (--phase {phase.name} --resume auto) or give --init FILE"
            )
        return init or phase.average()

    def _train(self, phase: Phase, previous: Precond | None) -> Phase:
        """One phase, from where it stands to its end; `previous` is what it began with."""
        config, log = self.config, self.log
        stream = ImageStream(self.data, seed=phase.seed, device=self.device, flip=config.data.flip)
        self.keeper.start_phase(phase)
        self.gallery.draw(phase)
        log.start_phase(phase.name, phase.steps, phase.step)
        begun = read = logged = phase.step
        rows: list[np.ndarray] = []  # the steps' numbers since the last line of the log
        is_new = phase.steps == 0
        mark = saved = time.monotonic()
        stopped = owes_save = False
        batches = self._prepare(phase, stream) if phase.step < phase.steps else []
        self._compile_kernels(phase, batches)
        batches = self._fit_in_memory(phase, stream, batches)
        while phase.step < phase.steps and not stopped:
            self._step_within_memory(phase, stream, batches, row=phase.step - read)
            phase.step += 1
            if phase.step - begun <= COMPARED_STEPS:
                self._compare_ranks(phase)
            self.stop.step_ended()
            if phase.step < phase.steps:  # while the device is busy
                batches = self._prepare(phase, stream)
            is_late = 0 < config.save_minutes * 60 < time.monotonic() - saved
            stopped, is_late = self._agreed(phase.step, bool(self.stop.reason), is_late)
            is_last = phase.step == phase.steps or stopped
            owes_save |= is_late or phase.step % config.save_every == 0
            logs = phase.step % config.log_every == 0 or is_last
            may_save = owes_save and (phase.watch.streak == 0 or logs)
            if logs or may_save or phase.step - read == phase.gauge.size:
                reading = self._read(phase, stream, read)
                rows.append(reading.rows)
                read, is_new = phase.step, True
                if self._is_lost(phase, reading, stopped):
                    phase = self._roll_back(phase, previous)
                    begun = read = logged = phase.step
                    rows, mark = [], time.monotonic()
                    stopped = owes_save = False
                    batches = self._prepare(phase, stream)
                    continue
            if logs:
                elapsed = time.monotonic() - mark
                self._log_step(phase, np.concatenate(rows), logged, elapsed)
                phase.seconds += elapsed
                rows, logged, mark = [], phase.step, time.monotonic()
            log.step(phase.step)
            pause = time.monotonic()
            if phase.step % config.grid_every == 0 and not is_last:
                self.gallery.draw(phase)
            if may_save and phase.watch.streak == 0 and not is_last:
                self._compare_ranks(phase)
                self.keeper.save(phase, micro_batches=self.micro.count)
                saved, owes_save = time.monotonic(), False
            self.keeper.settle()
            every = config.snapshot_every
            if every and (phase.step % every == 0 or phase.step == phase.steps):
                self.keeper.snapshot(phase)
            mark += time.monotonic() - pause  # pictures and checkpoints are not training speed
        log.end_phase()
        if is_new:
            self._compare_ranks(phase)
            self.keeper.save(phase, micro_batches=self.micro.count, is_last=True)
        log.write("spent", phase=phase.name, training=phase.seconds, **self.spent)
        if stopped:
            raise Interrupted(
                f"{phase.name}: stopped after {phase.images:,} images, saved "
                f"({self.stop.reason or 'another process was asked to'})"
            )
        return phase

    def _resume(self, path: Path) -> Phase:
        """The phase as its checkpoint left it."""
        phase = self.assembly.restore(path)
        self.log.say(f"resumed {phase.name} after {phase.images:,} images from {path}")
        if changed := changes(run_folder.read_state(path)["config"], to_dict(self.config)):
            self.log.say(f"settings that differ from those before: {', '.join(changed)}")
            self.log.write("settings", changed=changed)
        return phase

    def _prepare(self, phase: Phase, stream: ImageStream, step: int | None = None) -> list[Batch]:
        """This rank's micro-batches of a step, by default the next: what the host has to do for it."""
        step = phase.step if step is None else step
        seen, iteration = step * phase.config.batch_size, phase.first_iteration + step
        plan, parts = self._plan(phase, step)
        batches = []
        for part in parts:
            with timed(self.spent, "data"):
                images, labels = stream.batch(seen + part)
            if not self.config.network.class_conditional:
                labels = None
            batch = make_batch(
                plan, part, images, labels, seed=phase.seed, step=iteration,
                boundary_weight=getattr(phase.config, "boundary_weight", 0.0),
                granule=row_granule(len(part), self.device),
            )  # fmt: skip
            batches.append(batch)
        if not stream.resident and step + 1 < phase.steps:
            for part in self._plan(phase, step + 1)[1]:
                stream.prefetch(seen + phase.config.batch_size + part)
        return batches

    def _plan(self, phase: Phase, step: int) -> tuple[TimePlan, list[np.ndarray]]:
        """The plan of a step, and which of its samples make up each of this rank's micro-batches."""
        plan = plan_times(
            phase.config,
            seed=phase.seed,
            images_seen=step * phase.config.batch_size,
            iteration=phase.first_iteration + step,
            iterations=phase.first_iteration + phase.steps,
        )
        micro = self.micro.of(phase.config.batch_size)
        parts = plan.parts(self.workers.world * micro)
        return plan, parts[self.workers.rank * micro :][:micro]

    def _step(self, phase: Phase, batches: list[Batch]) -> None:
        """One optimizer step; its numbers go to the phase's gauge."""
        rate = phase.rate_factor * learning_rate(phase.config, phase.images, phase.iteration)
        for group in phase.optimizer.param_groups:
            set_rate(group, rate)
        if isinstance(phase.optimizer, FusedOptimizer):
            size = phase.config.batch_size
            after = (phase.iteration + 1, phase.images + size, size)
            phase.optimizer.average_betas = [ema.rule.beta(*after) for ema in phase.emas]
            phase.optimizer.store_options()
        if phase.graphs is None:
            self._work(phase, batches)
            return
        (batch,) = batches
        tensors = [batch.packed, batch.images]
        tensors += [] if batch.labels is None else [batch.labels]

        def work(
            packed: torch.Tensor, images: torch.Tensor, labels: torch.Tensor | None = None
        ) -> torch.Tensor:
            return self._work(phase, [batch.at(packed, images, labels)])

        phase.graphs(batch.kind, work, *tensors)
        if not isinstance(phase.optimizer, FusedOptimizer):
            phase.move_averages()

    def _compile_kernels(self, phase: Phase, batches: list[Batch]) -> None:
        """Compile the Triton kernels of a step in parallel, by one that only notes them."""
        if not batches or self.config.compile or not runs_triton("step", self.device.type):
            return
        begun = time.monotonic()
        with compiling_together() as noted:
            # The first step will run out of memory too, cut its batch and compile what is missing.
            with suppress(torch.OutOfMemoryError):
                self._gradients(phase, batches[0])
            names = {kernel.__name__ for kernel, *_ in noted}
            self.log.say(f"{phase.name}: compiling {len(names)} kernels for this GPU")
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        self.log.say(f"{phase.name}: kernels ready after {time.monotonic() - begun:.0f} s")

    def _gradients(self, phase: Phase, batch: Batch) -> None:
        """Forward and backward pass of a micro-batch that leave nothing behind. The gradients do not
        arrive at the weights: DistributedDataParallel, which watches those, would take it for a step."""
        weights = [p for p in phase.student.parameters() if p.requires_grad]
        try:
            loss, _ = phase.inner(batch)
            torch.autograd.grad(loss, weights, allow_unused=True)
        finally:
            phase.inner.forget_weights()

    def _work(self, phase: Phase, batches: list[Batch]) -> torch.Tensor:
        """What the device does in a step: losses, gradients, the optimizer. Returns the mean losses off
        and on the boundary, [2]."""
        losses = torch.zeros(2, device=self.device)
        phase.optimizer.zero_grad(set_to_none=True)
        if phase.inner.folded:  # the optimizer leaves the network's rows normalised
            for name, part in phase.student.named_children():
                if name != "model":
                    force_rows(part)
        else:
            force_rows(phase.student)
        with nullcontext() if phase.graphs is None else phase.graphs.memory():
            for batch in batches:
                module, is_last = phase.objective, batch is batches[-1]
                waits = isinstance(module, DistributedDataParallel) and not is_last
                with module.no_sync() if waits else nullcontext():  # type: ignore[operator]
                    loss, share = module(batch)
                    # Gradients are means over the processes; the loss is a sum over them.
                    phase.scaler.scale(loss * (self.workers.world * poison(loss))).backward()
                losses += share
            phase.inner.forget_weights()
            del loss, share
        phase.gauge.write(losses, phase.take_step())
        if phase.graphs is not None:  # the next call takes their memory
            phase.optimizer.zero_grad(set_to_none=True)
        return losses

    # ---- memory that does not suffice -----------------------------------------------------------

    def _step_within_memory(
        self, phase: Phase, stream: ImageStream, batches: list[Batch], *, row: int
    ) -> None:
        """A step, again in smaller pieces where memory does not suffice: the result is the same."""
        may_clear = phase.graphs is not None
        while True:
            try:
                self._step(phase, batches)
                return
            except torch.OutOfMemoryError:
                failure = "out of memory"  # what the failed attempt holds is free from here on
            except CaptureError as error:
                failure, may_clear = str(error), False
            if may_clear:  # the memory of graphs is not that of pictures, which may lie unused
                self._clear(phase)
                phase.gauge.set_back(row)
                may_clear = False
                continue
            if phase.graphs is not None:
                self._drop_graphs(phase, failure)
            else:
                self._cut_smaller(phase)
            if self.workers.world > 1:
                raise TrainingError(
                    f"{phase.name}: rank {self.workers.rank} ran out of memory after {phase.images:,} "
                    f"images; with --resume auto the run goes on in {self.micro.count} micro-batches"
                )
            phase.gauge.set_back(row)
            batches = self._prepare(phase, stream)

    def _drop_graphs(self, phase: Phase, why: str) -> None:
        """Go on without captured steps: the same result, with more work for the host."""
        if self.config.cuda_graph == "on" and why != "out of memory":
            raise TrainingError(
                f"{phase.name}: a step could not be captured as a CUDA graph ({why}); use --cuda-graph auto"
            )
        self._free(phase)
        self.log.warn(
            "no_graphs",
            f"{phase.name}: {why} where steps are captured as CUDA graphs: they run without from here on, "
            "with the same result",
            images=phase.images,
        )

    def _free(self, phase: Phase) -> None:
        """Free what a step that failed holds, and the graphs."""
        phase.graphs = None  # one cannot cut a batch either
        self._clear(phase)

    def _clear(self, phase: Phase) -> None:
        """Free what a step that failed holds, and what the allocator keeps unused."""
        phase.optimizer.zero_grad(set_to_none=True)
        phase.inner.forget_weights()
        gc.collect()  # the error's frames and the tensors in them
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _fit_in_memory(
        self, phase: Phase, stream: ImageStream, batches: list[Batch]
    ) -> list[Batch]:
        """Several processes cannot repeat a step that one of them failed in, while the others wait for
        its gradients: so each tries the first one alone."""
        if self.workers.world == 1 or not batches:
            return batches
        while True:
            is_short = False
            try:
                self._gradients(phase, batches[0])
            except torch.OutOfMemoryError:
                is_short = True
            if not self.workers.any(is_short)[0]:
                break
            self._cut_smaller(phase)
            batches = self._prepare(phase, stream)
        if len(batches) > 1:
            # A static graph is learnt in a pass that exchanges gradients; in a step, not all do.
            loss, _ = phase.objective(batches[0])
            loss.backward()
            phase.optimizer.zero_grad(set_to_none=True)
        return batches

    def _cut_smaller(self, phase: Phase) -> None:
        """Free what a step holds and cut the batch into more pieces. TrainingError where it has one
        image in each."""
        self._free(phase)
        before = self.micro.of(phase.config.batch_size)
        if not self.micro.halve(phase.config.batch_size):
            raise TrainingError(
                f"{phase.name}: memory does not suffice for a single image at a time; take a smaller "
                "network or --precision bf16"
            )
        self.log.warn(
            "out_of_memory",
            f"{phase.name}: memory does not suffice for {before} micro-batch{'es' * (before > 1)} a "
            f"step: {self.micro.count} from here on, with the same result",
            images=phase.images,
            micro_batches=self.micro.count,
        )

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

    # ---- beginning, saving, finishing a phase ---------------------------------------------------

    def _finish(self, phase: Phase) -> PhaseResult:
        """The grid and the numbers at the end of a phase."""
        net = phase.average()
        self.gallery.draw(phase, net)
        result = PhaseResult(
            phase.name, phase.images, phase.seconds, self.gallery.judge(phase, net)
        )
        self.workers.barrier()
        return result

    # ---- watching -------------------------------------------------------------------------------

    def _read(self, phase: Phase, stream: ImageStream, first: int) -> Reading:
        """The numbers of the steps since `first`, from the device; what is wrong with them is logged."""
        with timed(self.spent, "checks"):
            rows = phase.gauge.read(phase.step - first, self.workers.sum)
            goes_on = phase.watch.streak > 0
            reading = phase.watch.judge(rows, first)
            phase.skips += len(reading.bad)
            if reading.bad and not (goes_on and reading.bad[0] == first):
                self._report_bad(phase, stream, reading)
            if reading.spikes:
                worst = max(reading.spikes, key=lambda spike: spike.norm / spike.usual)
                self.log.warn(
                    "spike",
                    f"{phase.name}: the gradient's norm was {worst.norm:.3g} at image "
                    f"{worst.step * phase.config.batch_size:,}, usually {worst.usual:.3g}; where such "
                    f"spikes come often the phase is about to diverge: lower --{phase.name}.lr, clip with "
                    f"--{phase.name}.grad-clip, or let the next phase begin from an earlier checkpoint "
                    "(--init)",
                    phase=phase.name,
                    steps=[spike.step for spike in reading.spikes],
                    norm=worst.norm,
                )
        return reading

    def _report_bad(self, phase: Phase, stream: ImageStream, reading: Reading) -> None:
        """Log steps that were skipped, and where the first one's numbers went bad."""
        first = reading.bad[0]
        scale = phase.scaler.get_scale() if phase.scaler.is_enabled() else 1.0
        found: list[str] = []
        try:
            batches = self._prepare(phase, stream, first)
            found = [text for batch in batches if (text := diagnose(phase.inner, batch, scale))]
        except torch.OutOfMemoryError:
            found = ["memory did not suffice for running the batch again"]
        finally:
            phase.inner.forget_weights()
        told = [text for texts in self.workers.gather(found[:1]) for text in texts]
        again = "finite when run again with the weights of now"
        again += f" and a loss scale of {scale:g}" if phase.scaler.is_enabled() else ""
        size = phase.config.batch_size
        self.log.warn(
            "bad_numbers",
            f"{phase.name}: skipped {len(reading.bad)} of {len(reading.rows)} steps, whose loss or "
            f"gradient was not finite, the first at images {first * size:,} to "
            f"{(first + 1) * size:,}: {told[0] if told else again}",
            phase=phase.name,
            steps=reading.bad,
            total=phase.skips,
        )
        phase.cause = told[0] if told else again

    def _is_lost(self, phase: Phase, reading: Reading, stopped: bool) -> bool:
        """Whether bad numbers do not go away by themselves."""
        limit = self.config.guard.bad_steps
        if phase.step == phase.steps and not stopped:
            limit = min(limit, LAST_STREAK, phase.steps)
        return reading.streak >= limit

    def _roll_back(self, phase: Phase, previous: Precond | None) -> Phase:
        """The phase as it was before its numbers went bad, with a lower rate or loss scale."""
        guard, name = self.config.guard, phase.name
        size, streak = phase.config.batch_size, phase.watch.streak
        begun = (phase.step - streak) * size
        what = f"{name}: the last {streak} steps, from image {begun:,} on, were not finite"
        self.keeper.settle(waits=True)
        good = self.keeper.last_good(name)
        if phase.rollbacks >= guard.rollbacks:
            raise TrainingError(
                f"{what} ({phase.cause}), after {phase.rollbacks} roll-backs; go on from "
                f"{good or 'the beginning'} with a lower --{name}.lr, with --{name}.grad-clip, or with "
                "a wider --precision"
            )
        count = phase.rollbacks + 1
        self._free(phase)
        fresh = self.assembly.begin(name, previous) if good is None else self.assembly.restore(good)
        missing = count - fresh.rollbacks
        fresh.rollbacks, fresh.skips = count, phase.skips
        now = fresh.lower(guard.lower, LOWERED**missing)
        self.log.warn(
            "roll_back",
            f"{what}: going on from image {fresh.images:,} with {now} (roll-back {count} of "
            f"{guard.rollbacks})",
            phase=name,
            rollbacks=count,
            images=fresh.images,
        )
        # So that a run that is resumed knows of it.
        self.keeper.save(fresh, micro_batches=self.micro.count)
        return fresh

    def _log_step(self, phase: Phase, rows: np.ndarray, since: int, seconds: float) -> None:
        """Log the mean losses of the last steps and what goes with them."""
        with timed(self.spent, "logging"):
            means = summarise(rows)
            consistency, boundary = means.losses.tolist()
            values = {"loss": phase.loss(means.losses)}
            if phase.name == "tcm":
                values |= {"consistency": consistency, "boundary": boundary}
            if isinstance(phase.config, RatioConfig):
                values["ratio"] = ratio(phase.config, phase.iteration - 1)
            values["lr"] = float(phase.optimizer.param_groups[0]["lr"])
            values |= {"grad_norm": means.norm, "grad_norm_max": means.largest}
            size = phase.config.batch_size
            values["images_per_second"] = (phase.step - since) * size / max(seconds, 1e-9)
            fetched, self._fetched = self.spent["data"] - self._fetched, self.spent["data"]
            values["data_share"] = min(fetched / max(seconds, 1e-9), 1.0)
            if means.skipped:
                values |= {"skipped": means.skipped, "skipped_total": phase.skips}
            self.log.metrics(phase.name, phase.images, values)

    def _agreed(self, step: int, *flags: bool) -> tuple[bool, ...]:
        """Flags that any process has set; several processes ask one another every few steps."""
        if self.workers.world == 1:
            return flags
        return self.workers.any(*flags) if step % TALK_EVERY == 0 else (False,) * len(flags)
