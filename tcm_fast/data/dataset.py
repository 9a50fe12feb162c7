"""`load_images`: any source as uint8 [N,R,R,C] in memory, its labels and class names.

What a path holds is found out by `tcm_fast.data.formats`, encoded images become arrays in
`tcm_fast.data.decode`, batches of a run come from `tcm_fast.data.stream`.
"""

from __future__ import annotations

import dataclasses
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from tcm_fast.data import formats, packed
from tcm_fast.data.decode import FileReader, decode_file, fit, parallel
from tcm_fast.data.formats import ImageArrays, ImageFiles
from tcm_fast.data.labels import Reading, reason

T = TypeVar("T")

ASSETS = Path(__file__).parents[1] / "assets"
HALVES = (":train", ":test")
SLICE = 32  # images per task: less and threads spend their time on the queue
SHOW_PROGRESS_FROM = 10_000  # images; fewer are there before one would read the bar
PAUSES = (0.1, 1.0, 3.0)  # seconds before a read that has failed is tried again
RETRIES = 30  # of all reads of a set
SLOW = 30.0  # seconds of a read that is worth a warning
MOST_AHEAD = 256  # batches that are read in advance
NAMED = 3  # unreadable images that an error names


@dataclass(frozen=True, eq=False)
class ImageData:
    """A set of images in memory.

    images: uint8 [N,R,R,C], C 1 (grey) or 3 (RGB); labels: int64 [N] or None; name: what to call
    the set; class_names: one per class, empty without labels.

    Raises:
        ValueError: shapes, dtypes or labels that do not fit together.
    """

    images: np.ndarray
    labels: np.ndarray | None
    name: str
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        shape = self.images.shape
        good = len(shape) == 4 and shape[1] == shape[2] and shape[3] in (1, 3) and min(shape) > 0
        if self.images.dtype != np.uint8 or not good:
            raise ValueError(
                "data: images must be uint8 [N,R,R,C] with C 1 or 3, got "
                f"{self.images.dtype} {list(shape)}"
            )
        labels, classes = self.labels, len(self.class_names)
        if labels is None:
            if classes:
                raise ValueError(
                    f"data: images without labels have no classes, got {classes} names"
                )
        elif labels.dtype != np.int64 or labels.shape != shape[:1]:
            raise ValueError(
                f"data: labels must be int64 [{shape[0]}], got {labels.dtype} {list(labels.shape)}"
            )
        elif labels.min() < 0 or labels.max() >= classes:
            raise ValueError(
                f"data: labels must lie in [0, {classes}), got {labels.min()} to {labels.max()}"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""
        return len(self.class_names)

    @property
    def resolution(self) -> int:
        """Height and width in pixels."""
        return self.images.shape[1]

    @property
    def channels(self) -> int:
        return self.images.shape[3]

    def select(self, index: np.ndarray, name: str) -> ImageData:
        """The images of an index [n], under another name."""
        labels = None if self.labels is None else self.labels[index]
        return dataclasses.replace(self, images=self.images[index], labels=labels, name=name)


# ---- loading ------------------------------------------------------------------------------------


def load_images(
    source: str | Path,
    *,
    skip_corrupt: bool = False,
    skip_unlabelled: bool = False,
    resolution: int | None = None,
    renumber: bool = False,
    convert: bool = False,
) -> ImageData:
    """Bring a set of images into memory.

    Args:
        source: one of
            - `digits`: 1 797 handwritten digits of 8×8 pixels, built in; `digits:train` and
              `digits:test` are their class-balanced halves (a folder of that name is `./digits`);
            - a folder of images, at any depth, in the sorted order of their paths; where each of
              them lies in some sub-folder, the sub-folders are the classes, numeric names in numeric
              order. Of folders called train, test and the like one has to be chosen: `FOLDER:train`;
            - a zip of such a folder, or one with EDM's dataset.json (unpacked, too);
            - an npz: images under `images`, `arr_0`, `x`, `x_train` or `train_images`, their labels,
              if any, under `labels`, `arr_1`, `y`, `y_train` or `train_labels`. Images are uint8
              [N,H,W] or [N,H,W,C], or whatever is exactly that in another form
              (`tcm_fast.data.arrays`);
            - a folder that `pack` has written: its images are mapped into memory, not read;
            - cifar-10-binary.tar.gz as published: the 50 000 training images;
            - a Hugging Face image parquet, or a folder of them (needs pyarrow, the `hf` extra).
        skip_corrupt: go on without images that cannot be read, with a warning that says how many.
        skip_unlabelled: leave out images that have no label while others have, with such a warning.
        resolution: resize every image to this many pixels square (`tcm_fast.data.decode.fit`).
        renumber: number only the classes that have images.
        convert: take arrays that bytes cannot hold exactly: round values, composite transparency on
            white.

    Warns of whatever is left out (files of other kinds, arrays, classes without an image) or had to be
    guessed (an array's layout and range).

    Raises:
        FileNotFoundError: there is no such source.
        ValueError: nothing in it, images that cannot be read (up to three are named), are not
            square or differ in size, labels that do not fit or contradict one another, or splits of
            which none was chosen.
        OSError: the source is there, but may not be read.
    """
    reading = Reading(skip_unlabelled=skip_unlabelled, renumber=renumber, convert=convert)
    return to_memory(open_images(source, reading), str(source), skip_corrupt, resolution)


def open_images(source: str | Path, reading: Reading) -> ImageArrays | ImageFiles:
    """What a source holds; a split may stand behind its path, `PATH:SPLIT`."""
    if str(source) in ("digits", *(f"digits{half}" for half in HALVES)):
        return _digits(str(source).removeprefix("digits"))
    path = Path(source)
    before, colon, split = str(source).rpartition(":")
    if colon and not path.exists() and Path(before).exists():
        path, reading = Path(before), dataclasses.replace(reading, split=split)
    if not path.exists():
        where = "" if path.is_absolute() else f" in {Path.cwd()}"
        raise FileNotFoundError(f"data: {source} does not exist{where}, expected {formats.KINDS}")
    try:
        if path.is_dir() and packed.is_packed(path):
            return packed.open_packed(path, reading)
        return formats.open_source(path, reading)
    except OSError as error:
        raise OSError(f"data: cannot read {source}: {reason(error)}") from error


def _digits(half: str) -> ImageArrays:
    """The built-in digits or a half of them."""
    found = formats.open_source(ASSETS / "digits.npz")
    assert isinstance(found, ImageArrays)
    if not half:
        return found
    digits = ImageData(found.images, found.labels, "digits", found.class_names)
    chosen = split_halves(digits)[HALVES.index(half)]
    return ImageArrays(chosen.images, chosen.labels, chosen.class_names)


def to_memory(
    found: ImageArrays | ImageFiles, name: str, skip_corrupt: bool, resolution: int | None
) -> ImageData:
    """The images of an opened source, decoded and resized; those of a packed folder stay on the disk."""
    if resolution is not None and resolution < 1:
        raise ValueError(f"data: resolution must be positive, got {resolution}")
    if isinstance(found, ImageFiles):
        found = _decode_all(found, name, skip_corrupt, resolution)
    elif resolution is not None and found.images.shape[1:3] != (resolution, resolution):
        found = dataclasses.replace(found, images=_resize_all(found.images, name, resolution))
    height, width = found.images.shape[1:3]
    if height != width:
        raise _wrong_size(f"images of {name} are {width}x{height}")
    return ImageData(found.images, found.labels, name, found.class_names)


def _decode_all(
    files: ImageFiles, source: str, skip_corrupt: bool, resolution: int | None
) -> ImageArrays:
    """Decode encoded files in parallel, straight into one array."""
    decode = partial(decode_file, reader=FileReader(), resolution=resolution)
    images: np.ndarray | None = None
    first_name = ""
    kept, bad = np.ones(files.count, bool), []
    filled = 0
    for number, (name, result) in enumerate(parallel(decode, files.items, files.count)):
        if isinstance(result, Exception):
            kept[number] = False
            bad.append(f"{name} ({reason(result)})")
            continue
        height, width = result.shape[:2]
        if images is None:
            if height != width:
                raise _wrong_size(f"{name} in {source} is {width}x{height}")
            first_name = name
            images = _allocate(files.count, result.shape, source)
        if (height, width) != images.shape[1:3]:
            first = f"{first_name} is {images.shape[2]}x{images.shape[1]}"
            raise _wrong_size(f"in {source} {first} and {name} is {width}x{height}")
        if result.ndim == 3 and images.shape[3] == 1:  # the first colour image of a grey beginning
            grey = images
            images = _allocate(files.count, result.shape, source)
            images[:filled] = grey[:filled]
        images[filled] = result if result.ndim == 3 else result[..., None]
        filled += 1
    if bad:
        report_unreadable(bad, files.count, source, skip_corrupt)
    assert images is not None
    labels = None if files.labels is None else files.labels[kept]
    return ImageArrays(images[:filled], labels, files.class_names)


def _allocate(count: int, shape: tuple[int, ...], source: str) -> np.ndarray:
    """uint8 [count,H,W,C] for images [H,W] or [H,W,3]."""
    shape = (count, *shape[:2], 3 if len(shape) == 3 else 1)
    try:
        return np.empty(shape, np.uint8)
    except (MemoryError, ValueError):
        raise ValueError(
            f"data: {count} images of {shape[2]}x{shape[1]} in {source} do not fit in memory; "
            "resize them with tcm-fast data pack SRC DST --resolution R"
        ) from None


def _wrong_size(what: str) -> ValueError:
    return ValueError(
        f"data: images must be square and of one size, but {what}; resize them with "
        "tcm-fast data pack SRC DST --resolution R"
    )


def report_unreadable(bad: list[str], count: int, source: str, skip_corrupt: bool) -> None:
    """Raise, or warn if the user said to go on and something is left."""
    named = ", ".join(bad[:NAMED]) + (", ..." if len(bad) > NAMED else "")
    what = f"{len(bad)} of {count} images in {source} cannot be read: {named}"
    if not skip_corrupt:
        raise ValueError(
            f"data: {what}; --skip-corrupt (of train: --data.skip-corrupt) goes on without them"
        )
    if len(bad) == count:
        raise ValueError(f"data: {what}; none is left")
    warnings.warn(f"data: left out, {what}", stacklevel=4)


def _resize_all(images: np.ndarray, source: str, resolution: int) -> np.ndarray:
    """uint8 [N,H,W,C] -> [N,resolution,resolution,C]."""

    def resize(image: np.ndarray) -> np.ndarray:
        grey = image.shape[-1] == 1
        picture = Image.fromarray(image[..., 0] if grey else image)
        return np.asarray(fit(picture, resolution)).reshape(resolution, resolution, -1)

    result = _allocate(len(images), (resolution, resolution, 3)[: images.shape[3] + 1], source)
    for number, image in enumerate(parallel(resize, images, len(images))):
        result[number] = image
    return result


def permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    """A permutation int64 [count] of its own for every seed and epoch."""
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(generator.random_raw(count), kind="stable")


def split_halves(data: ImageData, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Two halves of a set, disjoint, complete and the same for the same seed; they differ by at
    most one image, in total and in every class, keep the set's order and are called `name:train`
    and `name:test`. ValueError for a single image."""
    order = permutation(seed, len(data), 0)
    if data.labels is not None:
        order = order[np.argsort(data.labels[order], kind="stable")]
    if len(order) < 2:
        raise ValueError(f"data: {data.name} has one image and cannot be split")
    train, test = np.sort(order[::2]), np.sort(order[1::2])
    first, second = (data.name + half for half in HALVES)
    return data.select(train, first), data.select(test, second)


# ---- what a set is -----------------------------------------------------------------------


def _images_of_classes(found: ImageData) -> dict[str, int] | None:
    """Number of images by the class's name, in the order of the classes; None without labels."""
    if found.labels is None:
        return None
    names = found.class_names
    counts = np.bincount(found.labels, minlength=len(names)).tolist()
    unique = [n if names.count(n) == 1 else f"{n} ({k})" for k, n in enumerate(names)]
    return dict(zip(unique, counts, strict=True))


def class_names_of(source: str | Path) -> tuple[str, ...]:
    """Names of a source's classes; its images are not decoded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return open_images(source, Reading()).class_names


def class_mapping(class_names: tuple[str, ...], most: int = 20) -> str:
    """Which number is which class: "0 cat, 1 dog"."""
    if class_names == tuple(map(str, range(len(class_names)))):
        return f"0 to {len(class_names) - 1}"
    pairs = [f"{number} {name}" for number, name in enumerate(class_names)]
    return ", ".join(pairs if len(pairs) <= most else [*pairs[: most - 1], "...", pairs[-1]])


def describe(
    source: str | Path,
    *,
    resolution: int | None = None,
    skip_corrupt: bool = False,
    skip_unlabelled: bool = False,
) -> dict[str, Any]:
    """What there is to know about a source: source, images (number), resolution, channels, classes
    (images of each by name, or None), value_range (smallest, largest), mean (per channel, of 0…255)
    and bytes (in memory)."""
    data = load_images(
        source, resolution=resolution, skip_corrupt=skip_corrupt, skip_unlabelled=skip_unlabelled
    )
    total = data.images.sum(axis=(0, 1, 2), dtype=np.uint64)
    return {
        "source": data.name,
        "images": len(data),
        "resolution": data.resolution,
        "channels": data.channels,
        "classes": _images_of_classes(data),
        "value_range": (int(data.images.min()), int(data.images.max())),
        "mean": tuple((total * data.channels / data.images.size).round(2).tolist()),
        "bytes": data.images.nbytes,
    }
