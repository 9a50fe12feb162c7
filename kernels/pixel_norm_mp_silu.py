"""EDM2's pixel normalisation and the activation after it (Karras et al. 2024, equations 30 and 81):
what an encoder block begins with."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from tcm_fast.kernels._common import (
    MP_SILU,
    NORM_EPS,
    address,
    check_image,
    dense_like,
    edm2_sites,
    forms,
    given,
    has_asm,
    laid_out,
    layout_of,
    meet,
    register,
    scaled_silu,
    tile_for,
)
from tcm_fast.kernels._triton import Variant, gradients, launch, runs_triton, tl, triton

# -- reference ------------------------------------------------------------------------------------


def pixel_norm_mp_silu_reference(x, *, with_x=False):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    rms = torch.linalg.vector_norm(wide, dim=1, keepdim=True) / math.sqrt(x.shape[1])
    u = wide / (NORM_EPS + rms)
    out = u.to(x.dtype), (F.silu(u) / MP_SILU).to(x.dtype)
    return (*out, x) if with_x else out


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def _pixel_norm(x, eps, CHANNELS: tl.constexpr):
    """-> rms and rms + eps of each pixel, [P, 1]."""
    rms = tl.sqrt(tl.sum(x * x, 1) / CHANNELS)[:, None]
    return rms, rms + eps


@triton.jit
def _pixel_norm_mp_silu_fwd_kernel(
    x, u, h, pixels, eps,
    CHANNELS: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, WIDTH)
    inside = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
    at = address(p, c, CHANNELS, HW, CHANNELS_LAST)
    v = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    _, d = _pixel_norm(v, eps, CHANNELS)
    v = v / d
    tl.store(u + at, v.to(u.dtype.element_ty), mask=inside)
    tl.store(h + at, scaled_silu(v, GAIN, ASM).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _pixel_norm_mp_silu_bwd_kernel(
    grad_u, grad_h, x, beside, grad_x, pixels, eps,
    CHANNELS: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, HAS_PAST: tl.constexpr, HAS_ACT: tl.constexpr,
    HAS_BESIDE: tl.constexpr, GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """beside: a gradient of x that came past the normalisation."""
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.arange(0, WIDTH)
    inside = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
    at = address(p, c, CHANNELS, HW, CHANNELS_LAST)
    v = tl.load(x + at, mask=inside, other=0).to(tl.float32)
    rms, d = _pixel_norm(v, eps, CHANNELS)
    grad = meet(v / d, grad_u, grad_h, at, inside, HAS_PAST, HAS_ACT, GAIN, ASM)
    # Of x/(rms + eps): grad/d - x (grad·x) / (C rms d²); nothing flows through the rms of zeros.
    dot = tl.sum(grad * v, 1)[:, None]
    slope = dot / tl.where(rms > 0, CHANNELS * rms * d, 1.0)
    grad = (grad - v * slope) / d
    if HAS_BESIDE:
        grad += tl.load(beside + at, mask=inside, other=0).to(tl.float32)
    tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)


# -- launchers ------------------------------------------------------------------------------------


def _constants(shape, is_channels_last, asm, backward=False):
    n, c, h, w = shape
    pixels, width = tile_for(c, n * h * w, widest=1 << 30)
    if backward:  # three tiles are in the registers at once
        pixels = max(1, pixels // 2)
    return dict(
        CHANNELS=c, HW=h * w, PIXELS=pixels, WIDTH=width, CHANNELS_LAST=is_channels_last,
        GAIN=1 / MP_SILU, ASM=asm, num_warps=4,
    )  # fmt: skip


def _fwd(x):
    x = x.contiguous(memory_format=layout_of(x))
    u, h = torch.empty_like(x), torch.empty_like(x)
    constants = _constants(x.shape, layout_of(x) == torch.channels_last, has_asm(x))
    pixels = x.numel() // x.shape[1]
    grid = (-(-pixels // constants["PIXELS"]),)
    launch(_pixel_norm_mp_silu_fwd_kernel, grid, x, u, h, pixels, NORM_EPS, **constants)
    return u, h


def _bwd(grad_u, grad_h, x, beside=None):
    layout = layout_of(x)
    x, grad_u, grad_h, beside = laid_out(layout, x, grad_u, grad_h, beside)
    grad_x = torch.empty_like(x)
    constants = _constants(x.shape, layout == torch.channels_last, has_asm(x), backward=True)
    pixels = x.numel() // x.shape[1]
    grid = (-(-pixels // constants["PIXELS"]),)
    launch(
        _pixel_norm_mp_silu_bwd_kernel, grid, *given(x, grad_u, grad_h, x, beside), grad_x, pixels,
        NORM_EPS, **constants, HAS_PAST=grad_u is not None, HAS_ACT=grad_h is not None,
        HAS_BESIDE=beside is not None,
    )  # fmt: skip
    return grad_x


def specialisations(capability: int) -> list[Variant]:
    """The forms in which EDM2-S and -XL use the kernels at 64 x 64, in channels_last."""
    variants = []
    scalars = {"pixels": "i32", "eps": "fp32"}
    for size, c, dtype in edm2_sites():
        for kernel, pointers, own in (
            (_pixel_norm_mp_silu_fwd_kernel, ("x", "u", "h"), {}),
            (
                _pixel_norm_mp_silu_bwd_kernel,
                ("grad_u", "grad_h", "x", "beside", "grad_x"),
                {"HAS_PAST": True, "HAS_ACT": True, "HAS_BESIDE": size == 64},
            ),
        ):
            constants = _constants((64, c, size, size), True, True, bool(own))
            variants += forms(
                f"{size}x{size}x{c} {dtype}", scalars, constants,
                (kernel, dict.fromkeys(pointers, dtype), own),
                programs=64 * size**2 // constants["PIXELS"], aligned=("pixels",),
            )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(x):
    return tuple(laid_out(layout_of(x), *pixel_norm_mp_silu_reference(x)))


def _bwd_by_reference(grad_u, grad_h, x, beside=None):
    (grad_x,) = gradients(pixel_norm_mp_silu_reference, [x], [grad_u, grad_h])
    grad_x = grad_x if beside is None else grad_x + beside
    return grad_x.contiguous(memory_format=layout_of(x))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_u, grad_h, beside=None):
    if grad_u is None and grad_h is None:
        return beside
    return torch.ops.tcm_fast.pixel_norm_mp_silu_bwd(grad_u, grad_h, *ctx.saved_tensors, beside)


class _WithX(torch.autograd.Function):
    """The operator, and x itself, whose gradient is added where that of the rest arises."""

    @staticmethod
    def forward(x):
        return *torch.ops.tcm_fast.pixel_norm_mp_silu_fwd(x), x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, *grads):
        return _backward(ctx, *grads)


_fwd = register(
    "pixel_norm_mp_silu_fwd(Tensor x) -> (Tensor, Tensor)",
    _fwd, _fwd_by_reference, lambda x: (dense_like(x), dense_like(x)), save=_save, backward=_backward,
)  # fmt: skip
_bwd = register(
    "pixel_norm_mp_silu_bwd(Tensor? grad_u, Tensor? grad_h, Tensor x, Tensor? beside=None) -> Tensor",
    _bwd, _bwd_by_reference, lambda grad_u, grad_h, x, beside=None: dense_like(x),
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def pixel_norm_mp_silu(x: torch.Tensor, *, with_x: bool = False) -> tuple[Any, ...]:
    """u = x / (1e-4 + rms of x over the channels), and silu(u) / 0.596.

    Args:
        x: activations [N,C,H,W] of a floating dtype, contiguous or channels_last.
        with_x: return x, too, for who reads it past the normalisation: its gradient is added in the backward
            kernel, which saves the pass that would add it.

    Returns:
        The two, [N,C,H,W] in x's dtype and memory format, and with `with_x` x; all in between is fp32
        (float64 for float64). Only x is kept for the backward pass.

    Raises:
        TypeError: x is not floating. ValueError: x is not [N,C,H,W].
    """
    check_image("pixel_norm_mp_silu", x)
    is_served = x.dtype != torch.float64 and x.shape[1] > 0
    if is_served and runs_triton("pixel_norm_mp_silu", x.device.type):
        return (_WithX.apply if with_x else torch.ops.tcm_fast.pixel_norm_mp_silu_fwd)(x)
    return pixel_norm_mp_silu_reference(x, with_x=with_x)
