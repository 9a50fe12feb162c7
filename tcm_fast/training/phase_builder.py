"""Phases put together: networks, objective, optimizer and averages, fresh or as a checkpoint left them."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch

from tcm_fast.checkpoint.format import load_checkpoint
from tcm_fast.config import PHASES, Config, EdmConfig, PhaseConfig
from tcm_fast.data.dataset import ImageData
from tcm_fast.kernels._backend import extension_gap, fast_layout
from tcm_fast.networks import LOGVAR_CHANNELS, Precond, build_network, force_rows
from tcm_fast.networks.precision import is_derived, make_copies, normalized_parameters
from tcm_fast.networks.recompute import set_recompute
from tcm_fast.objectives.noise_levels import plan_times
from tcm_fast.objectives.objective import Objective, check_augmentation
from tcm_fast.optim.fused import Ema, EmaRule, FusedOptimizer, build_optimizer
from tcm_fast.optim.offload import PiecewiseOptimizer
from tcm_fast.runtime.arithmetic import PRECISIONS
from tcm_fast.runtime.cuda_graphs import CudaPlace, GraphCache
from tcm_fast.runtime.distributed import Workers
from tcm_fast.training.data_parallel import replicate
from tcm_fast.training.micro_batches import MicroBatches
from tcm_fast.training.phase import CONSISTENCY, FROZEN_FILE, Phase, load_weights
from tcm_fast.training.step_monitor import Gauge, Watch

LOSS_SCALE, SCALE_GROWTH_INTERVAL = 16.0, 20_000  # of fp16, as EDM2 and TCM have it


class Assembly:
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
        self.captures()
        for name in config.phases:  # what is wrong with them is said before anything is written
            phase = config.phase(name)
            check_augmentation(phase, self.build(phase, device="meta"))

    def begin(self, name: str, previous: Precond | None) -> Phase:
        """A fresh phase: student, average and frozen network all start from `previous`."""
        config = self.config.phase(name)
        student = self.build(config)
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
        phase = self.assemble(name, student, frozen)
        if phase.inner.folded:
            assert isinstance(phase.optimizer, FusedOptimizer)
            force_rows(student)
            phase.optimizer.write_copies()
        phase.first_iteration = int(info.get("iterations", 0)) if continues else 0
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
        student = self.build(config)
        saved.restore_network(student, "model")
        if self.config.network.class_conditional:
            self.check_classes(student.info.get("class_names") or [], path)
        frozen = None
        if name in FROZEN_FILE:
            frozen = copy.deepcopy(student)
            saved.restore_network(frozen, FROZEN_FILE[name])
        phase = self.assemble(name, student, frozen)
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
        student.train()
        augmentation = getattr(student.model, "map_augment", None)
        if augmentation is not None:  # has a gradient only where something is augmented
            augmentation.requires_grad_(getattr(config, "augment", 0.0) > 0)
        set_recompute(
            student.model,
            norms=self.config.recompute_norms,
            blocks_from=self.config.recompute_blocks,
        )
        dtype = PRECISIONS[self.config.precision]
        loss = Objective(name, config, student, frozen, dtype=dtype)
        if frozen is not None and loss.frozen is not frozen:
            frozen.to("cpu")  # for checkpoints; the device holds the objective's copy alone
        objective: torch.nn.Module = loss
        if self.workers.world > 1:
            objective = replicate(loss, self.device, self.config.gradient_dtype)
        if self.config.compile:
            student.model.compile()
            if loss.frozen is not None:
                loss.frozen.model.compile()
        index = PHASES.index(name)
        captures = self.captures()
        weights = list(student.parameters())
        emas = [Ema(rule, weights) for rule in config.ema]
        scaled = self.config.precision == "fp16"
        loss.apart = self.config.is_lean
        if is_derived(student, dtype) and not extension_gap(self.device):
            loss.folded = self.config.folds_rows
            loss.copies = make_copies(student, dtype, rows_too=loss.folded)
        optimizer = build_optimizer(
            weights,
            config,
            emas=emas,
            copies=loss.copies,
            normalized=normalized_parameters(student) if loss.folded else None,
            scale=LOSS_SCALE if scaled else None,
            growth_interval=SCALE_GROWTH_INTERVAL,
            capturable=captures,
            fused=PiecewiseOptimizer if self.config.offload else FusedOptimizer,
        )
        if isinstance(optimizer, PiecewiseOptimizer):
            for ema, average in zip(emas, optimizer.averages, strict=True):
                ema.average = average
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
            scaler=optimizer.loss_scale
            if isinstance(optimizer, FusedOptimizer)
            else torch.amp.GradScaler(
                self.device.type,
                init_scale=LOSS_SCALE,
                growth_interval=SCALE_GROWTH_INTERVAL,
                enabled=scaled,
            ),
            emas=emas,
            gauge=Gauge(self.device),
            watch=Watch(),
        )

    def graphs(self, optimizer: torch.optim.Optimizer) -> GraphCache:
        """Where the steps of an optimizer are captured."""
        around = optimizer.capturing if isinstance(optimizer, FusedOptimizer) else nullcontext
        return GraphCache(CudaPlace(self.device), around)

    def captures(self) -> bool:
        """Whether steps are captured. ValueError where they have to be and cannot."""
        obstacles = {
            "needs a GPU": self.device.type != "cuda",
            "cannot cut a batch (micro_batches 1)": self.micro.count > 1,
            "cannot talk to other processes": self.workers.world > 1,
            "cannot reach the host's memory (offload)": self.config.offload,
            "cannot choose a loss scale (fp16) without the extension": (
                self.config.precision == "fp16" and extension_gap(self.device) != ""
            ),
        }
        why = next((reason for reason, holds in obstacles.items() if holds), None)
        if self.config.cuda_graph == "on" and why is not None:
            raise ValueError(f"cuda_graph: a graph {why}; use auto or off")
        return self.config.cuda_graph != "off" and why is None

    def build(self, config: PhaseConfig, device: str | None = None) -> Precond:
        """The network of a phase, equal on every rank and for every seed of the global generator."""
        learns_variance = isinstance(config, EdmConfig) and config.learned_variance
        with torch.random.fork_rng(devices=[]), torch.device(device or "cpu"):
            torch.manual_seed(self.config.seed)
            net = build_network(
                self.config.network.name,
                img_resolution=self.data.resolution,
                img_channels=self.data.channels,
                label_dim=self.data.num_classes if self.config.network.class_conditional else 0,
                logvar_channels=LOGVAR_CHANNELS if learns_variance else 0,
                dropout=config.dropout,
                **self.config.network.architecture(),
            )
        if device is not None:
            return net
        return net.to(self.device, memory_format=fast_layout(self.device))  # type: ignore[call-overload]

    def check_phase(self, name: str) -> None:
        """The batch of a phase must be cut evenly, tcm's must hold a boundary sample, and its averages
        must have a rule."""
        config = self.config
        rules = [EmaRule.parse(rule) for rule in config.phase(name).ema]
        if config.snapshot_every and all(rule.kind != "power" for rule in rules):
            raise ValueError(f"snapshot_every: {name}.ema must have a power:GAMMA, got none")
        if config.best == "frechet" and not config.eval.features:
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
        plan_times(config.phase(name), seed=0, images_seen=0)
