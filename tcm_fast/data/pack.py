"""`tcm-fast data pack`: any source as a zip of PNGs that EDM reads too, or as a packed folder."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from tcm_fast.data import packed
from tcm_fast.data.dataset import (
    open_images,
    report_unreadable,
    to_memory,
)
from tcm_fast.data.decode import FileReader, decode_file, parallel
from tcm_fast.data.formats import ImageArrays, ImageFiles
from tcm_fast.data.labels import Reading, reason


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
    reading = Reading(skip_unlabelled=skip_unlabelled, renumber=renumber, convert=True)
    found = open_images(source, reading)
    if not is_zip:
        return _pack_folder(found, str(source), destination, resolution, skip_corrupt)
    data = to_memory(found, str(source), skip_corrupt, resolution)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor() as pool:
            write_zip(destination, data.images, data.labels, data.class_names, pool)
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
        if resolution is None or resolution < 1:
            raise ValueError(f"pack: {destination} needs a size for its images, add --resolution R")
        size = resolution
        decode = partial(decode_file, reader=FileReader(), resolution=resolution)
        if isinstance(found.items, list):  # files; what was begun with others must not go on
            names = "\n".join(name for name, _ in found.items)
            about["names"] = sha256(names.encode("utf-8", "surrogateescape")).hexdigest()
    else:
        data = to_memory(found, source, skip_corrupt, resolution)
        rows: Any = ((f"image {i}", i) for i in range(len(data)))
        found = ImageFiles(len(data), rows, data.labels, data.class_names)
        size = data.resolution

        def decode(item: tuple[str, int]) -> tuple[str, np.ndarray | Exception]:
            image = data.images[item[1]]
            return item[0], image if image.shape[2] == 3 else image[..., 0]

    count = found.count

    def refuse(unreadable: list[str]) -> None:
        report_unreadable(unreadable, count, source, skip_corrupt)

    try:
        return packed.write_packed(
            found, destination, decode, parallel, resolution=size,
            about={**about, "resolution": size, "classes": list(found.class_names)},
            refuse=refuse,
        )  # fmt: skip
    except OSError as error:
        raise OSError(f"pack: cannot write {destination}: {reason(error)}") from error


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
