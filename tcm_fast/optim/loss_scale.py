"""The loss scale where the optimizer updates it on the device."""

from __future__ import annotations

from typing import Any

import torch

from tcm_fast.kernels.fused_step import StepControl


class LossScale:
    """The loss scale of a `FusedOptimizer`, which updates it in its step: torch.amp.GradScaler's methods
    and state dict."""

    def __init__(self, control: StepControl) -> None:
        self.control = control

    def is_enabled(self) -> bool:
        return self.control.scale is not None

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The loss whose gradients the optimizer divides by the scale again."""
        return loss if self.control.scale is None else loss * self.control.scale

    def get_scale(self) -> float:
        """The scale now; waits for the device."""
        return 1.0 if self.control.scale is None else self.control.scale.item()

    def state_dict(self) -> dict[str, Any]:
        control = self.control
        if control.scale is None or control.tracker is None:
            return {}
        return {
            "scale": control.scale.item(),
            "growth_factor": control.growth,
            "backoff_factor": control.backoff,
            "growth_interval": control.interval,
            "_growth_tracker": control.tracker.item(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what `state_dict` of this or of a GradScaler gave. ValueError where one has a
        scale and the other none."""
        control = self.control
        if bool(state) != self.is_enabled() or control.scale is None or control.tracker is None:
            if state or self.is_enabled():
                raise ValueError(f"loss scale: must be saved and in use alike, got {state}")
            return
        control.scale.fill_(state["scale"])
        control.tracker.fill_(state["_growth_tracker"])
        control.growth = state["growth_factor"]
        control.backoff = state["backoff_factor"]
        control.interval = state["growth_interval"]
