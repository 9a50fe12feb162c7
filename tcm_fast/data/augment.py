"""EDM's augmentation of small sets (Karras et al. 2022, appendix F.2): flips, scaling, rotation,
anisotropic scaling and translation, with the parameters as an input of the network, so that they do not
leak into what it generates. And `distort`, whose strengths a feature network learns to tell.

An image's augmentation is a function of the key alone, (seed, step, sample number): the same whatever the
batch, the device or the number of processes. Nothing waits for the device.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.philox import philox_bits, philox_normal

AUGMENT_DIM = 9
UNIFORM_LAYER, NORMAL_LAYER = 0x8000_0010, 0x8000_0011  # Philox keys, beside those of the noise
DISTORT_LAYER, PIXEL_LAYER = 0x8000_0012, 0x8000_0013
SCALE_STD = ANISO_STD = 0.2  # of the factors' base-2 logarithm
TRANSLATE_STD = 1 / 8  # of the shift over the image's size
# Scaling filter of the least asymmetric Daubechies wavelet with six vanishing moments (sym6).
SYM6 = (
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
)  # fmt: skip


def augment(images: torch.Tensor, key: PhiloxKey, p: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Augment a batch, each transformation of each image with probability p; mirror every second one.

    Args:
        images: floating [N,C,H,W], square.
        key: seed, step and sample numbers [N].
        p: in [0, 1].

    Returns:
        The images, in the same dtype and layout, and their labels fp32 [N,9]: left-right and up-down flip,
        scale, cosine - 1 and sine of the rotation, anisotropy times cosine and sine of its direction,
        horizontal and vertical shift; all zero where nothing was done.
    """
    if not len(images):
        return images, torch.zeros((0, AUGMENT_DIM), device=images.device)
    u, g = _draws(key)
    on = (u[:, :5] < p).to(torch.float32)
    flip_x = (u[:, 5] < 0.5).to(torch.float32)
    flip_y = (u[:, 6] < 0.5).to(torch.float32) * on[:, 0]
    scale = g[:, 0] * on[:, 1]
    angle = (2 * u[:, 7] - 1) * math.pi * on[:, 2]
    direction, anisotropy = (2 * u[:, 8] - 1) * math.pi, g[:, 1] * on[:, 3]
    shift = g[:, 2:4] * on[:, 4:]
    labels = torch.stack(
        [
            flip_x, flip_y, scale, angle.cos() - 1, angle.sin(), anisotropy * direction.cos(),
            anisotropy * direction.sin(), shift[:, 0], shift[:, 1],
        ],
        1,
    )  # fmt: skip
    stretch = torch.exp2(ANISO_STD * anisotropy)
    # From a place in the augmented image to the one in the image before: the inverses, last one first.
    inverse = _shift(-2 * TRANSLATE_STD * shift)  # the image's half size is 1
    inverse = _rotation(direction) @ inverse
    inverse = _scaling(1 / stretch, stretch) @ inverse
    inverse = _rotation(-direction) @ inverse
    inverse = _rotation(angle) @ inverse
    inverse = _scaling(torch.exp2(-SCALE_STD * scale), torch.exp2(-SCALE_STD * scale)) @ inverse
    flipped = _flipped(images, flip_x > 0, flip_y > 0)
    moved = _warp(flipped, inverse)
    is_moved = on[:, 1:].any(1).reshape(-1, 1, 1, 1)
    return torch.where(is_moved, moved, flipped), labels


# ---- distortions of which a network learns the strengths -----------------------------------------

STRENGTHS = (
    "rotation", "scale", "stretch", "shear", "shift_x", "shift_y", "brightness", "contrast", "gamma",
    "blur", "noise", "cutout", "pixelate", "saturation", "hue",
)  # fmt: skip
"""The distortions, in the order of their strengths; grey images have no saturation and hue."""
ONE_SIDED = ("blur", "noise", "cutout", "pixelate")  # strengths in [0, 1], the others in [-1, 1]


def strengths_of(channels: int) -> tuple[str, ...]:
    """The distortions of images with so many channels."""
    return STRENGTHS if channels == 3 else STRENGTHS[:-2]


def distort(
    images: torch.Tensor, key: PhiloxKey, p: float = 0.5
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distort a batch, each image in each way with probability p and a uniformly drawn strength.

    At full strength: turned by an eighth of a turn, scaled by 2^0.4, stretched by 2^0.3 against 2^-0.3,
    sheared by 0.4, shifted by an eighth of the size; brighter by 0.4, contrast times 2^0.7, exponent 2 of the
    brightness, saturation times 2, hues turned by a sixth of a turn; blurred by 1/2 + size/48 pixels, noise
    of 0.5, a grey square of half the size, pixels of 2x2.

    Args:
        images: floating [N,C,H,W] in [-1,1], square, of 4 pixels or more, C 1 or 3.
        key: seed, step and sample numbers [N].
        p: in [0, 1].

    Returns:
        The images and the strengths, fp32 [N,13] or, of 3 channels, [N,15]: see STRENGTHS; 0 where nothing
        was done.
    """
    size, names = images.shape[3], strengths_of(images.shape[1])
    bits = philox_bits(key.seed, key.step, DISTORT_LAYER, key.sample, 8).flatten(1)
    u = (bits >> 8 & 0xFFFFFF).to(torch.float32) / (1 << 24)
    n = len(STRENGTHS)
    one_sided = torch.tensor([name in ONE_SIDED for name in STRENGTHS], device=u.device)
    drawn = torch.where(one_sided, u[:, n : 2 * n], 2 * u[:, n : 2 * n] - 1)
    strengths = torch.where(u[:, :n] < p, drawn, 0.0)[:, : len(names)]
    by = dict(zip(names, strengths.unbind(1), strict=True))
    one, zero = torch.ones_like(u[:, 0]), torch.zeros_like(u[:, 0])

    inverse = _shift(-2 * TRANSLATE_STD * torch.stack([by["shift_x"], by["shift_y"]], 1))
    inverse = _matrix((one, 0.4 * by["shear"], zero), (zero, one, zero)) @ inverse
    stretch, scale = torch.exp2(0.3 * by["stretch"]), torch.exp2(-0.4 * by["scale"])
    inverse = _scaling(scale / stretch, scale * stretch) @ inverse
    x = _warp(images.to(torch.float32), _rotation(by["rotation"] * math.pi / 4) @ inverse)

    wide = {name: strength.reshape(-1, 1, 1, 1) for name, strength in by.items()}
    x = 2 * ((x + 1) / 2).clamp(0, 1) ** torch.exp2(wide["gamma"]) - 1
    if "hue" in by:
        x = _recoloured(x, torch.exp2(wide["saturation"]), wide["hue"] * math.pi / 3)
    mean = x.mean((1, 2, 3), keepdim=True)
    x = mean + (x - mean) * torch.exp2(0.7 * wide["contrast"]) + 0.4 * wide["brightness"]

    x = _blurred(x, by["blur"], 0.5 + size / 48)
    coarse = F.avg_pool2d(x, 2, ceil_mode=True).repeat_interleave(2, 2).repeat_interleave(2, 3)
    x = torch.lerp(x, coarse[:, :, :size, :size], wide["pixelate"])
    place = torch.arange(size, device=x.device) + 0.5
    half = by["cutout"][:, None] * size / 4
    hidden_x, hidden_y = ((place - size * u[:, k, None]).abs() < half for k in (2 * n, 2 * n + 1))
    x = torch.where((hidden_y[:, :, None] & hidden_x[:, None])[:, None], 0.0, x)
    noise = philox_normal(key.seed, key.step, PIXEL_LAYER, key.sample, tuple(x.shape[1:]))
    return x + 0.5 * wide["noise"] * noise, strengths


def _recoloured(x: torch.Tensor, saturation: torch.Tensor, angle: torch.Tensor) -> torch.Tensor:
    """Colours [N,3,H,W] scaled and turned around the grey axis."""
    grey = x.mean(1, keepdim=True)
    across = (x.roll(1, 1) - x.roll(-1, 1)) / math.sqrt(3)
    return grey + saturation * ((x - grey) * angle.cos() + across * angle.sin())


def _blurred(x: torch.Tensor, strength: torch.Tensor, most: float) -> torch.Tensor:
    """Gaussian blur with a standard deviation of its own for each image, at most `most` pixels."""
    radius = math.ceil(3 * most)
    place = torch.arange(-radius, radius + 1, device=x.device)
    taps = torch.exp(-0.5 * (place / (most * strength[:, None]).clamp_min(1e-3)) ** 2)
    taps = (taps / taps.sum(1, keepdim=True)).reshape(len(x), -1, 1, 1, 1)
    for dim in (2, 3):
        size = x.shape[dim]
        wide = x.index_select(dim, _mirror(size, radius, x.device))
        x = sum(taps[:, k] * wide.narrow(dim, k, size) for k in range(2 * radius + 1))  # type: ignore[assignment]
    return x


# ---- draws, places and filters -------------------------------------------------------------------


def _draws(key: PhiloxKey) -> tuple[torch.Tensor, torch.Tensor]:
    """Uniform [N,12] in [0, 1) and unit Gaussian [N,4] numbers, fp32."""
    bits = philox_bits(key.seed, key.step, UNIFORM_LAYER, key.sample, 3).flatten(1)
    uniform = (bits >> 8 & 0xFFFFFF).to(torch.float32) / (1 << 24)
    normal = philox_normal(key.seed, key.step, NORMAL_LAYER, key.sample, (4, 1, 1))
    return uniform, normal.flatten(1)


def _flipped(x: torch.Tensor, left_right: torch.Tensor, up_down: torch.Tensor) -> torch.Tensor:
    x = torch.where(left_right.reshape(-1, 1, 1, 1), x.flip(3), x)
    return torch.where(up_down.reshape(-1, 1, 1, 1), x.flip(2), x)


def _matrix(*rows: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """[N,3,3] from two rows of three columns [N] each; the third row is 0 0 1."""
    zero, one = torch.zeros_like(rows[0][0]), torch.ones_like(rows[0][0])
    return torch.stack([torch.stack(row, 1) for row in (*rows, (zero, zero, one))], 1)


def _shift(by: torch.Tensor) -> torch.Tensor:
    zero, one = torch.zeros_like(by[:, 0]), torch.ones_like(by[:, 0])
    return _matrix((one, zero, by[:, 0]), (zero, one, by[:, 1]))


def _scaling(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    zero = torch.zeros_like(x)
    return _matrix((x, zero, zero), (zero, y, zero))


def _rotation(angle: torch.Tensor) -> torch.Tensor:
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    return _matrix((cos, sin, zero), (-sin, cos, zero))


def _warp(x: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """The image at the places inverse [N,3,3] of each pixel's, mirrored beyond its borders.

    Read by bilinear interpolation at twice the resolution, where that blurs little, between a wavelet's
    synthesis and its analysis filter: these two alone leave the image as it is."""
    n, _, height, width = x.shape
    wide = _upsampled(x.to(torch.float32))
    size = [n, x.shape[1], 2 * (height + 2 * MARGIN), 2 * (width + 2 * MARGIN)]
    # A margin around the result, for the filter that follows.
    grow = torch.tensor([size[3] / (2 * width), size[2] / (2 * height), 1.0], device=x.device)
    # The filter is not symmetric: where the samples lie is a little off where they are thought to be.
    off = torch.tensor([[OFFSET / width, OFFSET / height]], device=x.device)
    inverse = _shift(-off) @ inverse @ _shift(off)
    grid = F.affine_grid((inverse * grow)[:, :2], size, align_corners=False)
    moved = F.grid_sample(
        wide, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )
    return _downsampled(moved, height, width).to(x.dtype)


TAPS = len(SYM6)
MARGIN = TAPS // 4  # pixels that the analysis filter reads beyond the borders
CENTRE = sum(k * tap for k, tap in enumerate(SYM6)) / sum(SYM6)
OFFSET = TAPS // 2 - 1 + 0.5 - CENTRE  # of the upsampled image, in its own pixels


def _filter(x: torch.Tensor, taps: torch.Tensor, *, up: bool) -> torch.Tensor:
    """A separable filter with a stride of 2 that doubles or halves the resolution."""
    c = x.shape[1]
    for shape in ((1, 1, TAPS, 1), (1, 1, 1, TAPS)):
        kernel = taps.reshape(shape).expand(c, -1, -1, -1)
        stride = (2, 1) if shape[2] > 1 else (1, 2)
        convolve = F.conv_transpose2d if up else F.conv2d
        x = convolve(x, kernel, stride=stride, groups=c)
    return x


def _upsampled(x: torch.Tensor) -> torch.Tensor:
    """[N,C,H,W] -> [N,C,2H,2W] by the synthesis filter; mirrored at the borders."""
    height, width = x.shape[2:]
    border = TAPS // 4 + 1
    rows = _mirror(height, border, x.device)
    columns = _mirror(width, border, x.device)
    x = x[:, :, rows][:, :, :, columns]
    taps = x.new_tensor(SYM6) * math.sqrt(0.5) * 2
    x = _filter(x, taps, up=True)
    start = 2 * border + TAPS // 2 - 1
    return x[:, :, start : start + 2 * height, start : start + 2 * width]


def _downsampled(x: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The middle [N,C,height,width] of x at half the resolution, by the analysis filter."""
    taps = x.new_tensor(SYM6) * math.sqrt(0.5)
    start = 2 * MARGIN - (TAPS // 2 - 1)
    x = x[:, :, start : start + 2 * height + TAPS - 2, start : start + 2 * width + TAPS - 2]
    return _filter(x, taps, up=False)


def _mirror(size: int, border: int, device: torch.device) -> torch.Tensor:
    """Indices from -border to size + border - 1, mirrored at the edges of the outermost pixels."""
    place = torch.arange(-border, size + border, device=device) % (2 * size)
    return torch.minimum(place, 2 * size - 1 - place)
