"""What lies in a run's folder: its checkpoints, which of them are complete, and where a run goes on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from tcm_fast.runtime.atomic import FORMAT, TEMPORARY, reason, sync

STATE = "state.json"
FOLDER = "checkpoints"
ATTEMPTS = 10  # at reading a folder in which another process writes


class Found(NamedTuple):
    """A checkpoint's folder, whether it is complete, and if not, why."""

    path: Path
    ok: bool
    reason: str


def find_checkpoints(run: str | Path) -> list[Found]:
    """All checkpoints of a run: first the incomplete ones, then the complete ones, oldest first.

    Complete means that state.json is readable and every file that it lists has its size; contents
    are verified when one is loaded."""
    return [found for found, _ in scan(Path(run))]


def newest_checkpoint(run: str | Path) -> Path | None:
    """The complete checkpoint of a run that was written last, or None."""
    return next((found.path for found in reversed(find_checkpoints(run)) if found.ok), None)


class Opened(NamedTuple):
    """The checkpoint from which a run goes on, or None for one that begins; and those that were passed
    over because they are incomplete or damaged."""

    path: Path | None
    passed_over: list[Found]


def newest_sound(run: str | Path) -> Opened:
    """The newest checkpoint of a run whose every file has the SHA-256 that was written."""
    everything = find_checkpoints(run)
    passed_over = [found for found in everything if not found.ok]
    for found in reversed(everything[len(passed_over) :]):
        try:
            verify_files(found.path, read_state(found.path)["files"])
            return Opened(found.path, passed_over)
        except ValueError as error:
            passed_over.append(Found(found.path, False, str(error)))
    return Opened(None, passed_over)


def open_run(out: str | Path, resume: bool | str | Path = False) -> Opened:
    """Find out from where a run in `out` goes on.

    Args:
        out: the run's folder.
        resume: False begins; True or "auto" takes the newest sound checkpoint in `out`, if there
            is one; a path names a checkpoint, or a run whose newest one is taken.

    Raises:
        FileExistsError: `out` is a file, or holds another run.
        FileNotFoundError: the checkpoint to resume does not exist.
        ValueError: the checkpoint to resume is incomplete or damaged, or, with "auto", `out` has
            checkpoints and not one of them is sound.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: must be a folder, got the file {out}")
    holds_run = any((out / name).exists() for name in ("config.json", "log.jsonl", FOLDER))
    if resume is True or resume == "auto":
        opened = newest_sound(out)
        lost = [f for f in opened.passed_over if not f.path.name.startswith(TEMPORARY)]
        if opened.path is None and lost:
            reasons = "; ".join(f.reason for f in lost)
            raise ValueError(
                f"resume: none of the checkpoints in {out} is sound ({reasons}); take them away "
                "to begin anew"
            )
        return opened
    if not resume:
        if holds_run:
            raise FileExistsError(
                f"out: {out} already holds a run; continue it with --resume auto, or choose "
                "another folder with --out"
            )
        return Opened(None, [])
    path = Path(resume)
    if not path.is_dir():
        raise FileNotFoundError(f"resume: no such folder: {path}")
    if (path / FOLDER).is_dir():
        path = newest(find_checkpoints(path), f"resume: {path} is neither a checkpoint nor")
    verify_files(path, read_state(path)["files"])
    if holds_run and path.resolve().parent.parent != out.resolve():
        raise FileExistsError(
            f"out: {out} holds another run than the checkpoint to resume, {path}; choose another "
            "folder with --out"
        )
    return Opened(path, [])


def scan(run: Path) -> list[tuple[Found, dict[str, Any]]]:
    """`find_checkpoints` with the state of each (empty where it cannot be read)."""
    entries = _scan(run)
    for _ in range(ATTEMPTS):
        # A writer may have renamed what we were about to read, or, while we read the folder, put its
        # new checkpoint where we had been and taken the old one from where we had not.
        gone = not all(found.ok or found.path.exists() for found, _ in entries)
        none = not any(found.ok for found, _ in entries)
        if not gone and not (none and _folders(run) != sorted(f.path for f, _ in entries)):
            break
        entries = _scan(run)
    return entries


def _folders(run: Path) -> list[Path]:
    folder = run / FOLDER
    return sorted(path for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []


def _scan(run: Path) -> list[tuple[Found, dict[str, Any]]]:
    entries = []
    for path in _folders(run):
        state: dict[str, Any] = {}
        why = ""
        try:
            if path.name.startswith(TEMPORARY):
                raise ValueError(f"checkpoint: {path} was never completed")
            state = read_state(path)
            check_sizes(path, state["files"])
        except ValueError as error:
            why = str(error)
        entries.append((Found(path, not why, why), state))
    return sorted(entries, key=lambda e: (e[0].ok, e[1].get("sequence", 0)))


def newest(found: list[Found], complaint: str) -> Path:
    """The newest complete one. FileNotFoundError with the reasons where there is none."""
    if found and found[-1].ok:
        return found[-1].path
    reasons = f" ({'; '.join(f.reason for f in found)})" if found else ""
    raise FileNotFoundError(f"{complaint} a run with a complete checkpoint{reasons}")


def write_state(path: Path, state: dict[str, Any]) -> None:
    """state.json, with its own SHA-256."""
    text = json.dumps({**state, "sha256": _digest(state)}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")
    sync(path)


def read_state(path: Path) -> dict[str, Any]:
    """A checkpoint's state.json. ValueError where it is missing, damaged or of another format."""
    file = path / STATE
    try:
        state = json.loads(file.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"checkpoint: {path} is incomplete, {STATE} is missing") from None
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint: {file} is damaged ({reason(error)})") from error
    if not isinstance(state, dict) or "format" not in state:
        raise ValueError(f"checkpoint: {file} is not the state of a checkpoint")
    if state["format"] != FORMAT:
        raise ValueError(
            f"checkpoint: {file} has to be of format {FORMAT}, got {state['format']!r} (from "
            "another version of tcm_fast?)"
        )
    if state.pop("sha256", None) != _digest(state):
        raise ValueError(f"checkpoint: {file} is damaged (its SHA-256 differs)")
    return state


def _digest(state: dict[str, Any]) -> str:
    """SHA-256 of a JSON object, however it is laid out."""
    return hashlib.sha256(json.dumps(state, sort_keys=True).encode()).hexdigest()


def file_hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_sizes(path: Path, files: Mapping[str, Any]) -> None:
    """ValueError for a file that is missing or has another size than state.json says."""
    for name, entry in files.items():
        file = path / name
        try:
            size = file.stat().st_size
        except OSError:
            raise ValueError(f"checkpoint: {path} is incomplete, {name} is missing") from None
        if size != entry["size"]:
            raise ValueError(
                f"checkpoint: {file} must have {entry['size']} bytes, got {size} (truncated?)"
            )


def verify_files(path: Path, files: Mapping[str, Any]) -> None:
    """ValueError for a file that is not what was written."""
    check_sizes(path, files)
    for name, entry in files.items():
        try:
            is_right = file_hash(path / name) == entry["sha256"]
        except OSError as error:  # deleted meanwhile, or the disk fails
            raise ValueError(
                f"checkpoint: {path / name} cannot be read ({reason(error)})"
            ) from error
        if not is_right:
            raise ValueError(
                f"checkpoint: {path / name} is damaged, its SHA-256 differs from the one in {STATE}"
            )
