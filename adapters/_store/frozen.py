"""JSON that cannot change: what was read once may then be handed to everyone who reads the same text."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from threading import Lock
from typing import Any, TypeVar, cast

T = TypeVar("T")


class Frozen(Mapping[str, Any]):
    """A JSON object without a way to change it; unlike `MappingProxyType` it can be copied and pickled."""

    __slots__ = ("_held",)

    def __init__(self, held: Mapping[str, Any]) -> None:
        self._held = {key: freeze(value) for key, value in held.items()}

    def __getitem__(self, key: str) -> Any:
        return self._held[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    def __repr__(self) -> str:
        return repr(self._held)

    def __deepcopy__(self, memo: object) -> Frozen:
        return self


def freeze(value: Any) -> Any:
    """A JSON value with objects as `Frozen` and lists as tuples."""
    if isinstance(value, dict):
        return Frozen(value)
    return tuple(map(freeze, value)) if isinstance(value, list) else value


def thaw(value: Any) -> Any:
    """What `json.dumps(..., default=thaw)` needs for a `Frozen`."""
    if isinstance(value, Frozen):
        return value._held
    raise TypeError(f"{type(value).__name__} is not JSON")


class Memo:
    """What was made of pieces of text, by the pieces themselves, byte for byte; the least recently used go first.

    Threads may share it; what is made must not be changed by those who get it.

    Args:
        limit: how many bytes of text are kept at most.
    """

    def __init__(self, limit: int) -> None:
        self.limit, self.size = limit, 0
        self.lock = Lock()
        self.made: OrderedDict[tuple[str, bytes], object] = OrderedDict()

    def get(self, kind: str, text: bytes, make: Callable[[bytes], T]) -> T:
        """`make(text)`, called only for a text that is not known; what it raises is not kept."""
        key = (kind, text)
        with self.lock:
            if key in self.made:
                self.made.move_to_end(key)
                return cast(T, self.made[key])
        found = make(text)
        with self.lock:
            self.size += len(text) if key not in self.made else 0
            self.made[key] = found
            while self.size > self.limit:
                (_, old), _ = self.made.popitem(last=False)
                self.size -= len(old)
        return found


known = Memo(16 << 20)  # the lines of about ten kinds of adapters; SmolLM2's take 0.9 MB a kind
