"""DDPM++ as EDM trains it (Song et al. 2021; Karras et al. 2022, table 7)."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.config import require
from tcm_fast.kernels.dropout import DropoutKey, dropout_mask
from tcm_fast.networks.layers import (
    BOX_FILTER,
    Conv2d,
    GroupNorm,
    Linear,
    PositionalEmbedding,
    UNetBlock,
    fresh_key,
    without_autocast,
)
from tcm_fast.networks.recompute import run_block

# Beyond the numbers of the dropout layers, which count up from 0, and below those that key noise.
LABEL_LAYER = 0x7FFF_FFFF


class SongUNet(nn.Module):
    """The raw network F(x, c_noise) of DDPM++.

    Args:
        img_resolution: height and width, divisible by 2^(levels - 1).
        in_channels, out_channels: channels of the images.
        label_dim: number of classes, 0 for an unconditional network.
        augment_dim: number of augmentation parameters, 0 for none.
        model_channels: width; level i has model_channels * channel_mult[i] channels.
        channel_mult: widths of the levels; every level halves the resolution.
        channel_mult_emb: width of the embedding over model_channels.
        num_blocks: residual blocks of an encoder level (a decoder level has one more).
        attn_resolutions: levels with self-attention: in every encoder block, and in the last
            decoder block. The lowest level's first decoder block has it always.
        dropout: share dropped before each second convolution.
        label_dropout: share of the labels set to 0 in training, for classifier-free guidance.
        resample_filter: taps of the up- and down-sampling filter.

    Raises:
        ValueError: a resolution that cannot be halved often enough, widths that cannot be built.
    """

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 128,
        channel_mult: Sequence[int] = (2, 2, 2),
        channel_mult_emb: int = 4,
        num_blocks: int = 4,
        attn_resolutions: Sequence[int] = (16,),
        dropout: float = 0.13,
        label_dropout: float = 0.0,
        resample_filter: Sequence[int] = BOX_FILTER,
    ):
        super().__init__()
        levels = len(channel_mult)
        require(levels >= 1, "channel_mult: needs at least one level, got none")
        require(
            img_resolution >= 1 and img_resolution % 2 ** (levels - 1) == 0,
            f"img_resolution: must be divisible by {2 ** (levels - 1)} for the {levels} levels of "
            f"channel_mult, got {img_resolution}",
        )
        require(
            model_channels >= 4 and model_channels % 2 == 0,
            f"model_channels: must be even and at least 4, got {model_channels}",
        )
        require(num_blocks >= 1, f"num_blocks: must be at least 1, got {num_blocks}")
        for name, p in (("dropout", dropout), ("label_dropout", label_dropout)):
            require(0 <= p < 1, f"{name}: must lie in [0, 1), got {p}")
        self.dropout, self.label_dropout = dropout, label_dropout
        emb_channels = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels, endpoint=True)
        self.map_label = Linear(label_dim, model_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, model_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(model_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        layer = 0

        def block(c_in: int, c_out: int, **options) -> UNetBlock:
            nonlocal layer
            layer += 1
            return UNetBlock(
                c_in, c_out, emb_channels,
                layer=layer - 1, dropout=dropout, resample_filter=tuple(resample_filter), **options,
            )  # fmt: skip

        widths = [model_channels * mult for mult in channel_mult]
        resolutions = [img_resolution >> level for level in range(levels)]
        lowest = resolutions[-1]

        self.enc = nn.ModuleDict()
        self.enc[f"{img_resolution}x{img_resolution}_conv"] = Conv2d(in_channels, model_channels, 3)
        skips = [width := model_channels]
        for res, c_out in zip(resolutions, widths, strict=True):
            if res != img_resolution:
                self.enc[f"{res}x{res}_down"] = block(width, width, down=True)
                skips.append(width)
            for index in range(num_blocks):
                self.enc[f"{res}x{res}_block{index}"] = block(
                    width, c_out, attention=res in attn_resolutions
                )
                skips.append(width := c_out)

        self.dec = nn.ModuleDict()
        for res, c_out in zip(reversed(resolutions), reversed(widths), strict=True):
            if res == lowest:
                self.dec[f"{res}x{res}_in0"] = block(width, width, attention=True)
                self.dec[f"{res}x{res}_in1"] = block(width, width)
            else:
                self.dec[f"{res}x{res}_up"] = block(width, width, up=True)
            for index in range(num_blocks + 1):
                self.dec[f"{res}x{res}_block{index}"] = block(
                    width + skips.pop(),
                    c_out,
                    attention=index == num_blocks and res in attn_resolutions,
                )
                width = c_out
        assert not skips
        name = f"{img_resolution}x{img_resolution}_aux"
        self.dec[f"{name}_norm"] = GroupNorm(width, eps=1e-6)
        self.dec[f"{name}_conv"] = Conv2d(width, out_channels, 3, gain=1e-5)

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> torch.Tensor:
        """F [N,out_channels,H,W] for x [N,in_channels,H,W] in the weights' dtype, noise_labels [N]
        (c_noise), class_labels one-hot [N,label_dim] and augment_labels [N,augment_dim]."""
        if dropout_key is None and self.training and (self.dropout > 0 or self.label_dropout > 0):
            dropout_key = fresh_key(len(x), x.device)
        emb = self.embed(noise_labels, class_labels, augment_labels, dropout_key).to(x.dtype)
        skips: list[torch.Tensor] = []
        for block in self.enc.values():
            is_block = isinstance(block, UNetBlock)
            x = run_block(block, [x], emb, dropout_key) if is_block else block(x)
            if not skips:
                x = x.contiguous(memory_format=self.memory_format)
            skips.append(x)
        *blocks, norm, conv = self.dec.values()
        for block in blocks:
            merges = block.in_channels != x.shape[1]
            x = run_block(block, [x, skips.pop()] if merges else [x], emb, dropout_key)
        return conv(norm(x))

    def embed(
        self,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        dropout_key: DropoutKey | None = None,
    ) -> torch.Tensor:
        """The embedding [N,emb_channels] of noise level, class and augmentation."""
        dtype = self.map_layer0.weight.dtype
        with without_autocast(noise_labels.device):
            cos, sin = self.map_noise(noise_labels).chunk(2, 1)
            emb = torch.cat([sin, cos], 1).to(dtype)
            if self.map_label is not None:
                assert class_labels is not None
                classes = class_labels.to(dtype) * math.sqrt(self.map_label.in_features)
                if self.training and self.label_dropout > 0:
                    assert dropout_key is not None
                    key = dropout_key.at_layer(LABEL_LAYER)
                    shape = (len(classes), 1, 1, 1)
                    kept = dropout_mask(key, self.label_dropout, shape, classes.device)
                    classes = classes * kept.reshape(-1, 1)
                emb = emb + self.map_label(classes)
            if self.map_augment is not None and augment_labels is not None:
                emb = emb + self.map_augment(augment_labels.to(dtype))
            emb = F.silu(self.map_layer0(emb))
            return F.silu(self.map_layer1(emb))

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of the weights, and so of the activations."""
        # Not the first convolution's: with an image's few channels its layout can be ambiguous.
        block = next(iter(self.dec.values()))
        assert isinstance(block, UNetBlock)
        weight = block.conv0.weight
        is_channels_last = weight.is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if is_channels_last else torch.contiguous_format
