"""Image formats: what a source holds, how one image becomes uint8, and the zip that EDM reads.

A source is either arrays (npz, CIFAR-10's binary archive) or encoded files (folder, zip, parquet),
which `tcm_fast.data` decodes in parallel. Nothing is ever extracted to disk, and nothing pickled is
ever read.

One rule for all image modes. A picture is turned upright as its EXIF orientation says; an animation
is its first frame; 16-bit grey becomes 8-bit as round(v/257); transparency is composited on white.
Modes 1, L, LA and 16-bit grey are grey, all others (palettes too) are RGB. A set in which every
image is grey has one channel, any other three. (Pillow itself reduces 16-bit colour to its high
byte, and takes 16-bit grey with transparency for colour.)
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image, ImageOps

FORMATS = ("avif", "bmp", "gif", "jpeg", "jpg", "pbm", "pgm", "png", "ppm", "tif", "tiff", "webp")
SUFFIXES = tuple(f".{name}" for name in FORMATS)
KINDS = "an image folder, .zip, .npz, cifar-10-binary.tar.gz, .parquet (file or folder) or 'digits'"
CIFAR10_ROW = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
GREY_MODES = ("1", "L", "LA")
MAX_ENTRY_BYTES = 1 << 30  # a zip entry that claims more is no image but a bomb


@dataclass(frozen=True)
class ImageArrays:
    """Images uint8 [N,H,W,C] with C 1 or 3, labels int64 [N] or None, a name per class."""

    images: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageFiles:
    """`count` encoded images as (name, function that reads its bytes), in the set's order; labels
    int64 [count] or None, a name per class."""

    count: int
    items: Iterable[tuple[str, Callable[[], bytes]]]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()


def open_source(source: Path) -> ImageArrays | ImageFiles:
    """Find out what a path holds.

    Raises:
        ValueError: what is there is no set of images, is empty, or contradicts itself.
        OSError: it cannot be read.
    """
    if source.is_dir():
        return _open_folder(source)
    for suffix, reader in _READERS.items():
        if source.name.lower().endswith(suffix):
            return reader(source)
    raise ValueError(f"data: {source} is not a kind of source that is known: {KINDS}")


# ---- one image ----------------------------------------------------------------------------------


def decode(encoded: bytes, resolution: int | None = None) -> np.ndarray:
    """Decode an image file to uint8 [H,W] (grey) or [H,W,3], by the rule at the top of this module;
    `resolution` resizes it to a square as `fit` does. Raises whatever Pillow stumbles over."""
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


# ---- folders and zips ---------------------------------------------------------------------------


def _open_folder(source: Path) -> ImageFiles:
    names = _walk(source)
    images = [n for n in names if _is_image(n)]
    if not images and any(n.endswith(".parquet") for n in names):
        return _open_parquet(source)
    described = source / "dataset.json"
    metadata = described.read_bytes() if described.is_file() else None
    labels, class_names = _labels(str(source), images, metadata)
    items = [(name, (source / name).read_bytes) for name in images]
    return ImageFiles(len(items), items, labels, class_names)


def _walk(root: Path) -> list[str]:
    """Files below a folder as sorted relative paths with forward slashes; follows links, but no
    folder twice."""

    def fail(error: OSError) -> None:  # os.walk alone would leave the folder out and say nothing
        raise error

    found, seen = [], set()
    for folder, subfolders, files in os.walk(root, onerror=fail, followlinks=True):
        real = os.path.realpath(folder)
        if real in seen:
            subfolders.clear()
            continue
        seen.add(real)
        relative = Path(folder).relative_to(root)
        found += [(relative / file).as_posix() for file in files]
    return sorted(found)


def _is_image(name: str) -> bool:
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _open_zip(source: Path) -> ImageFiles:
    try:
        archive = zipfile.ZipFile(source)  # stays open: the items read from it, from many threads
        entries = {e.filename: e for e in archive.infolist() if not e.is_dir()}
        described = entries.get("dataset.json")
        metadata = _read_entry(archive, described) if described else None
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"data: {source} is not a readable zip: {reason(error)}") from error
    images = sorted(filter(_is_image, entries))
    labels, class_names = _labels(str(source), images, metadata)
    items = [(name, partial(_read_entry, archive, entries[name])) for name in images]
    return ImageFiles(len(items), items, labels, class_names)


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > MAX_ENTRY_BYTES:
        raise zipfile.BadZipFile(f"unpacks to {entry.file_size} bytes")
    return archive.read(entry)


def _labels(
    source: str, names: list[str], metadata: bytes | None
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Labels of named images: from dataset.json's bytes, or else from their sub-folders."""
    if not names:
        raise ValueError(
            f"data: {source} holds no images, looked for {' '.join(SUFFIXES)} at any depth"
        )
    if metadata is not None:
        return _labels_from_json(source, names, metadata)
    parents = [PurePosixPath(name).parent.parts for name in names]
    while len({parts[:1] for parts in parents}) == 1 and parents[0]:
        parents = [parts[1:] for parts in parents]  # a folder that holds every image is no class
    if not all(parents):
        return None, ()
    folders = [parts[0] for parts in parents]
    class_names = sorted(set(folders))
    number = {name: index for index, name in enumerate(class_names)}
    return np.array([number[folder] for folder in folders], np.int64), tuple(class_names)


def _labels_from_json(
    source: str, names: list[str], metadata: bytes
) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """EDM's convention, {"labels": [[name, int], ...] or null}, with our own key "class_names"."""
    try:
        content = json.loads(metadata)
        pairs = content["labels"]
        table = None if pairs is None else dict(pairs)
        class_names = tuple(map(str, content.get("class_names") or ()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f'data: dataset.json in {source} must be {{"labels": [[file, int], ...]}} or '
            f'{{"labels": null}}, got {reason(error)}'
        ) from error
    if table is None:
        return None, ()
    missing = [name for name in names if name not in table]
    if missing:
        raise ValueError(
            f"data: dataset.json in {source} has no label for {len(missing)} of {len(names)} "
            f"images, the first is {missing[0]}"
        )
    return _check_labels(source, [table[name] for name in names], len(names), class_names)


def _check_labels(
    source: str, labels: Any, count: int, class_names: tuple[str, ...] = ()
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 [count], and a name for every class: its number where none is given."""
    try:
        array = np.asarray(labels)
    except ValueError:  # ragged
        array = np.asarray([], float)
    is_integer = array.dtype.kind in "iu"
    if not is_integer or array.shape != (count,) or array.min() < 0:
        smallest = f" from {array.min()}" if is_integer and array.size else ""
        raise ValueError(
            f"data: labels of {source} must be {count} class numbers (integers from 0), got "
            f"{array.dtype} {list(array.shape)}{smallest}"
        )
    classes = int(array.max()) + 1
    if class_names and len(class_names) < classes:
        raise ValueError(
            f"data: {source} names {len(class_names)} classes, but has labels up to {classes - 1}"
        )
    return array.astype(np.int64), class_names or tuple(map(str, range(classes)))


# ---- arrays -------------------------------------------------------------------------------------


def _read_npz(source: Path) -> ImageArrays:
    """Images uint8 [N,H,W] or [N,H,W,C] under `images` or `arr_0`; labels [N], if any, under
    `labels` or `arr_1`. Pickled content is refused."""
    if not zipfile.is_zipfile(source):
        raise ValueError(f"data: {source} is not an npz file")
    try:
        with np.load(source, allow_pickle=False) as archive:
            image_key = next((k for k in ("images", "arr_0") if k in archive), None)
            label_key = next((k for k in ("labels", "arr_1") if k in archive), None)
            if image_key is None:
                raise ValueError(f"no array 'images' or 'arr_0', only {archive.files}")
            images = archive[image_key]
            labels = None if label_key is None else archive[label_key]
    except (ValueError, OSError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {source} is not an npz of images: {reason(error)}") from error
    images = images[..., None] if images.ndim == 3 else images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3):
        raise ValueError(
            f"data: images of {source} must be uint8 [N,H,W], [N,H,W,1] or [N,H,W,3], got "
            f"{images.dtype} {list(images.shape)}"
        )
    if not images.size:
        raise ValueError(f"data: {source} holds no images, its array is {list(images.shape)}")
    if labels is None:
        return ImageArrays(images)
    return ImageArrays(images, *_check_labels(str(source), labels, len(images)))


def _read_cifar10(source: Path) -> ImageArrays:
    """The training images of cifar-10-binary.tar.gz as published (Krizhevsky 2009)."""
    wanted = {f"data_batch_{i}.bin": b"" for i in range(1, 6)} | {"batches.meta.txt": b""}
    try:
        with tarfile.open(source, "r:gz") as archive:
            for member in archive:
                name = PurePosixPath(member.name).name
                if name in wanted and member.isfile():
                    wanted[name] = archive.extractfile(member).read()  # type: ignore[union-attr]
    except (tarfile.TarError, OSError, EOFError, zlib.error) as error:
        raise ValueError(f"data: {source} is not a readable archive: {reason(error)}") from error
    class_names = tuple(wanted.pop("batches.meta.txt").decode("utf-8", "replace").split())
    missing = [name for name, content in wanted.items() if not content]
    if missing:
        raise ValueError(
            f"data: {source} has no {missing[0]}, expected cifar-10-binary.tar.gz as published "
            "(the python version holds pickles, which are not read)"
        )
    for name, content in wanted.items():
        if len(content) % CIFAR10_ROW:
            raise ValueError(
                f"data: {name} in {source} must consist of rows of {CIFAR10_ROW} bytes, got "
                f"{len(content)} bytes"
            )
    rows = np.frombuffer(b"".join(wanted.values()), np.uint8).reshape(-1, CIFAR10_ROW)
    images = np.ascontiguousarray(rows[:, 1:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
    return ImageArrays(images, *_check_labels(str(source), rows[:, 0], len(rows), class_names))


# ---- Hugging Face parquet -----------------------------------------------------------------------


def _open_parquet(source: Path) -> ImageFiles:
    """A column of {bytes, path} structs and, optionally, one of labels. Of a folder whose files say
    which split they are (`train-00000-of-00002.parquet`, `train/0.parquet`), the training split."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            f"data: reading {source} needs pyarrow, install it with pip install 'tcm-fast[hf]'"
        ) from None
    paths = [source] if source.is_file() else sorted(source.rglob("*.parquet"))
    train = [
        path for path in paths if any(p.startswith("train") for p in path.relative_to(source).parts)
    ]
    paths = train or paths
    try:
        files = [pq.ParquetFile(path) for path in paths]
        schema = files[0].schema_arrow
        image, label, class_names = _parquet_columns(source, schema)
        wanted = [image] if label is None else [image, label]
        for path, file in zip(paths, files, strict=True):
            absent = set(wanted) - set(file.schema_arrow.names)
            if absent:
                raise ValueError(f"data: {path} has no column {absent.pop()!r}")
        count = sum(file.metadata.num_rows for file in files)
        labels = None
        if label is not None:
            columns = [file.read(columns=[label]).column(0) for file in files]
            labels = np.concatenate([column.to_numpy() for column in columns])
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data: {source} is not a parquet of images: {reason(error)}") from error
    if not count:
        raise ValueError(f"data: {source} holds no images, its tables have no rows")
    items = _parquet_items(source, list(zip(paths, files, strict=True)), image)
    if labels is None or (labels == -1).all():  # -1 is how Hugging Face says "not given"
        return ImageFiles(count, items)
    return ImageFiles(count, items, *_check_labels(str(source), labels, count, class_names))


def _parquet_columns(source: Path, schema: Any) -> tuple[str, str | None, tuple[str, ...]]:
    """Names of the image and label columns, and of the classes if the metadata have them."""
    images = [
        field.name
        for field in schema
        if hasattr(field.type, "get_field_index") and field.type.get_field_index("bytes") >= 0
    ]
    if not images:
        raise ValueError(
            f"data: {source} has no image column (a struct with a field 'bytes'), its columns are "
            f"{', '.join(schema.names)}"
        )
    features = {}
    if b"huggingface" in (schema.metadata or {}):
        features = json.loads(schema.metadata[b"huggingface"]).get("info", {}).get("features", {})
    for name in schema.names:
        feature = features.get(name)
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel":
            return images[0], name, tuple(map(str, feature.get("names") or ()))
    return images[0], next((n for n in ("label", "labels") if n in schema.names), None), ()


def _parquet_items(
    source: Path, files: list[tuple[Path, Any]], column: str
) -> Iterator[tuple[str, Callable[[], bytes]]]:
    import pyarrow as pa

    try:
        for path, file in files:
            row = 0
            for batch in file.iter_batches(batch_size=512, columns=[column]):
                for value in batch.column(0):
                    yield f"{path.name} row {row}", partial(_parquet_bytes, value)
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data: {source} is damaged: {reason(error)}") from error


def _parquet_bytes(value: Any) -> bytes:
    encoded = value["bytes"].as_py() if value.is_valid else None
    if encoded is None:
        raise ValueError("the row holds no bytes")
    return encoded


_READERS: dict[str, Callable[[Path], ImageArrays | ImageFiles]] = {
    ".zip": _open_zip,
    ".npz": _read_npz,
    ".tar.gz": _read_cifar10,
    ".parquet": _open_parquet,
}


# ---- writing ------------------------------------------------------------------------------------


def write_zip(
    destination: Path,
    images: np.ndarray,
    labels: np.ndarray | None,
    class_names: tuple[str, ...],
    pool: Executor,
) -> None:
    """Write an uncompressed zip of PNGs as EDM reads it: 00000/img00000000.png, ..., dataset.json.

    The same images give the same bytes. The file appears under its name only when it is complete.

    Args:
        images: uint8 [N,R,R,C], C 1 or 3.
        labels: int64 [N] or None.
        pool: encodes PNGs in parallel.
    """
    names = [f"{i // 1000:05d}/img{i:08d}.png" for i in range(len(images))]
    pairs = None if labels is None else [[n, int(k)] for n, k in zip(names, labels, strict=True)]
    metadata = {"labels": pairs} | ({"class_names": class_names} if pairs else {})
    temporary = destination.with_name(f".{destination.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("xb") as file:
            with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
                for start in range(0, len(images), 1024):  # bounds what is encoded but not written
                    part = slice(start, start + 1024)
                    for name, png in zip(names[part], pool.map(_png, images[part]), strict=True):
                        _add_entry(archive, name, png)
                _add_entry(archive, "dataset.json", json.dumps(metadata).encode())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(destination)
    finally:
        temporary.unlink(missing_ok=True)


def _png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image if image.shape[-1] == 3 else image[..., 0]).save(buffer, "png")
    return buffer.getvalue()


def _add_entry(archive: zipfile.ZipFile, name: str, content: bytes) -> None:
    entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
    entry.create_system = 3  # Unix, wherever it is written
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content)


def reason(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
