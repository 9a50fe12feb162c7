"""Memory and work counted by dispatch, while operations run or as they would run on the meta device."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, register_flop_formula

from tcm_fast.kernels import (  # noqa: F401  defines the operators
    conv_bf16x3,
    posterior_mean,
    qkv_attention,
    residual_conv1x1,
)
from tcm_fast.kernels._common import layout_of


class Counter(TorchDispatchMode):
    """Follows every tensor that is made inside, by its storage, and every operation.

    Attributes:
        live, peak: bytes now, and at most so far.
        grads, peak_grads: of these, in tensors handed to `is_gradient`.
        work: (floating-point operations, bytes read and written) of every operation.

    Args:
        known: tensors that were there before and do not count.
    """

    def __init__(self, known: Iterable[torch.Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.grads = self.peak_grads = 0
        self.work: list[tuple[float, int]] = []
        self._sizes: dict[int, tuple[Any, int, bool]] = {}
        for tensor in known:
            storage = tensor.untyped_storage()
            self._sizes[storage._cdata] = storage, 0, False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func is torch.ops.aten.convolution.default and out.device.type == "meta":
            # The meta device leaves it contiguous where a GPU's library goes by its arguments.
            is_last = torch.channels_last in map(layout_of, args[:2])
            out = out.contiguous(memory_format=torch.channels_last) if is_last else out
        made = [x for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        for tensor in made:
            self._see(tensor)
        self.note(func, args, kwargs, out, given, made)
        return out

    def note(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        out: Any,
        given: list[torch.Tensor],
        made: list[torch.Tensor],
    ) -> None:
        """An operation has run: its arguments and results, and the tensors among them."""
        if func._schema.is_mutable or not _shares_storage(made, given):
            count = flop_registry.get(func._overloadpacket)
            flops = count(*args, **kwargs, out_val=out) if count else 0
            self.work.append((flops, sum(_bytes(x) for x in (*made, *given))))

    def _see(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._sizes:
            size = storage.nbytes()
            gone = functools.partial(_forget, weakref.ref(self), key)
            self._sizes[key] = weakref.ref(storage, gone), size, False
            self.live += size
            if self.live > self.peak:
                self.peak, self.peak_grads = self.live, self.grads

    def forget(self, key: int) -> None:
        """A storage's memory was given back."""
        _, size, is_gradient = self._sizes.pop(key)
        self.live -= size
        self.grads -= size * is_gradient

    def is_gradient(self, tensor: torch.Tensor) -> None:
        """Count a tensor that was made inside as a gradient from now on."""
        key = tensor.untyped_storage()._cdata
        ref, size, known = self._sizes.get(key, (None, 0, True))
        if not known:
            self._sizes[key] = ref, size, True
            self.grads += size


def _forget(counter: weakref.ref[Counter], key: int, _: Any) -> None:
    alive = counter()
    if alive is not None:
        alive.forget(key)


def _shares_storage(made: list[torch.Tensor], given: list[torch.Tensor]) -> bool:
    theirs = {x.untyped_storage()._cdata for x in given}
    return any(x.untyped_storage()._cdata in theirs for x in made)


def _bytes(x: torch.Tensor) -> int:
    return x.numel() * x.element_size()


def _attention_flops(qkv: Sequence[int], products: int) -> int:
    n, channels, height, width = qkv
    return products * 2 * n * (height * width) ** 2 * channels // 3


@register_flop_formula(torch.ops.tcm_fast.qkv_attention_fwd)
def _(qkv: Sequence[int], *_: Any, **__: Any) -> int:
    return _attention_flops(qkv, 2)


@register_flop_formula(torch.ops.tcm_fast.qkv_attention_bwd)
def _(grad_out: Sequence[int], qkv: Sequence[int], *_: Any, **__: Any) -> int:
    """Four gradients; that a kernel which keeps no weights computes them anew is not counted."""
    return _attention_flops(qkv, 4)


@register_flop_formula(torch.ops.tcm_fast.posterior_mean)
def _(x_t: Sequence[int], t: Any, own: Any, bank: Sequence[int], *_: Any, **__: Any) -> int:
    """A product with the bank for the distances and one for the mean; that a kernel takes each in three parts
    is not counted."""
    n, *image = x_t
    return 2 * 2 * n * bank[0] * math.prod(image)


# The convolution that is asked for, once: the rates of `Card` and `Ceilings` count so.


@register_flop_formula(torch.ops.tcm_fast.conv_bf16x3_fwd)
def _(x: Sequence[int], weight: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(weight) * x[0] * x[2] * x[3]


@register_flop_formula(torch.ops.tcm_fast.residual_conv1x1_fwd)
def _(
    x: Sequence[int], skip: Sequence[int], second: Any, weight: Sequence[int], *_: Any, **__: Any
) -> int:
    return 2 * math.prod(weight) * skip[0] * skip[2] * skip[3]


@register_flop_formula(torch.ops.tcm_fast.conv_bf16x3_input_bwd)
def _(grad_out: Sequence[int], parts: Sequence[int], *_: Any, **__: Any) -> int:
    return 2 * math.prod(parts[1:]) * grad_out[0] * grad_out[2] * grad_out[3]


@register_flop_formula(torch.ops.tcm_fast.conv_bf16x3_weight_bwd)
def _(grad_out: Sequence[int], x: Sequence[int], size: int, **_: Any) -> int:
    return 2 * math.prod(grad_out) * x[1] * size**2
