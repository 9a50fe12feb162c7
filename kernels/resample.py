"""Twice or half the resolution with the filter [1,1], and the activation after it: what EDM2's blocks
between two levels begin with."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F

from tcm_fast.kernels._common import (
    DTYPES,
    MP_SILU,
    check_image,
    empty,
    forms,
    given,
    has_asm,
    laid_out,
    layout_of,
    meet_reference,
    register,
    scaled_silu,
    scaled_silu_grad,
    tile_for,
)
from tcm_fast.kernels._triton import Variant, launch, runs_triton, tl, triton

MODES = ("up", "down")

# -- reference ------------------------------------------------------------------------------------


def resample_reference(x, mode, *, with_silu=False):
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    # PyTorch's average of a channels_last tensor with one channel or pixel can lose the layout.
    up = mode == "up"
    y = F.interpolate(wide, scale_factor=2, mode="nearest") if up else F.avg_pool2d(wide, 2)
    y = y.contiguous(memory_format=layout_of(x))
    return y.to(x.dtype), (F.silu(y) / MP_SILU).to(x.dtype) if with_silu else None


# -- kernels --------------------------------------------------------------------------------------

# A program has a tile [PIXELS, WIDTH] of the smaller of the two feature maps, called low, and the four
# places of the larger one, high, that belong to each element.


@triton.jit
def _places(
    pixels, HEIGHT: tl.constexpr, WIDE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr,
    WIDTH: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """-> offsets in low, in high of the upper left of four, the mask, and high's steps to the right and
    down. HEIGHT and WIDE are low's."""
    p = tl.program_id(0).to(tl.int64) * PIXELS + tl.arange(0, PIXELS)
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    inside = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
    n, row, column = p // (HEIGHT * WIDE), p // WIDE % HEIGHT, p % WIDE
    corner = (4 * HEIGHT * WIDE) * n * CHANNELS
    spot = 4 * WIDE * row + 2 * column  # among high's pixels
    if CHANNELS_LAST:
        low = p[:, None] * CHANNELS + c[None, :]
        high = (corner + spot * CHANNELS)[:, None] + c[None, :]
        return low, high, inside, CHANNELS, 2 * WIDE * CHANNELS
    size: tl.constexpr = HEIGHT * WIDE
    low = (n * (CHANNELS * size) + p % size)[:, None] + c[None, :] * size
    high = (corner + spot)[:, None] + c[None, :] * (4 * size)
    return low, high, inside, 1, 2 * WIDE


@triton.jit
def _four(pointer, at, right, down, inside):
    """The sum of four places of high, fp32."""
    total = tl.load(pointer + at, mask=inside, other=0).to(tl.float32)
    total += tl.load(pointer + at + right, mask=inside, other=0).to(tl.float32)
    total += tl.load(pointer + at + down, mask=inside, other=0).to(tl.float32)
    return total + tl.load(pointer + at + down + right, mask=inside, other=0).to(tl.float32)


@triton.jit
def _spread(pointer, at, right, down, inside, value):
    """One value to four places of high."""
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + at, value, mask=inside)
    tl.store(pointer + at + right, value, mask=inside)
    tl.store(pointer + at + down, value, mask=inside)
    tl.store(pointer + at + down + right, value, mask=inside)


@triton.jit
def _resample_fwd_kernel(
    x, y, h, pixels,
    UP: tl.constexpr, ACTIVATES: tl.constexpr, HEIGHT: tl.constexpr, WIDE: tl.constexpr,
    CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    low, high, inside, right, down = _places(
        pixels, HEIGHT, WIDE, CHANNELS, PIXELS, WIDTH, CHANNELS_LAST
    )
    if UP:
        v = tl.load(x + low, mask=inside, other=0).to(tl.float32)
        _spread(y, high, right, down, inside, v)
        if ACTIVATES:
            _spread(h, high, right, down, inside, scaled_silu(v, GAIN, ASM))
    else:
        v = _four(x, high, right, down, inside) * 0.25
        tl.store(y + low, v.to(y.dtype.element_ty), mask=inside)
        if ACTIVATES:
            tl.store(h + low, scaled_silu(v, GAIN, ASM).to(h.dtype.element_ty), mask=inside)


@triton.jit
def _resample_bwd_kernel(
    grad_y, grad_h, z, grad_x, pixels,
    UP: tl.constexpr, HAS_PAST: tl.constexpr, HAS_ACT: tl.constexpr, HEIGHT: tl.constexpr,
    WIDE: tl.constexpr, CHANNELS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    low, high, inside, right, down = _places(
        pixels, HEIGHT, WIDE, CHANNELS, PIXELS, WIDTH, CHANNELS_LAST
    )
    grad = tl.zeros([PIXELS, WIDTH], tl.float32)
    if HAS_PAST:
        if UP:
            grad = _four(grad_y, high, right, down, inside)
        else:
            grad = tl.load(grad_y + low, mask=inside, other=0).to(tl.float32)
    if HAS_ACT:
        v = tl.load(z + low, mask=inside, other=0).to(tl.float32)
        if UP:
            act = _four(grad_h, high, right, down, inside)
        else:
            act = tl.load(grad_h + low, mask=inside, other=0).to(tl.float32)
        grad += act * scaled_silu_grad(v, GAIN, ASM)
    if UP:
        tl.store(grad_x + low, grad.to(grad_x.dtype.element_ty), mask=inside)
    else:
        _spread(grad_x, high, right, down, inside, grad * 0.25)


# -- launchers ------------------------------------------------------------------------------------


def _constants(low_shape, mode, is_channels_last, asm):
    n, c, h, w = low_shape
    pixels, width = tile_for(c, n * h * w, widest=128)
    pixels = max(1, pixels // 2)
    constants = dict(
        UP=mode == "up", HEIGHT=h, WIDE=w, CHANNELS=c, PIXELS=pixels, WIDTH=width,
        CHANNELS_LAST=is_channels_last, GAIN=1 / MP_SILU, ASM=asm, num_warps=4,
    )  # fmt: skip
    return constants, (-(-n * h * w // pixels), -(-c // width))


def _sizes(shape, mode):
    """Shapes of the result and of the smaller one of the two."""
    n, c, h, w = shape
    out = (n, c, 2 * h, 2 * w) if mode == "up" else (n, c, h // 2, w // 2)
    return out, (shape if mode == "up" else out)


def _fwd(x, mode, with_silu):
    layout = layout_of(x)
    (x,) = laid_out(layout, x)
    shape, low = _sizes(x.shape, mode)
    y = empty(x, shape, layout)
    h = torch.empty_like(y) if with_silu else x.new_empty(0)
    constants, grid = _constants(low, mode, layout == torch.channels_last, has_asm(x))
    pixels = low[0] * low[2] * low[3]
    launch(_resample_fwd_kernel, grid, x, y, h, pixels, ACTIVATES=with_silu, **constants)
    return y, h


def _bwd(grad_y, grad_h, z, shape, mode):
    first = z if z is not None else grad_y
    layout = layout_of(first)
    grad_y, grad_h, z = laid_out(layout, grad_y, grad_h, z)
    grad_x = empty(first, shape, layout)
    low = _sizes(shape, mode)[1]
    constants, grid = _constants(low, mode, layout == torch.channels_last, has_asm(first))
    pixels = low[0] * low[2] * low[3]
    launch(
        _resample_bwd_kernel, grid, *given(first, grad_y, grad_h, z), grad_x, pixels,
        HAS_PAST=grad_y is not None, HAS_ACT=grad_h is not None, **constants,
    )  # fmt: skip
    return grad_x


def specialisations(capability: int) -> list[Variant]:
    """Forms in which EDM2-S and -XL use the kernels at 64 x 64, in channels_last."""
    variants = []
    for (c, size), mode, dtype in product(((192, 32), (1152, 8)), MODES, DTYPES.values()):
        if dtype == "fp32" and c > 192:
            continue
        constants, grid = _constants((64, c, size, size), mode, True, True)
        activates = mode == "up"
        variants += forms(
            f"{mode} {size}x{size}x{c} {dtype}", {"pixels": "i32"}, constants,
            (
                _resample_fwd_kernel,
                dict.fromkeys(("x", "y", "h"), dtype),
                {"ACTIVATES": activates},
            ),
            (
                _resample_bwd_kernel,
                dict.fromkeys(("grad_y", "grad_h", "z", "grad_x"), dtype),
                {"HAS_PAST": True, "HAS_ACT": activates},
            ),
            programs=grid[0] * grid[1], aligned=("pixels",),
        )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(x, mode, with_silu):
    y, h = resample_reference(x, mode, with_silu=with_silu)
    h = h.contiguous(memory_format=layout_of(x)) if with_silu else x.new_empty(0)
    return y, h


def _bwd_by_reference(grad_y, grad_h, z, shape, mode):
    first = z if z is not None else grad_y
    if mode == "up":  # z is the smaller map: what meets there are sums of four
        grads = [
            None if g is None else 4 * F.avg_pool2d(g.to(torch.float32), 2)
            for g in (grad_y, grad_h)
        ]
        grad = meet_reference(z, *grads)
    else:
        grad = F.interpolate(meet_reference(z, grad_y, grad_h), scale_factor=2.0) / 4
    return grad.to(first.dtype).contiguous(memory_format=layout_of(first))


def _fake_fwd(x, mode, with_silu):
    y = empty(x, _sizes(x.shape, mode)[0], layout_of(x))
    return y, torch.empty_like(y) if with_silu else x.new_empty(0)


def _fake_bwd(grad_y, grad_h, z, shape, mode):
    first = z if z is not None else grad_y
    return empty(first, shape, layout_of(first))


def _save(ctx, inputs, output):
    x, ctx.mode, with_silu = inputs
    y, h = output
    ctx.shape = x.shape
    ctx.set_materialize_grads(False)
    if with_silu:
        ctx.save_for_backward(x if ctx.mode == "up" else y)
    else:
        ctx.mark_non_differentiable(h)


def _backward(ctx, grad_y, grad_h):
    if grad_y is None and grad_h is None:
        return None, None, None
    (z,) = ctx.saved_tensors or (None,)
    grad_x = torch.ops.tcm_fast.resample_bwd(grad_y, grad_h, z, ctx.shape, ctx.mode)
    return grad_x, None, None


_fwd = register(
    "resample_fwd(Tensor x, str mode, bool with_silu) -> (Tensor, Tensor)",
    _fwd, _fwd_by_reference, _fake_fwd, save=_save, backward=_backward,
)  # fmt: skip
_bwd = register(
    "resample_bwd(Tensor? grad_y, Tensor? grad_h, Tensor? z, SymInt[] shape, str mode) -> Tensor",
    _bwd, _bwd_by_reference, _fake_bwd,
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def resample(
    x: torch.Tensor, mode: str, *, with_silu: bool = False
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Every pixel four times ("up"), or the mean of every four ("down"), and silu of it over 0.596.

    Args:
        x: activations [N,C,H,W] of a floating dtype, contiguous or channels_last; H and W even for
            "down".
        mode: "up" or "down".
        with_silu: return the activation as well.

    Returns:
        [N,C,2H,2W] or [N,C,H/2,W/2] in x's dtype and memory format, and the activation or None; all in
        between is fp32 (float64 for float64).

    Raises:
        TypeError: not floating. ValueError: an unknown mode, a shape that does not fit.
    """
    check_image("resample", x)
    if mode not in MODES:
        raise ValueError(f"resample: mode must be up or down, got {mode!r}")
    if mode == "down" and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"resample: height and width must be even, got {list(x.shape)}")
    if x.dtype != torch.float64 and runs_triton("resample", x.device.type):
        y, h = torch.ops.tcm_fast.resample_fwd(x, mode, with_silu)
        return y, h if with_silu else None
    return resample_reference(x, mode, with_silu=with_silu)
