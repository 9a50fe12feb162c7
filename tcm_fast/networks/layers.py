"""The layers of EDM's U-Nets (Karras et al. 2022, appendix C), on the fused operations."""

import math
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.kernels.dropout import DropoutKey
from tcm_fast.kernels.group_norm_silu import group_norm_silu
from tcm_fast.kernels.qkv_attention import qkv_attention
from tcm_fast.networks.recompute import after_norm

BOX_FILTER = (1, 1)


def fresh_key(n: int, device: torch.device) -> DropoutKey:
    """A key for `n` samples that nobody else uses, drawn from torch's default CPU generator."""
    seed = torch.randint(2**31, (), device="cpu").to(device, non_blocking=True)
    return DropoutKey(seed=seed, step=0, layer=0, sample=torch.arange(n, device=device))


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """An fp32 island; the meta device has no autocast to be switched off."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


class Linear(nn.Linear):
    """A linear layer with EDM's initialisation: Xavier-uniform weights times `gain`, biases 0."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool = True, gain: float = 1.0
    ):
        self.gain = gain
        super().__init__(in_features, out_features, bias)

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, self.gain)
        if self.bias is not None:
            nn.init.zeros_(self.bias)


class Conv2d(nn.Conv2d):
    """A "same" convolution that may double (`up`) or halve (`down`) the resolution first.

    Resampling filters with the outer product of `resample_filter`, normalised; the weights are
    initialised as in `Linear`. The persistent buffer `resample_filter` [1,1,k,k] exists where the
    layer resamples.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        up: bool = False,
        down: bool = False,
        resample_filter: tuple[int, ...] = BOX_FILTER,
        gain: float = 1.0,
    ):
        assert not (up and down)
        self.gain = gain
        super().__init__(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
        self.up, self.down = up, down
        self.is_box = tuple(resample_filter) == BOX_FILTER
        self.resample_filter: torch.Tensor
        if up or down:
            taps = torch.tensor(resample_filter, dtype=torch.float32)
            weights = torch.outer(taps, taps) / taps.sum().square()
            self.register_buffer("resample_filter", weights[None, None])

    def reset_parameters(self) -> None:
        nn.init.xavier_uniform_(self.weight, self.gain)
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor, *, with_bias: bool = True) -> torch.Tensor:
        """`with_bias=False` leaves the bias to who reads the result."""
        bias = self.bias if with_bias else None
        if self.up and self.is_box and self.kernel_size == (1, 1):
            # Repeating pixels commutes with a pointwise convolution: a quarter of the work.
            return self._upsample(self._conv_forward(x, self.weight, bias))
        if self.up:
            x = self._upsample(x)
        elif self.down:
            x = self._downsample(x)
        return self._conv_forward(x, self.weight, bias)

    def _upsample(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_box:
            return F.interpolate(x, scale_factor=2, mode="nearest")
        weight, padding = self._depthwise(x, gain=4)
        return F.conv_transpose2d(x, weight, stride=2, padding=padding, groups=x.shape[1])

    def _downsample(self, x: torch.Tensor) -> torch.Tensor:
        if self.is_box:
            return F.avg_pool2d(x, 2)
        weight, padding = self._depthwise(x, gain=1)
        return F.conv2d(x, weight, stride=2, padding=padding, groups=x.shape[1])

    def _depthwise(self, x: torch.Tensor, gain: int) -> tuple[torch.Tensor, int]:
        weight = (self.resample_filter * gain).to(x.dtype)
        return weight.expand(x.shape[1], 1, -1, -1), (weight.shape[-1] - 1) // 2


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

    def forward(self, x: torch.Tensor, **fused) -> Any:
        wide = torch.promote_types(self.weight.dtype, torch.float32)  # of a network cast as a whole
        weight, bias = self.weight.to(wide), self.bias.to(wide)
        return group_norm_silu(x, self.num_groups, weight, bias, self.eps, **fused)


class PositionalEmbedding(nn.Module):
    """cos|sin of c_noise [N] at frequencies spaced geometrically from 1 to 1/10000: [N,C]."""

    def __init__(self, num_channels: int, *, endpoint: bool, max_positions: int = 10_000):
        super().__init__()
        self.num_channels, self.endpoint, self.max_positions = num_channels, endpoint, max_positions

    def forward(self, c_noise: torch.Tensor) -> torch.Tensor:
        half = self.num_channels // 2
        exponent = torch.arange(half, dtype=c_noise.dtype, device=c_noise.device)
        freqs = self.max_positions ** -(exponent / (half - self.endpoint))
        angle = torch.outer(c_noise, freqs)
        return torch.cat([angle.cos(), angle.sin()], 1)


class UNetBlock(nn.Module):
    """The residual block of DDPM++ and NCSN++, with self-attention after it where asked for.

    forward(x [N,C,H,W], emb [N,emb_channels], dropout_key) -> [N,out_channels,H',W'] with H' = 2H
    (`up`), H/2 (`down`) or H. The embedding is added before the second normalisation; both sums are
    scaled by √½. A block that resamples has a 1x1 skip convolution even where the width stays.
    `layer` is the number that keys the block's dropout.
    """

    skip_scale = math.sqrt(0.5)
    recompute_norms = recompute_whole = False
    """What the backward pass computes again, see `tcm_fast.networks.recompute`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        layer: int,
        dropout: float,
        up: bool = False,
        down: bool = False,
        attention: bool = False,
        resample_filter: tuple[int, ...] = BOX_FILTER,
        eps: float = 1e-6,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.layer, self.dropout, self.attention = layer, dropout, attention
        resample: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample)
        self.affine = Linear(emb_channels, out_channels)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=1e-5)
        needs_skip = in_channels != out_channels or up or down
        self.skip = Conv2d(in_channels, out_channels, 1, **resample) if needs_skip else None
        if attention:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, gain=math.sqrt(0.2))
            self.proj = Conv2d(out_channels, out_channels, 1, gain=1e-5)

    def forward(
        self, x: torch.Tensor, emb: torch.Tensor, dropout_key: DropoutKey | None = None
    ) -> torch.Tensor:
        run = partial(after_norm, recompute=self.recompute_norms)
        # Where x also goes past a normalisation, its two gradients meet in that one's kernel.
        h, x = run(partial(self.norm0, with_x=True), self.conv0, x, with_bias=False)
        skip = x if self.skip is None else self.skip(x)
        # A bias before the embedding is one with it: no pass over the pixels adds it, none sums its
        # gradient.
        add = self.affine(emb) + self.conv0.bias
        p = self.dropout if self.training else 0.0
        key = dropout_key.at_layer(self.layer) if p > 0 and dropout_key is not None else None
        x = run(
            lambda h, add: self.norm1(h, add=add, dropout_p=p, dropout_key=key), self.conv1, h, add
        )
        x = (x + skip).mul_(self.skip_scale)
        if self.attention:
            qkv, x = run(partial(self.norm2, silu=False, with_x=True), self.qkv, x)
            x = (self.proj(qkv_attention(qkv, num_heads=1)) + x).mul_(self.skip_scale)
        return x
