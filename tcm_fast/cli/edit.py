"""`tcm-fast edit`: arguments and words. torch is imported when it runs."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tcm_fast.config import Precision

if TYPE_CHECKING:
    from tcm_fast.data.dataset import ImageData

with suppress(ModuleNotFoundError):  # only the command line's parsing needs it
    from tyro.conf import Positional

Task = Literal["inpaint", "colorize", "upscale", "stroke", "vary", "denoise", "interpolate"]
SETS = {".npz", ".zip", ".parquet"}  # endings of files with many images


@dataclass
class Edit:
    """Edit images with a trained network."""

    source: Positional[Path]
    """A run, a checkpoint, a network file or hf:user/repo; not one that is pre-trained only."""
    task: Task
    """inpaint fills a mask, colorize a grey image, upscale a small one; stroke makes an image of a rough
    picture, vary others like one; denoise removes noise; interpolate goes from a seed or image to another."""
    input: tuple[Path, ...] = ()
    """Image files of the network's size (of upscale smaller), or a folder, zip or npz of them."""
    mask: Path | None = None
    """An image, white where pixels are generated, or a folder, zip or npz with one for each image."""
    num: int | None = None
    """Results of each image, 1, or images of an interpolation, 8."""
    level: float | None = None
    """Noise level to begin with, a standard deviation with pixels in [-1,1]; of denoise that of the noise."""
    steps: int | None = None
    """Network evaluations of each result; by default 8 of inpaint, colorize and upscale, 1 or 2 of others."""
    times: tuple[float, ...] | None = None
    """Noise levels to return to after the first step, in falling order."""
    seed: int = 0
    seeds: tuple[int, int] | None = None
    """Both seeds of interpolate; by default the seed and the one after it."""
    classes: tuple[int, ...] | None = None
    """Class of all images, or of each (class-conditional networks); by default the labels of the input."""
    out: Path = Path("edited.png")
    """A .png (one image, or a grid with a row for each input), an .npz, or a folder of PNGs."""
    start: int = 0
    """Number of the first result, which chooses its noise."""
    batch_size: int | None = None
    allow_below_t_prime: bool = False
    """Use a stage-2 network at noise levels for which it was not trained."""
    overwrite: bool = False
    device: str = "auto"
    precision: Precision | None = None
    """Arithmetic of the network; by default fp16 on a GPU and fp32 elsewhere. bf16x3 is not yet timed on a
    GPU."""


def run_edit(args: Edit) -> int:
    from tcm_fast.checkpoint.format import load_network
    from tcm_fast.cli.demo import names
    from tcm_fast.runtime.distributed import pick_device
    from tcm_fast.sampling import image_io
    from tcm_fast.sampling.edit_arguments import FRAMES, to_grey
    from tcm_fast.sampling.editing import edit

    net = load_network(args.source, device=pick_device(args.device))
    images = mask = None
    classes = list(args.classes or ())
    if args.input:
        images, labels = read_images(args.input, "input", names(net))
        if net.label_dim and not classes and None not in labels:
            classes = labels
    if args.mask:
        mask = to_grey(read_images((args.mask,), "mask")[0])[..., 0]
        mask = mask[0] if len(mask) == 1 else mask
    is_path = args.task == "interpolate"
    rows = 1 if images is None or is_path else len(images)
    columns = (FRAMES if is_path else 1) if args.num is None else args.num
    image_io.check_out(args.out, args.overwrite, range(args.start, args.start + rows * columns))
    results = edit(
        net, images, args.task, mask=mask, num=args.num, level=args.level, steps=args.steps,
        times=args.times, seed=args.seed, seeds=args.seeds, labels=classes or None, start=args.start,
        batch_size=args.batch_size, allow_below_t_prime=args.allow_below_t_prime,
        precision=args.precision, progress=sys.stderr.isatty(),
    )  # fmt: skip
    shown = None  # the results' classes, unless they lie between two
    if classes and not (is_path and len(set(classes)) > 1):
        each = classes * rows if len(classes) == 1 else classes[:rows]
        shown = [k for k in each for _ in range(columns)]
    if len(results) == 1 and args.out.suffix.lower() == ".png":
        image_io.save_image(results[0], args.out, overwrite=args.overwrite)
    else:
        image_io.write_samples(
            [(args.start, results)], args.out, overwrite=args.overwrite, labels=shown,
            columns=columns if columns > 1 else None,
        )  # fmt: skip
    plural = "" if len(results) == 1 else "s"
    print(f"{len(results)} image{plural} of {args.task} in {args.out}")
    return 0


def read_images(
    paths: tuple[Path, ...], argument: str, classes: Sequence[str] = ()
) -> tuple[Any, list[Any]]:
    """Image files, and folders, zips and npz of images, as one uint8 tensor [N,H,W,C], and the number of each
    one's class among those named, or None. ValueError for what is no image, and for images of several
    sizes."""
    import numpy as np
    import torch

    from tcm_fast.data.dataset import load_images
    from tcm_fast.data.decode import FileReader, decode_file

    found: list[tuple[Path, np.ndarray]] = []
    labels: list[int | None] = []
    for path in paths:
        if path.is_dir() or path.suffix.lower() in SETS:
            data = load_images(path)
            found += [(path, image) for image in data.images]
            labels += class_numbers(data, classes)
            continue
        if not path.is_file():
            raise FileNotFoundError(f"{argument}: {path} does not exist")
        name, image = decode_file((str(path), path.read_bytes), FileReader(), None)
        if isinstance(image, Exception):
            raise ValueError(f"{argument}: {name} cannot be read: {image}")
        found.append((path, image if image.ndim == 3 else image[..., None]))
        labels.append(None)
    first, like = found[0]
    for path, image in found:
        if image.shape[:2] != like.shape[:2]:
            raise ValueError(
                f"{argument}: images must be of one size, but {first} is {like.shape[1]}x{like.shape[0]} and "
                f"{path} is {image.shape[1]}x{image.shape[0]}"
            )
    channels = max(image.shape[2] for _, image in found)
    arrays = [np.broadcast_to(image, (*like.shape[:2], channels)) for _, image in found]
    return torch.from_numpy(np.stack(arrays)), labels


def class_numbers(data: ImageData, classes: Sequence[str]) -> list[int | None]:
    """The number of each image's class among those named; of a set without names its own."""
    if data.labels is None:
        return [None] * len(data)
    names = data.class_names
    if names == tuple(map(str, range(len(names)))):
        return data.labels.tolist()
    numbers = {name: i for i, name in enumerate(classes)}
    return [numbers.get(names[k]) for k in data.labels]
