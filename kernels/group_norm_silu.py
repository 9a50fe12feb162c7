"""Group normalisation with what surrounds it in a diffusion U-Net's block: the embedding added
before, scale, shift, SiLU and dropout after (Wu & He 2018; Karras et al. 2022, appendix C); on the way in
it ends the block before, whose residual sum it carries out, and joins a decoder block's two inputs."""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F

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
    register,
    rows,
    sigmoid,
)
from tcm_fast.kernels._group_norm_silu_cpu import affine_of, bwd_cpu, fwd_cpu, on_cpu, statistics
from tcm_fast.kernels._group_norm_silu_plan import plan_slabs
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
from tcm_fast.kernels.residual import (
    check_sum,
    note_biases,
    of_biases,
    of_its_terms,
    residual,
    residual_reference,
    strided,
)

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
    twice=False,
    skip=None,
    sum_scale=1.0,
    x_bias=None,
    skip_bias=None,
    summed=False,
    second=None,
):
    if summed:
        x = of_its_terms(x, sum_scale, x_bias, skip_bias)
    elif skip is not None:
        x = residual_reference(x, skip, sum_scale, x_bias, skip_bias)
    past = [x] * (2 if twice else int(with_x))
    if second is not None:
        past += [second] if past else []
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
    return (y, *past) if past else y


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
def _images(x, second, n, c, CHANNELS: tl.constexpr, HW: tl.constexpr, CHANNELS_LAST: tl.constexpr,
            FIRST: tl.constexpr):  # fmt: skip
    """The address to which the offsets (`_within`) of sample n are added: of x, or with two images, whose
    addresses are multiples of 16, of the one that each of the channels c is in, [1, SLAB]. `second` is
    moved back by FIRST channels, so that c counts from x's first."""
    start = x + n * (FIRST * HW)
    if FIRST < CHANNELS:
        second += n * ((CHANNELS - FIRST) * HW) - (FIRST if CHANNELS_LAST else FIRST * HW)
        # Triton 3.9 forgets what both operands of tl.where are multiples of.
        WIDTHS: tl.constexpr = (FIRST | CHANNELS) * (1 if CHANNELS_LAST else HW)
        BYTES: tl.constexpr = WIDTHS * (x.dtype.element_ty.primitive_bitwidth // 8) | 16
        start = tl.multiple_of(tl.where(c < FIRST, start, second), BYTES & -BYTES)[None, :]
    return start


@triton.jit
def _within(p, c, at, CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, FIRST: tl.constexpr):
    """Offsets of a tile from the addresses of `_images`; in channels_last a pixel of an image is FIRST or
    CHANNELS - FIRST elements long."""
    if FIRST == CHANNELS or not CHANNELS_LAST:
        return at
    BOTH: tl.constexpr = FIRST | CHANNELS
    row = tl.multiple_of(tl.where(c < FIRST, FIRST, CHANNELS - FIRST), BOTH & -BOTH)
    return p[:, None] * row[None, :] + c[None, :]


@triton.jit
def _load_sum(x, skip, total, from_biases, sum_scale, c, at, inside, CHANNELS: tl.constexpr,
              FIRST: tl.constexpr, SUMS: tl.constexpr, POLICY: tl.constexpr):  # fmt: skip
    """A tile of what `_images` addresses, x. With SUMS its first FIRST channels are `residual`'s sum of them
    and `skip`, which is stored to `total` too."""
    if not SUMS:
        return tl.load(x + at, mask=inside, other=0, eviction_policy=POLICY)
    v = tl.load(
        x + at, mask=inside, other=0, eviction_policy="evict_first" if FIRST == CHANNELS else POLICY
    )
    is_summed = inside
    if FIRST < CHANNELS:
        is_summed = inside & (c < FIRST)[None, :]
    other = tl.load(skip + at, mask=is_summed, other=0, eviction_policy="evict_first")
    both = v.to(tl.float32) + other.to(tl.float32)
    both = (both + from_biases[None, :]) * sum_scale
    v = tl.where(is_summed, both, v.to(tl.float32)).to(v.dtype)
    tl.store(total + at, v, mask=is_summed, eviction_policy=POLICY)
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
def _finish(v, origin, y, p, at, inside, first, c, slope, offset, sample, seed, step, layer, threshold,
            keep_scale, CHANNELS: tl.constexpr, SLAB: tl.constexpr, SILU: tl.constexpr, DROPS: tl.constexpr,
            BY_EIGHT: tl.constexpr, ASM: tl.constexpr):  # fmt: skip
    """Stores dropout(silu(z)) with z = (v - origin)·slope + offset, origin = mean - add."""
    z = (v.to(tl.float32) - origin[None, :]) * slope[None, :] + offset[None, :]
    if SILU:
        z = z * sigmoid(z, ASM)
    if DROPS:
        kept = is_kept(p, first, c, sample, seed, step, layer, threshold, CHANNELS, BY_EIGHT, SLAB)
        z = tl.where(kept, z * keep_scale, 0.0)
    tl.store(y + at, z.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["layer", "threshold"])
def _group_norm_silu_fwd_kernel(
    x, skip, second, x_bias, skip_bias, weight, bias, add, scale, shift, sample, seed, step, y, total,
    mean, rstd, add_row, scale_row, shift_row, layer, threshold, keep_scale, eps, sum_scale,
    CHANNELS: tl.constexpr, HW: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    SLAB: tl.constexpr, PIXELS: tl.constexpr, HOLDS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    HAS_ADD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
    DROPS: tl.constexpr, BY_EIGHT: tl.constexpr, ASM: tl.constexpr, PACKS: tl.constexpr,
    FIRST: tl.constexpr, SUMS: tl.constexpr, HAS_X_BIAS: tl.constexpr, HAS_SKIP_BIAS: tl.constexpr,
):  # fmt: skip
    CPG: tl.constexpr = CHANNELS // NUM_GROUPS
    TILES: tl.constexpr = (HW + PIXELS - 1) // PIXELS
    n, first, c, own, group, has, member = _slab(CHANNELS, NUM_GROUPS, GROUPS, SLAB)
    x = _images(x, second, n, c, CHANNELS, HW, CHANNELS_LAST, FIRST)
    skip += n * (FIRST * HW)
    sums = total + n * (FIRST * HW)
    y += n * (CHANNELS * HW)
    from_biases = tl.zeros([SLAB], tl.float32)
    if HAS_X_BIAS:
        from_biases = tl.load(x_bias + c, mask=own & (c < FIRST), other=0).to(tl.float32)
    if HAS_SKIP_BIAS:
        from_biases += tl.load(skip_bias + c, mask=own & (c < FIRST), other=0).to(tl.float32)

    # Mean and summed squared deviation of each channel, in two steps: never E[x²] - E[x]².
    held = ()
    if HOLDS:
        slot_sum = tl.zeros([PIXELS, SLAB], tl.float32)
        for tile in tl.static_range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            at = _within(p, c, at, CHANNELS, CHANNELS_LAST, FIRST)
            v = _load_sum(
                x, skip, sums, from_biases, sum_scale, c, at, inside, CHANNELS, FIRST, SUMS, ""
            )
            held = held + (v,)  # noqa: RUF005
        for tile in tl.static_range(TILES):
            slot_sum += held[tile].to(tl.float32)
        average = tl.sum(slot_sum, 0) / HW
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
            at = _within(p, c, at, CHANNELS, CHANNELS_LAST, FIRST)
            v = _load_sum(x, skip, sums, from_biases, sum_scale, c, at, inside, CHANNELS, FIRST, SUMS,
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
            v = _reload_barrier(held[tile], PACKS)
            _finish(v, origin, y, p, at, inside, first, c, slope, offset, sample_n, seed_n, step_n, layer,
                    threshold, keep_scale, CHANNELS, SLAB, SILU, DROPS, BY_EIGHT, ASM)  # fmt: skip
    else:
        if SUMS:  # what other threads wrote is read
            tl.debug_barrier()
            x = _images(total, second, n, c, CHANNELS, HW, CHANNELS_LAST, FIRST)
        for i in tl.range(TILES):
            p, at, inside = _where(TILES - 1 - i, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            source = x + _within(p, c, at, CHANNELS, CHANNELS_LAST, FIRST)
            v = tl.load(source, mask=inside, other=0, eviction_policy="evict_first")
            _finish(v, origin, y, p, at, inside, first, c, slope, offset, sample_n, seed_n, step_n, layer,
                    threshold, keep_scale, CHANNELS, SLAB, SILU, DROPS, BY_EIGHT, ASM)  # fmt: skip


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


@triton.jit
def _hand_back(out, slot_add, slot_sums, grad_past, grad_twin, grad_x, sum_scale, p, c, at, inside,
               CHANNELS: tl.constexpr, CHANNELS_LAST: tl.constexpr, FIRST: tl.constexpr,
               HAS_ADD: tl.constexpr, SCALES: tl.constexpr, WANTS_SUMS: tl.constexpr,
               HAS_PAST: tl.constexpr, TWIN_ROW: tl.constexpr):  # fmt: skip
    """Adds what reached x past the normalisation to its gradient `out` and stores it, with SCALES the first
    FIRST channels times sum_scale: the gradient of a sum's terms. -> what `add` and the sum's biases get,
    added to the slots."""
    if HAS_ADD:
        slot_add += tl.where(inside, out, 0.0)
    if HAS_PAST:
        out += tl.load(grad_past + at, mask=inside, other=0).to(tl.float32)
    if TWIN_ROW > 0:
        source = at
        if CHANNELS_LAST:
            source = p[:, None] * TWIN_ROW + c[None, :]
        out += tl.load(grad_twin + source, mask=inside, other=0).to(tl.float32)
    if SCALES:
        out *= sum_scale if FIRST == CHANNELS else tl.where(c < FIRST, sum_scale, 1.0)[None, :]
    at = _within(p, c, at, CHANNELS, CHANNELS_LAST, FIRST)
    tl.store(grad_x + at, out.to(grad_x.dtype.element_ty), mask=inside)
    if WANTS_SUMS:
        slot_sums += tl.where(inside, out, 0.0)
    return slot_add, slot_sums


@triton.jit(do_not_specialize=["layer", "threshold"])
def _group_norm_silu_bwd_kernel(
    grad_y, grad_past, grad_twin, x, second, mean, rstd, weight, bias, add, scale, shift, sample, seed, step,
    grad_x, grad_second, grad_sums, grad_affine, grad_add, grad_scale, grad_shift, batch, add_row,
    scale_row, shift_row, layer, threshold, keep_scale, sum_scale,
    CHANNELS: tl.constexpr, HW: tl.constexpr, NUM_GROUPS: tl.constexpr, GROUPS: tl.constexpr,
    SLAB: tl.constexpr, PIXELS: tl.constexpr, HOLDS: tl.constexpr, CHANNELS_LAST: tl.constexpr,
    HAS_ADD: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_SHIFT: tl.constexpr, SILU: tl.constexpr,
    DROPS: tl.constexpr, BY_EIGHT: tl.constexpr, ASM: tl.constexpr, PACKS: tl.constexpr,
    WANTS_AFFINE: tl.constexpr, HAS_PAST: tl.constexpr, TWIN_ROW: tl.constexpr, FIRST: tl.constexpr,
    SCALES: tl.constexpr, WANTS_SUMS: tl.constexpr,
):  # fmt: skip
    """TWIN_ROW: elements from a pixel of grad_twin, a second gradient of x, to the next in channels_last,
    more than CHANNELS where it is a slice of channels; 0 without one."""
    CPG: tl.constexpr = CHANNELS // NUM_GROUPS
    TILES: tl.constexpr = (HW + PIXELS - 1) // PIXELS
    n, first, c, own, group, has, member = _slab(CHANNELS, NUM_GROUPS, GROUPS, SLAB)
    x = _images(x, second, n, c, CHANNELS, HW, CHANNELS_LAST, FIRST)
    grad_x = _images(grad_x, grad_second, n, c, CHANNELS, HW, CHANNELS_LAST, FIRST)
    grad_y += n * (CHANNELS * HW)
    grad_past += n * (CHANNELS * HW)
    grad_twin += n * (TWIN_ROW * HW)
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
            v = tl.load(x + _within(p, c, at, CHANNELS, CHANNELS_LAST, FIRST), mask=inside, other=0)
            held_x = held_x + (v,)  # noqa: RUF005
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
            source = x + _within(p, c, at, CHANNELS, CHANNELS_LAST, FIRST)
            v = tl.load(source, mask=inside, other=0, eviction_policy="evict_last")
            v = v.to(tl.float32) - origin[None, :]
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
    slot_sums = tl.zeros([PIXELS, SLAB], tl.float32)
    if HOLDS:
        for tile in tl.static_range(TILES):
            p, at, inside = _where(tile, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            v = _reload_barrier(held_x[tile], PACKS).to(tl.float32) - origin[None, :]
            g = _grad_z(v, _reload_barrier(held_g[tile], PACKS), slope, offset, SILU, ASM)
            out = g * (slope * keep_scale)[None, :] - from_all[None, :] - v * from_v[None, :]
            slot_add, slot_sums = _hand_back(
                out, slot_add, slot_sums, grad_past, grad_twin, grad_x, sum_scale, p, c, at, inside, CHANNELS,
                CHANNELS_LAST, FIRST, HAS_ADD, SCALES, WANTS_SUMS, HAS_PAST, TWIN_ROW,
            )  # fmt: skip
    else:
        for i in tl.range(TILES):
            p, at, inside = _where(TILES - 1 - i, c, own, CHANNELS, HW, PIXELS, CHANNELS_LAST)
            source = x + _within(p, c, at, CHANNELS, CHANNELS_LAST, FIRST)
            v = tl.load(source, mask=inside, other=0, eviction_policy="evict_first")
            v = v.to(tl.float32) - origin[None, :]
            g = tl.load(grad_y + at, mask=inside, other=0, eviction_policy="evict_first")
            g = _drop(g, p, first, c, sample_n, seed_n, step_n, layer, threshold, CHANNELS,
                      SLAB, DROPS, BY_EIGHT)  # fmt: skip
            g = _grad_z(v, g, slope, offset, SILU, ASM)
            out = g * (slope * keep_scale)[None, :] - from_all[None, :] - v * from_v[None, :]
            slot_add, slot_sums = _hand_back(
                out, slot_add, slot_sums, grad_past, grad_twin, grad_x, sum_scale, p, c, at, inside, CHANNELS,
                CHANNELS_LAST, FIRST, HAS_ADD, SCALES, WANTS_SUMS, HAS_PAST, TWIN_ROW,
            )  # fmt: skip
    if HAS_ADD:
        total = tl.sum(slot_add, 0)
        tl.store(grad_add + n * CHANNELS + c, total.to(grad_add.dtype.element_ty), mask=own)
    if WANTS_SUMS:
        tl.store(grad_sums + n * FIRST + c, tl.sum(slot_sums, 0), mask=own & (c < FIRST))


# -- launchers ------------------------------------------------------------------------------------


def _constants(
    x, c, num_groups, add, scale, shift, silu, threshold, backward, asm
) -> tuple[dict[str, Any], int]:
    """A kernel's constants for c channels, of x and what is joined to it, and the number of programs."""
    n, _, h, w = x.shape
    channels_last = layout_of(x) == torch.channels_last
    drops = threshold > 0
    # A slab starts at a multiple of 16 bytes, and of the channels that share a block of Philox.
    unit = 8 if drops else 16 // x.itemsize
    plan = plan_slabs(c, h * w, num_groups, x.itemsize, unit, channels_last, backward)
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
    x, weight, bias, add, scale, shift, sample, seed, step, num_groups, eps, silu, layer, threshold,
    second=None, skip=None, sum_scale=1.0, x_bias=None, skip_bias=None,
):  # fmt: skip
    layout = layout_of(x)
    x, second, skip = laid_out(layout, x, second, skip)
    x, second = _at_16_bytes(x, second)
    add, scale, shift = rows(add), rows(scale), rows(shift)
    n, first, *size = x.shape
    c = first + _width(second)
    total = x if skip is None else torch.empty_like(x)
    constants, programs = _constants(
        x, c, num_groups, add, scale, shift, silu, threshold, False, has_asm(x)
    )
    y = empty(x, (n, c, *size), layout)
    mean, rstd = statistics(x, num_groups)
    biases = [None if b is None else of_channels(b).contiguous() for b in (x_bias, skip_bias)]
    launch(
        _group_norm_silu_fwd_kernel, (programs,), x, *given(x, skip, second, *biases),
        *affine_of(weight, bias), *given(x, add, scale, shift, sample, seed, step), y, total, mean, rstd,
        *_row_strides(add, scale, shift), layer, threshold, 65536 / (65536 - threshold), eps, sum_scale,
        **constants, FIRST=first, SUMS=skip is not None,
        HAS_X_BIAS=skip is not None and x_bias is not None,
        HAS_SKIP_BIAS=skip is not None and skip_bias is not None,
    )  # fmt: skip
    return y, x.new_empty(0) if skip is None else total, mean, rstd


def _fwd(*arguments):
    y, _, mean, rstd = _launch_fwd(*arguments)
    return y, mean, rstd


def _width(second):
    return 0 if second is None else second.shape[1]


def _at_16_bytes(x, second):
    """Both images, each copied if its address is no multiple of 16, which `_images` tells the compiler of
    two. (What the kernels write is allocated here, so it is one.)"""
    if second is None:
        return x, None
    x, second = (v if v.data_ptr() % 16 == 0 else v.clone() for v in (x, second))
    return x, second


def _side_by_side(x, second, past, past_second):
    """The gradients that reached x and `second` past the normalisation as one tensor: the one whose slices of
    channels they are, or a copy; None where neither is there."""
    if second is None or (past is None and past_second is None):
        return past
    a = torch.zeros_like(x) if past is None else past
    b = torch.zeros_like(second) if past_second is None else past_second
    width = a.shape[1] + b.shape[1]
    is_one = (
        a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and b.storage_offset() == a.storage_offset() + a.shape[1]
        and a.stride() == b.stride()
        and a.stride(1) == 1
        and a.stride(3) == width
    )
    if not is_one:
        return _joined(a, b)
    n, _, *size = a.shape
    return a.as_strided((n, width, *size), a.stride())


def _bwd(
    grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, num_groups, silu,
    layer, threshold, wants_affine, grad_twin=None, second=None, past_second=None,
    sum_scale=1.0, wants_sums=False,
):  # fmt: skip
    layout = layout_of(x)
    grad_past = _side_by_side(x, second, grad_past, past_second)
    x, second, grad_y, grad_past = laid_out(layout, x, second, grad_y, grad_past)
    x, second = _at_16_bytes(x, second)
    n, first, *size = x.shape
    width = _width(second)
    c = first + width
    twin_row = 0
    if grad_twin is not None:
        grad_twin, twin_row = strided(grad_twin, layout)
        if twin_row * math.prod(size) >= 2**31:  # offsets within a sample are 32-bit numbers
            grad_twin, twin_row = grad_twin.contiguous(memory_format=layout), c
    add, scale, shift = rows(add), rows(scale), rows(shift)
    constants, programs = _constants(
        x, c, num_groups, add, scale, shift, silu, threshold, True, has_asm(x)
    )
    parts = [empty(x, (n, channels, *size), layout) for channels in (first, width) if channels]
    # One program writes each entry; PyTorch's sum over the batch has one order too.
    by_sample = torch.empty((2, n if wants_affine else 0, c), dtype=torch.float32, device=x.device)
    sums = [by_sample.new_empty((n, first))] if wants_sums else []
    grads = [
        None if v is None else torch.empty((n, c), dtype=v.dtype, device=x.device)
        for v in (add, scale, shift)
    ]
    launch(
        _group_norm_silu_bwd_kernel, (programs,), grad_y, *given(x, grad_past, grad_twin), x,
        *given(x, second), mean, rstd, *affine_of(weight, bias),
        *given(x, add, scale, shift, sample, seed, step), parts[0], parts[-1], *(sums or [x]), by_sample,
        *given(x, *grads), n, *_row_strides(add, scale, shift), layer, threshold,
        65536 / (65536 - threshold), sum_scale, **constants, WANTS_AFFINE=wants_affine,
        HAS_PAST=grad_past is not None, TWIN_ROW=twin_row, FIRST=first, SCALES=sum_scale != 1,
        WANTS_SUMS=wants_sums,
    )  # fmt: skip
    affine = by_sample.sum(1) if weight.ndim == 1 else by_sample
    return [parts[0], affine, *(v for v in grads if v is not None), *parts[1:], *sums]


def _row_strides(*modulations):
    return [0 if v is None else v.stride(0) for v in modulations]


# Pixels, channels, and how a block of the network uses it: what it reads, what follows. DDPM++ on CIFAR-10
# (groups of C/32) and ADM at 64 x 64.
_NORM, _SUM, _EMBEDDED, _ATTENTION = "norm", "sum", "add dropout", "sum no silu"
_SUMMED, _MODULATED = "summed", "scale shift dropout"
_SITES = {
    "ddpmpp": (
        (32, (128, 256, 384), (_NORM,)), (32, (256,), (_SUM, _SUMMED, _EMBEDDED)),
        (16, (256,), (_SUM, _EMBEDDED, _ATTENTION)),
        (8, (256, 512), (_NORM,)), (8, (256,), (_SUM, _EMBEDDED, _ATTENTION)),
    ),
    "adm": (
        (64, (192, 576), (_NORM,)), (64, (192,), (_SUM, _SUMMED, _MODULATED)),
        (32, (576, 960), (_NORM,)), (32, (384,), (_SUM, _MODULATED, _ATTENTION)),
        (16, (384, 1344), (_NORM,)), (16, (576,), (_SUM, _MODULATED, _ATTENTION)),
        (8, (576, 1536), (_NORM,)), (8, (768,), (_SUM, _MODULATED, _ATTENTION)),
    ),
}  # fmt: skip

# A decoder's blocks, which read the encoder's output beside a sum that a product of matrices has carried out:
# pixels, channels of the two.
_JOINED_SITES = {
    "ddpmpp": ((32, 256, 128), (32, 256, 256), (16, 256, 256), (8, 256, 256)),
    "adm": ((64, 192, 192), (64, 384, 192), (32, 384, 384), (32, 576, 384), (16, 768, 576), (8, 768, 768)),
}  # fmt: skip


def specialisations(capability: int) -> list[Variant]:
    """The forms in which DDPM++ on CIFAR-10 and ADM at 64 x 64 use the kernels, in channels_last;
    the same for every compute capability."""
    variants = []
    for network, sites in _SITES.items():
        sites = [(size, c, 0, use) for size, widths, uses in sites for c in widths for use in uses]
        sites += [(*site, _SUMMED) for site in _JOINED_SITES[network]]
        sites.append(
            (*_JOINED_SITES[network][-1], _SUM)
        )  # the first one's sum is of a block without
        for (size, c, width, use), dtype in itertools.product(sites, DTYPES):
            x = torch.empty((64, c, size, size), dtype=dtype, device="meta")
            x = x.contiguous(memory_format=torch.channels_last)
            at = f"{network} {size}x{size}x{c}{f'+{width}' if width else ''} {use}"
            variants += _variants(at, x, use, width, 1.0 if network == "adm" else 0.5**0.5)
    return variants


def _variants(site: str, x: torch.Tensor, use: str, width: int, sum_scale: float) -> list[Variant]:
    """Forward and backward for a tensor like x, on any device; `width` are the channels of `second`."""
    name = DTYPES[x.dtype]
    add, scale = (x[..., 0, 0] if part in use else None for part in ("add", "scale"))
    threshold, sums, c = 8520 if "dropout" in use else 0, "sum" in use.split(), x.shape[1]
    hands_back = sums or use == _SUMMED  # gradients of a sum's terms
    image, scalars = f"*{name}", dict.fromkeys(("layer", "threshold"), "i32")
    modulations = ("add", "scale", "shift")
    scalars |= dict.fromkeys((f"{part}_row" for part in modulations), "i32")
    scalars |= dict.fromkeys(("keep_scale", "sum_scale"), "fp32")
    both = dict.fromkeys(("x", *modulations), image)
    both |= dict.fromkeys(("sample", "seed", "step"), "*i64" if threshold else image)
    both |= dict.fromkeys(("weight", "bias", "mean", "rstd"), "*fp32") | scalars
    fwd = dict.fromkeys(("skip", "second", "y", "total"), image) | both
    fwd |= dict.fromkeys(("x_bias", "skip_bias"), "*fp32") | {"eps": "fp32"}
    grads = ("y", "past", "twin", "x", "second", *modulations)
    bwd = dict.fromkeys((*(f"grad_{part}" for part in grads), "second"), image) | both
    bwd |= {"grad_sums": "*fp32", "grad_affine": "*fp32", "batch": "i32"}
    aligned = frozenset(f"{part}_row" for part in modulations if c % 16 == 0)
    of_fwd = {"SUMS": sums, "HAS_X_BIAS": sums, "HAS_SKIP_BIAS": sums and width > 0}
    of_bwd = {
        "WANTS_AFFINE": True, "HAS_PAST": hands_back or use == _NORM, "WANTS_SUMS": hands_back,
        "TWIN_ROW": c if use in (_SUM, _SUMMED) and not width else 0,
        "SCALES": hands_back and sum_scale != 1,
    }  # fmt: skip
    variants = []
    for kernel, signature, more in (
        (_group_norm_silu_fwd_kernel, fwd, of_fwd), (_group_norm_silu_bwd_kernel, bwd, of_bwd),
    ):  # fmt: skip
        constants, programs = _constants(
            x,
            c + width,
            min(32, (c + width) // 4),
            add,
            scale,
            scale,
            use != _ATTENTION,
            threshold,
            signature is bwd,
            True,
        )
        warps = constants.pop("num_warps")
        variants.append(
            Variant(f"{site} {name}", kernel, signature, constants | more | {"FIRST": c},
                    num_warps=warps, aligned=aligned, programs=programs)
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


def _merged_fwd_by_reference(x, *arguments):
    *arguments, second, skip, sum_scale, x_bias, skip_bias = arguments
    layout = layout_of(x)
    total = x if skip is None else residual_reference(x, skip, sum_scale, x_bias, skip_bias)
    total = total.contiguous(memory_format=layout)
    y, mean, rstd = _fwd_by_reference(_joined(total, second), *arguments)
    return y, x.new_empty(0) if skip is None else total, mean, rstd


def _joined(x, second):
    """Both along the channels, in x's layout; x itself without a second."""
    if second is None:
        return x
    return torch.cat([x, second], 1).contiguous(memory_format=layout_of(x))


def _groups(x, add, num_groups):
    """x + add, fp32 [N, groups, elements of a group]."""
    h = x.to(torch.float32)
    if add is not None:
        h = h + add.to(torch.float32)[:, :, None, None]
    return h.contiguous().view(len(x), num_groups, -1)


def _bwd_by_reference(
    grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, num_groups, silu,
    layer, threshold, wants_affine, grad_twin=None, second=None, past_second=None,
    sum_scale=1.0, wants_sums=False,
):  # fmt: skip
    layout, width = layout_of(x), _width(second)
    grad_past = _side_by_side(x, second, grad_past, past_second)
    x = _joined(x, second)
    n, c, *size = x.shape
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
        grad.contiguous(), h.view(x.shape), mean, rstd, weight, n, c, math.prod(size), num_groups,
        [True, wants_affine, wants_affine],
    )  # fmt: skip
    grad_add = None if add is None else grad_x.sum((2, 3)).to(add.dtype)
    for past in (grad_past, grad_twin):
        grad_x = grad_x if past is None else grad_x + past
    grad_x, grad_second = grad_x.split([c - width, width], 1)
    grad_x = grad_x * sum_scale
    affine = weight.new_zeros((2, *shape))
    if wants_affine:  # the whole of it at the first sample where they are to be summed later
        affine.view(2, -1)[:, :c] = torch.stack([grad_weight, grad_bias])
    grads = [g.contiguous() for g in (grad_add, grad_scale, grad_shift) if g is not None]
    grads += [grad_second.to(x.dtype).contiguous(memory_format=layout)] if width else []
    grads += [grad_x.sum((2, 3))] if wants_sums else []
    return [grad_x.to(x.dtype).contiguous(memory_format=layout), affine, *grads]


def _fake_fwd(x, weight, bias, add, scale, shift, sample, seed, step, num_groups, *_):
    return dense_like(x), *statistics(x, num_groups)


def _fake_merged_fwd(x, *arguments):
    (n, c, *size), (num_groups, *_, second, skip) = x.shape, arguments[8:15]
    y = empty(x, (n, c + _width(second), *size), layout_of(x))
    return y, x.new_empty(0) if skip is None else dense_like(x), *statistics(x, num_groups)


def _fake_bwd(
    grad_y, grad_past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, num_groups, silu,
    layer, threshold, wants_affine, grad_twin=None, second=None, past_second=None,
    sum_scale=1.0, wants_sums=False,
):  # fmt: skip
    n, c, *size = x.shape
    sums = torch.empty((2, *weight.shape), dtype=torch.float32, device=x.device)
    grads = [v.new_empty(v.shape) for v in (add, scale, shift) if v is not None]
    first, *rest = (empty(x, (n, k, *size), layout_of(x)) for k in (c, _width(second)) if k)
    return [first, sums, *grads, *rest, *([sums.new_empty((n, c))] if wants_sums else [])]


def _save(ctx, inputs, output):
    x, *tensors = inputs[:9]
    ctx.num_groups, _, ctx.silu, ctx.layer, ctx.threshold, *merged = inputs[9:]
    *_, mean, rstd = output
    second, ctx.sum_scale, ctx.merges = None, 1.0, bool(merged)
    if merged:
        second, skip, ctx.sum_scale, *biases = merged
        note_biases(ctx, *biases)
        if skip is not None:
            x = output[1]
    ctx.save_for_backward(x, *tensors, mean, rstd, second)
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)


def _grads(bwd, ctx, grad_y, past, twin, past_second):
    """The gradients of the operator's inputs; what reached x past it, by two ways at most, and `second`, is
    added to theirs."""
    x, weight, bias, add, scale, shift, sample, seed, step, mean, rstd, second = ctx.saved_tensors
    needs = ctx.needs_input_grad
    wants_sums = ctx.merges and any(needs[17:19])
    if past is None:
        past, twin = twin, None
    if grad_y is None and twin is None and not ctx.merges:
        return past, *[None] * 13
    if grad_y is None:
        grad_y = torch.zeros_like(_joined(x, second))
    if second is not None and twin is not None:
        past, twin = past + twin, None
    grad_x, affine, *rest = bwd(
        grad_y, past, x, mean, rstd, weight, bias, add, scale, shift, sample, seed, step, ctx.num_groups,
        ctx.silu, ctx.layer, ctx.threshold, needs[1] or needs[2], twin, second, past_second,
        ctx.sum_scale, wants_sums,
    )  # fmt: skip
    found = iter(rest)
    modulations = [None if v is None else next(found) for v in (add, scale, shift)]
    grads = [grad_x, *affine.unbind(), *modulations, *[None] * 8]
    if ctx.merges:
        grads += [next(found) if _width(second) else None, grad_x, None]
        grads += of_biases(ctx, next(found, None), needs[17:19])
    return tuple(g if need else None for g, need in zip(grads, needs, strict=False))


def _backward(ctx, grad_y, *grads):
    past = grads[0] if len(grads) > 2 else None
    return _grads(torch.ops.tcm_fast.group_norm_silu_bwd, ctx, grad_y, past, None, None)


_OPTIONAL = "Tensor? add, Tensor? scale, Tensor? shift, Tensor? sample, Tensor? seed, Tensor? step"
_fwd = register(
    f"group_norm_silu_fwd(Tensor x, Tensor weight, Tensor bias, {_OPTIONAL}, int num_groups, "
    "float eps, bool silu, int layer, int threshold) -> (Tensor, Tensor, Tensor)",
    _fwd, _fwd_by_reference, _fake_fwd, save=_save, backward=_backward,
)  # fmt: skip
_merged_fwd = register(
    f"group_norm_silu_merged_fwd(Tensor x, Tensor weight, Tensor bias, {_OPTIONAL}, int num_groups, "
    "float eps, bool silu, int layer, int threshold, Tensor? second, Tensor? skip, float sum_scale, "
    "Tensor? x_bias, Tensor? skip_bias) -> (Tensor, Tensor, Tensor, Tensor)",
    _launch_fwd, _merged_fwd_by_reference, _fake_merged_fwd, save=_save, backward=_backward,
)  # fmt: skip
_bwd = or_reference(_bwd, _bwd_by_reference)


def _bwd_anywhere(*args):
    kernels = _kernels(args[2], *args[5:10])
    return (_bwd if kernels is None else kernels[1])(*args)


register(
    "group_norm_silu_bwd(Tensor grad_y, Tensor? grad_past, Tensor x, Tensor mean, Tensor rstd, "
    f"Tensor weight, Tensor bias, {_OPTIONAL}, int num_groups, bool silu, int layer, int threshold, "
    "bool wants_affine, Tensor? grad_twin=None, Tensor? second=None, Tensor? past_second=None, "
    "float sum_scale=1.0, bool wants_sums=False) "
    "-> Tensor[]",
    _bwd_anywhere, _bwd_by_reference, _fake_bwd,
)  # fmt: skip


# How the kernels are called: as operators of torch.library, or without the dispatcher.
_BY_OPERATOR, _BY_TRITON, _ON_CPU = range(3)


def _launchers(way):
    """Forward, backward, and forward with a sum or a join."""
    if way == _ON_CPU:
        return fwd_cpu, bwd_cpu, None
    if way == _BY_TRITON:
        return _fwd, _bwd, _merged_fwd
    ops = torch.ops.tcm_fast
    return ops.group_norm_silu_fwd, ops.group_norm_silu_bwd, ops.group_norm_silu_merged_fwd


class _Apply(torch.autograd.Function):
    """An operator beside what it normalised, x or its sum, `copies` times, and `second`, so that other
    gradients of these come here too. (An operator of torch.library must not return what it was given.)"""

    @staticmethod
    def forward(*args):
        *inputs, copies, way = args
        fwd, _, merged_fwd = _launchers(way)
        x, second = inputs[0], None
        if len(inputs) == 14:
            y, mean, rstd = fwd(*inputs)
        else:
            y, total, mean, rstd = merged_fwd(*inputs)
            second, skip = inputs[14:16]
            x = x if skip is None else total
        past = [x] * copies + [second] * (second is not None and copies > 0)
        return y, *(v.view_as(v) for v in past), mean, rstd

    @staticmethod
    def setup_context(ctx, inputs, output):
        *inputs, ctx.copies, ctx.way = inputs
        _save(ctx, inputs, output)

    @staticmethod
    def backward(ctx, grad_y, *grads):
        # With create_graph the operator stands in the graph, to refuse the second derivative.
        _, bwd, _ = _launchers(_BY_OPERATOR if torch.is_grad_enabled() else ctx.way)
        past = list(grads[: ctx.copies]) + [None] * (2 - ctx.copies)
        past_second = grads[ctx.copies] if len(grads) == ctx.copies + 3 else None
        return *_grads(bwd, ctx, grad_y, *past, past_second), None, None


# -- public function ------------------------------------------------------------------------------


def _kernels(x, *operands):
    """What launches the forward and the backward pass on these tensors; None where the reference runs."""
    by_extension = on_cpu(x, *operands)
    is_wide = torch.float64 in (x.dtype, operands[0].dtype)
    try:
        if (
            not is_wide
            and x.shape[1:].numel() > 0
            and runs_triton("group_norm_silu", x.device.type)
        ):
            return _fwd, _bwd
    except ValueError:  # TCM_FAST_BACKEND=kernel
        if not by_extension:
            raise
    return (fwd_cpu, bwd_cpu) if by_extension else None


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
    twice: bool = False,
    skip: torch.Tensor | None = None,
    sum_scale: float = 1.0,
    x_bias: torch.Tensor | None = None,
    skip_bias: torch.Tensor | None = None,
    summed: bool = False,
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
        twice: return x two times, for two such branches: both gradients are added in the backward kernel.
        skip, sum_scale, x_bias, skip_bias: arguments of `residual`, whose sum with x, of the same bits, takes
            x's place: the kernel carries it out on its way, which saves the pass that would, and one that
            would scale the gradient and sum the biases'.
        summed: x is that sum already, of `residual_conv1x1(of_terms=True)`: only its gradient is handed back
            as that of its terms, and the biases get theirs.
        second: activations [N,C2,H,W] in x's dtype to be joined to x along the channels; C is that of both
            then. The kernel reads both: nothing writes the two side by side.

    Returns:
        [N,C,H,W] in x's dtype and memory format; all in between is fp32 (float64 for float64). With
        with_x or twice a tuple of it and x, or the sum, once or two times, and `second` behind them where
        there is one.

    Raises:
        TypeError: x is not floating, affine parameters have half precision, skip is of another dtype.
        ValueError: shapes or devices that do not fit, a dropout_p out of range or without a key, a
            sample of 2**31 elements or more.
    """
    check_image("group_norm_silu", x)
    n, c, height, width = x.shape
    if skip is not None:
        check_sum("group_norm_silu", x, skip, x_bias=x_bias, skip_bias=skip_bias)
        if summed:
            raise ValueError("group_norm_silu: summed must be False with skip, got both")
    elif summed:
        check_sum("group_norm_silu", x, x, x_bias=x_bias, skip_bias=skip_bias)
    elif x_bias is not None or skip_bias is not None or sum_scale != 1:
        raise ValueError(
            "group_norm_silu: x_bias, skip_bias, sum_scale are of a sum, got no skip and summed=False"
        )
    if not isinstance(sum_scale, (int, float)):
        raise TypeError(f"group_norm_silu: sum_scale must be a number, got {sum_scale!r}")
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
                f"group_norm_silu: {name} must be [{c}], or both expanded (stride 0) to [{n},{c}], got "
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
    copies = 2 if twice else int(with_x)
    kernels = _kernels(x, *operands.values())
    merges = second is not None or skip is not None or summed
    is_empty = x.numel() == 0 or (second is not None and second.numel() == 0)
    options: dict[str, Any] = dict(
        silu=silu, add=add, scale=scale, shift=shift, dropout_p=dropout_p, dropout_key=dropout_key
    )
    if merges and (kernels is None or kernels[0] is not _fwd or is_empty):
        if skip is not None:
            x = residual(x, skip, sum_scale, x_bias, skip_bias)
        elif summed:
            x = of_its_terms(x, sum_scale, x_bias, skip_bias)
        if second is None:
            options |= dict(with_x=with_x, twice=twice)
            return group_norm_silu(x, num_groups, weight, bias, eps, **options)
        y = group_norm_silu(_joined(x, second), num_groups, weight, bias, eps, **options)
        return (y, *[x] * copies, second) if copies else y
    if kernels is None:
        y = group_norm_silu_reference(x, num_groups, weight, bias, eps, **options)
        return (y, *[x] * copies) if copies else y
    if c * height * width >= 2**31:
        raise ValueError(
            "group_norm_silu: a sample must have fewer than 2**31 elements, "
            f"got {c * height * width}"
        )
    *random, layer, threshold = key_arguments(
        "group_norm_silu", dropout_p, dropout_key, n, x.device
    )
    (x,) = laid_out(layout_of(x), x)
    inputs: tuple[Any, ...] = (
        x, weight, bias, add, scale, shift, *random, num_groups, eps, silu, layer, threshold,
    )  # fmt: skip
    # The extension's kernel takes in one gradient that goes past it.
    inside = copies if kernels[0] is _fwd else min(copies, 1)
    if merges:
        inputs = (*inputs, second, skip, sum_scale, x_bias, skip_bias)
    if skip is not None:  # whose sum is kept for the backward pass
        inside = max(copies, 1)
    way = _BY_TRITON if kernels[0] is _fwd else _ON_CPU
    tensors = (v for v in inputs if isinstance(v, torch.Tensor))
    has_grad = torch.is_grad_enabled() and any(v.requires_grad for v in tensors)
    # Without a gradient dynamo would take forward's first argument for a ctx.
    run = _Apply.apply if has_grad else _Apply.forward
    y, *past = run(*inputs, inside, way if calls_directly(x) else _BY_OPERATOR)[:-2]
    return (y, *past[:inside], *[x] * (copies - inside), *past[inside:]) if copies else y
