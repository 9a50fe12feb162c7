"""EDM2's magnitude-preserving U-Net (Karras et al. 2024, configuration G) on the fused operations."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.modulate_mp_silu import modulate_mp_silu
from tcm_fast.kernels.mp_cat_mp_silu import mp_cat_mp_silu
from tcm_fast.kernels.mp_sum import mp_sum
from tcm_fast.kernels.pixel_norm_mp_silu import pixel_norm_mp_silu
from tcm_fast.kernels.qkv_attention import qkv_attention
from tcm_fast.kernels.resample import resample
from tcm_fast.networks.by_sample import scales_and_gains
from tcm_fast.networks.layers import heads, without_autocast
from tcm_fast.networks.mp_layers import MPConv, MPFourier, joined, mp_silu
from tcm_fast.networks.raw_network import Block, Modulation
from tcm_fast.networks.recognition import Weights, multiples
from tcm_fast.networks.recompute import after_norm, run_block
from tcm_fast.networks.unet import Place, UNet, level_resolutions

RES_BALANCE = ATTN_BALANCE = 0.3
CONCAT_BALANCE = LABEL_BALANCE = 0.5
CLIP = 256.0


class EDM2Block(Block):
    """A residual block of the encoder or the decoder, with self-attention after it where asked for.

    `resampling` is "up", "down" or None; `layer` keys the block's dropout.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_channels: int,
        *,
        encoder: bool,
        layer: int,
        dropout: float,
        resampling: str | None = None,
        attention: bool = False,
        channels_per_head: int = 64,
    ):
        super().__init__()
        self.in_channels, self.out_channels = in_channels, out_channels
        self.encoder, self.layer, self.dropout = encoder, layer, dropout
        self.resampling = resampling
        self.num_heads = heads(out_channels, channels_per_head) if attention else 0
        self.emb_gain = nn.Parameter(torch.zeros(()))
        self.conv_res0 = MPConv(out_channels if encoder else in_channels, out_channels, 3)
        self.emb_linear = MPConv(emb_channels, out_channels)
        self.conv_res1 = MPConv(out_channels, out_channels, 3)
        self.conv_skip = (
            MPConv(in_channels, out_channels, 1) if in_channels != out_channels else None
        )
        if attention:
            self.attn_qkv = MPConv(out_channels, 3 * out_channels, 1)
            self.attn_proj = MPConv(out_channels, out_channels, 1)

    def forward(
        self,
        x: torch.Tensor,
        emb: torch.Tensor | Modulation,
        key: PhiloxKey | None = None,
        *,
        skip: torch.Tensor | None = None,
        activated: torch.Tensor | None = None,
        activates: bool = False,
        twice: bool = False,
        with_x: bool = False,
    ) -> Any:
        """x [N,in_channels,H,W], emb [N,emb_channels] -> [N,out_channels,H',W'], and mp_silu of it if
        `activates`, else None; with `twice` the first again, as `mp_sum` gives it; with `with_x` what an
        encoder block normalises, as `pixel_norm_mp_silu` gives it.

        A decoder block merges `skip` into x, or has been given `activated`, mp_silu(x), or resamples. A
        network that has `emb_linear(emb)` of all its blocks hands the block's on in emb's place, with its
        gain.
        """
        run, past_norm = partial(after_norm, recompute=self.recompute_norms), []
        if skip is not None:
            h, x = run(_joined, self.conv_res0, x, skip)
        elif self.encoder:
            if self.resampling is not None:
                x, _ = resample(x, self.resampling)
            if self.conv_skip is not None:
                x = self.conv_skip(x)
            h, x, *past_norm = run(partial(_normalised, with_x=with_x), self.conv_res0, x)
        elif self.resampling is not None:
            x, h = resample(x, self.resampling, with_silu=True)
            h = self.conv_res0(h)
        else:
            assert activated is not None
            h = self.conv_res0(activated)
        p = self.dropout if self.training else 0.0
        key = key.at_layer(self.layer) if p > 0 and key is not None else None
        modulate = partial(modulate_mp_silu, dropout_p=p, dropout_key=key)
        if not isinstance(emb, dict):
            emb = {"scale": self.emb_linear(emb), "gain": self.emb_gain}
        h = run(modulate, self.conv_res1, h, emb["scale"], emb["gain"])
        if not self.encoder and self.conv_skip is not None:
            x = self.conv_skip(x)
        if not self.num_heads:
            out = mp_sum(x, h, RES_BALANCE, clip=CLIP, with_silu=activates, twice=twice)
            return *out, *past_norm
        x, _, past = mp_sum(x, h, RES_BALANCE, twice=True)
        h = self.attn_proj(qkv_attention(self.attn_qkv(x), self.num_heads, normalize=True))
        out = mp_sum(past, h, ATTN_BALANCE, clip=CLIP, with_silu=activates, twice=twice)
        return *out, *past_norm


def _normalised(x: torch.Tensor, with_x: bool) -> tuple[torch.Tensor, ...]:
    """mp_silu of x normalised, x normalised, and x where asked for."""
    x, h, *past = pixel_norm_mp_silu(x, with_x=with_x)
    return h, x, *past


def _joined(x: torch.Tensor, skip: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """mp_silu of x and skip joined, and the two joined."""
    x, h = mp_cat_mp_silu(x, skip, CONCAT_BALANCE)
    return h, x


class EDM2UNet(UNet):
    """The raw network F(x, c_noise) of EDM2.

    Args:
        img_resolution: height and width, divisible by 2^(levels - 1).
        in_channels, out_channels: channels of the images.
        label_dim: number of classes, 0 for an unconditional network.
        model_channels: width; level i has model_channels * channel_mult[i] channels. At 64² XS, S, M, L
            and XL are 128, 192, 256, 320 and 384.
        channel_mult: widths of the levels; every level halves the resolution.
        num_blocks: residual blocks of an encoder level (a decoder level has one more).
        attn_resolutions: levels whose blocks have self-attention. The lowest level's first decoder
            block has it always, those that resample never.
        channels_per_head: of the attention.
        dropout: share dropped before each second convolution.
        dropout_resolutions: of the blocks that drop; None is all.
        label_dropout: share of the labels set to 0 in training, for classifier-free guidance.

    Raises:
        ValueError: a resolution that cannot be halved often enough, widths that cannot be built.
    """

    fp32_modules = ("emb_noise", "emb_label")
    block_ends_in, attention_begins_with, constant_channels = "conv_res1", "attn_qkv", 1

    def __init__(
        self,
        img_resolution: int,
        in_channels: int,
        out_channels: int,
        label_dim: int = 0,
        model_channels: int = 192,
        channel_mult: Sequence[int] = (1, 2, 3, 4),
        num_blocks: int = 3,
        attn_resolutions: Sequence[int] = (16, 8),
        channels_per_head: int = 64,
        dropout: float = 0.0,
        dropout_resolutions: Sequence[int] | None = None,
        label_dropout: float = 0.0,
    ):
        super().__init__(dropout, label_dropout, dropout_resolutions)
        resolutions = level_resolutions(
            img_resolution, model_channels, channel_mult, num_blocks, attn_resolutions,
            dropout_resolutions,
        )  # fmt: skip
        widths = [model_channels * mult for mult in channel_mult]
        emb_channels = max(widths)
        self.label_dim, self.in_channels = label_dim, in_channels
        self.out_gain = nn.Parameter(torch.zeros(()))
        self.emb_fourier = MPFourier(widths[0])
        self.emb_noise = MPConv(widths[0], emb_channels)
        self.emb_label = MPConv(label_dim, emb_channels) if label_dim else None

        def block(layer: int, c_in: int, c_out: int, at: Place) -> EDM2Block:
            return EDM2Block(
                c_in, c_out, emb_channels,
                encoder=at.side == "enc", layer=layer, dropout=self.dropout_at(at.resolution),
                resampling=at.kind if at.kind in ("up", "down") else None,
                attention=at.attends(attn_resolutions), channels_per_head=channels_per_head,
            )  # fmt: skip

        # One more channel, of ones, in the place of a bias.
        stem = MPConv(in_channels + 1, widths[0], 3)
        width = self.assemble(resolutions, widths, num_blocks, stem, widths[0], block)
        self.out_conv = MPConv(width, out_channels, 3)

    @classmethod
    def owns(cls, names: Collection[str]) -> bool:
        return any(name.endswith(".conv_res0.weight") for name in names)

    @classmethod
    def own_arguments(cls, weights: Weights, widths: list[int], stem: int) -> dict[str, Any]:
        options, shapes = weights.options, weights.shapes
        fixed = {"res_balance": RES_BALANCE, "attn_balance": ATTN_BALANCE,
                 "concat_balance": CONCAT_BALANCE, "label_balance": LABEL_BALANCE,
                 "clip_act": CLIP, "resample_filter": [1, 1]}  # fmt: skip
        for name, value in fixed.items():
            if options.get(name, value) != value:
                raise ValueError(f"its {name} is {weights.shown(options[name])}, ours {value}")
        if "model.emb_fourier.freqs" not in shapes or "model.emb_noise_r.weight" in shapes:
            raise ValueError("its embedding of the noise level is not EDM2's")
        model_channels = math.gcd(*widths)
        recorded = options.get("model_channels", model_channels)
        if type(recorded) is int and recorded > 0 and all(w % recorded == 0 for w in widths):
            model_channels = recorded
        return {
            "name": "edm2",
            "label_dim": shapes.get("model.emb_label.weight", (0, 0))[1],
            "model_channels": model_channels,
            "channel_mult": multiples(widths, model_channels),
            "channels_per_head": int(weights.number("channels_per_head", 64)),
        }

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        dropout_key: PhiloxKey | None = None,
    ) -> torch.Tensor:
        """F [N,out_channels,H,W] for x [N,in_channels,H,W] in the compute dtype (or with the channel of ones
        already), noise_labels [N] (c_noise) and class_labels one-hot [N,label_dim]."""
        dropout_key = self.key_for(x, dropout_key)
        emb = self.embed(noise_labels, class_labels, dropout_key).to(x.dtype)
        stem, *encoder = self.enc.values()
        if x.shape[1] == self.in_channels:
            x = torch.cat([x, torch.ones_like(x[:, :1])], 1)
        x = stem(x)
        x = x.contiguous(memory_format=self.memory_format)
        skips: list[torch.Tensor] = []
        activated = None
        given = iter(self.modulations(emb))
        for index, block in enumerate(encoder, start=1):
            is_last = index == len(encoder)  # the decoder's first block begins with an activation
            x, activated, past, *stem_out = run_block(
                block,
                [x],
                next(given),
                dropout_key,
                activates=is_last,
                twice=True,
                with_x=index == 1,
            )
            skips += [*stem_out, past]
        for index, block in enumerate(self.dec.values()):
            skip = skips.pop() if block.in_channels != x.shape[1] else None
            x, activated = run_block(
                block, [x], next(given), dropout_key, skip=skip, activated=activated,
                activates=index == 0,
            )  # fmt: skip
        return self.out_conv(x, self.out_gain)

    def joined_names(self) -> list[str]:
        """Of the product that all blocks' embeddings are."""
        return [name for name, _ in self.named_parameters() if name.endswith(".emb_linear.weight")]

    def modulations(self, emb: torch.Tensor) -> list[Modulation]:
        """`emb_linear(emb)` of every block, views of one product's columns, and its gain: one launch for all,
        and two for their gradients."""
        blocks = [block for block in self.blocks() if isinstance(block, EDM2Block)]
        weight = joined([block.emb_linear.normalized(emb.dtype) for block in blocks])
        widths = [block.out_channels for block in blocks]
        scales = F.linear(emb, weight)
        each = scales_and_gains(scales, widths, [block.emb_gain for block in blocks])
        return [{"scale": scale, "gain": gain} for scale, gain in zip(*each, strict=True)]

    def embed(
        self,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        dropout_key: PhiloxKey | None = None,
    ) -> torch.Tensor:
        """The embedding [N,emb_channels] of noise level and class."""
        with without_autocast(noise_labels.device):
            emb = self.emb_noise(self.emb_fourier.cosines(noise_labels))
            if self.emb_label is None:
                return mp_silu(math.sqrt(2) * emb)
            labels = self.emb_label(self.dropped_labels(class_labels, dropout_key, emb.dtype))
            factors = math.sqrt(2), math.sqrt(self.label_dim)  # cosines and one-hot labels to rms 1
            return mp_sum(emb, labels, LABEL_BALANCE, factors=factors, with_silu=True)[1]
