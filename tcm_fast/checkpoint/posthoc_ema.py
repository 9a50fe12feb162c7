"""Snapshots of power-function EMAs, and EMAs of other widths reconstructed from them after training
("post-hoc EMA": Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models",
section 3 and appendix C).

    RUN/snapshots/PHASE-IMAGES-ema-K.safetensors

A power-function EMA gives the weights of iteration i the share (γ+1) i^γ / n^(γ+1). Shares of any
other γ are nearly a linear combination of those of several snapshots, so the EMA is the same
combination of the snapshots. Before a phase's first iteration the weights count as those it began with.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tcm_fast.checkpoint.format import network_file, save_network
from tcm_fast.networks import Precond, build_network
from tcm_fast.runtime.atomic import read_tensors, remove_leftovers

FOLDER = "snapshots"
WIDEST = math.sqrt(1 / 12)  # γ = 0: every iteration alike


def gamma_of_width(width: float) -> float:
    """γ of the EMA whose profile has this standard deviation, as a share of the iterations so far:
    width² = (γ+1) / ((γ+2)² (γ+3)).

    Raises:
        ValueError: not in (0, 0.288], where γ is at least 0.
    """
    if not 0 < width <= WIDEST:
        raise ValueError(f"ema: width must be in (0, {WIDEST:.3f}], got {width}")
    inverse = width**-2
    return float(np.roots([1, 7, 16 - inverse, 12 - inverse]).real.max())


def _overlap(at_a: Any, gamma_a: Any, at_b: Any, gamma_b: Any) -> Any:
    """∫ p_a p_b of profiles that end at iterations at_a, at_b; arrays broadcast."""
    ratio = at_a / at_b
    power = np.where(at_a < at_b, gamma_b, -gamma_a)
    scale = (gamma_a + gamma_b + 1) * np.maximum(at_a, at_b)
    return (gamma_a + 1) * (gamma_b + 1) * ratio**power / scale


def combination(
    iterations: list[int], gammas: list[float], at: int, gamma: float
) -> tuple[np.ndarray, float]:
    """Coefficients of the snapshots (γ at an iteration), together 1, whose combination is nearest to the
    profile of `gamma` at iteration `at`, and the relative L2 error that remains; float64."""
    times, own = np.asarray(iterations, np.float64), np.asarray(gammas, np.float64)
    matrix = _overlap(times[:, None], own[:, None], times[None], own[None])
    target = _overlap(times, own, np.float64(at), np.float64(gamma))
    ones = np.ones((len(times), 1))
    bordered = np.block([[matrix, ones], [ones.T, np.zeros((1, 1))]])  # with a Lagrange multiplier
    x = np.linalg.lstsq(bordered, np.append(target, 1.0), rcond=1e-12)[0][:-1]
    whole = float(_overlap(np.float64(at), np.float64(gamma), np.float64(at), np.float64(gamma)))
    rest = x @ matrix @ x - 2 * x @ target + whole
    return x, math.sqrt(max(float(rest), 0.0) / whole)


def save_snapshot(
    run: Path, net: Precond, ema: dict[str, torch.Tensor], index: int, gamma: float
) -> Path:
    """Keep a snapshot of an EMA, parameters in fp16; `net.info` has the images and iterations so far."""
    info = net.info
    path = Path(run) / FOLDER / f"{info['phase']}-{info['images']:09d}-ema-{index}.safetensors"
    remove_leftovers(path.parent)
    state = {name: value.to(torch.float16) for name, value in ema.items()}
    save_network(path, net, metadata={**info, "gamma": gamma}, state=state)
    return path


@dataclass(frozen=True)
class Snapshot:
    """One file, and what it says of itself."""

    path: Path
    phase: str
    images: int
    iterations: int
    gamma: float


def find_snapshots(run: str | Path) -> list[Snapshot]:
    """All snapshots of a run, in the order of their names."""
    found = []
    for path in sorted((Path(run) / FOLDER).glob("*.safetensors")):
        header, _ = read_tensors(path, header_only=True)
        keys = ("phase", "images", "iterations", "gamma")
        if any(header.get(key) is None for key in keys):
            raise ValueError(f"ema: {path} is not a snapshot of an EMA")
        found.append(Snapshot(path, *(header[key] for key in keys)))
    return found


def reconstruct(
    run: str | Path, width: float, *, phase: str | None = None, images: int | None = None
) -> tuple[Precond, float]:
    """The network with the EMA of another width.

    Args:
        run: a folder with snapshots.
        width: relative standard deviation of the EMA, in (0, 0.288].
        phase: whose snapshots; may be left out where there is one phase only.
        images: number of training images at which to end, one with a snapshot; None is the
            last.

    Returns:
        The network in fp32, and the relative error of the EMA's profile.

    Raises:
        FileNotFoundError: no snapshots.
        ValueError: a phase or number of images without snapshots, or a width out of range.
    """
    gamma = gamma_of_width(width)
    found = find_snapshots(run)
    if not found:
        raise FileNotFoundError(
            f"ema: no snapshots in {Path(run) / FOLDER}: train with --snapshot-every"
        )
    phases = sorted({snapshot.phase for snapshot in found})
    if phase is None and len(phases) > 1:
        raise ValueError(f"ema: --phase must say which, got none ({run} has {', '.join(phases)})")
    found = [s for s in found if phase in (None, s.phase)]
    counts = sorted({snapshot.images for snapshot in found})
    if not counts:
        raise ValueError(f"ema: phase must be one of {', '.join(phases)}, got {phase}")
    end = counts[-1] if images is None else images
    if end not in counts:
        raise ValueError(
            f"ema: images must be one of {', '.join(map(str, counts))}, where there is a snapshot, "
            f"got {end}"
        )
    found = [snapshot for snapshot in found if snapshot.images <= end]
    at = max(snapshot.iterations for snapshot in found)
    own = [snapshot.gamma for snapshot in found]
    shares, error = combination([s.iterations for s in found], own, at, gamma)
    last = max(found, key=lambda snapshot: snapshot.iterations)
    header, tensors = network_file(last.path)
    with torch.random.fork_rng(devices=[]):
        net = build_network(**header["network"])
    net.load_state_dict(tensors)
    parameters = dict(net.named_parameters())
    sums = {name: torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    for snapshot, share in zip(found, shares, strict=True):
        tensors = network_file(snapshot.path)[1]
        for name, total in sums.items():
            total += float(share) * tensors[name].to(torch.float64)
    with torch.no_grad():
        for name, p in parameters.items():
            p.copy_(sums[name])
    info = {key: value for key, value in header.items() if key not in ("format", "network")}
    net.info = {**info, "gamma": gamma, "width": width}  # type: ignore[assignment]
    return net.eval(), error
