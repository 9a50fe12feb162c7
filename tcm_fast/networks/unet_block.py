"""The residual block of EDM's U-Nets (Karras et al. 2022, appendix C)."""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.kernels._triton import runs_triton
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.qkv_attention import qkv_attention
from tcm_fast.networks.layers import (
    BOX_FILTER,
    Conv2d,
    GroupNorm,
    Linear,
    PendingSum,
    Resample,
    carried_out,
    heads,
)
from tcm_fast.networks.raw_network import Block, Modulation
from tcm_fast.networks.recompute import after_norm


class UNetBlock(Block):
    """The residual block of DDPM++, NCSN++ and ADM, with self-attention after it where asked for.

    forward(x [N,C,H,W], emb [N,emb_channels], dropout_key) -> [N,out_channels,H',W'] with H' = 2H
    (`up`), H/2 (`down`) or H; a network that has the block's `modulations` already hands them on in emb's
    place. x may be the pending sum of the block before, and with `pends` the result is such a one where its
    sum is a kernel. `second` is joined to x along the channels. With `returns_x` the result comes with x, for
    another reader. `layer` is the number that keys the block's dropout.

    Args:
        adaptive_scale: the embedding scales and shifts after the second normalisation (ADM) instead of
            being added before it.
        skip_scale: factor of both sums.
        channels_per_head: of the attention; None is one head.
        resample_proj: a block that resamples has a 1x1 skip convolution even where the width stays.
        eps: of the normalisations.
        init: of the layers, "xavier" or "kaiming"; `init_last` is the gain of the layers that end a
            branch, `init_attention` that of the q, k, v layer.
    """

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
        adaptive_scale: bool = False,
        skip_scale: float = math.sqrt(0.5),
        channels_per_head: int | None = None,
        resample_proj: bool = True,
        eps: float = 1e-6,
        init: str = "xavier",
        init_last: float = 1e-5,
        init_attention: float = math.sqrt(0.2),
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.layer, self.dropout, self.attention = layer, dropout, attention
        self.adaptive_scale, self.skip_scale = adaptive_scale, skip_scale
        self.num_heads = heads(out_channels, channels_per_head) if attention else 0
        resample: dict[str, Any] = {"up": up, "down": down, "resample_filter": resample_filter}
        self.norm0 = GroupNorm(in_channels, eps)
        self.conv0 = Conv2d(in_channels, out_channels, 3, **resample, init=init)
        self.affine = Linear(emb_channels, out_channels * (1 + adaptive_scale), init=init)
        self.norm1 = GroupNorm(out_channels, eps)
        self.conv1 = Conv2d(out_channels, out_channels, 3, gain=init_last, init=init)
        self.skip: nn.Module | None = None
        if in_channels != out_channels or ((up or down) and resample_proj):
            self.skip = Conv2d(in_channels, out_channels, 1, **resample, init=init)
        elif up or down:
            self.skip = Resample(up=up, resample_filter=resample_filter)
        if attention:
            self.norm2 = GroupNorm(out_channels, eps)
            self.qkv = Conv2d(out_channels, 3 * out_channels, 1, gain=init_attention, init=init)
            self.proj = Conv2d(out_channels, out_channels, 1, gain=init_last, init=init)

    def forward(
        self,
        x: torch.Tensor | PendingSum,
        emb: torch.Tensor | Modulation,
        dropout_key: PhiloxKey | None = None,
        *,
        second: torch.Tensor | None = None,
        returns_x: bool = False,
        pends: bool = False,
    ) -> Any:
        if self.recompute_norms:  # which keeps what is normalised, and not its parts
            x = carried_out(x)
        assert second is None or not returns_x
        first = x.x if isinstance(x, PendingSum) else x
        is_kernel = runs_triton("residual", first.device.type)
        ends_skip = isinstance(self.skip, Conv2d) and self.skip.ends_sums(first)
        if second is not None and (self.recompute_norms or not is_kernel):
            x, second = torch.cat([carried_out(x), second], 1), None
        # Where x also goes past a normalisation, its gradients meet in that one's kernel.
        run = partial(after_norm, recompute=self.recompute_norms)
        norm0 = self.norm0.fused(with_x=True, twice=returns_x, second=second)
        h, skip, *past = run(norm0, self.conv0, x, with_bias=False)
        if second is not None:
            second = past.pop()
            if not ends_skip:
                skip, second = torch.cat([skip, second], 1), None
        # Where a sum is a kernel, the biases of the layers before go in there, and it waits for the
        # normalisation after it, or a 1x1 convolution carries it out; elsewhere the convolutions add them
        # for nothing, and nothing is gained.
        waits = is_kernel and not self.recompute_norms
        skip_bias = None
        if isinstance(self.skip, Conv2d):
            if not ends_skip:
                skip = self.skip(skip, with_bias=not is_kernel)
                skip_bias = self.skip.bias if is_kernel else None
        elif self.skip is not None:
            skip = self.skip(skip)
        fused = emb if isinstance(emb, dict) else modulations([self], emb)[0]
        p = self.dropout if self.training else 0.0
        key = dropout_key.at_layer(self.layer) if p > 0 and dropout_key is not None else None
        norm1 = self.norm1.fused(**fused, dropout_p=p, dropout_key=key)
        h = run(norm1, self.conv1, h, with_bias=not is_kernel)
        bias = self.conv1.bias if is_kernel else None
        end: torch.Tensor | PendingSum = PendingSum(h, skip, self.skip_scale, bias, skip_bias)
        if ends_skip:
            assert isinstance(self.skip, Conv2d)
            pends_here = waits if self.attention else pends
            end = self.skip.added_to(
                h, skip, self.skip_scale, bias, second=second, pends=pends_here
            )
        if self.attention:
            between = end if waits else carried_out(end)
            qkv, skip = run(self.norm2.fused(silu=False, with_x=True), self.qkv, between)
            attended = qkv_attention(qkv, num_heads=self.num_heads)
            if isinstance(self.proj, Conv2d) and self.proj.ends_sums(attended):
                end = self.proj.added_to(skip, attended, self.skip_scale, None, pends=pends)
            else:
                h = self.proj(attended, with_bias=not is_kernel)
                bias = self.proj.bias if is_kernel else None
                end = PendingSum(h, skip, self.skip_scale, bias, None)
        out = end if pends and is_kernel else carried_out(end)
        return (out, *past) if returns_x else out


def modulations(blocks: Sequence[UNetBlock], emb: torch.Tensor) -> list[Modulation]:
    """What an embedding [N,emb_channels] gives to the second normalisation of each of a network's blocks, as
    views of one product's columns: one launch for all, and three for all their gradients.

    The bias of the convolution before that normalisation is in it: no pass over the pixels adds it, none
    sums its gradient.
    """
    affine = [block.affine for block in blocks]
    biases = [bias for bias in (block.conv0.bias for block in blocks) if bias is not None]
    widths = [block.out_channels for block in blocks]
    weight = torch.cat([layer.weight for layer in affine])
    if blocks[0].adaptive_scale:
        both = F.linear(emb, weight, torch.cat([layer.bias for layer in affine]))
        parts = both.split([width for width in widths for _ in range(2)], 1)
        adds = torch.cat(biases).expand(emb.shape[0], -1).split(widths, 1)
        return [
            {"add": add, "scale": scale, "shift": shift}
            for add, scale, shift in zip(adds, parts[::2], parts[1::2], strict=True)
        ]
    bias = torch.cat([layer.bias for layer in affine] + biases).view(2, -1).sum(0)
    return [{"add": part} for part in F.linear(emb, weight, bias).split(widths, 1)]
