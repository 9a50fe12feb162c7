"""What one phase of a run changes or needs while it runs."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tcm_fast.config import PhaseConfig
from tcm_fast.evaluation import metrics
from tcm_fast.networks import Precond
from tcm_fast.optim.fused import Ema, FusedOptimizer, LossScale
from tcm_fast.optim.offload import PiecewiseOptimizer
from tcm_fast.runtime.cuda_graphs import GraphCache
from tcm_fast.training.step_monitor import Gauge, Watch

CONSISTENCY = ("ect", "tcm", "ict", "cd")
FROZEN_FILE = {"tcm": "stage1", "cd": "teacher"}


class TrainingError(RuntimeError):
    """Training cannot go on; the message says why and what to do."""


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
    gauge: Gauge
    watch: Watch
    graphs: GraphCache | None = None
    """Captured steps; None where every step is started operation by operation."""
    step: int = 0
    """Optimizer steps of this phase."""
    first_iteration: int = 0
    """Iterations before this phase: stage 2 counts on from stage 1."""
    seconds: float = 0.0
    skips: int = 0
    """Steps so far that were skipped for numbers that were not finite."""
    cause: str = "the cause is not known"
    """Where numbers that were not finite came from the last time."""
    rollbacks: int = 0
    rate_factor: float = 1.0
    """Of the learning rate, lowered by roll-backs."""
    widest_spread: float = 0.0
    """Largest variation among one-step samples so far."""

    @property
    def images(self) -> int:
        return self.step * self.config.batch_size

    @property
    def iteration(self) -> int:
        return self.first_iteration + self.step

    @property
    def inner(self) -> Any:
        """The objective without what talks to other processes."""
        return getattr(self.objective, "module", self.objective)

    def loss(self, losses: Sequence[float] | np.ndarray) -> float:
        """The loss of mean losses off and on the boundary."""
        return float(losses[0] + getattr(self.config, "boundary_weight", 0.0) * losses[1])

    def settle(self) -> None:
        """Wait until averages and moments that live on the host are there."""
        if isinstance(self.optimizer, PiecewiseOptimizer):
            self.optimizer.settle()

    def average(self, index: int = 0) -> Precond:
        """A copy of the student with the weights of one of its averages, in eval mode."""
        self.settle()
        values = self.emas[index].average
        net = copy.deepcopy(self.student)
        for parameter, value in zip(net.parameters(), values, strict=True):
            parameter.detach().copy_(value)
        net.info = self.info()
        return net.eval().requires_grad_(False)

    def info(self) -> dict[str, Any]:
        """What a network file says of its training."""
        return {
            "phase": self.name,
            "t_prime": getattr(self.config, "t_prime", None),
            "images": self.images,
            "iterations": self.iteration,
        }

    def counters(self) -> dict[str, Any]:
        """What a checkpoint keeps of the phase besides tensors."""
        return {
            "step": self.step,
            "first_iteration": self.first_iteration,
            "seconds": self.seconds,
            "skips": self.skips,
            "rollbacks": self.rollbacks,
            "rate_factor": self.rate_factor,
            "widest_spread": self.widest_spread,
            "streak": self.watch.streak,
            "scaler": self.scaler.state_dict(),
        }

    def restore_counters(self, state: dict[str, Any]) -> None:
        """Take over what `counters` gave."""
        self.step, self.first_iteration = state["step"], state["first_iteration"]
        self.seconds, self.skips = state["seconds"], state.get("skips", 0)
        self.rollbacks = state.get("rollbacks", 0)
        self.rate_factor = state.get("rate_factor", 1.0)
        self.widest_spread = state.get("widest_spread", 0.0)
        self.watch.streak = state.get("streak", 0)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def lower(self, what: str, factor: float) -> str:
        """Lower the learning rate or the loss scale for good; says what it is now."""
        if what == "scale" and self.scaler.is_enabled():
            state = self.scaler.state_dict()
            state["scale"] *= factor
            self.scaler.load_state_dict(state)
            return f"the loss scale at {state['scale']:g}"
        self.rate_factor *= factor
        return f"the learning rate at {self.rate_factor:g} of its schedule"

    def take_step(self) -> torch.Tensor:
        """The optimizer's step from the gradients that are there, or none where they are not finite;
        returns their norm, on the device."""
        if isinstance(self.optimizer, FusedOptimizer):
            self.optimizer.step()
            return self.optimizer.grad_norm
        return self._take_torch_step()

    def _take_torch_step(self) -> torch.Tensor:
        assert not isinstance(self.scaler, LossScale)
        self.scaler.unscale_(self.optimizer)
        weights, clip = list(self.student.parameters()), self.config.grad_clip
        grads = [p.grad for p in weights if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if clip is not None:
            torch.nn.utils.clip_grads_with_norm_(weights, clip, norm, foreach=True)
        # Torch's optimizers cannot skip on the device. In a graph nothing can be asked of it: what a
        # gradient spoils there, a roll-back mends.
        if self.graphs is not None or bool(norm.isfinite()):
            try:
                self.scaler.step(self.optimizer)
            except torch.OutOfMemoryError:
                raise TrainingError(
                    f"{self.name}: out of memory in the optimizer's step, half of which may be done: go on "
                    "with --resume auto and more --micro-batches, or --memory auto"
                ) from None
            if self.graphs is None:
                self.move_averages()
        self.scaler.update()
        return norm

    def move_averages(self) -> None:
        """Move the averages towards the weights of a step that is about to be counted, where the
        optimizer does not."""
        size = self.config.batch_size
        for ema in self.emas:
            ema.update(self.iteration + 1, self.images + size, size)


@dataclass
class PhaseResult:
    """One row of the summary."""

    phase: str
    images: int
    seconds: float
    reports: dict[int | None, metrics.Report] = field(default_factory=dict)
    """Quality by number of sampling steps; None is a pre-trained network's Heun solver."""


def load_weights(student: Precond, previous: Precond, phase: str) -> None:
    """Start a phase from another network's weights, but for the log-variance that pre-training alone
    learns. ValueError where the networks differ."""
    ours, theirs = student.state_dict(), previous.state_dict()
    own = {name: ours[name] for name in student.log_variance_names()}
    unused = previous.pretraining_names()
    theirs = own | {n: v for n, v in theirs.items() if n in ours or n not in unused}
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


def named_averages(phase: Phase, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """An average's tensors by parameter name."""
    names = [name for name, _ in phase.student.named_parameters()]
    return dict(zip(names, values, strict=True))
