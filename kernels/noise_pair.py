"""Two noisy versions of each image from one draw of noise: the inputs of a consistency step."""

from typing import NamedTuple

import torch

from tcm_fast.kernels._common import layout_of, register
from tcm_fast.kernels._philox_triton import box_muller, philox_blocks
from tcm_fast.kernels._triton import Variant, launch, runs_triton, tl, triton
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.philox import counters, philox_normal
from tcm_fast.kernels.precondition import preconditioning

# Layer numbers from here on key noise; the networks' dropout layers count up from 0.
NOISE_LAYER = 0x80000000


class NoisePair(NamedTuple):
    """y, x_t, x_r: fp32 [N,C,H,W]; input_t, input_r: c_in(t) x_t, c_in(r) x_r in the compute dtype,
    [N,C(+1),H,W]. x_r and input_r are None where no r was given."""

    y: torch.Tensor
    x_t: torch.Tensor
    x_r: torch.Tensor | None
    input_t: torch.Tensor
    input_r: torch.Tensor | None


# -- reference ------------------------------------------------------------------------------------


def to_unit_range(images: torch.Tensor) -> torch.Tensor:
    """uint8 [..] -> fp32 in [-1, 1] (x/127.5 - 1); floating images pass unchanged, as fp32."""
    if images.dtype == torch.uint8:
        return images.to(torch.float32) / 127.5 - 1
    return images.to(torch.float32)


def network_input(
    x: torch.Tensor,
    t: torch.Tensor,
    sigma_data: float,
    dtype: torch.dtype,
    append_ones: bool = False,
) -> torch.Tensor:
    """c_in(t) x in the compute dtype, with a channel of ones where asked for."""
    scaled = (preconditioning(t.to(x.dtype), sigma_data)[2] * x).to(dtype)
    return torch.cat([scaled, torch.ones_like(scaled[:, :1])], 1) if append_ones else scaled


def noise_pair_reference(y, t, r, noise, *, sigma_data=0.5, dtype=torch.float32, append_ones=False):
    y = to_unit_range(y)
    levels = [None if level is None else level.to(torch.float32) for level in (t, r)]
    noisy = [None if s is None else y + s.reshape(-1, 1, 1, 1) * noise for s in levels]
    inputs = [
        None if x is None else network_input(x, s, sigma_data, dtype, append_ones)
        for x, s in zip(noisy, levels, strict=True)
    ]
    return NoisePair(y, noisy[0], noisy[1], inputs[0], inputs[1])


# -- kernels --------------------------------------------------------------------------------------


# A block of Philox makes the noise of four neighbouring elements, in the order (pixel, channel).
@triton.jit
def _noise_pair_kernel(
    y, t, r, sample, seed, step, unit, x_t, x_r, input_t, input_r,
    size, channels, x_pixel, x_channel, in_pixel, in_channel, in_size, variance,
    IS_UINT8: tl.constexpr, HAS_R: tl.constexpr, APPEND_ONES: tl.constexpr, IS_LINEAR: tl.constexpr,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    layer = tl.full([], LAYER, tl.int64)
    w0, w1, w2, w3 = philox_blocks(block, tl.load(sample + n), tl.load(seed), tl.load(step), layer)
    n0, n1 = box_muller(w0, w1)
    n2, n3 = box_muller(w2, w3)
    noise = tl.interleave(tl.interleave(n0, n2), tl.interleave(n1, n3))

    e = tl.program_id(1) * 4 * BLOCK + tl.arange(0, 4 * BLOCK)
    inside = e < size
    pixel, channel = e // channels, e % channels
    x_at = n * size + (e if IS_LINEAR else pixel * x_pixel + channel * x_channel)
    value = tl.load(y + x_at, mask=inside, other=0)
    value = value.to(tl.float32)
    if IS_UINT8:
        value = tl.div_rn(value, 127.5) - 1.0
    in_at = x_at
    if APPEND_ONES or not IS_LINEAR:
        in_at = n * in_size + pixel * in_pixel + channel * in_channel
    ones_at = n * in_size + pixel * in_pixel + channels * in_channel
    is_first = inside & (channel == 0)
    one = tl.full([4 * BLOCK], 1.0, tl.float32)
    tl.store(unit + x_at, value, mask=inside)

    level = tl.load(t + n)
    x = value + level * noise
    tl.store(x_t + x_at, x, mask=inside)
    scaled = tl.div_rn(1.0, tl.sqrt_rn(level * level + variance)) * x
    tl.store(input_t + in_at, scaled.to(input_t.dtype.element_ty), mask=inside)
    if APPEND_ONES:
        tl.store(input_t + ones_at, one.to(input_t.dtype.element_ty), mask=is_first)
    if HAS_R:
        level = tl.load(r + n)
        x = value + level * noise
        tl.store(x_r + x_at, x, mask=inside)
        scaled = tl.div_rn(1.0, tl.sqrt_rn(level * level + variance)) * x
        tl.store(input_r + in_at, scaled.to(input_r.dtype.element_ty), mask=inside)
        if APPEND_ONES:
            tl.store(input_r + ones_at, one.to(input_r.dtype.element_ty), mask=is_first)


# -- launchers ------------------------------------------------------------------------------------

BLOCK = 256


def _buffers(y, has_r, dtype, append_ones):
    """The outputs, unwritten, in y's layout."""
    n, c, h, w = y.shape
    layout = layout_of(y, torch.channels_last)
    images = [
        torch.empty((n, c, h, w), dtype=torch.float32, device=y.device, memory_format=layout)
        for _ in range(3 if has_r else 2)
    ]
    shape = (n, c + append_ones, h, w)
    inputs = [
        torch.empty(shape, dtype=dtype, device=y.device, memory_format=layout)
        for _ in range(2 if has_r else 1)
    ]
    return [*images, *inputs]


def _strides(channels: int, pixels: int, layout: torch.memory_format) -> tuple[int, int]:
    """Of a pixel and of a channel, in elements."""
    return (channels, 1) if layout == torch.channels_last else (1, pixels)


def _launch(y, t, r, sample, seed, step, layer, sigma_data, dtype, append_ones):
    layout = layout_of(y, torch.channels_last)
    y = y.contiguous(memory_format=layout)
    buffers = _buffers(y, r is not None, dtype, append_ones)
    if r is None:
        unit, x_t, input_t = buffers
        x_r, input_r = x_t, input_t  # not touched
    else:
        unit, x_t, x_r, input_t, input_r = buffers
    n, c, h, w = y.shape
    size, pixels = c * h * w, h * w
    image = _strides(c, pixels, layout)
    # Without fused products the Gaussians are the reference's, bit for bit.
    launch(
        _noise_pair_kernel, (n, -(-size // (4 * BLOCK))), y, t, t if r is None else r, sample, seed,
        step, unit, x_t, x_r, input_t, input_r, size, c, *image,
        *_strides(c + append_ones, pixels, layout), pixels * (c + append_ones), sigma_data**2,
        IS_UINT8=y.dtype == torch.uint8, HAS_R=r is not None, APPEND_ONES=append_ones,
        IS_LINEAR=layout == torch.channels_last, LAYER=layer, BLOCK=BLOCK,
        num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip
    return buffers


def specialisations(capability: int) -> list[Variant]:
    """The forms in which CIFAR-10 and ImageNet-64 use the kernel."""
    variants = []
    sizes = ("size", "channels", "x_pixel", "x_channel", "in_pixel", "in_channel", "in_size")
    for site, pixels in (("3x32x32", 1024), ("3x64x64", 4096)):
        for dtype in ("fp32", "fp16", "bf16"):
            signature = {"y": "*u8", "t": "*fp32", "r": "*fp32", "sample": "*i64", "seed": "*i64"}
            signature |= {"step": "*i64", "unit": "*fp32", "x_t": "*fp32", "x_r": "*fp32"}
            signature |= {"input_t": f"*{dtype}", "input_r": f"*{dtype}"}
            signature |= dict.fromkeys(sizes, "i32") | {"variance": "fp32"}
            constants = {"IS_UINT8": True, "HAS_R": True, "APPEND_ONES": True}
            constants |= {"IS_LINEAR": True, "LAYER": NOISE_LAYER, "BLOCK": BLOCK}
            variants.append(
                Variant(f"{site} {dtype}", _noise_pair_kernel, signature, constants,
                        fp_fusion=False, aligned=frozenset({"size", "in_size"}),
                        programs=128 * 3 * pixels // (4 * BLOCK))
            )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _by_reference(y, t, r, sample, seed, step, layer, sigma_data, dtype, append_ones):
    noise = philox_normal(seed, step, layer, sample, tuple(y.shape[1:]))
    outputs = noise_pair_reference(
        y, t, r, noise, sigma_data=sigma_data, dtype=dtype, append_ones=append_ones
    )
    # Copied: an operator must not return its input.
    buffers = _buffers(y, r is not None, dtype, append_ones)
    for buffer, output in zip(buffers, (v for v in outputs if v is not None), strict=True):
        buffer.copy_(output)
    return buffers


def _fake(y, t, r, sample, seed, step, layer, sigma_data, dtype, append_ones):
    return _buffers(y, r is not None, dtype, append_ones)


register(
    "noise_pair(Tensor y, Tensor t, Tensor? r, Tensor sample, Tensor seed, Tensor step, int layer, "
    "float sigma_data, ScalarType dtype, bool append_ones) -> Tensor[]",
    _launch, _by_reference, _fake,
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def noise_pair(
    y: torch.Tensor,
    t: torch.Tensor,
    r: torch.Tensor | None,
    key: PhiloxKey,
    *,
    sigma_data: float = 0.5,
    dtype: torch.dtype = torch.float32,
    append_ones: bool = False,
) -> NoisePair:
    """x_t = y + t·eps and x_r = y + r·eps with the same unit Gaussian eps, and the networks' inputs.

    The noise of a sample depends on (seed, step, sample) of the key alone: not on the batch it is
    computed in, the layout or the device.

    Args:
        y: images [N,C,H,W], uint8 (mapped to [-1,1]) or floating in [-1,1].
        t: outer noise levels [N].
        r: inner noise levels [N], or None where only x_t is wanted.
        key: seed, step and the samples' numbers [N]; its layer where that keys noise (NOISE_LAYER or
            above), else NOISE_LAYER.
        sigma_data: standard deviation of the data.
        dtype: compute dtype of the networks' inputs.
        append_ones: add a channel of ones to the inputs (`RawNetwork.takes_ones`).

    Returns:
        On CUDA in y's memory format; elsewhere in whichever is fastest.

    Raises:
        ValueError: shapes that do not fit, a y that asks for a gradient.
    """
    if y.ndim != 4:
        raise ValueError(f"noise_pair: y must be [N,C,H,W], got {list(y.shape)}")
    for name, level in (("t", t), ("r", r)):
        if level is not None and level.shape != y.shape[:1]:
            raise ValueError(f"noise_pair: {name} must be [{len(y)}], got {list(level.shape)}")
    if y.requires_grad and torch.is_grad_enabled():
        raise ValueError("noise_pair: y has no gradient here, got y with requires_grad")
    layer = max(key.layer, NOISE_LAYER)
    if runs_triton("noise_pair", y.device.type):
        sample, seed, step, _ = counters("noise_pair", key.seed, key.step, layer, key.sample)
        levels = [None if level is None else level.to(torch.float32) for level in (t, r)]
        images = y if y.dtype == torch.uint8 else y.to(torch.float32)
        outputs = torch.ops.tcm_fast.noise_pair(
            images, *levels, sample, seed, step, layer, sigma_data, dtype, append_ones
        )
        if r is None:
            unit, x_t, input_t = outputs
            return NoisePair(unit, x_t, None, input_t, None)
        return NoisePair(*outputs)
    noise = philox_normal(key.seed, key.step, layer, key.sample, tuple(y.shape[1:]))
    return noise_pair_reference(
        y, t, r, noise, sigma_data=sigma_data, dtype=dtype, append_ones=append_ones
    )
