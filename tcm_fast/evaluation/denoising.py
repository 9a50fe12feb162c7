"""How well a network denoises in one call, over the noise level: where a consistency model has converged,
when stage 1 can stop and where t' can lie (Lee et al. 2025, section 3: while stage 1 learns to generate
from high noise levels, what it knew of low ones is forgotten).

Real images are noised to t and denoised in one call; the distance at t is the Fréchet distance of the results
to those images. Images and noise are the same at every t and every time, so that the numbers of one run
compare although the images are few.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from tcm_fast.data.dataset import ImageData
from tcm_fast.evaluation.features import FeatureSpace
from tcm_fast.evaluation.metrics import frechet_distance
from tcm_fast.kernels.denoise_to_uint8 import to_uint8
from tcm_fast.kernels.dropout import PhiloxKey
from tcm_fast.kernels.noise_pair import noise_pair
from tcm_fast.networks import Precond
from tcm_fast.sampling.solvers import T

TIMES = (0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 40.0, T)
FEW = 256  # images of the readings that training takes
EVENT = "denoising"  # of a run's log
STILL = 0.05  # relative change over the last third of a phase below which a distance has converged


@torch.no_grad()
def distances(
    net: Precond,
    data: ImageData,
    space: FeatureSpace,
    *,
    times: Sequence[float] = TIMES,
    num: int = FEW,
    seed: int = 0,
    batch_size: int = 256,
) -> dict[float, float]:
    """The Fréchet distance of one-call denoising to the images that were noised, by noise level.

    Args:
        net: any trained network; used in eval mode.
        data: images of its resolution and channels, and labels where it needs them; `num` of them are taken,
            evenly spaced.
        space: where distances are measured.
        times: noise levels.
        num: images, at least 2; all where there are fewer.

    Raises:
        ValueError: images that do not fit the network.
    """
    shape = (net.img_resolution, net.img_resolution, net.img_channels)
    if data.images.shape[1:] != shape:
        got = list(data.images.shape[1:])
        raise ValueError(
            f"denoising: the images must be {list(shape)} like the network's, got {got}"
        )
    if net.label_dim and data.labels is None:
        raise ValueError("denoising: the network needs labels, but the images have none")
    if num < 2 or not times:
        raise ValueError(
            f"denoising: needs 2 images and a noise level, got {num} and {list(times)}"
        )
    chosen = np.linspace(0, len(data) - 1, min(num, len(data))).astype(np.int64)
    images = torch.from_numpy(data.images[chosen])
    labels = None if data.labels is None else torch.from_numpy(data.labels[chosen])
    real = space.features(images)
    was_training = net.training
    net.eval()
    try:
        return {
            t: frechet_distance(
                space.features(_denoised(net, images, labels, t, seed, batch_size)), real
            )
            for t in times
        }
    finally:
        net.train(was_training)


def _denoised(
    net: Precond,
    images: torch.Tensor,
    labels: torch.Tensor | None,
    t: float,
    seed: int,
    batch_size: int,
) -> torch.Tensor:
    """D(y + t z, t) as uint8 [N,H,W,C] for images of that kind."""
    device = next(net.parameters()).device
    found = []
    for start in range(0, len(images), batch_size):
        part = images[start : start + batch_size].permute(0, 3, 1, 2).contiguous().to(device)
        sample = torch.arange(start, start + len(part), device=device)
        level = torch.full((len(part),), t, device=device, dtype=torch.float64)
        key = PhiloxKey(seed=seed, step=0, sample=sample)
        noised = noise_pair(part, level, None, key, sigma_data=net.sigma_data)
        one_hot = None
        if net.label_dim:
            assert labels is not None
            numbers = labels[start : start + batch_size].to(device)
            one_hot = torch.nn.functional.one_hot(numbers, net.label_dim).float()
        found.append(to_uint8(net(noised.x_t, level.float(), one_hot)).cpu())
    return torch.cat(found)


# ---- what a run has logged ------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """Distances by noise level after so many images of a phase."""

    phase: str
    images: int
    distances: Mapping[float, float]


def read_log(run: Path) -> list[Reading]:
    """The readings in a run's log, of its latest attempt at each number of images, in order."""
    found: dict[tuple[str, int], Reading] = {}
    path = run / "log.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    for line in lines:
        try:
            event = json.loads(line)
        except ValueError:  # a line that was being written
            continue
        if event.get("event") == EVENT:
            by_time = {float(t): d for t, d in event["distances"].items()}
            found[event["phase"], event["images"]] = Reading(
                event["phase"], event["images"], by_time
            )
    return list(found.values())


def advise(readings: Sequence[Reading]) -> str:
    """What the readings of a stage 1 say about its end and about t', in a sentence or two."""
    readings = [reading for reading in readings if reading.images]
    if len(readings) < 3:
        return "too few readings for advice: train longer, or lower --grid-every, and set --eval.features"
    last = readings[-1]
    before = max(
        (r for r in readings[:-1] if r.images <= 2 / 3 * last.images),
        key=lambda r: r.images,
        default=readings[0],
    )
    change = {t: last.distances[t] / max(before.distances[t], 1e-12) - 1 for t in last.distances}
    converged = [t for t in sorted(change) if change[t] > -STILL]
    if not converged:
        return "denoising still improves at every noise level: let stage 1 go on"
    if len(converged) == len(change):
        return "denoising has converged at every noise level: stage 1 can stop"
    low = next(i for i, t in enumerate(sorted(change)) if change[t] <= -STILL)
    if not low:
        return (
            f"denoising still improves at low noise levels (t = {min(change):g}): let stage 1 go on"
        )
    t_prime = sorted(change)[low - 1]
    worse = [t for t in sorted(change)[:low] if change[t] > STILL]
    forgets = f"it is being forgotten at t = {worse[-1]:g} and below; " if worse else ""
    return (
        f"denoising has converged up to t = {t_prime:g} and improves above: {forgets}stage 1 can stop, and "
        f"stage 2 begin with --tcm.t-prime {t_prime:g}"
    )


def thinned(readings: Sequence[Reading], most: int) -> list[Reading]:
    """About `most` of them, evenly spaced, the first and the last among them."""
    shown = list(readings[:: math.ceil(len(readings) / most)])
    return shown if shown[-1] is readings[-1] else [*shown, readings[-1]]


def plot(readings: Sequence[Reading], path: str | Path) -> None:
    """Distances over t, a line for each reading, as a picture (needs matplotlib, the [plot] extra).

    Raises:
        ValueError: matplotlib is not installed.
    """
    try:
        from matplotlib import colormaps
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("eval: --plot needs matplotlib, pip install 'tcm-fast[plot]'") from None
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.add_subplot()
    shown = thinned(readings, 8)
    for i, reading in enumerate(shown):
        times = sorted(reading.distances)
        colour = colormaps["viridis"](i / max(len(shown) - 1, 1))
        label = f"{reading.phase}, {reading.images:,} images"
        axes.loglog(times, [reading.distances[t] for t in times], "o-", color=colour, label=label)
    axes.set_xlabel("noise level t")
    axes.set_ylabel("Fréchet distance of one-call denoising")
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=150)
