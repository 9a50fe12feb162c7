"""Small gradients are left by sample, or by part of one, where they arise, and summed in one pass for all
layers instead of one for each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from tcm_fast.kernels._triton import runs_triton
from tcm_fast.kernels.modulate_mp_silu import GAIN_PARTS, parts_for
from tcm_fast.networks.raw_network import RawNetwork


class _Expand(torch.autograd.Function):
    """Each parameter for each of n samples: views [n, ...] without memory of their own. Whoever takes one in
    hands back its gradient by sample."""

    @staticmethod
    def forward(n: int, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(p.expand(n, *p.shape) for p in parameters)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        found = [g.flatten(1) if g.ndim > 1 else g[:, None] for g in grads if g is not None]
        if not found:
            return None, *grads
        sums = iter(torch.cat(found, 1).sum(0).split([g.shape[1] for g in found]))
        return None, *(None if g is None else next(sums).view(g.shape[1:]) for g in grads)


class _InParts(torch.autograd.Function):
    """Each block's columns of scales [N,C], and its gain, expanded as `modulate_mp_silu` takes them to leave
    their gradients in parts."""

    @staticmethod
    def forward(
        widths: list[int], scales: torch.Tensor, *gains: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        n = len(scales)
        parts = parts_for(n)
        return (
            *(s[:, None].expand(-1, parts, -1) for s in scales.split(widths, 1)),
            *(gain.expand(n, parts, GAIN_PARTS) for gain in gains),
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.blocks = len(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scales, gains = grads[: ctx.blocks], grads[ctx.blocks :]
        return None, torch.cat(scales, 2).sum(1), *torch.stack(gains).sum((1, 2, 3)).unbind()


def scales_and_gains(
    scales: torch.Tensor, widths: list[int], gains: list[torch.Tensor]
) -> tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]:
    """For each block its columns of scales [N,C] and its gain, as `modulate_mp_silu` takes them: expanded in
    a training pass on a GPU, so that one pass sums the gradients of all blocks."""
    if not _is_worth_it(scales):
        return scales.split(widths, 1), gains
    both = _InParts.apply(widths, scales, *gains)
    return both[: len(widths)], both[len(widths) :]


def _is_worth_it(x: torch.Tensor) -> bool:
    """False without the GPU's kernels, without a gradient, in a pass that is compiled or transformed."""
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and x.shape[0] > 0
        and runs_triton("residual", x.device.type)
    )


def by_sample(
    model: RawNetwork, x: torch.Tensor, also: Sequence[str] = ()
) -> dict[str, torch.Tensor]:
    """The `by_sample_names` of a raw network, and `also` others, for a training pass over x [N,C,H,W]: by
    name their parameters, expanded to [N, ...], in fp32 also where others compute, or the network is, in 16
    bits. Empty where nothing is gained."""
    if not _is_worth_it(x):
        return {}
    parameters, names = dict(model.named_parameters()), [*model.by_sample_names(), *also]
    chosen = [parameters[name] for name in names]
    if not any(p.requires_grad for p in chosen):
        return {}
    wide = [p.to(torch.promote_types(p.dtype, torch.float32)) for p in chosen]
    expanded = _Expand.apply(x.shape[0], *wide)
    return dict(zip(names, expanded, strict=True))
