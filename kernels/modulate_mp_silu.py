"""What stands between the two convolutions of an EDM2 block: the embedding's gain, the activation and
dropout (Karras et al. 2024, figure 21)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tcm_fast.kernels._common import (
    MP_SILU,
    address,
    check_image,
    dense_like,
    edm2_sites,
    forms,
    given,
    has_asm,
    laid_out,
    layout_of,
    power_of_2,
    register,
    rows,
    scaled_silu,
    scaled_silu_grad,
    tile_for,
)
from tcm_fast.kernels._philox_triton import is_kept
from tcm_fast.kernels._triton import Variant, gradients, launch, runs_triton, tl, triton
from tcm_fast.kernels.dropout import PhiloxKey, check_dropout, dropout, key_arguments, key_of

# -- reference ------------------------------------------------------------------------------------


def modulate_mp_silu_reference(x, scale, gain, *, dropout_p=0.0, dropout_key=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    factor = 1 + gain.to(wide).view(-1, 1) * scale.to(wide)
    y = F.silu(x.to(wide) * factor[:, :, None, None]) / MP_SILU
    y = y.to(x.dtype).contiguous(memory_format=layout_of(x))
    return dropout(y, dropout_p, dropout_key) if dropout_p > 0 else y


# -- kernels --------------------------------------------------------------------------------------

# A program has one sample, WIDTH of its channels and, of its pixels, one piece of PIECE tiles.


@triton.jit
def _place(scale, gain, scale_row, CHANNELS: tl.constexpr, WIDTH: tl.constexpr):
    """-> sample number int64, first channel, channels [WIDTH], which of them there are, and the factor
    1 + gain·scale of each."""
    n = tl.program_id(0).to(tl.int64)
    first = tl.program_id(2) * WIDTH
    c = first + tl.arange(0, WIDTH)
    own = c < CHANNELS
    s = tl.load(scale + n * scale_row + c, mask=own, other=0).to(tl.float32)
    return n, first, c, own, 1.0 + tl.load(gain).to(tl.float32) * s


@triton.jit(do_not_specialize=["layer", "threshold"])
def _modulate_mp_silu_fwd_kernel(
    x, scale, gain, sample, seed, step, y, scale_row, layer, threshold, keep_scale,
    CHANNELS: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    PIECE: tl.constexpr, CHANNELS_LAST: tl.constexpr, DROPS: tl.constexpr, BY_EIGHT: tl.constexpr,
    GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    n, first, c, own, factor = _place(scale, gain, scale_row, CHANNELS, WIDTH)
    x += n * (CHANNELS * HW)
    y += n * (CHANNELS * HW)
    sample_n, seed_n, step_n = n, n, n
    if DROPS:
        sample_n, seed_n, step_n = tl.load(sample + n), tl.load(seed), tl.load(step)
    for i in tl.range(PIECE):
        p = (tl.program_id(1) * PIECE + i) * PIXELS + tl.arange(0, PIXELS)
        inside = (p < HW)[:, None] & own[None, :]
        at = address(p, c, CHANNELS, HW, CHANNELS_LAST)
        v = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        v = scaled_silu(v * factor[None, :], GAIN, ASM)
        if DROPS:
            kept = is_kept(p, first, c, sample_n, seed_n, step_n, layer, threshold, CHANNELS, BY_EIGHT,
                           WIDTH)  # fmt: skip
            v = tl.where(kept, v * keep_scale, 0.0)
        tl.store(y + at, v.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "threshold"])
def _modulate_mp_silu_bwd_kernel(
    grad_y, x, scale, gain, sample, seed, step, grad_x, grad_factor, scale_row, layer, threshold,
    keep_scale,
    CHANNELS: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    PIECE: tl.constexpr, CHANNELS_LAST: tl.constexpr, DROPS: tl.constexpr, BY_EIGHT: tl.constexpr,
    GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    n, first, c, own, factor = _place(scale, gain, scale_row, CHANNELS, WIDTH)
    x += n * (CHANNELS * HW)
    grad_y += n * (CHANNELS * HW)
    grad_x += n * (CHANNELS * HW)
    sample_n, seed_n, step_n = n, n, n
    if DROPS:
        sample_n, seed_n, step_n = tl.load(sample + n), tl.load(seed), tl.load(step)
    sums = tl.zeros([PIXELS, WIDTH], tl.float32)
    for i in tl.range(PIECE):
        p = (tl.program_id(1) * PIECE + i) * PIXELS + tl.arange(0, PIXELS)
        inside = (p < HW)[:, None] & own[None, :]
        at = address(p, c, CHANNELS, HW, CHANNELS_LAST)
        v = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        grad = tl.load(grad_y + at, mask=inside, other=0).to(tl.float32)
        if DROPS:
            kept = is_kept(p, first, c, sample_n, seed_n, step_n, layer, threshold, CHANNELS, BY_EIGHT,
                           WIDTH)  # fmt: skip
            grad = tl.where(kept, grad * keep_scale, 0.0)
        grad = grad * scaled_silu_grad(v * factor[None, :], GAIN, ASM)
        tl.store(grad_x + at, (grad * factor[None, :]).to(grad_x.dtype.element_ty), mask=inside)
        sums += tl.where(inside, grad * v, 0.0)
    piece = n * tl.num_programs(1) + tl.program_id(1)
    tl.store(grad_factor + piece * CHANNELS + c, tl.sum(sums, 0), mask=own)


@triton.jit
def _modulate_mp_silu_gain_kernel(
    grad_factor, scale, gain, grad_scale, grad_gain, pieces, scale_row,
    CHANNELS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """From the pieces' sums [N, pieces, C] the gradient of scale, and a sample's part of that of gain, summed
    in fp64: one number out of few products, and what is left of many that cancel."""
    n = tl.program_id(0).to(tl.int64)
    factor = tl.load(gain).to(tl.float32)
    at_gain = tl.zeros([WIDTH], tl.float64)
    for slab in tl.static_range((CHANNELS + WIDTH - 1) // WIDTH):
        c = slab * WIDTH + tl.arange(0, WIDTH)
        own = c < CHANNELS
        total = tl.zeros([WIDTH], tl.float32)
        for i in tl.range(pieces):
            total += tl.load(grad_factor + (n * pieces + i) * CHANNELS + c, mask=own, other=0)
        at_scale = (total * factor).to(grad_scale.dtype.element_ty)
        tl.store(grad_scale + n * CHANNELS + c, at_scale, mask=own)
        s = tl.load(scale + n * scale_row + c, mask=own, other=0)
        at_gain += total.to(tl.float64) * s.to(tl.float64)
    tl.store(grad_gain + n, tl.sum(at_gain, 0).to(grad_gain.dtype.element_ty))


# -- launchers ------------------------------------------------------------------------------------

LANES = 2 << 10  # elements of a tile; half as many with a mask, whose random words take registers
PROGRAMS = 1024  # enough of them to fill any GPU


def _constants(shape, threshold, is_channels_last, asm):
    n, c, h, w = shape
    pixels, width = tile_for(c, h * w, widest=64)
    pixels = min(pixels, max(1, (LANES >> (threshold > 0)) // width))
    tiles, slabs = -(-h * w // pixels), -(-c // width)
    # Fewer, longer pieces where there are programs enough: fewer sums remain to be added up.
    piece = max(1, min(tiles, n * slabs * tiles // PROGRAMS))
    piece = 1 << (piece.bit_length() - 1)  # few compiled forms, whatever the batch
    constants = dict(
        CHANNELS=c, HW=h * w, PIXELS=pixels, WIDTH=width, PIECE=piece,
        CHANNELS_LAST=is_channels_last, DROPS=threshold > 0,
        BY_EIGHT=threshold > 0 and c % 8 == 0 and width % 8 == 0,
        GAIN=1 / MP_SILU, ASM=asm, num_warps=4,
    )  # fmt: skip
    return constants, (n, -(-tiles // piece), slabs)


def _gain_constants(n, c):
    return dict(CHANNELS=c, WIDTH=min(power_of_2(c), 512), num_warps=4), (n,)


def _arguments(x, scale, gain, sample, seed, step, layer, threshold):
    scale = rows(scale)
    key = given(x, sample, seed, step)
    scalars = (scale.stride(0), layer, threshold, 65536 / (65536 - threshold))
    return (scale, gain, *key), scalars


def _fwd(x, scale, gain, sample, seed, step, layer, threshold):
    layout = layout_of(x)
    (x,) = laid_out(layout, x)
    y = torch.empty_like(x)
    constants, grid = _constants(x.shape, threshold, layout == torch.channels_last, has_asm(x))
    tensors, scalars = _arguments(x, scale, gain, sample, seed, step, layer, threshold)
    launch(_modulate_mp_silu_fwd_kernel, grid, x, *tensors, y, *scalars, **constants)
    return y


def _bwd(grad_y, x, scale, gain, sample, seed, step, layer, threshold):
    layout = layout_of(x)
    x, grad_y = laid_out(layout, x, grad_y)
    grad_x = torch.empty_like(x)
    constants, grid = _constants(x.shape, threshold, layout == torch.channels_last, has_asm(x))
    (n, pieces, _), c = grid, x.shape[1]
    sums = torch.empty((n, pieces, c), dtype=torch.float32, device=x.device)
    tensors, scalars = _arguments(x, scale, gain, sample, seed, step, layer, threshold)
    launch(
        _modulate_mp_silu_bwd_kernel, grid, grad_y, x, *tensors, grad_x, sums, *scalars, **constants
    )
    grad_scale = torch.empty(scale.shape, dtype=scale.dtype, device=scale.device)
    constants, grid = _gain_constants(n, c)
    is_summed = gain.ndim == 0
    dtype = torch.float64 if is_summed else gain.dtype
    grad_gain = torch.empty(n, dtype=dtype, device=x.device)
    scale = tensors[0]
    launch(
        _modulate_mp_silu_gain_kernel, grid, sums, scale, gain, grad_scale, grad_gain, pieces,
        scale.stride(0), **constants,
    )  # fmt: skip
    return grad_x, grad_scale, grad_gain.sum().to(gain.dtype) if is_summed else grad_gain


def specialisations(capability: int) -> list[Variant]:
    """The forms in which EDM2-S and -XL use the kernels at 64 x 64, in channels_last: with dropout at
    16 pixels and below."""
    variants = []
    scalars = {"scale_row": "i32", "layer": "i32", "threshold": "i32", "keep_scale": "fp32"}
    for size, c, dtype in edm2_sites():
        threshold = 26214 if size <= 16 else 0
        constants, grid = _constants((64, c, size, size), threshold, True, True)
        key = dict.fromkeys(("sample", "seed", "step"), "i64" if threshold else dtype)
        pointers = dict.fromkeys(("x", "scale"), dtype) | {"gain": "fp32"} | key
        variants += forms(
            f"{size}x{size}x{c} {dtype}", scalars, constants,
            (_modulate_mp_silu_fwd_kernel, pointers | {"y": dtype}, {}),
            (
                _modulate_mp_silu_bwd_kernel,
                pointers | {"grad_y": dtype, "grad_x": dtype, "grad_factor": "fp32"},
                {},
            ),
            programs=math.prod(grid), aligned=("scale_row",),
        )  # fmt: skip
        constants, grid = _gain_constants(64, c)
        pointers = dict.fromkeys(("scale", "grad_scale"), dtype)
        pointers |= dict.fromkeys(("grad_factor", "gain", "grad_gain"), "fp32")
        variants += forms(
            f"{size}x{size}x{c} {dtype}", {"pieces": "i32", "scale_row": "i32"}, constants,
            (_modulate_mp_silu_gain_kernel, pointers, {}),
            programs=math.prod(grid), aligned=("scale_row",),
        )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(x, scale, gain, *key):
    p = key[-1] / 65536
    return modulate_mp_silu_reference(x, scale, gain, dropout_p=p, dropout_key=key_of(*key))


def _bwd_by_reference(grad_y, x, scale, gain, *key):
    def function(*tensors):
        return _fwd_by_reference(*tensors, *key)

    grad_x, grad_scale, grad_gain = gradients(function, [x, scale, gain], [grad_y])
    return grad_x.contiguous(memory_format=layout_of(x)), grad_scale.contiguous(), grad_gain


def _fake_bwd(grad_y, x, scale, gain, *_):
    return dense_like(x), scale.new_empty(scale.shape), torch.empty_like(gain)


def _save(ctx, inputs, output):
    *tensors, ctx.layer, ctx.threshold = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx, grad_y):
    grads = torch.ops.tcm_fast.modulate_mp_silu_bwd(
        grad_y, *ctx.saved_tensors, ctx.layer, ctx.threshold
    )
    return *grads, None, None, None, None, None


_INPUTS = (
    "Tensor x, Tensor scale, Tensor gain, Tensor? sample, Tensor? seed, Tensor? step, int layer, "
    "int threshold"
)
_fwd = register(
    f"modulate_mp_silu_fwd({_INPUTS}) -> Tensor",
    _fwd, _fwd_by_reference, lambda x, *_: dense_like(x), save=_save, backward=_backward,
)  # fmt: skip
_bwd = register(
    f"modulate_mp_silu_bwd(Tensor grad_y, {_INPUTS}) -> (Tensor, Tensor, Tensor)",
    _bwd, _bwd_by_reference, _fake_bwd,
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def modulate_mp_silu(
    x: torch.Tensor,
    scale: torch.Tensor,
    gain: torch.Tensor,
    *,
    dropout_p: float = 0.0,
    dropout_key: PhiloxKey | None = None,
) -> torch.Tensor:
    """dropout(silu(x · (1 + gain · scale)) / 0.596).

    Args:
        x: activations [N,C,H,W] of a floating dtype, contiguous or channels_last.
        scale: per sample and channel, [N,C], any floating dtype.
        gain: a scalar tensor, fp32 (or float64, with a float64 x). Expanded to [N], its gradient is not
            summed over the samples: `networks.by_sample` sums those of all layers at once.
        dropout_p: share of the elements that is dropped, in [0, 1).
        dropout_key: keys the mask; required where dropout_p > 0.

    Returns:
        [N,C,H,W] in x's dtype and memory format; all in between is fp32 (float64 for float64). Only the
        inputs are kept for the backward pass.

    Raises:
        TypeError: not floating. ValueError: shapes or devices that do not fit, a dropout_p out of range
            or without a key, a sample of 2**31 elements or more.
    """
    check_image("modulate_mp_silu", x)
    if not scale.is_floating_point():
        raise TypeError(f"modulate_mp_silu: scale must be floating, got {scale.dtype}")
    n, c, height, width = x.shape
    if scale.shape != (n, c):
        raise ValueError(f"modulate_mp_silu: scale must be [{n},{c}], got {list(scale.shape)}")
    if gain.ndim > 0 and not (gain.shape == (n,) and (n == 1 or gain.stride(0) == 0)):
        raise ValueError(
            f"modulate_mp_silu: gain must be a scalar, or one expanded to [{n}], got {list(gain.shape)}"
        )
    for name, operand in (("scale", scale), ("gain", gain)):
        if operand.device != x.device:
            raise ValueError(
                f"modulate_mp_silu: {name} must be on {x.device}, got {operand.device}"
            )
    check_dropout("modulate_mp_silu", dropout_p, dropout_key)
    size = c * height * width
    is_served = x.dtype != torch.float64 and size > 0
    if is_served and runs_triton("modulate_mp_silu", x.device.type):
        if size >= 2**31:
            raise ValueError(
                f"modulate_mp_silu: a sample must have fewer than 2**31 elements, got {size}"
            )
        key = key_arguments("modulate_mp_silu", dropout_p, dropout_key, n, x.device)
        return torch.ops.tcm_fast.modulate_mp_silu_fwd(x, scale, gain, *key)
    return modulate_mp_silu_reference(x, scale, gain, dropout_p=dropout_p, dropout_key=dropout_key)
