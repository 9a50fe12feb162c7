"""Builds phases: networks, objective, optimizer and EMA, fresh or from a checkpoint."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from tcm_fast.checkpoint.format import load_checkpoint
from tcm_fast.config import Config
from tcm_fast.data.dataset import ImageData
from tcm_fast.kernels._backend import extension_gap, fast_layout
from tcm_fast.networks import Precond, force_rows
from tcm_fast.networks.precision import normalized_parameters
from tcm_fast.objectives import OBJECTIVES, counts_on
from tcm_fast.objectives.construct import build_objective, build_student
from tcm_fast.optim import build_optimizer
from tcm_fast.optim.base import TrainingOptimizer
from tcm_fast.optim.ema import Ema, EmaRule
from tcm_fast.runtime.cuda_graphs import CudaPlace, GraphCache
from tcm_fast.runtime.distributed import Workers
from tcm_fast.training.data_parallel import replicate
from tcm_fast.training.micro_batches import MicroBatches
from tcm_fast.training.phase import Phase, load_weights
from tcm_fast.training.step_monitor import StepMetrics, StepMonitor

LOSS_SCALE, SCALE_GROWTH_INTERVAL = 16.0, 20_000  # of fp16, as EDM2 and TCM have it


class PhaseBuilder:
    """Makes the phases of a run.

    Args:
        config: of the run.
        workers: its processes.
        data: its images.
        micro: how many passes a batch is cut into.

    Raises:
        ValueError: what the configuration asks for cannot be.
    """

    def __init__(
        self, config: Config, workers: Workers, data: ImageData, micro: MicroBatches
    ) -> None:
        self.config, self.workers, self.data, self.micro = config, workers, data, micro
        self.device = workers.device
        if config.network.class_conditional and data.labels is None:
            raise ValueError(
                f"network.class_conditional: needs labels, but {config.data.source} has none (put each "
                "class in a sub-folder, or add --network.no-class-conditional)"
            )
        for name in config.phases:
            self.check_phase(name)
        for before, name in pairwise(config.phases):
            check_order(before, name)
        self.captures()
        for name in config.phases:  # what is wrong with them is said before anything is written
            OBJECTIVES[name].check(config.phase(name), self.build(name, device="meta"))

    def begin(self, name: str, previous: Precond | None) -> Phase:
        """A fresh phase: student, EMA and frozen network all start from `previous`."""
        kind = OBJECTIVES[name]
        student = self.build(name)
        if previous is not None:
            load_weights(student, previous, name)
        elif kind.needs:
            raise ValueError(f"phase {name}: needs {kind.needs}, or give one with --init FILE")
        info = getattr(previous, "info", {}) if previous is not None else {}
        check_order(info.get("phase"), name)
        frozen = copy.deepcopy(student) if kind.frozen_file else None
        if frozen is not None:
            frozen.info = info
        phase = self.assemble(name, student, frozen)
        if phase.inner.folded:
            force_rows(student)
            phase.optimizer.write_copies()
        phase.first_iteration = (
            int(info.get("iterations", 0)) if counts_on(info.get("phase"), name) else 0
        )
        return phase

    def restore(self, path: Path) -> Phase:
        """The phase as a checkpoint left it, which has been verified."""
        saved = load_checkpoint(path, verify=False)
        state = saved.state
        name = state["phase"]
        config = self.config.phase(name)
        kept = {"seed": self.config.seed, "batch_size": config.batch_size}
        for key, value in kept.items():  # the order of the images depends on both
            if value != state[key]:
                raise ValueError(f"resume: {key} must stay {state[key]} as in {path}, got {value}")
        student = self.build(name)
        saved.restore_network(student, "model")
        if self.config.network.class_conditional:
            self.check_classes(student.info.get("class_names") or [], path)
        frozen = None
        if frozen_file := OBJECTIVES[name].frozen_file:
            frozen = copy.deepcopy(student)
            saved.restore_network(frozen, frozen_file)
        phase = self.assemble(name, student, frozen)
        before, now = state.get("reads", {}), phase.inner.reads()
        for field in sorted({*before, *now}):
            if before.get(field) != now.get(field):
                raise ValueError(
                    f"resume: {name}.{field} must stay the file of SHA-256 {before.get(field)} as in {path}, "
                    f"got {now.get(field)}"
                )
        saved.restore_optimizer(phase.optimizer, student)
        for number, ema in enumerate(phase.emas):
            tensors = saved.network_tensors(f"ema-{number}")
            for average, (key, _) in zip(ema.average, student.named_parameters(), strict=True):
                average.copy_(tensors[key])
        phase.restore_counters(state)
        return phase

    def check_classes(self, saved: list[str], path: Path) -> None:
        """The numbers of classes have to mean what they meant."""
        pairs = zip(saved, self.data.class_names, strict=False)
        for number, (before, now) in enumerate(pairs):
            if before != now:
                raise ValueError(
                    f"resume: class {number} must stay {before} as in {path}, but is {now} in "
                    f"{self.config.data.source}"
                )

    def assemble(self, name: str, student: Precond, frozen: Precond | None) -> Phase:
        config = self.config.phase(name)
        fuses = not extension_gap(self.device)
        loss = build_objective(self.config, name, student, frozen, has_copies=fuses)
        if frozen is not None and loss.frozen is not frozen:
            frozen.to("cpu")  # for checkpoints; only the objective's copy is on the device
        objective: torch.nn.Module = loss
        if self.workers.world > 1:
            objective = replicate(loss, self.device, self.config.gradient_dtype)
        if self.config.compile:
            student.model.compile()
            if loss.frozen is not None:
                loss.frozen.model.compile()
        index = list(OBJECTIVES).index(name)
        captures = self.captures()
        weights = list(student.parameters())
        emas = [Ema(rule, weights) for rule in config.ema]
        optimizer = build_optimizer(
            weights,
            config,
            emas=emas,
            copies=loss.copies,
            normalized=normalized_parameters(student) if loss.folded else None,
            scale=LOSS_SCALE if self.config.precision == "fp16" else None,
            growth_interval=SCALE_GROWTH_INTERVAL,
            capturable=captures,
            offload=self.config.offload,
            moments=self.config.moments,
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
            graphs=self.graphs(optimizer) if captures else None,
            emas=emas,
            metrics=StepMetrics(self.device),
            monitor=StepMonitor(),
        )

    def graphs(self, optimizer: TrainingOptimizer) -> GraphCache:
        """Where the steps of an optimizer are captured."""
        return GraphCache(CudaPlace(self.device), optimizer.capturing)

    def captures(self) -> bool:
        """Whether steps are captured. ValueError where they have to be and cannot."""
        obstacles = {
            "needs a GPU": self.device.type != "cuda",
            "cannot cut a batch (micro_batches 1)": self.micro.count > 1,
            "cannot contain the exchange between processes": self.workers.world > 1,
            "cannot reach the host's memory (offload)": self.config.offload,
            "cannot choose a loss scale (fp16) without the extension": (
                self.config.precision == "fp16" and extension_gap(self.device) != ""
            ),
        }
        why = next((reason for reason, holds in obstacles.items() if holds), None)
        if self.config.cuda_graph == "on" and why is not None:
            raise ValueError(f"cuda_graph: a graph {why}; use auto or off")
        return self.config.cuda_graph != "off" and why is None

    def build(self, name: str, device: str | None = None) -> Precond:
        """The network of a phase, equal on every rank and for every seed of the global generator."""
        with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
            torch.manual_seed(self.config.seed)
            net = build_student(
                self.config, name, resolution=self.data.resolution, channels=self.data.channels,
                classes=self.data.num_classes,
            )  # fmt: skip
        if device is not None:
            return net
        return net.to(self.device, memory_format=fast_layout(self.device))  # type: ignore[call-overload]

    def check_phase(self, name: str) -> None:
        """The batch of a phase must be cut evenly and suffice for its plan, and its EMAs must have a
        rule."""
        config = self.config
        rules = [EmaRule.parse(rule) for rule in config.phase(name).ema]
        if config.snapshot_every and all(rule.kind != "power" for rule in rules):
            raise ValueError(f"snapshot_every: {name}.ema must have a power:GAMMA, got none")
        if config.keep_best == "frechet" and not config.eval.features:
            raise ValueError("best: frechet needs a feature space, give one with --eval.features")
        if config.gradient_dtype == "bf16" and self.device.type == "cpu" and self.workers.world > 1:
            raise ValueError(
                "gradient_dtype: bf16 is exchanged between GPUs only; take fp16 or fp32"
            )
        if config.guard.lower == "scale" and config.precision != "fp16":
            raise ValueError(f"guard.lower: scale needs fp16, got {config.precision}")
        pieces = self.workers.world * config.micro_batches
        size = config.phase(name).batch_size
        if size % pieces:
            raise ValueError(
                f"{name}.batch_size: must be divisible by ranks x micro-batches = "
                f"{self.workers.world} x {config.micro_batches}, got {size}"
            )
        OBJECTIVES[name].plan(config.phase(name), seed=0, images_seen=0)
        self.check_bank(name, OBJECTIVES[name].bank_size(config.phase(name)))

    def check_bank(self, name: str, size: int) -> None:
        """Warns where many samples will find no image of their class in a step's bank."""
        labels, count = self.data.labels, len(self.data)
        if size and size < count and labels is not None and self.config.network.class_conditional:
            share = np.bincount(labels) / count
            missing = float((share * (1 - share) ** size).sum())
            if missing > 0.01 and self.workers.is_main:
                warnings.warn(
                    f"{name}.bank_size: {size} images have none of the class of {missing:.0%} of the "
                    "samples, whose x_r is the usual one",
                    stacklevel=2,
                )


def check_order(before: str | None, name: str) -> None:
    """ValueError where a phase needs a denoiser to start from and the one before left none."""
    kind = OBJECTIVES[name]
    if kind.needs_denoiser and before in OBJECTIVES and OBJECTIVES[before].is_consistency:
        raise ValueError(f"phase {name}: needs {kind.needs}, got a network of phase {before}")
