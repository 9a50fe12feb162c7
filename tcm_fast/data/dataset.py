"""Images in, uint8 batches out; the order of a run.

`load_images` brings any source into memory as uint8 [N,R,R,C]; `ImageStream` deals them out in an
order that depends on nothing but (seed, images seen), so that a resumed run sees what an unbroken
one would have. Formats and image modes are described in `tcm_fast.data.formats`.
"""

from __future__ import annotations

import dataclasses
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import track

from tcm_fast.data import formats, packed
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
        resolution: resize every image to this many pixels square (`tcm_fast.data.formats.fit`).
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
    if resolution is not None and resolution < 1:
        raise ValueError(f"data: resolution must be positive, got {resolution}")
    name = str(source)
    half = next((h for h in HALVES if name == f"digits{h}"), "")
    reading = Reading(skip_unlabelled=skip_unlabelled, renumber=renumber, convert=convert)
    found = _open(ASSETS / "digits.npz" if name == f"digits{half}" else source, reading)
    data = _bring_into_memory(found, name.removesuffix(half), skip_corrupt, resolution)
    return split_halves(data)[HALVES.index(half)] if half else data


def _is_built_in(source: str | Path) -> bool:
    return str(source) in ("digits", *(f"digits{half}" for half in HALVES))


def _open(source: str | Path, reading: Reading) -> ImageArrays | ImageFiles:
    """What a source holds; a split may stand behind its path, `PATH:SPLIT`."""
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


def _bring_into_memory(
    found: ImageArrays | ImageFiles, name: str, skip_corrupt: bool, resolution: int | None
) -> ImageData:
    """The images of an opened source, decoded and resized; those of a packed folder stay on the disk."""
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
    decode = partial(_decode_item, patience=_Patience(), resolution=resolution)
    images: np.ndarray | None = None
    first_name = ""
    kept, bad = np.ones(files.count, bool), []
    filled = 0
    for number, (name, result) in enumerate(_parallel(decode, files.items, files.count)):
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
        _report_unreadable(bad, files.count, source, skip_corrupt)
    assert images is not None
    labels = None if files.labels is None else files.labels[kept]
    return ImageArrays(images[:filled], labels, files.class_names)


class _Patience:
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


def _why_unreadable(error: Exception) -> str:
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image"
    if isinstance(error, Image.DecompressionBombError):
        return "more pixels than are safe to decode"
    return reason(error)


def _report_unreadable(bad: list[str], count: int, source: str, skip_corrupt: bool) -> None:
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
        return np.asarray(formats.fit(picture, resolution)).reshape(resolution, resolution, -1)

    result = _allocate(len(images), (resolution, resolution, 3)[: images.shape[3] + 1], source)
    for number, image in enumerate(_parallel(resize, images, len(images))):
        result[number] = image
    return result


def _parallel(function: Callable[[Any], T], items: Iterable[Any], count: int) -> Iterator[T]:
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


# ---- dealing out --------------------------------------------------------------------------------


class ImageStream:
    """An endless stream of images: one epoch after another, each in an order of its own.

    Epoch e is the permutation that sorts the output of Philox keyed by SeedSequence([seed, e]),
    which is stable over NumPy versions. Whether position i of the stream is mirrored is a hash of
    (seed, i). So what a position holds depends on nothing but the seed: not on batch size, number
    of ranks or whether the run was resumed.

    On CUDA the images are resident when they take less than a quarter of the free memory; otherwise
    each batch is gathered into pinned host memory and copied without waiting. What `prefetch` was told is
    gathered by a thread meanwhile: the pages of a mapped file may have to come from a disk.

    Args:
        data: the images.
        seed: non-negative.
        device: where batches are wanted.
        flip: mirror half of the images left to right.
    """

    def __init__(
        self, data: ImageData, *, seed: int, device: torch.device | str, flip: bool = False
    ) -> None:
        if seed < 0:
            raise ValueError(f"data: the seed must not be negative, got {seed}")
        self.data, self.flip = data, flip
        self.device = torch.device(device)
        # Two epochs are all that a batch of a large set can touch.
        self._permutation = lru_cache(maxsize=2)(partial(_permutation, seed, len(data)))
        self._flip_key = np.random.SeedSequence(seed, spawn_key=(1,)).generate_state(1, np.uint64)
        images = torch.from_numpy(np.require(data.images, requirements=("C", "W")))
        self.resident = self.device.type != "cuda" or _fits(images, self.device)
        self._images = images.to(self.device) if self.resident else images
        self._ahead: dict[bytes, Future[torch.Tensor]] = {}
        self._reader = ThreadPoolExecutor(1, "images") if not self.resident else None

    def indices(self, start: int, count: int) -> np.ndarray:
        """Dataset indices int64 [count] of the images start … start+count-1 of the stream."""
        return self.index_of(np.arange(start, start + count))

    def index_of(self, positions: np.ndarray) -> np.ndarray:
        """Dataset indices int64 [n] of stream positions int64 [n], all >= 0."""
        epochs, offset = np.divmod(np.asarray(positions, np.int64), len(self.data))
        distinct, row = np.unique(epochs, return_inverse=True)
        if not len(distinct):
            return np.empty(0, np.int64)
        return np.stack([self._permutation(int(e)) for e in distinct])[row, offset]

    def flipped(self, positions: np.ndarray) -> np.ndarray:
        """Whether stream positions int64 [n] are mirrored, bool [n]."""
        # SplitMix64 (Steele, Lea, Flood 2014): its state after `position` steps, mixed.
        z = np.asarray(positions).astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + self._flip_key
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return (z >> np.uint64(63)).astype(bool)

    def batch(self, positions: np.ndarray) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images at stream positions int64 [n], in the given order.

        Returns:
            images uint8 [n,C,R,R] on the device (channels_last strides) and one-hot labels fp32
            [n,K], or None where the data have none.
        """
        index = self.index_of(positions)
        labels = np.zeros_like(index) if self.data.labels is None else self.data.labels[index]
        flips = self.flipped(positions) if self.flip else np.zeros(len(index), bool)
        table = torch.from_numpy(np.stack([index, labels, flips]).astype(np.int64))
        if self.device.type == "cuda":
            table = table.pin_memory()
        table = table.to(self.device, non_blocking=True)
        images = self._gather(torch.from_numpy(index), table[0]).permute(0, 3, 1, 2)
        if self.flip:
            images = torch.where(table[2].bool()[:, None, None, None], images.flip(3), images)
        if self.data.labels is None:
            return images, None
        one_hot = torch.zeros(len(index), self.data.num_classes, device=self.device)
        return images, one_hot.scatter_(1, table[1][:, None], 1.0)

    def prefetch(self, positions: np.ndarray) -> None:
        """Read the images at these positions in the background: the next batch but one of a set that is
        not resident. Nothing for one that is."""
        if self._reader is not None:
            index = torch.from_numpy(self.index_of(positions))
            key = index.numpy().tobytes()
            if key not in self._ahead:
                self._ahead[key] = self._reader.submit(self._read, index)
            while len(self._ahead) > MOST_AHEAD:  # asked for and never fetched
                self._ahead.pop(next(iter(self._ahead)))

    def _gather(self, index: torch.Tensor, index_on_device: torch.Tensor) -> torch.Tensor:
        """uint8 [n,R,R,C] on the device."""
        if self.resident:
            return self._images.index_select(0, index_on_device)
        ready = self._ahead.pop(index.numpy().tobytes(), None)
        read = self._read(index) if ready is None else ready.result()
        return read.to(self.device, non_blocking=True)

    def _read(self, index: torch.Tensor) -> torch.Tensor:
        """uint8 [n,R,R,C] on the host, in pinned memory for a GPU."""
        shape, pinned = (len(index), *self._images.shape[1:]), self.device.type == "cuda"
        rows = torch.empty(shape, dtype=torch.uint8, pin_memory=pinned)
        return torch.index_select(self._images, 0, index, out=rows)


def _permutation(seed: int, count: int, epoch: int) -> np.ndarray:
    """A permutation int64 [count] of its own for every seed and epoch."""
    generator = np.random.Philox(np.random.SeedSequence([seed, epoch]))
    return np.argsort(generator.random_raw(count), kind="stable")


def _fits(images: torch.Tensor, device: torch.device) -> bool:
    free, _ = torch.cuda.mem_get_info(device)
    return images.nbytes < free / 4


def split_halves(data: ImageData, seed: int = 0) -> tuple[ImageData, ImageData]:
    """Two halves of a set, disjoint, complete and the same for the same seed; they differ by at
    most one image, in total and in every class, keep the set's order and are called `name:train`
    and `name:test`. ValueError for a single image."""
    order = _permutation(seed, len(data), 0)
    if data.labels is not None:
        order = order[np.argsort(data.labels[order], kind="stable")]
    if len(order) < 2:
        raise ValueError(f"data: {data.name} has one image and cannot be split")
    train, test = np.sort(order[::2]), np.sort(order[1::2])
    first, second = (data.name + half for half in HALVES)
    return data.select(train, first), data.select(test, second)


# ---- data pack, data info -----------------------------------------------------------------------


def pack(
    source: str | Path,
    destination: str | Path,
    *,
    resolution: int | None = None,
    skip_corrupt: bool = False,
    skip_unlabelled: bool = False,
    renumber: bool = False,
    overwrite: bool = False,
) -> int:
    """Write any source that `load_images` reads in a form that is quickly there: a zip of PNGs with
    dataset.json, which EDM's tools read as well, or a folder whose images are mapped into memory
    (`tcm_fast.data.packed`), for sets that do not fit there. The same images give the same bytes; what is
    written is complete or not there. A folder that was interrupted goes on where it stood.

    Returns:
        The number of images.

    Raises:
        FileExistsError: the destination is there and `overwrite` is False.
        ValueError, FileNotFoundError: as `load_images`, or a destination that is neither called .zip nor
            a folder's name.
        OSError: the file cannot be written; what was there before is untouched.
    """
    destination = Path(destination)
    is_zip = destination.suffix.lower() == ".zip"
    is_taken = destination.exists() and destination.is_dir() == is_zip  # by the other kind
    if is_taken or (destination.suffix and not is_zip):
        raise ValueError(
            "pack: the destination must be a file called .zip or a folder (a name without a dot), "
            f"got {destination}"
        )
    if destination.exists() and not overwrite:
        raise FileExistsError(f"pack: {destination} exists already, --overwrite replaces it")
    loaded = partial(
        load_images, source, skip_corrupt=skip_corrupt, resolution=resolution,
        skip_unlabelled=skip_unlabelled, renumber=renumber, convert=True,
    )  # fmt: skip
    if not is_zip:
        if _is_built_in(source):
            data = loaded()
            found: ImageArrays | ImageFiles
            found = ImageArrays(data.images, data.labels, data.class_names)
        else:
            found = _open(
                source, Reading(skip_unlabelled=skip_unlabelled, renumber=renumber, convert=True)
            )
        return _pack_folder(found, str(source), destination, resolution, skip_corrupt)
    data = loaded()
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            formats.write_zip(destination, data.images, data.labels, data.class_names, pool)
    except OSError as error:
        raise OSError(f"pack: cannot write {destination}: {reason(error)}") from error
    return len(data)


def _pack_folder(
    found: ImageArrays | ImageFiles,
    source: str,
    destination: Path,
    resolution: int | None,
    skip_corrupt: bool,
) -> int:
    """`pack` into a folder, image by image where the source is encoded files."""
    decode: Callable[[Any], tuple[str, np.ndarray | Exception]]
    about: dict[str, Any] = {"source": source}
    if isinstance(found, ImageFiles):
        if resolution is None:
            raise ValueError(f"pack: {destination} needs a size for its images, add --resolution R")
        size = resolution
        decode = partial(_decode_item, patience=_Patience(), resolution=resolution)
        if isinstance(found.items, list):  # files; what was begun with others must not go on
            names = "\n".join(name for name, _ in found.items)
            about["names"] = sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    else:
        data = _bring_into_memory(found, source, skip_corrupt, resolution)
        rows: Any = ((f"image {i}", i) for i in range(len(data)))
        found = ImageFiles(len(data), rows, data.labels, data.class_names)
        size = data.resolution

        def decode(item: tuple[str, int]) -> tuple[str, np.ndarray | Exception]:
            image = data.images[item[1]]
            return item[0], image if image.shape[2] == 3 else image[..., 0]

    count = found.count

    def refuse(unreadable: list[str]) -> None:
        _report_unreadable(unreadable, count, source, skip_corrupt)

    try:
        return packed.write_packed(
            found, destination, decode, _parallel, resolution=size,
            about={**about, "resolution": size, "classes": list(found.class_names)},
            refuse=refuse,
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"pack: cannot write {destination}: {reason(error)}") from error


def _decode_item(
    item: tuple[str, Callable[[], bytes]], patience: _Patience, resolution: int | None
) -> tuple[str, np.ndarray | Exception]:
    """A file's name, and its image or what is wrong with it."""
    name, read = item
    try:
        return name, formats.decode(patience.read(name, read), resolution)
    except Exception as error:  # damaged files raise nearly anything in Pillow's decoders
        return name, ValueError(_why_unreadable(error))


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
        return _open(source, Reading()).class_names


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
