"""What an edit keeps: orthogonal projections of images onto their known part.

P x is the known part of x, x - P x its complement, which a network generates; x + P(y - x) is x with the
known part of y. Song et al. 2023 (Consistency Models, algorithm 4) write P as A⁻¹ (1 - Ω) A with an
orthogonal A and a binary Ω.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

LUMINANCE = (19595 / 65536, 38470 / 65536, 7471 / 65536)
"""Weights of R, G and B in the luminance (BT.601: 0.299, 0.587, 0.114), those of Pillow's `convert("L")`."""
BISECTIONS = 32  # after these the known part is as exact as fp32 is


class Projection:
    """A linear, idempotent map P of images [n,C,H,W] onto their known part, given as a function."""

    def __init__(self, project: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.project = project

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """P x, [n,C,H,W]."""
        return self.project(x)

    def replace(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """P y + (1 - P) x: x with the known part of y."""
        return x + self(y - x)

    def finish(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """`replace`, with values in [-1,1] where that is possible with the known part of y."""
        return self.replace(x, y)


class KnownPixels(Projection):
    """Pixels outside a mask, bool [n,1,H,W] or what expands to it, True where pixels are generated."""

    def __init__(self, mask: torch.Tensor) -> None:
        super().__init__(lambda x: x.masked_fill(mask, 0.0))
        self.mask = mask

    def replace(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return torch.where(self.mask, x, y)


class KnownMeans(Projection):
    """Weighted means of disjoint groups of values, with weights above 0: `measure` maps images to them,
    `spread` distributes them over their groups so that spread(measure(x)) is P x and measure(spread(m)) is m.

    least: the smallest factor by which `spread` multiplies."""

    def __init__(
        self,
        measure: Callable[[torch.Tensor], torch.Tensor],
        spread: Callable[[torch.Tensor], torch.Tensor],
        least: float,
    ) -> None:
        super().__init__(lambda x: spread(measure(x)))
        self.measure, self.spread, self.least = measure, spread, least

    def finish(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """The image in [-1,1] nearest to x among those with the known part of y, whose values lie there:
        clip(x + spread(shift)), with the one shift of each group, found by bisection, that gives its mean.
        Clipping alone would move the mean."""
        target = self.measure(y)
        low = torch.zeros_like(target) - (1 + x.abs().amax((1, 2, 3), keepdim=True)) / self.least
        high = -low
        for _ in range(BISECTIONS):
            middle = (low + high) / 2
            is_below = self.measure((x + self.spread(middle)).clamp(-1, 1)) < target
            low, high = torch.where(is_below, middle, low), torch.where(is_below, high, middle)
        return (x + self.spread((low + high) / 2)).clamp(-1, 1)


def known_luminance() -> KnownMeans:
    """The luminance of RGB images: known is what a grey picture of them shows."""
    norm = sum(w * w for w in LUMINANCE)

    def measure(x: torch.Tensor) -> torch.Tensor:
        red, green, blue = (w * x[:, i : i + 1] for i, w in enumerate(LUMINANCE))
        return red + green + blue

    def spread(mean: torch.Tensor) -> torch.Tensor:
        return torch.cat([w / norm * mean for w in LUMINANCE], 1)

    return KnownMeans(measure, spread, least=min(LUMINANCE) / norm)


def known_patch_means(factor: int) -> KnownMeans:
    """The means of patches of factor × factor pixels: known is the image at 1/factor of its size."""

    def spread(mean: torch.Tensor) -> torch.Tensor:
        return mean.repeat_interleave(factor, 2).repeat_interleave(factor, 3)

    return KnownMeans(lambda x: F.avg_pool2d(x, factor), spread, least=1.0)
