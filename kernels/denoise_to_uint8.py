"""The last thing a sampler does to an image: from the network's raw output to bytes."""

import torch

from tcm_fast.kernels._common import laid_out, layout_of, register
from tcm_fast.kernels._triton import Variant, launch, runs_triton, tl, triton
from tcm_fast.kernels.precondition import denoise

# -- reference ------------------------------------------------------------------------------------


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1,1], [n,C,H,W] -> uint8 [n,H,W,C]: 127.5 x + 128, clipped and truncated."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def denoise_to_uint8_reference(output, x, t, sigma_data=0.5):
    return to_uint8(denoise(output, x, t, sigma_data))


# -- kernels --------------------------------------------------------------------------------------


@triton.jit
def _denoise_to_uint8_kernel(
    output, x, t, image, size, channels, pixel_stride, channel_stride, sigma_data,
    IS_LINEAR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = e < size
    at = n * size + e
    if not IS_LINEAR:
        at = n * size + (e // channels) * pixel_stride + (e % channels) * channel_stride
    sd = tl.full([], sigma_data, tl.float32)
    level = tl.load(t + n)
    variance = level * level + sd * sd
    c_out = tl.div_rn(level * sd, tl.sqrt_rn(variance))
    raw = tl.load(output + at, mask=inside, other=0).to(tl.float32)
    denoised = tl.div_rn(sd * sd, variance) * tl.load(x + at, mask=inside, other=0) + c_out * raw
    scaled = denoised * 127.5 + 128
    # A NaN becomes 0: the comparison fails.
    byte = tl.where(scaled > 0, tl.minimum(scaled, 255.0), 0.0).to(tl.uint8)
    tl.store(image + n * size + e, byte, mask=inside)


# -- launchers ------------------------------------------------------------------------------------

BLOCK = 1024


def _image(x):
    """Memory for the bytes."""
    n, c, h, w = x.shape
    return torch.empty((n, h, w, c), dtype=torch.uint8, device=x.device)


def _launch(output, x, t, sigma_data):
    n, c, h, w = x.shape
    layout = layout_of(output, torch.channels_last)
    is_channels_last = layout == torch.channels_last
    output, x = laid_out(layout, output, x)
    image = _image(x)
    strides = (c, 1) if is_channels_last else (1, h * w)
    launch(
        _denoise_to_uint8_kernel, (n, -(-c * h * w // BLOCK)), output, x, t, image, c * h * w, c,
        *strides, sigma_data, IS_LINEAR=is_channels_last, BLOCK=BLOCK, num_warps=4,
    )  # fmt: skip
    return image


def specialisations(capability: int) -> list[Variant]:
    """The forms in which CIFAR-10 and ImageNet-64 use the kernel."""
    return [
        Variant(
            f"3x{side}x{side} {dtype}",
            _denoise_to_uint8_kernel,
            {"output": f"*{dtype}", "x": "*fp32", "t": "*fp32", "image": "*u8", "size": "i32"}
            | dict.fromkeys(("channels", "pixel_stride", "channel_stride"), "i32")
            | {"sigma_data": "fp32"},
            {"IS_LINEAR": True, "BLOCK": BLOCK},
            aligned=frozenset({"size"}),
            programs=256 * 3 * side**2 // BLOCK,
        )
        for side in (32, 64)
        for dtype in ("fp32", "fp16", "bf16")
    ]


# -- registration ---------------------------------------------------------------------------------

register(
    "denoise_to_uint8(Tensor output, Tensor x, Tensor t, float sigma_data) -> Tensor",
    _launch, denoise_to_uint8_reference, lambda output, x, *_: _image(x),
)  # fmt: skip


# -- public function ------------------------------------------------------------------------------


def denoise_to_uint8(
    output: torch.Tensor, x: torch.Tensor, t: torch.Tensor, sigma_data: float = 0.5
) -> torch.Tensor:
    """The denoised images c_skip(t) x + c_out(t) F as bytes: 127.5 D + 128, clipped to [0, 255] and
    truncated.

    Args:
        output: raw output F of the network, [N,C,H,W].
        x: noisy images fp32 [N,C,H,W].
        t: noise levels [N].
        sigma_data: standard deviation of the data.

    Returns:
        uint8 [N,H,W,C]. There is no gradient.

    Raises:
        ValueError: shapes that differ.
    """
    if output.ndim != 4 or output.shape != x.shape:
        raise ValueError(
            f"denoise_to_uint8: output must be [N,C,H,W] like x, {list(x.shape)}, "
            f"got {list(output.shape)}"
        )
    if t.shape != x.shape[:1]:
        raise ValueError(f"denoise_to_uint8: t must be [{len(x)}], got {list(t.shape)}")
    output, x = output.detach(), x.detach()
    if x.dtype == torch.float64 or not runs_triton("denoise_to_uint8", x.device.type):
        return denoise_to_uint8_reference(output, x, t, sigma_data)
    levels = t.to(torch.float32)
    return torch.ops.tcm_fast.denoise_to_uint8(output, x.to(torch.float32), levels, sigma_data)
