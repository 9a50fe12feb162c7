"""Self-attention over the pixels of a feature map, from the q, k, v of a 1x1 convolution."""

import functools
import math

import torch
import torch.nn.functional as F

from tcm_fast.kernels._common import NORM_EPS, check_image, empty, laid_out, layout_of, register
from tcm_fast.kernels._triton import (
    VERSION,
    Variant,
    calls_directly,
    gradients,
    interpreting,
    launch,
    runs_triton,
    tl,
    triton,
)

# -- reference ------------------------------------------------------------------------------------


class _Split(torch.autograd.Function):
    """[n,pixel,head,channel,3] -> three [n,head,pixel,channel] by one copy, and their gradients back by one,
    where autograd would take one to stack them and another to lay them out."""

    generate_vmap_rule = True

    @staticmethod
    def forward(by_pixel):
        return by_pixel.permute(4, 0, 2, 1, 3).contiguous().unbind(0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        by_pixel = [grad.transpose(1, 2) for grad in grads]
        if not all(grad.is_contiguous() for grad in by_pixel):
            return torch.stack(grads).permute(1, 3, 2, 4, 0).contiguous()
        # Of few dimensions it is one kernel.
        flat = torch.stack([grad.flatten(0, 2) for grad in by_pixel], -1)
        return flat.view(*by_pixel[0].shape, 3)


def qkv_attention_reference(qkv, num_heads, *, normalize=False, scale=None):
    n, channels, height, width = qkv.shape
    c = channels // 3
    d = c // num_heads
    # One copy brings all three to [n, head, pixel, channel of the head], which every fused backend
    # of scaled_dot_product_attention takes; the interleaved views would fall back to its slow path.
    is_channels_last = qkv.is_contiguous(memory_format=torch.channels_last)
    if is_channels_last:
        by_pixel = qkv.permute(0, 2, 3, 1).reshape(n, height * width, num_heads, d, 3)
        split = _Split.apply(by_pixel)
    else:
        split = qkv.reshape(n, num_heads, d, 3, height * width).permute(3, 0, 1, 4, 2).contiguous()
        split = split.unbind(0)
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if normalize:
        wides = [x.to(wide) for x in split]
        rms = [torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(d) for x in wides]
        split = [(x / (NORM_EPS + r)).to(qkv.dtype) for x, r in zip(wides, rms, strict=True)]
    q, k, v = split
    if qkv.is_cpu and qkv.dtype == wide and height * width <= 64:
        # So short, the fused operation takes up to three times as long there.
        logits = q @ k.mT * (1 / math.sqrt(d) if scale is None else scale)
        out = logits.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    out = out.transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2)
    return out if is_channels_last else out.contiguous()


# -- kernels --------------------------------------------------------------------------------------
#
# A tile of qkv is a block of tokens by the 3·D channels of a head, q, k, v alternating. In
# channels_last a thread reads three 16-byte vectors in a row and holds WIDTH channels of each of the
# three, so that sorting them out moves registers, nothing else. P and dS are rounded to qkv's dtype
# before they are multiplied; sums, softmax and normalisation are fp32.


@triton.jit
def _lanes(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """[ROWS, GROUPS, WIDTH] -> WIDTH tensors [ROWS, GROUPS]."""
    even, odd = tl.split(tl.reshape(x, [ROWS, GROUPS, WIDTH // 2, 2]))
    if WIDTH == 4:
        x0, x2 = tl.split(even)
        x1, x3 = tl.split(odd)
        return x0, x1, x2, x3
    else:
        x04, x26 = tl.split(tl.reshape(even, [ROWS, GROUPS, 2, 2]))
        x15, x37 = tl.split(tl.reshape(odd, [ROWS, GROUPS, 2, 2]))
        x0, x4 = tl.split(x04)
        x1, x5 = tl.split(x15)
        x2, x6 = tl.split(x26)
        x3, x7 = tl.split(x37)
        return x0, x1, x2, x3, x4, x5, x6, x7


@triton.jit
def _zip(x, ROWS: tl.constexpr, GROUPS: tl.constexpr, WIDTH: tl.constexpr):
    """WIDTH tensors [ROWS, GROUPS] -> [ROWS, GROUPS, WIDTH]."""
    if WIDTH == 4:
        y = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    else:
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        odd = tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7]))
        y = tl.join(even, odd)
    return tl.reshape(y, [ROWS, GROUPS, WIDTH])


@triton.jit
def _vectors(base, rows, heads, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Addresses [ROWS, D/WIDTH, WIDTH] of the first of every three vectors of a token."""
    group = tl.arange(0, D // WIDTH)[None, :, None]
    lane = tl.arange(0, WIDTH)[None, None, :]
    return base + rows[:, None, None] * (3 * heads * D) + group * (3 * WIDTH) + lane


@triton.jit
def _load_qkv(
    base, rows, tokens, heads, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """q, k, v [ROWS, D] of a head at the tokens `rows`; zero beyond the last token."""
    if CHANNELS_LAST:
        # Sorted as integers, so that a product reads a bitcast and not a reshape: Triton before 3.7
        # moves the reshape into shared memory, where sm_90 has no layout for it.
        dtype = base.dtype.element_ty
        base = base.to(tl.pointer_type(tl.int16 if WIDTH == 8 else tl.int32))
        at = _vectors(base, rows, heads, ROWS, D, WIDTH)
        inside = (rows < tokens)[:, None, None]
        x = _lanes(tl.load(at, mask=inside, other=0), ROWS, D // WIDTH, WIDTH)
        y = _lanes(tl.load(at + WIDTH, mask=inside, other=0), ROWS, D // WIDTH, WIDTH)
        z = _lanes(tl.load(at + 2 * WIDTH, mask=inside, other=0), ROWS, D // WIDTH, WIDTH)
        xyz = x + y + z
        q = tl.reshape(_zip(xyz[0::3], ROWS, D // WIDTH, WIDTH), [ROWS, D]).to(dtype, bitcast=True)
        k = tl.reshape(_zip(xyz[1::3], ROWS, D // WIDTH, WIDTH), [ROWS, D]).to(dtype, bitcast=True)
        v = tl.reshape(_zip(xyz[2::3], ROWS, D // WIDTH, WIDTH), [ROWS, D]).to(dtype, bitcast=True)
    else:
        at = base + tl.arange(0, D)[None, :] * (3 * tokens) + rows[:, None]
        inside = (rows < tokens)[:, None]
        q = tl.load(at, mask=inside, other=0)
        k = tl.load(at + tokens, mask=inside, other=0)
        v = tl.load(at + 2 * tokens, mask=inside, other=0)
    return q, k, v


@triton.jit
def _store_qkv(
    base, rows, tokens, heads, q, k, v, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """The inverse of `_load_qkv`."""
    if CHANNELS_LAST:
        at = _vectors(base, rows, heads, ROWS, D, WIDTH)
        inside = (rows < tokens)[:, None, None]
        G: tl.constexpr = D // WIDTH
        a = _lanes(tl.reshape(q, [ROWS, G, WIDTH]), ROWS, G, WIDTH)
        b = _lanes(tl.reshape(k, [ROWS, G, WIDTH]), ROWS, G, WIDTH)
        c = _lanes(tl.reshape(v, [ROWS, G, WIDTH]), ROWS, G, WIDTH)
        if WIDTH == 4:
            x = (a[0], b[0], c[0], a[1])
            y = (b[1], c[1], a[2], b[2])
            z = (c[2], a[3], b[3], c[3])
        else:
            x = (a[0], b[0], c[0], a[1], b[1], c[1], a[2], b[2])
            y = (c[2], a[3], b[3], c[3], a[4], b[4], c[4], a[5])
            z = (b[5], c[5], a[6], b[6], c[6], a[7], b[7], c[7])
        tl.store(at, _zip(x, ROWS, G, WIDTH), mask=inside)
        tl.store(at + WIDTH, _zip(y, ROWS, G, WIDTH), mask=inside)
        tl.store(at + 2 * WIDTH, _zip(z, ROWS, G, WIDTH), mask=inside)
    else:
        at = base + tl.arange(0, D)[None, :] * (3 * tokens) + rows[:, None]
        inside = (rows < tokens)[:, None]
        tl.store(at, q, mask=inside)
        tl.store(at + tokens, k, mask=inside)
        tl.store(at + 2 * tokens, v, mask=inside)


@triton.jit
def _image(base, rows, tokens, heads, D: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Addresses [rows, D] of a head in an image of heads·D channels."""
    channel = tl.arange(0, D)
    if CHANNELS_LAST:
        return base + rows[:, None] * (heads * D) + channel[None, :]
    else:
        return base + channel[None, :] * tokens + rows[:, None]


@triton.jit
def _dot(a, b, sum, PRECISION: tl.constexpr):
    """a·b, plus `sum` where there is one, fp32."""
    if PRECISION == "wide":
        # The interpreter multiplies the bits of bf16. In fp32 the products are exact.
        return tl.dot(a.to(tl.float32), b.to(tl.float32), sum)
    else:
        return tl.dot(a, b, sum, input_precision=PRECISION)


@triton.jit
def _rms(x, D: tl.constexpr):
    wide = x.to(tl.float32)
    return tl.sqrt(tl.sum(wide * wide, 1) * (1 / D))


@triton.jit
def _normalized(x, eps, D: tl.constexpr, NORMALIZE: tl.constexpr):
    """x / (eps + rms of a row), rounded to x's dtype as the reference does."""
    if NORMALIZE:
        return (x.to(tl.float32) * (1 / (eps + _rms(x, D)))[:, None]).to(x.dtype)
    else:
        return x


@triton.jit
def _through_norm(grad, x, eps, D: tl.constexpr):
    """The gradient to x from that to x / (eps + rms), fp32."""
    wide = x.to(tl.float32)
    rms = _rms(x, D)
    inverse = 1 / (eps + rms)
    along = tl.sum(grad * wide, 1) * inverse * inverse
    along = tl.where(rms > 0, along / (D * tl.where(rms > 0, rms, 1)), 0)
    return grad * inverse[:, None] - wide * along[:, None]


@triton.jit
def _place(tokens, heads, BLOCK: tl.constexpr, D: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """This program's first token, and where its head begins in qkv, out and lse."""
    blocks = tl.cdiv(tokens, BLOCK)
    block = tl.program_id(0) % blocks
    image_and_head = (tl.program_id(0) // blocks).to(tl.int64)
    head = image_and_head % heads
    at = image_and_head // heads * tokens * (heads * D)
    at += head * D if CHANNELS_LAST else head * D * tokens
    return block * BLOCK, 3 * at, at, image_and_head * tokens


# A program per block of queries of a head.
@triton.jit
def _qkv_attention_fwd_kernel(
    qkv, out, lse, tokens, heads, logit_scale, eps,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, NORMALIZE: tl.constexpr, BOUNDED: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row, qkv_at, out_at, lse_at = _place(tokens, heads, BLOCK_M, D, CHANNELS_LAST)
    qkv += qkv_at
    rows = first_row + tl.arange(0, BLOCK_M)
    q, k, v = _load_qkv(qkv, rows, tokens, heads, BLOCK_M, D, WIDTH, CHANNELS_LAST)
    q = _normalized(q, eps, D, NORMALIZE)
    if WHOLE:
        k = _normalized(k, eps, D, NORMALIZE)
        v = _normalized(v, eps, D, NORMALIZE)
        s = _dot(q, tl.trans(k), None, PRECISION) * logit_scale
        s = tl.where((rows < tokens)[None, :], s, float("-inf"))
        high = tl.max(s, 1)
        p = tl.exp2(s - high[:, None])
        total = tl.sum(p, 1)
        y = _dot(p.to(v.dtype), v, None, PRECISION)
    else:
        high = tl.full([BLOCK_M], 0.0 if BOUNDED else float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        y = tl.zeros([BLOCK_M, D], tl.float32)
        for first in range(0, tokens, BLOCK_N):
            cols = first + tl.arange(0, BLOCK_N)
            _, kj, vj = _load_qkv(qkv, cols, tokens, heads, BLOCK_N, D, WIDTH, CHANNELS_LAST)
            kj = _normalized(kj, eps, D, NORMALIZE)
            vj = _normalized(vj, eps, D, NORMALIZE)
            s = _dot(q, tl.trans(kj), None, PRECISION) * logit_scale
            s = tl.where((cols < tokens)[None, :], s, float("-inf"))
            if BOUNDED:
                p = tl.exp2(s)
            else:
                higher = tl.maximum(high, tl.max(s, 1))
                p = tl.exp2(s - higher[:, None])
                shrink = tl.exp2(high - higher)
                total = total * shrink
                y = y * shrink[:, None]
                high = higher
            total += tl.sum(p, 1)
            y = _dot(p.to(q.dtype), vj, y, PRECISION)
    y = y * (1 / total)[:, None]
    inside = rows < tokens
    to = _image(out + out_at, rows, tokens, heads, D, CHANNELS_LAST)
    tl.store(to, y.to(out.dtype.element_ty), mask=inside[:, None])
    tl.store(lse + lse_at + rows, high + tl.log2(total), mask=inside)


@triton.jit
def _load_out(
    grad_out, out, lse, rows, tokens, heads, D: tl.constexpr, CHANNELS_LAST: tl.constexpr
):
    """grad_out, rowsum(grad_out · out) and lse of the tokens `rows`; lse is infinite, so that the
    weights are 0, beyond the last one."""
    inside = rows < tokens
    grad_y = tl.load(
        _image(grad_out, rows, tokens, heads, D, CHANNELS_LAST), mask=inside[:, None], other=0
    )
    y = tl.load(_image(out, rows, tokens, heads, D, CHANNELS_LAST), mask=inside[:, None], other=0)
    along = tl.sum(grad_y.to(tl.float32) * y.to(tl.float32), 1)
    return grad_y, along, tl.load(lse + rows, mask=inside, other=float("inf"))


# A program per block of tokens of a head: what they receive as keys and as queries, in one pass over
# the other tokens. So the gradient is written once, whole, and in an order that never changes.
@triton.jit
def _qkv_attention_bwd_kernel(
    grad_out, qkv, out, lse, grad_qkv, tokens, heads, scale, logit_scale, eps,
    D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, WHOLE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr, NORMALIZE: tl.constexpr,
    WIDTH: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    first_row, qkv_at, out_at, lse_at = _place(tokens, heads, BLOCK_M, D, CHANNELS_LAST)
    qkv += qkv_at
    out += out_at
    grad_out += out_at
    lse += lse_at
    rows = first_row + tl.arange(0, BLOCK_M)
    inside = rows < tokens
    q, k, v = _load_qkv(qkv, rows, tokens, heads, BLOCK_M, D, WIDTH, CHANNELS_LAST)
    q = _normalized(q, eps, D, NORMALIZE)
    k = _normalized(k, eps, D, NORMALIZE)
    v = _normalized(v, eps, D, NORMALIZE)
    grad_y, along, level = _load_out(grad_out, out, lse, rows, tokens, heads, D, CHANNELS_LAST)
    if WHOLE:
        s = _dot(q, tl.trans(k), None, PRECISION) * logit_scale
        p = tl.exp2(tl.where(inside[None, :], s, float("-inf")) - level[:, None])
        grad_v = _dot(tl.trans(p.to(v.dtype)), grad_y, None, PRECISION)
        grad_p = _dot(grad_y, tl.trans(v), None, PRECISION)
        grad_s = (p * (grad_p - along[:, None])).to(q.dtype)
        grad_q = _dot(grad_s, k, None, PRECISION)
        grad_k = _dot(tl.trans(grad_s), q, None, PRECISION)
    else:
        grad_q = tl.zeros([BLOCK_M, D], tl.float32)
        grad_k = tl.zeros([BLOCK_M, D], tl.float32)
        grad_v = tl.zeros([BLOCK_M, D], tl.float32)
        for first in range(0, tokens, BLOCK_N):
            cols = first + tl.arange(0, BLOCK_N)
            qj, kj, vj = _load_qkv(qkv, cols, tokens, heads, BLOCK_N, D, WIDTH, CHANNELS_LAST)
            grad_yj, along_j, level_j = _load_out(
                grad_out, out, lse, cols, tokens, heads, D, CHANNELS_LAST
            )
            qj = _normalized(qj, eps, D, NORMALIZE)
            kj = _normalized(kj, eps, D, NORMALIZE)
            vj = _normalized(vj, eps, D, NORMALIZE)
            # The block's tokens as keys [BLOCK_M], the others as queries [BLOCK_N].
            s = _dot(k, tl.trans(qj), None, PRECISION) * logit_scale
            p = tl.exp2(tl.where(inside[:, None], s, float("-inf")) - level_j[None, :])
            grad_v = _dot(p.to(v.dtype), grad_yj, grad_v, PRECISION)
            grad_p = _dot(v, tl.trans(grad_yj), None, PRECISION)
            grad_s = (p * (grad_p - along_j[None, :])).to(q.dtype)
            grad_k = _dot(grad_s, qj, grad_k, PRECISION)
            # The block's tokens as queries [BLOCK_M], the others as keys [BLOCK_N].
            s = _dot(q, tl.trans(kj), None, PRECISION) * logit_scale
            p = tl.exp2(tl.where((cols < tokens)[None, :], s, float("-inf")) - level[:, None])
            grad_p = _dot(grad_y, tl.trans(vj), None, PRECISION)
            grad_s = (p * (grad_p - along[:, None])).to(q.dtype)
            grad_q = _dot(grad_s, kj, grad_q, PRECISION)
    if NORMALIZE:
        # Each is read once more, one after the other: kept till here, or together, they would cost
        # as many registers as the gradients.
        q, _, _ = _load_qkv(qkv, rows, tokens, heads, BLOCK_M, D, WIDTH, CHANNELS_LAST)
        grad_q = _through_norm(grad_q * scale, q, eps, D).to(q.dtype)
        tl.debug_barrier()
        _, k, _ = _load_qkv(qkv, rows, tokens, heads, BLOCK_M, D, WIDTH, CHANNELS_LAST)
        grad_k = _through_norm(grad_k * scale, k, eps, D).to(q.dtype)
        tl.debug_barrier()
        _, _, v = _load_qkv(qkv, rows, tokens, heads, BLOCK_M, D, WIDTH, CHANNELS_LAST)
        grad_v = _through_norm(grad_v, v, eps, D).to(q.dtype)
    else:
        grad_q = (grad_q * scale).to(q.dtype)
        grad_k = (grad_k * scale).to(q.dtype)
        grad_v = grad_v.to(q.dtype)
    _store_qkv(
        grad_qkv + qkv_at, rows, tokens, heads, grad_q, grad_k, grad_v,
        BLOCK_M, D, WIDTH, CHANNELS_LAST,
    )  # fmt: skip


# -- launchers ------------------------------------------------------------------------------------

HEAD_CHANNELS = (16, 32, 64, 128, 256)
LOG2_E = math.log2(math.e)
# Compute capabilities whose programs have at least 163 KB of shared memory; the others have 99 KB.
ROOMY = (80, 87, 90, 100, 103, 110)


# Reasoned from the compiled kernels' registers, spills and shared memory; no GPU has chosen among
# them. Rules: no spills at the networks' 16-bit sites on sm_80 and sm_90; no more shared memory than
# there is; then the largest block of a program's own tokens, since every program reads all others.
@functools.cache
def _tiles(
    tokens: int, d: int, itemsize: int, normalize: bool, capability: int, backward: bool
) -> tuple[int, int, int, int]:
    """A program's own block of tokens, the block in its loop, warps, stages of the loop's pipeline.

    The two blocks are equal and hold all tokens where the program is to have no loop.
    """
    roomy = capability in ROOMY
    hopper = roomy and capability >= 90
    if itemsize == 4:
        whole = 32
    elif backward and d == 256:
        whole = 64 if hopper else 32 if roomy else 16
    else:
        whole = 64
    if tokens <= whole:
        block = max(16, triton.next_power_of_2(tokens))
        warps = max(block * d // 1024, block // 16)
        if itemsize == 4 or (backward and normalize and not hopper):
            warps *= 2
        return block, block, min(warps, 8), 1
    if itemsize == 4:
        return (32, 32, 8, 1) if backward else (64, 32, 8, 2)
    if not backward:
        if d <= 64:
            return (64, 64, 4, 2) if tokens <= 256 else (128, 64, 8, 2)
        if d == 128:
            return 64, 64, 8, 1
        return 64, 32, 8, 2 if hopper else 1
    if d <= 64:
        if hopper:  # two stages and the normalisation are eight bytes more than the registers
            return 64, 64, 8, 1 if normalize else 2
        return (32, 64, 8, 1) if normalize else (64, 32, 8, 1)
    if d == 256 and roomy and not hopper and VERSION < (3, 8):
        return 32, 16, 8, 1  # it holds two tiles of the loop twice
    return (32, 32, 8, 1) if roomy or d == 128 else (16, 16, 4, 1)


@functools.cache
def _capability_of(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def _capability(device: torch.device) -> int:
    """Compute capability as a number, 90 for 9.0; elsewhere than on CUDA, what the interpreter plays."""
    if device.type != "cuda":
        return 80
    return _capability_of(torch.cuda.current_device() if device.index is None else device.index)


def _constants(tokens, d, itemsize, capability, is_channels_last, normalize, scale, backward):
    """A kernel's constexprs, warps and stages at a site."""
    block_m, block_n, warps, stages = _tiles(tokens, d, itemsize, normalize, capability, backward)
    constants = {
        "D": d, "BLOCK_M": block_m, "BLOCK_N": block_n,
        "WHOLE": block_m == block_n and tokens <= block_m,
        "CHANNELS_LAST": is_channels_last, "NORMALIZE": normalize,
        "WIDTH": 16 // itemsize, "PRECISION": "wide" if interpreting() else "tf32x3",
    }  # fmt: skip
    if not backward:
        # Normalised rows are no longer than √d, so that exp2 of a logit stays in the range of fp16
        # and no maximum need be taken off.
        constants["BOUNDED"] = normalize and abs(scale) * d * LOG2_E <= 14
    return constants, warps, stages


def _layout(qkv: torch.Tensor) -> torch.memory_format:
    return layout_of(qkv, torch.channels_last)


def _site(qkv: torch.Tensor, num_heads: int):
    """Images, and what decides the tiles: tokens, channels of a head, bytes, compute capability."""
    n, channels, height, width = qkv.shape
    d = channels // 3 // num_heads
    return n, (height * width, d, qkv.element_size(), _capability(qkv.device))


def _fwd(qkv, num_heads, normalize, scale):
    layout = _layout(qkv)
    (qkv,) = laid_out(layout, qkv)
    n, site = _site(qkv, num_heads)
    tokens, d = site[:2]
    out = empty(qkv, (n, num_heads * d, *qkv.shape[2:]), layout)
    lse = torch.empty((n, num_heads, tokens), dtype=torch.float32, device=qkv.device)
    constants, warps, stages = _constants(
        *site, layout == torch.channels_last, normalize, scale, False
    )
    launch(
        _qkv_attention_fwd_kernel, (n * num_heads * -(-tokens // constants["BLOCK_M"]),),
        qkv, out, lse, tokens, num_heads, scale * LOG2_E, NORM_EPS,
        **constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return out, lse


def _bwd(grad_out, qkv, out, lse, num_heads, normalize, scale):
    layout = _layout(qkv)
    qkv, grad_out = laid_out(layout, qkv, grad_out)
    grad_qkv = torch.empty_like(qkv)
    n, site = _site(qkv, num_heads)
    constants, warps, stages = _constants(
        *site, layout == torch.channels_last, normalize, scale, True
    )
    launch(
        _qkv_attention_bwd_kernel, (n * num_heads * -(-site[0] // constants["BLOCK_M"]),),
        grad_out, qkv, out, lse, grad_qkv, site[0], num_heads, scale, scale * LOG2_E, NORM_EPS,
        **constants, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return grad_qkv


def specialisations(capability: int) -> list[Variant]:
    """The forms in which DDPM++, ADM and EDM2 use the kernels, in channels_last, at a batch of 128."""
    sites = (
        ("DDPM++ 16x16", 256, 256, 1, False),
        ("DDPM++ 8x8", 64, 256, 1, False),
        ("ADM 32x32", 1024, 64, 6, False),
        ("ADM 16x16", 256, 64, 9, False),
        ("ADM 8x8", 64, 64, 12, False),
        ("EDM2-S 16x16", 256, 64, 9, True),
        ("EDM2-S 8x8", 64, 64, 12, True),
    )
    sizes = {"tokens": "i32", "heads": "i32"}
    variants = []
    for dtype, itemsize in (("bf16", 2), ("fp16", 2), ("fp32", 4)):
        tensor = f"*{dtype}"
        fwd = {"qkv": tensor, "out": tensor, "lse": "*fp32"} | sizes
        fwd |= {"logit_scale": "fp32", "eps": "fp32"}
        bwd = {"grad_out": tensor, "qkv": tensor, "out": tensor, "lse": "*fp32"}
        bwd |= {"grad_qkv": tensor} | sizes
        bwd |= {"scale": "fp32", "logit_scale": "fp32", "eps": "fp32"}
        for name, tokens, d, heads, normalize in sites:
            if itemsize == 4 and d > 64:
                continue  # not served, see `_supported`
            for kernel, signature in (
                (_qkv_attention_fwd_kernel, fwd),
                (_qkv_attention_bwd_kernel, bwd),
            ):
                constants, warps, stages = _constants(
                    tokens, d, itemsize, capability, True, normalize, d**-0.5, signature is bwd
                )
                variants.append(
                    Variant(
                        f"{name} {dtype}", kernel, signature, constants, warps, stages,
                        aligned=frozenset({"tokens"}),
                        programs=128 * heads * -(-tokens // constants["BLOCK_M"]),
                    )
                )  # fmt: skip
    return variants


# -- registration ---------------------------------------------------------------------------------


def _fwd_by_reference(qkv, num_heads, normalize, scale):
    out = qkv_attention_reference(qkv, num_heads, normalize=normalize, scale=scale)
    n, _, height, width = qkv.shape
    lse = qkv.new_empty((n, num_heads, height * width), dtype=torch.float32)  # nobody reads it
    return out.contiguous(memory_format=_layout(qkv)), lse


def _bwd_by_reference(grad_out, qkv, out, lse, num_heads, normalize, scale):
    def function(qkv):
        return qkv_attention_reference(qkv, num_heads, normalize=normalize, scale=scale)

    (grad_qkv,) = gradients(function, [qkv], [grad_out])
    return grad_qkv.contiguous(memory_format=_layout(qkv))


def _fake_fwd(qkv, num_heads, normalize, scale):
    n, channels, height, width = qkv.shape
    out = empty(qkv, (n, channels // 3, height, width), _layout(qkv))
    return out, qkv.new_empty((n, num_heads, height * width), dtype=torch.float32)


def _fake_bwd(grad_out, qkv, *_):
    return torch.empty_like(qkv, memory_format=_layout(qkv))


def _save(ctx, inputs, output):
    qkv, *ctx.settings = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(qkv, *output)


def _backward(ctx, grad_out, _):
    grad_qkv = torch.ops.tcm_fast.qkv_attention_bwd(grad_out, *ctx.saved_tensors, *ctx.settings)
    return grad_qkv, None, None, None


_fwd = register(
    "qkv_attention_fwd(Tensor qkv, SymInt num_heads, bool normalize, float scale)"
    " -> (Tensor out, Tensor lse)",
    _fwd, _fwd_by_reference, _fake_fwd, save=_save, backward=_backward,
)  # fmt: skip
_bwd = register(
    "qkv_attention_bwd(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, SymInt num_heads, "
    "bool normalize, float scale) -> Tensor",
    _bwd, _bwd_by_reference, _fake_bwd,
)  # fmt: skip


class _Direct(torch.autograd.Function):
    """The operator without the dispatcher."""

    @staticmethod
    def forward(ctx, *inputs):
        output = _fwd(*inputs)
        _save(ctx, inputs, output)
        return output[0]

    @staticmethod
    def backward(ctx, grad_out):
        # With create_graph the operator stands in the graph, to refuse the second derivative.
        bwd = torch.ops.tcm_fast.qkv_attention_bwd if torch.is_grad_enabled() else _bwd
        return bwd(grad_out, *ctx.saved_tensors, *ctx.settings), None, None, None


# -- public function ------------------------------------------------------------------------------


@torch.compiler.assume_constant_result
def _has_tiles(device: torch.device) -> bool:
    """Whether the tables know this device: Ampere and later, where programs have 99 KB to share."""
    return _capability(device) >= 80


def _supported(qkv: torch.Tensor, num_heads: int) -> bool:
    """Whether the kernels take qkv: 16 to 256 channels a head, a power of two, in fp32 up to 64
    (their products are sums of three, and 128 channels of both factors outgrow the registers);
    images of fewer than 2**31 elements (a batch may have more)."""
    d = qkv.shape[1] // 3 // num_heads
    return (
        qkv.dtype in (torch.float32, torch.float16, torch.bfloat16)
        and d in HEAD_CHANNELS
        and (d <= 64 or qkv.dtype != torch.float32)
        and qkv.shape[2] * qkv.shape[3] >= 1
        and qkv.shape[1] * qkv.shape[2] * qkv.shape[3] < 2**31
        and _has_tiles(qkv.device)
    )


def qkv_attention(
    qkv: torch.Tensor, num_heads: int, *, normalize: bool = False, scale: float | None = None
) -> torch.Tensor:
    """softmax(q·kᵀ · scale) v between all pixels of an image, each head on its own.

    Args:
        qkv: [N,3C,H,W] of a floating dtype, contiguous or channels_last, channels ordered
            (head, channel of the head, {q,k,v}).
        num_heads: number of heads, a divisor of C.
        normalize: first map each of q, k, v to x/(1e-4 + rms(x)), rms over the head's channels
            (EDM2, Karras et al. 2024).
        scale: factor on the logits; None is 1/√(channels of a head).

    Returns:
        [N,C,H,W] in the dtype and memory format of qkv; the softmax is computed in fp32 (float64
        for float64). The Triton kernels serve heads of 16, 32, 64, 128 and 256 channels (in fp32 up
        to 64); they have no second derivative and say so. Sources: Karras et al. 2022, appendix F;
        Dao 2023 (FlashAttention-2).

    Raises:
        TypeError: qkv is not a floating tensor.
        ValueError: a channel count that is not a multiple of 3·num_heads.
    """
    check_image("qkv_attention", qkv, "qkv", "[N,3C,H,W]")
    if num_heads < 1 or qkv.shape[1] % (3 * num_heads):
        raise ValueError(
            f"qkv_attention: 3·num_heads must divide the {qkv.shape[1]} channels of qkv, "
            f"got num_heads={num_heads}"
        )
    if not _supported(qkv, num_heads) or not runs_triton("qkv_attention", qkv.device.type):
        return qkv_attention_reference(qkv, num_heads, normalize=normalize, scale=scale)
    if scale is None:
        scale = (qkv.shape[1] // 3 // num_heads) ** -0.5
    if calls_directly(qkv):
        return _Direct.apply(qkv, num_heads, normalize, scale)
    return torch.ops.tcm_fast.qkv_attention_fwd(qkv, num_heads, normalize, scale)[0]
