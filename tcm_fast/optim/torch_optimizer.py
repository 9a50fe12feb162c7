"""torch's optimizers as a `TrainingOptimizer`, for where the extension is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from tcm_fast.optim.base import TrainingOptimizer
from tcm_fast.optim.ema import update_ema
from tcm_fast.optim.fused import TORCH_KINDS


class UnfinishedStepError(RuntimeError):
    """A step failed half-way: some of the weights may have changed, so it must not be repeated."""


class TorchOptimizer(TrainingOptimizer):
    """One of torch's optimizers, which comes after this class among the bases (`TORCH_OPTIMIZERS`) and
    gives name and state. Arguments are as `FusedOptimizer`'s.

    Args:
        capturable: keep step counts and learning rate on the device, for CUDA graphs.
    """

    loss_scale: torch.amp.GradScaler

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
        self._weights, self._owes_emas = list(params), False
        first = self._weights[0]
        constants |= {"lr": lr, "capturable": capturable, "foreach": True}
        super().__init__(self._weights, **constants)
        if capturable:  # where a graph reads it
            self.param_groups[0]["lr"] = torch.tensor(lr, device=first.device)
        self.grad_norm = torch.zeros((), dtype=first.dtype, device=first.device)
        self.loss_scale = torch.amp.GradScaler(
            first.device.type,
            init_scale=scale or 1.0,
            growth_interval=growth_interval,
            enabled=scale is not None,
        )

    def prepare(self, rate: float | None = None, ema_betas: Sequence[float] | None = None) -> None:
        super().prepare(rate, ema_betas)
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
        """The EMAs, whose decays change, unless `step` itself has run since `prepare`."""
        if self._owes_emas:
            self._update_emas()

    def _update_emas(self) -> None:
        for values, beta in zip(self.emas, self.ema_betas, strict=True):
            update_ema(values, self._weights, beta)


TORCH_OPTIMIZERS: dict[str, type[TorchOptimizer]] = {
    kind: type(base.__name__, (TorchOptimizer, base), {}) for kind, base in TORCH_KINDS.items()
}
