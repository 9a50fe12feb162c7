"""Trains the feature network of the manifold distance: to tell how strongly an image was distorted, in each
of about fifteen ways, from the images of a set alone (AYT: Kim, Cha, Ye 2025)."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track

from tcm_fast.config import require
from tcm_fast.data.augment import distort, strengths_of
from tcm_fast.data.dataset import ImageData, permutation
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.objectives.manifold import SMALLEST, FeatureNetwork, contents_of
from tcm_fast.runtime.arithmetic import training_settings
from tcm_fast.runtime.atomic import replacing, write_tensors

FEWEST = 20  # images of a set
HELD_OUT, MOST_HELD_OUT = 0.1, 1000  # share of the images, and their number at most
TESTED = 2000  # distorted images of which the strengths are told
WARM_UP = 100  # steps


def train_features(
    data: ImageData,
    out: str | Path,
    *,
    images: int = 256_000,
    batch_size: int = 128,
    width: int = 32,
    lr: float = 2e-3,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = False,
) -> dict[str, float]:
    """Train a `FeatureNetwork` with Adam on the mean squared error of the strengths and write it as one
    safetensors file, which holds how it was trained, too. On a CPU (with the same number of threads) and on
    a GPU alike, the same seed gives the same file.

    Args:
        data: a tenth of the images, at most 1,000, are held out.
        out: the file; one that exists is replaced in one piece.
        images: length of the training in images.
        batch_size: images of a step.
        width: channels of the first layers.
        lr: largest learning rate; it rises over 100 steps and falls to 0 as a cosine.
        seed: below 2**32: of the initial weights, the order of images and the distortions.
        device: where it is trained.
        progress: show a bar on stderr.

    Returns:
        R² of each strength on the images held out: 1 - mean squared error over variance. By name, in the
        order of `augment.STRENGTHS`.

    Raises:
        ValueError: fewer than 20 images, images of fewer than 4 pixels, or a number out of its range.
        OSError: the file cannot be written.
    """
    for name, value in {"images": images, "batch_size": batch_size, "width": width}.items():
        require(value >= 1, f"features: {name} must be at least 1, got {value}")
    require(0 < lr < math.inf, f"features: lr must be positive, got {lr}")
    require(0 <= seed < 2**32, f"features: seed must lie in [0, 2**32), got {seed}")
    require(len(data) >= FEWEST, f"features: needs {FEWEST} images or more, got {len(data)}")
    require(
        data.resolution >= SMALLEST,
        f"features: images must have {SMALLEST} pixels or more, got {data.resolution}",
    )
    names, device = strengths_of(data.channels), torch.device(device)
    with torch.random.fork_rng(devices=[]), training_settings("fp32", deterministic=True):
        torch.manual_seed(seed)
        net = FeatureNetwork(
            resolution=data.resolution, channels=data.channels, width=width, strengths=len(names)
        )
        net.to(device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        order = permutation(seed, len(data), 0)
        kept = min(int(HELD_OUT * len(data)), MOST_HELD_OUT)
        held_out, ours = order[:kept], order[kept:]
        _fit(net, data, ours, images, batch_size, lr, seed, progress)
        net.eval().requires_grad_(False)
        net.balance(_images(data, ours[:MOST_HELD_OUT], device))
        found = _explained(net, data, held_out, batch_size, seed)
    weights = net.state_dict().values()
    if not all(bool(torch.isfinite(weight).all()) for weight in weights):
        raise ValueError(f"features: training diverged to NaN/Inf, lower lr, got {lr}")
    explained = dict(zip(names, found, strict=True))
    about: dict[str, Any] = {
        "strengths": names, "explained": explained, "seed": seed, "images": images,
        "batch_size": batch_size, "lr": lr, "data": re.split(r"[/\\]", data.name)[-1],
        "data_sha256": hashlib.sha256(np.ascontiguousarray(data.images).data).hexdigest(),
    }  # fmt: skip
    with replacing(out) as temporary:
        write_tensors(temporary, *contents_of(net, about))
    return explained


def _fit(
    net: FeatureNetwork,
    data: ImageData,
    ours: np.ndarray,
    images: int,
    batch_size: int,
    lr: float,
    seed: int,
    progress: bool,
) -> None:
    """Train on the images of an index."""
    device = next(net.parameters()).device
    steps = math.ceil(images / batch_size)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda i: min(1, (i + 1) / WARM_UP) * (1 + math.cos(math.pi * i / steps)) / 2,
    )
    generator = np.random.Generator(np.random.Philox(seed))
    for step in track(range(steps), "features", disable=not progress, transient=True):
        chosen = ours[generator.integers(len(ours), size=batch_size)]
        distorted, strengths = distort(
            _images(data, chosen, device), _key(seed, step, batch_size, device)
        )
        optimizer.zero_grad()
        F.mse_loss(net(distorted), strengths).backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def _explained(
    net: FeatureNetwork, data: ImageData, held_out: np.ndarray, batch_size: int, seed: int
) -> list[float]:
    """R² of each strength over distortions of the images held out."""
    device = next(net.parameters()).device
    told, true = [], []
    for step, chosen in enumerate(
        np.array_split(np.resize(held_out, TESTED), math.ceil(TESTED / batch_size))
    ):
        key = _key(seed, 2**62 + step, len(chosen), device)  # no training comes so far
        distorted, strengths = distort(_images(data, chosen, device), key)
        told.append(net(distorted))
        true.append(strengths)
    strengths = torch.cat(true)
    error = (torch.cat(told) - strengths).square().mean(0)
    return (1 - error / strengths.var(0, correction=0)).tolist()


def _images(data: ImageData, index: np.ndarray, device: torch.device) -> torch.Tensor:
    """Images of an index as fp32 [N,C,H,W] in [-1,1]."""
    chosen = torch.from_numpy(data.images[index]).permute(0, 3, 1, 2).to(device)
    return chosen.to(torch.float32) / 127.5 - 1


def _key(seed: int, step: int, count: int, device: torch.device) -> PhiloxKey:
    return PhiloxKey(seed=seed, step=step, sample=torch.arange(count, device=device))
