"""What `sample` and `edit` have in common before a network is called: noise levels, which network computes
each, labels, the numbers of images."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch

from tcm_fast.checkpoint.format import load_stage1
from tcm_fast.networks import Precond
from tcm_fast.objectives import is_consistency
from tcm_fast.sampling.solvers import T, default_times

Labels = int | Sequence[int] | torch.Tensor | None


def network_info(net: Precond) -> dict:
    """What a network's file says of its training; empty for somebody else's module."""
    return getattr(net, "info", {})


def check_numbers(num: int, seed: int, start: int, batch_size: int | None) -> None:
    """ValueError for numbers of images, seeds or batches out of range."""
    if num < 1:
        raise ValueError(f"num: must be at least 1, got {num}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed: must lie in [0, 2**32), got {seed}")
    if not (start >= 0 and start + num <= 2**32):
        raise ValueError(f"start: images are numbered from 0 to 2**32 - 1, got {start} + {num}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")


def times_of(
    steps: int | None, times: Sequence[float] | None, t_prime: float | None
) -> list[float]:
    """The noise levels to visit, T first."""
    if times is None:
        return default_times(1 if steps is None else steps, t_prime)
    return levels_below(T, None if steps == 1 else steps, times)


def levels_below(first: float, steps: int | None, times: Sequence[float]) -> list[float]:
    """A first noise level, which may be given too, and those after it, checked."""
    given = [float(t) for t in times]
    levels = [first, *given[given[:1] == [first] :]]
    if not (levels[-1] > 0 and all(t > t_next for t, t_next in pairwise(levels))):
        raise ValueError(
            f"times: must fall strictly from at most {first:g} and stay positive, got {list(times)}"
        )
    if steps is not None and steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    if steps not in (None, len(levels)):
        raise ValueError(
            f"steps: {steps} steps need {steps - 1} times after the first, got {len(levels) - 1}"
        )
    return levels


def stage1_of(net: Precond, stage1: Precond | None, is_optional: bool) -> Precond | None:
    """The stage-1 network that belongs to a truncated one: the given one, its own, or its checkpoint's,
    which is read once. ValueError where that checkpoint is gone, unless it is optional."""
    stage1 = stage1 or getattr(net, "stage1", None)
    source = getattr(net, "source", None)
    if stage1 is None and source is not None:
        if not (is_optional or Path(source).exists()):
            raise ValueError(
                f"net: its file {source} is gone, and with it what tells its stage-1 network; load "
                "it again, give stage1, or allow to go without (--allow-below-t-prime)"
            )
        stage1 = load_stage1(source)
        object.__setattr__(net, "stage1", stage1)  # beside the network, no part of it
    return stage1


def networks_at(
    net: Precond, times: Sequence[float], stage1: Precond | None, allow_below_t_prime: bool
) -> list[Precond]:
    """Which network computes each time: below t' the stage-1 network."""
    t_prime = network_info(net).get("t_prime")
    if t_prime is None or times[-1] >= t_prime:
        return [net] * len(times)
    stage1 = stage1_of(net, stage1, allow_below_t_prime)
    if stage1 is None:
        if allow_below_t_prime:
            return [net] * len(times)
        which, below = ("level", times[0]) if times[0] < t_prime else ("times", times[-1])
        raise ValueError(
            f"{which}: {below:g} lies below t'={t_prime:g}, where this network was not trained, and "
            f"its stage-1 network is not there; use noise levels of at least {t_prime:g}, or allow it "
            "with --allow-below-t-prime"
        )
    phase = network_info(stage1).get("phase")
    if not is_consistency(phase):
        raise ValueError(f"stage1: must be a consistency network, got one of phase {phase}")
    for name in ("img_resolution", "img_channels", "label_dim"):
        if getattr(stage1, name) != getattr(net, name):
            raise ValueError(
                f"stage1: {name} must be the network's {getattr(net, name)}, "
                f"got {getattr(stage1, name)}"
            )
    return [stage1 if t < t_prime else net for t in times]


def label_rows(net: Precond, num: int, labels: Labels, start: int) -> torch.Tensor | None:
    """Class numbers int64 [num], rows [num,K] as they were given, or None."""
    classes = net.label_dim
    if not classes:
        if labels is not None:
            raise ValueError("labels: the network is unconditional, it takes none")
        return None
    if isinstance(labels, (int, list, tuple)):
        for label in [labels] if isinstance(labels, int) else labels:
            if isinstance(label, int) and not 0 <= label < classes:  # perhaps of more than 64 bits
                raise ValueError(f"labels: must lie in [0, {classes}), got {label}")
    given = torch.as_tensor(range(classes) if labels is None else labels)
    if given.ndim == 2:
        if given.shape != (num, classes):
            raise ValueError(
                f"labels: one-hot labels must be [{num},{classes}], got {list(given.shape)}"
            )
        return given.to("cpu", torch.float32)
    if given.is_floating_point() or given.ndim > 1 or given.numel() == 0:
        raise ValueError(
            "labels: must be an int, ints or one-hot rows, "
            f"got {given.dtype} of shape {list(given.shape)}"
        )
    given = given.reshape(-1).to("cpu", torch.int64)
    wrong = given[(given < 0) | (given >= classes)]
    if len(wrong):
        raise ValueError(f"labels: must lie in [0, {classes}), got {int(wrong[0])}")
    return given[torch.arange(start, start + num) % len(given)]


def class_numbers(
    net: Precond, num: int, labels: Labels = None, start: int = 0
) -> torch.Tensor | None:
    """The class of each image that `sample` draws with these arguments: int64 [num], or None for an
    unconditional network. ValueError for labels that the network does not have."""
    rows = label_rows(net, num, labels, start)
    return rows if rows is None or rows.ndim == 1 else rows.argmax(1)


def one_hot(rows: torch.Tensor, classes: int) -> torch.Tensor:
    """fp32 [n,K] of class numbers [n]; of rows [n,K] these."""
    if rows.ndim == 2:
        return rows
    return torch.nn.functional.one_hot(rows, classes).to(torch.float32)
