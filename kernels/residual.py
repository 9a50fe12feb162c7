"""The sum that ends a residual branch of DDPM++, NCSN++ and ADM: the convolution's bias, the skip
connection and their common factor in one pass (Karras et al. 2022, appendix C)."""

from __future__ import annotations

import math
from itertools import product

import torch

from tcm_fast.kernels._common import (
    DTYPES,
    TILE,
    address,
    dense_like,
    empty,
    fits_channels,
    forms,
    given,
    laid_out,
    layout_of,
    of_channels,
    register,
    tile_for,
)
from tcm_fast.kernels._triton import Variant, launch, runs_triton, tl, triton

# -- reference ------------------------------------------------------------------------------------


def residual_reference(x, skip, scale, bias=None, skip_bias=None):
    wide = torch.promote_types(x.dtype, torch.float32)
    out = x.to(wide) + skip.to(wide)
    for b in (bias, skip_bias):
        if b is not None:
            out = out + b.to(wide)[..., None, None]
    return out.mul_(scale).to(x.dtype) if scale != 1 else out.to(x.dtype)


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def _residual_fwd_kernel(
    x, skip, bias, skip_bias, out, pixels, scale,
    CHANNELS: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    PIECE: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SKIP_BIAS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    b = tl.zeros([WIDTH], tl.float32)
    if HAS_BIAS:
        b = tl.load(bias + c, mask=c < CHANNELS, other=0).to(tl.float32)
    if HAS_SKIP_BIAS:
        b += tl.load(skip_bias + c, mask=c < CHANNELS, other=0).to(tl.float32)
    for i in tl.range(PIECE):
        p = (tl.program_id(0).to(tl.int64) * PIECE + i) * PIXELS + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
        at = address(p, c, CHANNELS, HW, CHANNELS_LAST)
        v = tl.load(x + at, mask=inside, other=0).to(tl.float32)
        v += tl.load(skip + at, mask=inside, other=0).to(tl.float32)
        v = (v + b[None, :]) * scale
        tl.store(out + at, v.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _residual_bwd_kernel(
    grad_out, grad_x, grad_bias, pixels, scale,
    CHANNELS: tl.constexpr, HW: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    PIECE: tl.constexpr, CHANNELS_LAST: tl.constexpr, HAS_BIAS: tl.constexpr, WRITES: tl.constexpr,
    GRAD_ROW: tl.constexpr,
):  # fmt: skip
    """GRAD_ROW: elements from a pixel of grad_out to the next in channels_last, more than CHANNELS where
    grad_out is a slice of channels."""
    c = tl.program_id(1) * WIDTH + tl.arange(0, WIDTH)
    sums = tl.zeros([PIXELS, WIDTH], tl.float32)
    for i in tl.range(PIECE):
        p = (tl.program_id(0).to(tl.int64) * PIECE + i) * PIXELS + tl.arange(0, PIXELS)
        inside = (p < pixels)[:, None] & (c < CHANNELS)[None, :]
        at = address(p, c, CHANNELS, HW, CHANNELS_LAST)
        source = at
        if GRAD_ROW != CHANNELS:
            source = address(p, c, GRAD_ROW, HW, CHANNELS_LAST)
        grad = tl.load(grad_out + source, mask=inside, other=0).to(tl.float32) * scale
        if WRITES:
            tl.store(grad_x + at, grad.to(grad_x.dtype.element_ty), mask=inside)
        sums += grad
    if HAS_BIAS:
        row = tl.program_id(0).to(tl.int64) * CHANNELS
        tl.store(grad_bias + row + c, tl.sum(sums, 0), mask=c < CHANNELS)


# -- launchers ------------------------------------------------------------------------------------

PROGRAMS = 1024  # enough of them to fill any GPU


def _constants(shape, is_channels_last, has_bias):
    n, c, h, w = shape
    pixels, width = tile_for(c, n * h * w, widest=64)
    tiles, slabs = -(-n * h * w // pixels), -(-c // width)
    piece = max(1, min(tiles, tiles * slabs // PROGRAMS))
    piece = 1 << (piece.bit_length() - 1)  # few compiled forms, whatever the batch
    constants = dict(
        CHANNELS=c, HW=h * w, PIXELS=pixels, WIDTH=width, PIECE=piece,
        CHANNELS_LAST=is_channels_last, HAS_BIAS=has_bias, num_warps=4,
    )  # fmt: skip
    return constants, (-(-tiles // piece), slabs)


def _constants_by_sample(shape, is_channels_last):
    """A program has a sample's pixels, so that its sums are those of the sample."""
    n, c, h, w = shape
    constants, _ = _constants(shape, is_channels_last, True)
    width = min(constants["WIDTH"], 64 if n * -(-c // 64) >= PROGRAMS else 32)
    pixels = min(TILE // width, h * w & -(h * w))  # a power of two that divides them
    constants |= dict(PIXELS=pixels, WIDTH=width, PIECE=h * w // pixels)
    return constants, (n, -(-c // width))


def _fwd(x, skip, scale, bias, skip_bias):
    layout = layout_of(x)
    x, skip = laid_out(layout, x, skip)
    out = torch.empty_like(x)
    constants, grid = _constants(x.shape, layout == torch.channels_last, bias is not None)
    biases = [None if b is None else of_channels(b).contiguous() for b in (bias, skip_bias)]
    pixels = x.numel() // x.shape[1]
    launch(
        _residual_fwd_kernel, grid, x, skip, *given(x, *biases), out, pixels, scale, **constants,
        HAS_SKIP_BIAS=skip_bias is not None,
    )  # fmt: skip
    return out


def _row(x):
    """Elements from a pixel of x [N,C,H,W] to the next where it is a slice of a channels_last tensor's
    channels; 0 where it is not."""
    n, c, h, w = x.shape
    along = [(w, 1), (h, w), (n, h * w)]  # sizes, and pixels from one to the next
    strides = [(size, step, x.stride(i)) for (size, step), i in zip(along, (3, 2, 0), strict=True)]
    row = next((stride // step for size, step, stride in strides if size > 1), c)
    fits = all(size == 1 or stride == step * row for size, step, stride in strides)
    return row if fits and row >= c and (c == 1 or x.stride(1) == 1) else 0


def strided(x, layout):
    """x as a backward kernel reads it, and its pixels' distance in elements in channels_last."""
    row = _row(x) if layout == torch.channels_last else 0
    return (x, row) if row else (x.contiguous(memory_format=layout), x.shape[1])


def _launch_bwd(grad_out, scale, wants_bias, writes, by_sample):
    """The gradients of x, grad_out itself unless one is written, and of the bias, in fp32: [C], or [N,C]
    before the samples are summed."""
    layout = layout_of(grad_out)
    if writes:
        grad_out, row = strided(grad_out, layout)
        grad_x = empty(grad_out, grad_out.shape, layout)
    else:
        grad_x = grad_out = grad_out.contiguous(memory_format=layout)
        row = grad_out.shape[1]
    is_last = layout == torch.channels_last
    if by_sample and wants_bias and grad_out.numel() > 0:
        constants, grid = _constants_by_sample(grad_out.shape, is_last)
    else:
        constants, grid = _constants(grad_out.shape, is_last, wants_bias)
    n, c, h, w = grad_out.shape
    rows = grid[0] if wants_bias else 0
    sums = torch.empty((rows, c), dtype=torch.float32, device=grad_out.device)
    launch(
        _residual_bwd_kernel, grid, grad_out, grad_x, sums, n * h * w, scale, **constants, WRITES=writes,
        GRAD_ROW=row,
    )  # fmt: skip
    if by_sample:
        return grad_x, sums if wants_bias else sums.new_zeros((n, c))
    return grad_x, sums.sum(0)


def _bwd(grad_out, scale, wants_bias, by_sample=False):
    return _launch_bwd(grad_out, scale, wants_bias, True, by_sample)


def _bias_bwd(grad_out, by_sample=False):
    """Of a residual without a factor, grad_out dense: its gradient is grad_out, only the bias has one of its
    own."""
    return _launch_bwd(grad_out, 1.0, True, False, by_sample)[1]


# Resolution, width, factor; width of the concatenation whose gradient comes in.
_SITES = (
    (32, 256, 0.7071, 0), (64, 192, 1.0, 0), (8, 768, 1.0, 0), (32, 256, 0.7071, 512), (64, 192, 1.0, 384),
)  # fmt: skip


def specialisations(capability: int) -> list[Variant]:
    """Forms in which DDPM++ on CIFAR-10 and ADM at 64 x 64 use the kernels, in channels_last: backward with
    biases whose gradients stay by sample."""
    variants = []
    scalars = {"pixels": "i32", "scale": "fp32"}
    for (size, c, scale, row), dtype, has_bias in product(_SITES, DTYPES.values(), (True, False)):
        if not has_bias and row > 0:
            continue
        shape = 64, c, size, size
        of = f" of {row}" if row else ""
        site = f"{size}x{size}x{c}{of}{' bias' if has_bias else ''} {dtype}"
        if not row:
            constants, grid = _constants(shape, True, has_bias)
            pointers = dict.fromkeys(("x", "skip", "bias", "skip_bias", "out"), dtype)
            more = {"HAS_SKIP_BIAS": has_bias and size > 8}
            variants += forms(
                site, scalars, constants, (_residual_fwd_kernel, pointers, more),
                programs=math.prod(grid), aligned=("pixels",),
            )  # fmt: skip
        if scale == 1 and not has_bias:
            continue  # the gradient is what came in
        constants, grid = _constants(shape, True, has_bias)
        if has_bias:
            constants, grid = _constants_by_sample(shape, True)
        pointers = dict.fromkeys(("grad_out", "grad_x"), dtype) | {"grad_bias": "fp32"}
        more = {"WRITES": scale != 1 or row > 0, "GRAD_ROW": row or c}
        variants += forms(
            site, scalars, constants, (_residual_bwd_kernel, pointers, more),
            programs=math.prod(grid), aligned=("pixels",),
        )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(x, skip, scale, bias, skip_bias):
    return residual_reference(x, skip, scale, bias, skip_bias).contiguous(
        memory_format=layout_of(x)
    )


def _bwd_by_reference(grad_out, scale, wants_bias, by_sample=False):
    grad = grad_out.to(torch.float32) * scale
    grad_bias = grad.sum((2, 3) if by_sample else (0, 2, 3))
    grad_x = grad.to(grad_out.dtype).contiguous(memory_format=layout_of(grad_out))
    return grad_x, grad_bias


def _bias_bwd_by_reference(grad_out, by_sample=False):
    return grad_out.sum((2, 3) if by_sample else (0, 2, 3), dtype=torch.float32)


def _save(ctx, inputs, output):
    _, _, ctx.scale, *biases = inputs
    note_biases(ctx, *biases)


def _is_dense(x):
    return x.is_contiguous() or x.is_contiguous(memory_format=torch.channels_last)


def note_biases(ctx, *biases):
    """Keeps what `of_biases` goes by: a sum's biases' dtypes, and whether they are expanded to [N,C]."""
    ctx.bias_dtypes = [None if b is None else b.dtype for b in biases]
    ctx.by_sample = any(b is not None and b.ndim == 2 for b in biases)


def of_biases(ctx, sums, wanted):
    """The gradient that the biases share, for each that wants one in its own dtype, from a gradient's sums
    over the pixels, [N,C], or [C] over the samples too."""
    if any(wanted) and sums.ndim == 2 and not ctx.by_sample:
        sums = sums.sum(0)
    return [
        sums.to(dtype) if wants else None
        for wants, dtype in zip(wanted, ctx.bias_dtypes, strict=True)
    ]


def _backward(ctx, grad_out):
    wanted = ctx.needs_input_grad[3:]
    wants_bias = any(wanted)
    grad_x, grad_bias = grad_out, None
    if ctx.scale != 1 or not _is_dense(grad_out):
        grad_x, grad_bias = torch.ops.tcm_fast.residual_bwd(
            grad_out, ctx.scale, wants_bias, ctx.by_sample
        )
    elif wants_bias:
        grad_bias = torch.ops.tcm_fast.residual_bias_bwd(grad_out, ctx.by_sample)
    return grad_x, grad_x, None, *of_biases(ctx, grad_bias, wanted)


def _fake_bias(grad_out, by_sample=False):
    return grad_out.new_empty(grad_out.shape[0 if by_sample else 1 : 2], dtype=torch.float32)


class _DenseGradient(torch.autograd.Function):
    """x itself. Its gradient, a slice of channels where a concatenation comes next, is made dense once for
    all who read it: without a factor nothing else would before the convolution, which lays it out anew."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return grad.contiguous(memory_format=layout_of(grad))


class _OfItsTerms(torch.autograd.Function):
    """A sum itself, whose gradient goes on as that of its terms."""

    @staticmethod
    def forward(x, scale, *biases):
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        _save(ctx, (None, *inputs), output)

    @staticmethod
    def backward(ctx, grad):
        wanted = ctx.needs_input_grad[2:]
        if grad.dtype != torch.float64 and runs_triton("residual", grad.device.type):
            grad_x, sums = torch.ops.tcm_fast.residual_bwd(
                grad, ctx.scale, any(wanted), ctx.by_sample
            )
        else:
            grad_x = grad * ctx.scale
            wide = torch.promote_types(grad.dtype, torch.float32)
            sums = grad_x.sum((2, 3) if ctx.by_sample else (0, 2, 3), dtype=wide)
        return grad_x, None, *of_biases(ctx, sums, wanted)


_fwd = register(
    "residual_fwd(Tensor x, Tensor skip, float scale, Tensor? bias, Tensor? skip_bias) -> Tensor",
    _fwd, _fwd_by_reference, lambda x, *_: dense_like(x), save=_save, backward=_backward,
)  # fmt: skip
_bwd = register(
    "residual_bwd(Tensor grad_out, float scale, bool wants_bias, bool by_sample=False) -> (Tensor, Tensor)",
    _bwd, _bwd_by_reference, lambda grad, _, __, *more: (dense_like(grad), _fake_bias(grad, *more[:1])),
)  # fmt: skip
_bias_bwd = register(
    "residual_bias_bwd(Tensor grad_out, bool by_sample=False) -> Tensor",
    _bias_bwd, _bias_bwd_by_reference, _fake_bias,
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def check_sum(
    operation: str, x: torch.Tensor, skip: torch.Tensor, **biases: torch.Tensor | None
) -> None:
    """Refuses arguments of `residual` that do not fit, in `operation`'s name."""
    if not x.is_floating_point() or x.dtype != skip.dtype:
        raise TypeError(
            f"{operation}: x and skip must be of one floating dtype, got {x.dtype} and {skip.dtype}"
        )
    if x.ndim != 4:
        raise ValueError(f"{operation}: x must be [N,C,H,W], got {list(x.shape)}")
    if x.shape != skip.shape or x.device != skip.device:
        raise ValueError(
            f"{operation}: skip must be {list(x.shape)} on {x.device} like x, got {list(skip.shape)} on "
            f"{skip.device}"
        )
    n, c = x.shape[:2]
    found = {name: b for name, b in biases.items() if b is not None}
    dims = [b.ndim for b in found.values()]
    for name, b in found.items():
        if not fits_channels(b, n, c) or b.ndim != dims[0] or b.device != x.device:
            raise ValueError(
                f"{operation}: {name} must be [{c}] on {x.device}, or all biases expanded (stride 0) to "
                f"[{n},{c}], got {list(b.shape)} on {b.device}"
            )


def of_its_terms(
    x: torch.Tensor,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    skip_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """x [N,C,H,W], the result of `residual_conv1x1(of_terms=True)` with this scale and these biases, for any
    reader: its gradient is multiplied by the scale on its way back, and the biases get theirs.

    Raises:
        TypeError: not floating. ValueError: biases that do not fit.
    """
    check_sum("of_its_terms", x, x, bias=bias, skip_bias=skip_bias)
    return _OfItsTerms.apply(x, scale, bias, skip_bias)


def residual(
    x: torch.Tensor,
    skip: torch.Tensor,
    scale: float = 1.0,
    bias: torch.Tensor | None = None,
    skip_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """(x + bias + skip + skip_bias) · scale.

    Args:
        x, skip: activations [N,C,H,W] of one floating dtype, contiguous or channels_last.
        scale: factor of the sum.
        bias, skip_bias: that the convolutions before x and skip have left out, [C], any floating dtype.
            Expanded to [N,C], both, their gradients are not summed over the samples: `networks.by_sample`
            sums those of all layers at once.

    Returns:
        [N,C,H,W] in x's dtype and memory format; all in between is fp32 (float64 for float64). The
        gradients of x and skip are one tensor, those of the biases equal.

    Raises:
        TypeError: not floating, or dtypes that differ. ValueError: shapes or devices that do not fit.
    """
    check_sum("residual", x, skip, bias=bias, skip_bias=skip_bias)
    is_served = x.dtype != torch.float64 and x.shape[1] > 0
    if is_served and runs_triton("residual", x.device.type):
        return torch.ops.tcm_fast.residual_fwd(x, skip, scale, bias, skip_bias)
    out = residual_reference(x, skip, scale, bias, skip_bias)
    return _DenseGradient.apply(out) if scale == 1 and out.requires_grad else out
