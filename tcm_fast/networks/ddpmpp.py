"""DDPM++ and NCSN++ as EDM trains them (Song et al. 2021; Karras et al. 2022, table 7)."""

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F

from tcm_fast.config import require
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.networks.layers import (
    BOX_FILTER,
    Conv2d,
    FourierEmbedding,
    GroupNorm,
    Linear,
    PendingSum,
    PositionalEmbedding,
    without_autocast,
)
from tcm_fast.networks.recognition import Weights, filter_taps, multiples
from tcm_fast.networks.unet import EDMUNet, Place, level_resolutions
from tcm_fast.networks.unet_block import UNetBlock


class SongUNet(EDMUNet):
    """The raw network F(x, c_noise) of DDPM++, or of NCSN++ (`NCSNpp`).

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
        dropout_resolutions: of the blocks that drop; None is all.
        label_dropout: share of the labels set to 0 in training, for classifier-free guidance.
        embedding_type: of the noise level, "positional" or "fourier".
        fourier_scale: standard deviation of the Fourier embedding's frequencies (iCT: 0.02).
        channel_mult_noise: width of the noise level's embedding over model_channels.
        encoder_type: "standard", or "residual": the image, halved again and again, is added to every
            level.
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
        dropout_resolutions: Sequence[int] | None = None,
        label_dropout: float = 0.0,
        embedding_type: str = "positional",
        fourier_scale: float = 16.0,
        channel_mult_noise: int = 1,
        encoder_type: str = "standard",
        resample_filter: Sequence[int] = BOX_FILTER,
    ):
        super().__init__(dropout, label_dropout, dropout_resolutions)
        resolutions = level_resolutions(
            img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions,
            dropout_resolutions,
        )  # fmt: skip
        for name, given, known in (
            ("embedding_type", embedding_type, ("positional", "fourier")),
            ("encoder_type", encoder_type, ("standard", "residual")),
        ):
            require(given in known, f"{name}: must be {' or '.join(known)}, got {given!r}")
        emb_channels = model_channels * channel_mult_emb
        noise_channels = model_channels * channel_mult_noise
        self.map_noise = (
            PositionalEmbedding(noise_channels, endpoint=True, sin_first=True)
            if embedding_type == "positional"
            else FourierEmbedding(noise_channels, fourier_scale, sin_first=True)
        )
        self.map_label = Linear(label_dim, noise_channels) if label_dim else None
        self.map_augment = Linear(augment_dim, noise_channels, bias=False) if augment_dim else None
        self.map_layer0 = Linear(noise_channels, emb_channels)
        self.map_layer1 = Linear(emb_channels, emb_channels)

        taps = tuple(resample_filter)

        def block(layer: int, c_in: int, c_out: int, at: Place) -> UNetBlock:
            is_last = at.side == "dec" and at.index == num_blocks
            attention = at.attends(attn_resolutions if at.side == "enc" or is_last else ())
            return UNetBlock(
                c_in, c_out, emb_channels,
                layer=layer, dropout=self.dropout_at(at.resolution), up=at.kind == "up",
                down=at.kind == "down", attention=attention, resample_filter=taps,
            )  # fmt: skip

        width_aux = in_channels

        def residual(width: int) -> Conv2d:
            nonlocal width_aux
            width_aux, before = width, width_aux
            return Conv2d(before, width, 3, down=True, fused=True, resample_filter=taps)

        width = self.assemble(
            resolutions,
            [model_channels * mult for mult in channel_mult],
            num_blocks,
            Conv2d(in_channels, model_channels, 3),
            model_channels,
            block,
            residual if encoder_type == "residual" else None,
        )
        name = f"{img_resolution}x{img_resolution}_aux"
        self.dec[f"{name}_norm"] = GroupNorm(width, eps=1e-6)
        self.dec[f"{name}_conv"] = Conv2d(width, out_channels, 3, gain=1e-5)
        self.last_bias = f"dec.{name}_conv.bias"

    @classmethod
    def owns(cls, names: Collection[str]) -> bool:
        has_block = any(name.endswith(".conv0.weight") for name in names)
        return has_block and "model.out_norm.weight" not in names

    @classmethod
    def own_arguments(cls, weights: Weights, widths: list[int], stem: int) -> dict[str, Any]:
        spec = cls.edm_arguments(weights, widths, stem)
        is_fourier = "model.map_noise.freqs" in weights.shapes
        is_residual = any("_aux_residual." in name for name in weights.shapes)
        filters = [n for n in weights.shapes if n.endswith("_down.conv0.resample_filter")]
        noise = weights.shapes["model.map_layer0.weight"][1]
        return spec | {
            "name": "ncsnpp" if is_fourier or is_residual else "ddpmpp",
            "embedding_type": "fourier" if is_fourier else "positional",
            "channel_mult_noise": multiples([noise], stem)[0],
            "encoder_type": "residual" if is_residual else "standard",
            "resample_filter": filter_taps(weights, filters[0]) if filters else [1, 1],
        }

    def output(self, x: torch.Tensor | PendingSum) -> torch.Tensor:
        *_, norm, conv = self.dec.values()
        return conv(norm(x))

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
            if self.map_label is not None:
                labels = self.dropped_labels(class_labels, dropout_key, dtype)
                emb = emb + self.map_label(labels * math.sqrt(self.map_label.in_features))
            if self.map_augment is not None and augment_labels is not None:
                emb = emb + self.map_augment(augment_labels.to(dtype))
            emb = F.silu(self.map_layer0(emb))
            return F.silu(self.map_layer1(emb))


NCSNpp = partial(
    SongUNet,
    embedding_type="fourier",
    channel_mult_noise=2,
    encoder_type="residual",
    resample_filter=(1, 3, 3, 1),
)
"""The raw network of NCSN++: Fourier features, a residual encoder, a wider filter."""
