"""Small parameters' gradients are left by sample where they arise, and summed over the batch in one pass for
all of them instead of one for each layer."""

from __future__ import annotations

from typing import Any

import torch

from tcm_fast.kernels._triton import runs_triton
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


def by_sample(model: RawNetwork, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """The `by_sample_names` of a raw network for a training pass over x [N,C,H,W]: by name their parameters,
    in fp32 also where others compute in 16 bits, expanded to [N, ...]. Empty where nothing is gained: without
    the GPU's kernels, without a gradient, in a pass that is compiled or transformed."""
    if (
        not torch.is_grad_enabled()
        or x.shape[0] == 0
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not runs_triton("residual", x.device.type)
    ):
        return {}
    parameters, names = dict(model.named_parameters()), model.by_sample_names()
    if not any(parameters[name].requires_grad for name in names):
        return {}
    expanded = _Expand.apply(x.shape[0], *(parameters[name] for name in names))
    return dict(zip(names, expanded, strict=True))
