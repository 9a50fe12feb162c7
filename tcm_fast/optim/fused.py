"""The fused optimizer: all that happens to the weights in a step, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from tcm_fast.kernels._backend import extension_for
from tcm_fast.kernels.eight_bit import (
    TOP,
    can_be_packed,
    pack_8_bits_reference,
    packed_size,
    unpack_8_bits_reference,
)
from tcm_fast.kernels.fused_step import (
    StepControl,
    StepOptions,
    StepTable,
    StepTensors,
    fused_step,
    in_layout,
    store_step_options,
)
from tcm_fast.optim.base import TrainingOptimizer
from tcm_fast.optim.loss_scale import LossScale

TORCH_KINDS: dict[str, Any] = {
    "radam": torch.optim.RAdam,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
}

MOMENTS = {"fp32": torch.float32, "bf16": torch.bfloat16, "8bit": torch.uint8}
SMALL = 4096
"""Elements below which a tensor's moments stay fp32 where others' are 8-bit."""


class FusedOptimizer(TrainingOptimizer):
    """torch.optim's RAdam, Adam or AdamW together with what else happens to weights in a step:
    unscaling, skipping NaN/Inf gradients, clipping, EMAs, 16-bit copies. All of it in one pass over
    memory where the extension supports the parameters' device.

    State and parameter groups are those of the torch optimizer of that kind, so that state dicts go
    both ways; step counts are kept on the parameters' device. A step with a NaN/Inf gradient changes
    nothing and is counted in `skips`.

    Args:
        params: parameters or groups of them, dense, on one device.
        kind: "radam", "adam" or "adamw".
        lr, betas, eps, weight_decay: torch's; weight decay is L2 but for adamw.
        max_norm: clip the gradient's norm to this; None leaves it.
        emas: for each EMA a list of tensors like the parameters, in the order of all groups. Each step
            updates them in place by `ema_betas`.
        copies: a 16-bit tensor for each parameter, or None for those without; written here and in each
            step.
        normalized: for each parameter [out, ...] whether only the direction of its rows counts (Karras
            et al. 2024). Such a parameter's copy, 16-bit or fp32, is its `normalized_copy`, which the
            network computes with, and its gradient is with respect to that; a step takes it to the
            parameter and normalises the new rows in place, after the EMAs have seen them, as in EDM2.
            The first step takes them as they are.
        scale: of the loss, at first; None does not scale. `growth_interval`: steps until it doubles.
        moments: "bf16" keeps both in half the memory, "8bit" those of tensors of 4096 elements and more in
            a quarter (`kernels.eight_bit`), stochastically rounded by `seed` (below 2**32), the step and
            the element's place, so that they stay unbiased.

    Raises:
        ValueError: an option is out of range, EMAs or copies do not fit the parameters.
    """

    def __init__(
        self,
        params: Any,
        kind: str = "radam",
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float | None = None,
        max_norm: float | None = None,
        emas: Sequence[list[torch.Tensor]] = (),
        copies: Sequence[torch.Tensor | None] | None = None,
        normalized: Sequence[bool] | None = None,
        scale: float | None = None,
        growth_interval: int = 2000,
        moments: str = "fp32",
        seed: int = 0,
    ) -> None:
        if moments not in MOMENTS:
            raise ValueError(f"optimizer: moments must be fp32, bf16 or 8bit, got {moments}")
        if kind not in TORCH_KINDS:
            raise ValueError(f"optimizer: kind must be radam, adam or adamw, got {kind}")
        params = list(params)
        if not params:
            raise ValueError("optimizer: must have parameters, got none")
        first = params[0]
        if isinstance(first, dict):
            params = [{**group, "params": _as_list(group["params"])} for group in params]
            first = params[0]["params"][0]
        if isinstance(first, tuple):
            first = first[1]
        decay: dict[str, Any] = {} if weight_decay is None else {"weight_decay": weight_decay}
        model = TORCH_KINDS[kind](
            [torch.zeros(())],
            lr=lr,
            betas=betas,
            eps=eps,
            capturable=first.device.type == "cuda",
            **decay,
        )
        self.kind, self.stands_for = kind, type(model).__name__
        self.max_norm = math.inf if max_norm is None else max_norm
        self.control = StepControl.on(first.device, scale, interval=growth_interval, seed=seed)
        self._moments = moments
        self.loss_scale = LossScale(self.control)
        self.grad_norm = self.control.norm
        self._table, self._tensors = StepTable(), list[StepTensors]()
        super().__init__(params, model.defaults)
        own = [p for group in self.param_groups for p in group["params"]]
        for k, values in enumerate(emas):
            if len(values) != len(own):
                rule = f"emas[{k}] must be {len(own)} tensors, got {len(values)}"
                raise ValueError(f"optimizer: {rule}")
        if copies is not None and len(copies) != len(own):
            raise ValueError(f"optimizer: copies must be {len(own)} tensors, got {len(copies)}")
        if normalized is not None and len(normalized) != len(own):
            raise ValueError(f"optimizer: normalized must be {len(own)}, got {len(normalized)}")
        self.emas = emas
        self._copies = [None] * len(own) if copies is None else list(copies)
        self._normalized = [False] * len(own) if normalized is None else list(normalized)
        self._describe()
        self.write_copies()

    @property
    def skips(self) -> int:
        """Steps skipped for NaN/Inf gradients; waits for the device."""
        return int(self.control.skips.item())

    def _describe(self) -> None:
        """One StepTensors for each parameter, in the order of the groups."""
        owned = [(i, p) for i, group in enumerate(self.param_groups) for p in group["params"]]
        columns = list(zip(*self.emas, strict=True)) or [()] * len(owned)
        self._tensors = [
            StepTensors(p, emas=values, copy=copy, group=i, normalized=normalized)
            for (i, p), values, copy, normalized in zip(
                owned, columns, self._copies, self._normalized, strict=True
            )
        ]

    def _kind_of_moments(self, t: StepTensors) -> torch.dtype:
        """uint8 for moments of 8 bits."""
        if self._moments == "fp32":
            return t.param.dtype
        if self._moments == "8bit":
            moved = [x for x in (t.param, t.copy, *t.emas) if x is not None]
            wide = all(x.data_ptr() % 16 == 0 for x in moved)
            if not (wide and _may_pack(t.param.numel(), t.row)):
                return t.param.dtype
        return MOMENTS[self._moments]

    def state_dict(self) -> dict[str, Any]:
        """As torch's: moments of 8 bits in fp32. They become the same values again when loaded."""
        saved = super().state_dict()
        numbers = {p: k for k, p in enumerate(p for g in self.param_groups for p in g["params"])}
        for t in self._tensors:
            state = saved["state"].get(numbers[t.param], {})
            if any(_is_packed(state.get(key)) for key in TOP):
                of_param = {key: moment_as(state[key], torch.float32, t, key) for key in TOP}
                saved["state"][numbers[t.param]] = state | of_param
        return saved

    @torch.no_grad()
    def write_copies(self) -> None:
        """As the base's: the bits that a step leaves."""
        copied = [
            StepTensors(t.param, copy=t.copy, normalized=t.normalized)
            for t in self._tensors
            if t.copy is not None
        ]
        if copied:
            fused_step(copied, [StepOptions(0.0)], StepControl.on(copied[0].param.device))

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's. ValueError once emas, copies or normalized were given: these parameters have none."""
        if self._tensors:
            given = [t.copy is not None or t.normalized for t in self._tensors]
            if self.emas or any(given):
                raise ValueError(
                    "optimizer: a group must be there when emas, copies or normalized are given"
                )
            super().add_param_group(param_group)
            self._copies += [None] * len(self.param_groups[-1]["params"])
            self._normalized += [False] * len(self.param_groups[-1]["params"])
            self._describe()
        else:
            super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for name in ("amsgrad", "maximize", "differentiable"):
                if group.get(name):
                    raise ValueError(f"optimizer: {name} must be false, got {group[name]}")
            group["lr"] = float(group["lr"])
            group["betas"] = tuple(float(beta) for beta in group["betas"])
            group["capturable"] = group["params"][0].device.type == "cuda"
            for p in group["params"]:
                for key, value in self.state.get(p, {}).items():
                    if key == "step":
                        value = torch.as_tensor(value, dtype=torch.float32, device=p.device)
                        self.state[p][key] = value.clone()

    def _options(self) -> list[StepOptions]:
        return [
            StepOptions(
                lr=float(group["lr"]),
                betas=group["betas"],
                eps=group["eps"],
                weight_decay=group["weight_decay"],
                kind="radam" if self.kind == "radam" else "adam",
                decoupled=group["decoupled_weight_decay"],
            )
            for group in self.param_groups
        ]

    def _gather(self) -> None:
        """Bring the tensors' descriptions up to date with gradients and state."""
        for t in self._tensors:
            grad, state = t.param.grad, self.state.get(t.param)
            if grad is not None:
                if grad.is_sparse:
                    raise ValueError("optimizer: gradients must be dense, got a sparse one")
                kind = self._kind_of_moments(t)
                if not in_layout(grad, t.param) or (kind == torch.uint8 and grad.data_ptr() % 16):
                    grad = torch.empty_like(t.param).copy_(grad)
                if not state:  # all of it or, where memory is short, nothing
                    state = {"step": torch.zeros((), dtype=torch.float32, device=t.param.device)}
                    state |= {key: no_moment(t, kind) for key in TOP}
                    self.state[t.param] = state
            t.grad = grad
            if not state:
                t.step = t.exp_avg = t.exp_avg_sq = None
                continue
            for key in TOP:
                value = state[key]
                if value is not getattr(t, key):  # a loaded one is as it was saved
                    state[key] = value = moment_as(value, self._kind_of_moments(t), t, key)
                setattr(t, key, value)
            t.step = state["step"]

    def prepare(self, rate: float | None = None, ema_betas: Sequence[float] | None = None) -> None:
        super().prepare(rate, ema_betas)
        self._store_options()

    def _store_options(self) -> None:
        store_step_options(
            self._tensors,
            self._options(),
            self.control,
            ema_decays=self.ema_betas,
            max_norm=self.max_norm,
            table=self._table,
        )

    def capturing(self) -> AbstractContextManager[None]:
        """As the base's. ValueError where no step has been taken yet."""
        first = self._tensors[0].param
        fused = first.device.type == "cuda" and extension_for("fused_step", first.device)
        return self._table.capturing() if fused else nullcontext()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step, or skip it where a gradient is NaN/Inf."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._gather()
        self._update()
        # Autograd and whoever keeps casts of the weights see by the version that they have changed.
        torch.autograd.graph.increment_version([t.param for t in self._tensors])
        for t in self._tensors:
            t.grad = None  # or its memory would outlive zero_grad
        return loss

    def _update(self) -> None:
        """Everything that the gathered gradients change."""
        fused_step(
            self._tensors,
            self._options(),
            self.control,
            ema_decays=self.ema_betas,
            max_norm=self.max_norm,
            table=self._table,
        )


def _may_pack(numel: int, row: int = 0) -> bool:
    return numel >= SMALL and can_be_packed(numel, row)


def _is_packed(moment: Any) -> bool:
    return isinstance(moment, torch.Tensor) and moment.dtype == torch.uint8


def no_moment(t: StepTensors, kind: torch.dtype) -> torch.Tensor:
    """Zeros, for a parameter that has not taken a step."""
    if kind == torch.uint8:
        return torch.zeros(
            packed_size(t.param.numel(), t.row), dtype=torch.uint8, device=t.param.device
        )
    return torch.zeros_like(t.param, dtype=kind)


def moment_size(numel: int, moments: str) -> int:
    """Bytes of one moment of a parameter of so many elements, whose rows are not normalised."""
    if moments == "8bit":
        return packed_size(numel) if _may_pack(numel) else 4 * numel
    return numel * MOMENTS[moments].itemsize


def moment_as(value: torch.Tensor, kind: torch.dtype, t: StepTensors, key: str) -> torch.Tensor:
    """A moment (`key`: exp_avg or exp_avg_sq) of a parameter in another form, or as it is where it has that
    form. ValueError where it is not the parameter's."""
    row = t.row
    if _is_packed(value):
        size = packed_size(t.param.numel(), row)
        if value.shape != (size,):
            raise ValueError(
                f"optimizer: 8-bit {key} of a parameter {list(t.param.shape)} must be [{size}], got "
                f"{list(value.shape)}"
            )
        value = value.to(t.param.device)
        if kind == torch.uint8:
            return value
        value = unpack_8_bits_reference(value, t.param, TOP[key], row)
    if kind == torch.uint8:
        whole = torch.empty_like(t.param, dtype=torch.float32).copy_(value)
        return pack_8_bits_reference(whole, TOP[key], row)
    if value.dtype == kind and in_layout(value, t.param):
        return value
    return torch.empty_like(t.param, dtype=kind).copy_(value)


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)
