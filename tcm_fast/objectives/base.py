"""What an objective is: everything that tells one phase of training from another.

The trainer, checkpoints, the sampler, planning and the command line ask an `Objective`, or its class
where there is no network yet; which phase it is they need not know. A phase of one's own is a
sub-class in `tcm_fast.objectives.OBJECTIVES` with a section of the configuration of the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import torch
from torch import nn

from tcm_fast.config import PhaseConfig
from tcm_fast.networks.precision import cast_weights, in_precision, is_derived
from tcm_fast.networks.precond import Precond, want_ones
from tcm_fast.objectives.batch import Batch
from tcm_fast.objectives.noise_levels import DISTRIBUTIONS, TimePlan

C = TypeVar("C", bound=PhaseConfig)


class Objective(nn.Module, Generic[C]):
    """A phase's loss, with the student as its only trainable sub-module.

    `frozen` is kept out of the module tree, so that neither the optimizer nor DistributedDataParallel
    nor a state dict sees it; below fp32, and where its rows are normalised, a copy of it is kept that is
    ready to compute with.

    Args:
        config: of the phase.
        student: the network to train.
        frozen: the second network of a phase that has one (`frozen_file`).
        dtype: in which the networks compute.

    Raises:
        ValueError: a frozen network that is missing or not needed, or what `check` refuses.
    """

    name: ClassVar[str]
    """Of the phase and of its section in the configuration."""
    is_consistency: ClassVar[bool] = True
    """Whether it trains a consistency function, sampled in few steps. Otherwise a denoiser, sampled by the
    Heun solver."""
    counts_on: ClassVar[bool] = True
    """Whether a consistency phase shares its schedule (of r/t, learning rate and EMA) with another one beside
    it: iterations are counted on from one to the next."""
    sampling_steps: ClassVar[tuple[int | None, ...]] = (1, 2)
    """Numbers of steps in which its samples are evaluated; None is the Heun solver's usual number."""
    frozen_file: ClassVar[str] = ""
    """What a checkpoint calls the frozen network; empty where there is none."""
    frozen_trains: ClassVar[bool] = False
    """Whether the frozen network is in train mode: dropout, with the student's masks."""
    needs: ClassVar[str] = ""
    """Which network it has to start from, for the user: "a teacher: train edm first"."""
    needs_denoiser: ClassVar[bool] = False
    """Whether that network may not be a consistency function."""
    time_share: ClassVar[float]
    """Of a run's time, relative to those of the other phases."""

    # ---- what is known from the configuration alone ---------------------------------------------

    @classmethod
    def distribution(cls, config: C) -> str:
        """Of the noise levels t, by its name in `noise_levels.DISTRIBUTIONS`."""
        raise NotImplementedError

    @classmethod
    def plan(
        cls,
        config: C,
        *,
        seed: int,
        images_seen: int,
        iteration: int = 0,
        iterations: int = 1,
        sigma_data: float = 0.5,
    ) -> TimePlan:
        """The TimePlan of images [images_seen, images_seen + batch_size) of a run.

        Args:
            seed: of the run and phase.
            images_seen: images before this step.
            iteration: optimizer steps before this one, counted on through stage 2.
            iterations: length of the run in optimizer steps (ict's schedule needs it).
            sigma_data: standard deviation of the data (the weighting may need it).

        Raises:
            ValueError: a batch too small for one boundary sample.
        """
        rng = np.random.Generator(np.random.Philox(key=np.array([seed, images_seen], np.uint64)))
        draw = DISTRIBUTIONS[cls.distribution(config)]
        t = draw(rng.random(config.batch_size), config, iteration, iterations)
        plan = TimePlan(
            t=t, r=None, delta=None, weighting=None, boundary=np.zeros(len(t), bool),
            share=np.full(len(t), 1 / len(t)), source=np.zeros(len(t), np.int8),
        )  # fmt: skip
        plan = cls.complete(plan, config, rng, iteration, iterations)
        return replace(plan, weighting=cls.weighting(plan, config, sigma_data))

    @classmethod
    def complete(
        cls, plan: TimePlan, config: C, rng: np.random.Generator, iteration: int, iterations: int
    ) -> TimePlan:
        """A plan of which t is known, with what else the phase needs."""
        return plan

    @classmethod
    def weighting(cls, plan: TimePlan, config: C, sigma_data: float) -> np.ndarray:
        """The weighting function of a plan's samples, float32 [B]."""
        raise NotImplementedError

    @classmethod
    def check(cls, config: C, student: Precond) -> None:
        """ValueError where the network cannot serve the phase."""

    @classmethod
    def lowest_time(cls, config: C) -> float | None:
        """The smallest noise level that the student is trained for; None for no such limit."""
        return None

    @classmethod
    def learns_variance(cls, config: C) -> bool:
        """Whether the network has a learned log-variance."""
        return False

    @classmethod
    def augments(cls, config: C) -> bool:
        """Whether images are augmented, and the network is told how."""
        return False

    @classmethod
    def bank_size(cls, config: C) -> int:
        """Images of the bank that each step comes with (`Batch.bank`); 0 for none."""
        return 0

    @classmethod
    def schedule(cls, config: C) -> dict[str, float]:
        """What a table of the recipe shows of the noise levels."""
        return {}

    @classmethod
    def note(cls, config: C) -> str:
        """What the log says when the phase begins; empty for nothing."""
        return ""

    @classmethod
    def smallest_gap(cls, config: C) -> float:
        """1 - r/t of the closest pair of noise levels; 0 where it is not known."""
        return 1.0

    @classmethod
    def with_gap(cls, config: C, gap: float) -> C:
        """The configuration whose pairs come no closer."""
        return config

    @classmethod
    def shortened(cls, config: C, rate: float, steps: int, share: float) -> dict[str, Any]:
        """Fields that change where the phase is shortened to so many steps.

        Args:
            rate: the learning rate for the new batch size and width.
            share: the new length in images over the old."""
        return {"lr": rate}

    @classmethod
    def continued(cls, config: C, before: Mapping[str, PhaseConfig]) -> C:
        """The configuration after the run's earlier phases: a schedule that goes on is theirs."""
        return config

    @classmethod
    def without_schedule(cls, config: C) -> C:
        """The configuration whose last steps are alike whatever the schedule: equal for equal work."""
        return config

    # ---- the loss -------------------------------------------------------------------------------

    def __init__(
        self,
        config: C,
        student: Precond,
        frozen: Precond | None = None,
        *,
        dtype: torch.dtype = torch.float32,
        split: bool = False,
    ) -> None:
        super().__init__()
        self.config, self.dtype, self.split = config, dtype, split
        self.student = student
        needs_frozen = bool(self.frozen_file)
        if needs_frozen != (frozen is not None):
            raise ValueError(
                f"objective: {self.name} {'needs a' if needs_frozen else 'has no'} frozen network"
            )
        self.check(config, student)
        if frozen is not None:
            frozen = in_precision(frozen, dtype, split=split)
            frozen.requires_grad_(False).train(self.frozen_trains)
        self._frozen = (frozen,)
        self.copies: list[torch.Tensor | None] | None = None
        """The weights that the student computes with, where the optimizer keeps them (`make_copies`)."""
        self.folded = False
        """Whether the optimizer takes the gradients of normalised rows as they are (`cast_weights`)."""
        self._derives = is_derived(student, dtype, split=split)
        self.apart = False
        """Gradients go to the weights one by one, where memory is short (`cast_weights`)."""
        self._cast: tuple[tuple[int, bool], dict[str, torch.Tensor]] | None = None

    @property
    def frozen(self) -> Precond | None:
        return self._frozen[0]

    def held(self) -> list[torch.Tensor]:
        """What lies on the device all the time beside the student: of the frozen network, to begin with."""
        frozen = self.frozen
        return [] if frozen is None else [*frozen.parameters(), *frozen.buffers()]

    def reads(self) -> dict[str, str]:
        """SHA-256 of the contents of each file that the loss reads, by the configuration's field: a
        checkpoint keeps them, and a resumed run has to read the same."""
        return {}

    def forward(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        """The batch's part of the step's loss (a scalar with a gradient), and of the mean loss off and
        on the boundary (two numbers for the log, [2])."""
        losses = self.losses(batch)
        return torch.dot(losses, batch.weights[0]), batch.weights[1:] @ losses.detach()

    def losses(self, batch: Batch) -> torch.Tensor:
        """The loss of each row, weighted for its noise level: [n]."""
        raise NotImplementedError

    def report(self, losses: np.ndarray, iteration: int) -> dict[str, float]:
        """What the log says of the mean losses off and on the boundary at an iteration, the loss first."""
        return {"loss": float(losses[0])}

    def forget_weights(self) -> None:
        """Let go of the derived weights, at the end of a step: they keep its autograd graph alive, and a
        step that failed must not lend them to the next."""
        self._cast = None

    def _weights(self) -> dict[str, torch.Tensor] | None:
        """The weights that the student computes with, derived when an optimizer has changed its own."""
        if not self._derives:
            return None
        state = (sum(p._version for p in self.student.parameters()), torch.is_grad_enabled())
        if self._cast is None or self._cast[0] != state:
            ready = cast_weights(
                self.student, self.dtype, self.copies, folded=self.folded, apart=self.apart,
                split=self.split,
            )  # fmt: skip
            self._cast = (state, ready)
        return self._cast[1]

    @property
    def append_ones(self) -> bool:
        """Whether images get a channel of ones with the noise (`precond.want_ones`)."""
        nets = [net for net in (self.student, self.frozen) if net is not None]
        return want_ones(nets, split=self.split)

    def _raw(
        self,
        net: Precond,
        x: torch.Tensor,
        batch: Batch,
        t: torch.Tensor,
        rows: slice,
        weights: dict[str, torch.Tensor] | None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Raw output of a network on some rows, with the rows' labels and dropout masks."""
        inputs, options = self._of_rows(x, batch, t, rows, weights)
        return net.raw(*inputs, augment_labels=augment_labels, **options)

    def _of_rows(
        self,
        x: torch.Tensor,
        batch: Batch,
        t: torch.Tensor,
        rows: slice,
        weights: dict[str, torch.Tensor] | None,
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What a network takes in on some rows: arguments of `Precond.raw`."""
        labels = None if batch.labels is None else batch.labels[rows]
        options = {"dropout_key": batch.key.select(rows), "weights": weights}
        options["with_ones"] = x.shape[1] == self.student.img_channels + 1
        return (x[rows], t[rows], labels), options
