"""The magnitude-preserving layers of EDM2 (Karras et al. 2024, section 2 and appendix B.4)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tcm_fast.kernels._common import MP_SILU
from tcm_fast.kernels.conv_bf16x3 import conv_bf16x3
from tcm_fast.kernels.normalized_copy import normalized_copy, normalized_rows


class MPConv(nn.Module):
    """A "same" convolution, or a linear layer (kernel_size 0), without bias, whose output rows count by
    their direction only.

    The parameter `weight` [out,in,k,k] or [out,in] is normalised in each forward, in the graph; `scaled`
    takes the place of the normalised weight where somebody has computed it already
    (`precision.cast_weights`, `in_precision`), and where its bf16 `parts` are there too, `conv_bf16x3`
    convolves. A forward never writes `weight`: training forces its rows
    to norm √fan_in once per optimizer step (`force_rows`), so that they do not grow.
    """

    scaled: torch.Tensor | None
    parts: torch.Tensor | None

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 0):
        super().__init__()
        kernel = (kernel_size, kernel_size) if kernel_size else ()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, *kernel))
        self.register_buffer("scaled", None, persistent=False)
        self.register_buffer("parts", None, persistent=False)

    def normalized(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight to compute with."""
        weight = normalized_copy(self.weight) if self.scaled is None else self.scaled
        return weight.to(dtype)

    def forward(self, x: torch.Tensor, gain: torch.Tensor | None = None) -> torch.Tensor:
        """The layer's output, times `gain`, a scalar."""
        weight = self.normalized(x.dtype)
        if self.parts is not None:
            y = conv_bf16x3(x, weight, parts=self.parts)
            return y if gain is None else y * gain
        if gain is not None:  # less than the output
            weight = weight * gain
        if weight.ndim == 2:
            return F.linear(x, weight)
        return F.conv2d(x, weight, padding=weight.shape[-1] // 2)

    @property
    def can_split(self) -> bool:
        """Whether `conv_bf16x3` takes this layer."""
        return self.weight.shape[2:] in ((1, 1), (3, 3))


@torch.no_grad()
def force_rows(module: nn.Module) -> None:
    """Normalise the rows of every MPConv in place: EDM2's forced weight normalisation, for training
    loops of one's own; call it before the first step and after each optimizer step."""
    for layer in module.modules():
        if isinstance(layer, MPConv):
            layer.weight.copy_(normalized_rows(layer.weight))


class _Joined(torch.autograd.Function):
    """Matrices that lie one behind the other, as one, without a copy."""

    @staticmethod
    def forward(*matrices: torch.Tensor) -> torch.Tensor:
        rows = sum(len(matrix) for matrix in matrices)
        return matrices[0].as_strided((rows, matrices[0].shape[1]), matrices[0].stride())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.rows = [len(matrix) for matrix in inputs]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return grads[0].split(ctx.rows)


def joined(matrices: Sequence[torch.Tensor]) -> torch.Tensor:
    """`torch.cat` of matrices; no copy where they lie one behind the other, as `side_by_side` leaves them."""
    if (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or not all(m.is_contiguous() and m.numel() > 0 for m in matrices)
        or not all(
            a.untyped_storage()._cdata == b.untyped_storage()._cdata
            and a.storage_offset() + a.numel() == b.storage_offset()
            and (a.dtype, a.shape[1]) == (b.dtype, b.shape[1])
            for a, b in pairwise(matrices)
        )
    ):
        return torch.cat(list(matrices))
    return _Joined.apply(*matrices)


def side_by_side(matrices: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Copies of matrices [R,C] in one piece of memory, one behind the other."""
    if not matrices:
        return []
    return list(torch.cat(list(matrices)).split([len(matrix) for matrix in matrices]))


class MPFourier(nn.Module):
    """√2 cos(freqs v + phases) of v [N]: [N,C], in fp32 or wider. Random buffers, uniform phases.
    `cosines` leaves out the factor √2."""

    def __init__(self, num_channels: int):
        super().__init__()
        self.freqs: torch.Tensor
        self.phases: torch.Tensor
        self.register_buffer("freqs", 2 * math.pi * torch.randn(num_channels))
        self.register_buffer("phases", 2 * math.pi * torch.rand(num_channels))

    def forward(self, v: torch.Tensor) -> torch.Tensor:
        return math.sqrt(2) * self.cosines(v)

    def cosines(self, v: torch.Tensor) -> torch.Tensor:
        dtype = torch.promote_types(v.dtype, self.freqs.dtype)
        freqs, phases = self.freqs.to(dtype), self.phases.to(dtype)
        return torch.addcmul(phases, v.to(dtype)[:, None], freqs).cos()


def mp_silu(x: torch.Tensor) -> torch.Tensor:
    """SiLU over 0.596, its rms under unit Gaussian input."""
    return F.silu(x) / MP_SILU
