"""Editing with a network, shown and measured: python -m tcm_fast.benchmarks.editing_study RUN --data IMAGES

IMAGES are some that the network was not trained on. A picture: for each task what is given, its mask, and
five results; last interpolations. And a table: kernel distances (KID) of edited images to the rest of the
set, whole and of the generated part alone, beside naive copies; and images per second of CPU time. The
picture goes to --out, the table beside it and to the standard output.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt

from tcm_fast.checkpoint.format import load_network
from tcm_fast.data.dataset import ImageData, load_images
from tcm_fast.evaluation.features import FeatureSpace, feature_space
from tcm_fast.evaluation.metrics import kernel_distance
from tcm_fast.networks import Precond
from tcm_fast.sampling.edit_arguments import enlarged, to_grey
from tcm_fast.sampling.editing import edit

SAMPLES = 5  # of each image in the picture
FACTOR = 4  # by which the small images of `upscale` are smaller
NOISE = 0.5  # level of `denoise`
STEPS = (1, 4, 8)  # network calls that the table tries
HEIGHT, MARGIN = 48, 76  # pixels of the picture: of an image, and of the tasks' names


def half(size: int) -> torch.Tensor:
    """The right half, bool [size,size]."""
    return (torch.arange(size) >= size // 2).expand(size, size)


def centre(size: int) -> torch.Tensor:
    """A square of half the width in the middle, bool [size,size]."""
    inner = (torch.arange(size) - size / 2 + 0.5).abs() < size / 4
    return inner[:, None] & inner


def shrink(images: torch.Tensor) -> torch.Tensor:
    """Means of patches, uint8 [N,H/k,W/k,C]."""
    n, size, _, channels = images.shape
    patches = images.reshape(n, size // FACTOR, FACTOR, size // FACTOR, FACTOR, channels)
    return (patches.double().mean((2, 4)) + 0.5).to(torch.uint8)


def nearest_known(images: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Each pixel of the mask a copy of the nearest one outside."""
    index = distance_transform_edt(mask.numpy(), return_distances=False, return_indices=True)
    rows, columns = torch.from_numpy(index)
    return images[:, rows, columns]


def bicubic(small: torch.Tensor, size: int) -> torch.Tensor:
    """Small images enlarged by Pillow."""
    pictures = [Image.fromarray(x.squeeze(-1).numpy()).resize((size, size)) for x in small]
    return torch.from_numpy(np.stack(pictures)).reshape(len(small), size, size, -1)


def noisy(images: torch.Tensor) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(images.shape, generator=generator) * (127.5 * NOISE)
    return (images + noise).round().clamp(0, 255).to(torch.uint8)


# ---- the picture --------------------------------------------------------------------------------


def picture(net: Precond, data: ImageData, path: Path, columns: int) -> None:
    """Rows of images: what is given, the mask in white, results; in so many columns."""
    size, channels = net.img_resolution, net.img_channels
    images = torch.from_numpy(data.images)
    number = iter(range(len(images)))
    rows: list[tuple[str, torch.Tensor]] = []

    def add(
        task: str, make: Callable[[torch.Tensor], torch.Tensor], mask: torch.Tensor | None = None,
        **options: float | int,
    ) -> None:  # fmt: skip
        i = next(number)
        given = make(images[i : i + 1])
        labels = int(data.labels[i]) if net.label_dim and data.labels is not None else None
        results = edit(net, given, task, mask=mask, num=SAMPLES, labels=labels, **options)  # type: ignore[arg-type]
        shown = enlarged(given, size).expand(-1, -1, -1, channels).clone()
        hole = torch.zeros(size, size, dtype=torch.bool) if mask is None else mask
        if task == "inpaint":
            shown[:, hole] = 128
        white = (hole * 255).to(torch.uint8)[None, ..., None].expand(-1, -1, -1, channels)
        rows.append((task, torch.cat([shown, white, results])))

    for mask in (half(size), half(size), centre(size), centre(size)):
        add("inpaint", lambda x: x, mask)
    if channels == 3:
        for _ in range(4):
            add("colorize", to_grey)
    for _ in range(2):
        add("upscale", shrink)
    for _ in range(2):
        add("stroke", lambda x: enlarged(shrink(x), size), level=2.0)
    for _ in range(2):
        add("vary", lambda x: x, level=1.0)
    for _ in range(2):
        add("denoise", noisy, level=NOISE, times=(0.25,))
    for seed in (0, 2):
        classes = [seed, seed + 1] if net.label_dim > 3 else None
        frames = edit(net, None, "interpolate", num=SAMPLES + 2, seed=seed, labels=classes)
        rows.append(("interpolate", frames))
    high = -(-len(rows) // columns)
    step, wide = HEIGHT + 2, MARGIN + (SAMPLES + 2) * (HEIGHT + 2) + 12
    sheet = Image.new("RGB", (columns * wide, high * step), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (task, row) in enumerate(rows):
        left, top = i // high * wide, i % high * step
        draw.text((left + 4, top + HEIGHT // 2 - 6), task, fill="black")
        for k, image in enumerate(row.expand(-1, -1, -1, 3)):
            pixels = Image.fromarray(image.contiguous().numpy())
            pixels = pixels.resize((HEIGHT, HEIGHT), Image.Resampling.NEAREST)
            sheet.paste(pixels, (left + MARGIN + k * step, top))
    sheet.save(path, optimize=True)


# ---- the table ----------------------------------------------------------------------------------


def table(net: Precond, data: ImageData, space: FeatureSpace, num: int) -> str:
    """Markdown: how far edited images are from real others, and images per second of CPU time."""
    num = min(num, len(data) // 2)
    images, others = torch.from_numpy(data.images).split((num, len(data) - num))
    labels = None
    if net.label_dim and data.labels is not None:
        labels = torch.from_numpy(data.labels[:num])
    size = net.img_resolution
    lines = [
        "| task | by | KID | of the generated part | images per CPU second |",
        "|---|---|---|---|---|",
    ]

    def only(x: torch.Tensor, mask: torch.Tensor | None) -> np.ndarray:
        return space.features(x if mask is None else torch.where(mask[..., None], x, 128))

    def add(task: str, by: str, x: torch.Tensor, mask: torch.Tensor | None, rate: str = "") -> None:
        distance = kernel_distance(only(x, None), only(others, None))
        part = "" if mask is None else f"{kernel_distance(only(x, mask), only(others, mask)):.3f}"
        lines.append(f"| {task} | {by} | {distance:.3f} | {part} | {rate} |")
        print(lines[-1], flush=True)

    def run(task: str, given: torch.Tensor, mask: torch.Tensor | None = None) -> None:
        for steps in STEPS:
            begun = time.process_time()
            x = edit(net, given, task.split(",")[0], mask=mask, labels=labels, steps=steps)
            rate = f"{len(x) / (time.process_time() - begun):.0f}"
            add(task, f"network, {steps} call{'s' * (steps > 1)}", x, mask, rate)

    print("\n".join(lines))
    for name, mask in (("right half", half(size)), ("middle", centre(size))):
        task = f"inpaint, {name}"
        other = torch.where(mask[..., None], images.roll(1, 0), images)
        add(task, "nothing, real images", images, mask)
        add(task, "nearest known pixels", nearest_known(images, mask), mask)
        add(task, "mirrored", torch.where(mask[..., None], images.flip(2), images), mask)
        add(task, "another image", other, mask)
        run(task, images, mask)
    small = shrink(images)
    add("upscale", "nearest pixels", enlarged(small, size), None)
    add("upscale", "bicubic", bicubic(small, size), None)
    run("upscale", small)
    if net.img_channels == 3:
        grey = to_grey(images)
        add("colorize", "grey", grey.expand(-1, -1, -1, 3), None)
        run("colorize", grey)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path, help="a run, a checkpoint or a network file")
    parser.add_argument("--data", required=True, help="images that it was not trained on")
    parser.add_argument("--features", default="random", help="as --eval.features")
    parser.add_argument("--num", type=int, default=400, help="images of the table; 0 for none")
    parser.add_argument("--columns", type=int, default=2, help="rows of the picture side by side")
    parser.add_argument("--out", type=Path, default=Path("editing.png"))
    args = parser.parse_args()
    net = load_network(args.source)
    data = load_images(args.data)
    order = np.random.default_rng(0).permutation(len(data))
    data = data.select(order, data.name)
    picture(net, data, args.out, args.columns)
    if args.num:
        args.out.with_suffix(".md").write_text(
            table(net, data, feature_space(args.features), args.num) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
