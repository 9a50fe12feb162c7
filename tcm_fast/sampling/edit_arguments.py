"""What `edit` is given: tasks, and images, masks, noise levels and labels as task and network take them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from tcm_fast.kernels.philox import philox_normal
from tcm_fast.networks import Precond
from tcm_fast.objectives import is_consistency
from tcm_fast.runtime.arithmetic import tf32
from tcm_fast.sampling.arguments import (
    Labels,
    label_rows,
    levels_below,
    network_info,
    networks_at,
    one_hot,
    stage1_of,
)
from tcm_fast.sampling.projections import LUMINANCE
from tcm_fast.sampling.sampler import NOISE_LAYER
from tcm_fast.sampling.solvers import SIGMA_MIN, T, geometric_levels

Images = torch.Tensor | np.ndarray
Project = Callable[[torch.Tensor], torch.Tensor]

LOWEST_EDIT = 0.2  # where the default noise levels of an edit end
FRAMES = 8  # of an interpolation


@dataclass(frozen=True)
class Task:
    """What tells one task from another.

    level: where its noise begins, None where that has to be given.
    steps: network calls, by default.
    mask: whether it needs one, may have one, or takes none.
    """

    level: float | None
    steps: int
    mask: Literal["needed", "possible", "none"] = "none"


TASKS = {
    "inpaint": Task(level=T, steps=8, mask="needed"),
    "colorize": Task(level=T, steps=8),
    "upscale": Task(level=T, steps=8),
    "stroke": Task(level=4.0, steps=2, mask="possible"),
    "denoise": Task(level=None, steps=1),
    "interpolate": Task(level=2.0, steps=1),
    "vary": Task(level=1.0, steps=1, mask="possible"),
}
OWN = Task(level=T, steps=8)  # a projection of the caller's


def find_task(task: str | Project) -> tuple[str, Task]:
    """A task's name and what it is."""
    if callable(task):
        return "a projection", OWN
    if not isinstance(task, str) or task not in TASKS:
        raise ValueError(f"task: must be one of {', '.join(TASKS)}, or a projection, got {task!r}")
    return task, TASKS[task]


def check_ints(**given: int | None) -> None:
    """TypeError for what is no whole number."""
    for name, value in given.items():
        try:
            operator.index(0 if value is None else value)
        except TypeError:
            raise TypeError(f"{name}: must be an int, got {value!r}") from None


def check_network(net: Precond, name: str) -> None:
    for attribute in ("img_resolution", "img_channels", "label_dim"):
        if not hasattr(net, attribute):
            raise TypeError(
                f"net: must have an attribute {attribute}, {type(net).__name__} has none"
            )
    phase = network_info(net).get("phase")
    if not is_consistency(phase):
        raise ValueError(
            "net: editing needs a consistency network (stage 1 or 2), but this one is pre-trained "
            f"only (phase {phase}), and one call of it does not give an image"
        )
    if name == "colorize" and net.img_channels != 3:
        raise ValueError(
            f"task: colorize needs a network of 3 channels, this one has {net.img_channels}"
        )


def as_images(net: Precond, images: Images | None, name: str) -> torch.Tensor:
    """The images of a task, uint8 (or fp32 where it takes that) [N,H,W,C], of a size that it takes."""
    if images is None:
        raise ValueError(f"images: {name} needs some, got None")
    y = _tensor(images, "images")
    takes_floats, size = name == "denoise", net.img_resolution
    if not (y.dtype == torch.uint8 or (takes_floats and y.is_floating_point())):
        kinds = "uint8, or floats in units of [-1,1]," if takes_floats else "uint8"
        raise TypeError(f"images: {name} takes {kinds} [N,H,W,C], got {str(y.dtype)[6:]}")
    # Grey images are RGB ones with equal channels and the other way round; of other networks neither.
    channels = {1, 3} if net.img_channels in (1, 3) else {net.img_channels}
    if y.ndim != 4 or not len(y) or y.shape[3] not in channels:
        raise ValueError(
            f"images: must be [N,H,W,C] with C {net.img_channels}, got {list(y.shape)}"
        )
    if y.is_floating_point():
        y = y.to(torch.float32)
        if not y.isfinite().all():
            raise ValueError("images: must be finite, got NaN or Inf")
    height, width = y.shape[1:3]
    if name == "upscale":
        if height != width or not 0 < height < size or size % height:
            raise ValueError(
                f"images: upscale takes squares of which {size} is a multiple, smaller than the network's "
                f"{size}x{size}, got {width}x{height}"
            )
    elif (height, width) != (size, size):
        raise ValueError(f"images: must be the network's {size}x{size}, got {width}x{height}")
    return y


def _tensor(images: Images, argument: str) -> torch.Tensor:
    """On the CPU; arrays that are read-only or not contiguous are copied."""
    try:
        if isinstance(images, np.ndarray):
            return torch.from_numpy(np.require(images, requirements=["C", "W"]))
        return torch.as_tensor(images).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        kind = getattr(images, "dtype", type(images).__name__)
        raise TypeError(f"{argument}: must be a tensor or an array, got {kind}") from error


def check_range(y: torch.Tensor, level: float) -> None:
    """ValueError for floats that are no image in [-1,1] under noise of that level."""
    most, found = 1 + 10 * level, y.abs().max().item() if y.is_floating_point() else 0.0
    if found > most:
        raise ValueError(
            f"images: denoise takes floats in units of [-1,1], which noise of level {level:g} leaves "
            f"within {most:g}, got {found:g}"
        )


def in_channels(y: torch.Tensor, channels: int) -> torch.Tensor:
    """Grey images with as many channels as the network has; others must have them."""
    if y.shape[3] == 1 and channels == 3:
        return y.expand(-1, -1, -1, 3)
    if y.shape[3] == 3 and channels == 1:
        if not (y == y[..., :1]).all():
            raise ValueError("images: the network takes grey images, got coloured ones")
        return y[..., :1]
    return y


def to_grey(y: torch.Tensor) -> torch.Tensor:
    """The luminance uint8 [N,H,W,1] of RGB or grey images, rounded as Pillow rounds it."""
    if y.shape[3] == 1:
        return y
    weights = torch.tensor([round(w * 65536) for w in LUMINANCE])
    return (((y.to(torch.int64) * weights).sum(3, keepdim=True) + 0x8000) >> 16).to(torch.uint8)


def enlarged(y: torch.Tensor, size: int) -> torch.Tensor:
    """[N,h,w,C] -> [N,size,size,C]: each pixel as often as it takes."""
    factor = size // y.shape[1]
    return y.repeat_interleave(factor, 1).repeat_interleave(factor, 2)


def mask_rows(mask: Images | None, what: Task, name: str, y: torch.Tensor) -> list[torch.Tensor]:
    """The mask bool [N,1,H,W], if there is one."""
    if mask is None:
        if what.mask == "needed":
            raise ValueError(f"mask: {name} needs one, which says where pixels are generated")
        return []
    rows = _tensor(mask, "mask")
    if rows.dtype not in (torch.bool, torch.uint8):
        raise TypeError(f"mask: must be bool or uint8, got {str(rows.dtype)[6:]}")
    size = y.shape[1:3]
    if rows.shape not in (size, (len(y), *size)):
        raise ValueError(
            f"mask: must be {list(size)}, or [{len(y)},{size[0]},{size[1]}] with one for each image, "
            f"got {list(rows.shape)}"
        )
    rows = rows >= 128 if rows.dtype == torch.uint8 else rows
    marked = rows.flatten(-2).any(-1)
    if not marked.all():
        which = "" if rows.ndim == 2 else f" of image {int(marked.logical_not().nonzero()[0])}"
        raise ValueError(
            f"mask: marks no pixel{which} to generate: these are True, or 128 and above"
        )
    return [rows.expand(len(y), *size)[:, None]]


def check_projection(project: Project, shape: tuple[int, int, int], device: torch.device) -> None:
    """A function of the caller's, tried on noise of a shape [C,H,W]."""
    x, y = philox_normal(0, 0, NOISE_LAYER, torch.arange(4, device=device), shape).chunk(2)
    with tf32(False), torch.inference_mode():
        known = project(x)
        if not isinstance(known, torch.Tensor) or known.shape != x.shape:
            got = getattr(known, "shape", type(known).__name__)
            raise ValueError(f"task: a projection must keep the shape [n,C,H,W], got {got}")
        inner = (known * (x - known)).sum((1, 2, 3)) / x.square().sum((1, 2, 3))
        for what, differences, most in (
            ("P P x - P x", project(known) - known, 1e-4),
            ("P(x + y) - P x - P y", project(x + y) - known - project(y), 1e-4),
            ("<P x, x - P x> / <x, x>", inner, 1e-5),
        ):
            off = differences.abs().amax().item()
            if not off <= most:  # NaN neither
                raise ValueError(
                    "task: a projection must be linear, idempotent and orthogonal, but of noise "
                    f"{what} is up to {off:.2g}"
                )


def _number(value: float, argument: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"{argument}: must be a number, got {value!r}") from None


def edit_levels(
    net: Precond, name: str, what: Task, level: float | None, steps: int | None,
    times: Sequence[float] | None, stage1: Precond | None, allow_below_t_prime: bool,
) -> tuple[list[float], list[Precond]]:  # fmt: skip
    """The noise levels of an edit, and the network of each."""
    first = what.level if level is None else _number(level, "level")
    if first is None:
        raise ValueError(
            f"level: {name} needs the standard deviation of the noise, in units of [-1,1]"
        )
    if not SIGMA_MIN <= first <= T:
        raise ValueError(f"level: must lie in [{SIGMA_MIN}, {T:g}], got {first:g}")
    count, lowest = what.steps if steps is None else steps, LOWEST_EDIT
    if times is not None:
        levels = levels_below(first, steps, [_number(t, "times") for t in times])
    else:
        t_prime = network_info(net).get("t_prime") or 0.0
        if count > 1 and lowest < t_prime and not allow_below_t_prime:
            stage1 = stage1_of(net, stage1, False)
            lowest = t_prime if stage1 is None else lowest
        if count > 1 and first <= lowest:
            if steps is not None:
                raise ValueError(
                    f"steps: more than 1 need a level above {lowest:g}, got {first:g}; or give times"
                )
            count = 1
        levels = geometric_levels(count, first, lowest)
    return levels, networks_at(net, levels, stage1, allow_below_t_prime)


def _count(labels: Labels) -> int:
    """How many classes are given."""
    return 1 if labels is None or np.ndim(labels) == 0 else len(labels)  # type: ignore[arg-type]


def edit_labels(net: Precond, labels: Labels, inputs: int) -> torch.Tensor | None:
    """Labels [N] or [N,K] of the images of an edit, None for an unconditional network."""
    if net.label_dim and labels is None:
        raise ValueError(
            "labels: the network is class-conditional; give the class of each image, 0 to "
            f"{net.label_dim - 1} (--classes)"
        )
    rows = label_rows(net, inputs, labels, 0)
    if rows is not None and _count(labels) not in (1, inputs):
        raise ValueError(
            f"labels: must be one class, or one for each of {inputs} images, got {_count(labels)}"
        )
    return rows


def between(
    net: Precond, images: Images | None, frames: int, level: float | None
) -> tuple[list[torch.Tensor], float | None]:
    """What lies below the noise of an interpolation, fp32 [n,H,W,C], its places fp32 [n]; and its level."""
    if frames < 2:
        raise ValueError(f"num: interpolate needs at least its 2 ends, got {frames}")
    place = torch.linspace(0, 1, frames)
    if images is None:
        shape = (frames, net.img_resolution, net.img_resolution, net.img_channels)
        return [torch.zeros(shape), place], T if level is None else level
    ends = in_channels(as_images(net, images, "interpolate"), net.img_channels)
    if len(ends) != 2:
        raise ValueError(f"images: interpolate takes 2 images, got {len(ends)}")
    share = place.reshape(-1, 1, 1, 1)
    first, last = ends.to(torch.float32) / 127.5 - 1
    return [(1 - share) * first + share * last, place], level


def both_seeds(seed: int, seeds: Sequence[int] | None) -> tuple[int, int]:
    """The two seeds of an interpolation: those given, or one and its successor."""
    pair = (seed, (seed + 1) % 2**32) if seeds is None else seeds
    try:
        first, second = map(operator.index, pair)
    except (TypeError, ValueError):
        raise ValueError(f"seeds: must be two ints, got {pair!r}") from None
    for given in (first, second):
        if not 0 <= given < 2**32:
            raise ValueError(f"seeds: must lie in [0, 2**32), got {given}")
    return first, second


def label_path(net: Precond, labels: Labels, frames: int) -> torch.Tensor | None:
    """One-hot labels fp32 [n,K] from one class to the other, None for an unconditional network."""
    count = _count(labels)
    if count not in (1, 2):
        raise ValueError(f"labels: interpolate takes one class or two, got {count}")
    rows = edit_labels(net, labels, count)
    if rows is None:
        return None
    ends = one_hot(rows, net.label_dim)
    share = torch.linspace(0, 1, frames)[:, None]
    return (1 - share) * ends[0] + share * ends[-1]
