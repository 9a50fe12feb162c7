"""The layers of EDM's U-Nets (Karras et al. 2022, appendix C), on the fused operations."""

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.config import require
from tcm_fast.kernels._common import of_channels
from tcm_fast.kernels._triton import runs_triton
from tcm_fast.kernels.conv_bf16x3 import conv_bf16x3
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.group_norm_silu import group_norm_silu
from tcm_fast.kernels.residual import of_its_terms, residual
from tcm_fast.kernels.residual_conv1x1 import residual_conv1x1

BOX_FILTER = (1, 1)


def fresh_key(n: int, device: torch.device) -> PhiloxKey:
    """A key for `n` samples that nobody else uses, drawn from torch's default CPU generator."""
    seed = torch.randint(2**31, (), device="cpu").to(device, non_blocking=True)
    return PhiloxKey(seed=seed, step=0, layer=0, sample=torch.arange(n, device=device))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """An fp32 island; the meta device has no autocast to be switched off."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def initialise(layer: nn.Linear | nn.Conv2d, init: str, gain: float) -> None:
    """EDM's initialisations, times `gain`: "xavier" is Xavier-uniform with biases 0 (DDPM++), "kaiming"
    uniform within 1/sqrt(fan_in), weights and biases alike (ADM)."""
    if init == "xavier":
        nn.init.xavier_uniform_(layer.weight, gain)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
        return
    assert init == "kaiming"
    bound = gain / math.sqrt(layer.weight[0].numel())
    for parameter in (layer.weight, layer.bias):
        if parameter is not None:
            nn.init.uniform_(parameter, -bound, bound)


class PendingSum(NamedTuple):
    """A residual sum that whoever normalises it carries out: arguments of `group_norm_silu`. Without `skip` x
    is the sum already, and only its gradient has to go on as that of the terms."""

    x: torch.Tensor
    skip: torch.Tensor | None
    sum_scale: float
    x_bias: torch.Tensor | None
    skip_bias: torch.Tensor | None

    @property
    def shape(self) -> torch.Size:
        return self.x.shape


def carried_out(x: torch.Tensor | PendingSum) -> torch.Tensor:
    """The sum; a tensor as it is."""
    if not isinstance(x, PendingSum):
        return x
    if x.skip is None:
        return of_its_terms(x.x, *x[2:])
    return residual(x.x, x.skip, *x[2:])


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks."""
    return any(
        getattr(module, f"_{kind}")
        for kind in ("forward_hooks", "forward_pre_hooks", "backward_hooks", "backward_pre_hooks")
    )


class Linear(nn.Linear):
    """A linear layer with one of EDM's initialisations (`initialise`)."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool = True,
        gain: float = 1.0,
        init: str = "xavier",
    ):
        self.init, self.gain = init, gain
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        initialise(self, self.init, self.gain)


class Conv2d(nn.Conv2d):
    """A "same" convolution that may double (`up`) or halve (`down`) the resolution first.

    Resampling filters with the outer product of `resample_filter`, normalised; the weights are
    initialised as in `Linear`. The persistent buffer `resample_filter` [1,1,k,k] exists where the
    layer resamples. `fused` convolves first, without cutting off the border, and filters with stride 2
    after it: NCSN++'s residual encoder. Where `parts` are there (`precision.cast_weights`), the weight's in
    bf16, `conv_bf16x3` convolves.
    """

    parts: torch.Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        up: bool = False,
        down: bool = False,
        fused: bool = False,
        resample_filter: tuple[int, ...] = BOX_FILTER,
        gain: float = 1.0,
        init: str = "xavier",
    ):
        assert not (up and down)
        assert down or not fused
        self.init, self.gain, self.fused = init, gain, fused
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.register_buffer("parts", None, persistent=False)
        self.up, self.down = up, down
        self.is_box = tuple(resample_filter) == BOX_FILTER
        self.resample_filter: torch.Tensor
        if up or down:
            self.register_buffer("resample_filter", normalised_filter(resample_filter))

    def reset_parameters(self) -> None:
        initialise(self, self.init, self.gain)

    def forward(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """`with_bias=False` leaves the bias to who reads the result."""
        bias = of_channels(self.bias) if with_bias and self.bias is not None else None
        if self.up and self.is_box and self.kernel_size == (1, 1):
            # Repeating pixels commutes with a pointwise convolution: a quarter of the work.
            return self._resample(self._convolve(x, bias))
        if self.fused:
            border = self.kernel_size[0] // 2 + filter_padding(self.resample_filter)
            x = F.conv2d(x, self.weight, padding=border)
            weight = self.resample_filter.to(x.dtype).expand(x.shape[1], 1, -1, -1)
            return F.conv2d(x, weight, bias, stride=2, groups=x.shape[1])
        if self.up or self.down:
            x = self._resample(x)
        return self._convolve(x, bias)

    def over_ones(self, x: torch.Tensor) -> torch.Tensor:
        """The layer's result for x with a channel of ones behind it, whose weight in the middle of the kernel
        is the bias: no pass adds it, and its gradient is one of the weights'."""
        assert self.bias is not None
        edge = self.kernel_size[0] // 2
        bias = F.pad(self.bias[:, None, None, None], (0, 0, edge, edge, edge, edge))
        weight = torch.cat([self.weight.permute(0, 2, 3, 1), bias], 3).permute(0, 3, 1, 2)
        return F.conv2d(x, weight, padding=edge)

    def _convolve(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        if self.parts is not None:
            return conv_bf16x3(x, self.weight, bias, parts=self.parts)
        if self.kernel_size == (1, 1) and bias is not None and _is_matrix(x):
            by_pixel = x.permute(0, 2, 3, 1)
            y = F.linear(by_pixel.flatten(0, 2), self.weight.flatten(1), bias)
            return y.view(*by_pixel.shape[:3], -1).permute(0, 3, 1, 2)
        return self._conv_forward(x, self.weight, bias)

    @property
    def can_split(self) -> bool:
        """Whether `conv_bf16x3` takes this layer."""
        return self.kernel_size in ((1, 1), (3, 3)) and not self.fused

    def ends_sums(self, x: torch.Tensor) -> bool:
        """Whether `added_to` may stand for a call with what is like x: a 1x1 convolution that nobody watches
        or has replaced, where the fused kernel runs."""
        return (
            self.kernel_size == (1, 1)
            and not self.fused
            and not has_hooks(self)
            and type(self).forward is Conv2d.forward
            and x.dtype == self.weight.dtype
            and not (x.device.type != "meta" and torch.is_autocast_enabled(x.device.type))
            and _is_matrix(x)
            and runs_triton("residual_conv1x1", x.device.type)
        )

    def added_to(
        self,
        h: torch.Tensor,
        x: torch.Tensor,
        scale: float,
        bias: torch.Tensor | None,
        *,
        second: torch.Tensor | None = None,
        pends: bool,
    ) -> torch.Tensor | PendingSum:
        """(h + bias + the layer's result for x, with `second` behind it) · scale: `residual_conv1x1`."""
        repeats = self.up and self.is_box
        if (self.up or self.down) and not repeats:
            x = self._resample(x)
            second = None if second is None else self._resample(second)
        out = residual_conv1x1(
            h, x, self.weight, scale, bias, self.bias, second=second, up=repeats, of_terms=pends,
            parts=self.parts,
        )  # fmt: skip
        return PendingSum(out, None, scale, bias, self.bias) if pends else out

    def _resample(self, x: torch.Tensor) -> torch.Tensor:
        return resample_2x(x, self.resample_filter, up=self.up, is_box=self.is_box)


def _is_matrix(x: torch.Tensor) -> bool:
    """Whether a pointwise convolution of x is a product of matrices on a GPU, which adds a bias for nothing
    where a convolution adds it in a pass of its own."""
    is_last = x.is_contiguous(memory_format=torch.channels_last)
    return is_last and x.numel() > 0 and runs_triton("residual", x.device.type)


class Resample(nn.Module):
    """Doubles or halves the resolution, with the buffer that EDM's layer of the same name has."""

    def __init__(self, *, up: bool, resample_filter: tuple[int, ...] = BOX_FILTER):
        super().__init__()
        self.up, self.is_box = up, tuple(resample_filter) == BOX_FILTER
        self.resample_filter: torch.Tensor
        self.register_buffer("resample_filter", normalised_filter(resample_filter))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return resample_2x(x, self.resample_filter, up=self.up, is_box=self.is_box)


def normalised_filter(taps: Sequence[int]) -> torch.Tensor:
    """The outer product of the taps, of sum 1: [1,1,k,k]."""
    row = torch.tensor(taps, dtype=torch.float32)
    return (torch.outer(row, row) / row.sum().square())[None, None]


def filter_padding(kernel: torch.Tensor) -> int:
    return (kernel.shape[-1] - 1) // 2


def resample_2x(x: torch.Tensor, kernel: torch.Tensor, *, up: bool, is_box: bool) -> torch.Tensor:
    """x [N,C,H,W] at twice or half the resolution, filtered with kernel [1,1,k,k]."""
    if is_box:
        if up:  # which CUDA's autocast does in fp32
            return F.interpolate(x, scale_factor=2, mode="nearest").to(x.dtype)
        return F.avg_pool2d(x, 2)
    weight = ((4 if up else 1) * kernel).to(x.dtype).expand(x.shape[1], 1, -1, -1)
    convolve = F.conv_transpose2d if up else F.conv2d
    return convolve(x, weight, stride=2, padding=filter_padding(kernel), groups=x.shape[1])


class GroupNorm(nn.Module):
    """Group normalisation over min(32, C/4) groups, with what `group_norm_silu` fuses into it."""

    def __init__(self, num_channels: int, eps: float):
        super().__init__()
        self.num_groups, self.eps = min(32, num_channels // 4), eps
        if self.num_groups == 0 or num_channels % self.num_groups:
            raise ValueError(
                "channels: the group normalisation needs a width of at least 4 that min(32, C/4) "
                f"groups divide, got C={num_channels}"
            )
        self.weight = nn.Parameter(torch.ones(num_channels))
        self.bias = nn.Parameter(torch.zeros(num_channels))

    def fused(self, **options) -> Callable[[torch.Tensor | PendingSum], Any]:
        """`forward` with these options, and with the parameters that stand here now: those of a
        `functional_call` are gone when it is computed again."""
        wide = torch.promote_types(self.weight.dtype, torch.float32)  # of a network cast as a whole
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        options |= dict(num_groups=self.num_groups, weight=weight, bias=bias, eps=self.eps)

        def run(x: torch.Tensor | PendingSum) -> Any:
            if isinstance(x, PendingSum):
                return group_norm_silu(**x._asdict(), summed=x.skip is None, **options)
            return group_norm_silu(x, **options)

        return run

    def forward(self, x: torch.Tensor | PendingSum) -> torch.Tensor:
        return self.fused()(x)


def heads(channels: int, channels_per_head: int | None) -> int:
    """How many heads an attention over `channels` has. ValueError where it does not come out even."""
    if channels_per_head is None:
        return 1
    require(
        channels % channels_per_head == 0,
        f"channels_per_head: must divide the width of every level with attention, {channels}, "
        f"got {channels_per_head}",
    )
    return channels // channels_per_head


class PositionalEmbedding(nn.Module):
    """cos|sin, or sin|cos, of c_noise [N] at frequencies spaced geometrically from 1 to 1/10000: [N,C]."""

    def __init__(
        self,
        num_channels: int,
        *,
        endpoint: bool,
        max_positions: int = 10_000,
        sin_first: bool = False,
    ):
        super().__init__()
        self.num_channels, self.endpoint, self.max_positions = num_channels, endpoint, max_positions
        self.sin_first = sin_first
        self.table: torch.Tensor
        self.register_buffer("table", self._table(torch.empty(0)), persistent=False)

    def _table(self, like: torch.Tensor) -> torch.Tensor:
        """Frequencies and phases [2,C] of sines, in like's dtype and on its device."""
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=like.dtype, device=like.device)
        freqs = self.max_positions ** -(exponent / (half - self.endpoint))
        phases = torch.zeros_like(freqs), torch.full_like(freqs, math.pi / 2)
        phases = phases if self.sin_first else phases[::-1]
        return torch.stack([freqs.repeat(2), torch.cat(phases)])

    def _apply(self, fn, recurse=True):
        super()._apply(fn, recurse)
        self.table = self._table(self.table)  # moved it may be empty, cast it would be rounded
        return self

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        is_ready = (self.table.dtype, self.table.device) == (c_noise.dtype, c_noise.device)
        freqs, phases = self.table if is_ready else self._table(c_noise)
        return torch.addcmul(phases, c_noise[:, None], freqs).sin()


class FourierEmbedding(nn.Module):
    """cos|sin, or sin|cos, of 2 pi freqs c_noise [N] at Gaussian frequencies of standard deviation `scale`:
    [N,C]."""

    def __init__(self, num_channels: int, scale: float = 16.0, *, sin_first: bool = False):
        super().__init__()
        self.sin_first = sin_first
        self.freqs: torch.Tensor
        self.register_buffer("freqs", scale * torch.randn(num_channels // 2))

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        angle = torch.outer(c_noise, 2 * math.pi * self.freqs.to(c_noise.dtype))
        parts = [angle.cos(), angle.sin()]
        return torch.cat(parts[::-1] if self.sin_first else parts, 1)
