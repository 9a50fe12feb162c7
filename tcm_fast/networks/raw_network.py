"""What a family of networks declares, so that the code around it need not know its names."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tcm_fast.networks.mp_layers import MPConv
from tcm_fast.networks.recognition import Weights

Modulation = dict[str, torch.Tensor]
"""What the embedding tells a block of each sample and channel, [N,C] by name: `add`, `scale`, `shift`; and
EDM2's `gain` of the scale."""


class Block(nn.Module):
    """A part of a network that activation checkpointing may compute again (`networks.recompute`)."""

    resolution: int = 0
    """The higher one of its input's and its output's."""
    recompute_norms = recompute_whole = False


class RawNetwork(nn.Module):
    """The raw network F(x, c_noise) inside a `Precond`. A family derives from it.

    The constructor takes (img_resolution, in_channels, out_channels, label_dim, **architecture), with a
    default for each argument of the architecture and `dropout` among them.

    forward(x, noise_labels, class_labels=None, augment_labels=None, dropout_key=None) returns F
    [N,out_channels,H,W] for x [N,in_channels,H,W] in the dtype to compute in, noise_labels [N]
    (c_noise), class_labels one-hot [N,label_dim] and, where there is an `augmentation`, augment_labels
    [N,augment_dim].
    """

    constant_channels = 0
    """Channels of ones behind the image's, for which the first convolution has weights."""
    last_bias = ""
    """Name of the bias of a convolution whose result is F, with nothing after it: `Precond.raw_and_bias`
    leaves it out. Empty for none."""
    fp32_modules: tuple[str, ...] = ()
    """Children that compute in fp32 where the others do in 16 bits: the embeddings."""

    @property
    def takes_ones(self) -> bool:
        """Whether `forward` takes x with a channel of ones behind the image's: in the place of a bias, or
        times the first convolution's bias. False where it does not know of them."""
        return self.constant_channels == 1

    @classmethod
    def recognise(cls, weights: Weights) -> dict[str, Any] | None:
        """The arguments of `build_network` for a network of this family in somebody's file; None for
        others. ValueError where it has what the family lacks."""
        return None

    @property
    def augmentation(self) -> nn.Linear | None:
        """The layer that takes the parameters of each image's augmentation, of pre-training alone."""
        return None

    def blocks(self) -> list[Block]:
        """The blocks in the order of the forward pass."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def cast_names(self) -> list[str]:
        """The parameters that compute in 16 bits."""
        return [
            f"{path}.{name}"
            for path, module in self.named_modules()
            if isinstance(module, nn.Conv2d | nn.Linear | MPConv)
            and path.partition(".")[0] not in self.fp32_modules
            for name, _ in module.named_parameters(recurse=False)
        ]

    def by_sample_names(self) -> list[str]:
        """The parameters whose gradients arise by sample, and whose layers take them expanded to [N, ...]
        (`networks.by_sample`)."""
        return []

    def joined_names(self) -> list[str]:
        """The matrices that a pass concatenates, in this order: what is made of them to compute with lies one
        behind the other (`mp_layers.joined`)."""
        return []

    def normalized_names(self) -> list[str]:
        """The parameters of which only the direction of each row counts and that are not normalised for
        good (`precision.in_precision`)."""
        return [
            f"{path}.weight"
            for path, module in self.named_modules()
            if isinstance(module, MPConv) and module.scaled is None
        ]
