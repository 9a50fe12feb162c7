"""What one phase of a run changes or needs while it runs."""

from __future__ import annotations

import copy
import typing
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from tcm_fast.config import PhaseConfig
from tcm_fast.evaluation import metrics
from tcm_fast.networks import Precond
from tcm_fast.objectives.base import Objective
from tcm_fast.optim.base import TrainingOptimizer
from tcm_fast.optim.ema import Ema
from tcm_fast.optim.torch_optimizer import UnfinishedStepError
from tcm_fast.runtime.cuda_graphs import GraphCache
from tcm_fast.training.step_monitor import StepMetrics, StepMonitor


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
    optimizer: TrainingOptimizer
    emas: list[Ema]
    metrics: StepMetrics
    monitor: StepMonitor
    graphs: GraphCache | None = None
    """Captured steps; None where every step is started operation by operation."""
    step: int = 0
    """Optimizer steps of this phase."""
    first_iteration: int = 0
    """Iterations before this phase: stage 2 counts on from stage 1."""
    seconds: float = 0.0
    skips: int = 0
    """Steps so far that were skipped for a NaN or Inf loss or gradient."""
    cause: str = "the cause is not known"
    """Where NaN or Inf came from the last time."""
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
    def inner(self) -> Objective[Any]:
        """The objective without its DistributedDataParallel wrapper."""
        return typing.cast("Objective[Any]", getattr(self.objective, "module", self.objective))

    def ema_network(self, index: int = 0) -> Precond:
        """A copy of the student with the weights of one of its EMAs, in eval mode."""
        self.optimizer.wait()
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
            "t_prime": self.inner.lowest_time(self.config),
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
            "streak": self.monitor.streak,
            "reads": self.inner.reads(),
            "scaler": self.optimizer.loss_scale.state_dict(),
        }

    def restore_counters(self, state: dict[str, Any]) -> None:
        """Take over what `counters` gave."""
        self.step, self.first_iteration = state["step"], state["first_iteration"]
        self.seconds, self.skips = state["seconds"], state.get("skips", 0)
        self.rollbacks = state.get("rollbacks", 0)
        self.rate_factor = state.get("rate_factor", 1.0)
        self.widest_spread = state.get("widest_spread", 0.0)
        self.monitor.streak = state.get("streak", 0)
        if state["scaler"]:
            self.optimizer.loss_scale.load_state_dict(state["scaler"])

    def lower(self, what: str, factor: float) -> str:
        """Lower the learning rate or the loss scale for good; says what it is now."""
        scale = self.optimizer.loss_scale
        if what == "scale" and scale.is_enabled():
            state = scale.state_dict()
            state["scale"] *= factor
            scale.load_state_dict(state)
            return f"the loss scale at {state['scale']:g}"
        self.rate_factor *= factor
        return f"the learning rate at {self.rate_factor:g} of its schedule"

    def take_step(self) -> torch.Tensor:
        """The optimizer's step from the gradients that are there, or none where they are NaN/Inf; returns
        their norm, on the device. TrainingError where it cannot be repeated."""
        try:
            self.optimizer.step()
        except UnfinishedStepError as error:
            raise TrainingError(
                f"{self.name}: {error}: go on with --resume auto and more --micro-batches, or --memory auto"
            ) from None
        return self.optimizer.grad_norm


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


def named_ema(phase: Phase, values: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    """An EMA's tensors by parameter name."""
    names = [name for name, _ in phase.student.named_parameters()]
    return dict(zip(names, values, strict=True))
