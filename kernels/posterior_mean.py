"""The mean of the images that a noisy image may have come from: E[y | x_t] over a bank of images."""

import math

import torch

from tcm_fast.kernels._common import check_image, laid_out, layout_of, register
from tcm_fast.kernels._triton import Variant, launch, runs_triton, tl, triton
from tcm_fast.kernels.noise_pair import to_unit_range

# -- reference ------------------------------------------------------------------------------------
#
# Against the own image y, with eps = (x_t - y)/t and a bank image y_j,
#     (|x_t - y_j|² - |x_t - y|²) / (2t²) = |y - y_j|² / (2t²) + eps·(y - y_j) / t.
# By products, |x_t|² - 2 x_t·y_j + |y_j|², the left side has terms near 1e8 at t = 0.002 for 3x32x32: in fp32
# it is off by 60. On the right everything is a product with the differences of bytes, exact integers; an
# image counts only where |y - y_j| is at most some ten t, and there an error of eps counts at most ten times.


def posterior_mean_reference(x_t, t, own, bank, classes=None, bank_classes=None):
    wide = torch.float64
    images, others = own.flatten(1).to(wide), bank.flatten(1).to(wide)
    y = to_unit_range(own).to(x_t.dtype)
    level = t.to(wide).reshape(-1, 1)
    eps = (x_t - y).flatten(1).to(wide) / level
    squares = images.square().sum(1, keepdim=True) - 2 * images @ others.mT
    squares = squares + others.square().sum(1)
    along = (eps * images).sum(1, keepdim=True) - eps @ others.mT
    counts = squares > 0
    if classes is not None:
        counts = counts & (classes[:, None] == bank_classes)
    grey = 127.5 * level  # the noise level in grey levels
    logits = -(squares / (2 * grey) + along) / grey
    logits = torch.where(counts, logits, -math.inf)
    weights = torch.cat([torch.zeros_like(level), logits], 1).softmax(1)[:, 1:]
    shift = (weights @ others - weights.sum(1, keepdim=True) * images) / 127.5
    return y + shift.to(x_t.dtype).reshape(y.shape)


# -- kernels --------------------------------------------------------------------------------------
#
# eps is split into a multiple of 1/64, an integer up to 512 over 64, and a rest below 1/128, which fp16 holds
# to 2^-19. So tensor cores sum the products of the first with bytes exactly, as those of bytes with bytes
# (in fp32 over a block of K, below 2^24, then as int32), and the rest's error of 2e-6 is as small as that of
# the noise itself in fp32. What is equal in both images drops out exactly.


@triton.jit
def _bytes(images, row, k, inside, size):
    """Bytes less 128 at the elements k of some rows, fp32; 0 outside."""
    byte = tl.load(images + row[:, None] * size + k[None, :], mask=inside, other=128)
    return byte.to(tl.float32) - 128.0


# A program per block of samples and block of the bank.
@triton.jit
def _posterior_logits_kernel(
    x_t, t, own, bank, classes, bank_classes, logits, samples, images, size,
    HAS_CLASSES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    m = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    level = tl.load(t + n, mask=n < samples, other=1)
    along = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    rest = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    products = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    own_along = tl.zeros([BLOCK_N, BLOCK_K], tl.int32)
    own_rest = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    own_square = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)  # below 2^14 each: exact
    square = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    for first in range(0, size, BLOCK_K):
        k = first + tl.arange(0, BLOCK_K)
        inside = (n < samples)[:, None] & (k < size)[None, :]
        s = _bytes(own, n, k, inside, size)
        x = tl.load(x_t + n[:, None] * size + k[None, :], mask=inside, other=0)
        y = tl.div_rn(s + 128.0, 127.5) - 1.0
        eps = tl.where(inside, tl.div_rn(x - y, level[:, None]), 0.0)
        coarse = tl.minimum(tl.maximum(tl.floor(eps * 64.0 + 0.5), -512.0), 512.0)
        fine = (eps - coarse * (1 / 64)).to(tl.float16)
        b = _bytes(bank, m, k, (m < images)[:, None] & (k < size)[None, :], size)
        other = tl.trans(b.to(tl.float16))
        along += tl.dot(coarse.to(tl.float16), other).to(tl.int32)
        rest = tl.dot(fine, other, rest)
        products += tl.dot(s.to(tl.float16), other).to(tl.int32)
        own_along += (coarse * s).to(tl.int32)
        own_rest += fine.to(tl.float32) * s
        own_square += s * s
        square += b * b
    squares = tl.sum(own_square.to(tl.int32), 1)[:, None] - 2 * products
    squares += tl.sum(square.to(tl.int32), 1)[None, :]
    along = tl.sum(own_along, 1)[:, None] - along
    difference = along.to(tl.float32) * (1 / 64) + (tl.sum(own_rest, 1)[:, None] - rest)
    grey = 127.5 * level[:, None]
    logit = -tl.div_rn(tl.div_rn(squares.to(tl.float32) * 0.5, grey) + difference, grey)
    counts = squares > 0
    if HAS_CLASSES:
        mine = tl.load(classes + n, mask=n < samples, other=0)
        theirs = tl.load(bank_classes + m, mask=m < images, other=0)
        counts = counts & (mine[:, None] == theirs[None, :])
    at = logits + n[:, None] * images + m[None, :]
    inside = (n < samples)[:, None] & (m < images)[None, :]
    tl.store(at, tl.where(counts, logit * 1.4426950408889634, float("-inf")), mask=inside)


# A program per block of samples and block of an image; the own image's logit is 0.
@triton.jit
def _posterior_mean_kernel(
    logits, own, bank, mean, samples, images, size,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    high = tl.zeros([BLOCK_N], tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    sums = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    for first in range(0, images, BLOCK_M):
        m = first + tl.arange(0, BLOCK_M)
        inside = (n < samples)[:, None] & (m < images)[None, :]
        at = logits + n[:, None] * images + m[None, :]
        logit = tl.load(at, mask=inside, other=float("-inf"))
        higher = tl.maximum(high, tl.max(logit, 1))
        shrink = tl.exp2(high - higher)
        p = tl.exp2(logit - higher[:, None])
        b = _bytes(bank, m.to(tl.int64), k, (m < images)[:, None] & (k < size)[None, :], size)
        sums = tl.dot(p, b, sums * shrink[:, None], input_precision="tf32x3")
        total = total * shrink + tl.sum(p, 1)
        high = higher
    inside = (n < samples)[:, None] & (k < size)[None, :]
    s = _bytes(own, n, k, inside, size)
    shift = (sums - total[:, None] * s) * (1 / (127.5 * (total + tl.exp2(-high))))[:, None]
    y = tl.div_rn(s + 128.0, 127.5) - 1.0
    tl.store(mean + n[:, None] * size + k[None, :], y + shift, mask=inside)


# -- launchers ------------------------------------------------------------------------------------

LARGEST = 1 << 14  # elements of an image: 512 * 255 times that fits int32
# Blocks of samples, of the bank, of an image's elements, warps and stages; reasoned from registers (no spills
# on any architecture). The same for every batch, so that its bits do not depend on how it is cut.
LOGITS = {"BLOCK_N": 32, "BLOCK_M": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
MEAN = {"BLOCK_N": 32, "BLOCK_M": 32, "BLOCK_K": 64, "num_warps": 4, "num_stages": 2}


def _launch(x_t, t, own, bank, classes, bank_classes):
    layout = layout_of(x_t, torch.channels_last)
    x_t, own, bank = laid_out(layout, x_t, own, bank)
    mean = torch.empty_like(x_t)
    n, images, size = len(x_t), len(bank), math.prod(x_t.shape[1:])
    logits = torch.empty((n, images), dtype=torch.float32, device=x_t.device)
    has_classes = classes is not None
    grid = (-(-n // LOGITS["BLOCK_N"]), -(-images // LOGITS["BLOCK_M"]))
    launch(
        _posterior_logits_kernel, grid, x_t, t, own, bank, classes if has_classes else t,
        bank_classes if has_classes else t, logits, n, images, size, HAS_CLASSES=has_classes, **LOGITS,
    )  # fmt: skip
    grid = (-(-n // MEAN["BLOCK_N"]), -(-size // MEAN["BLOCK_K"]))
    launch(_posterior_mean_kernel, grid, logits, own, bank, mean, n, images, size, **MEAN)
    return mean


def specialisations(capability: int) -> list[Variant]:
    """The forms in which CIFAR-10 and ImageNet-64 use the kernels, with a bank of 1,024."""
    variants = []
    sizes = dict.fromkeys(("samples", "images", "size"), "i32")
    mean = {"logits": "*fp32", "own": "*u8", "bank": "*u8", "mean": "*fp32"} | sizes
    for site, size, has_classes in (("3x32x32", 3072, False), ("3x64x64", 12288, True)):
        kind = "*i64" if has_classes else "*fp32"
        logits = {"x_t": "*fp32", "t": "*fp32", "own": "*u8", "bank": "*u8", "classes": kind}
        logits |= {"bank_classes": kind, "logits": "*fp32"} | sizes
        for kernel, signature, tiles, own, programs in (
            (_posterior_logits_kernel, logits, LOGITS, {"HAS_CLASSES": has_classes}, 4 * 16),
            (_posterior_mean_kernel, mean, MEAN, {}, 4 * size // MEAN["BLOCK_K"]),
        ):
            blocks = {name: n for name, n in tiles.items() if name.startswith("BLOCK")}
            variants.append(
                Variant(
                    site, kernel, signature, blocks | own, tiles["num_warps"], tiles["num_stages"],
                    aligned=frozenset(sizes), programs=programs,
                )
            )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------

register(
    "posterior_mean(Tensor x_t, Tensor t, Tensor own, Tensor bank, Tensor? classes, "
    "Tensor? bank_classes) -> Tensor",
    _launch,
    lambda x_t, *rest: posterior_mean_reference(x_t, *rest).contiguous(
        memory_format=layout_of(x_t, torch.channels_last)
    ),
    lambda x_t, *_: torch.empty_like(x_t, memory_format=layout_of(x_t, torch.channels_last)),
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def posterior_mean(
    x_t: torch.Tensor,
    t: torch.Tensor,
    own: torch.Tensor,
    bank: torch.Tensor,
    classes: torch.Tensor | None = None,
    bank_classes: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean of a sample's own image and a bank's, weighted by how likely x_t came from each: the softmax
    over them of -|x_t - y_j|² / (2t²).

    Images of the bank that are equal to the own one do not count again. The images are the fp32 values
    that `noise_pair` computes from bytes; as t goes to 0 the result is the own image, bit for bit.

    Args:
        x_t: noisy images own + t·eps, fp32 (float64 for an oracle), [N,C,H,W].
        t: noise levels, positive, [N].
        own: the images that x_t was made from, uint8 [N,C,H,W].
        bank: other images, uint8 [M,C,H,W].
        classes, bank_classes: int64 [N] and [M]; images of other classes do not count. Or neither.

    Returns:
        [N,C,H,W] of x_t's dtype. There is no gradient. The kernels take fp32 images of up to 16,384
        values. Source: Xu et al. 2023 (stable target field).

    Raises:
        TypeError: an x_t that is not floating, images that are not uint8.
        ValueError: shapes that do not fit, an x_t that asks for a gradient.
    """
    check_image("posterior_mean", x_t, "x_t")
    for name, images, count in (("own", own, len(x_t)), ("bank", bank, len(bank))):
        if images.dtype != torch.uint8:
            raise TypeError(f"posterior_mean: {name} must be uint8, got {images.dtype}")
        if images.shape != (count, *x_t.shape[1:]):
            raise ValueError(
                f"posterior_mean: {name} must be {[count, *x_t.shape[1:]]}, got {list(images.shape)}"
            )
    if t.shape != x_t.shape[:1]:
        raise ValueError(f"posterior_mean: t must be [{len(x_t)}], got {list(t.shape)}")
    if (classes is None) != (bank_classes is None):
        raise ValueError("posterior_mean: classes and bank_classes go together, got one of them")
    for name, labels, count in (
        ("classes", classes, len(x_t)),
        ("bank_classes", bank_classes, len(bank)),
    ):
        if labels is not None and (labels.dtype != torch.int64 or labels.shape != (count,)):
            raise ValueError(
                f"posterior_mean: {name} must be int64 [{count}], got {labels.dtype} {list(labels.shape)}"
            )
    if x_t.requires_grad and torch.is_grad_enabled():
        raise ValueError("posterior_mean: x_t has no gradient here, got x_t with requires_grad")
    served = x_t.dtype == torch.float32 and math.prod(x_t.shape[1:]) <= LARGEST
    if not served or not runs_triton("posterior_mean", x_t.device.type):
        return posterior_mean_reference(x_t, t, own, bank, classes, bank_classes)
    levels = t.to(torch.float32)
    return torch.ops.tcm_fast.posterior_mean(x_t, levels, own, bank, classes, bank_classes)
