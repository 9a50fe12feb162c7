"""The loop: phases one after another, each a plain sequence of steps, from images to checkpoints.

    plan times -> fetch images -> loss of each micro-batch -> optimizer -> averages

A step depends on (configuration, seed, images seen) and on the state that a checkpoint holds, on
nothing else; so a resumed run repeats an unbroken one.
"""

from __future__ import annotations

import copy
import math
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch.nn.parallel import DistributedDataParallel

from tcm_fast import checkpoint, distributed, metrics
from tcm_fast.config import PHASES, Config, ConsistencyConfig, PhaseConfig, save_config, to_dict
from tcm_fast.data import ImageStream, load_images
from tcm_fast.features import feature_space
from tcm_fast.graphs import GraphCache
from tcm_fast.kernels._backend import extension_gap
from tcm_fast.kernels._triton import compiling_together, runs_triton
from tcm_fast.networks import Precond, build_network
from tcm_fast.networks.precision import make_copies
from tcm_fast.objectives import Batch, Objective, make_batch, row_granule
from tcm_fast.optim import (
    Ema,
    EmaRule,
    FusedOptimizer,
    LossScale,
    build_optimizer,
    learning_rate,
    set_rate,
)
from tcm_fast.pictures import save_grid
from tcm_fast.runlog import RunLog
from tcm_fast.sampler import HEUN_STEPS, sample
from tcm_fast.snapshots import save_snapshot
from tcm_fast.times import plan_times, ratio

CONSISTENCY = ("ect", "tcm", "ict", "cd")
DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
}
FROZEN_FILE = {"tcm": "stage1", "cd": "teacher"}
LOSS_SCALE, SCALE_GROWTH_INTERVAL = 16.0, 20_000  # of fp16, as EDM2 and TCM have it
COLLAPSED = 0.25  # share of their widest spread below which one-step samples are nearly alike
INFLATED = 1.1  # multiple of the data's spread above which they have left the data
GRID = 64  # images of a sample grid, at most: its rows are full


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


class Interrupted(Exception):
    """The run was stopped by a signal, after a checkpoint."""


@dataclass
class Phase:
    """Everything that one phase changes or needs while it runs."""

    name: str
    config: PhaseConfig
    seed: int
    steps: int
    student: Precond
    frozen: Precond | None
    objective: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | LossScale
    emas: list[Ema]
    graphs: GraphCache | None = None
    """Captured steps; None where every step is started operation by operation."""
    step: int = 0
    """Optimizer steps of this phase."""
    first_iteration: int = 0
    """Iterations before this phase: stage 2 counts on from stage 1."""
    seconds: float = 0.0
    skips: int = 0
    """Steps skipped so far, as of the last line of the log."""
    widest_spread: float = 0.0
    """Largest variation among one-step samples so far."""

    @property
    def images(self) -> int:
        return self.step * self.config.batch_size

    @property
    def iteration(self) -> int:
        return self.first_iteration + self.step

    def average(self, index: int = 0) -> Precond:
        """A copy of the student with the weights of one of its averages, in eval mode."""
        net = copy.deepcopy(self.student).eval().requires_grad_(False)
        for parameter, value in zip(net.parameters(), self.emas[index].average, strict=True):
            parameter.copy_(value)
        net.info = self.info()
        return net

    def info(self) -> dict[str, Any]:
        """What a network file says of its training."""
        return {
            "phase": self.name,
            "t_prime": getattr(self.config, "t_prime", None),
            "images": self.images,
            "iterations": self.iteration,
        }


@dataclass
class PhaseResult:
    """One row of the summary."""

    phase: str
    images: int
    seconds: float
    reports: dict[int | None, metrics.Report] = field(default_factory=dict)
    """Quality by number of sampling steps; None is a pre-trained network's Heun solver."""


class Trainer:
    """Trains the phases of a configuration and leaves checkpoints, grids and a log in a folder.

    Args:
        config: the resolved configuration.
        out: the run's folder.
        init: a network file (or run) that the first phase starts from, instead of the phase before.
        resume: continue the newest complete checkpoint in `out`, if there is one.

    Raises:
        ValueError, FileNotFoundError: what the user has to change.
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
        torch.backends.cuda.matmul.allow_tf32 = config.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = config.precision == "tf32"

        data = config.data
        self.data = load_images(
            data.source, skip_corrupt=data.skip_corrupt, resolution=data.resolution
        )
        if config.network.class_conditional and self.data.labels is None:
            raise ValueError(
                f"network.class_conditional: needs labels, but {data.source} has none (put each class "
                "in a sub-folder, or add --network.no-class-conditional)"
            )
        for name in config.phases:
            self._check_phase(name)
        self._graphs()
        # Every process looks, so that all of them fail where one does, before any of them writes.
        self.resumed = self.workers.share(checkpoint.open_run(self.out, resume))
        self.init = checkpoint.load_network(init, device=self.device) if init else None
        self._build(dropout=0.0)  # the network's own errors come before anything is written
        if self.workers.is_main:
            (self.out / "grids").mkdir(parents=True, exist_ok=True)
            save_config(config, self.out / "config.json")
        self.log = RunLog(self.out, active=self.workers.is_main)
        features = config.eval.features
        self.space = feature_space(features, device=self.device) if features else None
        self._stop = False
        if gap := extension_gap(self.device):
            self.log.say(
                f"optimizer: torch's, in many passes over the weights instead of one ({gap})"
            )

    # ---- the run --------------------------------------------------------------------------------

    def run(self) -> list[PhaseResult]:
        """Train every phase that is not done yet.

        Raises:
            Interrupted: a signal came; the run has been saved.
            TrainingError: the numbers went bad.
        """
        previous, names = self.init, list(self.config.phases)
        results = []
        handlers = self._listen()
        try:
            restored = None if self.resumed is None else self._restore(self.resumed)
            if restored is not None and restored.name in names:
                names = names[names.index(restored.name) :]
            elif restored is not None:  # another phase: what it has learnt is where these begin
                previous, restored = self._handed_on(restored, previous), None
            for name in names:
                phase = restored or self._begin(name, previous)
                restored = None
                results.append(self._train(phase))
                previous = phase.average()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
            self.log.close()
        return results

    def _handed_on(self, phase: Phase, init: Precond | None) -> Precond:
        """The network that a phase in the run's folder hands to a phase trained singly."""
        if phase.step < phase.steps and init is None:
            raise ValueError(
                f"phases: {phase.name} in {self.out} has {phase.step} of {phase.steps} steps, finish it "
                f"first (--phase {phase.name} --resume auto) or give --init FILE"
            )
        return init or phase.average()

    def _train(self, phase: Phase) -> PhaseResult:
        """One phase, from where it stands to its end."""
        config, log = self.config, self.log
        stream = ImageStream(self.data, seed=phase.seed, device=self.device, flip=config.data.flip)
        self._grid(phase)
        log.start_phase(phase.name, phase.steps, phase.step)
        stats = torch.zeros(2, device=self.device)
        begun = logged = phase.step
        mark = time.monotonic()
        stopped = False
        batches = self._prepare(phase, stream) if phase.step < phase.steps else []
        self._compile_kernels(phase, batches)
        while phase.step < phase.steps and not stopped:
            stats += self._step(phase, batches)
            phase.step += 1
            if phase.step < phase.steps:  # while the device is busy
                batches = self._prepare(phase, stream)
            stopped = self._agreed_to_stop(phase.step)
            is_last = phase.step == phase.steps or stopped
            if phase.step % config.log_every == 0 or is_last:
                elapsed = time.monotonic() - mark
                self._log_step(phase, stats / (phase.step - logged), logged, elapsed)
                phase.seconds += elapsed
                stats.zero_()
                logged, mark = phase.step, time.monotonic()
            log.step(phase.step)
            pause = time.monotonic()
            if phase.step % config.grid_every == 0 and not is_last:
                self._grid(phase)
            if phase.step % config.save_every == 0 and not is_last:
                self._save(phase)
            every = config.snapshot_every
            if every and (phase.step % every == 0 or phase.step == phase.steps):
                self._snapshot(phase)
            mark += time.monotonic() - pause  # pictures and checkpoints are not training speed
        log.end_phase()
        if logged > begun or phase.steps == 0:
            self._save(phase, milestone=phase.step == phase.steps)
        if stopped:
            raise Interrupted(f"{phase.name}: stopped after {phase.images:,} images, saved")
        return self._finish(phase)

    def _prepare(self, phase: Phase, stream: ImageStream) -> list[Batch]:
        """This rank's micro-batches of the next step: what the host has to do for it."""
        plan = plan_times(
            phase.config,
            seed=phase.seed,
            images_seen=phase.images,
            iteration=phase.iteration,
            iterations=phase.first_iteration + phase.steps,
        )
        micro = self.config.micro_batches
        batches = []
        for part in plan.parts(self.workers.world * micro)[self.workers.rank * micro :][:micro]:
            images, labels = stream.batch(phase.images + part)
            if not self.config.network.class_conditional:
                labels = None
            batch = make_batch(
                plan, part, images, labels, seed=phase.seed, step=phase.iteration,
                boundary_weight=getattr(phase.config, "boundary_weight", 0.0),
                granule=row_granule(len(part), self.device),
            )  # fmt: skip
            batches.append(batch)
        return batches

    def _step(self, phase: Phase, batches: list[Batch]) -> torch.Tensor:
        """One optimizer step; returns the mean losses off and on the boundary, [2], on the device."""
        for group in phase.optimizer.param_groups:
            set_rate(group, learning_rate(phase.config, phase.images, phase.iteration))
        size = phase.config.batch_size
        if isinstance(phase.optimizer, FusedOptimizer):
            after = (phase.iteration + 1, phase.images + size, size)
            phase.optimizer.average_betas = [ema.rule.beta(*after) for ema in phase.emas]
            phase.optimizer.store_options()
        if phase.graphs is None:
            stats = self._work(phase, batches)
        else:
            (batch,) = batches
            tensors = [batch.packed, batch.images]
            tensors += [] if batch.labels is None else [batch.labels]

            def work(
                packed: torch.Tensor, images: torch.Tensor, labels: torch.Tensor | None = None
            ) -> torch.Tensor:
                return self._work(phase, [batch.at(packed, images, labels)])

            stats = phase.graphs(batch.kind, work, *tensors)
        if not isinstance(phase.optimizer, FusedOptimizer):
            for ema in phase.emas:
                ema.update(phase.iteration + 1, phase.images + size, size)
        return stats

    def _compile_kernels(self, phase: Phase, batches: list[Batch]) -> None:
        """Compile the Triton kernels of a step in parallel, by one that only notes them."""
        if not batches or self.config.compile or not runs_triton("step", self.device.type):
            return
        begun = time.monotonic()
        inner = getattr(phase.objective, "module", phase.objective)  # no talk with other processes
        with compiling_together() as noted:
            inner(batches[0])[0].backward()
            names = {kernel.__name__ for kernel, *_ in noted}
            self.log.say(f"{phase.name}: compiling {len(names)} kernels for this GPU")
        phase.optimizer.zero_grad(set_to_none=True)
        self.log.say(f"{phase.name}: kernels ready after {time.monotonic() - begun:.0f} s")

    def _work(self, phase: Phase, batches: list[Batch]) -> torch.Tensor:
        """What the device does in a step: losses, gradients, the optimizer."""
        stats = torch.zeros(2, device=self.device)
        phase.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            module, is_last = phase.objective, batch is batches[-1]
            waits = isinstance(module, DistributedDataParallel) and not is_last
            with module.no_sync() if waits else nullcontext():  # type: ignore[operator]
                loss, share = module(batch)
                # DistributedDataParallel divides by the world size; the loss is a sum over ranks.
                phase.scaler.scale(loss * self.workers.world).backward()
            stats += share
        if isinstance(phase.scaler, LossScale):
            phase.optimizer.step()
            return stats
        if phase.config.grad_clip is not None:
            phase.scaler.unscale_(phase.optimizer)
            torch.nn.utils.clip_grad_norm_(phase.student.parameters(), phase.config.grad_clip)
        phase.scaler.step(phase.optimizer)
        phase.scaler.update()
        return stats

    # ---- beginning, saving, finishing a phase ---------------------------------------------------

    def _begin(self, name: str, previous: Precond | None) -> Phase:
        """A fresh phase: student, average and frozen network all start from `previous`."""
        config = self.config.phase(name)
        student = self._build(config.dropout)
        if previous is not None:
            load_weights(student, previous, name)
        elif name in ("tcm", "cd"):
            needed = (
                "a stage-1 network: train ect first"
                if name == "tcm"
                else "a teacher: train edm first"
            )
            raise ValueError(f"phase {name}: needs {needed}, or give one with --init FILE")
        info = getattr(previous, "info", {}) if previous is not None else {}
        continues = name in CONSISTENCY and info.get("phase") in CONSISTENCY
        frozen = copy.deepcopy(student) if name in FROZEN_FILE else None
        if frozen is not None:
            frozen.info = info
        phase = self._assemble(name, student, frozen)
        phase.first_iteration = int(info.get("iterations", 0)) if continues else 0
        return phase

    def _assemble(self, name: str, student: Precond, frozen: Precond | None) -> Phase:
        config = self.config.phase(name)
        student.train()
        dtype = DTYPES[self.config.precision]
        loss = Objective(name, config, student, frozen, dtype=dtype)
        objective: torch.nn.Module = loss
        if frozen is not None and dtype != torch.float32:
            frozen.to("cpu")  # for checkpoints; the device holds the objective's copy alone
        if self.workers.world > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            objective = DistributedDataParallel(
                objective, device_ids=devices, broadcast_buffers=False, gradient_as_bucket_view=True
            )
        if self.config.compile:
            student.model.compile()
            if loss.frozen is not None:
                loss.frozen.model.compile()
        index = PHASES.index(name)
        graphs = self._graphs()
        emas = [Ema(rule, student.parameters()) for rule in config.ema]
        scaled = self.config.precision == "fp16"
        if dtype != torch.float32 and not extension_gap(self.device):
            loss.copies = make_copies(student, dtype)
        optimizer = build_optimizer(
            student.parameters(),
            config,
            emas=emas,
            copies=loss.copies,
            scale=LOSS_SCALE if scaled else None,
            growth_interval=SCALE_GROWTH_INTERVAL,
            capturable=graphs is not None,
        )
        return Phase(
            name=name,
            config=config,
            seed=int(np.random.SeedSequence([self.config.seed, index]).generate_state(1)[0]),
            steps=self.config.steps(name),
            student=student,
            frozen=frozen,
            objective=objective,
            optimizer=optimizer,
            graphs=graphs,
            scaler=optimizer.loss_scale
            if isinstance(optimizer, FusedOptimizer)
            else torch.amp.GradScaler(
                self.device.type,
                init_scale=LOSS_SCALE,
                growth_interval=SCALE_GROWTH_INTERVAL,
                enabled=scaled,
            ),
            emas=emas,
        )

    def _graphs(self) -> GraphCache | None:
        """Where steps are captured, None where they are not. ValueError where they have to be."""
        obstacles = {
            "needs a GPU": self.device.type != "cuda",
            "cannot cut a batch (micro_batches 1)": self.config.micro_batches > 1,
            "cannot talk to other processes": self.workers.world > 1,
            "cannot choose a loss scale (fp16) without the extension": (
                self.config.precision == "fp16" and extension_gap(self.device) != ""
            ),
        }
        why = next((reason for reason, holds in obstacles.items() if holds), None)
        if self.config.cuda_graph == "on" and why is not None:
            raise ValueError(f"cuda_graph: a graph {why}; use auto or off")
        return None if self.config.cuda_graph == "off" or why is not None else GraphCache()

    def _build(self, dropout: float) -> Precond:
        """The run's network, equal on every rank and for every seed of the global generator."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            net = build_network(
                self.config.network.name,
                img_resolution=self.data.resolution,
                img_channels=self.data.channels,
                label_dim=self.data.num_classes if self.config.network.class_conditional else 0,
                dropout=dropout,
                **self.config.network.architecture(),
            )
        on_gpu = self.device.type == "cuda"
        layout = torch.channels_last if on_gpu else torch.preserve_format
        return net.to(self.device, memory_format=layout)  # type: ignore[call-overload]

    def _check_phase(self, name: str) -> None:
        """The batch of a phase must be cut evenly, tcm's must hold a boundary sample, and its averages
        must have a rule."""
        rules = [EmaRule.parse(rule) for rule in self.config.phase(name).ema]
        if self.config.snapshot_every and all(rule.kind != "power" for rule in rules):
            raise ValueError(f"snapshot_every: {name}.ema must have a power:GAMMA, got none")
        pieces = self.workers.world * self.config.micro_batches
        size = self.config.phase(name).batch_size
        if size % pieces:
            raise ValueError(
                f"{name}.batch_size: must be divisible by ranks x micro-batches = "
                f"{self.workers.world} x {self.config.micro_batches}, got {size}"
            )
        plan_times(self.config.phase(name), seed=0, images_seen=0)

    def _restore(self, path: Path) -> Phase:
        """The phase as its checkpoint left it."""
        saved = checkpoint.load_checkpoint(path)
        state = saved.state
        name = state["phase"]
        config = self.config.phase(name)
        kept = {"seed": self.config.seed, "batch_size": config.batch_size}
        for key, value in kept.items():  # the order of the images depends on both
            if value != state[key]:
                raise ValueError(f"resume: {key} must stay {state[key]} as in {path}, got {value}")
        student = self._build(config.dropout)
        saved.restore_network(student, "model")
        frozen = None
        if name in FROZEN_FILE:
            frozen = copy.deepcopy(student)
            saved.restore_network(frozen, FROZEN_FILE[name])
        phase = self._assemble(name, student, frozen)
        phase.step = state["step"]
        phase.first_iteration = state["first_iteration"]
        phase.seconds = state["seconds"]
        saved.restore_optimizer(phase.optimizer, student)
        for index, ema in enumerate(phase.emas):
            tensors = saved.network_tensors(f"ema-{index}")
            names = [n for n, _ in student.named_parameters()]
            for average, parameter in zip(ema.average, names, strict=True):
                average.copy_(tensors[parameter])
        if state["scaler"]:
            phase.scaler.load_state_dict(state["scaler"])
        self.log.say(f"resumed {name} after {phase.images:,} images from {path}")
        return phase

    def _save(self, phase: Phase, *, milestone: bool = False) -> None:
        """A checkpoint of everything, by the main process."""
        if self.workers.is_main:
            networks = {"model": phase.student}
            networks |= {f"ema-{i}": phase.average(i) for i in range(len(phase.emas))}
            if phase.frozen is not None:
                networks[FROZEN_FILE[phase.name]] = phase.frozen
            checkpoint.save_checkpoint(
                self.out,
                networks=networks,
                optimizer=phase.optimizer,
                info=phase.info() | {"class_names": list(self.data.class_names)},
                state={
                    "step": phase.step,
                    "first_iteration": phase.first_iteration,
                    "seconds": phase.seconds,
                    "seed": self.config.seed,
                    "batch_size": phase.config.batch_size,
                    "scaler": phase.scaler.state_dict(),
                    "config": to_dict(self.config),
                },
                keep=self.config.keep,
                milestone=milestone,
            )
        self.workers.barrier()

    def _snapshot(self, phase: Phase) -> None:
        """Keep the power-function averages for good."""
        if self.workers.is_main:
            names = [name for name, _ in phase.student.named_parameters()]
            phase.student.info = phase.info() | {"class_names": list(self.data.class_names)}
            for index, ema in enumerate(phase.emas):
                if ema.rule.kind == "power":
                    average = dict(zip(names, ema.average, strict=True))
                    save_snapshot(self.out, phase.student, average, index, ema.rule.value)

    def _finish(self, phase: Phase) -> PhaseResult:
        """The grid and the numbers at the end of a phase."""
        net = phase.average()
        self._grid(phase, net)
        result = PhaseResult(phase.name, phase.images, phase.seconds)
        if self.space is not None and self.workers.is_main:
            for steps in (1, 2) if phase.name in CONSISTENCY else (None,):
                result.reports[steps] = metrics.evaluate_network(
                    net, self.data, self.space, steps=steps, num=self.config.eval.num
                )
            frechet = {str(k or "heun"): r.frechet for k, r in result.reports.items()}
            self.log.write("eval", phase=phase.name, images=phase.images, frechet=frechet)
        self.workers.barrier()
        return result

    def _grid(self, phase: Phase, net: Precond | None = None) -> None:
        """Samples of the first average as a picture; a warning where they are all alike."""
        if not self.workers.is_main:
            return
        steps = 1 if phase.name in CONSISTENCY else None
        classes = phase.student.label_dim
        columns = classes if 0 < classes <= 16 else 8  # a column for each of few classes
        images = sample(net or phase.average(), GRID // columns * columns, steps=steps)
        if phase.step:
            name = f"{phase.name}-{phase.images:09d}.png"
            save_grid(images, self.out / "grids" / name, columns, overwrite=True)
        if phase.name in CONSISTENCY:
            self._watch_spread(phase, metrics.spread(images.numpy()))

    def _watch_spread(self, phase: Phase, spread: float) -> None:
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
            "consistency function is collapsing; raise --tcm.boundary-weight or lower the rate",
        )

    # ---- watching -------------------------------------------------------------------------------

    def _log_step(self, phase: Phase, stats: torch.Tensor, since: int, seconds: float) -> None:
        """Read the mean losses of the last steps from the device, log them, stop on bad numbers."""
        consistency, boundary = self.workers.sum(stats).tolist()
        loss = consistency + getattr(phase.config, "boundary_weight", 0.0) * boundary
        values = {"loss": loss}
        if phase.name == "tcm":
            values |= {"consistency": consistency, "boundary": boundary}
        if isinstance(phase.config, ConsistencyConfig) and phase.name != "ict":
            values["ratio"] = ratio(phase.config, phase.iteration - 1)
        values["lr"] = float(phase.optimizer.param_groups[0]["lr"])
        size = phase.config.batch_size
        values["images_per_second"] = (phase.step - since) * size / max(seconds, 1e-9)
        skipped = self._skipped(phase)
        if skipped:
            values["skipped"] = skipped
        self.log.metrics(phase.name, phase.images, values)
        stuck = skipped == phase.step - since and not phase.scaler.is_enabled()
        if stuck or not math.isfinite(loss):
            what = "no gradient is" if math.isfinite(loss) else "the loss is not"
            last = checkpoint.newest_checkpoint(self.out)
            raise TrainingError(
                f"{phase.name}: {what} finite between images {since * size:,} and "
                f"{phase.images:,}; go on from {last or 'the beginning'} with a lower "
                f"--{phase.name}.lr or a wider --precision"
            )

    def _skipped(self, phase: Phase) -> int:
        """Steps skipped for their gradients since the last call."""
        if not isinstance(phase.optimizer, FusedOptimizer):
            return 0
        before, phase.skips = phase.skips, phase.optimizer.skips
        return phase.skips - before

    def _listen(self) -> dict[signal.Signals, Any]:
        """Take over the signals that end a program; returns who had them. Only a program's main thread
        may."""
        if threading.current_thread() is not threading.main_thread():
            return {}
        return {s: signal.signal(s, self._on_signal) for s in (signal.SIGINT, signal.SIGTERM)}

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._stop:
            raise KeyboardInterrupt  # asked twice: do not wait for the step
        self._stop = True

    def _agreed_to_stop(self, step: int) -> bool:
        """Whether a signal has reached any process; several ask one another every ten steps."""
        if self.workers.world == 1:
            return self._stop
        return step % 10 == 0 and self.workers.any(self._stop)


def load_weights(student: Precond, previous: Precond, phase: str) -> None:
    """Start a phase from another network's weights. ValueError where the networks differ."""
    ours, theirs = student.state_dict(), previous.state_dict()
    # Inputs and outputs of pre-training, without which a network computes the same.
    unused = ("model.map_augment.", "logvar_")
    theirs = {n: v for n, v in theirs.items() if n in ours or not n.startswith(unused)}
    wrong = [
        f"{name} is {list(theirs[name].shape) if name in theirs else 'missing'}, "
        f"must be {list(value.shape)}"
        for name, value in ours.items()
        if name not in theirs or theirs[name].shape != value.shape
    ]
    wrong += [f"{name} is not known" for name in theirs if name not in ours]
    if wrong:
        raise ValueError(f"init: the network does not fit phase {phase}: {'; '.join(wrong[:3])}")
    student.load_state_dict(theirs)


# ---- the end ------------------------------------------------------------------------------------

NEXT = """Next:
  tcm-fast sample {out} --num 100 --steps 1 --out samples.png
  tcm-fast eval {out}
  tcm-fast train --preset digits --data YOUR_IMAGES --network.no-class-conditional --out runs/yours
(YOUR_IMAGES: a folder, zip, npz or parquet; class sub-folders serve as labels with
--network.class-conditional; presets for real runs: cifar10, imagenet64-s, ...)"""


def summary(trainer: Trainer, results: list[PhaseResult]) -> None:
    """The table of a finished run, and what to do next."""
    table = Table(title=str(trainer.out), title_justify="left", box=box.SIMPLE)
    table.pad_edge, table.padding = False, (0, 1, 0, 0)  # fits 80 columns
    for column in ("phase", "images", "time", "images/s"):
        table.add_column(column, justify="left" if column == "phase" else "right")
    judged = [r for r in results if r.reports]
    if judged:
        for column in ("Fréchet\n1 step", "\n2 steps", "confident", "memorised"):
            table.add_column(column, justify="right")
    for result in results:
        speed = result.images / max(result.seconds, 1e-9)
        minutes, hours = result.seconds / 60, result.seconds / 3600
        duration = f"{result.seconds:.0f} s" if minutes < 60 else f"{hours:.1f} h"
        row = [result.phase, f"{result.images:,}", duration, f"{speed:,.0f}"]
        table.add_row(*row, *_quality(result))
    if judged:
        real = next(iter(judged[-1].reports.values()))
        table.add_section()
        yardstick = [f"{real.frechet_real:.2f}", "", _share(real.confident_real), "0.010"]
        table.add_row("real data", "", "", "", *yardstick)
        table.add_row("noise", "", "", "", "", "", _share(real.confident_noise), "")
        table.caption = (
            f"* in {HEUN_STEPS} Heun steps" if "edm" in (r.phase for r in judged) else None
        )
    Console().print(table)
    print(NEXT.format(out=trainer.out))


def _quality(result: PhaseResult) -> list[str]:
    """Cells of a phase: distances at one and two steps, shares at one step."""
    if not result.reports:
        return []
    reports = list(result.reports.values())
    distances = [f"{report.frechet:.2f}" for report in reports]
    if None in result.reports:
        distances = [f"{distances[0]} *", ""]
    return [*distances, _share(reports[0].confident), f"{reports[0].memorised:.3f}"]


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
