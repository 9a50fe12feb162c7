"""What the U-Nets share: which sizes fit, how the blocks are laid out and named, label dropout, the layout
of the activations."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from tcm_fast.config import require
from tcm_fast.kernels.dropout import PhiloxKey, dropout_mask
from tcm_fast.networks.layers import (
    Conv2d,
    GroupNorm,
    PendingSum,
    carried_out,
    fresh_key,
)
from tcm_fast.networks.raw_network import Block, RawNetwork
from tcm_fast.networks.recognition import STEM, Weights, encoder_levels, multiples
from tcm_fast.networks.recompute import run_block
from tcm_fast.networks.unet_block import UNetBlock, modulations

# Beyond the numbers of the dropout layers, which count up from 0, and below those that key noise.
LABEL_LAYER = 0x7FFF_FFFF


def level_resolutions(
    img_resolution: int,
    model_channels: int,
    channel_mult: Sequence[int],
    num_blocks: int,
    attn_resolutions: Sequence[int],
    dropout_resolutions: Sequence[int] | None,
) -> list[int]:
    """The resolution of each level, highest first.

    Raises:
        ValueError: a resolution that cannot be halved often enough, no blocks, or attention or dropout
            at a resolution that does not occur.
    """
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
    require(min(channel_mult) >= 1, f"channel_mult: must be positive, got {list(channel_mult)}")
    require(num_blocks >= 1, f"num_blocks: must be at least 1, got {num_blocks}")
    resolutions = [img_resolution >> level for level in range(levels)]
    for name, given in (
        ("attn_resolutions", attn_resolutions),
        ("dropout_resolutions", dropout_resolutions or ()),
    ):
        wrong = [res for res in given if res not in resolutions]
        require(
            not wrong,
            f"{name}: must be among the resolutions of the levels, "
            f"{', '.join(map(str, resolutions))}, got {', '.join(map(str, wrong))}",
        )
    return resolutions


@dataclass(frozen=True)
class Place:
    """Where a block is. kind: "down", "up", "in" (the two that the decoder begins with) or "block";
    level: 0 is the highest resolution; index: among the blocks of its kind there."""

    side: str
    kind: str
    level: int
    resolution: int
    index: int = 0

    @property
    def path(self) -> str:
        """EDM's name of the block."""
        number = self.index if self.kind in ("in", "block") else ""
        return f"{self.side}.{self.resolution}x{self.resolution}_{self.kind}{number}"

    def attends(self, attn_resolutions: Collection[int]) -> bool:
        """Whether it has self-attention: the decoder's first block, and those of some resolutions that do
        not resample."""
        chosen = self.kind == "block" and self.resolution in attn_resolutions
        return chosen or (self.kind == "in" and self.index == 0)


class UNet(RawNetwork):
    """A raw network F(x, c_noise) with class labels and keyed dropout.

    `dropout_resolutions` are the resolutions of the blocks that drop anything; None is all of them.
    `places` and `stem` are the names of the blocks and of the first convolution.
    """

    block_ends_in, attention_begins_with = "conv1", "qkv"
    """Names of a block's last convolution and of its attention's first."""

    enc: nn.ModuleDict
    dec: nn.ModuleDict
    places: dict[str, Place]
    stem: str

    def __init__(
        self,
        dropout: float,
        label_dropout: float,
        dropout_resolutions: Sequence[int] | None,
    ):
        super().__init__()
        for name, p in (("dropout", dropout), ("label_dropout", label_dropout)):
            require(0 <= p < 1, f"{name}: must lie in [0, 1), got {p}")
        self.dropout, self.label_dropout = dropout, label_dropout
        self.dropout_resolutions = dropout_resolutions

    def assemble(
        self,
        resolutions: Sequence[int],
        widths: Sequence[int],
        num_blocks: int,
        stem: nn.Module,
        stem_width: int,
        block: Callable[[int, int, int, Place], Block],
        residual: Callable[[int], nn.Module] | None = None,
    ) -> int:
        """Build the encoder and the decoder.

        Args:
            resolutions, widths: of the levels, highest resolution first.
            num_blocks: of an encoder level; a decoder level has one more, each of which takes in the
                output of an encoder block.
            stem: the first convolution, to stem_width channels.
            block: makes a block from its number, its input and output channels and its place.
            residual: makes from its output channels what brings the image to each lower level (NCSN++).

        Returns:
            the width of the decoder's output.
        """
        self.enc, self.dec, self.places = nn.ModuleDict(), nn.ModuleDict(), {}

        def add(c_in: int, c_out: int, at: Place) -> int:
            built = block(len(self.places), c_in, c_out, at)
            built.resolution = at.resolution * (2 if at.kind == "down" else 1)
            side = self.enc if at.side == "enc" else self.dec
            side[at.path.partition(".")[2]] = built
            self.places[at.path] = at
            return c_out

        first = f"{resolutions[0]}x{resolutions[0]}_conv"
        self.enc[first], self.stem = stem, f"enc.{first}"
        skips = [width := stem_width]
        levels = list(enumerate(zip(resolutions, widths, strict=True)))
        for level, (res, c_out) in levels:
            if level > 0:
                skips.append(add(width, width, Place("enc", "down", level, res)))
                if residual is not None:
                    self.enc[f"{res}x{res}_aux_residual"] = residual(width)
            for index in range(num_blocks):
                width = add(width, c_out, Place("enc", "block", level, res, index))
                skips.append(width)
        for level, (res, c_out) in reversed(levels):
            if level == len(levels) - 1:
                for index in range(2):
                    add(width, width, Place("dec", "in", level, res, index))
            else:
                add(width, width, Place("dec", "up", level, res))
            for index in range(num_blocks + 1):
                width = add(width + skips.pop(), c_out, Place("dec", "block", level, res, index))
        assert not skips
        return width

    @classmethod
    def recognise(cls, weights: Weights) -> dict[str, Any] | None:
        stems = [(name, m[1]) for name in weights.shapes if (m := STEM.search(name))]
        if len(stems) != 1 or len(weights.shapes[stems[0][0]]) != 4 or not cls.owns(weights.shapes):
            return None
        stem, resolution = weights.shapes[stems[0][0]], int(stems[0][1])
        levels = encoder_levels(weights, resolution, cls.block_ends_in)
        attention = f"_block0.{cls.attention_begins_with}.weight"
        if len({level.blocks for level in levels}) > 1:
            raise ValueError("its levels have different numbers of blocks")
        spec = {
            "img_resolution": resolution,
            "img_channels": stem[1] - cls.constant_channels,
            "num_blocks": levels[0].blocks,
            "attn_resolutions": [
                level.resolution
                for level in levels
                if f"model.enc.{level.name}{attention}" in weights.shapes
            ],
            "dropout": float(weights.number("dropout", 0.0)),
            **cls.own_arguments(weights, [level.width for level in levels], stem[0]),
        }
        rates = weights.resolutions("dropout_resolutions", "dout_resolutions")
        if rates is not None:
            known = [level.resolution for level in levels]
            spec["dropout_resolutions"] = [res for res in rates if res in known]
        return spec | {"label_dropout": float(weights.number("label_dropout", 0.0))}

    @classmethod
    def owns(cls, names: Collection[str]) -> bool:
        """Whether a network with weights of these names is of this family."""
        raise NotImplementedError

    @classmethod
    def own_arguments(cls, weights: Weights, widths: list[int], stem: int) -> dict[str, Any]:
        """`name` and the arguments that the family has beside the common ones, from the widths of the
        levels and of the first convolution."""
        raise NotImplementedError

    def dropout_at(self, resolution: int) -> float:
        """What a block at this resolution (after resampling) drops."""
        chosen = self.dropout_resolutions is None or resolution in self.dropout_resolutions
        return self.dropout if chosen else 0.0

    def key_for(self, x: torch.Tensor, key: PhiloxKey | None) -> PhiloxKey | None:
        """The given key; a fresh one where something is dropped and none is given."""
        if key is None and self.training and (self.dropout > 0 or self.label_dropout > 0):
            return fresh_key(len(x), x.device)
        return key

    def dropped_labels(
        self, labels: torch.Tensor | None, key: PhiloxKey | None, dtype: torch.dtype
    ) -> torch.Tensor:
        """One-hot labels [N,K], in train mode with the share `label_dropout` of the rows set to 0."""
        assert labels is not None
        labels = labels.to(dtype)
        if self.training and self.label_dropout > 0:
            assert key is not None
            key, shape = key.at_layer(LABEL_LAYER), (len(labels), 1, 1, 1)
            kept = dropout_mask(key, self.label_dropout, shape, labels.device)
            labels = labels * kept.reshape(-1, 1)
        return labels

    @property
    def memory_format(self) -> torch.memory_format:
        """The layout of the weights, and so of the activations: told from a decoder block's, since with
        an image's few channels or a 1x1 kernel it is ambiguous."""
        weights = (p for p in self.dec.parameters() if p.ndim == 4 and p.shape[-1] > 1)
        is_channels_last = next(weights).is_contiguous(memory_format=torch.channels_last)
        return torch.channels_last if is_channels_last else torch.contiguous_format


class EDMUNet(UNet):
    """What EDM's networks share: DDPM++, NCSN++ and ADM."""

    fp32_modules = ("map_label", "map_augment", "map_layer0", "map_layer1")
    map_augment: nn.Linear | None

    @property
    def takes_ones(self) -> bool:
        """Not NCSN++, whose residual encoder reads the image once more."""
        layers = [layer for layer in self.enc.values() if isinstance(layer, Conv2d)]
        return len(layers) == 1 and layers[0].bias is not None

    @property
    def augmentation(self) -> nn.Linear | None:
        return self.map_augment

    def forward(
        self,
        x: torch.Tensor,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        dropout_key: PhiloxKey | None = None,
    ) -> torch.Tensor:
        """F [N,out_channels,H,W] for x [N,in_channels,H,W] in the weights' dtype (or with a channel of ones
        behind it: `takes_ones`), noise_labels [N] (c_noise), class_labels one-hot [N,label_dim] and
        augment_labels [N,augment_dim]."""
        dropout_key = self.key_for(x, dropout_key)
        emb = self.embed(noise_labels, class_labels, augment_labels, dropout_key).to(x.dtype)
        blocks = [block for block in self.blocks() if isinstance(block, UNetBlock)]
        given = iter(modulations(blocks, emb))
        x_or_sum: torch.Tensor | PendingSum = x
        aux = x
        skips: list[torch.Tensor] = []  # what each block took in, up to the decoder's first one

        def run(block: UNetBlock, **options: Any) -> Any:
            # A block that is recomputed keeps what it is given: a sum, not its terms.
            given_x = carried_out(x_or_sum) if block.recompute_whole else x_or_sum
            return run_block(block, [given_x], next(given), dropout_key, pends=True, **options)

        for block in self.enc.values():
            assert isinstance(block, UNetBlock | Conv2d)
            if isinstance(block, UNetBlock):
                x_or_sum, skip = run(block, returns_x=True)
                skips.append(skip)
            elif block.fused:  # NCSN++'s residual encoder
                x_or_sum = aux = (carried_out(x_or_sum) + block(aux)) * math.sqrt(0.5)
            else:
                has_ones = x.shape[1] > block.in_channels
                first_out = block.over_ones(x) if has_ones else block(x)
                x_or_sum = first_out.contiguous(memory_format=self.memory_format)
        first, *others = (block for block in self.dec.values() if isinstance(block, UNetBlock))
        x_or_sum, skip = run(first, returns_x=True)
        skips.append(skip)
        for block in others:
            merges = block.in_channels != x_or_sum.shape[1]
            x_or_sum = run(block, second=skips.pop() if merges else None)
        return self.output(x_or_sum)

    def by_sample_names(self) -> list[str]:
        """Of the normalisations, and of the convolutions whose biases the residual sums add."""
        names = []
        for path, module in self.named_modules():
            if isinstance(module, GroupNorm):
                names += [f"{path}.weight", f"{path}.bias"]
            elif isinstance(module, UNetBlock):
                layers = {"conv1": module.conv1, "skip": module.skip}
                layers |= {"proj": module.proj} if module.attention else {}
                names += [
                    f"{path}.{name}.bias"
                    for name, layer in layers.items()
                    if isinstance(layer, Conv2d) and layer.bias is not None
                ]
        return names

    def embed(
        self,
        noise_labels: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
        dropout_key: PhiloxKey | None = None,
    ) -> torch.Tensor:
        """The embedding [N,emb_channels] of noise level, class and augmentation."""
        raise NotImplementedError

    def output(self, x: torch.Tensor | PendingSum) -> torch.Tensor:
        """The last normalisation and convolution."""
        raise NotImplementedError

    @classmethod
    def edm_arguments(
        cls, weights: Weights, widths: list[int], model_channels: int
    ) -> dict[str, Any]:
        """The arguments that these networks share; model_channels 0 is the width of the noise level's
        embedding, as in ADM."""
        shapes = weights.shapes
        foreign = [
            n for n in shapes if re.search(r"_aux_(up|down|skip)\.|map_noise\.scale|_r\.", n)
        ]
        if foreign:
            raise ValueError(f"its network has a part that ours lack, {weights.shown(foreign[0])}")
        for name in ("map_layer0", "map_layer1"):
            if len(shapes.get(f"model.{name}.weight", ())) != 2:
                raise ValueError(f"its network has no model.{name}.weight")
        embedding, noise = shapes["model.map_layer0.weight"]
        model_channels = model_channels or noise
        return {
            "label_dim": shapes.get("model.map_label.weight", (0, 0))[1],
            "augment_dim": shapes.get("model.map_augment.weight", (0, 0))[1],
            "model_channels": model_channels,
            "channel_mult": multiples(widths, model_channels),
            "channel_mult_emb": multiples([embedding], model_channels)[0],
        }
