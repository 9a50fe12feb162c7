"""Images on disk: a grid as one PNG, a folder of PNGs, or an npz."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from tcm_fast.runtime.atomic import replacing

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
    kind = check_out(out, overwrite)
    if kind in (".png", ".npz"):
        images = np.concatenate([_array(batch) for _, batch in batches])
        if kind == ".png":
            save_grid(images, out, columns, scale, overwrite=overwrite)
        else:
            save_npz(images, labels, out, overwrite=overwrite)
        return out
    for first, batch in batches:
        save_images(batch, out, start=first, overwrite=overwrite)
    return out


def check_out(out: Path, overwrite: bool = False, numbers: range = range(0)) -> str:
    """The ending of `out`, in lower case, after which `write_samples` goes. Its errors, before anything is
    drawn; of files in a folder where the images' numbers are given."""
    kind = out.suffix.lower()
    if kind in NOT_OURS:
        raise ValueError(f"out: must end in .png or .npz, or be a folder, got {out}")
    if kind in (".png", ".npz"):
        _check_free(out, overwrite)
    else:
        _check_names(out, numbers, overwrite)
    return kind


def save_image(
    image: torch.Tensor | np.ndarray, path: str | Path, *, overwrite: bool = False
) -> None:
    """Write one image, uint8 [H,W,C], as a PNG of its own size. Errors as `write_samples`."""
    path = Path(path)
    _check_free(path, overwrite)
    with replacing(path) as temporary:
        _picture(_array(image[None])[0]).save(temporary, format="PNG")


def save_grid(
    images: torch.Tensor | np.ndarray,
    path: str | Path,
    columns: int | None = None,
    scale: int | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write `grid` of the images as one PNG. Errors as `write_samples`."""
    path = Path(path)
    _check_free(path, overwrite)
    with replacing(path) as temporary:
        grid(images, columns, scale).save(temporary, format="PNG")


def grid(
    images: torch.Tensor | np.ndarray, columns: int | None = None, scale: int | None = None
) -> Image.Image:
    """Images (uint8 [N,H,W,C], C 1 or 3) as one picture, row by row.

    columns: images per row, by default about as many as rows. scale: each pixel becomes scale²
    (nearest neighbour), by default so that small images are 64 pixels high. ValueError for what is none.
    """
    images = _array(images)
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
    return _picture(sheet)


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
    paths = _check_names(folder, range(start, start + len(images)), overwrite)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:  # compressing and writing release the interpreter
            list(pool.map(_write_picture, _array(images), paths))
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


def _write_picture(array: np.ndarray, path: Path) -> None:
    _picture(array).save(path, format="PNG")


def _check_free(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"out: {path} exists; choose another name, or allow --overwrite")


def _check_names(folder: Path, numbers: range, overwrite: bool) -> list[Path]:
    """The files of images with such numbers in a folder."""
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out: must be a folder, got the file {folder}")
    paths = [folder / f"{number:06d}.png" for number in numbers]
    for path in paths:
        _check_free(path, overwrite)
    return paths
