"""Group normalisation with what surrounds it in a diffusion U-Net's block: the embedding added
before, scale, shift, SiLU and dropout after (Wu & He 2018; Karras et al. 2022, appendix C)."""

import functools
import itertools
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

from tcm_fast.kernels._backend import extension_for, extension_gap
from tcm_fast.kernels._common import (
    DTYPES,
    check_image,
    dense_like,
    empty,
    fits_channels,
    given,
    has_asm,
    laid_out,
    layout_of,
    of_channels,
    power_of_2,
    register,
    rows,
    sigmoid,
)
from tcm_fast.kernels._philox_triton import is_kept
from tcm_fast.kernels._triton import (
    Variant,
    calls_directly,
    gradients,
    launch,
    or_reference,
    runs_triton,
    tl,
    triton,
)
from tcm_fast.kernels.dropout import PhiloxKey, check_dropout, dropout, key_arguments, key_of

# -- reference ------------------------------------------------------------------------------------


def group_norm_silu_reference(
    x,
    num_groups,
    weight,
    bias,
    eps=1e-5,
    *,
    silu=True,
    add=None,
    scale=None,
    shift=None,
    dropout_p=0.0,
    dropout_key=None,
    with_x=False,
    second=None,
):
    if second is not None:
        x = torch.cat([x, second], 1)
    dtype = torch.promote_types(x.dtype, torch.float32)
    y = x.to(dtype)
    if add is not None:
        y = y + add.to(dtype)[:, :, None, None]
    if y.is_cpu:
        # The channels_last path of torch 2.13 on a CPU takes the variance as E[x²] - E[x]², and its
        # backward pass crashes where the gradient of the weight is asked for and not that of x.
        y = y.contiguous()
    weight, bias = (of_channels(v).to(dtype) for v in (weight, bias))
    y = torch.group_norm(y, num_groups, weight, bias, eps)
    if scale is not None:
        y = y * (1 + scale.to(dtype)[:, :, None, None])
    if shift is not None:
        y = y + shift.to(dtype)[:, :, None, None]
    if silu:
        y = F.silu(y)
    y = y.to(x.dtype).contiguous(memory_format=layout_of(x))
    if dropout_p > 0:
        y = dropout(y, dropout_p, dropout_key)
    return (y, x) if with_x else y


# -- kernels --------------------------------------------------------------------------------------

# A program owns a slab: GROUPS whole groups of one sample, at all pixels, cut into TILES tiles
# [PIXELS, SLAB] in both layouts (a pixel is a row of memory in channels_last, a channel is one
# otherwise: the compiler orders the threads by the addresses). SLAB and PIXELS are powers of two, the
# rest is masked. HOLDS: the tiles stay in registers, and x is read once. Otherwise a second loop reads
# them again, backwards, so that what was read last is found in the L2 cache.


@triton.jit
def _reload_barrier(x, PACKS: tl.constexpr):
    """x itself, in a way that no compiler sees through (%ctaid.z is 0, which they do not know): what
    is held are two 16-bit values in a register, not the fp32 values that they were converted to before.
    """
    if PACKS:
        return tl.inline_asm_elementwise(
            "{ .reg .u32 z; mov.u32 z, %ctaid.z; xor.b32 $0, $1, z; }",
            "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2,
        )  # fmt: skip
    return x


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _sums(a, b, ASM: tl.constexpr):
    """Sums over the pixels; in one pass where compiled (interpreted, that takes minutes)."""
    if ASM:
        return tl.reduce((a, b), 0, _add_both)
    return tl.sum(a, 0), tl.sum(b, 0)


@triton.jit
def _slab(
    CHANNELS: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr, SLAB: tl.constexpr
):  # fmt: skip
    """-> sample number int64, first channel of the slab, its channels [SLAB], which of them it has, its
    groups, which of them it has, and [SLAB, groups] which channel is in which group."""
    CPG: tl.constexpr = CHANNELS // NUM_GROUPS
    SLABS: tl.constexpr = (NUM_GROUPS + GROUPS - 1) // GROUPS
    n = (tl.program_id(0) // SLABS).to(tl.int64)
    first_group = tl.program_id(0) % SLABS * GROUPS
    first = first_group * CPG
    i = tl.arange(0, SLAB)
    g = tl.arange(0, triton.next_power_of_2(GROUPS))
    if SLAB == GROUPS * CPG and CHANNELS % SLAB == 0:
        own = tl.full([SLAB], True, tl.int1)
    else:
        own = (i < GROUPS * CPG) & (first + i < CHANNELS)
    has = (g < GROUPS) & (first_group + g < NUM_GROUPS)
    member = ((i // CPG)[:, None] == g[None, :]) & own[:, None]
    return n, first, first + i, own, first_group + g, has, member


@triton.jit
def _to_groups(v, member):
    """fp32 [SLAB] summed over the channels of each group."""
    return tl.sum(tl.where(member, v[:, None], 0.0), 0)


@triton.jit
def _to_channels(v, member):
    """fp32 [groups] -> [SLAB], to each channel its group's."""
    return tl.sum(tl.where(member, v[None, :], 0.0), 1)


@triton.jit
def _where(tile, c, own, CHANNELS: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr,
           CHANNELS_LAST: tl.constexpr):  # fmt: skip
    """-> pixels [PIXELS], offsets within the sample and mask [PIXELS, SLAB] of one tile."""
    p = tile * PIXELS + tl.arange(0, PIXELS)
    if HW % PIXELS == 0:
        inside = tl.full([PIXELS], True, tl.int1)[:, None] & own[None, :]
    else:
        inside = (p < HW)[:, None] & own[None, :]
    by_pixel = p[:, None] * CHANNELS + c[None, :]
    at = by_pixel if CHANNELS_LAST else p[:, None] + c[None, :] * HW
    return p, at, inside


@triton.jit
def _load(x, second, joined, p, c, at, inside, CHANNELS: tl.constexpr, HW: tl.constexpr,
          CHANNELS_LAST: tl.constexpr, FIRST: tl.constexpr, JOINS: tl.constexpr,
          POLICY: tl.constexpr):  # fmt: skip
    """A tile of x, or where FIRST > 0 of x [FIRST channels] and second side by side; JOINS writes it down."""
    if FIRST == 0:
        return tl.load(x + at, mask=inside, other=0, eviction_policy=POLICY)
    is_first = (c < FIRST)[None, :]
    if CHANNELS_LAST:
        in_first = p[:, None] * FIRST + c[None, :]
        in_second = p[:, None] * (CHANNELS - FIRST) + (c - FIRST)[None, :]
    else:
        in_first = at
        in_second = p[:, None] + (c - FIRST)[None, :] * HW
    a = tl.load(x + in_first, mask=inside & is_first, other=0, eviction_policy=POLICY)
    b = tl.load(
        second + in_second, mask=inside & (c >= FIRST)[None, :], other=0, eviction_policy=POLICY
    )
    v = tl.where(is_first, a, b)
    if JOINS:
        tl.store(joined + at, v, mask=inside)
    return v


@triton.jit
def _affine(n, c, own, weight, bias, scale, shift, scale_row, shift_row, HAS_SCALE: tl.constexpr,
            HAS_SHIFT: tl.constexpr):  # fmt: skip
    """-> weight, bias, 1 + scale, and the bias after scale and shift, each fp32 [SLAB]."""
    w = tl.load(weight + c, mask=own, other=0)
    b = tl.load(bias + c, mask=own, other=0)
    gain = tl.full(c.shape, 1.0, tl.float32)
    offset = b
    if HAS_SCALE:
        gain += tl.load(scale + n * scale_row + c, mask=own, other=0).to(tl.float32)
        offset = b * gain
    if HAS_SHIFT:
        offset += tl.load(shift + n * shift_row + c, mask=own, other=0).to(tl.float32)
    return w, b, gain, offset


@triton.jit
def _finish(v, p, first, c, slope, offset, sample, seed, step, layer, threshold, keep_scale,
            CHANNELS: tl.constexpr, SLAB: tl.constexpr, SILU: tl.constexpr, DROPS: tl.constexpr,
            BY_EIGHT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """dropout(silu(z)) with z = v·slope + offset, v = x + add - mean."""
    z = v * slope[None, :] + offset[None, :]
    if SILU:
        z = z * sigmoid(z, ASM)
    if DROPS:
        kept = is_kept(p, first, c, sample, seed, step, layer, threshold, CHANNELS, BY_EIGHT, SLAB)
        z = tl.where(kept, z * keep_scale, 0.0)
    return z


@triton.jit(do_not_specialize=["layer", "threshold"])
def _group_norm_silu_fwd_kernel(
    x, second, weight, bias, add, scale, shift, sample, seed, step, y, joined, mean, rstd,
    add_row, scale_row, shift_row, layer, threshold, keep_scale, eps,
    CHANNELS: tl.constexpr, HW: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    SLAB: tl.constexpr, PIXELS: tl.constexpr, HOLDS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    HAS_ADD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
    DROPS: tl.constexpr, BY_EIGHT: tl.constexpr, ASM: tl.constexpr, PACKS: tl.constexpr,
    FIRST: tl.constexpr,
):  # fmt: skip
    CPG: tl.constexpr = CHANNELS // NUM_GROUPS
    TILES: tl.constexpr = (HW + PIXELS - 1) // PIXELS
    n, first, c, own, group, has, member = _slab(CHANNELS, NUM_GROUPS, GROUPS, SLAB)
    x += n * ((CHANNELS if FIRST == 0 else FIRST) * HW)
    second += n * ((CHANNELS - FIRST) * HW)
    y += n * (CHANNELS * HW)
    joined += n * (CHANNELS * HW)

    # Mean and summed squared deviation of each channel, in two steps: never E[x²] - E[x]².
    held = ()
    if HOLDS:
        total = tl.zeros([PIXELS, SLAB], tl.float32)
        for tile in tl.static_range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = _load(
                x, second, joined, p, c, at, inside, CHANNELS, HW, CHANNELS_LAST, FIRST, True, ""
            )
            held = held + (v,)  # noqa: RUF005
        for tile in tl.static_range(TILES):
            total += held[tile].to(tl.float32)
        average = tl.sum(total, 0) / HW
        slot_rest = tl.zeros([PIXELS, SLAB], tl.float32)
        slot_spread = tl.zeros([PIXELS, SLAB], tl.float32)
        for tile in tl.static_range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            d = tl.where(
                inside, _reload_barrier(held[tile], PACKS).to(tl.float32) - average[None, :], 0.0
            )
            slot_rest += d
            slot_spread += d * d
    else:
        # Welford's recurrence in every slot of the tile, the slots joined after Chan.
        slot_average = tl.zeros([PIXELS, SLAB], tl.float32)
        slot_spread = tl.zeros([PIXELS, SLAB], tl.float32)
        for tile in tl.range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = _load(x, second, joined, p, c, at, inside, CHANNELS, HW, CHANNELS_LAST, FIRST, True,
                      "evict_last").to(tl.float32)  # fmt: skip
            d = tl.where(inside, v - slot_average, 0.0)
            slot_average += d * (1.0 / (tile + 1))
            slot_spread += d * (v - slot_average)
        last = (TILES - 1) * PIXELS + tl.arange(0, PIXELS)
        count = tl.where(last < HW, 1.0 * TILES, 1.0 * TILES - 1.0)[:, None]
        average = tl.sum(slot_average * count, 0) / HW
        d = slot_average - average[None, :]
        slot_rest = d * count
        slot_spread += d * slot_rest
    rest, spread = _sums(slot_rest, slot_spread, ASM)
    average += rest / HW
    spread -= rest * (rest / HW)

    # Channels of equal size joined into groups, after Chan; `add` moves a channel as a whole.
    moved = tl.zeros([SLAB], tl.float32)
    if HAS_ADD:
        moved = tl.load(add + n * add_row + c, mask=own, other=0).to(tl.float32)
    average += moved
    group_mean = _to_groups(average, member) / CPG
    channel_mean = _to_channels(group_mean, member)
    d = average - channel_mean
    variance = _to_groups(spread + d * d * HW, member) / (CPG * HW)
    group_rstd = tl.rsqrt(variance + eps)
    tl.store(mean + n * NUM_GROUPS + group, group_mean, mask=has)
    tl.store(rstd + n * NUM_GROUPS + group, group_rstd, mask=has)

    w, _, gain, offset = _affine(
        n, c, own, weight, bias, scale, shift, scale_row, shift_row, HAS_SCALE, HAS_SHIFT
    )
    slope = _to_channels(group_rstd, member) * w * gain
    origin = channel_mean - moved
    sample_n, seed_n, step_n = n, n, n
    if DROPS:
        sample_n, seed_n, step_n = tl.load(sample + n), tl.load(seed), tl.load(step)
    if HOLDS:
        for tile in tl.static_range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = _reload_barrier(held[tile], PACKS).to(tl.float32) - origin[None, :]
            out = _finish(v, p, first, c, slope, offset, sample_n, seed_n, step_n, layer, threshold,
                          keep_scale, CHANNELS, SLAB, SILU, DROPS, BY_EIGHT, ASM)  # fmt: skip
            tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)
    else:
        for i in tl.range(TILES):
            p, at, inside = _where(TILES - 1 - i, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = _load(x, second, joined, p, c, at, inside, CHANNELS, HW, CHANNELS_LAST, FIRST, False,
                      "evict_first").to(tl.float32)  # fmt: skip
            v -= origin[None, :]
            out = _finish(v, p, first, c, slope, offset, sample_n, seed_n, step_n, layer, threshold,
                          keep_scale, CHANNELS, SLAB, SILU, DROPS, BY_EIGHT, ASM)  # fmt: skip
            tl.store(y + at, out.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _drop(grad, p, first, c, sample, seed, step, layer, threshold, CHANNELS: tl.constexpr,
          SLAB: tl.constexpr, DROPS: tl.constexpr, BY_EIGHT: tl.constexpr):  # fmt: skip
    """grad_y where dropout kept, not yet divided by the keep probability."""
    if DROPS:
        kept = is_kept(p, first, c, sample, seed, step, layer, threshold, CHANNELS, BY_EIGHT, SLAB)
        grad = tl.where(kept, grad, 0.0)
    return grad


@triton.jit
def _grad_z(v, grad, slope, offset, SILU: tl.constexpr, ASM: tl.constexpr):
    """The gradient at z = v·slope + offset, v = x + add - mean."""
    grad = grad.to(tl.float32)
    if SILU:
        z = v * slope[None, :] + offset[None, :]
        s = sigmoid(z, ASM)
        grad = grad * (s + (z * s) * (1.0 - s))
    return grad


@triton.jit(do_not_specialize=["layer", "threshold"])
def _group_norm_silu_bwd_kernel(
    grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, grad_x,
    grad_affine, grad_add, grad_scale, grad_shift, batch, add_row, scale_row, shift_row, layer,
    threshold, keep_scale,
    CHANNELS: tl.constexpr, HW: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    SLAB: tl.constexpr, PIXELS: tl.constexpr, HOLDS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    HAS_ADD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
    DROPS: tl.constexpr, BY_EIGHT: tl.constexpr, ASM: tl.constexpr, PACKS: tl.constexpr,
    WANTS_AFFINE: tl.constexpr, HAS_PAST: tl.constexpr,
):  # fmt: skip
    CPG: tl.constexpr = CHANNELS // NUM_GROUPS
    TILES: tl.constexpr = (HW + PIXELS - 1) // PIXELS
    n, first, c, own, group, has, member = _slab(CHANNELS, NUM_GROUPS, GROUPS, SLAB)
    x += n * (CHANNELS * HW)
    grad_y += n * (CHANNELS * HW)
    grad_x += n * (CHANNELS * HW)
    grad_past += n * (CHANNELS * HW)
    group_mean = tl.load(mean + n * NUM_GROUPS + group, mask=has, other=0)
    group_rstd = tl.load(rstd + n * NUM_GROUPS + group, mask=has, other=0)
    origin, r = _to_channels(group_mean, member), _to_channels(group_rstd, member)
    if HAS_ADD:
        origin -= tl.load(add + n * add_row + c, mask=own, other=0).to(tl.float32)
    w, b, gain, offset = _affine(
        n, c, own, weight, bias, scale, shift, scale_row, shift_row, HAS_SCALE, HAS_SHIFT
    )
    slope = r * w * gain
    sample_n, seed_n, step_n = n, n, n
    if DROPS:
        sample_n, seed_n, step_n = tl.load(sample + n), tl.load(seed), tl.load(step)

    # Of each channel: sum_b of the gradient g at z, sum_a of g·xhat.
    slot_b = tl.zeros([PIXELS, SLAB], tl.float32)
    slot_a = tl.zeros([PIXELS, SLAB], tl.float32)
    held_x, held_g = (), ()
    if HOLDS:
        for tile in tl.static_range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            held_x = held_x + (tl.load(x + at, mask=inside, other=0),)  # noqa: RUF005
            held_g = held_g + (tl.load(grad_y + at, mask=inside, other=0),)  # noqa: RUF005
        raw, held_g = held_g, ()
        for tile in tl.static_range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = held_x[tile].to(tl.float32) - origin[None, :]
            g = _drop(raw[tile], p, first, c, sample_n, seed_n, step_n, layer, threshold, CHANNELS,
                      SLAB, DROPS, BY_EIGHT)  # fmt: skip
            held_g = held_g + (g,)  # noqa: RUF005
            g = _grad_z(v, g, slope, offset, SILU, ASM)
            slot_b += g
            slot_a += g * v
    else:
        for tile in tl.range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = tl.load(x + at, mask=inside, other=0, eviction_policy="evict_last").to(tl.float32)
            v -= origin[None, :]
            g = tl.load(grad_y + at, mask=inside, other=0, eviction_policy="evict_last")
            g = _drop(g, p, first, c, sample_n, seed_n, step_n, layer, threshold, CHANNELS,
                      SLAB, DROPS, BY_EIGHT)  # fmt: skip
            g = _grad_z(v, g, slope, offset, SILU, ASM)
            slot_b += g
            slot_a += g * v
    sum_b, sum_a = _sums(slot_b, slot_a, ASM)
    sum_b *= keep_scale
    sum_a *= keep_scale * r

    # grad_x = rstd·(w·gain·g - mean of it over the group - xhat · mean of (w·gain·g·xhat)).
    to_a = _to_channels(_to_groups(w * gain * sum_a, member), member) / (CPG * HW)
    to_b = _to_channels(_to_groups(w * gain * sum_b, member), member) / (CPG * HW)
    if WANTS_AFFINE:
        tl.store(grad_affine + n * CHANNELS + c, gain * sum_a, mask=own)
        tl.store(grad_affine + (batch + n) * CHANNELS + c, gain * sum_b, mask=own)
    if HAS_SCALE:
        total = w * sum_a + b * sum_b
        tl.store(grad_scale + n * CHANNELS + c, total.to(grad_scale.dtype.element_ty), mask=own)
    if HAS_SHIFT:
        tl.store(grad_shift + n * CHANNELS + c, sum_b.to(grad_shift.dtype.element_ty), mask=own)

    from_v = r * r * to_a
    from_all = r * to_b
    slot_add = tl.zeros([PIXELS, SLAB], tl.float32)
    if HOLDS:
        for tile in tl.static_range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = _reload_barrier(held_x[tile], PACKS).to(tl.float32) - origin[None, :]
            g = _grad_z(v, _reload_barrier(held_g[tile], PACKS), slope, offset, SILU, ASM)
            out = g * (slope * keep_scale)[None, :] - from_all[None, :] - v * from_v[None, :]
            if HAS_ADD:
                slot_add += tl.where(inside, out, 0.0)
            if HAS_PAST:
                out += tl.load(grad_past + at, mask=inside, other=0).to(tl.float32)
            tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=inside)
    else:
        for i in tl.range(TILES):
            p, at, inside = _where(TILES - 1 - i, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = tl.load(x + at, mask=inside, other=0, eviction_policy="evict_first").to(tl.float32)
            v -= origin[None, :]
            g = tl.load(grad_y + at, mask=inside, other=0, eviction_policy="evict_first")
            g = _drop(g, p, first, c, sample_n, seed_n, step_n, layer, threshold, CHANNELS,
                      SLAB, DROPS, BY_EIGHT)  # fmt: skip
            g = _grad_z(v, g, slope, offset, SILU, ASM)
            out = g * (slope * keep_scale)[None, :] - from_all[None, :] - v * from_v[None, :]
            if HAS_ADD:
                slot_add += tl.where(inside, out, 0.0)
            if HAS_PAST:
                out += tl.load(grad_past + at, mask=inside, other=0).to(tl.float32)
            tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=inside)
    if HAS_ADD:
        total = tl.sum(slot_add, 0)
        tl.store(grad_add + n * CHANNELS + c, total.to(grad_add.dtype.element_ty), mask=own)


# -- launchers ------------------------------------------------------------------------------------


class _Plan(NamedTuple):
    """A program's tiles: `groups` whole groups in `slab` columns, `pixels` rows; whether it holds all of
    them at once; its warps."""

    groups: int
    slab: int
    pixels: int
    holds: bool
    warps: int


@functools.cache
def _plan(
    channels: int, pixels: int, num_groups: int, itemsize: int, unit: int, channels_last: bool,
    backward: bool,
) -> _Plan:  # fmt: skip
    """The tiles of a shape; a slab is a multiple of `unit` channels where it can be.

    Reasoned from registers (of sm_80 and sm_90, whose files are equal), not measured.

    A slab that is held takes 64 values of a thread in 16 bits (32 registers, in the backward pass 64)
    or 32 in fp32, besides the 24 to 40 that hold what belongs to its channels: 8 warps hold 16384
    values of 16 bits in 128 registers, twice on an SM, so that one program loads while the other
    computes; backward they need up to 255, once. At 32 x 32 that makes rows of 32 bytes, a sector; rows
    of 64 fit too, forward, but once on an SM, and then nothing overlaps: they are taken where a group
    is that wide. Smaller images get rows of 64. A slab that is read twice takes the narrowest rows of
    32 bytes or more: 132 times two slabs of 196 KB (ADM, 64 x 64) are about what L2 holds. Channels
    beside the last power of two cost registers and instructions, no traffic.
    """
    cpg = channels // num_groups
    is_wide = itemsize > 2
    wished = 8192 if is_wide else 16384
    most = wished if backward and not is_wide else 2 * wished
    plans = []
    for groups in range(1, min(num_groups, max(1, 512 // cpg)) + 1):
        used, is_whole = groups * cpg, groups == num_groups
        slab = power_of_2(used)
        slots = pixels * slab
        row = (used if channels_last else pixels) * itemsize
        is_row = row >= 32 or is_whole or not channels_last
        aligned = channels % unit == 0 and used % unit == 0
        if slots <= most and is_row:
            ample = row >= 64 if channels_last else slots >= 1024
            score: tuple[int, ...] = (aligned, 1, slots <= wished, ample, -slab, groups)
        else:
            score = (aligned, 0, is_row, -slab, groups)
        plans.append((score, groups, slab))
    (_, holds, *_), groups, slab = max(plans)
    each = 32 if is_wide else 64
    warps = min(16, max(4, power_of_2(pixels * slab) // (32 * each))) if holds else 16
    # A tile is 8 or 16 values of a thread, one to four accesses: few live at once, enough in flight.
    tile = 32 * warps * (16 if (is_wide if holds else not backward) else 8)
    rows = min(power_of_2(pixels), max(1, tile // slab))
    return _Plan(groups, slab, rows, bool(holds), warps)


def _constants(
    x, num_groups, add, scale, shift, silu, threshold, backward, asm
) -> tuple[dict[str, Any], int]:
    """A kernel's constants, and the number of programs."""
    n, c, h, w = x.shape
    channels_last = layout_of(x) == torch.channels_last
    drops = threshold > 0
    # A slab starts at a multiple of 16 bytes, and of the channels that share a block of Philox.
    unit = 8 if drops else 16 // x.itemsize
    plan = _plan(c, h * w, num_groups, x.itemsize, unit, channels_last, backward)
    by_eight = c % 8 == 0 and plan.groups * (c // num_groups) % 8 == 0
    constants = dict(
        CHANNELS=c, HW=h * w, NUM_GROUPS=num_groups, GROUPS=plan.groups, SLAB=plan.slab,
        PIXELS=plan.pixels, HOLDS=plan.holds, CHANNELS_LAST=channels_last, HAS_ADD=add is not None,
        HAS_SCALE=scale is not None, HAS_SHIFT=shift is not None, SILU=silu, DROPS=drops,
        BY_EIGHT=drops and by_eight, ASM=asm,
        PACKS=asm and x.itemsize == 2 and plan.slab * plan.pixels >= 64 * plan.warps,
        num_warps=plan.warps,
    )  # fmt: skip
    return constants, n * -(-num_groups // plan.groups)


def _launch_fwd(
    x, second, weight, bias, add, scale, shift, sample, seed, step, num_groups, eps, silu, layer, threshold
):  # fmt: skip
    layout = layout_of(x)
    x, second = laid_out(layout, x, second)
    add, scale, shift = rows(add), rows(scale), rows(shift)
    joined, first = x, 0
    if second is not None:
        n, first, *size = x.shape
        joined = empty(x, (n, first + second.shape[1], *size), layout)
    constants, programs = _constants(
        joined, num_groups, add, scale, shift, silu, threshold, False, has_asm(x)
    )
    y = torch.empty_like(joined)
    mean, rstd = _statistics(x, num_groups)
    launch(
        _group_norm_silu_fwd_kernel, (programs,), x, *given(x, second), *_affine_of(weight, bias),
        *given(x, add, scale, shift, sample, seed, step), y, joined, mean, rstd,
        *_row_strides(add, scale, shift), layer, threshold, 65536 / (65536 - threshold), eps,
        **constants, FIRST=first,
    )  # fmt: skip
    return y, joined, mean, rstd


def _fwd(x, *arguments):
    y, _, mean, rstd = _launch_fwd(x, None, *arguments)
    return y, mean, rstd


def _joined_fwd(*arguments):
    *inputs, second = arguments
    return _launch_fwd(inputs[0], second, *inputs[1:])


def _bwd(
    grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, num_groups, silu,
    layer, threshold, wants_affine,
):  # fmt: skip
    x, grad_y, grad_past = laid_out(layout_of(x), x, grad_y, grad_past)
    add, scale, shift = rows(add), rows(scale), rows(shift)
    constants, programs = _constants(
        x, num_groups, add, scale, shift, silu, threshold, True, has_asm(x)
    )
    n, c = x.shape[:2]
    grad_x = torch.empty_like(x)
    # One program writes each entry; PyTorch's sum over the batch has one order too.
    by_sample = torch.empty((2, n if wants_affine else 0, c), dtype=torch.float32, device=x.device)
    grads = [
        None if v is None else torch.empty((n, c), dtype=v.dtype, device=x.device)
        for v in (add, scale, shift)
    ]
    launch(
        _group_norm_silu_bwd_kernel, (programs,), grad_y, *given(x, grad_past), x, mean, rstd,
        *_affine_of(weight, bias),
        *given(x, add, scale, shift, sample, seed, step), grad_x, by_sample, *given(x, *grads), n,
        *_row_strides(add, scale, shift), layer, threshold, 65536 / (65536 - threshold),
        **constants, WANTS_AFFINE=wants_affine, HAS_PAST=grad_past is not None,
    )  # fmt: skip
    affine = by_sample.sum(1) if weight.ndim == 1 else by_sample
    return [grad_x, affine, *(v for v in grads if v is not None)]


def _affine_of(weight, bias):
    return [of_channels(v).contiguous() for v in (weight, bias)]


def _on_cpu(x, *operands):
    """Whether the extension serves these tensors: fp32 on a CPU, x in channels_last."""
    return (
        x.device.type == "cpu"
        and all(v is None or v.dtype == torch.float32 for v in (x, *operands))
        and x.is_contiguous(memory_format=torch.channels_last)
        and x.numel() > 0
        and calls_directly(x)
        and not extension_gap(x.device)
    )


def _dense(*tensors):
    return [None if v is None else v.contiguous() for v in tensors]


def _addresses(*tensors):
    return [0 if v is None else v.data_ptr() for v in tensors]


def _fwd_cpu(
    x, weight, bias, add, scale, shift, sample, seed, step, num_groups, eps, silu, layer, threshold
):
    n, c, h, w = x.shape
    y, (mean, rstd) = torch.empty_like(x), _statistics(x, num_groups)
    operands, key = _dense(*_affine_of(weight, bias), add, scale, shift), _dense(sample, seed, step)
    extension_for("group_norm_silu", x.device).group_norm_silu_fwd_cpu(
        *_addresses(y, x, *operands, mean, rstd), n, c, h * w, num_groups, eps, silu,
        *_addresses(*key), layer, threshold, torch.get_num_threads(),
    )  # fmt: skip
    return y, mean, rstd


def _bwd_cpu(
    grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, num_groups, silu,
    layer, threshold, wants_affine,
):  # fmt: skip
    n, c, h, w = x.shape
    grad_y, grad_past = (
        None if v is None else v.contiguous(memory_format=torch.channels_last)
        for v in (grad_y, grad_past)
    )
    grad_x = torch.empty_like(x)
    by_sample = x.new_empty((2, n, c)) if wants_affine else None
    grads = [None if v is None else x.new_empty((n, c)) for v in (add, scale, shift)]
    operands, key = _dense(*_affine_of(weight, bias), add, scale, shift), _dense(sample, seed, step)
    extension_for("group_norm_silu", x.device).group_norm_silu_bwd_cpu(
        *_addresses(grad_y, grad_past, grad_x, by_sample, *grads, x, *operands, mean, rstd),
        n, c, h * w, num_groups, silu, *_addresses(*key), layer, threshold, torch.get_num_threads(),
    )  # fmt: skip
    if by_sample is None:
        affine = x.new_zeros((2, *weight.shape))
    else:
        affine = by_sample.sum(1) if weight.ndim == 1 else by_sample
    return [grad_x, affine, *(v for v in grads if v is not None)]


def _statistics(x, num_groups):
    shape = (x.shape[0], num_groups)
    return tuple(torch.empty(shape, dtype=torch.float32, device=x.device) for _ in range(2))


def _row_strides(*modulations):
    return [0 if v is None else v.stride(0) for v in modulations]


# Channels, pixels, how a block of the network uses it. DDPM++ CIFAR-10 (groups of C/32) and ADM-64.
_NORM, _EMBEDDED, _PLAIN, _MODULATED = "norm", "add dropout", "no silu", "scale shift dropout"
_SITES = {
    "ddpmpp": (
        (32, (128, 256, 384, 512), (_NORM,)), (32, (256,), (_EMBEDDED,)),
        (16, (256, 512), (_NORM,)), (16, (256,), (_EMBEDDED, _PLAIN)),
        (8, (256, 512), (_NORM,)), (8, (256,), (_EMBEDDED, _PLAIN)),
    ),
    "adm": (
        (64, (192, 384, 576), (_NORM,)), (64, (192,), (_MODULATED,)),
        (32, (192, 384, 576, 768, 960), (_NORM,)), (32, (384,), (_MODULATED, _PLAIN)),
        (16, (384, 576, 768, 960, 1152, 1344), (_NORM,)), (16, (576,), (_MODULATED, _PLAIN)),
        (8, (576, 768, 1344, 1536), (_NORM,)), (8, (768,), (_MODULATED, _PLAIN)),
    ),
}  # fmt: skip

# Some of a decoder's blocks, which join the encoder's output to theirs: pixels, channels of the two.
_JOINED_SITES = ((32, 256, 128), (32, 256, 256), (8, 256, 256), (64, 384, 192))


def specialisations(capability: int) -> list[Variant]:
    """The forms in which DDPM++ on CIFAR-10 and ADM at 64 x 64 use the kernels, in channels_last;
    the same for every compute capability."""
    variants = []
    for network, sites in _SITES.items():
        for size, widths, uses in sites:
            for c, use, dtype in itertools.product(widths, uses, DTYPES):
                x = torch.empty((64, c, size, size), dtype=dtype, device="meta")
                x = x.contiguous(memory_format=torch.channels_last)
                variants += _variants(f"{network} {size}x{size}x{c} {use}", x, min(32, c // 4), use)
    for (size, first, second), dtype in itertools.product(_JOINED_SITES, DTYPES):
        x = torch.empty((64, first + second, size, size), dtype=dtype, device="meta")
        x = x.contiguous(memory_format=torch.channels_last)
        variants += _variants(f"{size}x{size}x{first}+{second}", x, 32, _NORM, first)[:1]
    return variants


def _variants(
    site: str, x: torch.Tensor, num_groups: int, use: str, first: int = 0
) -> list[Variant]:
    """Forward and backward for a tensor like x, on any device; `first` are channels of the first of two."""
    name = DTYPES[x.dtype]
    add, scale = (x[..., 0, 0] if part in use else None for part in ("add", "scale"))
    threshold = 8520 if "dropout" in use else 0
    optional = dict.fromkeys(("add", "scale", "shift"), f"*{name}")
    optional |= dict.fromkeys(("sample", "seed", "step"), "*i64" if threshold else f"*{name}")
    affine = {"weight": "*fp32", "bias": "*fp32"} | optional
    statistics = {"mean": "*fp32", "rstd": "*fp32"}
    scalars = dict.fromkeys(("add_row", "scale_row", "shift_row", "layer", "threshold"), "i32")
    scalars["keep_scale"] = "fp32"
    image = f"*{name}"
    fwd = (
        {"x": image, "second": image}
        | affine
        | {"y": image, "joined": image}
        | statistics
        | scalars
    )
    fwd["eps"] = "fp32"
    bwd = {"grad_y": f"*{name}", "grad_past": f"*{name}", "x": f"*{name}"} | statistics | affine
    bwd |= {"grad_x": f"*{name}", "grad_affine": "*fp32"}
    bwd |= {f"grad_{part}": f"*{name}" for part in ("add", "scale", "shift")}
    bwd |= {"batch": "i32"} | scalars
    rows = {f"{part}_row" for part in ("add", "scale", "shift") if x.shape[1] % 16 == 0}
    variants = []
    for kernel, signature, more in (
        (_group_norm_silu_fwd_kernel, fwd, {"FIRST": first}),
        (
            _group_norm_silu_bwd_kernel,
            bwd,
            {"WANTS_AFFINE": True, "HAS_PAST": use in (_NORM, _PLAIN)},
        ),
    ):
        constants, programs = _constants(
            x, num_groups, add, scale, scale, use != _PLAIN, threshold, "HAS_PAST" in more, True
        )
        warps = constants.pop("num_warps")
        variants.append(
            Variant(f"{site} {name}", kernel, signature, constants | more, num_warps=warps,
                    aligned=frozenset(rows), programs=programs)
        )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(
    x, weight, bias, add, scale, shift, sample, seed, step, num_groups, eps, silu, layer, threshold
):
    key = key_of(sample, seed, step, layer, threshold)
    y = group_norm_silu_reference(
        x, num_groups, weight, bias, eps,
        silu=silu, add=add, scale=scale, shift=shift, dropout_p=threshold / 65536, dropout_key=key,
    )  # fmt: skip
    variance, mean = torch.var_mean(_groups(x, add, num_groups), -1, correction=0)
    return y.contiguous(memory_format=layout_of(x)), mean, (variance + eps).rsqrt()


def _joined_fwd_by_reference(x, *arguments):
    *arguments, second = arguments
    joined = torch.cat(laid_out(layout_of(x), x, second), 1).contiguous(memory_format=layout_of(x))
    y, mean, rstd = _fwd_by_reference(joined, *arguments)
    return y, joined, mean, rstd


def _groups(x, add, num_groups):
    """x + add, fp32 [N, groups, elements of a group]."""
    h = x.to(torch.float32)
    if add is not None:
        h = h + add.to(torch.float32)[:, :, None, None]
    return h.contiguous().view(len(x), num_groups, -1)


def _bwd_by_reference(
    grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, num_groups, silu,
    layer, threshold, wants_affine,
):  # fmt: skip
    layout = layout_of(x)
    n, c, height, width = x.shape
    h = _groups(x, add, num_groups)
    normed = ((h - mean[:, :, None]) * rstd[:, :, None]).view(x.shape)
    weight, bias, shape = of_channels(weight), of_channels(bias), weight.shape
    normed = normed * weight[:, None, None] + bias[:, None, None]

    def after_norm(y, scale, shift):
        if scale is not None:
            y = y * (1 + scale.to(torch.float32)[:, :, None, None])
        if shift is not None:
            y = y + shift.to(torch.float32)[:, :, None, None]
        y = (F.silu(y) if silu else y).to(x.dtype).contiguous(memory_format=layout)
        key = key_of(sample, seed, step, layer, threshold)
        return y if key is None else dropout(y, threshold / 65536, key)

    grad, grad_scale, grad_shift = gradients(after_norm, [normed, scale, shift], [grad_y])
    grad_x, grad_weight, grad_bias = torch.ops.aten.native_group_norm_backward(
        grad.contiguous(), h.view(x.shape), mean, rstd, weight, n, c, height * width, num_groups,
        [True, wants_affine, wants_affine],
    )  # fmt: skip
    grad_add = None if add is None else grad_x.sum((2, 3)).to(add.dtype)
    if grad_past is not None:
        grad_x = grad_x + grad_past
    affine = weight.new_zeros((2, *shape))
    if wants_affine:  # the whole of it at the first sample where they are to be summed later
        affine.view(2, -1)[:, :c] = torch.stack([grad_weight, grad_bias])
    grads = (g.contiguous() for g in (grad_add, grad_scale, grad_shift) if g is not None)
    return [grad_x.to(x.dtype).contiguous(memory_format=layout), affine, *grads]


def _fake_fwd(x, weight, bias, add, scale, shift, sample, seed, step, num_groups, *_):
    return dense_like(x), *_statistics(x, num_groups)


def _fake_joined_fwd(x, *arguments):
    n, c, *size = x.shape
    num_groups, *_, second = arguments[8:]
    y, joined = (empty(x, (n, c + second.shape[1], *size), layout_of(x)) for _ in range(2))
    return y, joined, *_statistics(x, num_groups)


def _fake_bwd(grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, *_):
    sums = torch.empty((2, *weight.shape), dtype=torch.float32, device=x.device)
    modulations = [v for v in (add, scale, shift) if v is not None]
    return [dense_like(x), sums, *(v.new_empty(v.shape) for v in modulations)]


def _save(ctx, inputs, output):
    *tensors, ctx.num_groups, _, ctx.silu, ctx.layer, ctx.threshold = inputs
    _, mean, rstd = output
    ctx.save_for_backward(*tensors, mean, rstd)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _grads(bwd, ctx, grad_y, grad_past):
    """The gradients of the operator's inputs; what reached x past it is added to grad_x."""
    x, weight, bias, add, scale, shift, sample, seed, step, mean, rstd = ctx.saved_tensors
    needs = ctx.needs_input_grad
    if grad_y is None:
        return grad_past, *[None] * 13
    grad_x, affine, *rest = bwd(
        grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step,
        ctx.num_groups, ctx.silu, ctx.layer, ctx.threshold, needs[1] or needs[2],
    )  # fmt: skip
    found = iter(rest)
    modulations = [None if v is None else next(found) for v in (add, scale, shift)]
    grads = [grad_x, *affine.unbind(), *modulations]
    return *(g if need else None for g, need in zip(grads, needs[:6], strict=True)), *[None] * 8


def _backward(ctx, grad_y, *_):
    return _grads(torch.ops.tcm_fast.group_norm_silu_bwd, ctx, grad_y, None)


def _save_joined(ctx, inputs, output):
    y, joined, mean, rstd = output
    *inputs, second = inputs
    ctx.channels = inputs[0].shape[1], second.shape[1]
    _save(ctx, (joined, *inputs[1:]), (y, mean, rstd))


def _backward_joined(ctx, grad_y, grad_joined, *_):
    grad_x, *grads = _grads(torch.ops.tcm_fast.group_norm_silu_bwd, ctx, grad_y, grad_joined)
    first, second = (None, None) if grad_x is None else grad_x.split(ctx.channels, 1)
    return first, *grads, second


_OPTIONAL = "Tensor? add, Tensor? scale, Tensor? shift, Tensor? sample, Tensor? seed, Tensor? step"
_fwd = register(
    f"group_norm_silu_fwd(Tensor x, Tensor weight, Tensor bias, {_OPTIONAL}, int num_groups, "
    "float eps, bool silu, int layer, int threshold) -> (Tensor, Tensor, Tensor)",
    _fwd, _fwd_by_reference, _fake_fwd, save=_save, backward=_backward,
)  # fmt: skip
register(
    f"group_norm_silu_joined_fwd(Tensor x, Tensor weight, Tensor bias, {_OPTIONAL}, int num_groups, "
    "float eps, bool silu, int layer, int threshold, Tensor second) -> (Tensor, Tensor, Tensor, Tensor)",
    _joined_fwd, _joined_fwd_by_reference, _fake_joined_fwd, save=_save_joined, backward=_backward_joined,
)  # fmt: skip
_bwd = or_reference(_bwd, _bwd_by_reference)


def _bwd_anywhere(*args):
    return (_bwd_cpu if _on_cpu(args[2], *args[5:10]) else _bwd)(*args)


register(
    "group_norm_silu_bwd(Tensor grad_y, Tensor? grad_past, Tensor x, Tensor mean, Tensor rstd, "
    f"Tensor weight, Tensor bias, {_OPTIONAL}, int num_groups, bool silu, int layer, int threshold, "
    "bool wants_affine) -> Tensor[]",
    _bwd_anywhere, _bwd_by_reference, _fake_bwd,
)  # fmt: skip


class _WithX(torch.autograd.Function):
    """The operator beside its input, so that the input's other gradient comes here too. (An operator
    of torch.library must not return what it was given.)"""

    @staticmethod
    def forward(x, *args):
        y, mean, rstd = torch.ops.tcm_fast.group_norm_silu_fwd(x, *args)
        return y, x.view_as(x), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        y, _, mean, rstd = output
        _save(ctx, inputs, (y, mean, rstd))

    @staticmethod
    def backward(ctx, grad_y, grad_past, *_):
        return _grads(torch.ops.tcm_fast.group_norm_silu_bwd, ctx, grad_y, grad_past)


class _Direct(torch.autograd.Function):
    """The same without the dispatcher; the last arguments say whether x is returned too and which
    launchers serve."""

    @staticmethod
    def forward(ctx, *args):
        *inputs, with_x, (fwd, ctx.bwd) = args
        y, mean, rstd = fwd(*inputs)
        _save(ctx, inputs, (y, mean, rstd))
        return (y, inputs[0].view_as(inputs[0])) if with_x else y

    @staticmethod
    def backward(ctx, grad_y, grad_past=None):
        # With create_graph the operator stands in the graph, to refuse the second derivative.
        bwd = torch.ops.tcm_fast.group_norm_silu_bwd if torch.is_grad_enabled() else ctx.bwd
        return *_grads(bwd, ctx, grad_y, grad_past), None, None


# -- public function ------------------------------------------------------------------------------


def _kernels(x, *operands):
    """What launches the forward and the backward pass on these tensors; None where the reference runs."""
    on_cpu = _on_cpu(x, *operands)
    is_wide = x.dtype == torch.float64 or operands[0].dtype == torch.float64
    try:
        if (
            not is_wide
            and x.shape[1:].numel() > 0
            and runs_triton("group_norm_silu", x.device.type)
        ):
            return _fwd, _bwd
    except ValueError:  # TCM_FAST_BACKEND=kernel
        if not on_cpu:
            raise
    return (_fwd_cpu, _bwd_cpu) if on_cpu else None


def group_norm_silu(
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor,
    bias: torch.Tensor,
    eps: float = 1e-5,
    *,
    silu: bool = True,
    add: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    shift: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    dropout_key: PhiloxKey | None = None,
    with_x: bool = False,
    second: torch.Tensor | None = None,
) -> Any:
    """dropout(silu((1 + scale) · GN(x + add) + shift)).

    Args:
        x: activations [N,C,H,W] of a floating dtype, contiguous or channels_last.
        num_groups: number of groups, a divisor of C.
        weight, bias: affine parameters [C], fp32 (or float64, with a float64 x). Expanded to [N,C], their
            gradients are not summed over the samples: `networks.by_sample` sums those of all layers at once.
        eps: added to the variance.
        silu: False leaves the SiLU out.
        add, scale, shift: per sample and channel, [N,C], each optional.
        dropout_p: share of the elements that is dropped, in [0, 1).
        dropout_key: keys the mask; required where dropout_p > 0.
        with_x: return x as well, for the branch that goes past the normalisation: the gradient that
            reaches x there is added in the backward kernel, which saves the pass that would add it.
        second: activations [N,C2,H,W] in x's dtype to be joined to x along the channels; C is that of both
            then. With with_x the kernel joins them on its way, which saves the pass that would.

    Returns:
        [N,C,H,W] in x's dtype and memory format; all in between is fp32 (float64 for float64). With
        with_x the pair of it and x, joined to `second`.

    Raises:
        TypeError: x is not floating, affine parameters have half precision.
        ValueError: shapes or devices that do not fit, a dropout_p out of range or without a key, a
            sample of 2**31 elements or more.
    """
    check_image("group_norm_silu", x)
    n, c, height, width = x.shape
    if second is not None:
        is_like = second.ndim == 4 and (n, height, width) == (second.shape[0], *second.shape[2:])
        if not is_like or (second.dtype, second.device) != (x.dtype, x.device):
            raise ValueError(
                f"group_norm_silu: second must be [{n},C2,{height},{width}] of {x.dtype} on {x.device}, got "
                f"{list(second.shape)} of {second.dtype} on {second.device}"
            )
        c += second.shape[1]
    if num_groups < 1 or c % num_groups:
        raise ValueError(f"group_norm_silu: num_groups must divide C={c}, got {num_groups}")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if not fits_channels(parameter, n, c) or parameter.ndim != weight.ndim:
            raise ValueError(
                f"group_norm_silu: {name} must be [{c}], or both expanded to [{n},{c}], got "
                f"{list(parameter.shape)}"
            )
        if parameter.dtype not in (torch.float32, torch.float64):
            raise TypeError(f"group_norm_silu: {name} must be fp32, got {parameter.dtype}")
    for name, modulation in (("add", add), ("scale", scale), ("shift", shift)):
        if modulation is not None and modulation.shape != (n, c):
            raise ValueError(
                f"group_norm_silu: {name} must be [{n},{c}], got {list(modulation.shape)}"
            )
    operands = {"weight": weight, "bias": bias, "add": add, "scale": scale, "shift": shift}
    for name, operand in operands.items():
        if operand is not None and operand.device != x.device:
            raise ValueError(f"group_norm_silu: {name} must be on {x.device}, got {operand.device}")
    check_dropout("group_norm_silu", dropout_p, dropout_key)
    kernels = _kernels(x, *operands.values())
    if second is not None:
        joins = with_x and kernels is not None and kernels[0] is _fwd
        if not joins or x.numel() == 0 or second.numel() == 0:
            joined = torch.cat([x, second], 1)
            x, second = joined.contiguous(memory_format=layout_of(x)), None
            kernels = _kernels(x, *operands.values())
    if kernels is not None:
        if c * height * width >= 2**31:
            raise ValueError(
                "group_norm_silu: a sample must have fewer than 2**31 elements, "
                f"got {c * height * width}"
            )
        key = key_arguments("group_norm_silu", dropout_p, dropout_key, n, x.device)
        *random, layer, threshold = key
        (x,) = laid_out(layout_of(x), x)
        inputs = (
            x,
            weight,
            bias,
            add,
            scale,
            shift,
            *random,
            num_groups,
            eps,
            silu,
            layer,
            threshold,
        )
        if second is not None:
            return torch.ops.tcm_fast.group_norm_silu_joined_fwd(*inputs, second)[:2]
        if calls_directly(x):
            return _Direct.apply(*inputs, with_x, kernels)
        if with_x:
            return _WithX.apply(*inputs)[:2]
        return torch.ops.tcm_fast.group_norm_silu_fwd(*inputs)[0]
    return group_norm_silu_reference(
        x, num_groups, weight, bias, eps,
        silu=silu, add=add, scale=scale, shift=shift, dropout_p=dropout_p, dropout_key=dropout_key,
        with_x=with_x,
    )  # fmt: skip
