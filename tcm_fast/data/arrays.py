"""Arrays of images as people have them: which array of an npz holds them, and how they become uint8.

What bytes hold exactly is taken as it is: channels first, floats that are k/255, an opaque alpha
channel. What they do not hold exactly is rounded or composited on white by `data pack` alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from tcm_fast.data.labels import SPLITS, Reading, say, some

PLAIN = (("images", "labels"), ("arr_0", "arr_1"), ("x", "y"))
OF_A_SPLIT = (("x_{}", "y_{}"), ("X_{}", "y_{}"), ("{}_images", "{}_labels"))  # Keras, MedMNIST
CHUNK = 1024  # images that are converted at a time
CONVERT = "tcm-fast data pack SRC DST converts them"


def choose_arrays(source: str, arrays: Sequence[str], split: str) -> tuple[str, str | None]:
    """Names of the arrays of images and of labels, if there are any. ValueError where there is no array
    of images."""
    plain = [(pair, "") for pair in PLAIN]
    divided = [((a.format(s), b.format(s)), s) for s in SPLITS for a, b in OF_A_SPLIT]
    there = [(pair, own) for pair, own in plain + divided if pair[0] in arrays]
    wanted = [(pair, own) for pair, own in there if not split or own == split]
    if not wanted:
        what = f"no split {split!r}" if split else "no array 'images' or 'arr_0'"
        raise ValueError(f"{what}, only {list(arrays)}")
    (images, labels), own = wanted[0]
    read = [name for name in (images, labels) if name in arrays]
    unread = sorted(set(arrays) - set(read))
    if unread:
        others = [name for _, name in there if name != own]
        advice = f"; {source}:{others[0]} is another split" if others else ""
        say(f"of {source}, {' and '.join(read)} are read, but not {some(unread)}{advice}")
    return images, labels if labels in arrays else None


@dataclass(frozen=True)
class Scale:
    """What the values v of an array stand for: the byte (v + offset) · factor. A value that is no further
    than `tolerance` from a byte is that byte."""

    name: str
    factor: float = 1.0
    offset: float = 0.0
    tolerance: float = 1e-6

    def to_bytes(self, values: np.ndarray) -> tuple[np.ndarray, bool]:
        """uint8, and whether nothing but the values' own rounding was lost."""
        exact = (values + np.float64(self.offset)) * self.factor
        rounded = np.rint(exact)
        return rounded.astype(np.uint8), bool(np.abs(exact - rounded).max() <= self.tolerance)


def to_uint8(images: np.ndarray, source: str, reading: Reading) -> np.ndarray:
    """uint8 [N,H,W,C], C 1 or 3, from an array of another layout, type or number of channels.

    Args:
        images: [N,H,W], [N,H,W,C] or [N,C,H,W] with C from 1 to 4, which are grey, grey and alpha, RGB
            or RGBA; integers from 0 to 255 or 65535, floats in 0..1, -1..1 or 0..255, or bool.
        source: what to call the set.
        reading: whether values may be rounded, and transparency composited on white.

    Raises:
        ValueError: another shape, type or range, or what would have to be converted and may not.
    """
    shape = f"{images.dtype} {list(images.shape)}"
    images = images[..., None] if images.ndim == 3 else images
    axis = _channel_axis(images.shape)
    if axis is None or images.dtype.kind not in "buif":
        raise ValueError(
            f"data: images of {source} must be numbers [N,H,W], [N,H,W,C] or [N,C,H,W] with C from 1 "
            f"to 4, got {shape}"
        )
    if not images.size:
        raise ValueError(f"data: {source} holds no images, its array is {list(images.shape)}")
    done, lossy = [], []
    if axis == 1:
        images = images.transpose(0, 2, 3, 1)
        done.append("channels first")
    if images.dtype != np.uint8:
        scale = _scale(images, source)
        images, is_exact = _chunked(scale.to_bytes, images, images.shape[3])
        done.append(f"values {scale.name}" + ("" if is_exact else ", rounded"))
        lossy += [] if is_exact else ["values between those of bytes"]
    if images.shape[3] in (2, 4):
        images, is_opaque = _chunked(_on_white, images, images.shape[3] - 1)
        done.append("an opaque alpha channel" if is_opaque else "transparency on white")
        lossy += [] if is_opaque else ["transparency"]
    if lossy and not reading.convert:
        raise ValueError(
            f"data: images of {source}, {shape}, have {' and '.join(lossy)}; {CONVERT}"
        )
    if done:
        say(f"images of {source}, {shape}, are taken as {', '.join(done)}")
    return np.ascontiguousarray(images) if axis == 1 else images


def _chunked(
    function: Callable[[np.ndarray], tuple[np.ndarray, bool]], images: np.ndarray, channels: int
) -> tuple[np.ndarray, bool]:
    """A function of all images, uint8 [N,H,W,channels], and whether it lost nothing anywhere."""
    result, is_exact = np.empty((*images.shape[:3], channels), np.uint8), True
    for first in range(0, len(images), CHUNK):
        part = slice(first, first + CHUNK)
        result[part], exact = function(images[part])
        is_exact &= exact
    return result, is_exact


def _on_white(images: np.ndarray) -> tuple[np.ndarray, bool]:
    """255 - (255-v)·alpha/255, rounded; and whether alpha is 255 everywhere."""
    alpha = images[..., -1:].astype(np.uint16)
    return 255 - ((255 - images[..., :-1]) * alpha + 127) // 255, bool((alpha == 255).all())


def _channel_axis(shape: tuple[int, ...]) -> int | None:
    """Where the channels are: last, unless only second place makes the images square or is possible."""
    if len(shape) != 4:
        return None
    possible = [axis for axis in (3, 1) if 1 <= shape[axis] <= 4]
    is_square = {3: shape[1] == shape[2], 1: shape[2] == shape[3]}
    return next((axis for axis in possible if is_square[axis]), next(iter(possible), None))


def _scale(images: np.ndarray, source: str) -> Scale:
    kind, low, high = images.dtype.kind, images.min(), images.max()
    if kind == "b":
        return Scale("False and True", factor=255.0)
    if kind == "f" and low >= -1 and high <= 1:
        # Twice what storing a byte's value loses, perhaps as fp32 before it was widened.
        tolerance = 255 * max(float(np.finfo(kept).eps) for kept in (images.dtype, np.float32))
        if low < 0:
            return Scale("in -1..1", factor=127.5, offset=1.0, tolerance=tolerance)
        return Scale("in 0..1", factor=255.0, tolerance=tolerance)
    if low >= 0 and high <= 255:
        return Scale("in 0..255")
    if kind in "ui" and low >= 0 and high <= 65535:
        return Scale("in 0..65535", factor=1 / 257)
    ranges = "0..1, -1..1 or 0..255" if kind == "f" else "0..255 or 0..65535"
    raise ValueError(f"data: images of {source} must lie in {ranges}, got {low} to {high}")
