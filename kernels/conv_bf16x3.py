"""fp32 convolutions on tensor cores: each operand is the sum of two bf16 numbers, and three products of these
take the place of one (Henry, Tang and Heinecke, 2019, https://arxiv.org/abs/1904.06376). Executed in
emulation, not yet timed on a GPU.
"""

from __future__ import annotations

import torch

from tcm_fast.kernels._common import check_image, empty, layout_of, power_of_2, register
from tcm_fast.kernels._triton import Variant, interpreting, launch, runs_triton, tl, triton
from tcm_fast.kernels.qkv_attention import _capability

# -- reference ------------------------------------------------------------------------------------


def split_reference(x):
    """fp32 x as hi + lo, both numbers of bf16, as fp32: hi is x to the nearest (ties away from zero), lo the
    nearest to the rest."""
    hi = ((x.view(torch.int32) + 0x8000) & -0x10000).view(torch.float32)
    return hi, (x - hi).bfloat16().float()


def _wide(parts, size):
    """The parts [2,K,R·R·C] of a weight as two fp32 weights [K,C,R,R]."""
    return parts.float().unflatten(2, (size, size, -1)).permute(0, 1, 4, 2, 3).unbind()


def _three(product, a, b):
    """hi·hi + hi·lo + lo·hi of two operands, the smallest first."""
    (a_hi, a_lo), (b_hi, b_lo) = a, b
    return product(a_lo, b_hi) + product(a_hi, b_lo) + product(a_hi, b_hi)


def conv_bf16x3_reference(x, parts, size, bias=None):
    def product(a, b):
        return torch.conv2d(a, b, padding=b.shape[-1] // 2)

    out = _three(product, split_reference(x), _wide(parts, size))
    return out if bias is None else out + bias[:, None, None]


def _backward_reference(grad_out, x, weight, mask):
    padding = weight.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        grad_out, x, weight, None, [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, mask
    )


def input_bwd_reference(grad_out, parts, size):
    n, _, h, w = grad_out.shape
    x = grad_out.new_empty(
        (n, parts.shape[2] // size**2, h, w)
    )  # its shape is all that is asked for

    def product(g, weight):
        return _backward_reference(g, x, weight, [True, False, False])[0]

    return _three(product, split_reference(grad_out), _wide(parts, size))


def weight_bwd_reference(grad_out, x, size):
    weight = x.new_empty((grad_out.shape[1], x.shape[1], size, size))

    def product(g, x):
        return _backward_reference(g, x, weight, [False, True, False])[1]

    return _three(product, split_reference(grad_out), split_reference(x))


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def _split(v):
    """fp32 as hi + lo in bf16. By whole numbers: conversions run on a slower unit."""
    high = (v.to(tl.uint32, bitcast=True) + 0x8000) & 0xFFFF0000
    hi = (high >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return hi, (v - high.to(tl.float32, bitcast=True)).to(tl.bfloat16)


@triton.jit
def _dot(a, b, sum, WIDE: tl.constexpr):
    if WIDE:  # the interpreter multiplies the bits of bf16; in fp32 the products are exact
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    else:
        return tl.dot(a, b, sum)


# Output pixels by output channels are a matrix product over taps and input channels: a program owns a tile
# of it. The gradient to the input is the same with the taps in reverse and the weight's channels exchanged.
@triton.jit
def _conv_bf16x3_kernel(
    x, parts, bias, out, pixels,
    IN: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    IS_GRADIENT: tl.constexpr, HAS_BIAS: tl.constexpr, PIXELS: tl.constexpr, WIDTH: tl.constexpr,
    DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """x [pixels, IN] -> out [pixels, OUT]; parts [2, OUT, TAPS, IN], or of IS_GRADIENT [2, IN, TAPS, OUT]."""
    tiles: tl.constexpr = (OUT + WIDTH - 1) // WIDTH
    blocks: tl.constexpr = (IN + DEPTH - 1) // DEPTH
    first = tl.program_id(0) // tiles * PIXELS
    row = tl.arange(0, PIXELS)
    p = first + row
    h = p // W % H
    w = p % W
    n = tl.program_id(0) % tiles * WIDTH + tl.arange(0, WIDTH)
    x += first.to(tl.int64) * IN
    out += first.to(tl.int64) * OUT
    sums = tl.zeros([PIXELS, WIDTH], tl.float32)
    for i in tl.range(TAPS * blocks):
        tap = i // blocks
        c = i % blocks * DEPTH + tl.arange(0, DEPTH)
        inside = p < pixels
        shift = 0
        if TAPS == 9:
            dh = tap // 3 - 1
            dw = tap % 3 - 1
            shift = dh * W + dw
            inside &= (h + dh >= 0) & (h + dh < H) & (w + dw >= 0) & (w + dw < W)
        at = ((row + shift) * IN)[:, None] + c[None, :]
        v = tl.load(x + at, mask=inside[:, None] & (c < IN)[None, :], other=0)
        if IS_GRADIENT:
            of = c[:, None] * (TAPS * OUT) + (TAPS - 1 - tap) * OUT + n[None, :]
        else:
            of = n[None, :] * (TAPS * IN) + tap * IN + c[:, None]
        within = (c < IN)[:, None] & (n < OUT)[None, :]
        w_hi = tl.load(parts + of, mask=within, other=0)
        w_lo = tl.load(parts + IN * OUT * TAPS + of, mask=within, other=0)
        hi, lo = _split(v)
        sums = _dot(lo, w_hi, sums, WIDE)
        sums = _dot(hi, w_lo, sums, WIDE)
        sums = _dot(hi, w_hi, sums, WIDE)
    if HAS_BIAS:
        sums += tl.load(bias + n, mask=n < OUT, other=0)[None, :]
    to = (row * OUT)[:, None] + n[None, :]
    tl.store(out + to, sums, mask=(p < pixels)[:, None] & (n < OUT)[None, :])


# A program owns a tile of output by input channels at one tap, and sums over a piece of the pixels.
@triton.jit(do_not_specialize=["steps"])
def _conv_bf16x3_weight_kernel(
    grad_out, x, sums, pixels, steps,
    IN: tl.constexpr, OUT: tl.constexpr, H: tl.constexpr, W: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, DEPTH: tl.constexpr, WIDE: tl.constexpr,
):  # fmt: skip
    """grad_out [pixels, OUT], x [pixels, IN] -> sums [pieces, OUT, TAPS, IN]; a piece has steps · DEPTH."""
    tiles: tl.constexpr = (IN + WIDTH - 1) // WIDTH
    tile = tl.program_id(0)
    n = tile % tiles * WIDTH + tl.arange(0, WIDTH)
    tap = tile // tiles % TAPS
    m = tile // (tiles * TAPS) * ROWS + tl.arange(0, ROWS)
    first = tl.program_id(1) * steps * DEPTH
    grad_out += first.to(tl.int64) * OUT
    x += first.to(tl.int64) * IN
    dh = 0
    dw = 0
    if TAPS == 9:
        dh = tap // 3 - 1
        dw = tap % 3 - 1
    sums += tl.program_id(1).to(tl.int64) * (IN * OUT * TAPS)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.range(steps):
        row = i * DEPTH + tl.arange(0, DEPTH)
        p = first + row
        inside = p < pixels
        at = (row * OUT)[None, :] + m[:, None]
        g = tl.load(grad_out + at, mask=inside[None, :] & (m < OUT)[:, None], other=0)
        if TAPS == 9:
            h = p // W % H + dh
            w = p % W + dw
            inside &= (h >= 0) & (h < H) & (w >= 0) & (w < W)
        at = ((row + dh * W + dw) * IN)[:, None] + n[None, :]
        v = tl.load(x + at, mask=inside[:, None] & (n < IN)[None, :], other=0)
        g_hi, g_lo = _split(g)
        hi, lo = _split(v)
        total = _dot(g_lo, hi, total, WIDE)
        total = _dot(g_hi, lo, total, WIDE)
        total = _dot(g_hi, hi, total, WIDE)
    to = (m * (TAPS * IN) + tap * IN)[:, None] + n[None, :]
    tl.store(sums + to, total, mask=(m < OUT)[:, None] & (n < IN)[None, :])


@triton.jit(do_not_specialize=["pieces"])
def _conv_bf16x3_sum_kernel(sums, out, pieces, SIZE: tl.constexpr, TILE: tl.constexpr):
    """sums [pieces, SIZE] -> out [SIZE], in one order."""
    i = tl.program_id(0) * TILE + tl.arange(0, TILE)
    total = tl.zeros([TILE], tl.float32)
    at = sums + i
    for _ in tl.range(pieces):
        total += tl.load(at, mask=i < SIZE, other=0)
        at += SIZE
    tl.store(out + i, total, mask=i < SIZE)


# -- launchers ------------------------------------------------------------------------------------

STAGES = {80: 4, 90: 4, 100: 4}  # of the loop's pipeline; the others have 99 KB a program
PROGRAMS = 512  # that a gradient to the weight is cut into at least
FEWEST_STEPS = 16  # of one of them


def _width(channels, most=128):
    """Channels of a tile: 128, or 64 where that leaves less of the last tile empty."""
    if channels > 128 and 0 < channels % 128 <= 64:
        most = 64
    return min(max(power_of_2(channels), 16), most)


def _image_tiles(pixels, channels_in, channels_out, capability):
    """Constants, warps, stages and programs of a convolution. The order of sums depends on DEPTH alone."""
    depth = 16 if channels_in <= 16 else 32
    width = _width(channels_out, 4 * depth)
    slabs = -(-channels_out // width)
    rows = 128 if -(-pixels // 128) * slabs >= 128 else 64
    constants = {"PIXELS": rows, "WIDTH": width, "DEPTH": depth}
    warps = 8 if rows * width > 64 * 64 and depth == 32 else 4
    return constants, warps, STAGES.get(capability, 3), -(-pixels // rows) * slabs


def _weight_tiles(pixels, channels_in, channels_out, taps, capability):
    """Constants, warps, stages, tiles, steps and pieces of a gradient to the weight."""
    rows, width, depth = _width(channels_out), _width(channels_in), 32
    tiles = -(-channels_out // rows) * -(-channels_in // width) * taps
    all_steps = -(-pixels // depth)
    # Offsets within a piece have 32 bits.
    fewest = max(1, -(-pixels * max(channels_in, channels_out) // 2**30))
    pieces = max(fewest, min(PROGRAMS // tiles, all_steps // FEWEST_STEPS))
    steps = -(-all_steps // pieces)
    pieces = -(-all_steps // steps) if steps else 0  # none without pixels
    warps = 8 if rows * width > 64 * 64 else 4
    constants = {"ROWS": rows, "WIDTH": width, "DEPTH": depth}
    return constants, warps, STAGES.get(capability, 3), tiles, steps, pieces


def _shape_constants(channels_in, channels_out, h, w, taps):
    return {"IN": channels_in, "OUT": channels_out, "H": h, "W": w, "TAPS": taps}


def _launch_image(x, parts, size, bias, is_gradient):
    x = x.contiguous(memory_format=torch.channels_last)
    n, c, h, w = x.shape
    taps = size**2
    k = parts.shape[2] // taps if is_gradient else parts.shape[1]
    out = empty(x, (n, k, h, w), torch.channels_last)
    tiles, warps, stages, programs = _image_tiles(n * h * w, c, k, _capability(x.device))
    launch(
        _conv_bf16x3_kernel, (programs,), x, parts, x if bias is None else bias.contiguous(), out, n * h * w,
        **_shape_constants(c, k, h, w, taps), IS_GRADIENT=is_gradient, HAS_BIAS=bias is not None, **tiles,
        WIDE=interpreting(), num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out


def _fwd(x, weight, bias, parts):
    if not _runs_kernels(x):
        return _fwd_by_reference(x, weight, bias, parts)
    return _launch_image(x, parts, weight.shape[-1], bias, False)


def _input_bwd(grad_out, parts, size):
    if not _runs_kernels(grad_out):
        return _input_bwd_by_reference(grad_out, parts, size)
    return _launch_image(grad_out, parts, size, None, True)


def _weight_bwd(grad_out, x, size):
    if not _runs_kernels(x):
        return _weight_bwd_by_reference(grad_out, x, size)
    grad_out, x = (v.contiguous(memory_format=torch.channels_last) for v in (grad_out, x))
    n, c, h, w = x.shape
    k, pixels = grad_out.shape[1], n * h * w
    tiles, warps, stages, programs, steps, pieces = _weight_tiles(
        pixels, c, k, size**2, _capability(x.device)
    )
    sums = x.new_empty((pieces, k, size, size, c))
    launch(
        _conv_bf16x3_weight_kernel, (programs, pieces), grad_out, x, sums, pixels, steps,
        **_shape_constants(c, k, h, w, size**2), **tiles, WIDE=interpreting(),
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    if pieces == 1:
        return sums[0].permute(0, 3, 1, 2)
    grad = x.new_empty((k, size, size, c))
    launch(
        _conv_bf16x3_sum_kernel, (-(-grad.numel() // 1024),), sums, grad, pieces,
        SIZE=grad.numel(), TILE=1024, num_warps=4,
    )  # fmt: skip
    return grad.permute(0, 3, 1, 2)


# Resolution, input and output channels, taps: DDPM++ on CIFAR-10.
_SITES = (
    (32, 256, 256, 9), (16, 512, 256, 9), (8, 256, 256, 9), (32, 3, 128, 9), (32, 256, 3, 9),
    (32, 384, 256, 1), (16, 256, 768, 1),
)  # fmt: skip
_BATCH = 128


def specialisations(capability: int) -> list[Variant]:
    """The forms that DDPM++ uses on CIFAR-10 at a batch of 128: one site of each class of shapes."""
    image = {"x": "*fp32", "parts": "*bf16", "bias": "*fp32", "out": "*fp32", "pixels": "i32"}
    weight = {"grad_out": "*fp32", "x": "*fp32", "sums": "*fp32", "pixels": "i32", "steps": "i32"}
    variants = []
    for size, c, k, taps in _SITES:
        pixels = _BATCH * size**2
        for channels, name in (((c, k), ""), ((k, c), " grad_x")):
            tiles, warps, stages, programs = _image_tiles(pixels, *channels, capability)
            shape = _shape_constants(*channels, size, size, taps)
            own = {"IS_GRADIENT": bool(name), "HAS_BIAS": not name, "WIDE": False}
            variants.append(
                Variant(
                    f"DDPM++ {size}x{size} {c}->{k} {taps} taps{name}", _conv_bf16x3_kernel, image,
                    shape | own | tiles, warps, stages, aligned=frozenset({"pixels"}), programs=programs,
                )
            )  # fmt: skip
        tiles, warps, stages, programs, _, pieces = _weight_tiles(pixels, c, k, taps, capability)
        shape = _shape_constants(c, k, size, size, taps) | {"WIDE": False}
        variants.append(
            Variant(
                f"DDPM++ {size}x{size} {c}->{k} {taps} taps grad_weight", _conv_bf16x3_weight_kernel,
                weight, shape | tiles, warps, stages, aligned=frozenset({"pixels"}),
                programs=programs * pieces,
            )
        )  # fmt: skip
    sums = {"sums": "*fp32", "out": "*fp32", "pieces": "i32"}
    constants = {"SIZE": 256 * 256 * 9, "TILE": 1024}
    variants.append(
        Variant(
            "DDPM++ 256->256 9 taps sum", _conv_bf16x3_sum_kernel, sums, constants, programs=576
        )
    )
    return variants


# -- registration ---------------------------------------------------------------------------------


def _runs_kernels(x):
    """Whether the kernels take x: tensor cores multiply bf16 from Ampere on."""
    return runs_triton("conv_bf16x3", x.device.type) and _capability(x.device) >= 80


def _layout(x):
    """channels_last where kernels run, else x's own."""
    is_kernel = runs_triton("conv_bf16x3", x.device.type)
    return torch.channels_last if is_kernel else layout_of(x)


def _fwd_by_reference(x, weight, bias, parts):
    out = conv_bf16x3_reference(x, parts, weight.shape[-1], bias)
    return out.contiguous(memory_format=_layout(x))


def _input_bwd_by_reference(grad_out, parts, size):
    grad_x = input_bwd_reference(grad_out, parts, size)
    return grad_x.contiguous(memory_format=_layout(grad_out))


def _weight_bwd_by_reference(grad_out, x, size):
    grad = weight_bwd_reference(grad_out, x, size)
    return grad.contiguous(memory_format=torch.channels_last)


def _fake_image(x, channels):
    n, _, h, w = x.shape
    return empty(x, (n, channels, h, w), _layout(x))


def _fake_weight(grad_out, x, size):
    shape = (grad_out.shape[1], x.shape[1], size, size)
    return empty(x, shape, torch.channels_last)


def _save(ctx, inputs, output):
    x, weight, _, parts = inputs
    ctx.size = weight.shape[-1]
    ctx.save_for_backward(x if weight.requires_grad else None, parts)


def _backward(ctx, grad_out):
    x, parts = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
    ops = torch.ops.tcm_fast
    return (
        ops.conv_bf16x3_input_bwd(grad_out, parts, ctx.size) if wants_x else None,
        ops.conv_bf16x3_weight_bwd(grad_out, x, ctx.size) if wants_weight else None,
        grad_out.sum((0, 2, 3)) if wants_bias else None,
        None,
    )


register(
    "conv_bf16x3_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor parts) -> Tensor",
    _fwd, _fwd_by_reference, lambda x, weight, *_: _fake_image(x, weight.shape[0]),
    save=_save, backward=_backward,
)  # fmt: skip
register(
    "conv_bf16x3_input_bwd(Tensor grad_out, Tensor parts, SymInt size) -> Tensor",
    _input_bwd, _input_bwd_by_reference,
    lambda grad, parts, size: _fake_image(grad, parts.shape[2] // size**2),
)  # fmt: skip
register(
    "conv_bf16x3_weight_bwd(Tensor grad_out, Tensor x, SymInt size) -> Tensor",
    _weight_bwd, _weight_bwd_by_reference, _fake_weight,
)  # fmt: skip


# -- public functions -----------------------------------------------------------------------------


@torch.no_grad()
def split_weight(weight: torch.Tensor) -> torch.Tensor:
    """The two bf16 parts of a convolution's weight [K,C,R,R], hi and lo: [2,K,R·R·C]."""
    k, c, *size = weight.shape
    parts = weight.new_empty((2, k, *size, c), dtype=torch.bfloat16)
    last = weight.detach().permute(0, 2, 3, 1)
    parts[0].copy_(last)
    torch.sub(last, parts[0], out=parts[1])
    return parts.flatten(2)


def conv_bf16x3(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    parts: torch.Tensor | None = None,
) -> torch.Tensor:
    """A "same" convolution of stride 1 in fp32, by three bf16 products hi·hi + hi·lo + lo·hi summed in fp32.

    Not yet timed on a GPU: its kernels have run in emulation only.

    Args:
        x: [N,C,H,W] fp32; what is not channels_last is copied where a kernel runs.
        weight: [K,C,3,3] or [K,C,1,1] fp32.
        bias: [K] fp32.
        parts: `split_weight(weight)` where it is known already; of another weight the result is that one's.

    Returns:
        [N,K,H,W] fp32; channels_last where a kernel runs, else in x's memory format. Each product is off by
        at most 2^-15 of its magnitude, and sums of 576 random ones by 2^-19 of the sum of magnitudes;
        numbers below 2^-117 in magnitude keep fewer digits. Where fp32 gives what is infinite or NaN it is
        NaN, as with numbers beyond 3.389e38. Gradients to x, weight and bias, equal bits in every run;
        none to parts, and no second derivative.

    Raises:
        TypeError: not fp32 (parts: bf16). ValueError: shapes or devices that do not fit, kernels other than
            3x3 and 1x1, groups, parts that want a gradient, nearly 2^31 pixels or more.
    """
    check_image("conv_bf16x3", x)
    given = (("x", x), ("weight", weight), ("bias", bias))
    for name, tensor in given:
        if tensor is not None and tensor.dtype != torch.float32:
            raise TypeError(f"conv_bf16x3: {name} must be fp32, got {tensor.dtype}")
    n, c, h, w = x.shape
    if weight.ndim != 4 or weight.shape[2:] not in ((1, 1), (3, 3)) or 0 in weight.shape:
        raise ValueError(
            f"conv_bf16x3: weight must be [K,{c},3,3] or [K,{c},1,1], got {list(weight.shape)}"
        )
    if weight.shape[1] != c:
        raise ValueError(
            f"conv_bf16x3: weight must have the {c} input channels of x (no groups), got {weight.shape[1]}"
        )
    k, size = weight.shape[0], weight.shape[-1]
    if bias is not None and bias.shape != (k,):
        raise ValueError(f"conv_bf16x3: bias must be [{k}], got {list(bias.shape)}")
    if n * h * w > 2**31 - 2**16:
        raise ValueError(f"conv_bf16x3: x must have at most 2^31 - 2^16 pixels, got {n * h * w}")
    if parts is None:
        parts = split_weight(weight)
    if parts.dtype != torch.bfloat16:
        raise TypeError(f"conv_bf16x3: parts must be bf16, got {parts.dtype}")
    if parts.shape != (2, k, size**2 * c) or not parts.is_contiguous() or parts.requires_grad:
        raise ValueError(
            f"conv_bf16x3: parts must be split_weight's of the weight, [2,{k},{size**2 * c}] without "
            f"a gradient, got {list(parts.shape)}"
        )
    for name, tensor in (*given, ("parts", parts)):
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"conv_bf16x3: {name} must be on {x.device}, got {tensor.device}")
    return torch.ops.tcm_fast.conv_bf16x3_fwd(x, weight, bias, parts)
