"""Self-attention over the pixels of a feature map, from the q, k, v of a 1x1 convolution."""

import math

import torch
import torch.nn.functional as F

NORM_EPS = 1e-4

# -- reference ------------------------------------------------------------------------------------


def qkv_attention_reference(qkv, num_heads, *, normalize=False, scale=None):
    n, channels, height, width = qkv.shape
    c = channels // 3
    d = c // num_heads
    # One copy brings all three to [n, head, pixel, channel of the head], which every fused backend
    # of scaled_dot_product_attention takes; the interleaved views would fall back to its slow path.
    split = qkv.reshape(n, num_heads, d, 3, height * width).permute(3, 0, 1, 4, 2).contiguous()
    wide = torch.promote_types(qkv.dtype, torch.float32)
    if normalize:
        x = split.to(wide)
        rms = torch.linalg.vector_norm(x, dim=-1, keepdim=True) / math.sqrt(d)
        split = (x / (NORM_EPS + rms)).to(qkv.dtype)
    q, k, v = split.unbind(0)
    if qkv.is_cpu and qkv.dtype == wide and height * width <= 64:
        # So short, the fused operation takes up to three times as long there.
        logits = q @ k.mT * (1 / math.sqrt(d) if scale is None else scale)
        out = logits.softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, scale=scale)
    out = out.transpose(1, 2).reshape(n, height, width, c).permute(0, 3, 1, 2)
    is_channels_last = qkv.is_contiguous(memory_format=torch.channels_last)
    return out if is_channels_last else out.contiguous()


# -- public function ------------------------------------------------------------------------------


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
        for float64).

    Raises:
        TypeError: qkv is not a floating tensor.
        ValueError: a channel count that is not a multiple of 3·num_heads.
    """
    if not qkv.is_floating_point():
        raise TypeError(f"qkv_attention: qkv must be floating, got {qkv.dtype}")
    if qkv.ndim != 4:
        raise ValueError(f"qkv_attention: qkv must be [N,3C,H,W], got {list(qkv.shape)}")
    if num_heads < 1 or qkv.shape[1] % (3 * num_heads):
        raise ValueError(
            f"qkv_attention: 3·num_heads must divide the {qkv.shape[1]} channels of qkv, "
            f"got num_heads={num_heads}"
        )
    return qkv_attention_reference(qkv, num_heads, normalize=normalize, scale=scale)
