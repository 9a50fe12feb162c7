"""Encoded images to uint8 arrays, in parallel.

One rule for all image modes. A picture is turned upright as its EXIF orientation says; an animation
is its first frame; 16-bit grey becomes 8-bit as round(v/257); transparency is composited on white.
Modes 1, L, LA and 16-bit grey are grey, all others (palettes too) are RGB. A set in which every
image is grey has one channel, any other three. (Pillow itself reduces 16-bit colour to its high
byte, and takes 16-bit grey with transparency for colour.)
"""

from __future__ import annotations

import io
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, TypeVar

import numpy as np
from PIL import Image, ImageOps
from rich.console import Console
from rich.progress import track

from tcm_fast.data.labels import reason

T = TypeVar("T")

GREY_MODES = ("1", "L", "LA")
SLICE = 32  # images per task: less and threads spend their time on the queue
SHOW_PROGRESS_FROM = 10_000  # images; fewer are there before one would read the bar
PAUSES = (0.1, 1.0, 3.0)  # seconds before a read that has failed is tried again
RETRIES = 30  # of all reads of a set
SLOW = 30.0  # seconds of a read that is worth a warning


def decode(encoded: bytes, resolution: int | None = None) -> np.ndarray:
    """Decode an image file to uint8 [H,W] (grey) or [H,W,3], by the rule at the top of this module;
    `resolution` resizes it to a square as `fit` does. Raises whatever Pillow raises."""
    with Image.open(io.BytesIO(encoded)) as opened:
        image = ImageOps.exif_transpose(opened) if "exif" in opened.info else opened
        image = _to_grey_or_rgb(image)
        return np.asarray(image if resolution is None else fit(image, resolution))


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """Mode L or RGB, transparency composited on white."""
    if image.mode.startswith("I"):
        image = _reduce_16_bit(image)
    elif image.mode == "F":
        raise ValueError("floating-point images have no fixed range")
    channel_mode = "L" if image.mode in GREY_MODES else "RGB"
    if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), rgba)
        return image.getchannel("R") if channel_mode == "L" else image.convert("RGB")
    return image if image.mode == channel_mode else image.convert(channel_mode)


def _reduce_16_bit(image: Image.Image) -> Image.Image:
    """16-bit grey to mode L; 65535/255 = 257. Pillow opens some such files as 32-bit integers."""
    values = np.asarray(image).astype(np.int64)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("integer images of more than 16 bits have no fixed range")
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        values[values == transparent] = 65535
    return Image.fromarray(((values + 128) // 257).astype(np.uint8))


def fit(image: Image.Image, resolution: int) -> Image.Image:
    """Resize an L or RGB image to resolution × resolution as ADM does (Dhariwal & Nichol 2021):
    box halvings while the shorter side is at least twice too long, bicubic, centre crop."""
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    size = round(image.width * scale), round(image.height * scale)
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


class FileReader:
    """Reads files. A disk or a network that fails is asked again, `RETRIES` times in all, and a read that
    takes its time is named; what is not there, or not for us, is not asked for again."""

    def __init__(self) -> None:
        self.left = RETRIES

    def read(self, name: str, read: Callable[[], bytes]) -> bytes:
        begun = time.monotonic()
        for pause in (*PAUSES, None):
            try:
                content = read()
                break
            except (FileNotFoundError, PermissionError, IsADirectoryError):
                raise
            except OSError:
                if pause is None or self.left <= 0:
                    raise
                self.left -= 1
                time.sleep(pause)
        seconds = time.monotonic() - begun
        if seconds > SLOW:
            warnings.warn(f"data: reading {name} took {seconds:.0f} s", stacklevel=2)
        return content


def decode_file(
    item: tuple[str, Callable[[], bytes]], reader: FileReader, resolution: int | None
) -> tuple[str, np.ndarray | Exception]:
    """A file's name, and its image or what is wrong with it."""
    name, read = item
    try:
        return name, decode(reader.read(name, read), resolution)
    except Exception as error:  # damaged files raise nearly anything in Pillow's decoders
        return name, ValueError(_why_unreadable(error))


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than are safe to decode"
    return reason(error)


def parallel(function: Callable[[Any], T], items: Iterable[Any], count: int) -> Iterator[T]:
    """The function of every item, in order, by threads (Pillow releases the lock while it decodes);
    a progress bar on stderr for large sets, if that is a terminal. Few items are held at a time."""
    console = Console(stderr=True)
    hide = count < SHOW_PROGRESS_FROM or not console.is_terminal
    slices = _batched(items, SLICE)
    workers = min(32, os.cpu_count() or 1)

    def run() -> Iterator[T]:
        with ThreadPoolExecutor(workers) as pool:
            for window in _batched(slices, 8 * workers):
                for results in pool.map(lambda part: [function(item) for item in part], window):
                    yield from results

    yield from track(run(), "images", total=count, console=console, disable=hide, transient=True)


def _batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    iterator = iter(items)
    while part := list(islice(iterator, size)):
        yield part
