"""What the U-Nets share: which sizes fit, label dropout, the layout of the activations."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from tcm_fast.config import require
from tcm_fast.kernels.dropout import DropoutKey, dropout_mask
from tcm_fast.networks.layers import fresh_key

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


class UNet(nn.Module):
    """A raw network F(x, c_noise) with class labels and keyed dropout.

    `dropout_resolutions` are the resolutions of the blocks that drop anything; None is all of them.
    """

    enc: nn.ModuleDict
    dec: nn.ModuleDict

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

    def dropout_at(self, resolution: int) -> float:
        """What a block at this resolution (after resampling) drops."""
        chosen = self.dropout_resolutions is None or resolution in self.dropout_resolutions
        return self.dropout if chosen else 0.0

    def key_for(self, x: torch.Tensor, key: DropoutKey | None) -> DropoutKey | None:
        """The given key; a fresh one where something is dropped and none is given."""
        if key is None and self.training and (self.dropout > 0 or self.label_dropout > 0):
            return fresh_key(len(x), x.device)
        return key

    def dropped_labels(
        self, labels: torch.Tensor | None, key: DropoutKey | None, dtype: torch.dtype
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
