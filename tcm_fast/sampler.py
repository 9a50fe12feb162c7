"""Images from a trained network: one step, a few steps, or the ODE solver of a diffusion network.

Image i of a seed is the same whatever the batch size, the first image or the device: its noise is
keyed by (seed, sampling step, i).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import Progress

from tcm_fast.checkpoint import load_stage1, replacing
from tcm_fast.kernels.philox import philox_normal
from tcm_fast.networks import Precond

T = 80.0  # the largest noise level, where sampling starts
LOWEST_TIME = 0.821  # where two-step sampling returns to, unless t' is above it
NOISE_LAYER = 0x80000001  # Philox key of sampling noise; training noise has 0x80000000
SIGMA_MIN, RHO, HEUN_STEPS = 0.002, 7.0, 18  # Karras et al. 2022, table 1

Noise = Callable[[int], torch.Tensor]  # sampling step -> unit Gaussian [n,C,H,W]
Denoiser = Callable[[torch.Tensor, float], torch.Tensor]  # x [n,C,H,W], noise level -> D(x,t)
Solver = Callable[[Noise, list[Denoiser]], torch.Tensor]
Labels = int | Sequence[int] | torch.Tensor | None


# ---- sampling -----------------------------------------------------------------------------------


def sample(
    net: Precond,
    num: int,
    *,
    steps: int | None = 1,
    seed: int = 0,
    labels: Labels = None,
    times: Sequence[float] | None = None,
    batch_size: int | None = None,
    stage1: Precond | None = None,
    allow_below_t_prime: bool = False,
    start: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Draw `num` images: x = T z, y = D(x, T); for each further t_i: x = y + t_i z', y = D(x, t_i).

    A network that `net.info` calls pre-trained (phase "edm") is no consistency function: it is
    sampled by `sample_edm` with as many steps, one of which would give a blur and is refused. Every
    other network is sampled by the formula above.

    Args:
        net: the network; it is used in eval mode and left in the mode it was in.
        num: number of images.
        steps: network evaluations per image; None is what is usual, 1 (edm: 18 Heun steps).
        seed: seed of the noise.
        labels: for class-conditional networks. None gives image i class i mod K; an int gives all
            the same class; of a sequence of ints image i takes the (i mod length)-th; a one-hot
            tensor [num,K] is taken row by row.
        times: noise levels of the steps after the first, which is always at T = 80 (a leading 80
            may be given too), strictly falling. By default `default_times`.
        batch_size: images per network call; by default as many as suit the resolution.
        stage1: the stage-1 network of a truncated network, used at times below t'; by default that
            of the checkpoint from which `net` was loaded.
        allow_below_t_prime: where there is no stage-1 network, use `net` there although it was not
            trained for it.
        start: number of the first image.
        device: where to compute; the network moves there. By default where it is.
        progress: show a progress bar on stderr.

    Returns:
        uint8 [num,H,W,C] on the CPU: 127.5 x + 128, clipped to [0, 255] and truncated.

    Raises:
        ValueError: arguments that the network cannot serve; the message says which.
    """
    batches = sample_batches(
        net, num, steps=steps, seed=seed, labels=labels, times=times, batch_size=batch_size,
        stage1=stage1, allow_below_t_prime=allow_below_t_prime, start=start, device=device,
        progress=progress,
    )  # fmt: skip
    return torch.cat([images for _, images in batches])


def sample_batches(
    net: Precond,
    num: int,
    *,
    steps: int | None = 1,
    seed: int = 0,
    labels: Labels = None,
    times: Sequence[float] | None = None,
    batch_size: int | None = None,
    stage1: Precond | None = None,
    allow_below_t_prime: bool = False,
    start: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Iterator[tuple[int, torch.Tensor]]:
    """`sample`, batch by batch: yields the number of the first image and uint8 [n,H,W,C].

    Arguments are checked when it is called, images are computed when they are asked for."""
    nets = [net]
    if _info(net).get("phase") == "edm":
        if times is not None:
            raise ValueError(
                "times: apply to consistency networks, but this one is pre-trained only (phase "
                "edm); give a number of steps"
            )
        levels = heun_levels(HEUN_STEPS if steps is None else steps)

        def solve(noise: Noise, denoisers: list[Denoiser]) -> torch.Tensor:
            return heun(noise, denoisers[0], levels)

    else:
        levels = _times(steps, times, _info(net).get("t_prime"))
        nets = _networks_at(net, levels, stage1, allow_below_t_prime)

        def solve(noise: Noise, denoisers: list[Denoiser]) -> torch.Tensor:
            return multistep(noise, denoisers, levels)

    return _batches(
        nets, num, solve, seed=seed, labels=labels, batch_size=batch_size, start=start,
        device=device, progress=progress,
    )  # fmt: skip


def sample_edm(
    net: Precond,
    num: int,
    *,
    steps: int = HEUN_STEPS,
    seed: int = 0,
    labels: Labels = None,
    batch_size: int | None = None,
    start: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Draw images from a diffusion network with the deterministic solver of Karras et al. 2022
    (algorithm 1): `steps` noise levels, 2·steps - 1 evaluations. The rest is as in `sample`."""
    levels = heun_levels(steps)
    batches = _batches(
        [net], num, lambda noise, denoisers: heun(noise, denoisers[0], levels), seed=seed,
        labels=labels, batch_size=batch_size, start=start, device=device, progress=progress,
    )  # fmt: skip
    return torch.cat([images for _, images in batches])


def default_times(steps: int, t_prime: float | None = None) -> list[float]:
    """Noise levels of k-step sampling: T alone, or a geometric sequence from T down to 0.821 (the
    published two-step time), or to t' where that is higher, since a truncated network ends there.

    Geometric, because equal ratios divide ln t evenly, which is how the networks are told t and how
    training draws it; equal differences would spend nearly all steps at noise that hides everything
    but the coarsest shapes. For more than two steps nothing is published for these networks."""
    if steps < 1:
        raise ValueError(f"steps: must be at least 1, got {steps}")
    if steps == 1:
        return [T]
    lowest = max(LOWEST_TIME, t_prime or 0.0)
    ratio = lowest / T
    return [T * ratio ** (i / (steps - 1)) for i in range(steps - 1)] + [lowest]


def heun_levels(steps: int) -> list[float]:
    """Noise levels of the ODE solver (Karras et al. 2022, eq. 5, rho = 7), from 80 to 0.002,
    without the final 0. ValueError for fewer than 2 steps."""
    if steps < 2:
        raise ValueError(
            f"steps: a pre-trained network (phase edm) needs at least 2, {HEUN_STEPS} are usual, "
            f"got {steps}"
        )
    first, last = T ** (1 / RHO), SIGMA_MIN ** (1 / RHO)
    return [(first + i / (steps - 1) * (last - first)) ** RHO for i in range(steps)]


def multistep(noise: Noise, denoisers: Sequence[Denoiser], times: Sequence[float]) -> torch.Tensor:
    """Consistency sampling: denoise, add noise of the next level, denoise again. [n,C,H,W]"""
    y = denoisers[0](times[0] * noise(0), times[0])
    for i, (denoise, t) in enumerate(zip(denoisers[1:], times[1:], strict=True), start=1):
        y = denoise(y + t * noise(i), t)
    return y


def heun(noise: Noise, denoise: Denoiser, levels: Sequence[float]) -> torch.Tensor:
    """The probability-flow ODE dx/dt = (x - D(x,t))/t from levels[0] to 0 with Heun's second-order
    steps, the last one Euler's. [n,C,H,W]"""
    x = levels[0] * noise(0)
    for t, t_next in pairwise([*levels, 0.0]):
        slope = (x - denoise(x, t)) / t
        x_next = x + (t_next - t) * slope
        if t_next > 0:
            slope_next = (x_next - denoise(x_next, t_next)) / t_next
            x_next = x + (t_next - t) / 2 * (slope + slope_next)
        x = x_next
    return x


def to_uint8(x: torch.Tensor) -> torch.Tensor:
    """Images in [-1,1], [n,C,H,W] -> uint8 [n,H,W,C]: 127.5 x + 128, clipped and truncated."""
    return (127.5 * x + 128).clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def class_numbers(
    net: Precond, num: int, labels: Labels = None, start: int = 0
) -> torch.Tensor | None:
    """The class of each image that `sample` draws with these arguments: int64 [num], or None for an
    unconditional network. ValueError for labels that the network cannot serve."""
    rows = _label_rows(net, num, labels, start)
    return rows if rows is None or rows.ndim == 1 else rows.argmax(1)


# ---- arguments ----------------------------------------------------------------------------------


def _info(net: Precond) -> dict:
    return getattr(net, "info", {})


def _times(steps: int | None, times: Sequence[float] | None, t_prime: float | None) -> list[float]:
    """The noise levels to visit, T first."""
    if times is None:
        return default_times(1 if steps is None else steps, t_prime)
    levels = [float(t) for t in times]
    if not levels or levels[0] != T:
        levels.insert(0, T)
    if not (levels[-1] > 0 and all(t > t_next for t, t_next in pairwise(levels))):
        raise ValueError(
            f"times: must fall strictly from at most {T:g} and stay positive, got {list(times)}"
        )
    if steps not in (None, 1, len(levels)):
        raise ValueError(
            f"steps: {steps} steps need {steps - 1} times after the first, got {len(levels) - 1}"
        )
    return levels


def _networks_at(
    net: Precond, times: Sequence[float], stage1: Precond | None, allow_below_t_prime: bool
) -> list[Precond]:
    """Which network computes each time: below t' the stage-1 network."""
    t_prime = _info(net).get("t_prime")
    if t_prime is None or times[-1] >= t_prime:
        return [net] * len(times)
    stage1 = stage1 or getattr(net, "stage1", None)
    source = getattr(net, "source", None)
    if stage1 is None and source is not None:
        stage1 = load_stage1(source)
    if stage1 is None:
        if allow_below_t_prime:
            return [net] * len(times)
        raise ValueError(
            f"times: {times[-1]:g} lies below t'={t_prime:g}, where this network was not trained, "
            f"and its stage-1 network is not there; use times of at least {t_prime:g}, or allow it "
            "with --allow-below-t-prime"
        )
    for name in ("img_resolution", "img_channels", "label_dim"):
        if getattr(stage1, name) != getattr(net, name):
            raise ValueError(
                f"stage1: {name} must be the network's {getattr(net, name)}, "
                f"got {getattr(stage1, name)}"
            )
    return [stage1 if t < t_prime else net for t in times]


def _label_rows(net: Precond, num: int, labels: Labels, start: int) -> torch.Tensor | None:
    """Class numbers int64 [num], rows [num,K] as they were given, or None."""
    classes = net.label_dim
    if not classes:
        if labels is not None:
            raise ValueError("labels: the network is unconditional, it takes none")
        return None
    if isinstance(labels, torch.Tensor) and labels.ndim == 2:
        if labels.shape != (num, classes):
            raise ValueError(
                f"labels: one-hot labels must be [{num},{classes}], got {list(labels.shape)}"
            )
        return labels.to("cpu", torch.float32)
    given = torch.as_tensor(range(classes) if labels is None else labels)
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


def _default_batch_size(resolution: int, device: torch.device) -> int:
    """Images that occupy the device without filling its memory: 2^18 pixels on a GPU (256 at
    32x32), 2^15 on a CPU."""
    return max(1, 2 ** (15 if device.type == "cpu" else 18) // resolution**2)


# ---- the loop -----------------------------------------------------------------------------------


def _batches(
    nets: Sequence[Precond],
    num: int,
    solve: Solver,
    *,
    seed: int,
    labels: Labels,
    batch_size: int | None,
    start: int,
    device: str | torch.device | None,
    progress: bool,
) -> Iterator[tuple[int, torch.Tensor]]:
    """Check what all solvers share, then go through the images. nets: the network of each time."""
    net = nets[0]
    shape = (net.img_channels, net.img_resolution, net.img_resolution)
    if num < 1:
        raise ValueError(f"num: must be at least 1, got {num}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed: must lie in [0, 2**63), got {seed}")
    if not (start >= 0 and start + num <= 2**32):
        raise ValueError(f"start: images are numbered from 0 to 2**32 - 1, got {start} + {num}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size: must be at least 1, got {batch_size}")
    rows = _label_rows(net, num, labels, start)
    place = torch.device(device) if device is not None else _device_of(net)
    for model in set(nets):
        model.to(place)
    size = batch_size or _default_batch_size(net.img_resolution, place)

    @torch.inference_mode()
    def draw(first: int, n: int) -> torch.Tensor:
        numbers = torch.arange(start + first, start + first + n, device=place)
        given = None if rows is None else rows[first : first + n].to(place)
        if given is not None and given.ndim == 1:
            given = torch.nn.functional.one_hot(given, net.label_dim).to(torch.float32)

        def noise(step: int) -> torch.Tensor:
            return philox_normal(seed, step, NOISE_LAYER, numbers, shape)

        def denoiser(model: Precond) -> Denoiser:
            return lambda x, t: model(x, torch.full((n,), t, device=place), given)

        with _evaluating(nets):
            return to_uint8(solve(noise, [denoiser(model) for model in nets])).cpu()

    def generate() -> Iterator[tuple[int, torch.Tensor]]:
        with Progress(console=Console(stderr=True), disable=not progress) as bar:
            task = bar.add_task("sampling", total=num)
            for first in range(0, num, size):
                n = min(size, num - first)
                # The copy is an ordinary tensor: those of inference mode cannot be written to.
                yield start + first, draw(first, n).clone()
                bar.advance(task, n)

    return generate()


def _device_of(net: Precond) -> torch.device:
    tensor = next(net.parameters(), None)
    return torch.device("cpu") if tensor is None else tensor.device


@contextmanager
def _evaluating(nets: Iterable[torch.nn.Module]) -> Iterator[None]:
    """Eval mode for a while; every module gets back the mode it was in."""
    modes = [(module, module.training) for net in nets for module in net.modules()]
    for net in nets:
        net.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# ---- files --------------------------------------------------------------------------------------

NOT_OURS = {".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".npy", ".zip", ".pt"}
READABLE = 64  # pixels of an image's height in a grid
GAP = 2  # pixels between the images of a grid


def write_samples(
    batches: Iterable[tuple[int, torch.Tensor]],
    out: str | Path,
    *,
    labels: torch.Tensor | Sequence[int] | None = None,
    columns: int | None = None,
    scale: int | None = None,
    overwrite: bool = False,
) -> Path:
    """Write what `sample_batches` yields: a grid where `out` ends in .png, arrays (images, labels)
    where it ends in .npz, else a folder of PNGs named by the images' numbers, written as they come.

    Raises:
        FileExistsError: `out` (or a file in the folder) exists, unless `overwrite`; nothing is
            drawn where `out` itself is in the way.
        ValueError: an ending that stands for none of the three.
        OSError: the disk is full or the like.
    """
    out = Path(out)
    kind = out.suffix.lower()
    if kind in NOT_OURS:
        raise ValueError(f"out: must end in .png or .npz, or be a folder, got {out}")
    if kind in (".png", ".npz"):
        _check_free(out, overwrite)
        images = np.concatenate([_array(batch) for _, batch in batches])
        if kind == ".png":
            save_grid(images, out, columns, scale, overwrite=overwrite)
        else:
            save_npz(images, labels, out, overwrite=overwrite)
        return out
    _check_folder(out)
    for first, batch in batches:
        save_images(batch, out, start=first, overwrite=overwrite)
    return out


def save_grid(
    images: torch.Tensor | np.ndarray,
    path: str | Path,
    columns: int | None = None,
    scale: int | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write images (uint8 [N,H,W,C], C 1 or 3) as one PNG, row by row.

    columns: images per row, by default about as many as rows. scale: each pixel becomes scale²
    (nearest neighbour), by default so that small images are 64 pixels high. Errors as
    `write_samples`.
    """
    path, images = Path(path), _array(images)
    _check_free(path, overwrite)
    num, height, width, channels = images.shape
    columns = columns or math.ceil(math.sqrt(num))
    scale = scale or max(1, READABLE // height)
    if columns < 1 or scale < 1:
        raise ValueError(f"grid: columns and scale must be positive, got {columns} and {scale}")
    images = images.repeat(scale, axis=1).repeat(scale, axis=2)
    high, wide = height * scale + GAP, width * scale + GAP
    rows = math.ceil(num / columns)
    sheet = np.full((rows * high + GAP, columns * wide + GAP, channels), 128, np.uint8)
    for i, image in enumerate(images):
        top, left = GAP + i // columns * high, GAP + i % columns * wide
        sheet[top : top + height * scale, left : left + width * scale] = image
    with replacing(path) as temporary:
        _picture(sheet).save(temporary, format="PNG")


def save_images(
    images: torch.Tensor | np.ndarray,
    folder: str | Path,
    *,
    start: int = 0,
    overwrite: bool = False,
) -> None:
    """Write images (uint8 [N,H,W,C]) as folder/000000.png, ..., numbered from `start`. Errors as
    `write_samples`; where one of the files exists none is written."""
    folder = Path(folder)
    _check_folder(folder)
    paths = [folder / f"{start + i:06d}.png" for i in range(len(images))]
    for path in paths:
        _check_free(path, overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path, image in zip(paths, _array(images), strict=True):
            _picture(image).save(path, format="PNG")
    except OSError as error:
        raise OSError(f"{folder}: could not be written, {error.strerror or error}") from error


def save_npz(
    images: torch.Tensor | np.ndarray,
    labels: torch.Tensor | Sequence[int] | None,
    path: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write `images` uint8 [N,H,W,C] and, where given, `labels` int64 [N]. Errors as
    `write_samples`."""
    path = Path(path)
    _check_free(path, overwrite)
    arrays = {"images": _array(images)}
    if labels is not None:
        arrays["labels"] = np.asarray(labels, np.int64)
        if len(arrays["labels"]) != len(images):
            raise ValueError(f"labels: must be {len(images)}, got {len(arrays['labels'])}")
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, **arrays)  # type: ignore[arg-type]


def _array(images: torch.Tensor | np.ndarray) -> np.ndarray:
    array = images.cpu().numpy() if isinstance(images, torch.Tensor) else np.asarray(images)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ValueError(
            f"images: must be uint8 [N,H,W,C] with C 1 or 3, got {array.dtype} {list(array.shape)}"
        )
    return array


def _picture(array: np.ndarray) -> Image.Image:
    """uint8 [H,W,C] as a grey or RGB picture."""
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"out: {path} exists; choose another name, or allow --overwrite")


def _check_folder(folder: Path) -> None:
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out: must be a folder, got the file {folder}")
