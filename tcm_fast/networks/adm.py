"""ADM (Dhariwal & Nichol 2021) as EDM trains it on ImageNet-64 (Karras et al. 2022, table 7)."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks.layers import (
    Conv2d,
    GroupNorm,
    Linear,
    PendingSum,
    PositionalEmbedding,
    without_autocast,
)
from tcm_fast.networks.recognition import Weights
from tcm_fast.networks.unet import EDMUNet, Place, level_resolutions
from tcm_fast.networks.unet_block import UNetBlock

CHANNELS_PER_HEAD = 64


class DhariwalUNet(EDMUNet):
    """The raw network F(x, c_noise) of ADM.

    Args:
        img_resolution: height and width, divisible by 2^(levels - 1).
        in_channels, out_channels: channels of the images.
        label_dim: number of classes, 0 for an unconditional network.
        augment_dim: number of augmentation parameters, 0 for none.
        model_channels: width; level i has model_channels * channel_mult[i] channels.
        channel_mult: widths of the levels; every level halves the resolution.
        channel_mult_emb: width of the embedding over model_channels.
        num_blocks: residual blocks of an encoder level (a decoder level has one more).
        attn_resolutions: levels whose blocks have self-attention, 64 channels a head. The lowest
            level's first decoder block has it always, those that resample never.
        dropout: share dropped before each second convolution.
        dropout_resolutions: of the blocks that drop; None is all.
        label_dropout: share of the labels set to 0 in training, for classifier-free guidance.

    Raises:
        ValueError: a resolution that cannot be halved often enough, widths that cannot be built.
    """

    last_bias = "out_conv.bias"

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        augment_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        channel_mult_emb: int = 4,
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (32, 16, 8),
        dropout: float = 0.1,
        dropout_resolutions: Sequence[int] | None = None,
        label_dropout: float = 0.0,
    ):
        super().__init__(dropout, label_dropout, dropout_resolutions)
        resolutions = level_resolutions(
            img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions,
            dropout_resolutions,
        )  # fmt: skip
        emb_channels = model_channels * channel_mult_emb
        self.map_noise = PositionalEmbedding(model_channels, endpoint=False)
        self.map_augment = (
            Linear(augment_dim, model_channels, bias=False, gain=0, init="kaiming")
            if augment_dim
            else None
        )
        self.map_layer0 = Linear(model_channels, emb_channels, init="kaiming")
        self.map_layer1 = Linear(emb_channels, emb_channels, init="kaiming")
        self.map_label = Linear(label_dim, emb_channels, bias=False) if label_dim else None
        if self.map_label is not None:
            nn.init.normal_(self.map_label.weight)

        def block(layer: int, c_in: int, c_out: int, at: Place) -> UNetBlock:
            return UNetBlock(
                c_in, c_out, emb_channels,
                layer=layer, dropout=self.dropout_at(at.resolution), up=at.kind == "up",
                down=at.kind == "down", attention=at.attends(attn_resolutions), adaptive_scale=True,
                skip_scale=1.0, channels_per_head=CHANNELS_PER_HEAD, resample_proj=False, eps=1e-5,
                init="kaiming", init_last=0.0, init_attention=1.0,
            )  # fmt: skip

        widths = [model_channels * mult for mult in channel_mult]
        stem = Conv2d(in_channels, widths[0], 3, init="kaiming")
        width = self.assemble(resolutions, widths, num_blocks, stem, widths[0], block)
        self.out_norm = GroupNorm(width, eps=1e-5)
        self.out_conv = Conv2d(width, out_channels, 3, gain=0, init="kaiming")

    @classmethod
    def owns(cls, names: Collection[str]) -> bool:
        return "model.out_norm.weight" in names

    @classmethod
    def own_arguments(cls, weights: Weights, widths: list[int], stem: int) -> dict[str, Any]:
        return {"name": "adm", **cls.edm_arguments(weights, widths, 0)}

    def output(self, x: torch.Tensor | PendingSum) -> torch.Tensor:
        return self.out_conv(self.out_norm(x))

    def embed(
        self,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        dropout_key: PhiloxKey | None = None,
    ) -> torch.Tensor:
        dtype = self.map_layer0.weight.dtype
        with without_autocast(noise_labels.device):
            emb = self.map_noise(noise_labels).to(dtype)
            if self.map_augment is not None and augment_labels is not None:
                emb = emb + self.map_augment(augment_labels.to(dtype))
            emb = self.map_layer1(F.silu(self.map_layer0(emb)))
            if self.map_label is not None:
                emb = emb + self.map_label(self.dropped_labels(class_labels, dropout_key, dtype))
            return F.silu(emb)
