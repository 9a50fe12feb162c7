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
    """Casts a list of tensors, or stands for casts that are there already, and casts the gradients back:
    a few launches each way."""

    @staticmethod
    def forward(
        ctx: Any,
        dtype: torch.dtype,
        copies: list[torch.Tensor] | None,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        if copies is not None:
            return tuple(copy.detach() for copy in copies)
        return tuple(_cast(list(weights), [dtype] * len(weights)))

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        there = [(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        wide = iter(_cast([g for g, _ in there], [dtype for _, dtype in there]))
        return None, None, *[None if g is None else next(wide) for g in grads]


def _cast(tensors: list[torch.Tensor], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    out = [torch.empty_like(t, dtype=dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
    if out:
        torch._foreach_copy_(out, tensors)
    return out


def make_copies(net: Precond, dtype: torch.dtype) -> list[torch.Tensor | None]:
    """For each parameter of `net`, in their order, its value in `dtype`, or None where it stays fp32:
    what an optimizer keeps up to date."""
    names = {f"model.{name}" for name in cast_names(net.model)}
    return [
        parameter.detach().to(dtype) if name in names else None
        for name, parameter in net.named_parameters()
    ]


def cast_weights(
    net: Precond, dtype: torch.dtype, copies: list[torch.Tensor | None] | None = None
) -> dict[str, torch.Tensor]:
    """Copies in `dtype` of the weights that compute in 16 bits, by their names in `net.model`; a
    gradient with respect to a copy flows to its parameter in fp32. `copies` (`make_copies`) are used
    where somebody keeps them up to date."""
    parameters = dict(net.model.named_parameters())
    names = cast_names(net.model)
    there = None
    if copies is not None:
        order = [name for name, _ in net.named_parameters()]
        found = dict(zip(order, copies, strict=True))
        there = [found[f"model.{name}"] for name in names]
    cast = _Cast.apply(dtype, there, *[parameters[name] for name in names])
    return dict(zip(names, cast, strict=True))


def leaf_copies(net: Precond, copies: list[torch.Tensor | None]) -> dict[str, torch.Tensor]:
    """The copies of `make_copies` by their names in `net.model`, as leaves: a gradient stays at the copy,
    in its dtype."""
    return {
        name.removeprefix("model."): copy.requires_grad_()
        for (name, _), copy in zip(net.named_parameters(), copies, strict=True)
        if copy is not None
    }


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
