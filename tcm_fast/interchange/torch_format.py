"""Files that PyTorch wrote, and pickles that hold its tensors, read as data by `inert_pickle`.

    read(path) -> numbers, strings, containers, `Record`s and `FileTensor`s

Three forms: the zip archives of `torch.save`, its older streams, and plain pickles, whose tensors are
streams inside. Nothing is unpacked to the disk; a tensor's bytes are looked at when `load` is called.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from tcm_fast.interchange.safe_pickle import Global, Machine, Refused, shown

STREAM_MAGIC = 0x1950A86A20F9469CFC6C  # what a stream of torch.save begins with
MAX_MEMBERS = 200_000
DTYPES = {
    "FloatStorage": torch.float32,
    "DoubleStorage": torch.float64,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
    "UntypedStorage": torch.uint8,
}
DTYPE_NAMES = {str(dtype).removeprefix("torch.") for dtype in DTYPES.values()}


@dataclass(eq=False)
class FileStorage:
    """A run of numbers in the file. `read` gives its bytes."""

    dtype: torch.dtype
    count: int
    read: Callable[[], bytes] | None = None


@dataclass(eq=False)
class FileTensor:
    """A tensor that is still in the file."""

    storage: FileStorage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def load(self) -> torch.Tensor:
        """The tensor, on the CPU, contiguous, with memory of its own.

        Raises:
            Refused: the bytes are not there.
        """
        assert self.storage.read is not None
        data = self.storage.read()
        if len(data) != self.storage.count * self.storage.dtype.itemsize:
            raise Refused(f"a tensor {list(self.shape)} is truncated")
        if not data:
            return torch.empty(self.shape, dtype=self.storage.dtype)
        flat = torch.frombuffer(bytearray(data), dtype=self.storage.dtype)
        return flat.as_strided(self.shape, self.stride, self.offset).clone(
            memory_format=torch.contiguous_format
        )


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    if not isinstance(value, tuple | list) or not all(type(n) is int for n in value):
        raise Refused(f"a tensor's {what} is no tuple of whole numbers")
    if len(value) > 16 or any(not 0 <= n < 2**40 for n in value):
        raise Refused(f"a tensor's {what} is out of range")
    return tuple(value)


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> FileTensor:
    """`torch._utils._rebuild_tensor_v2`: a view of a storage, which has to lie inside it."""
    if not isinstance(storage, FileStorage):
        raise Refused("a tensor has no storage")
    shape, stride = _sizes(shape, "shape"), _sizes(stride, "stride")
    if type(offset) is not int or len(shape) != len(stride) or not 0 <= offset <= storage.count:
        raise Refused("a tensor's layout is not that of a tensor")
    numel = 1
    for n in shape:
        numel *= n
    last = offset + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))
    # A view that repeats elements could be larger than the file by any factor.
    if numel and (last >= storage.count or numel > storage.count):
        raise Refused(f"a tensor {list(shape)} is larger than its storage of {storage.count}")
    return FileTensor(storage, offset, shape, stride)


def _parameter(data: Any, *_: Any) -> FileTensor:
    if not isinstance(data, FileTensor):
        raise Refused("a parameter is no tensor")
    return data


TENSOR_CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("torch._utils", "_rebuild_tensor_v2"): _tensor,
    ("torch._utils", "_rebuild_tensor"): _tensor,
    ("torch._utils", "_rebuild_parameter"): _parameter,
    ("torch._utils", "_rebuild_parameter_with_state"): _parameter,
}


def _is_torch_name(module: str, name: str) -> bool:
    """Storage classes and dtypes, which files refer to."""
    return module in ("torch", "torch.storage") and (name in DTYPES or name in DTYPE_NAMES)


def _storage(reference: Any) -> tuple[FileStorage, str]:
    """The storage that a persistent id describes, and its key."""
    if (
        not isinstance(reference, tuple)
        or len(reference) < 5
        or reference[0] != "storage"
        or not isinstance(reference[1], Global)
        or reference[1].name not in DTYPES
        or not isinstance(reference[2], str)
        or type(reference[4]) is not int
        or not 0 <= reference[4] < 2**40
    ):
        raise Refused("it refers to a storage in an unknown form")
    if len(reference) > 5 and reference[5] is not None:
        raise Refused("it holds a view of a storage (a file of an early PyTorch)")
    return FileStorage(DTYPES[reference[1].name], reference[4]), reference[2]


# ---- the streams of torch.save ------------------------------------------------------------------


def read_stream(file: BinaryIO) -> Any:
    """An object of `torch.save`'s older form: four pickles, keys, and the storages' bytes.

    Raises:
        Refused: it is something else, or damaged.
    """
    numbers = Machine()
    if numbers.run(file) != STREAM_MAGIC or numbers.run(file) != 1001:
        raise Refused("it is not a stream of torch.save")
    about = numbers.run(file)
    if not isinstance(about, dict) or about.get("little_endian") is not True:
        raise Refused("it was not written by a little-endian machine")
    storages: dict[str, FileStorage] = {}

    def persistent(reference: Any) -> FileStorage | Global:
        if isinstance(reference, tuple) and len(reference) == 4 and reference[0] == "module":
            kind = reference[1]  # a class of modules, with its source
            if isinstance(kind, Global):
                return kind
        storage, key = _storage(reference)
        return storages.setdefault(key, storage)

    machine = Machine(calls=TENSOR_CALLS, names=_is_torch_name, persistent=persistent)
    found = machine.run(file)
    keys = numbers.run(file)
    if not isinstance(keys, list) or not all(isinstance(key, str) for key in keys):
        raise Refused("its list of storages is no list of names")
    if sorted(keys) != sorted(storages):
        raise Refused("its storages are not those that it refers to")
    here = file.tell()
    end = file.seek(0, io.SEEK_END)
    for key in keys:
        storage = storages[key]
        file.seek(here)
        count = int.from_bytes(file.read(8), "little")
        size = count * storage.dtype.itemsize
        if count != storage.count or size > end - here - 8:
            raise Refused("it is truncated: a storage is not there")
        storage.read = _reader(file, here + 8, size)
        here += 8 + size
    file.seek(here)
    return found


def _reader(file: BinaryIO, start: int, size: int) -> Callable[[], bytes]:
    def read() -> bytes:
        file.seek(start)
        return file.read(size)

    return read


def _from_bytes(data: Any) -> FileStorage:
    """`torch.storage._load_from_bytes`: the storage of a tensor in a plain pickle."""
    if not isinstance(data, bytes):
        raise Refused("a storage is no bytes")
    found = read_stream(io.BytesIO(data))
    if not isinstance(found, FileStorage):
        raise Refused("a storage is something else")
    return found


# ---- files --------------------------------------------------------------------------------------


def read(path: Path) -> Any:
    """What a file holds, as data. It must not be closed or changed while tensors are loaded from it.

    Raises:
        FileNotFoundError: no such file. Refused: it holds something that is not data, is damaged or is
            not a file of these.
    """
    if not path.is_file():
        raise FileNotFoundError(f"convert: no such file: {path}")
    file = path.open("rb")
    try:
        head = file.read(16)
        file.seek(0)
        if head.startswith(b"PK"):
            return _read_zip(file)
        if head[2:13] == b"\x8a\nl\xfc\x9cF\xf9 j\xa8P":
            return read_stream(file)
        calls = {**TENSOR_CALLS, ("torch.storage", "_load_from_bytes"): _from_bytes}
        return Machine(calls=calls, names=_is_torch_name).run(file)
    except Refused as error:
        file.close()
        raise Refused(f"convert: {path}: {error}") from None


def _read_zip(file: BinaryIO) -> Any:
    """The object of an archive of `torch.save`."""
    size = file.seek(0, io.SEEK_END)
    try:
        archive = zipfile.ZipFile(file)
        members = archive.infolist()
    except (zipfile.BadZipFile, ValueError, OSError, NotImplementedError, EOFError) as error:
        raise Refused(f"its archive is damaged ({error})") from None
    if len(members) > MAX_MEMBERS:
        raise Refused(f"its archive has {len(members):,} members, more than {MAX_MEMBERS:,}")
    names = [member.filename for member in members]
    for member in members:
        name = member.filename
        if name.startswith("/") or "\\" in name or ".." in name.split("/") or ":" in name:
            raise Refused(f"its archive has a member with the path {shown(name)}")
        if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
            raise Refused(f"its archive has a compressed or encrypted member, {shown(name)}")
        if member.file_size != member.compress_size:
            raise Refused(f"its archive is damaged (the size of {shown(name)})")
    if len(set(names)) != len(names) or sum(member.file_size for member in members) > size:
        raise Refused("its archive has members that overlap")
    roots = [name.removesuffix("data.pkl") for name in names if name.endswith("/data.pkl")]
    if len(roots) != 1 or roots[0].count("/") != 1:
        raise Refused("its archive is not one of torch.save")
    root = roots[0]
    if f"{root}byteorder" in names and _member(archive, f"{root}byteorder") != b"little":
        raise Refused("it was not written by a little-endian machine")
    storages: dict[str, FileStorage] = {}

    def persistent(reference: Any) -> FileStorage:
        storage, key = _storage(reference)
        name = f"{root}data/{key}"
        if name not in names_set:
            raise Refused(f"its archive lacks {shown(name)}")
        if archive.getinfo(name).file_size != storage.count * storage.dtype.itemsize:
            raise Refused(f"{shown(name)} has another size than its tensor")
        storage.read = lambda: _member(archive, name)
        return storages.setdefault(key, storage)

    names_set = set(names)
    machine = Machine(calls=TENSOR_CALLS, names=_is_torch_name, persistent=persistent)
    return machine.run(io.BytesIO(_member(archive, f"{root}data.pkl")))


def _member(archive: zipfile.ZipFile, name: str) -> bytes:
    try:
        return archive.read(name)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, NotImplementedError,
            RuntimeError) as error:  # fmt: skip
        raise Refused(f"its archive is damaged ({shown(name)}: {error})") from None
