"""EDM2's magnitude-preserving concatenation and the activation after it (Karras et al. 2024, equation
103): what a decoder block that takes in a skip connection begins with."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tcm_fast.kernels._common import (
    MP_SILU,
    address,
    edm2_sites,
    empty,
    forms,
    given,
    has_asm,
    laid_out,
    layout_of,
    meet,
    meet_reference,
    register,
    scaled_silu,
    tile_for,
)
from tcm_fast.kernels._triton import Variant, launch, runs_triton, tl, triton

# -- reference ------------------------------------------------------------------------------------


def mp_cat_weights(channels_a: int, channels_b: int, t: float) -> tuple[float, float]:
    """What a and b are multiplied by, so that both count in the proportion 1-t to t whatever their
    widths, and the whole keeps its magnitude."""
    norm = math.sqrt((channels_a + channels_b) / ((1 - t) ** 2 + t**2))
    return norm / math.sqrt(channels_a) * (1 - t), norm / math.sqrt(channels_b) * t


def mp_cat_mp_silu_reference(a, b, t=0.5):
    wide = torch.promote_types(a.dtype, torch.float32)
    weight_a, weight_b = mp_cat_weights(a.shape[1], b.shape[1], t)
    z = torch.cat([a.to(wide) * weight_a, b.to(wide) * weight_b], 1)
    z = z.contiguous(memory_format=layout_of(a))
    return z.to(a.dtype), (F.silu(z) / MP_SILU).to(a.dtype)


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def _tile(PIXELS: tl.constexpr, WIDTH: tl.constexpr):
    """Pixels int64 and channels of the result that a program has."""
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    return p, tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)


@triton.jit
def _mp_cat_mp_silu_fwd_kernel(
    a, b, z, h, pixels, weight_a, weight_b,
    A: tl.constexpr, B: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    p, c = _tile(PIXELS, WIDTH)
    there = (p < pixels)[:, None]
    in_a, in_b = there & (c < A)[None, :], there & ((c >= A) & (c < A + B))[None, :]
    from_a = tl.load(a + address(p, c, A, HW, CHANNELS_LAST), mask=in_a, other=0)
    from_b = tl.load(b + address(p, c - A, B, HW, CHANNELS_LAST), mask=in_b, other=0)
    v = from_a.to(tl.float32) * weight_a + from_b.to(tl.float32) * weight_b
    at = address(p, c, A + B, HW, CHANNELS_LAST)
    inside = there & (c < A + B)[None, :]
    tl.store(z + at, v.to(z.dtype.element_ty), mask=inside)
    tl.store(h + at, scaled_silu(v, GAIN, ASM).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _mp_cat_mp_silu_bwd_kernel(
    grad_z, grad_h, z, grad_a, grad_b, pixels, weight_a, weight_b,
    A: tl.constexpr, B: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, HAS_PAST: tl.constexpr, HAS_ACT: tl.constexpr,
    GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    p, c = _tile(PIXELS, WIDTH)
    there = (p < pixels)[:, None]
    at = address(p, c, A + B, HW, CHANNELS_LAST)
    inside = there & (c < A + B)[None, :]
    v = tl.zeros([PIXELS, WIDTH], tl.float32)
    if HAS_ACT:
        v = tl.load(z + at, mask=inside, other=0).to(tl.float32)
    grad = meet(v, grad_z, grad_h, at, inside, HAS_PAST, HAS_ACT, GAIN, ASM)
    to_a, to_b = address(p, c, A, HW, CHANNELS_LAST), address(p, c - A, B, HW, CHANNELS_LAST)
    in_a, in_b = there & (c < A)[None, :], there & ((c >= A) & (c < A + B))[None, :]
    tl.store(grad_a + to_a, (grad * weight_a).to(grad_a.dtype.element_ty), mask=in_a)
    tl.store(grad_b + to_b, (grad * weight_b).to(grad_b.dtype.element_ty), mask=in_b)


# -- launchers ------------------------------------------------------------------------------------


def _constants(pixels, channels_a, channels_b, hw, is_channels_last, asm):
    tile, width = tile_for(channels_a + channels_b, pixels, widest=256)
    constants = dict(
        A=channels_a, B=channels_b, HW=hw, PIXELS=tile, WIDTH=width, CHANNELS_LAST=is_channels_last,
        GAIN=1 / MP_SILU, ASM=asm, num_warps=4,
    )  # fmt: skip
    return constants, (-(-pixels // tile), -(-(channels_a + channels_b) // width))


def _site(z, channels_a, is_channels_last):
    n, c, h, w = z.shape
    asm = has_asm(z)
    return _constants(n * h * w, channels_a, c - channels_a, h * w, is_channels_last, asm)


def _results(a, b):
    """Memory for z and its activation."""
    n, channels, height, width = a.shape
    shape = (n, channels + b.shape[1], height, width)
    return empty(a, shape, layout_of(a)), empty(a, shape, layout_of(a))


def _gradients(z, channels_a):
    """Memory for those of a and b."""
    n, channels, *size = z.shape
    parts = (channels_a, channels - channels_a)
    return tuple(empty(z, (n, c, *size), layout_of(z)) for c in parts)


def _fwd(a, b, t):
    layout = layout_of(a)
    a, b = laid_out(layout, a, b)
    n, channels_a, height, width = a.shape
    z, h = _results(a, b)
    constants, grid = _site(z, channels_a, layout == torch.channels_last)
    launch(
        _mp_cat_mp_silu_fwd_kernel, grid, a, b, z, h, n * height * width,
        *mp_cat_weights(channels_a, b.shape[1], t), **constants,
    )  # fmt: skip
    return z, h


def _bwd(grad_z, grad_h, z, t, channels_a):
    layout = layout_of(z)
    z, grad_z, grad_h = laid_out(layout, z, grad_z, grad_h)
    n, channels, height, width = z.shape
    grad_a, grad_b = _gradients(z, channels_a)
    constants, grid = _site(z, channels_a, layout == torch.channels_last)
    launch(
        _mp_cat_mp_silu_bwd_kernel, grid, *given(z, grad_z, grad_h), z, grad_a, grad_b, n * height * width,
        *mp_cat_weights(channels_a, channels - channels_a, t), **constants, HAS_PAST=grad_z is not None,
        HAS_ACT=grad_h is not None,
    )  # fmt: skip
    return grad_a, grad_b


def specialisations(capability: int) -> list[Variant]:
    """Forms in which the decoders of EDM2-S and -XL use the kernels at 64 x 64, in channels_last."""
    variants = []
    scalars = {"pixels": "i32", "weight_a": "fp32", "weight_b": "fp32"}
    for size, c, dtype in edm2_sites():
        pixels = 64 * size**2
        constants, grid = _constants(pixels, c, c, size**2, True, True)
        variants += forms(
            f"{size}x{size}x{c}+{c} {dtype}", scalars, constants,
            (_mp_cat_mp_silu_fwd_kernel, dict.fromkeys(("a", "b", "z", "h"), dtype), {}),
            (
                _mp_cat_mp_silu_bwd_kernel,
                dict.fromkeys(("grad_z", "grad_h", "z", "grad_a", "grad_b"), dtype),
                {"HAS_PAST": True, "HAS_ACT": True},
            ),
            programs=math.prod(grid), aligned=("pixels",),
        )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(a, b, t):
    return tuple(laid_out(layout_of(a), *mp_cat_mp_silu_reference(a, b, t)))


def _bwd_by_reference(grad_z, grad_h, z, t, channels_a):
    grad = meet_reference(z, grad_z, grad_h)
    parts = grad[:, :channels_a], grad[:, channels_a:]
    weights = mp_cat_weights(parts[0].shape[1], parts[1].shape[1], t)
    return tuple(
        (part * weight).to(z.dtype).contiguous(memory_format=layout_of(z))
        for part, weight in zip(parts, weights, strict=True)
    )


def _save(ctx, inputs, output):
    a, _, ctx.t = inputs
    ctx.channels_a = a.shape[1]
    ctx.set_materialize_grads(False)
    # The result, which the skip convolution keeps as well, and not a and b.
    ctx.save_for_backward(output[0])


def _backward(ctx, grad_z, grad_h):
    if grad_z is None and grad_h is None:
        return None, None, None
    (z,) = ctx.saved_tensors
    grads = torch.ops.tcm_fast.mp_cat_mp_silu_bwd(grad_z, grad_h, z, ctx.t, ctx.channels_a)
    return *grads, None


_fwd = register(
    "mp_cat_mp_silu_fwd(Tensor a, Tensor b, float t) -> (Tensor, Tensor)",
    _fwd, _fwd_by_reference, lambda a, b, t: _results(a, b), save=_save, backward=_backward,
)  # fmt: skip
_bwd = register(
    "mp_cat_mp_silu_bwd(Tensor? grad_z, Tensor? grad_h, Tensor z, float t, SymInt channels_a)"
    " -> (Tensor, Tensor)",
    _bwd, _bwd_by_reference, lambda grad_z, grad_h, z, t, channels_a: _gradients(z, channels_a),
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def mp_cat_mp_silu(
    a: torch.Tensor, b: torch.Tensor, t: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """z, the channels of a and then those of b, weighted so that they contribute 1-t and t whatever
    their numbers and z keeps their magnitude; and silu(z) / 0.596.

    Args:
        a, b: activations [N,A,H,W] and [N,B,H,W] of one floating dtype, contiguous or channels_last.
        t: balance, in [0, 1].

    Returns:
        The two, [N,A+B,H,W] in a's dtype and memory format; all in between is fp32 (float64 for
        float64).

    Raises:
        TypeError: not floating, or dtypes that differ. ValueError: shapes or devices that do not fit, t
            out of range.
    """
    if not a.is_floating_point() or a.dtype != b.dtype:
        raise TypeError(
            f"mp_cat_mp_silu: a and b must be of one floating dtype, got {a.dtype} and {b.dtype}"
        )
    if a.ndim != 4 or a.shape[1] < 1:
        raise ValueError(f"mp_cat_mp_silu: a must be [N,A,H,W], got {list(a.shape)}")
    n, _, height, width = a.shape
    fits = b.ndim == 4 and b.shape[1] >= 1 and (b.shape[0], *b.shape[2:]) == (n, height, width)
    if not fits or a.device != b.device:
        raise ValueError(
            f"mp_cat_mp_silu: b must be [{n},B,{height},{width}] on {a.device}, "
            f"got {list(b.shape)} on {b.device}"
        )
    if not 0 <= t <= 1:
        raise ValueError(f"mp_cat_mp_silu: t must be in [0, 1], got {t}")
    if a.dtype != torch.float64 and runs_triton("mp_cat_mp_silu", a.device.type):
        return torch.ops.tcm_fast.mp_cat_mp_silu_fwd(a, b, t)
    return mp_cat_mp_silu_reference(a, b, t)
