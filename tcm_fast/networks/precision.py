"""16-bit arithmetic with fp32 islands: which weights are cast to the compute dtype, and when.

Convolutions and linear layers compute in 16 bits. The time embedding, every normalisation and the
softmax stay in fp32, and so do the weights that an optimizer sees: the network runs on copies, cast
once per optimizer step, and their gradients arrive in fp32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from tcm_fast.networks.precond import Precond

ISLANDS = ("map_",)  # the embedding of noise level and class


def cast_names(model: nn.Module) -> list[str]:
    """The parameters that compute in 16 bits, by their names in the raw network."""
    return [
        f"{path}.{name}"
        for path, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear) and not path.startswith(ISLANDS)
        for name, _ in module.named_parameters(recurse=False)
    ]


class _Cast(torch.autograd.Function):
    """Casts a list of tensors, in a few launches each way."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        return tuple(_cast(list(weights), [dtype] * len(weights)))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        there = [(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        wide = iter(_cast([g for g, _ in there], [dtype for _, dtype in there]))
        return None, *[None if g is None else next(wide) for g in grads]


def _cast(tensors: list[torch.Tensor], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    out = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    if out:
        torch._foreach_copy_(out, tensors)
    return out


def cast_weights(net: Precond, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Copies in `dtype` of the weights that compute in 16 bits, by their names in `net.model`; a
    gradient with respect to a copy flows to its parameter in fp32."""
    names = cast_names(net.model)
    parameters = dict(net.model.named_parameters())
    copies = _Cast.apply(dtype, *[parameters[name] for name in names])
    return dict(zip(names, copies, strict=True))


@torch.no_grad()
def in_precision(net: Precond, dtype: torch.dtype) -> Precond:
    """A copy of a network for inference in `dtype`: cast weights in place of the wide ones. `net`
    itself for fp32."""
    if dtype == torch.float32:
        return net
    copied = copy.deepcopy(net).requires_grad_(False)
    modules = dict(copied.model.named_modules())
    for name in cast_names(copied.model):
        path, _, leaf = name.rpartition(".")
        parameter = getattr(modules[path], leaf)
        parameter.data = parameter.data.to(dtype)
    return copied
