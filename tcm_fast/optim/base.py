"""What every optimizer of this package can do, so that no caller asks which one it is."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from tcm_fast.optim.loss_scale import LossScale


class TrainingOptimizer(torch.optim.Optimizer):
    """An optimizer whose step unscales, skips NaN/Inf gradients, clips and updates EMAs too:

        prepare -> backward pass of loss_scale.scale(loss) -> step

    In a CUDA graph: capture inside `capturing()`; then `prepare`, replay and `after_replay`, each step.

    Attributes:
        emas: for each EMA a list of tensors like the parameters, in the order of all groups.
        ema_betas: the decay of each EMA in the next step.
        loss_scale: a GradScaler, or what has its methods.
        grad_norm: norm of the last gradient, unscaled and before clipping: scalar on the device.
    """

    emas: Sequence[list[torch.Tensor]] = ()
    ema_betas: Sequence[float] = ()
    loss_scale: LossScale | torch.amp.GradScaler
    grad_norm: torch.Tensor

    def prepare(self, rate: float | None = None, ema_betas: Sequence[float] | None = None) -> None:
        """What the host has to do before each step that is in a graph (outside of one, `step` does
        it too): set what changes from step to step, on the device as well.

        Args:
            rate: learning rate of all groups from here on.
            ema_betas: the decay of each EMA from here on.
        """
        if ema_betas is not None:
            self.ema_betas = ema_betas
        if rate is not None:
            for group in self.param_groups:
                if isinstance(group["lr"], torch.Tensor):
                    group["lr"].fill_(rate)  # in place: a graph reads it there
                else:
                    group["lr"] = rate

    def after_replay(self) -> None:
        """Call this after a graph has replayed a step, for what the graph leaves to the host."""

    def capturing(self) -> AbstractContextManager[None]:
        """Enter this around the capture of a CUDA graph that contains one `step`."""
        return nullcontext()

    def write_copies(self) -> None:
        """Make the 16-bit copies anew, where there are any, for weights that somebody else changed."""

    def wait(self) -> None:
        """Wait until moments and EMAs in host memory, where any are, are those of the last step: before
        they are read or written."""
