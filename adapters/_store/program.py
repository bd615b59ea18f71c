"""The program in a file that torch.save wrote, followed as data: nothing in it is executed, imported or unpickled.

torch describes tensors by a program for pickle's machine (torch/serialization.py). It is followed opcode by opcode
(`pickletools.genops`), as far as a flat dictionary of tensors needs it; names of functions and classes stay names.
Whatever else it asks for is refused.
"""

from __future__ import annotations

import pickletools
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from adapters._errors import DamagedAdapter

MOST_AXES = 16
REBUILD, PARAMETER, ORDERED = (
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    "collections OrderedDict",
)
DTYPES = {
    "torch DoubleStorage": torch.float64,
    "torch FloatStorage": torch.float32,
    "torch HalfStorage": torch.float16,
    "torch BFloat16Storage": torch.bfloat16,
    "torch LongStorage": torch.int64,
    "torch IntStorage": torch.int32,
    "torch ShortStorage": torch.int16,
    "torch CharStorage": torch.int8,
    "torch ByteStorage": torch.uint8,
    "torch BoolStorage": torch.bool,
}


@dataclass(frozen=True)
class Name:
    """A function or class that the program names: "module name"."""

    text: str


@dataclass(frozen=True)
class Storage:
    """The member `data/<key>`: `size` elements of `dtype`."""

    dtype: torch.dtype
    key: str
    size: int


@dataclass(frozen=True)
class View:
    """A tensor as a view of a storage."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Machine:
    """Pickle's machine, without what calls, imports or builds objects: what it makes are the records above."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.steps: Mapping[str, Callable[[Any], None]] = {
            "PROTO": self._protocol,
            "GLOBAL": lambda arg: self.stack.append(self._known(arg)),
            "MARK": lambda arg: self.marks.append(len(self.stack)),
            "NONE": self.stack.append,
            "NEWTRUE": lambda arg: self.stack.append(True),
            "NEWFALSE": lambda arg: self.stack.append(False),
            "BININT": self.stack.append,
            "BININT1": self.stack.append,
            "BININT2": self.stack.append,
            "LONG1": self.stack.append,
            "BINUNICODE": self.stack.append,
            "EMPTY_TUPLE": lambda arg: self.stack.append(()),
            "TUPLE": lambda arg: self.stack.append(tuple(self._since_mark())),
            "TUPLE1": lambda arg: self.stack.append(tuple(self._take(1))),
            "TUPLE2": lambda arg: self.stack.append(tuple(self._take(2))),
            "TUPLE3": lambda arg: self.stack.append(tuple(self._take(3))),
            "EMPTY_DICT": lambda arg: self.stack.append({}),
            "SETITEM": lambda arg: self._set(self._take(2)),
            "SETITEMS": lambda arg: self._set(self._since_mark()),
            "BINPUT": self._remember,
            "LONG_BINPUT": self._remember,
            "BINGET": self._recall,
            "LONG_BINGET": self._recall,
            "BINPERSID": lambda arg: self.stack.append(self._storage(self._take(1)[0])),
            "REDUCE": lambda arg: self.stack.append(self._made(*self._take(2))),
        }

    def run(self, program: bytes) -> dict[str, View]:
        """The flat dictionary of tensors that the program describes."""
        try:
            for opcode, arg, _ in pickletools.genops(program):
                if opcode.name == "STOP":
                    break
                if opcode.name not in self.steps:
                    raise self._refusal(f"asks for {opcode.name}, which a dictionary of tensors does not need")
                self.steps[opcode.name](arg)
        except (ValueError, OverflowError, struct.error) as error:
            if isinstance(error, DamagedAdapter):
                raise
            raise DamagedAdapter(f"{self.where}: data.pkl is truncated or damaged.") from error
        found = self.stack[0] if len(self.stack) == 1 and not self.marks else None
        if not isinstance(found, dict):
            raise self._refusal("does not describe one dictionary")
        for key, value in found.items():
            if not isinstance(value, View):
                raise self._refusal(f"holds {key[:80]!r}, which is no tensor")
        return dict(found)

    def _refusal(self, what: str) -> DamagedAdapter:
        return DamagedAdapter(f"{self.where}: data.pkl {what}; nothing of it was executed.")

    def _protocol(self, arg: int) -> None:
        if arg != 2:
            raise self._refusal(f"is written in pickle's protocol {arg}, and torch.save's is 2")

    def _known(self, name: str) -> Name:
        if name not in (REBUILD, PARAMETER, ORDERED) and name not in DTYPES:
            raise self._refusal(
                f"asks for {'.'.join(name.split(' '))[:80]}, which is no part of a dictionary of tensors"
            )
        return Name(name)

    def _take(self, count: int) -> list[Any]:
        """The last values, none of them from before the last mark."""
        floor = self.marks[-1] if self.marks else 0
        if len(self.stack) - floor < count:
            raise self._refusal("takes values that it has not put down")
        taken = self.stack[-count:]
        del self.stack[-count:]
        return taken

    def _since_mark(self) -> list[Any]:
        if not self.marks:
            raise self._refusal("takes values that it has not put down")
        start = self.marks.pop()
        taken = self.stack[start:]
        del self.stack[start:]
        return taken

    def _remember(self, number: int) -> None:
        self.memo[number] = self._take(1)[0]
        self.stack.append(self.memo[number])

    def _recall(self, number: int) -> None:
        if number not in self.memo:
            raise self._refusal("recalls what it has not remembered")
        self.stack.append(self.memo[number])

    def _set(self, pairs: list[Any]) -> None:
        target = self._take(1)[0]
        if not isinstance(target, dict) or len(pairs) % 2:
            raise self._refusal("fills something that is no dictionary")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            if not isinstance(key, str):
                raise self._refusal(f"has a key that is no text but {type(key).__name__}")
            if key in target:
                raise self._refusal(f"names {key[:80]!r} twice")
            target[key] = value
        self.stack.append(target)

    def _storage(self, pid: Any) -> Storage:
        fields = pid if isinstance(pid, tuple) and len(pid) == 5 else ("",) * 5
        word, kind, key, place, size = fields
        dtype = DTYPES.get(kind.text) if isinstance(kind, Name) else None
        if word != "storage" or dtype is None or not _is_key(key) or not isinstance(place, str) or not _count(size):
            raise self._refusal("names something else than a storage from outside")
        return Storage(dtype, key, size)  # type: ignore[arg-type]

    def _made(self, name: Any, args: Any) -> Any:
        if isinstance(name, Name) and isinstance(args, tuple):
            if name.text == ORDERED and args == ():
                return {}
            if name.text == REBUILD and len(args) in (6, 7) and _is_view(args):
                return View(args[0], args[1], args[2], args[3])
            if name.text == PARAMETER and len(args) == 3 and isinstance(args[0], View) and args[2] == {}:
                return args[0]
        what = name.text.replace(" ", ".") if isinstance(name, Name) else type(name).__name__
        raise self._refusal(f"calls {what[:80]} with something else than a tensor's description")


def _is_key(key: Any) -> bool:
    return isinstance(key, str) and 0 < len(key) <= 20 and key.isascii() and key.isdigit()


def _count(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _is_view(args: tuple[Any, ...]) -> bool:
    """Whether these are arguments of _rebuild_tensor_v2: a storage, an offset, a shape, strides; no hooks."""
    storage, offset, shape, strides, grad, hooks = args[:6]
    axes = isinstance(shape, tuple) and isinstance(strides, tuple) and len(shape) == len(strides) <= MOST_AXES
    counts = axes and all(map(_count, shape)) and all(map(_count, strides)) and _count(offset)
    plain = isinstance(grad, bool) and hooks == {} and all(rest in (None, {}) for rest in args[6:])
    return isinstance(storage, Storage) and counts and plain
