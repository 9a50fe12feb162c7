"""Zero-shot editing with a consistency model: inpainting, colourisation, super-resolution, strokes,
denoising, interpolation and variations, without training for any of them.

One algorithm for all (Song et al. 2023, Consistency Models, algorithm 4): add noise to the known part of the
image and denoise it in one call; put the known part back; add less noise, and so on. A task says what is
known (`tcm_fast.sampling.projections`), at which noise level it begins, and from what. A truncated model has
two networks for it, its own at t ≥ t' and its frozen stage-1 network below.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tcm_fast.kernels.philox import philox_normal
from tcm_fast.networks import Precond
from tcm_fast.sampling.arguments import Labels, check_numbers, one_hot
from tcm_fast.sampling.edit_arguments import (
    FRAMES,
    TASKS,
    Images,
    Project,
    as_images,
    between,
    both_seeds,
    check_ints,
    check_network,
    check_projection,
    check_range,
    edit_labels,
    edit_levels,
    enlarged,
    find_task,
    in_channels,
    label_path,
    mask_rows,
    to_grey,
)
from tcm_fast.sampling.projections import (
    KnownPixels,
    Projection,
    known_luminance,
    known_patch_means,
)
from tcm_fast.sampling.sampler import NOISE_LAYER, Sampler, generate
from tcm_fast.sampling.solvers import Denoiser, Noise, Solver


def edit(
    net: Precond,
    images: Images | None,
    task: str | Project,
    *,
    mask: Images | None = None,
    num: int | None = None,
    level: float | None = None,
    steps: int | None = None,
    times: Sequence[float] | None = None,
    seed: int = 0,
    seeds: tuple[int, int] | None = None,
    labels: Labels = None,
    batch_size: int | None = None,
    stage1: Precond | None = None,
    allow_below_t_prime: bool = False,
    start: int = 0,
    device: str | torch.device | None = None,
    precision: str | None = None,
    progress: bool = False,
) -> torch.Tensor:
    """Edit images with a consistency model, `num` results of each.

    | task | given | kept | generated |
    |---|---|---|---|
    | `inpaint` | images and a mask | pixels outside the mask, exactly | those in it, whatever they were |
    | `colorize` | grey images (of RGB ones their luminance) | the luminance | the colours |
    | `upscale` | images k times smaller | the mean of each k × k patch | the detail |
    | `stroke` | a rough picture, perhaps a mask | pixels outside the mask | an image like it (SDEdit) |
    | `vary` | images, perhaps a mask | pixels outside the mask | images like them |
    | `denoise` | images with Gaussian noise of standard deviation `level` | nothing | the images without it |
    | `interpolate` | two seeds, or two images | nothing | `num` images from one to the other |
    | a function P | images | P x | x - P x |

    What is kept is kept in bytes as well: `colorize` returns images whose `convert("L")` is the grey image
    given, `upscale` images whose patches have the given bytes as rounded means; a function's P x is kept
    up to rounding and clipping to bytes. An edit visits the noise levels level = t_0 > t_1 > ...:
    x = y + t_0 z, x = D(x, t_0), x with the known part of y; then again from x with t_1 and new noise.
    Sources: inpainting, colourisation and super-resolution Song et al. 2023, `stroke` Meng et al. 2022
    (SDEdit).

    Args:
        net: a consistency network, ours or any module D(x, t, labels) with `img_resolution`,
            `img_channels` and `label_dim`; used in eval mode and left in the mode it was in.
        images: uint8 [N,H,W,C], of `upscale` [N,H/k,W/k,C]; `denoise` also takes floats in units of
            [-1,1], since bytes clip noise. A grey image may come with 1 channel or 3 equal ones. Of
            `interpolate` two images, or None for two seeds alone.
        task: one of the names above, or an orthogonal projection P of fp32 [n,C,H,W] in [-1,1], on the
            network's device, onto what is known: linear, with P P = P and <P x, x - P x> = 0.
        mask: bool or uint8 [H,W] or [N,H,W]: True, or 128 and above, where pixels are generated.
        num: results of each image (1), or images of an interpolation with both ends (8).
        level: the noise level t_0 to begin with, a standard deviation in units of [-1,1]; of `denoise` that
            of the noise in the images. Higher levels keep less of a stroke or an image. By default 80; of
            `stroke` 4, `vary` 1, `interpolate` 80 between seeds and 2 between images.
        steps: network calls; by default 8 where something is kept, 2 of `stroke`, 1 of the others. Their
            levels fall geometrically to 0.2, or to t' where there is no stage-1 network.
        times: noise levels after the first (which may be given too), strictly falling, instead.
        seed: of the noise; result k of a seed has the same noise whatever the batch or device.
        seeds: of `interpolate`, the two seeds, by default `seed` and the one after it. Its ends are what
            `sample` draws of them at the same levels (images=None).
        labels: of class-conditional networks: an int for all images, an int for each, or one-hot rows
            [N,K]. Of `interpolate` one class, or two to go from one to the other.
        start: number of the first result; image i's results are numbered from start + i·num on.
        batch_size, stage1, allow_below_t_prime, device, precision, progress: as in `sample`.

    Returns:
        uint8 [N·num,H,W,C] on the CPU, the results of the first image first.

    Raises:
        ValueError, TypeError: arguments that the network or the task does not support; the message says
            which.
    """
    name, what = find_task(task)
    check_network(net, name)
    check_ints(num=num, steps=steps, seed=seed, start=start, batch_size=batch_size)
    # What a task does not take is an error, not ignored.
    if mask is not None and what.mask == "none":
        takers = ", ".join(key for key, value in TASKS.items() if value.mask != "none")
        raise ValueError(f"mask: is for {takers}; {name} takes none")
    if seeds is not None and name != "interpolate":
        raise ValueError(f"seeds: are for interpolate; {name} takes one seed")
    solve: Solver
    if name == "interpolate":
        frames = FRAMES if num is None else num
        given, level = between(net, images, frames, level)
        solve = interpolation(both_seeds(seed, seeds), start)
        rows, inputs, num = label_path(net, labels, frames), frames, 1
    else:
        known: Projection | None = None
        y, num = as_images(net, images, name), 1 if num is None else num
        if name == "colorize":
            y, known = to_grey(y), known_luminance()
        elif name == "upscale":
            known = known_patch_means(net.img_resolution // y.shape[1])
            y = enlarged(y, net.img_resolution)
        elif callable(task):
            known = Projection(task)
        y, inputs = in_channels(y, net.img_channels), len(y)
        given = [y, *mask_rows(mask, what, name, y)]
        solve = editing(
            known, hides=name == "inpaint" or callable(task), is_noisy=name == "denoise"
        )
        rows = edit_labels(net, labels, inputs)
    check_numbers(inputs * num if num > 0 else num, seed, start, batch_size)
    levels, nets = edit_levels(net, name, what, level, steps, times, stage1, allow_below_t_prime)
    if name == "denoise":
        check_range(y, levels[0])
    sampler = Sampler(nets, solve, levels, seed=seed, device=device, precision=precision)
    if callable(task):
        check_projection(task, sampler.shape, sampler.device)

    def given_to(first: int, n: int) -> list[torch.Tensor]:
        chosen = torch.arange(first, first + n) // num
        labelled = [] if rows is None else [one_hot(rows[chosen], net.label_dim)]
        return [*labelled, *(tensor[chosen] for tensor in given)]

    batches = generate(sampler, inputs * num, given_to, start, batch_size, progress=progress)
    return torch.cat([results for _, results in batches])


# ---- the algorithm ------------------------------------------------------------------------------


def editing(known: Projection | None, *, hides: bool = True, is_noisy: bool = False) -> Solver:
    """The solver of an edit, which takes besides the images y (uint8 [n,H,W,C], or fp32 in units of [-1,1])
    and, where pixels are kept, a mask [n,1,H,W].

    known: what is kept; None for nothing, or the pixels outside the mask.
    hides: begin with the known part alone, not with all of y.
    is_noisy: y is noisy already.
    """

    def solve(
        noise: Noise, denoisers: Sequence[Denoiser], levels: Sequence[float], y: torch.Tensor,
        *masks: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        y = _pixels(y)
        keep = KnownPixels(masks[0]) if masks else known
        x = keep(y) if hides and keep is not None else y
        for i, (denoiser, t) in enumerate(zip(denoisers, levels, strict=True)):
            if i or not is_noisy:
                x = x + t * noise(i)
            x = denoiser(x, t)
            if keep is not None:
                x = (keep.replace if i < len(levels) - 1 else keep.finish)(x, y)
        return x

    return solve


def interpolation(seeds: tuple[int, int], number: int = 0) -> Solver:
    """The solver of an interpolation: at places in [0,1] (fp32 [n]), on top of y (fp32 [n,H,W,C]), the noise
    of each step is that of two seeds' image `number`, spherically interpolated."""

    def solve(
        noise: Noise, denoisers: Sequence[Denoiser], levels: Sequence[float], y: torch.Tensor,
        place: torch.Tensor,
    ) -> torch.Tensor:  # fmt: skip
        x = _pixels(y)
        numbers = torch.full((1,), number, dtype=torch.int64, device=y.device)
        for i, (denoiser, t) in enumerate(zip(denoisers, levels, strict=True)):
            a, b = (philox_normal(seed, i, NOISE_LAYER, numbers, x.shape[1:]) for seed in seeds)
            x = denoiser(x + t * slerp(a, b, place), t)
        return x

    return solve


def slerp(a: torch.Tensor, b: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """Spherical interpolation [n,C,H,W] from a to b, both [1,C,H,W] and of about one length, at places [n]
    in [0,1]; a straight line between equal ones."""
    cosine = (a * b).sum() / (a.square().sum() * b.square().sum()).sqrt()
    angle = cosine.clamp(-1, 1).acos()
    sine, place = angle.sin(), place.reshape(-1, 1, 1, 1)
    is_line = sine < 1e-4
    sine = torch.where(is_line, 1, sine)
    shares = (1 - place, place)
    of_a, of_b = (torch.where(is_line, s, torch.sin(s * angle) / sine) for s in shares)
    return of_a * a + of_b * b


def _pixels(y: torch.Tensor) -> torch.Tensor:
    """fp32 [n,C,H,W] in [-1,1] of uint8, or as it is in fp32, [n,H,W,C]."""
    y = y if y.is_floating_point() else y.to(torch.float32) / 127.5 - 1
    return y.permute(0, 3, 1, 2)
