"""Does a precision drown what a consistency model learns from?

The loss sees D(x_t,t) - D(x_r,r), which shrinks as r approaches t, while the rounding error of the two
network outputs does not. This module measures both on a trained network and real images.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from tcm_fast.data.dataset import ImageData
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.noise_pair import network_input, noise_pair
from tcm_fast.kernels.precondition import denoise
from tcm_fast.networks import Precond
from tcm_fast.networks.precision import in_precision
from tcm_fast.objectives.noise_levels import inner_level
from tcm_fast.runtime.arithmetic import PRECISIONS, splits_convolutions, tf32

TIMES = (0.3, 1.0, 1.5, 3.0, 10.0, 30.0, 75.0)
DROWNED = 0.7  # cosine below which rounding outweighs the signal (equal parts: 0.71)


def _to_tf32(x: torch.Tensor) -> torch.Tensor:
    """fp32 rounded to 10 bits of mantissa, to the nearest even."""
    bits = x.contiguous().view(torch.int32)
    return ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)


def _to_bf16(x: torch.Tensor) -> torch.Tensor:
    return x.bfloat16().float()


SPLITS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], int]] = {
    "bf16x6": (_to_bf16, 3),
    "tf32x3": (_to_tf32, 2),
}
"""fp32 convolutions as several products on tensor cores, beside bf16x3, for which there is a kernel: how an
operand is rounded, in how many parts."""


class SplitConvolutions(TorchDispatchMode):
    """Inside, fp32 convolutions split each operand into parts, a = a_0 + a_1 + ..., each the rest so far
    rounded, and sum the products a_i * b_j with i + j below the number of parts (Henry, Tang and
    Heinecke, 2019, https://arxiv.org/abs/1904.06376). The products of two parts are exact in fp32, and
    are summed in fp32: what tensor cores compute, but for their own rounding of sums."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.rounded, self.parts = SPLITS[name]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.convolution.default or args[0].dtype != torch.float32:
            return func(*args, **(kwargs or {}))
        x, weight, bias, *rest = args
        pairs = [(i, order - i) for order in range(self.parts) for i in range(order + 1)]
        xs, weights = self._split(x), self._split(weight)
        # The smallest first.
        total = sum(func(xs[i], weights[j], None, *rest) for i, j in reversed(pairs))
        return total if bias is None else total + bias.reshape(-1, 1, 1)

    def _split(self, x: torch.Tensor) -> list[torch.Tensor]:
        found = []
        for _ in range(self.parts):
            found.append(self.rounded(x))
            x = x - found[-1]
        return found


@dataclass(frozen=True)
class Reading:
    """One precision at one noise level.

    signal: median over the images of ‖D(x_t,t) - D(x_r,r)‖ in float64. noise: median of the norm of
    what rounding adds to it. cosine: mean cosine between the difference and the exact one, the share
    of the gradient's direction that is left.
    """

    precision: str
    t: float
    ratio: float
    signal: float
    noise: float
    cosine: float

    @property
    def is_drowned(self) -> bool:
        return self.cosine < DROWNED


def measure(
    net: Precond,
    data: ImageData,
    *,
    ratio: float = 0.999,
    times: Sequence[float] = TIMES,
    precisions: Sequence[str] = (*PRECISIONS, *SPLITS),
    num: int = 16,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> list[Reading]:
    """The rounding error of the difference that the consistency loss sees, beside the difference.

    Args:
        net: a trained network.
        data: images of its resolution and channels; the first `num` are used (labels too).
        ratio: r/t far from zero, in (0, 1); the schedule's limit is the hardest.
        times: noise levels t.
        precisions: what to compare with float64, of `PRECISIONS` and `SPLITS`. tf32 on a CPU is emulated:
            operands of convolutions and linear layers are rounded to 10 bits.

    Raises:
        ValueError: images that do not fit the network, a ratio out of range.
    """
    shape = (net.img_resolution, net.img_resolution, net.img_channels)
    if data.images.shape[1:] != shape:
        raise ValueError(
            f"doctor: the images must be {list(shape)} like the network's, "
            f"got {list(data.images.shape[1:])}"
        )
    images = torch.from_numpy(data.images[:num].copy()).permute(0, 3, 1, 2).to(device)
    labels = None
    if net.label_dim:
        if data.labels is None:
            raise ValueError("doctor: the network needs labels, but the images have none")
        numbers = torch.from_numpy(data.labels[:num]).to(device)
        labels = torch.nn.functional.one_hot(numbers, net.label_dim)
    net = copy.deepcopy(net).eval().requires_grad_(False).to(device)
    exact = _differences(net.double(), "float64", images, labels, times, ratio, seed)
    net = net.float()
    readings = []
    for precision in precisions:
        with tf32(precision == "tf32"):
            found = _differences(net, precision, images, labels, times, ratio, seed)
        for t, low, high in zip(times, found, exact, strict=True):
            low, high = low.flatten(1).double(), high.flatten(1)
            cosine = nn.functional.cosine_similarity(low, high).mean().item()
            noise = (low - high).norm(dim=1).median().item()
            readings.append(
                Reading(precision, t, ratio, high.norm(dim=1).median().item(), noise, cosine)
            )
    return readings


@torch.no_grad()
def _differences(
    net: Precond,
    precision: str,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    times: Sequence[float],
    ratio: float,
    seed: int,
) -> list[torch.Tensor]:
    """D(x_t,t) - D(x_r,r) for each t. The noisy images are the same in every precision."""
    is_cuda = images.device.type == "cuda"
    if precision == "tf32" and not is_cuda:
        net = _rounding_to_tf32(net)
    wide = torch.float64 if precision == "float64" else torch.float32
    dtype, split = PRECISIONS.get(precision, wide), splits_convolutions(precision)
    net = in_precision(net, dtype, split=split) if split or dtype != wide else net
    sample = torch.arange(len(images), device=images.device)
    key = PhiloxKey(seed=seed, step=0, sample=sample)
    found = []
    for t in times:
        level = torch.full((len(images),), t, device=images.device, dtype=torch.float64)
        r = torch.from_numpy(inner_level(level.cpu().numpy(), ratio)[0]).to(level)
        pair = noise_pair(images, level, r, key, sigma_data=net.sigma_data)
        assert pair.x_r is not None
        denoised = []
        for x, s in ((pair.x_t.to(wide), level.to(wide)), (pair.x_r.to(wide), r.to(wide))):
            with SplitConvolutions(precision) if precision in SPLITS else nullcontext():
                output = net.raw(network_input(x, s, net.sigma_data, dtype), s, labels)
            denoised.append(denoise(output, x, s, net.sigma_data))
        found.append(denoised[0] - denoised[1])
    return found


def _rounding_to_tf32(net: Precond) -> Precond:
    """A copy whose convolutions and linear layers round their operands as tensor cores do."""
    rounded = copy.deepcopy(net)
    modules = dict(rounded.model.named_modules())
    for name in rounded.model.cast_names():
        path, _, leaf = name.rpartition(".")
        if leaf == "weight":
            modules[path].weight.data = _to_tf32(modules[path].weight.data)
            modules[path].register_forward_pre_hook(lambda _, inputs: (_to_tf32(inputs[0]),))
    return rounded


def plot(readings: Sequence[Reading], path: str | Path) -> None:
    """Signal and rounding noise over t as a picture (needs matplotlib, the [plot] extra).

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("doctor: --plot needs matplotlib, pip install 'tcm-fast[plot]'") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    first = readings[0].precision
    signal = [r for r in readings if r.precision == first]
    axes.loglog([r.t for r in signal], [r.signal for r in signal], "k", label="signal")
    for precision in dict.fromkeys(r.precision for r in readings):
        rows = [r for r in readings if r.precision == precision]
        axes.loglog([r.t for r in rows], [r.noise for r in rows], "o-", label=precision)
    axes.set_xlabel("noise level t")
    axes.set_ylabel("norm, median over images")
    axes.set_title(f"D(x_t,t) - D(x_r,r) at r/t = {readings[0].ratio:g}, and its rounding error")
    figure.legend(loc="outside right center")
    figure.savefig(path, dpi=150)
