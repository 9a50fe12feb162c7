"""torch's optimizers with the methods of a `FusedOptimizer`, for where the extension is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tcm_fast.optim.ema import update_ema
from tcm_fast.optim.fused import TORCH_KINDS


class UnfinishedStepError(RuntimeError):
    """A step failed half-way: some of the weights may have changed, so it must not be repeated."""


class TorchOptimizer(torch.optim.Optimizer):
    """What a step does besides torch's update: unscaling, skipping NaN/Inf gradients, clipping, EMAs.

    Each class of `TORCH_OPTIMIZERS` is this one before one of torch's, whose name and state it has.
    Arguments and methods are as `FusedOptimizer`'s.

    Args:
        capturable: keep step counts and learning rate on the device, for CUDA graphs.
    """

    def __init__(
        self,
        params: Iterable[torch.nn.Parameter],
        *,
        lr: float,
        max_norm: float | None = None,
        emas: Sequence[list[torch.Tensor]] = (),
        scale: float | None = None,
        growth_interval: int = 2000,
        capturable: bool = False,
        **constants: Any,
    ) -> None:
        self.max_norm, self.emas = max_norm, emas
        self.ema_betas: Sequence[float] = ()
        self._weights, self._owes_emas = list(params), False
        first = self._weights[0]
        constants["lr"] = torch.tensor(lr, device=first.device) if capturable else lr
        super().__init__(self._weights, capturable=capturable, foreach=True, **constants)  # type: ignore[call-arg]
        self.grad_norm = torch.zeros((), dtype=first.dtype, device=first.device)
        self.loss_scale = torch.amp.GradScaler(
            first.device.type,
            init_scale=scale or 1.0,
            growth_interval=growth_interval,
            enabled=scale is not None,
        )

    def prepare(self, rate: float | None = None, ema_betas: Sequence[float] | None = None) -> None:
        """What the host has to do before each step: set learning rate and EMA decays."""
        if ema_betas is not None:
            self.ema_betas = ema_betas
        for group in self.param_groups:
            if rate is not None and isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)  # in place: a graph reads it there
            elif rate is not None:
                group["lr"] = rate
        self._owes_emas = True

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """Take a step, or skip it where a gradient is NaN/Inf.

        Raises:
            UnfinishedStepError: out of memory.
        """
        self.loss_scale.unscale_(self)
        grads = [p.grad for p in self._weights if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads, foreach=True)
        if self.max_norm is not None:
            torch.nn.utils.clip_grads_with_norm_(self._weights, self.max_norm, norm, foreach=True)
        self.grad_norm.copy_(norm)
        # A graph cannot ask the device: there a NaN/Inf gradient spoils the weights, until a roll-back.
        in_graph = self.grad_norm.is_cuda and torch.cuda.is_current_stream_capturing()
        if in_graph or bool(norm.isfinite()):
            try:
                super().step()
            except torch.OutOfMemoryError:
                raise UnfinishedStepError(
                    "out of memory in the optimizer's step, half of which may be done"
                ) from None
            if not in_graph:
                self._update_emas()
        self._owes_emas &= in_graph
        self.loss_scale.update()

    def after_replay(self) -> None:
        """Call this after a CUDA graph has replayed a step: the EMAs, whose decays change, are updated
        here, unless `step` has run since `prepare`."""
        if self._owes_emas:
            self._update_emas()

    def _update_emas(self) -> None:
        for values, beta in zip(self.emas, self.ema_betas, strict=True):
            update_ema(values, self._weights, beta)

    def capturing(self) -> AbstractContextManager[None]:
        """Enter this around the capture of a CUDA graph that contains one `step`."""
        return nullcontext()

    def write_copies(self) -> None:
        """For weights that somebody else has changed: there are no copies."""

    def wait(self) -> None:
        """Wait until moments and EMAs in host memory are those of the last step: here there are none."""


TORCH_OPTIMIZERS: dict[str, type[TorchOptimizer]] = {
    kind: type(base.__name__, (TorchOptimizer, base), {}) for kind, base in TORCH_KINDS.items()
}
