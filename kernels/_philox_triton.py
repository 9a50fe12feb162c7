"""Philox4x32-7 and Box-Muller as Triton device functions: the numbers of `philox.py`, inside a kernel.

A kernel that calls `box_muller` is launched with enable_fp_fusion=False: the Gaussians agree bit for
bit with the reference only where no product is fused with a sum.
"""

from tcm_fast.kernels._triton import tl, triton

# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def philox_words(c0, c1, c2, c3, k0, k1):
    """Counter and key words (uint32, the counter's broadcast to a block) -> four uint32 words."""
    for _ in tl.static_range(7):
        high0 = tl.umulhi(c0, 0xD2511F53)
        low0 = c0 * 0xD2511F53
        high1 = tl.umulhi(c2, 0xCD9E8D57)
        low1 = c2 * 0xCD9E8D57
        c0 = high1 ^ c1 ^ k0
        c2 = high0 ^ c3 ^ k1
        c1 = low1
        c3 = low0
        k0 = k0 + 0x9E3779B9
        k1 = k1 + 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def philox_blocks(block, sample, seed, step, layer):
    """The words of blocks `block` (an integer tensor) of one sample. sample, seed, step: int64
    scalars; layer: an integer below 2**32."""
    c0 = block.to(tl.uint32)
    zero = c0 * 0
    c1 = zero + sample.to(tl.uint32)
    c2 = zero + step.to(tl.uint32)
    c3 = zero + (step >> 32).to(tl.uint32)
    k0 = zero + seed.to(tl.uint32)
    k1 = zero + layer.to(tl.uint32)
    return philox_words(c0, c1, c2, c3, k0, k1)


@triton.jit
def box_muller(radius_word, angle_word):
    """Two uint32 words -> two unit Gaussians, fp32: radius · (cos, sin)."""
    # u = m·2^-25, m odd; m·2^j lies in [2^24, 2^25), so -ln u = j·ln 2 - log1p(-f), f in (0, 1/2].
    k = (radius_word >> 8).to(tl.int32)
    leading = tl.where(k == 0, 1, 2 * k).to(tl.float32)
    j = 151 - (leading.to(tl.int32, bitcast=True) >> 23)
    f = ((1 << 25) - ((2 * k + 1) << j)).to(tl.float32) * 2.9802322387695312e-08
    p = f * 3.46722388 + -4.91792393
    p = p * f + 3.91974115
    p = p * f + -1.18017745
    p = p * f + 0.681492925
    p = p * f + 0.350881547
    p = p * f + 0.503913581
    p = p * f + 0.666510344
    p = p * f + 1.00000238
    p = p * f + 2.0
    radius = tl.sqrt_rn(j.to(tl.float32) * 1.38629436 + f * p)

    # The angle is `quarter` quarter turns and s/8 of a turn, s in (-1, 1).
    a = 2 * (angle_word >> 8).to(tl.int32) + 1
    quarter = (a + (1 << 22)) >> 23
    s = (a - (quarter << 23)).to(tl.float32) * 2.384185791015625e-07
    z = s * s
    sine = z * -3.59542901e-05 + 0.00249000685
    sine = sine * z + -0.0807454363
    sine = s * (sine * z + 0.785398185)
    cosine = z * 3.52979714e-06 + -0.000325938599
    cosine = cosine * z + 0.0158543251
    cosine = cosine * z + -0.308425128
    cosine = cosine * z + 1.0
    odd = (quarter & 1) == 1
    x = tl.where(odd, -sine, cosine)
    y = tl.where(odd, cosine, sine)
    sign = tl.where((quarter & 2) == 2, -1.0, 1.0)
    return radius * (sign * x), radius * (sign * y)


@triton.jit
def is_kept(p, first, c, sample, seed, step, layer, threshold, CHANNELS: tl.constexpr,
            BY_EIGHT: tl.constexpr, SLAB: tl.constexpr):  # fmt: skip
    """Which elements of a tile dropout keeps: the rule of dropout.py."""
    if BY_EIGHT:
        block = p[:, None] * (CHANNELS // 8) + (first // 8 + tl.arange(0, SLAB // 8))[None, :]
        w0, w1, w2, w3 = philox_blocks(block, sample, seed, step, layer)
        words = tl.join(tl.join(w0, w2), tl.join(w1, w3))
        lanes = tl.join(words << 16, words).reshape(p.shape[0], SLAB)
    else:
        e = p[:, None] * CHANNELS + c[None, :]
        w0, w1, w2, w3 = philox_blocks(e >> 3, sample, seed, step, layer)
        word = tl.where(e & 4 == 0, tl.where(e & 2 == 0, w0, w1), tl.where(e & 2 == 0, w2, w3))
        lanes = tl.where(e & 1 == 0, word << 16, word)
    # A lane stands in the high half; what is below it does not change the comparison.
    return lanes >= (threshold.to(tl.uint32) << 16)
