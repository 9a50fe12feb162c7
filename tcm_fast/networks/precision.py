"""The weights that a step computes with, derived from those that an optimizer sees once per optimizer
step: 16-bit copies, the normalised rows of EDM2's layers, and the bf16 parts of fp32 convolutions.

Convolutions and linear layers compute in 16 bits. The time embedding, every normalisation and the
softmax stay in fp32, and so do the weights that an optimizer sees; gradients arrive there in fp32.
"""

from __future__ import annotations

import copy
from typing import Any

import torch

from tcm_fast.kernels.conv_bf16x3 import split_weight
from tcm_fast.kernels.normalized_copy import normalized_copy, projected_gradient
from tcm_fast.networks.layers import Conv2d
from tcm_fast.networks.mp_layers import MPConv, side_by_side
from tcm_fast.networks.precond import Precond
from tcm_fast.networks.raw_network import RawNetwork


class _Derive(torch.autograd.Function):
    """From a list of weights those to compute with, or stands for ones that are there already; hands
    the gradients back in the weights' dtype.

    rows: which of them are scaled rows (`normalized_copy`). there: those that exist already, else None.
    folded: whoever receives the gradient of such a weight takes it with respect to the scaled one (the
    fused optimizer projects it in its own pass).
    """

    @staticmethod
    def forward(
        ctx: Any,
        dtypes: list[torch.dtype],
        rows: list[bool],
        there: list[torch.Tensor | None],
        folded: bool,
        *weights: torch.Tensor,
    ) -> tuple[torch.Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtypes = [weight.dtype for weight in weights]
        # Not by save_for_backward: the micro-batches of a step go backward through this one after
        # another, and the first one would free them.
        ctx.unfolded = [
            w.detach() if is_row and not folded else None
            for w, is_row in zip(weights, rows, strict=True)
        ]
        wanted = [
            (normalized_copy(w) if is_row else w, dtype)
            for w, is_row, dtype, ready in zip(weights, rows, dtypes, there, strict=True)
            if ready is None
        ]
        made = iter(_cast([w for w, _ in wanted], [dtype for _, dtype in wanted]))
        return tuple(next(made) if ready is None else ready.detach() for ready in there)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
        found = [(g, dtype) for g, dtype in zip(grads, ctx.dtypes, strict=True) if g is not None]
        wide = iter(_cast([g for g, _ in found], [dtype for _, dtype in found]))
        out = [None if g is None else next(wide) for g in grads]
        for i, (grad, weight) in enumerate(zip(out, ctx.unfolded, strict=True)):
            if grad is not None and weight is not None:
                out[i] = projected_gradient(grad, weight)
        return None, None, None, None, *out


def _cast(tensors: list[torch.Tensor], dtypes: list[torch.dtype]) -> list[torch.Tensor]:
    """Copies in other dtypes; what has the right one already is itself."""
    out = [
        t if t.dtype == dtype else torch.empty_like(t, dtype=dtype)
        for t, dtype in zip(tensors, dtypes, strict=True)
    ]
    moved = [(a, b) for a, b in zip(out, tensors, strict=True) if a is not b]
    # One that lies apart would send all through launches of their own.
    together = [(a, b) for a, b in moved if a.stride() == b.stride()]
    if together:
        torch._foreach_copy_([a for a, _ in together], [b for _, b in together])
    for a, b in moved:
        if a.stride() != b.stride():
            a.copy_(b)
    return out


def _derived(model: RawNetwork, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The parameters of the raw network that a step computes with in another form, and its dtype."""
    narrow = set() if dtype == torch.float32 else set(model.cast_names())
    rows = set(model.normalized_names())
    return {
        name: dtype if name in narrow else torch.promote_types(parameter.dtype, torch.float32)
        for name, parameter in model.named_parameters()
        if name in narrow or name in rows
    }


def make_copies(
    net: Precond, dtype: torch.dtype, *, rows_too: bool = True
) -> list[torch.Tensor | None]:
    """For each parameter of `net`, in their order, what a step in `dtype` computes with, or None where
    that is the parameter itself: what an optimizer keeps up to date. `rows_too=False` leaves out the
    normalised ones, for an optimizer that does not normalise."""
    derived = {f"model.{name}": kind for name, kind in _derived(net.model, dtype).items()}
    copies: dict[str, torch.Tensor | None] = {}
    named = zip(net.named_parameters(), normalized_parameters(net), strict=True)
    for (name, parameter), is_row in named:
        value = None
        if name in derived and (rows_too or not is_row):
            value = parameter.detach()
            value = normalized_copy(value) if is_row else value
            value = value.to(derived[name], copy=True)
        copies[name] = value
    names = [f"model.{name}" for name in net.model.joined_names()]
    matrices = [copy for copy in map(copies.get, names) if copy is not None]
    if len(matrices) == len(names):
        copies |= zip(names, side_by_side(matrices), strict=True)
    return list(copies.values())


def normalized_parameters(net: Precond) -> list[bool]:
    """For each parameter of `net`, in their order, whether it is one of the network's `normalized_names`."""
    rows = {f"model.{name}" for name in net.model.normalized_names()}
    return [name in rows for name, _ in net.named_parameters()]


def cast_weights(
    net: Precond,
    dtype: torch.dtype,
    copies: list[torch.Tensor | None] | None = None,
    *,
    folded: bool = False,
    apart: bool = False,
    split: bool = False,
) -> dict[str, torch.Tensor]:
    """The weights that a step in `dtype` computes with, by the names under which `net.model` takes them
    (`Precond.raw`); a gradient with respect to one flows to its parameter in fp32.

    Args:
        copies: such weights (`make_copies`) that somebody keeps up to date; the others are made.
        folded: gradients of normalised weights arrive as they are, for an optimizer that projects them.
        apart: each weight by itself, in as many more launches: a gradient goes to its parameter when it
            is there, and not when all are, which takes two or three times the gradients' memory.
        split: also the parts of the weights of fp32 convolutions, for `conv_bf16x3`.
    """
    parameters = dict(net.model.named_parameters())
    derived, rows = _derived(net.model, dtype), set(net.model.normalized_names())
    there: list[torch.Tensor | None] = [None] * len(derived)
    if copies is not None:
        order = [name for name, _ in net.named_parameters()]
        found = dict(zip(order, copies, strict=True))
        there = [found[f"model.{name}"] for name in derived]
    given = list(zip(derived, derived.values(), there, strict=True))
    ready: list[torch.Tensor] = []
    for part in [[one] for one in given] if apart else [given]:
        ready += _Derive.apply(
            [kind for _, kind, _ in part], [name in rows for name, _, _ in part],
            [t for _, _, t in part], folded, *[parameters[name] for name, _, _ in part],
        )  # fmt: skip
    names = [f"{name.removesuffix('weight')}scaled" if name in rows else name for name in derived]
    weights = dict(zip(names, ready, strict=True))
    if split:
        assert dtype == torch.float32
        for path, module in net.model.named_modules():
            if isinstance(module, Conv2d | MPConv) and module.can_split:
                name = f"{path}.weight"
                weight = weights.get(f"{path}.scaled", getattr(module, "scaled", None))
                weights[f"{path}.parts"] = split_weight(
                    parameters[name] if weight is None else weight
                )
    return weights


def is_derived(net: Precond, dtype: torch.dtype, *, split: bool = False) -> bool:
    """Whether a step in `dtype`, with split convolutions or not, computes with other weights than the
    parameters."""
    return split or bool(_derived(net.model, dtype))


@torch.no_grad()
def in_precision(net: Precond, dtype: torch.dtype, *, split: bool = False) -> Precond:
    """A copy of a network for inference in `dtype`: derived weights in place of the wide ones, and beside
    them the parts of `split` convolutions. `net` itself where there are none."""
    if not is_derived(net, dtype, split=split):
        return net
    copied = copy.deepcopy(net).requires_grad_(False)
    modules = dict(copied.model.named_modules())
    weights = cast_weights(copied, dtype, make_copies(copied, dtype), split=split)
    for name, tensor in weights.items():
        path, _, leaf = name.rpartition(".")
        if leaf == "parts":
            modules[path].parts = tensor
            continue
        if leaf == "scaled":
            modules[path].scaled = tensor
            leaf = "weight"
        getattr(modules[path], leaf).data = tensor
    return copied
