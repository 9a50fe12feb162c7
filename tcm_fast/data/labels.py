"""Labels: the class of every image of a source, from its folders, from dataset.json or from an array.

Whatever leaves out an image or a label is an error that names it, or a warning with its number.
"""

from __future__ import annotations

import json
import unicodedata
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import compress
from pathlib import PurePosixPath
from typing import Any

import numpy as np

SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
MOST_CLASSES = 1_000_000
CLASSES_PER_LABEL = (
    100  # so many times as many classes as different labels (or 1000) are no mistake
)
SKIP = "--skip-unlabelled (of train: --data.skip-unlabelled) leaves them out"
RENUMBER = "tcm-fast data pack SRC DST --renumber numbers the classes that have images from 0"


@dataclass(frozen=True)
class Reading:
    """How a source is read.

    split: the one to take of a source with several, "" to ask where there are some;
    skip_unlabelled: leave out images without a label, instead of the labels; renumber: number only
    classes that have images; convert: take arrays that bytes cannot hold exactly."""

    split: str = ""
    skip_unlabelled: bool = False
    renumber: bool = False
    convert: bool = False


AS_IT_IS = Reading()


@dataclass(frozen=True)
class Labelled:
    """Which images of a list are kept, bool [N]; the labels of those int64 [kept] or None, and a name
    for every class."""

    kept: np.ndarray
    labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()


def say(text: str) -> None:
    """Warn the user."""
    warnings.warn(f"data: {text}", stacklevel=2)


def clean_name(name: str) -> str:
    """A path with forward slashes and composed characters, whatever wrote it."""
    parts = unicodedata.normalize("NFC", name).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", "."))


def some(names: Sequence[str], most: int = 3) -> str:
    return ", ".join(names[:most]) + (", ..." if len(names) > most else "")


# ---- folders ------------------------------------------------------------------------------------


def choose_split(source: str, names: list[str], split: str) -> list[str]:
    """The images of one split, where the uppermost folders are called train, test or the like.
    ValueError where there are several and none, or one that is not there, is asked for."""
    names_of: dict[str, list[str]] = {}
    for name, parts in zip(names, _class_parents(names), strict=True):
        names_of.setdefault(parts[0] if parts else "", []).append(name)
    known = [folder for folder in names_of if folder.lower() in SPLITS]
    if split in known:
        return names_of[split]
    if split:
        raise ValueError(f"data: {source} has no split {split!r}, {_there_are(known)}")
    if len(known) > 1:
        counts = ", ".join(f"{folder} ({len(names_of[folder])} images)" for folder in known)
        raise ValueError(
            f"data: {source} holds the splits {counts}; take one of them: {source}:{known[0]}"
        )
    return names


def _there_are(splits: Sequence[str]) -> str:
    return f"there are {', '.join(splits)}" if splits else "its images are not divided into splits"


def class_folders(source: str, names: list[str], reading: Reading) -> Labelled:
    """The sub-folders as classes; no labels where some image lies in none.

    A folder that holds every image is no class. Numeric names are in numeric order, before others."""
    parents = _class_parents(names)
    kept = np.array([bool(parts) for parts in parents])
    if kept.any() and not kept.all():
        stray = [name for name, parts in zip(names, parents, strict=True) if not parts]
        what = (
            f"{len(stray)} of {len(names)} images in {source} lie in no sub-folder ({some(stray)})"
        )
        if not reading.skip_unlabelled:
            say(f"{what}, so that sub-folders are no classes and no image has a label; {SKIP}")
            return Labelled(np.ones(len(names), bool))
        say(f"left out, {what}")
        rest = class_folders(source, list(compress(names, kept)), reading)
        kept[kept] = rest.kept
        return Labelled(kept, rest.labels, rest.class_names)
    if not kept.any():
        return Labelled(~kept)
    folders = [parts[0] for parts in parents]
    ordered = sorted(set(folders), key=_class_order)
    number = {name: index for index, name in enumerate(ordered)}
    labels = np.array([number[folder] for folder in folders], np.int64)
    return Labelled(kept, labels, tuple(map(_printable, ordered)))


def _class_parents(names: list[str]) -> list[tuple[str, ...]]:
    """The folders above each image, without those that hold every image."""
    parents = [PurePosixPath(name).parent.parts for name in names]
    while len({parts[:1] for parts in parents}) == 1 and parents[0]:
        parents = [parts[1:] for parts in parents]
    return parents


def _class_order(name: str) -> tuple[int, int, str]:
    return (0, int(name), name) if name.isdecimal() else (1, 0, name)


def _printable(name: str) -> str:
    """A file's name as text that can be written as UTF-8 (a name on a disk may be any bytes)."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


# ---- dataset.json -------------------------------------------------------------------------------


def labels_from_json(
    source: str, names: list[str], metadata: bytes, folder: str, reading: Reading
) -> Labelled:
    """EDM's convention, {"labels": [[name, int], ...] or null}, with our own key "class_names"; its
    names are relative to `folder`, in which dataset.json lies."""
    where = f"dataset.json in {source}"
    try:
        content = json.loads(metadata)
        pairs = content["labels"]
        class_names = tuple(map(str, content.get("class_names") or ()))
        given = [] if pairs is None else [(clean_name(str(name)), label) for name, label in pairs]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'data: {where} must be {{"labels": [[file, int], ...]}} or '
            f'{{"labels": null}}, got {reason(error)}'
        ) from error
    if pairs is None:
        return Labelled(np.ones(len(names), bool))
    table: dict[str, Any] = {}
    for name, label in given:
        if table.setdefault(name, label) != label:
            raise ValueError(f"data: {where} labels {name} twice, {table[name]} and {label}")
    prefix = f"{folder}/" if folder else ""
    own = [name.removeprefix(prefix) for name in names]
    missing = [name for name in own if name not in table]
    if missing:
        what = f"no label for {len(missing)} of {len(names)} images, the first is {missing[0]}"
        if not reading.skip_unlabelled or len(missing) == len(names):
            raise ValueError(f"data: {where} has {what}; {SKIP}")
        say(f"left out, {where} has {what}")
    absent = sorted(table.keys() - set(own))
    if absent:
        say(f"{where} labels {len(absent)} files that are not among the images ({some(absent)})")
    kept = np.array([name in table for name in own])
    own = [name for name in own if name in table]
    labels = [table[name] for name in own]
    checked = check_labels(source, labels, len(own), class_names, reading, own.__getitem__)
    return Labelled(kept, *checked)


# ---- arrays -------------------------------------------------------------------------------------


def check_labels(
    source: str,
    labels: Any,
    count: int,
    class_names: tuple[str, ...] = (),
    reading: Reading = AS_IT_IS,
    name_of: Callable[[int], str] = "image {}".format,
) -> tuple[np.ndarray, tuple[str, ...]]:
    """Labels as int64 [N], and a name for every class: its number where none is given.

    Args:
        source: what to call the set.
        labels: class numbers [N] or [N,1], as integers, whole numbers of another type or text; one-hot
            rows [N,K]; or names [N], which are numbered in their order.
        count: of the images.
        class_names: a name for every class, where they are known.
        reading: whether to leave out classes without an image.
        name_of: what to call an image in an error.

    Raises:
        ValueError: labels that are none of these, negative, of more classes than there are names, or of
            far more classes than there are different labels.
    """

    def refuse(array: np.ndarray, what: str, wrong: np.ndarray | None = None) -> ValueError:
        first = 0 if wrong is None else int(np.flatnonzero(wrong)[0])
        which = "" if wrong is None else f", the first is {array[first]} of {name_of(first)}"
        return ValueError(
            f"data: labels of {source} must be {count} class numbers (integers from 0), got "
            f"{what}{which}"
        )

    try:
        given = array = np.asarray(labels)
    except ValueError:  # ragged
        raise refuse(np.empty(0), "lists of different lengths") from None
    shape = f"{array.dtype} {list(array.shape)}"
    if array.ndim == 2 and array.shape[1] == 1:
        array = array[:, 0]
    if array.dtype.kind == "O" and all(isinstance(label, str) for label in array.flat):
        array = array.astype(str)
    if array.ndim == 1 and array.dtype.kind in "US" and len(array) == count:
        array, class_names = _read_text(array, class_names)
    classes = 0
    if array.ndim == 2 and len(array) == count and array.dtype.kind in "biuf":
        ones = array == 1
        wrong = (ones.sum(1) != 1) | ((array != 0) & ~ones).any(1)
        if wrong.any():
            raise refuse(array, f"{shape}, rows that are not one-hot", wrong)
        array, classes = ones.argmax(1), array.shape[1]
    if array.shape != (count,) or array.dtype.kind not in "biuf":
        raise refuse(given, shape)
    wrong = ~(np.isfinite(array) & (array == np.floor(array))) if array.dtype.kind == "f" else None
    if wrong is not None and wrong.any():
        raise refuse(array, shape, wrong)
    wrong = array.astype(bool) & (array < 0)
    if wrong.any():
        raise refuse(array, f"{shape} from {array.min()}", wrong)
    used, positions = np.unique(array, return_inverse=True)
    largest = int(used[-1])
    classes = max(classes, largest + 1)
    if class_names and len(class_names) < classes:
        raise ValueError(
            f"data: {source} names {len(class_names)} classes, but has labels up to {classes - 1}"
        )
    if reading.renumber:
        kept_names = tuple(class_names[int(k)] if class_names else str(int(k)) for k in used)
        return positions.astype(np.int64), kept_names
    most = min(MOST_CLASSES, max(1000, CLASSES_PER_LABEL * len(used)))
    if not class_names and classes > most:
        raise refuse(
            array, f"{len(used)} different labels up to {largest}; {RENUMBER}", array == largest
        )
    class_names = class_names or tuple(map(str, range(classes)))
    empty = np.setdiff1d(np.arange(len(class_names)), used.astype(np.int64))
    if len(empty):
        say(
            f"{len(empty)} of the {len(class_names)} classes of {source} have no image "
            f"({some([str(k) for k in empty])}); {RENUMBER}"
        )
    return array.astype(np.int64), class_names


def _read_text(array: np.ndarray, class_names: tuple[str, ...]) -> tuple[np.ndarray, Any]:
    """Labels given as text [N]: numbers where all are, names of classes where none is; unchanged where
    some are numbers."""
    texts = [
        label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)
        for label in array
    ]
    numbers = [_as_number(text) for text in texts]
    if None not in numbers:
        return np.array(numbers), class_names
    if any(number is not None for number in numbers) or class_names:
        return array, class_names
    ordered = sorted(set(texts))
    number_of = {name: number for number, name in enumerate(ordered)}
    return np.array([number_of[text] for text in texts]), tuple(map(_printable, ordered))


def _as_number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None


def leave_out(
    source: str, unlabelled: np.ndarray, name_of: Callable[[int], str], reading: Reading
) -> None:
    """ValueError for images without a label, bool [N]; a warning if they are to be left out."""
    where = np.flatnonzero(unlabelled)
    if not len(where):
        return
    first = name_of(int(where[0]))
    what = (
        f"{len(where)} of {len(unlabelled)} images in {source} have no label, the first is {first}"
    )
    if not reading.skip_unlabelled:
        raise ValueError(f"data: {what}; {SKIP}")
    say(f"left out, {what}")


def reason(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
