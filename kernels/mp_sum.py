"""EDM2's magnitude-preserving sum, with the clipping and the activation that follow it (Karras et al.
2024, equation 88): what a residual branch ends with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from tcm_fast.kernels._common import (
    DTYPES,
    MP_SILU,
    TILE,
    dense_like,
    forms,
    given,
    has_asm,
    laid_out,
    layout_of,
    meet,
    meet_reference,
    register,
    scaled_silu,
)
from tcm_fast.kernels._triton import Variant, launch, runs_triton, tl, triton

# -- reference ------------------------------------------------------------------------------------


def mp_sum_weights(t: float) -> tuple[float, float]:
    """What a and b are multiplied by: 1-t and t over √((1-t)² + t²)."""
    norm = math.hypot(1 - t, t)
    return (1 - t) / norm, t / norm


def mp_sum_reference(a, b, t=0.5, *, factors=(1.0, 1.0), clip=None, with_silu=False, twice=False):
    out, silu = _weighted_sum(a, b, *_weights(t, factors), clip, with_silu)
    return (out, silu, out) if twice else (out, silu)


def _weights(t, factors):
    return [weight * factor for weight, factor in zip(mp_sum_weights(t), factors, strict=True)]


def _weighted_sum(a, b, weight_a, weight_b, clip, with_silu):
    wide = torch.promote_types(a.dtype, torch.float32)
    out = a.to(wide) * weight_a + b.to(wide) * weight_b
    if clip is not None:
        out = out.clamp(-clip, clip)
    silu = (F.silu(out) / MP_SILU).to(a.dtype) if with_silu else None
    return out.to(a.dtype), silu


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def _mp_sum_fwd_kernel(
    a, b, out, h, size, weight_a, weight_b, clip,
    CLIPS: tl.constexpr, ACTIVATES: tl.constexpr, GAIN: tl.constexpr, ASM: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    va = tl.load(a + at, mask=inside, other=0).to(tl.float32)
    vb = tl.load(b + at, mask=inside, other=0).to(tl.float32)
    v = va * weight_a + vb * weight_b
    if CLIPS:
        # A NaN stays: it must reach the loss, so that the step is skipped.
        v = tl.minimum(v, clip, propagate_nan=tl.PropagateNan.ALL)
        v = tl.maximum(v, -clip, propagate_nan=tl.PropagateNan.ALL)
    tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)
    if ACTIVATES:
        tl.store(h + at, scaled_silu(v, GAIN, ASM).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _mp_sum_bwd_kernel(
    grad_out, grad_twin, grad_h, out, grad_a, grad_b, size, weight_a, weight_b, clip,
    CLIPS: tl.constexpr, HAS_PAST: tl.constexpr, HAS_TWIN: tl.constexpr, HAS_ACT: tl.constexpr,
    GAIN: tl.constexpr, ASM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grad_twin: a second gradient of the sum, which is read twice then."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    z = tl.zeros([BLOCK], tl.float32)
    if CLIPS or HAS_ACT:
        z = tl.load(out + at, mask=inside, other=0).to(tl.float32)
    grad = meet(z, grad_out, grad_h, at, inside, HAS_PAST, HAS_ACT, GAIN, ASM)
    if HAS_TWIN:
        grad += tl.load(grad_twin + at, mask=inside, other=0).to(tl.float32)
    if CLIPS:
        grad = tl.where(tl.abs(z) >= clip, 0.0, grad)
    tl.store(grad_a + at, (grad * weight_a).to(grad_a.dtype.element_ty), mask=inside)
    tl.store(grad_b + at, (grad * weight_b).to(grad_b.dtype.element_ty), mask=inside)


# -- launchers ------------------------------------------------------------------------------------

BLOCK = TILE // 2


def _grid(x):
    return (-(-x.numel() // BLOCK),)


def _constants(clip, asm):
    return dict(CLIPS=clip is not None, GAIN=1 / MP_SILU, ASM=asm, BLOCK=BLOCK, num_warps=4)


def _fwd(a, b, weight_a, weight_b, clip, with_silu):
    a, b = laid_out(layout_of(a), a, b)
    out = torch.empty_like(a)
    h = torch.empty_like(a) if with_silu else a.new_empty(0)
    launch(
        _mp_sum_fwd_kernel, _grid(a), a, b, out, h, a.numel(), weight_a, weight_b, clip or 0.0,
        ACTIVATES=with_silu, **_constants(clip, has_asm(a)),
    )  # fmt: skip
    return out, h


def _like(grad_out, grad_h, out):
    """What the gradients of a and b are like."""
    return next(v for v in (out, grad_out, grad_h) if v is not None)


def _bwd(grad_out, grad_h, out, weight_a, weight_b, clip, grad_twin=None):
    layout = layout_of(_like(grad_out, grad_h, out))
    grad_out, grad_twin, grad_h, out = laid_out(layout, grad_out, grad_twin, grad_h, out)
    like = grad_h if grad_out is None else grad_out
    grad_a, grad_b = torch.empty_like(like), torch.empty_like(like)
    launch(
        _mp_sum_bwd_kernel, _grid(like), *given(like, grad_out, grad_twin, grad_h, out), grad_a, grad_b,
        like.numel(), weight_a, weight_b, clip or 0.0, HAS_PAST=grad_out is not None,
        HAS_TWIN=grad_twin is not None, HAS_ACT=grad_h is not None,
        **_constants(clip, has_asm(like)),
    )  # fmt: skip
    return grad_a, grad_b


def specialisations(capability: int) -> list[Variant]:
    """The forms in which EDM2 uses the kernels; the widths do not matter."""
    variants = []
    scalars = {"size": "i32"} | dict.fromkeys(("weight_a", "weight_b", "clip"), "fp32")
    programs = 64 * 192 * 64**2 // BLOCK
    for dtype in DTYPES.values():
        for clip, activates in ((None, False), (256.0, False), (256.0, True)):
            site = f"{'plain' if clip is None else 'clip'}{' silu' if activates else ''} {dtype}"
            constants = _constants(clip, True)
            variants += forms(
                site, scalars, constants,
                (
                    _mp_sum_fwd_kernel,
                    dict.fromkeys(("a", "b", "out", "h"), dtype),
                    {"ACTIVATES": activates},
                ),
                (
                    _mp_sum_bwd_kernel,
                    dict.fromkeys(
                        ("grad_out", "grad_twin", "grad_h", "out", "grad_a", "grad_b"), dtype
                    ),
                    {"HAS_PAST": True, "HAS_TWIN": not activates, "HAS_ACT": activates},
                ),
                programs=programs, aligned=("size",),
            )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(a, b, weight_a, weight_b, clip, with_silu):
    out, h = laid_out(layout_of(a), *_weighted_sum(a, b, weight_a, weight_b, clip, with_silu))
    return out, h if with_silu else a.new_empty(0)


def _bwd_by_reference(grad_out, grad_h, out, weight_a, weight_b, clip, grad_twin=None):
    like = _like(grad_out, grad_h, out)
    grad = meet_reference(out, grad_out, grad_h)
    grad = grad if grad_twin is None else grad + grad_twin
    if clip is not None:
        grad = torch.where(out.abs() >= clip, 0, grad)
    return tuple(
        (grad * weight).to(like.dtype).contiguous(memory_format=layout_of(like))
        for weight in (weight_a, weight_b)
    )


def _fake_fwd(a, b, weight_a, weight_b, clip, with_silu):
    return dense_like(a), dense_like(a) if with_silu else a.new_empty(0)


def _fake_bwd(grad_out, grad_h, out, weight_a, weight_b, clip, grad_twin=None):
    like = _like(grad_out, grad_h, out)
    return dense_like(like), dense_like(like)


def _save(ctx, inputs, output):
    _, _, *ctx.weights, ctx.clip, ctx.with_silu = inputs
    out, h = output
    ctx.set_materialize_grads(False)
    if not ctx.with_silu:
        ctx.mark_non_differentiable(h)
    if ctx.with_silu or ctx.clip is not None:
        ctx.save_for_backward(out)


def _backward(ctx, grad_out, grad_h, grad_twin=None):
    grad_h = grad_h if ctx.with_silu else None  # AOT autograd hands in zeros
    if grad_out is None:
        grad_out, grad_twin = grad_twin, None
    if grad_out is None and grad_h is None:
        return (None,) * 6
    (out,) = ctx.saved_tensors or (None,)
    grads = torch.ops.tcm_fast.mp_sum_bwd(grad_out, grad_h, out, *ctx.weights, ctx.clip, grad_twin)
    return *grads, *(None,) * 4


class _Twice(torch.autograd.Function):
    """The operator with its sum a second time, at the end. (An operator of torch.library must not return one
    tensor twice.)"""

    @staticmethod
    def forward(a, b, weight_a, weight_b, clip, with_silu):  # dynamo counts the arguments
        out, h = torch.ops.tcm_fast.mp_sum_fwd(a, b, weight_a, weight_b, clip, with_silu)
        return out, h, out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output[:2])

    @staticmethod
    def backward(ctx, *grads):
        return _backward(ctx, *grads)


_fwd = register(
    "mp_sum_fwd(Tensor a, Tensor b, float weight_a, float weight_b, float? clip, bool with_silu) "
    "-> (Tensor, Tensor)",
    _fwd, _fwd_by_reference, _fake_fwd, save=_save, backward=_backward,
)  # fmt: skip
_bwd = register(
    "mp_sum_bwd(Tensor? grad_out, Tensor? grad_h, Tensor? out, float weight_a, float weight_b, "
    "float? clip, Tensor? grad_twin=None) -> (Tensor, Tensor)",
    _bwd, _bwd_by_reference, _fake_bwd,
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def mp_sum(
    a: torch.Tensor,
    b: torch.Tensor,
    t: float = 0.5,
    *,
    factors: tuple[float, float] = (1.0, 1.0),
    clip: float | None = None,
    with_silu: bool = False,
    twice: bool = False,
) -> Any:
    """((1-t) a + t b) / √((1-t)² + t²), clipped to [-clip, clip], and silu of it over 0.596.

    Args:
        a, b: of one shape and floating dtype.
        t: balance, in [0, 1].
        factors: of a and of b, by which they are multiplied on the way.
        clip: bound of the result; no gradient flows where the result, in a's dtype, has reached it.
        with_silu: return the activation as well.
        twice: return the sum a second time, for two who read it: their gradients are added in the backward
            kernel, which saves the pass that would add them.

    Returns:
        The sum in a's shape, dtype and memory format, and the activation or None, and with `twice` the sum
        again; all in between is fp32 (float64 for float64).

    Raises:
        TypeError: not floating, or dtypes that differ. ValueError: shapes or devices that differ, t or
            clip out of range.
    """
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise TypeError(
            f"mp_sum: a and b must be of one floating dtype, got {a.dtype} and {b.dtype}"
        )
    if a.shape != b.shape or a.device != b.device:
        raise ValueError(
            f"mp_sum: b must be {list(a.shape)} on {a.device} like a, got {list(b.shape)} on {b.device}"
        )
    if not 0 <= t <= 1:
        raise ValueError(f"mp_sum: t must be in [0, 1], got {t}")
    if not isinstance(factors, (tuple, list)) or len(factors) != 2:
        raise ValueError(f"mp_sum: factors must be two numbers, of a and of b, got {factors}")
    if clip is not None and not clip > 0:
        raise ValueError(f"mp_sum: clip must be positive, got {clip}")
    if a.dtype != torch.float64 and runs_triton("mp_sum", a.device.type):
        run = _Twice.apply if twice else torch.ops.tcm_fast.mp_sum_fwd
        out, h, *more = run(a, b, *_weights(t, factors), clip, with_silu)
        return out, h if with_silu else None, *more
    return mp_sum_reference(a, b, t, factors=factors, clip=clip, with_silu=with_silu, twice=twice)
