"""The sum that ends a residual branch where one of its terms is a 1x1 convolution: the product of matrices
that it is adds the other term and the biases before it writes (Karras et al. 2022, appendix C)."""

from __future__ import annotations

from itertools import product

import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from tcm_fast.kernels._common import (
    DTYPES,
    check_image,
    empty,
    given,
    layout_of,
    of_channels,
    power_of_2,
    register,
)
from tcm_fast.kernels._triton import Variant, interpreting, launch, runs_triton, tl, triton
from tcm_fast.kernels.qkv_attention import _dot
from tcm_fast.kernels.residual import check_sum, note_biases, of_biases, residual_reference

# -- reference ------------------------------------------------------------------------------------


def residual_conv1x1_reference(
    x,
    skip,
    weight,
    scale=1.0,
    x_bias=None,
    skip_bias=None,
    *,
    second=None,
    up=False,
    of_terms=False,
    parts=None,
):
    wide = torch.promote_types(x.dtype, torch.float32)
    skip = skip if second is None else torch.cat([skip, second], 1)
    skip = torch.conv2d(skip.to(wide), weight.to(wide))
    if up:
        skip = F.interpolate(skip, scale_factor=2.0, mode="nearest")
    out = residual_reference(x.to(wide), skip, scale, x_bias, skip_bias)
    if of_terms:
        out = _WithGradientOf.apply(out.detach(), x.to(wide) + skip)
    return out.to(x.dtype)


class _WithGradientOf(torch.autograd.Function):
    """The first tensor, whose gradient goes to the second."""

    generate_vmap_rule = True

    @staticmethod
    def forward(out, terms):
        return out.view_as(out)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return None, grad


# -- kernels --------------------------------------------------------------------------------------


# Output pixels by output channels are a product of matrices: a program owns a tile of it. One loop passes
# over the channels of both images, so that its pipeline is filled once.
@triton.jit
def _residual_conv1x1_kernel(
    x, skip, second, weight, x_bias, skip_bias, out, pixels, scale,
    FIRST: tl.constexpr, CHANNELS: tl.constexpr, OUT: tl.constexpr, UP_FROM: tl.constexpr,
    HAS_X_BIAS: tl.constexpr, HAS_SKIP_BIAS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """All in channels_last. FIRST of the CHANNELS that are multiplied are of `skip`, the others of `second`;
    UP_FROM: the width of these where it is half of the output's, else 0."""
    TILES: tl.constexpr = (OUT + WIDTH - 1) // WIDTH
    REST: tl.constexpr = CHANNELS - FIRST
    BLOCKS: tl.constexpr = (FIRST + DEPTH - 1) // DEPTH
    first = (tl.program_id(0) // TILES).to(tl.int64) * PIXELS
    row = tl.arange(0, PIXELS)
    inside = (row < pixels - first)[:, None]
    n = tl.program_id(0) % TILES * WIDTH + tl.arange(0, WIDTH)
    source = first
    from_row = row
    if UP_FROM > 0:
        p = first + row
        low = p // (4 * UP_FROM) * UP_FROM + p % (2 * UP_FROM) // 2
        source = first // (4 * UP_FROM) * UP_FROM
        from_row = (low - source).to(tl.int32)
    skip += source * FIRST
    second += source * REST
    sums = tl.zeros([PIXELS, WIDTH], tl.float32)
    for i in tl.range(BLOCKS + (REST + DEPTH - 1) // DEPTH):
        c = i * DEPTH
        image = skip
        before = 0
        length = FIRST
        if REST > 0:
            is_second = i >= BLOCKS
            c = tl.where(is_second, c - BLOCKS * DEPTH, c)
            image = tl.where(is_second, second, skip)
            before = tl.where(is_second, FIRST, 0)
            length = tl.where(is_second, REST, FIRST)
        c += tl.arange(0, DEPTH)
        has = c < length
        v = tl.load(
            image + ((from_row * length)[:, None] + c[None, :]), mask=inside & has[None, :], other=0
        )
        w = tl.load(
            weight + (n[None, :] * CHANNELS + (before + c)[:, None]),
            mask=has[:, None] & (n < OUT)[None, :],
            other=0,
        )
        sums = _dot(v, w, sums, PRECISION)
    at = (row * OUT)[:, None] + n[None, :]
    inside &= (n < OUT)[None, :]
    sums += tl.load(x + first * OUT + at, mask=inside, other=0).to(tl.float32)
    b = tl.zeros([WIDTH], tl.float32)
    if HAS_X_BIAS:
        b += tl.load(x_bias + n, mask=n < OUT, other=0).to(tl.float32)
    if HAS_SKIP_BIAS:
        b += tl.load(skip_bias + n, mask=n < OUT, other=0).to(tl.float32)
    sums = (sums + b[None, :]) * scale
    tl.store(out + first * OUT + at, sums.to(out.dtype.element_ty), mask=inside)


# -- launchers ------------------------------------------------------------------------------------


def _tiles(pixels, out_channels, itemsize, precision):
    """Constants with warps and stages, and the number of programs. Three stages of two tiles of 128 rows of
    128 bytes are 96 KB, which every GPU from sm_80 on has. fp32 products are of three parts, whose registers
    leave room for half as many channels. Reasoned, not measured."""
    width = min(max(power_of_2(out_channels), 16), 256 // itemsize)
    rows = 128 if -(-pixels // 128) * -(-out_channels // width) >= 128 else 64
    constants = dict(
        PIXELS=rows, WIDTH=width, DEPTH=128 // itemsize, PRECISION=precision,
        num_warps=8 if rows * width > 64 * 64 else 4, num_stages=3,
    )  # fmt: skip
    return constants, -(-pixels // rows) * -(-out_channels // width)


def _precision(dtype, parts):
    """Of products in fp32: as convolutions have it, or in three parts of the tensor cores' 19 bits. One
    compiled form in 16 bits, where it says nothing."""
    if interpreting():
        return "wide"
    is_short = dtype == torch.float32 and parts is None and _convolutions_have_tf32()
    return "tf32" if is_short else "tf32x3"


def _convolutions_have_tf32():
    conv = getattr(
        torch.backends.cudnn, "conv", None
    )  # reading allow_tf32 fails where this one was set
    return torch.backends.cudnn.allow_tf32 if conv is None else conv.fp32_precision == "tf32"


def _last(x):
    return x if x is None else x.contiguous(memory_format=torch.channels_last)


def _fwd(x, skip, second, weight, scale, x_bias, skip_bias, up, of_terms, parts=None):
    if not _takes(x):
        return _fwd_by_reference(x, skip, second, weight, scale, x_bias, skip_bias, up, of_terms)
    x, skip, second, weight = map(_last, (x, skip, second, weight))
    n, c, h, w = x.shape
    out = empty(x, x.shape, torch.channels_last)
    constants, programs = _tiles(n * h * w, c, x.itemsize, _precision(x.dtype, parts))
    biases = [None if b is None else of_channels(b).contiguous() for b in (x_bias, skip_bias)]
    launch(
        _residual_conv1x1_kernel, (programs,), x, skip, *given(x, second), weight,
        *given(x, *biases), out, n * h * w, scale, FIRST=skip.shape[1], CHANNELS=weight.shape[1], OUT=c,
        UP_FROM=skip.shape[3] if up else 0, HAS_X_BIAS=x_bias is not None,
        HAS_SKIP_BIAS=skip_bias is not None,
        **constants,
    )  # fmt: skip
    return out


# Resolution of the sum, its channels, those of the two that are multiplied, whether at half the resolution.
_SITES = (
    (32, 256, 256, 256, False), (32, 256, 256, 128, False), (32, 256, 128, 0, False),
    (32, 256, 256, 0, True), (16, 256, 256, 256, False), (16, 256, 256, 0, False), (8, 256, 256, 256, False),
    (64, 192, 384, 192, False), (32, 384, 576, 384, False), (8, 768, 768, 0, False),
)  # fmt: skip


def specialisations(capability: int) -> list[Variant]:
    """Forms in which DDPM++ on CIFAR-10 and ADM at 64 x 64 use the kernel."""
    variants = []
    for (size, c, first, rest, up), (dtype, name) in product(_SITES, DTYPES.items()):
        precision = "tf32x3"
        constants, programs = _tiles(64 * size * size, c, dtype.itemsize, precision)
        warps, stages = constants.pop("num_warps"), constants.pop("num_stages")
        shape = dict(
            FIRST=first, CHANNELS=first + rest, OUT=c, UP_FROM=size // 2 if up else 0, HAS_X_BIAS=True,
            HAS_SKIP_BIAS=first != c or rest > 0 or up,
        )  # fmt: skip
        pointers = dict.fromkeys(("x", "skip", "second", "weight", "out"), f"*{name}")
        pointers |= {"x_bias": "*fp32", "skip_bias": "*fp32", "pixels": "i32", "scale": "fp32"}
        site = f"{size}x{size} {first}{f'+{rest}' if rest else ''}->{c}{' up' if up else ''} {name}"
        variants.append(
            Variant(site, _residual_conv1x1_kernel, pointers, shape | constants, num_warps=warps,
                    num_stages=stages, aligned=frozenset({"pixels"}), programs=programs)
        )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(x, skip, second, weight, scale, x_bias, skip_bias, up, of_terms, parts=None):
    out = residual_conv1x1_reference(
        x, skip, weight, scale, x_bias, skip_bias, second=second, up=up, of_terms=of_terms
    )
    return out.contiguous(memory_format=_layout(x))


def _takes(x):
    """Whether the kernel takes x."""
    return x.dtype != torch.float64 and runs_triton("residual_conv1x1", x.device.type)


def _layout(x):
    """channels_last where the kernel runs, else x's own."""
    return torch.channels_last if _takes(x) else layout_of(x)


def _save(ctx, inputs, output):
    _, skip, second, weight, ctx.scale, x_bias, skip_bias, ctx.up, ctx.of_terms, parts = inputs
    note_biases(ctx, x_bias, skip_bias)
    ctx.save_for_backward(skip, second, weight, parts)


def _by_pixel(x):
    """[N,C,H,W] as a matrix [N·H·W, C], without a copy where x is channels_last."""
    return x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _product(a, b, scale):
    """a @ b · scale, rounded once."""
    return a @ b if scale == 1 else torch.addmm(a.new_empty(()), a, b, beta=0, alpha=scale)


def _images_bwd(grad, weight, scale, parts):
    """The gradient of both images side by side [N,C+C2,H,W]."""
    if parts is not None:
        return torch.ops.tcm_fast.conv_bf16x3_input_bwd(grad, parts, 1)
    n, _, h, w = grad.shape
    both = _product(_by_pixel(grad), weight.flatten(1), scale)
    return both.view(n, h, w, weight.shape[1]).permute(0, 3, 1, 2)


def _weight_bwd(grad, image, scale, parts):
    """The gradient of an image's columns of the weight [K,C,1,1]."""
    if parts is not None:
        return torch.ops.tcm_fast.conv_bf16x3_weight_bwd(grad, image, 1)
    return _product(_by_pixel(grad).t(), _by_pixel(image), scale)[..., None, None]


def _backward(ctx, grad):
    """Products of matrices that are a library's, or with `parts` those of `conv_bf16x3`. Both images'
    gradients are slices of one."""
    skip, second, weight, parts = ctx.saved_tensors
    wants_x, wants_skip, wants_second, wants_weight, _, *wants_biases = ctx.needs_input_grad[:7]
    scale = 1.0 if ctx.of_terms else ctx.scale
    grad = grad.contiguous(memory_format=_layout(grad))
    grad_x = grad if scale == 1 else grad * scale
    low, rest = (grad, scale) if parts is None else (grad_x, 1.0)
    if ctx.up:
        low = torch.ops.aten.upsample_nearest2d_backward(
            low, list(grad.shape[2:]), list(grad.shape[:2]) + list(skip.shape[2:]), 2.0, 2.0
        )
    images = [v for v in (skip, second) if v is not None]
    grads: list[torch.Tensor | None] = [None, None]
    if wants_skip or wants_second:
        both = _images_bwd(low, weight, rest, parts)
        grads = [*both.split([v.shape[1] for v in images], 1), None][:2]
    grad_weight = None
    if wants_weight:
        found = [_weight_bwd(low, v, rest, parts) for v in images]
        grad_weight = torch.cat(found, 1) if second is not None else found[0]
    biases: list[torch.Tensor | None] = [None, None]
    if any(wants_biases) and not ctx.of_terms:
        sums = grad.sum((2, 3), dtype=torch.promote_types(grad.dtype, torch.float32)) * scale
        biases = of_biases(ctx, sums, wants_biases)
    return grad_x if wants_x else None, *grads, grad_weight, None, *biases, None, None, None


register(
    "residual_conv1x1_fwd(Tensor x, Tensor skip, Tensor? second, Tensor weight, float scale, Tensor? x_bias, "
    "Tensor? skip_bias, bool up, bool of_terms, Tensor? parts=None) -> Tensor",
    _fwd, _fwd_by_reference, lambda x, *_: empty(x, x.shape, _layout(x)), save=_save, backward=_backward,
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def residual_conv1x1(
    x: torch.Tensor,
    skip: torch.Tensor,
    weight: torch.Tensor,
    scale: float = 1.0,
    x_bias: torch.Tensor | None = None,
    skip_bias: torch.Tensor | None = None,
    *,
    second: torch.Tensor | None = None,
    up: bool = False,
    of_terms: bool = False,
    parts: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x + x_bias + conv1x1([skip, second]) + skip_bias) · scale.

    Its kernel has not been timed on a GPU: it has run in emulation only.

    Args:
        x: activations [N,K,H,W] of a floating dtype; what is not channels_last is copied where a kernel runs.
        skip: [N,C,H,W] in x's dtype, or [N,C,H/2,W/2] with `up`.
        weight: of the convolution, [K,C+C2,1,1] in x's dtype.
        scale: factor of the sum.
        x_bias, skip_bias: that the convolution before x has left out, and of this one, as `residual` takes
            them.
        second: [N,C2,...] of the same resolution as skip, joined to it along the channels; nothing writes the
            two side by side.
        up: every pixel of the convolution's result four times.
        of_terms: leave to whoever reads the result that its gradient is multiplied by `scale` and that the
            biases get theirs. Only `group_norm_silu(summed=True)` and `residual.of_its_terms` do: read
            otherwise, gradients are wrong.
        parts: `conv_bf16x3.split_weight(weight)` of an fp32 weight: the products of the backward pass are
            then that operation's, where the kernel runs.

    Returns:
        [N,K,H,W] in x's dtype; channels_last where a kernel runs, else in x's memory format. Sums and what
        is between are fp32 (float64 for float64); products of fp32 are those of fp32 to 2^-20 of their
        magnitude, or those of TF32 where convolutions may have it and no `parts` are given. (Those of
        the backward pass are TF32's where `torch.backends.cuda.matmul` has it.)

    Raises:
        TypeError: not floating, or dtypes that differ. ValueError: shapes or devices that do not fit.
    """
    check_image("residual_conv1x1", x)
    n, k, h, w = x.shape
    if up and (h % 2 or w % 2):
        raise ValueError(
            f"residual_conv1x1: x must have an even height and width with up, got {h}x{w}"
        )
    size = [h // 2, w // 2] if up else [h, w]
    images = {"skip": skip} if second is None else {"skip": skip, "second": second}
    for name, image in images.items():
        if image.ndim != 4 or [image.shape[0], *image.shape[2:]] != [n, *size]:
            raise ValueError(
                f"residual_conv1x1: {name} must be [{n},C,{size[0]},{size[1]}], got {list(image.shape)}"
            )
    channels = sum(image.shape[1] for image in images.values())
    if weight.shape != (k, channels, 1, 1):
        raise ValueError(
            f"residual_conv1x1: weight must be [{k},{channels},1,1], got {list(weight.shape)}"
        )
    if 0 in weight.shape:
        raise ValueError(
            f"residual_conv1x1: weight must have channels on both sides, got {list(weight.shape)}"
        )
    for name, tensor in (images | {"weight": weight}).items():
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"residual_conv1x1: {name} must be of x's dtype {x.dtype}, got {tensor.dtype}"
            )
        if tensor.device != x.device:
            raise ValueError(f"residual_conv1x1: {name} must be on {x.device}, got {tensor.device}")
    if parts is not None and (
        (parts.shape, parts.dtype, parts.device) != ((2, k, channels), torch.bfloat16, x.device)
        or x.dtype != torch.float32
    ):
        raise ValueError(
            f"residual_conv1x1: parts must be split_weight's of an fp32 weight, [2,{k},{channels}] of bf16 "
            f"on {x.device}, got {list(parts.shape)} of {parts.dtype} on {parts.device} with {x.dtype}"
        )
    check_sum("residual_conv1x1", x, x, x_bias=x_bias, skip_bias=skip_bias)
    of_terms = of_terms and forward_ad._current_level < 0  # tangents are the result's own
    function = torch.ops.tcm_fast.residual_conv1x1_fwd if _takes(x) else _fwd_by_reference
    return function(x, skip, second, weight, scale, x_bias, skip_bias, up, of_terms, parts)
