"""Reads pickles as data: nothing in them is imported, called or built but numbers, strings, containers
and records.

A pickle is a program for a stack machine, two of whose instructions import and call what the file says.
This machine has its own meaning for those: a name becomes a `Global`, which is a pair of strings, and a
call becomes one of the few constructors in `CALLS`, written here, or is refused by name. Objects of other
people's classes become `Record`s: the name of the class and the attributes.

What a file can ask for is bounded by its own size: every length is compared with the bytes that are left
before anything is allocated.
"""

from __future__ import annotations

import io
import pickletools
import re
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO

MAX_OPERATIONS = 20_000_000  # of one stream; the largest published network needs half a million
MAX_TEXT = 1 << 20  # bytes of a line in the text protocols
OBJECT_CLASSES = re.compile(r"(training|torch\.nn\.modules)\.\w+\.[A-Z]\w*")
"""Those whose objects become records: of the official repositories, and containers of torch's."""


class Refused(ValueError):
    """The file holds something that is not data, is damaged, or asks for too much."""


def shown(value: object) -> str:
    """Something out of a file, fit to be printed: containers could take for ever, names could be long
    or hold control characters."""
    if not isinstance(value, str | int | float | Global | type(None)):
        return type(value).__name__
    text = str(value)
    return repr(text if len(text) <= 80 else f"{text[:77]}...")


@dataclass(frozen=True)
class Global:
    """A name that the file refers to; never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Record:
    """An object of a class that was not built: the class's name and the object's attributes; the source
    code that came with it, as text."""

    kind: str
    state: dict[str, Any] = field(default_factory=dict)
    source: str = ""


@dataclass(eq=False)
class Method:
    """A record's method that the file refers to."""

    owner: Record
    name: str


# ---- what may be called -------------------------------------------------------------------------


def _want(value: Any, kinds: Any, what: str) -> Any:
    if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is int):
        raise Refused(f"{what} has an argument of type {type(value).__name__}")
    return value


def _key(value: Any) -> Any:
    """A dictionary's key or a set's member: hashing a nested one could take for ever, and so could
    telling integers apart that leave the same remainder modulo 2^61 - 1, which is their hash."""
    if not isinstance(value, str | int | float | bytes | type(None)):
        raise Refused(f"a dictionary has a key of type {type(value).__name__}")
    if isinstance(value, int) and not -(2**60) < value < 2**60:
        raise Refused("a dictionary has a key of more than 60 bits")
    return value


def _dict(pairs: Any = ()) -> dict:
    if isinstance(pairs, dict):
        return dict(pairs)
    found = {}
    for pair in _want(pairs, (list, tuple), "dict"):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise Refused("dict has an item that is no pair")
        found[_key(pair[0])] = pair[1]
    return found


def _set(items: Any = ()) -> set:
    return {_key(item) for item in _want(items, (list, tuple, set, frozenset), "set")}


def _encode(text: str, encoding: str = "latin1") -> bytes:
    """How the older protocols write bytes."""
    if encoding != "latin1":
        raise Refused(f"_codecs.encode has the encoding {shown(encoding)}")
    return _want(text, str, "_codecs.encode").encode("latin1")


def _bytearray(value: Any = b"") -> bytes:
    return bytes(_want(value, bytes, "bytearray"))


def _plain_object(kind: Any, base: Any = None, state: Any = None) -> Any:
    """`copyreg._reconstructor`, the older protocols' way to an object."""
    made = new_object(_want(kind, Global, "copyreg._reconstructor"))
    return _dict(state) if isinstance(made, dict) and state is not None else made


def _getattr(owner: Any, name: Any) -> Method:
    """How a bound method is written."""
    return Method(_want(owner, Record, "getattr"), _want(name, str, "getattr"))


def _persistent(meta: Any) -> Record:
    """An object of a class that was pickled with its source code, which stays text."""
    state = _want(meta, dict, "_reconstruct_persistent_obj").get("state")
    if meta.get("type") != "class" or not isinstance(meta.get("class_name"), str):
        raise Refused("a persistent object is not of the known form")
    source = meta.get("module_src")
    text = source if isinstance(source, str) else ""
    return Record(meta["class_name"], _attributes(state or {}), text)


NUMPY_CODES = {"f8": "d", "f4": "f", "f2": "e", "i8": "q", "i4": "i", "u1": "B", "b1": "?"}


def _scalar(dtype: Any, data: bytes = b"") -> float | int | bool:
    """A NumPy number."""
    state = _want(dtype, Record, "numpy scalar").state
    name = state.get("name")
    code = NUMPY_CODES.get(name) if isinstance(name, str) else None
    if code is None:
        raise Refused(f"a NumPy scalar is of type {shown(name)}, not a number")
    order = ">" if state.get("order") == ">" else "<"
    return struct.unpack(order + code, _want(data, bytes, "numpy scalar"))[0]


def _dtype(name: Any, *_: Any) -> Record:
    return Record("numpy.dtype", {"name": _want(name, str, "numpy.dtype")})


def _array(*_: Any) -> Record:
    """A NumPy array; none is needed, so its contents stay bytes."""
    return Record("numpy.ndarray")


CALLS: dict[tuple[str, str], Callable[..., Any]] = {
    ("collections", "OrderedDict"): _dict,
    ("torch_utils.persistence", "_reconstruct_persistent_obj"): _persistent,
    ("copyreg", "_reconstructor"): _plain_object,
    ("copy_reg", "_reconstructor"): _plain_object,
    ("_codecs", "encode"): _encode,
    ("torch", "Size"): lambda sizes=(): tuple(_want(sizes, (list, tuple), "torch.Size")),
    ("torch", "device"): lambda name, *_: str(_want(name, str, "torch.device")),
    ("numpy", "dtype"): _dtype,
    **{
        (f"numpy{core}.multiarray", name): call
        for core in (".core", "._core")
        for name, call in (("scalar", _scalar), ("_reconstruct", _array))
    },
    **{
        (builtins, name): call
        for builtins in ("builtins", "__builtin__")
        for name, call in (
            ("set", _set),
            ("frozenset", _set),
            ("list", lambda items=(): list(_want(items, (list, tuple), "list"))),
            ("dict", _dict),
            ("bytearray", _bytearray),
            ("getattr", _getattr),
        )
    },
}
NAMES = {  # that may be referred to, as arguments
    ("builtins", "object"),
    ("__builtin__", "object"),
    ("numpy", "ndarray"),
    ("dnnlib.util", "EasyDict"),
    ("collections", "OrderedDict"),
}


def new_object(kind: Global) -> Any:
    """An object of a class of the file's, without attributes yet."""
    if (kind.module, kind.name) in (("dnnlib.util", "EasyDict"), ("collections", "OrderedDict")):
        return {}
    if not OBJECT_CLASSES.fullmatch(str(kind)):
        raise Refused(f"it holds an object of {shown(kind)}, which is not read")
    return Record(kind.name)


def _attributes(state: Any) -> dict[str, Any]:
    """An object's state as attributes: a dictionary, or that and one of slots."""
    if isinstance(state, tuple) and len(state) == 2:
        return {**_attributes(state[0] or {}), **_attributes(state[1] or {})}
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise Refused("an object's state is not a dictionary of attributes")
    return state


# ---- the machine --------------------------------------------------------------------------------

_MARK = object()


class _Bounded:
    """What `pickletools.genops` reads from: never more than there is."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.tell = file.tell
        here = file.tell()
        self.end = file.seek(0, io.SEEK_END)
        file.seek(here)

    def read(self, size: int) -> bytes:
        if size > self.end - self.file.tell():
            raise Refused(f"it is truncated: {size} bytes are announced and not there")
        return self.file.read(size)

    def readline(self) -> bytes:
        line = self.file.readline(MAX_TEXT)
        if not line.endswith(b"\n"):
            raise Refused("it is truncated, or has a line without end")
        return line


class Machine:
    """Runs one pickle.

    Args:
        calls: further constructors beside `CALLS`, by (module, name).
        names: further names that may be referred to: (module, name) -> bool.
        persistent: what a persistent id, a container's reference to a storage, becomes.
    """

    def __init__(
        self,
        *,
        calls: dict[tuple[str, str], Callable[..., Any]] | None = None,
        names: Callable[[str, str], bool] = lambda module, name: False,
        persistent: Callable[[Any], Any] | None = None,
    ):
        self.calls = CALLS | (calls or {})
        self.names, self.persistent = names, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self, file: BinaryIO) -> Any:
        """The object of the pickle at the file's position, which moves behind it.

        Raises:
            Refused: it holds something that is not data, or is damaged.
        """
        self.stack, self.memo = [], {}
        try:
            operations = pickletools.genops(_Bounded(file))  # type: ignore[arg-type]
            for count, (opcode, argument, _) in enumerate(operations):
                if count > MAX_OPERATIONS:
                    raise Refused(f"it has more than {MAX_OPERATIONS:,} operations")
                if opcode.name == "STOP":
                    return self._pop()
                operation = _OPERATIONS.get(opcode.name)
                if operation is None:
                    raise Refused(f"it uses the operation {opcode.name}, which is not read")
                operation(self, argument)
        except Refused:
            raise
        except RecursionError:
            raise Refused("it is nested too deeply") from None
        except (ValueError, TypeError, LookupError, OverflowError, AttributeError,
                struct.error, MemoryError) as error:  # fmt: skip
            reason = " ".join(str(error).split())[:100]
            raise Refused(f"it is damaged ({type(error).__name__}: {reason})") from None
        raise Refused("it is truncated: the last operation is missing")

    def _pop(self) -> Any:
        value = self._top()
        self.stack.pop()
        return value

    def _top(self) -> Any:
        value = self.stack[-1]
        if value is _MARK:
            raise Refused("it is damaged (a mark where a value is due)")
        return value

    def _pop_to_mark(self) -> list[Any]:
        at = len(self.stack) - 1
        while at >= 0 and self.stack[at] is not _MARK:
            at -= 1
        if at < 0:
            raise Refused("it is damaged (no mark)")
        values = self.stack[at + 1 :]
        del self.stack[at:]
        return values

    def _global(self, module: Any, name: Any) -> Global:
        if not isinstance(module, str) or not isinstance(name, str):
            raise Refused("it refers to a name that is no text")
        found = Global(module, name)
        full = f"{module}.{name}"
        is_known = (
            (module, name) in self.calls
            or (module, name) in NAMES
            or OBJECT_CLASSES.fullmatch(full)
            or self.names(module, name)
        )
        if not is_known:
            raise Refused(f"it refers to {shown(full)}, which is not data")
        return found

    def _call(self) -> None:
        arguments, function = self._pop(), self._pop()
        if not isinstance(function, Global) or not isinstance(arguments, tuple):
            raise Refused(f"it calls something of type {type(function).__name__}")
        call = self.calls.get((function.module, function.name))
        if call is None:
            raise Refused(f"it calls {shown(function)}, which is not data")
        self.stack.append(call(*arguments))

    def _build(self, state: Any) -> None:
        target = self._top()
        if isinstance(target, Record) and target.kind == "numpy.dtype":
            order = state[1] if isinstance(state, tuple) and len(state) > 1 else "<"
            target.state["order"] = order
        elif isinstance(target, Record) and target.kind == "numpy.ndarray":
            pass
        elif isinstance(target, Record):
            target.state = {**target.state, **_attributes(state)}
        elif isinstance(target, dict):
            _attributes(state)  # of the dictionary itself: metadata that is not needed
        else:
            raise Refused(f"it gives attributes to something of type {type(target).__name__}")

    def _set_items(self, items: list[Any]) -> None:
        _want(self._top(), dict, "an assignment").update(_pairs(items))

    def _append(self, items: list[Any]) -> None:
        _want(self._top(), list, "an append").extend(items)

    def _add(self, items: list[Any]) -> None:
        _want(self._top(), set, "an addition").update(map(_key, items))

    def _remember(self, index: int) -> None:
        self.memo[index] = self._top()

    def _push_tuple(self, size: int) -> None:
        if len(self.stack) < size or _MARK in self.stack[len(self.stack) - size :]:
            raise Refused("it is damaged (a tuple of too few values)")
        values = tuple(self.stack[len(self.stack) - size :])
        del self.stack[len(self.stack) - size :]
        self.stack.append(values)

    def _persist(self) -> None:
        if self.persistent is None:
            raise Refused("it refers to something outside itself (a persistent id)")
        self.stack.append(self.persistent(self._pop()))


def _push(machine: Machine, value: Any) -> None:
    machine.stack.append(value)


def _global_text(machine: Machine, text: str) -> None:
    module, _, name = text.partition(" ")
    machine.stack.append(machine._global(module, name))


def _stack_global(machine: Machine, _: Any) -> None:
    name, module = machine._pop(), machine._pop()
    machine.stack.append(machine._global(module, name))


def _new_object(machine: Machine, _: Any) -> None:
    machine._pop()  # its arguments
    machine.stack.append(new_object(_want(machine._pop(), Global, "an object's class")))


def _new_object_ex(machine: Machine, _: Any) -> None:
    machine._pop()
    _new_object(machine, None)


_OPERATIONS: dict[str, Callable[[Machine, Any], Any]] = {
    "PROTO": lambda machine, _: None,
    "FRAME": lambda machine, _: None,
    "MARK": lambda machine, _: machine.stack.append(_MARK),
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine._pop_to_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine._top()),
    "NONE": lambda machine, _: _push(machine, None),
    "NEWTRUE": lambda machine, _: _push(machine, True),
    "NEWFALSE": lambda machine, _: _push(machine, False),
    **dict.fromkeys(
        [
            *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
            *("UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"),
            *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        ],
        _push,
    ),
    "BYTEARRAY8": lambda machine, value: _push(machine, bytes(value)),
    "EMPTY_LIST": lambda machine, _: _push(machine, []),
    "EMPTY_DICT": lambda machine, _: _push(machine, {}),
    "EMPTY_SET": lambda machine, _: _push(machine, set()),
    "EMPTY_TUPLE": lambda machine, _: _push(machine, ()),
    "LIST": lambda machine, _: _push(machine, machine._pop_to_mark()),
    "TUPLE": lambda machine, _: _push(machine, tuple(machine._pop_to_mark())),
    "TUPLE1": lambda machine, _: machine._push_tuple(1),
    "TUPLE2": lambda machine, _: machine._push_tuple(2),
    "TUPLE3": lambda machine, _: machine._push_tuple(3),
    "DICT": lambda machine, _: _push(machine, _pairs(machine._pop_to_mark())),
    "FROZENSET": lambda machine, _: _push(machine, _set(machine._pop_to_mark())),
    "APPEND": lambda machine, _: machine._append([machine._pop()]),
    "APPENDS": lambda machine, _: machine._append(machine._pop_to_mark()),
    "ADDITEMS": lambda machine, _: machine._add(machine._pop_to_mark()),
    "SETITEM": lambda machine, _: machine._set_items([machine._pop(), machine._pop()][::-1]),
    "SETITEMS": lambda machine, _: machine._set_items(machine._pop_to_mark()),
    **dict.fromkeys(["PUT", "BINPUT", "LONG_BINPUT"], lambda m, index: m._remember(index)),
    "MEMOIZE": lambda machine, _: machine._remember(len(machine.memo)),
    **dict.fromkeys(["GET", "BINGET", "LONG_BINGET"], lambda m, index: _push(m, m.memo[index])),
    "GLOBAL": _global_text,
    "STACK_GLOBAL": _stack_global,
    "REDUCE": lambda machine, _: machine._call(),
    "NEWOBJ": _new_object,
    "NEWOBJ_EX": _new_object_ex,
    "BUILD": lambda machine, _: machine._build(machine._pop()),
    "BINPERSID": lambda machine, _: machine._persist(),
}


def _pairs(values: list[Any]) -> dict:
    if len(values) % 2:
        raise Refused("it is damaged (a key without a value)")
    return {_key(k): v for k, v in zip(values[::2], values[1::2], strict=True)}
