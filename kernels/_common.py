"""What the kernels that go over a feature map element by element share: addresses in both layouts, the
activation and its derivative, and which tile of [pixels, channels] a program takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcm_fast.kernels._triton import Variant, tl, triton
from tcm_fast.kernels.group_norm_silu import _sigmoid

MP_SILU = 0.596  # rms of silu(z) for a unit Gaussian z
TILE = 4096  # elements of a tile, for 4 warps


@triton.jit
def address(p, c, CHANNELS: tl.constexpr, HW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets [P, C] of channels c [C] at pixels p int64 [P], counted over the whole batch."""
    if CHANNELS_LAST:
        return p[:, None] * CHANNELS + c[None, :]
    return (p // HW * (CHANNELS * HW) + p % HW)[:, None] + c[None, :] * HW


@triton.jit
def scaled_silu(z, GAIN: tl.constexpr, ASM: tl.constexpr):
    return z * _sigmoid(z, ASM) * GAIN


@triton.jit
def scaled_silu_grad(z, GAIN: tl.constexpr, ASM: tl.constexpr):
    s = _sigmoid(z, ASM)
    return (s + z * s * (1.0 - s)) * GAIN


@triton.jit
def meet(
    z, past, act, at, inside, HAS_PAST: tl.constexpr, HAS_ACT: tl.constexpr,
    GAIN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """The gradient at z, which was handed on as it is (`past`) and through the activation (`act`)."""
    grad = tl.zeros(z.shape, tl.float32)
    if HAS_PAST:
        grad += tl.load(past + at, mask=inside, other=0).to(tl.float32)
    if HAS_ACT:
        upstream = tl.load(act + at, mask=inside, other=0).to(tl.float32)
        grad += upstream * scaled_silu_grad(z, GAIN, ASM)
    return grad


def meet_reference(
    z: torch.Tensor | None, past: torch.Tensor | None, act: torch.Tensor | None
) -> torch.Tensor:
    """`meet` in PyTorch; z may be None where `act` is."""
    grad = None if past is None else past.to(torch.float32)
    if act is not None:
        assert z is not None
        through = torch.ops.aten.silu_backward(act.to(torch.float32), z.to(torch.float32)) / MP_SILU
        grad = through if grad is None else grad + through
    assert grad is not None
    return grad


def layout_of(x: torch.Tensor) -> torch.memory_format:
    """channels_last where x lies so and in no other way, or is a part of what does (a slice of channels,
    such as a concatenation's gradient), else contiguous."""
    if x.ndim != 4 or x.is_contiguous():
        return torch.contiguous_format
    lies_so = x.is_contiguous(memory_format=torch.channels_last) or x.stride(1) == 1
    return torch.channels_last if lies_so else torch.contiguous_format


def has_asm(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


def tile_for(channels: int, pixels: int, widest: int = 2048) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two: about TILE elements, as wide as the channels are."""
    width = min(power_of_2(channels), widest)
    return max(1, min(TILE // width, power_of_2(max(pixels, 1)))), width


def power_of_2(n: int) -> int:
    """The power of two that is n or the next above."""
    return 1 << max(n - 1, 0).bit_length()


def empty(x: torch.Tensor, shape: Sequence[int], layout: torch.memory_format) -> torch.Tensor:
    """Memory for a tensor of another shape, of x's dtype and on its device."""
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=layout)


def given(x: torch.Tensor, *optional: torch.Tensor | None) -> list[torch.Tensor]:
    """What is absent is never touched; x stands in for it."""
    return [x if v is None else v for v in optional]


def variant(
    site: str,
    kernel: object,
    pointers: dict[str, str],
    scalars: dict[str, str],
    constants: dict[str, object],
    *,
    programs: int = 0,
    aligned: Sequence[str] = (),
) -> Variant:
    """A compiled form of a kernel; constants hold num_warps too, as a launch is given them."""
    rest = dict(constants)
    warps = rest.pop("num_warps")
    assert isinstance(warps, int)
    types = {name: f"*{kind}" for name, kind in pointers.items()} | scalars
    return Variant(
        site, kernel, types, rest, num_warps=warps, aligned=frozenset(aligned), programs=programs
    )


DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}


def edm2_sites() -> list[tuple[int, int, str]]:
    """Resolution, width and dtype of feature maps of EDM2-S and -XL at 64 x 64: the narrowest and the widest
    in every dtype, the others in 16 bits."""
    sites = [(64, 192), (32, 384), (16, 576), (8, 768), (16, 1152), (8, 1536)]
    return [
        (size, c, dtype)
        for size, c in sites
        for dtype in DTYPES.values()
        if dtype != "fp32" or c in (192, 1536)
    ]
