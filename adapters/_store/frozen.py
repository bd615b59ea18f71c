"""JSON that cannot change: what was read once may then be handed to everyone who reads the same text."""

from __future__ import annotations

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

    Texts are compared and not hashed, which takes a tenth of the time: those that differ do so early, or in length.
    Threads may share a memo; what is made must not be changed by those who get it.

    Args:
        limit: how many bytes of text of a kind are kept at most.
        most: how many texts of a kind are kept at most.
    """

    def __init__(self, limit: int, most: int = 64) -> None:
        self.limit, self.most = limit, most
        self.lock = Lock()
        self.kinds: dict[str, list[tuple[bytes, object]]] = {}  # the last used one first

    def get(self, kind: str, text: bytes, make: Callable[[bytes], T]) -> T:
        """`make(text)`, called only for a text that is not known; what it raises is not kept."""
        with self.lock:
            entries = self.kinds.setdefault(kind, [])
            for i, (known, value) in enumerate(entries):
                if known == text:
                    entries.insert(0, entries.pop(i))
                    return cast(T, value)
        found = make(text)
        with self.lock:
            entries.insert(0, (text, found))
            while len(entries) > self.most or sum(len(known) for known, _ in entries) > self.limit:
                entries.pop()
        return found


known = Memo(8 << 20)  # a kind of adapter of SmolLM2 takes 0.7 MB of a base, and 0.1 MB or less of what else it has
