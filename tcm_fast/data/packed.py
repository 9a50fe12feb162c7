"""Sets that need not fit into memory: a folder with all images in one file, which is mapped, not read.

    images.bin   uint8 [N,R,R,C], nothing else
    labels.npy   int64 [N], where there are labels
    packed.json  shape, class names, where it came from

While it is written the folder is called DST.partial and has a journal of the slices that are done; an
interrupted `data pack` goes on where it stood. It takes its name when it is complete.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from tcm_fast.data.formats import ImageArrays, ImageFiles
from tcm_fast.data.labels import AS_IT_IS, Reading, check_labels, reason

DESCRIPTION, IMAGES, LABELS, JOURNAL = "packed.json", "images.bin", "labels.npy", "journal.npy"
SLICE = 4096  # images between two entries in the journal
MISSING, DONE, COLOUR = 0, 1, 2  # a slice in the journal: its bits
MOVED = 1024  # images that are moved at a time

Parallel = Callable[[Callable[[Any], Any], Any, int], Iterator[Any]]


def is_packed(folder: Path) -> bool:
    return (folder / DESCRIPTION).is_file()


def open_packed(folder: Path, reading: Reading = AS_IT_IS) -> ImageArrays:
    """The images of a packed folder, mapped into memory (private and writable, as tensors want it; nothing
    is written back). ValueError where the folder contradicts itself."""
    try:
        about = json.loads((folder / DESCRIPTION).read_text(encoding="utf-8"))
        shape = tuple(int(n) for n in about["shape"])
        class_names = tuple(map(str, about["class_names"]))
        labels = None
        if about["labelled"]:
            labels = np.load(folder / LABELS, allow_pickle=False)
        size = (folder / IMAGES).stat().st_size
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"data: {folder} is not a packed set: {reason(error)}") from error
    if len(shape) != 4 or min(shape) < 1 or size != int(np.prod(shape, dtype=np.int64)):
        raise ValueError(
            f"data: {folder / IMAGES} must have the bytes of {list(shape)}, got {size}; pack it anew"
        )
    images = np.memmap(folder / IMAGES, np.uint8, "c", shape=shape)
    if labels is None:
        return ImageArrays(images)
    return ImageArrays(
        images, *check_labels(str(folder), labels, len(images), class_names, reading)
    )


def write_packed(
    files: ImageFiles,
    destination: Path,
    decode: Callable[[Any], tuple[str, np.ndarray | Exception]],
    parallel: Parallel,
    *,
    resolution: int,
    about: dict[str, Any],
    refuse: Callable[[list[str]], None],
) -> int:
    """Decode encoded files into a packed folder, slice by slice, or go on doing so.

    Args:
        files: what there is.
        destination: the folder; one that is there is replaced in the end.
        decode: an item of `files` -> its name and the image uint8 [R,R] or [R,R,3], or what went wrong.
        parallel: maps a function over items, in order.
        resolution: height and width of the images.
        about: what identifies the set; kept in packed.json.
        refuse: called with the images that could not be read, "name (why)", where there are some; raises
            unless they may be left out.

    Returns:
        The number of images.

    Raises:
        OSError: the disk is full or the like; what is done stays for another try.
    """
    partial = destination.with_name(f"{destination.name}.partial")
    # All as colour at first: whether a set is grey is known at its end.
    shape = (files.count, resolution, resolution, 3)
    journal = _begin(partial, shape, files.labels, about)
    images = np.memmap(partial / IMAGES, np.uint8, "r+", shape=shape)
    unreadable: list[str] = []
    bad_rows: list[int] = []

    def items() -> Iterator[tuple[str, Callable[[], bytes]]]:
        for row, item in enumerate(files.items):
            if journal[row // SLICE] == MISSING:
                yield item

    todo = [row for row in range(files.count) if journal[row // SLICE] == MISSING]
    log = partial / "unreadable.jsonl"
    if log.is_file():
        for line in log.read_text(encoding="utf-8").splitlines():
            row, what = json.loads(line)
            if journal[row // SLICE] != MISSING:
                bad_rows.append(row)
                unreadable.append(what)
    coloured = False
    for row, (name, result) in zip(todo, parallel(decode, items(), len(todo)), strict=True):
        if isinstance(result, Exception):
            what = f"{name} ({reason(result)})"
            bad_rows.append(row)
            unreadable.append(what)
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps([row, what]) + "\n")
        else:
            coloured |= result.ndim == 3
            images[row] = result if result.ndim == 3 else result[..., None]
        if row % SLICE == SLICE - 1 or row == files.count - 1:
            images.flush()
            journal[row // SLICE] = DONE | (COLOUR if coloured else 0)
            _save(partial / JOURNAL, journal)
            coloured = False
    del images
    if unreadable:
        refuse(unreadable)
    _finish(partial, shape, journal, bad_rows, files, about)
    if destination.exists():
        shutil.rmtree(destination)
    partial.replace(destination)
    return files.count - len(bad_rows)


def _begin(
    partial: Path, shape: tuple[int, ...], labels: np.ndarray | None, about: dict[str, Any]
) -> np.ndarray:
    """The journal uint8 [slices] of what is there of this very set; a fresh one otherwise."""
    content = json.dumps([about, shape]).encode() + (b"" if labels is None else labels.tobytes())
    fingerprint = hashlib.sha256(content).hexdigest()
    known = partial / "fingerprint"
    slices = -(-shape[0] // SLICE)
    if known.is_file() and known.read_text(encoding="utf-8") == fingerprint:
        try:
            journal = np.load(partial / JOURNAL, allow_pickle=False)
            if journal.shape == (slices,) and journal.dtype == np.uint8:
                return journal
        except (OSError, ValueError):
            pass  # cut off while it was written for the first time
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    with (partial / IMAGES).open("wb") as file:
        file.truncate(int(np.prod(shape, dtype=np.int64)))
    journal = np.zeros(slices, np.uint8)
    _save(partial / JOURNAL, journal)
    known.write_text(fingerprint, encoding="utf-8")
    return journal


def _save(path: Path, array: np.ndarray) -> None:
    """Complete or not there."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        np.save(file, array)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _finish(
    partial: Path,
    shape: tuple[int, ...],
    journal: np.ndarray,
    bad_rows: list[int],
    files: ImageFiles,
    about: dict[str, Any],
) -> None:
    """Close the gaps of what could not be read, keep one channel of a grey set, and say what it is."""
    kept = np.setdiff1d(np.arange(shape[0]), bad_rows)
    channels = 3 if (journal & COLOUR).any() else 1
    final = (len(kept), *shape[1:3], channels)
    if final != shape:
        (partial / "fingerprint").unlink()  # cut off from here on, it has to be begun anew
        wide = np.memmap(partial / IMAGES, np.uint8, "r+", shape=shape)
        flat = wide.reshape(-1)
        size = int(np.prod(final[1:], dtype=np.int64))
        for first in range(0, len(kept), MOVED):  # to the front, over what has been moved already
            rows = wide[kept[first : first + MOVED]][..., :channels]
            flat[first * size : (first + len(rows)) * size] = rows.reshape(-1)
        wide.flush()
        del wide, flat
        with (partial / IMAGES).open("r+b") as file:
            file.truncate(len(kept) * size)
    if files.labels is not None:
        _save(partial / LABELS, files.labels[kept])
    description = {
        "shape": final,
        "labelled": files.labels is not None,
        "class_names": files.class_names,
        "about": about,
    }
    (partial / DESCRIPTION).write_text(json.dumps(description) + "\n", encoding="utf-8")
    for name in (JOURNAL, "fingerprint", "unreadable.jsonl"):
        (partial / name).unlink(missing_ok=True)
