"""Files that are whole or absent, and tensors in them: safetensors with a header that says what they are."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

FORMAT = 1
KEY = "tcm_fast"
TEMPORARY = ".tmp-"

Tensors = dict[str, torch.Tensor]


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to; it becomes `path` once its bytes are on the disk.

    Raises:
        OSError: the file cannot be written; what was at `path` before is untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{TEMPORARY}{os.getpid()}-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{path}: could not be written, {reason(error)}") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path) -> None:
    """Delete what an interrupted save or deletion left in a folder that no other process writes to: our
    temporary files and folders, and those that safetensors writes to (.tmp and six letters)."""
    for path in folder.glob(".tmp*"):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            with suppress(OSError):
                path.unlink()


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk."""
    is_folder = path.is_dir()
    try:  # Windows opens no folder, and flushes a file that could be written to
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def reason(error: BaseException) -> str:
    """What the system says, as part of a sentence."""
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split())


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], header: dict[str, Any]) -> None:
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    save_file(tensors, path, metadata={KEY: json.dumps(header)})


def read_tensors(
    path: Path, *, header_only: bool = False, what: str = "network"
) -> tuple[dict[str, Any], Tensors]:
    """Header and tensors of one of our safetensors files. FileNotFoundError where it is missing, ValueError
    where it is damaged, not ours, or of another version's format; the messages begin with `what`."""
    if not path.is_file():
        raise FileNotFoundError(f"{what}: no such file: {path}")
    try:
        with safe_open(path, framework="pt") as file:
            names = [] if header_only else file.keys()
            header = json.loads((file.metadata() or {}).get(KEY, "null"))
            tensors = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"{what}: {path} is truncated, damaged or not a safetensors file ({reason(error)})"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(
            f"{what}: {path} was not written by tcm_fast (it has no {KEY!r} metadata); "
            "tcm-fast convert reads other projects' weights"
        )
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{what}: {path} has to be of format {FORMAT}, got {header.get('format')!r} (from "
            "another version of tcm_fast?)"
        )
    return header, tensors


def check_fit(what: str, expected: Tensors, given: Tensors) -> None:
    """ValueError unless names and shapes agree; it names the first few that do not."""
    wrong = [f"{name} is missing" for name in expected if name not in given]
    wrong += [f"{name} is unknown" for name in given if name not in expected]
    wrong += [
        f"{name} is {list(given[name].shape)} instead of {list(value.shape)}"
        for name, value in expected.items()
        if name in given and given[name].shape != value.shape
    ]
    if wrong:
        rest = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise ValueError(f"{what} does not fit the network: {', '.join(wrong[:3])}{rest}")
