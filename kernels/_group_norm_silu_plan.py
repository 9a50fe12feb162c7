"""How the programs of `group_norm_silu` divide a tensor among them."""

import functools
from typing import NamedTuple

from tcm_fast.kernels._common import power_of_2


class Plan(NamedTuple):
    """A program's tiles: `groups` whole groups in `slab` columns, `pixels` rows; whether it holds all of
    them at once; its warps."""

    groups: int
    slab: int
    pixels: int
    holds: bool
    warps: int


@functools.cache
def plan_slabs(
    channels: int, pixels: int, num_groups: int, itemsize: int, unit: int, channels_last: bool,
    backward: bool,
) -> Plan:  # fmt: skip
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
    # A tile is 8 or 16 values of a thread, one to four accesses: few live at once, enough in flight. 4
    # where two slabs of fp32 leave a thread little of its 128 registers.
    values = 16 if (is_wide if holds else not backward) else 8
    if holds and is_wide and backward and warps == 16:
        values = 4
    tile = 32 * warps * values
    rows = min(power_of_2(pixels), max(1, tile // slab))
    return Plan(groups, slab, rows, bool(holds), warps)
