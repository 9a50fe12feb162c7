"""Imported first in a process of its own: Python as it is on Windows, as far as that is known here. Modules
and names of Unix are missing; folders cannot be opened; what is open for reading alone cannot be flushed;
what is open or mapped cannot be deleted or replaced."""

import errno
import os
import signal
import subprocess  # noqa: F401  which knows Windows by its msvcrt
import sys
import types
from pathlib import Path

for name in ("fcntl", "resource", "pwd", "grp", "termios", "triton"):
    sys.modules[name] = None
for name in ("pread", "pwrite", "O_CLOEXEC", "sysconf", "sched_getaffinity", "getuid"):
    delattr(os, name)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP"):
    delattr(signal, name)
os.environ.setdefault("USERNAME", "somebody")

is_opened, locked = set(), set()
real = types.SimpleNamespace(
    **{name: getattr(os, name) for name in ("open", "close", "fsync", "utime", "unlink", "replace")}
)


def refuse(path):
    raise PermissionError(errno.EACCES, "Permission denied", str(path))


def opened(path, flags, *args, **options):
    if os.path.isdir(path) and not flags & os.O_DIRECTORY:  # shutil.rmtree's own
        refuse(path)
    descriptor = real.open(path, flags, *args, **options)
    (is_opened.discard if flags & (os.O_RDWR | os.O_WRONLY) else is_opened.add)(descriptor)
    return descriptor


def close(descriptor):
    locked.discard(descriptor)
    real.close(descriptor)


def fsync(descriptor):
    if descriptor in is_opened:
        raise OSError(errno.EBADF, "Bad file descriptor")
    real.fsync(descriptor)


def utime(path, *args, **options):
    if isinstance(path, int):
        raise TypeError("utime: path should be string, bytes or os.PathLike, not int")
    real.utime(path, *args, **options)


def check_unused(path):
    """Refuse where this process has the file, or one in the folder, open or mapped."""
    path = os.path.realpath(path)
    used = []
    for link in Path("/proc/self/fd").iterdir():
        try:
            used.append(os.readlink(link))
        except OSError:  # the one that lists them
            continue
    used += [line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines()]
    if any(name == path or name.startswith(f"{path}/") for name in used):
        refuse(path)


def unlink(path, *, dir_fd=None):
    if dir_fd is None:
        check_unused(path)
    real.unlink(path, dir_fd=dir_fd)


def replace(source, target):
    check_unused(source)
    check_unused(target)
    real.replace(source, target)


def kill(pid, number):
    raise AssertionError("os.kill ends a process there, whatever the number")


def locking(descriptor, mode, count):
    file = os.fstat(descriptor)
    if any((file.st_dev, file.st_ino) == key for key in map(_key, locked)):
        refuse(descriptor)
    locked.add(descriptor)


def _key(descriptor):
    file = os.fstat(descriptor)
    return file.st_dev, file.st_ino


os.open, os.close, os.fsync, os.utime = opened, close, fsync, utime
os.unlink, os.remove, os.replace, os.rename, os.kill = unlink, unlink, replace, replace, kill
os.supports_fd = {function for function in os.supports_fd if function is not real.utime}
sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
