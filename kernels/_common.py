"""What the operations share: layouts and tiles, the activation and its derivative, addresses in both layouts,
checks of arguments, and how an operator is registered."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from tcm_fast.kernels._triton import Variant, or_reference, tl, triton

MP_SILU = 0.596  # rms of silu(z) for a unit Gaussian z
NORM_EPS = 1e-4  # is added to an rms that EDM2 divides by
TILE = 4096  # elements of a tile, for 4 warps
DTYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}

# -- in kernels -----------------------------------------------------------------------------------


@triton.jit
def sigmoid(z, ASM: tl.constexpr):
    if ASM:
        # Two special-function instructions and no handling of denormals, 2^-21 relative.
        # tanh.approx would save one instruction of four, at 2^-11 absolute.
        return tl.inline_asm_elementwise(
            "{ .reg .f32 t; mul.f32 t, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 t, t;"
            " add.f32 t, t, 0f3F800000; rcp.approx.ftz.f32 $0, t; }",
            "=f,f", [z], dtype=tl.float32, is_pure=True, pack=1,
        )  # fmt: skip
    return 1.0 / (1.0 + tl.exp2(z * -1.4426950408889634))


@triton.jit
def address(p, c, CHANNELS: tl.constexpr, HW: tl.constexpr, CHANNELS_LAST: tl.constexpr):
    """Offsets [P, C] of channels c [C] at pixels p int64 [P], counted over the whole batch."""
    if CHANNELS_LAST:
        return p[:, None] * CHANNELS + c[None, :]
    return (p // HW * (CHANNELS * HW) + p % HW)[:, None] + c[None, :] * HW


@triton.jit
def scaled_silu(z, GAIN: tl.constexpr, ASM: tl.constexpr):
    return z * sigmoid(z, ASM) * GAIN


@triton.jit
def scaled_silu_grad(z, GAIN: tl.constexpr, ASM: tl.constexpr):
    s = sigmoid(z, ASM)
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


# -- beside them ----------------------------------------------------------------------------------


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


def layout_of(
    x: torch.Tensor, ambiguous: torch.memory_format = torch.contiguous_format
) -> torch.memory_format:
    """channels_last where x [N,C,H,W] is, or is a part of what is (a slice of channels, such as a
    concatenation's gradient), else contiguous; `ambiguous` where it is both, with one channel or pixel."""
    is_channels_last = x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)
    if x.ndim != 4 or x.is_contiguous():
        return ambiguous if is_channels_last else torch.contiguous_format
    return torch.channels_last if is_channels_last or x.stride(1) == 1 else torch.contiguous_format


def laid_out(layout: torch.memory_format, *tensors: torch.Tensor | None) -> list[Any]:
    """Dense tensors in one memory format: copies where they are not so already, None for None."""
    return [None if x is None else x.contiguous(memory_format=layout) for x in tensors]


def dense_like(x: torch.Tensor) -> torch.Tensor:
    """Memory for a tensor like x, dense in its memory format."""
    return torch.empty_like(x.contiguous(memory_format=layout_of(x)))


def empty(x: torch.Tensor, shape: Sequence[int], layout: torch.memory_format) -> torch.Tensor:
    """Memory for a tensor of another shape, of x's dtype and on its device."""
    return torch.empty(tuple(shape), dtype=x.dtype, device=x.device, memory_format=layout)


def rows(v: torch.Tensor | None) -> torch.Tensor | None:
    """[N,C] with neighbouring channels side by side; rows may lie apart, as halves of a chunk do."""
    return v if v is None or v.stride(1) == 1 or v.shape[1] == 1 else v.contiguous()


def of_channels(v: torch.Tensor) -> torch.Tensor:
    """[C] of a parameter [C], or of one that was expanded to [N,C]: a gradient that is not summed over the
    samples yet."""
    return v if v.ndim == 1 else v[0]


def fits_channels(v: torch.Tensor, n: int, c: int) -> bool:
    """Whether v is what `of_channels` takes, for n samples."""
    if v.ndim == 1:  # asked first: an n that is free in a program is not to be compared with c
        return v.shape == (c,)
    return n > 0 and v.shape == (n, c) and (n == 1 or v.stride(0) == 0)


def given(x: torch.Tensor, *optional: torch.Tensor | None) -> list[torch.Tensor]:
    """What is absent is never touched; x stands in for it."""
    return [x if v is None else v for v in optional]


def has_asm(x: torch.Tensor) -> bool:
    return x.is_cuda and torch.version.hip is None


def power_of_2(n: int) -> int:
    """The power of two that is n or the next above."""
    return 1 << max(n - 1, 0).bit_length()


def tile_for(channels: int, pixels: int, widest: int = 2048) -> tuple[int, int]:
    """Pixels and channels of a tile, powers of two: about TILE elements, as wide as the channels are."""
    width = min(power_of_2(channels), widest)
    return max(1, min(TILE // width, power_of_2(max(pixels, 1)))), width


def check_image(operation: str, x: torch.Tensor, name: str = "x", shape: str = "[N,C,H,W]") -> None:
    """TypeError for an argument that is not floating, ValueError for one that has not four dimensions."""
    if not x.is_floating_point():
        raise TypeError(f"{operation}: {name} must be floating, got {x.dtype}")
    if x.ndim != 4:
        raise ValueError(f"{operation}: {name} must be {shape}, got {list(x.shape)}")


def register(
    schema: str,
    kernels: Callable[..., Any],
    reference: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    save: Callable[..., None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define an operator of torch.library.

    Args:
        schema: `NAME(arguments) -> results`.
        kernels, reference: compute it; the reference where a kernel does not compile.
        fake: memory for its results, of the right shapes, dtypes and layouts.
        save, backward: setup_context and backward of `torch.library.register_autograd`. One that ends in
            _bwd and has none refuses to be differentiated.

    Returns:
        what the operator runs, for calls without the dispatcher.
    """
    name = schema.partition("(")[0]
    operator, operation = f"tcm_fast::{name}", kernels.__module__.rpartition(".")[2]
    run = or_reference(kernels, reference)
    torch.library.define(operator, schema.removeprefix(name))
    torch.library.impl(operator, ("cpu", "cuda"), run)
    torch.library.register_fake(operator, fake)

    def refuse(ctx: Any, *grads: Any) -> None:
        raise NotImplementedError(
            f"{operation}: its kernel has no second derivative, got a double backward"
        )

    if backward is None and name.endswith("_bwd"):
        backward = refuse
    if backward is not None:
        torch.library.register_autograd(operator, backward, setup_context=save)
    return run


# -- the list of compiled forms -------------------------------------------------------------------


def forms(
    site: str,
    scalars: dict[str, str],
    constants: dict[str, Any],
    *kernels: tuple[Any, dict[str, str], dict[str, Any]],
    programs: int,
    aligned: Sequence[str] = (),
) -> list[Variant]:
    """A compiled form of each of an operation's kernels: (kernel, its pointers' types, constants of its
    own). Constants hold num_warps, as a launch is given them."""
    rest = dict(constants)
    warps = rest.pop("num_warps")
    return [
        Variant(
            site, kernel, {name: f"*{kind}" for name, kind in pointers.items()} | scalars, rest | own,
            num_warps=warps, aligned=frozenset(aligned), programs=programs,
        )
        for kernel, pointers, own in kernels
    ]  # fmt: skip


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
