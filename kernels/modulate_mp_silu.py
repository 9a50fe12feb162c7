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
    if scale.ndim == 3:  # one of the parts has the whole gradient
        scale, gain = scale[:, 0], gain[0, 0, 0]
    factor = 1 + gain.to(wide) * scale.to(wide)
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
    grad_y, x, scale, gain, sample, seed, step, grad_x, grad_scale, grad_gain, scale_row, layer,
    threshold, keep_scale,
    CHANNELS: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    PIECE: tl.constexpr, CHANNELS_LAST: tl.constexpr, DROPS: tl.constexpr, BY_EIGHT: tl.constexpr,
    GAIN: tl.constexpr, ASM: tl.constexpr, GROUPS: tl.constexpr,
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
    # A sum per channel of the pixels of this piece, times the gain and, in fp64, times scale: the gain's
    # gradient is one number out of few products, and what is left of many that cancel.
    piece = n * tl.num_programs(1) + tl.program_id(1)
    total = tl.sum(sums, 0)
    at_scale = total * tl.load(gain).to(tl.float32)
    tl.store(grad_scale + piece * CHANNELS + c, at_scale.to(grad_scale.dtype.element_ty), mask=own)
    s = tl.load(scale + n * scale_row + c, mask=own, other=0)
    at_gain = tl.sum(total.to(tl.float64) * s.to(tl.float64), 0)
    # The last of a piece's programs also writes the zeros of groups without channels.
    SLABS: tl.constexpr = (CHANNELS + WIDTH - 1) // WIDTH
    SUMS: tl.constexpr = SLABS if SLABS > GROUPS else GROUPS
    slab, ahead = tl.program_id(2), tl.arange(0, GROUPS)
    end = tl.where(slab == SLABS - 1, SUMS, slab + 1)
    at_gain = tl.where(ahead == 0, at_gain, 0.0).to(grad_gain.dtype.element_ty)
    tl.store(grad_gain + piece * SUMS + slab + ahead, at_gain, mask=slab + ahead < end)


# -- launchers ------------------------------------------------------------------------------------

LANES = 2 << 10  # elements of a tile; half as many with a mask, whose random words take registers
PROGRAMS = 1024  # enough of them to fill any GPU
GAIN_PARTS = 4
"""Of the gain's gradient in each part of a sample."""


def parts_for(n: int) -> int:
    """Parts of each of n samples in which gradients may be left: with GAIN_PARTS groups of channels, enough
    programs to fill a GPU."""
    return power_of_2(-(-2 * PROGRAMS // (GAIN_PARTS * max(n, 1))))


def _constants(shape, threshold, is_channels_last, asm, parts=None):
    """parts: into how many each sample is cut, with GAIN_PARTS groups of channels; None leaves it open."""
    n, c, h, w = shape
    widest = 64 if parts is None else max(64, power_of_2(-(-c // GAIN_PARTS)))
    pixels, width = tile_for(c, -(-h * w // (parts or 1)), widest=widest)
    pixels = min(pixels, max(1, (LANES >> (threshold > 0)) // width))
    tiles, slabs = -(-h * w // pixels), -(-c // width)
    # Fewer, longer pieces where there are programs enough: fewer sums remain to be added up.
    piece = max(1, min(tiles, n * slabs * tiles // PROGRAMS))
    piece = 1 << (piece.bit_length() - 1)  # few compiled forms, whatever the batch
    if parts is not None:
        piece = -(-tiles // parts)
    constants = dict(
        CHANNELS=c, HW=h * w, PIXELS=pixels, WIDTH=width, PIECE=piece,
        CHANNELS_LAST=is_channels_last, DROPS=threshold > 0,
        BY_EIGHT=threshold > 0 and c % 8 == 0 and width % 8 == 0,
        GAIN=1 / MP_SILU, ASM=asm, num_warps=4,
    )  # fmt: skip
    return constants, (n, parts or -(-tiles // piece), slabs)


def _arguments(x, scale, gain, sample, seed, step, layer, threshold):
    scale = rows(scale[:, 0] if scale.ndim == 3 else scale)
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
    in_parts, is_last = scale.ndim == 3, layout == torch.channels_last
    parts = scale.shape[1] if in_parts else None
    constants, grid = _constants(x.shape, threshold, is_last, has_asm(x), parts)
    of_scale, of_gain = (scale.dtype, gain.dtype) if in_parts else (torch.float32, torch.float64)
    groups = GAIN_PARTS if in_parts else 1
    shape = *grid[:2], x.shape[1]
    grad_scale = torch.empty(shape, dtype=of_scale, device=x.device)
    shape = *grid[:2], max(grid[2], groups)
    grad_gain = torch.empty(shape, dtype=of_gain, device=x.device)
    tensors, scalars = _arguments(x, scale, gain, sample, seed, step, layer, threshold)
    launch(
        _modulate_mp_silu_bwd_kernel, grid, grad_y, x, *tensors, grad_x, grad_scale, grad_gain, *scalars,
        GROUPS=groups, **constants,
    )  # fmt: skip
    if in_parts:
        return grad_x, grad_scale, grad_gain
    return grad_x, grad_scale.sum(1).to(scale.dtype), grad_gain.sum().to(gain.dtype)


def specialisations(capability: int) -> list[Variant]:
    """The forms in which EDM2-S and -XL use the kernels at 64 x 64, in channels_last: with dropout at
    16 pixels and below."""
    variants = []
    scalars = {"scale_row": "i32", "layer": "i32", "threshold": "i32", "keep_scale": "fp32"}
    for size, c, dtype in edm2_sites():
        threshold = 26214 if size <= 16 else 0
        key = dict.fromkeys(("sample", "seed", "step"), "i64" if threshold else dtype)
        pointers = dict.fromkeys(("x", "scale"), dtype) | {"gain": "fp32"} | key
        grads = dict.fromkeys(("grad_y", "grad_x", "grad_scale"), dtype) | {"grad_gain": "fp32"}
        for kernel, own, parts, more in (
            (_modulate_mp_silu_fwd_kernel, {"y": dtype}, None, {}),
            (_modulate_mp_silu_bwd_kernel, grads, parts_for(64), {"GROUPS": GAIN_PARTS}),
        ):
            constants, grid = _constants((64, c, size, size), threshold, True, True, parts)
            variants += forms(
                f"{size}x{size}x{c} {dtype}", scalars, constants, (kernel, pointers | own, more),
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
    return dense_like(x), scale.new_empty(scale.shape), gain.new_empty(gain.shape)


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


def _is_expanded(v: torch.Tensor, *dims: int) -> bool:
    return all(v.shape[dim] == 1 or v.stride(dim) == 0 for dim in dims)


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
        gain: a scalar tensor, fp32 (or float64, with a float64 x). Expanded, both, to [N,P,C] and to
            [N,P,GAIN_PARTS], P being `parts_for(N)` or another number, their gradients are left in as many
            parts, and whoever expanded them has to add these up: EDM2 does so for all its blocks at once.
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
    in_parts = scale.ndim == 3
    fits = scale.shape == (n, c)
    if in_parts:
        fits = scale.shape == (n, scale.shape[1], c) and _is_expanded(scale, 1)
        fits = fits and n > 0 and scale.shape[1] > 0
    if not fits:
        raise ValueError(
            f"modulate_mp_silu: scale must be [{n},{c}], or expanded to [{n},P,{c}], got {list(scale.shape)}"
        )
    expected = (*scale.shape[:2], GAIN_PARTS) if in_parts else ()
    if gain.shape != expected or not _is_expanded(gain, *range(gain.ndim)):
        raise ValueError(
            f"modulate_mp_silu: gain must be a scalar, or one expanded to [N,P,{GAIN_PARTS}] where scale is "
            f"expanded, got {list(gain.shape)}"
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
