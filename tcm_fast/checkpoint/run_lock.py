"""One run at a time in a folder: a lock file with its owner, whose age is the time since the owner's last
sign of life.

The operating system's own lock on the file goes when its process goes, however it ends. Where a file
system has no such locks, or does not share them between machines, the owner's words decide: a process
of this machine is looked up, one of another machine counts as gone after `STALE` seconds of silence.
"""

from __future__ import annotations

import errno
import json
import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None  # type: ignore[assignment]

NAME = "run.lock"
BEAT = 30.0  # seconds between signs of life
STALE = 600.0  # seconds of silence after which another machine's run counts as gone
FAR = 1 << 30  # the byte that Windows locks; nobody may read a locked one
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


class RunLock:
    """Holds a run's folder for this process, until `release` or the process's end.

    Args:
        folder: the run's, which is made where it is missing.

    Attributes:
        replaced: what a stale lock said, or "" where there was none.

    Raises:
        FileExistsError: another process holds the folder.
        OSError: the file cannot be written.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / NAME
        self.replaced = ""
        self._descriptor = -1
        self._acquire()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="run-lock", daemon=True)
        self._thread.start()

    def hold(self) -> None:
        """Take the folder again where the file was deleted. FileExistsError where others have it now."""
        if not self._is_ours():
            with suppress(OSError):
                os.close(self._descriptor)
            self._acquire()

    def release(self) -> None:
        """Let the folder go."""
        if self._descriptor < 0:
            return
        self._over.set()
        self._thread.join()
        os.ftruncate(self._descriptor, 0)  # for Windows, which deletes no open file
        if self._is_ours():
            with suppress(OSError):
                self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

    def _acquire(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        while True:
            self._descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                self._claim()
            except BaseException:
                os.close(self._descriptor)
                self._descriptor = -1
                raise
            if self._is_ours():  # else its last owner deleted it between our two calls
                return
            os.close(self._descriptor)

    def _claim(self) -> None:
        """Write ourselves into the open file. FileExistsError where its owner lives."""
        is_free = is_known = True
        try:
            if fcntl is not None:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                os.lseek(self._descriptor, FAR, os.SEEK_SET)
                msvcrt.locking(self._descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except (BlockingIOError, PermissionError):
            is_free = False
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            is_known = False
        owner = self._read()
        silence = max(0.0, time.time() - os.fstat(self._descriptor).st_mtime)
        if not is_free or (owner and _lives(owner, silence, is_known)):
            raise FileExistsError(
                f"out: {self.path.parent} is in use by {_describe(owner, silence)}; wait for it to end, "
                "or choose another folder with --out"
            )
        self.replaced = _describe(owner, silence) if owner else ""
        own = {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "begun": _begun(os.getpid()),
            "since": time.time(),
        }
        os.ftruncate(self._descriptor, 0)
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        os.write(self._descriptor, json.dumps(own).encode())

    def _read(self) -> dict[str, Any]:
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        try:
            owner = json.loads(os.read(self._descriptor, 4096) or b"null")
        except ValueError:
            return {}
        return owner if isinstance(owner, dict) else {}

    def _is_ours(self) -> bool:
        """Whether the path still is the file that we hold."""
        try:
            there, ours = os.stat(self.path), os.fstat(self._descriptor)
        except OSError:
            return False
        return (there.st_dev, there.st_ino) == (ours.st_dev, ours.st_ino)

    def _beat(self) -> None:
        while not self._over.wait(BEAT):
            with suppress(OSError):
                os.utime(self._descriptor if os.utime in os.supports_fd else self.path)


def _lives(owner: dict[str, Any], silence: float, lock_is_ours: bool) -> bool:
    """Whether the process that a lock names may still be running."""
    if owner.get("host") != socket.gethostname():
        return silence < STALE
    pid = owner.get("pid")
    if lock_is_ours or not isinstance(pid, int) or pid == os.getpid():
        return False
    begun = _begun(pid)
    return begun is not None and owner.get("begun") in (None, begun)


def _begun(pid: int) -> str | None:
    """When a process of this machine began, in whatever unit; None where there is no such process."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        pass
    if Path("/proc/self").exists():
        return None
    if fcntl is None:  # where `os.kill` does not ask
        return "unknown"
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass
    return "unknown"


def _describe(owner: dict[str, Any], silence: float) -> str:
    if not owner:
        return "a process that has just begun"
    hours = (time.time() - float(owner.get("since", time.time()))) / 3600
    return (
        f"process {owner.get('pid')} on {owner.get('host')}, there for {hours:.1f} h, "
        f"last sign of life {silence:.0f} s ago"
    )
