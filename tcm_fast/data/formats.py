"""Image formats: what a source holds.

A source is either arrays (npz, CIFAR-10's binary archive) or encoded files (folder, zip, parquet),
which `tcm_fast.data.decode` decodes in parallel. Nothing is ever extracted to disk, and nothing pickled is
ever read.
"""

from __future__ import annotations

import json
import os
import tarfile
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from itertools import compress
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from tcm_fast.data.arrays import choose_arrays, to_uint8
from tcm_fast.data.labels import (
    AS_IT_IS,
    Labelled,
    Reading,
    check_labels,
    choose_split,
    class_folders,
    clean_name,
    labels_from_json,
    leave_out,
    reason,
    say,
)

SUFFIXES = (
    ".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".ppm", ".tif",
    ".tiff", ".webp",
)  # fmt: skip
HEIF_SUFFIXES = (".heic", ".heif")  # read where pillow-heif is installed
METADATA = "dataset.json"
STACK = "put them together with numpy.savez('set.npz', images=uint8 [N,H,W,C], labels=int [N])"
KINDS = "an image folder, .zip, .npz, cifar-10-binary.tar.gz, .parquet (file or folder) or 'digits'"
CIFAR10_ROW = 1 + 3 * 32 * 32  # a label, then the red, green and blue planes
GREY_MODES = ("1", "L", "LA")
MAX_ENTRY_BYTES = 1 << 30  # a zip entry that claims more is no image but a bomb
Read = Callable[[], bytes]


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
    items: Iterable[tuple[str, Read]]
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()


def open_source(source: Path, reading: Reading = AS_IT_IS) -> ImageArrays | ImageFiles:
    """Find out what a path holds.

    Warns of whatever is left out or taken for something.

    Raises:
        ValueError: what is there is no set of images, is empty, or contradicts itself.
        OSError: it cannot be read.
    """
    if source.is_dir():
        return _open_folder(source, reading)
    for suffix, reader in _READERS.items():
        if source.name.lower().endswith(suffix):
            return reader(source, reading)
    raise ValueError(f"data: {source} is not a kind of source that is known: {KINDS}")


# ---- folders and zips ---------------------------------------------------------------------------


def _open_folder(source: Path, reading: Reading) -> ImageFiles:
    paths = _walk(source)
    if any(n.endswith(".parquet") for n in paths) and not any(map(_is_image, paths)):
        return _open_parquet(source, reading)
    return _from_files(source, [(path, (source / path).read_bytes) for path in paths], reading)


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


def _open_zip(source: Path, reading: Reading) -> ImageFiles:
    try:
        archive = zipfile.ZipFile(source)  # stays open: the items read from it, from many threads
        files = [
            (_entry_name(entry), partial(_read_entry, archive, entry))
            for entry in archive.infolist()
            if not entry.filename.endswith(("/", "\\"))
        ]
        return _from_files(source, files, reading)
    except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError, zlib.error) as error:
        raise ValueError(f"data: {source} is not a readable zip: {reason(error)}") from error


def _entry_name(entry: zipfile.ZipInfo) -> str:
    """The name of a zip's entry; many programs write UTF-8 without saying so."""
    if entry.flag_bits & 0x800:
        return entry.filename
    try:
        return entry.filename.encode("cp437").decode("utf-8")
    except UnicodeError:
        return entry.filename


def _read_entry(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    if entry.file_size > MAX_ENTRY_BYTES:
        raise zipfile.BadZipFile(f"unpacks to {entry.file_size} bytes")
    return archive.read(entry)


def _from_files(source: Path, files: Iterable[tuple[str, Read]], reading: Reading) -> ImageFiles:
    """The images among named files, in the order of their names."""
    reads: dict[str, Read] = {}
    for path, read in files:
        name = clean_name(path)
        if reads.setdefault(name, read) is not read and (_is_image(name) or name == METADATA):
            raise ValueError(f"data: {source} holds two files of the name {name}")
    is_image = {name: _is_image(name) for name in reads}
    images = sorted(name for name in reads if is_image[name])
    if not images:
        raise ValueError(f"data: {source} holds no images{_instead(list(reads))}")
    unread = [n for n in reads if not is_image[n] and PurePosixPath(n).name != METADATA]
    if kinds := _kinds(unread):
        say(f"{len(images)} images in {source}; not read: {kinds}")
    if reading.split or METADATA not in reads:
        images = choose_split(str(source), images, reading.split)
    found = _label_files(str(source), images, reads, reading)
    chosen = [name for name, keep in zip(images, found.kept, strict=True) if keep]
    return ImageFiles(
        len(chosen), [(name, reads[name]) for name in chosen], found.labels, found.class_names
    )


def _label_files(
    source: str, images: list[str], reads: dict[str, Read], reading: Reading
) -> Labelled:
    """By dataset.json, if it lies in a folder that holds all images, or else by their sub-folders."""
    described = [n for n in reads if PurePosixPath(n).name == METADATA and not _is_hidden(n)]
    described.sort(key=len)
    for path in described:
        folder = path.removesuffix(METADATA).rstrip("/")
        if not folder or all(name.startswith(f"{folder}/") for name in images):
            return labels_from_json(source, images, reads[path](), folder, reading)
    if described:
        folder = described[0].removesuffix(METADATA)
        stranger = next(name for name in images if not name.startswith(folder))
        raise ValueError(
            f"data: {described[0]} in {source} describes its own folder only, and {stranger} lies "
            "outside of it; give that folder alone"
        )
    return class_folders(source, images, reading)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _is_image(name: str) -> bool:
    return PurePosixPath(name).suffix.lower() in SUFFIXES + _heif() and not _is_hidden(name)


@cache
def _heif() -> tuple[str, ...]:
    """The suffixes that pillow-heif reads, where it is installed."""
    try:
        import pillow_heif
    except ImportError:
        return ()
    pillow_heif.register_heif_opener()
    return HEIF_SUFFIXES


def _kinds(names: list[str]) -> str:
    """What kinds of files these are and how many of each: "3 .heic, 1 .txt"; hidden ones count where
    they are images."""
    kinds: Counter[str] = Counter()
    for path in map(PurePosixPath, names):
        suffix = path.suffix.lower()
        if not _is_hidden(str(path)):
            kinds[suffix or "without a suffix"] += 1
        elif suffix in SUFFIXES and not path.name.startswith("._"):  # such are macOS's notes
            kinds["hidden"] += 1
    ordered = sorted(kinds.items(), key=lambda item: (-item[1], item[0]))
    text = ", ".join(f"{count} {kind}" for kind, count in ordered)
    needs_heif = any(kinds[suffix] for suffix in HEIF_SUFFIXES) and not _heif()
    return text + (" (pip install pillow-heif for .heic)" if needs_heif else "")


def _instead(names: list[str]) -> str:
    """What there is where there are no images, and what to do."""
    arrays = [PurePosixPath(n).name for n in names if n.lower().endswith(".npy")]
    if any(n.startswith("img-mean-std-") for n in arrays):
        return (
            f", but {len(arrays)} latents of EDM2's autoencoder ({arrays[0]}): networks here work on "
            "pixels; give the images that they were made of"
        )
    if arrays:
        return f", but {len(arrays)} arrays ({arrays[0]}): {STACK}"
    kinds = _kinds(names)
    return f", looked for {' '.join(SUFFIXES)} at any depth" + (f", found {kinds}" if kinds else "")


# ---- arrays -------------------------------------------------------------------------------------


def _read_npz(source: Path, reading: Reading) -> ImageArrays:
    """Images and labels of an npz (`tcm_fast.data.arrays` says of which names, layouts and types). Pickled
    content is refused."""
    if not zipfile.is_zipfile(source):
        raise ValueError(f"data: {source} is not an npz file")
    try:
        with np.load(source, allow_pickle=False) as archive:
            if len(set(archive.files)) < len(archive.files):
                raise ValueError(f"two arrays of one name among {archive.files}")
            image_key, label_key = choose_arrays(str(source), archive.files, reading.split)
            images = archive[image_key]
            labels = None if label_key is None else archive[label_key]
    except (ValueError, OSError, EOFError, MemoryError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"data: {source} is not an npz of images: {reason(error)}") from error
    images = to_uint8(images, str(source), reading)
    if labels is None:
        return ImageArrays(images)
    return ImageArrays(images, *check_labels(str(source), labels, len(images), reading=reading))


def _refuse_npy(source: Path, reading: Reading) -> ImageArrays:
    raise ValueError(f"data: {source} is one array: {STACK}")


def _read_cifar10(source: Path, reading: Reading) -> ImageArrays:
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
    return ImageArrays(
        images, *check_labels(str(source), rows[:, 0], len(rows), class_names, reading)
    )


# ---- Hugging Face parquet -----------------------------------------------------------------------


def _open_parquet(source: Path, reading: Reading) -> ImageFiles:
    """A column of {bytes, path} structs and, optionally, one of labels. Of a folder whose files say
    which split they are (`train-00000-of-00002.parquet`, `train/0.parquet`), the training split or
    the one that is asked for."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ValueError(
            f"data: reading {source} needs pyarrow, install it with pip install 'tcm-fast[hf]'"
        ) from None
    paths = _parquet_paths(source, reading.split)
    try:
        files = [pq.ParquetFile(path) for path in paths]
        schema = files[0].schema_arrow
        image, label, class_names = _parquet_columns(source, schema)
        wanted = [image] if label is None else [image, label]
        for path, file in zip(paths, files, strict=True):
            absent = set(wanted) - set(file.schema_arrow.names)
            if absent:
                raise ValueError(f"data: {path} has no column {absent.pop()!r}")
        counts = [file.metadata.num_rows for file in files]
        columns = [] if label is None else [file.read(columns=[label]).column(0) for file in files]
        labels = [value for column in columns for value in column.to_pylist()]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"data: {source} is not a parquet of images: {reason(error)}") from error
    if not sum(counts):
        raise ValueError(f"data: {source} holds no images, its tables have no rows")
    items = _parquet_items(source, list(zip(paths, files, strict=True)), image)
    unlabelled = np.array(
        [value in (None, -1) for value in labels], bool
    )  # -1: Hugging Face's None
    if unlabelled.all():
        return ImageFiles(sum(counts), items)

    def name_of(row: int) -> str:
        file = int(np.searchsorted(np.cumsum(counts), row, side="right"))
        return f"{paths[file].name} row {row - sum(counts[:file])}"

    leave_out(str(source), unlabelled, name_of, reading)
    labelled = np.flatnonzero(~unlabelled)
    checked = check_labels(
        str(source), [labels[row] for row in labelled], len(labelled), class_names, reading,
        lambda index: name_of(int(labelled[index])),
    )  # fmt: skip
    return ImageFiles(len(labelled), compress(items, ~unlabelled), *checked)


def _parquet_paths(source: Path, split: str) -> list[Path]:
    if source.is_file():
        if split:
            raise ValueError(f"data: {source} is one file, it has no split {split!r}")
        return [source]
    paths = sorted(source.rglob("*.parquet"))

    def of(name: str) -> list[Path]:
        return [
            path
            for path in paths
            if any(p.startswith(name) for p in path.relative_to(source).parts)
        ]

    chosen = of(split or "train")
    if split and not chosen:
        raise ValueError(f"data: {source} has no parquet files of the split {split!r}")
    if chosen and len(chosen) < len(paths) and not split:
        others = len(paths) - len(chosen)
        say(f"{source}: the {len(chosen)} files called train... are read, and not {others} others "
            f"(another split: {source}:NAME)")  # fmt: skip
    return chosen or paths


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
) -> Iterator[tuple[str, Read]]:
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


_READERS: dict[str, Callable[[Path, Reading], ImageArrays | ImageFiles]] = {
    ".zip": _open_zip,
    ".npz": _read_npz,
    ".npy": _refuse_npy,
    ".tar.gz": _read_cifar10,
    ".parquet": _open_parquet,
}
