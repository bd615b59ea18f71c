"""Selections as values: which adapters act in a forward, and how they are put together.

A selection is the name of an adapter, None for the base, or one of these; a list of them has one entry per row of the
batch. They are frozen, compared by value, printed as they are written, and saved as JSON. What follows is the
definition of each, for a part p with the change f_p at a site, where None, and an adapter that does not act there,
change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeAlias, Union

from adapters._errors import AdapterError

Part: TypeAlias = Union[str, "Stack", "Average", "Split", "Parallel", None]
Selection: TypeAlias = Part | list[Part] | tuple[Part, ...]


class Composed:
    """Compared by value. Every choice of adapters asks for the hash, which is therefore found once."""

    parts: tuple[Part, ...]
    _key: tuple[Any, ...]
    _hash: int

    def __eq__(self, other: Any) -> bool:
        return self is other or (type(self) is type(other) and self._key == other._key)

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self: Any) -> tuple[Any, ...]:
        return from_record, (record_of(self),)  # hashes of texts differ from process to process


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Stack(Composed):
    """The parts one after the other: `f_b(f_a(W))` at a weight, `f_b(x, f_a(x, y))` at a stream, `[P_a; P_b; k]`.

    For low-rank changes that is the sum of both.

    Example:
        >>> Stack("fr", "formal")
        Stack('fr', 'formal')
    """

    parts: tuple[Part, ...]

    def __init__(self, *parts: Part) -> None:
        _set(self, parts=_checked(self, parts))

    def __repr__(self) -> str:
        return f"Stack({_listed(self.parts)})"


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Average(Composed):
    """`W + sum_p w_p (f_p(W) - W)` at a weight, `y + sum_p w_p (f_p(x, y) - y)` at a stream, `sum_p w_p P_p`.

    Weights are 1 / n unless given, and need not sum to 1: task arithmetic is an Average with weights of any size and
    sign. Only prefixes, of one length, need a sum of 1. One part of weight 1 is that part exactly.

    Example:
        >>> Average("fr", "de", weights=(0.25, 0.75))
        Average('fr', 'de', weights=(0.25, 0.75))
    """

    parts: tuple[Part, ...]
    weights: tuple[float, ...]

    def __init__(self, *parts: Part, weights: tuple[float, ...] | list[float] | None = None) -> None:
        found = _checked(self, parts)
        try:
            given = tuple(float(w) for w in weights) if weights is not None else (1 / len(found),) * len(found)
        except (TypeError, ValueError) as error:
            raise AdapterError(f"the weights of an Average are {weights!r}; each must be a finite number.") from error
        if len(given) != len(found):
            raise AdapterError(f"{len(given)} weights were given for {len(found)} parts of an Average.")
        if not all(math.isfinite(weight) for weight in given):
            raise AdapterError(f"the weights of an Average are {given}; each must be a finite number.")
        _set(self, parts=found, weights=given)

    def __repr__(self) -> str:
        return f"Average({_listed(self.parts)}, weights={self.weights})"


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Split(Composed):
    """Parts by token: the first acts on tokens [0, at[0]), the next on [at[0], at[1]), the last on all that follow.

    Tokens are counted from the first of the sequence, in a step of generation too.

    Example:
        >>> Split("fr", None, "de", at=(3, 10))
        Split('fr', None, 'de', at=(3, 10))
    """

    parts: tuple[Part, ...]
    at: tuple[int, ...]

    def __init__(self, *parts: Part, at: tuple[int, ...] | list[int]) -> None:
        found, bounds = _checked(self, parts), tuple(at)
        whole = all(isinstance(each, int) and not isinstance(each, bool) for each in bounds)
        if not whole or not all(low < high for low, high in zip((0, *bounds), bounds, strict=False)):
            raise AdapterError(f"at is {bounds}; the tokens at which a Split's parts change are ascending, from 1 on.")
        if len(bounds) != len(found) - 1:
            raise AdapterError(f"a Split of {len(found)} parts changes at {len(found) - 1} tokens, and at is {bounds}.")
        _set(self, parts=found, at=bounds)

    def __repr__(self) -> str:
        return f"Split({_listed(self.parts)}, at={self.at})"


@dataclass(frozen=True, init=False, repr=False, eq=False)
class Parallel(Composed):
    """One input, several outputs: the batch is repeated once per part, and the outputs are those of part after part.

    Only as the outermost selection.

    Example:
        >>> Parallel("fr", None)
        Parallel('fr', None)
    """

    parts: tuple[Part, ...]

    def __init__(self, *parts: Part) -> None:
        _set(self, parts=_checked(self, parts))

    def __repr__(self) -> str:
        return f"Parallel({_listed(self.parts)})"


Composition: TypeAlias = Stack | Average | Split | Parallel
KINDS: dict[str, type[Any]] = {cls.__name__: cls for cls in (Stack, Average, Split, Parallel)}


def names_in(selection: Selection) -> Iterator[str]:
    """The names in a selection, each as often as it occurs."""
    if isinstance(selection, str):
        yield selection
    elif selection is not None:
        for part in selection if isinstance(selection, list | tuple) else selection.parts:
            yield from names_in(part)


def expanded(selection: Part, named: Mapping[str, Part]) -> Part:
    """The same selection with what names mean in the place of those names."""
    if isinstance(selection, str) and selection in named:
        return expanded(named[selection], named)
    if selection is None or isinstance(selection, str):
        return selection
    made: Part = type(selection)(*(expanded(part, named) for part in selection.parts), **_more(selection))
    return made


def record_of(selection: Part) -> Any:
    """A selection as JSON."""
    if selection is None or isinstance(selection, str):
        return selection
    more = {key: list(value) for key, value in _more(selection).items()}
    return {"kind": type(selection).__name__, "parts": [record_of(part) for part in selection.parts], **more}


def from_record(record: Any) -> Part:
    """The selection that `record_of` wrote.

    Raises:
        AdapterError: it wrote no such thing.
    """
    if record is None or isinstance(record, str):
        return record
    if not isinstance(record, dict) or record.get("kind") not in KINDS or not isinstance(record.get("parts"), list):
        raise AdapterError(f"{str(record)[:60]!r} does not describe a selection of adapters.")
    more = {key: value for key, value in record.items() if key not in ("kind", "parts")}
    try:
        made: Part = KINDS[record["kind"]](*map(from_record, record["parts"]), **more)
    except (TypeError, ValueError) as error:
        raise AdapterError(f"{str(record)[:60]!r} does not describe a selection of adapters: {error}.") from error
    return made


def _checked(owner: Any, parts: tuple[Any, ...]) -> tuple[Part, ...]:
    kind = type(owner).__name__
    if not parts:
        raise AdapterError(f"a {kind} without parts selects nothing; None selects the base.")
    for part in parts:
        if part is not None and not isinstance(part, str | Stack | Average | Split | Parallel):
            hint = " give the names as separate arguments." if isinstance(part, list | tuple) else ""
            raise AdapterError(f"a part of {kind} is {part!r}; it is a name, None or another selection.{hint}")
        if isinstance(part, Parallel):
            raise AdapterError(f"Parallel repeats the whole batch, so it cannot be a part of {kind}: put it outermost.")
    return parts


def _listed(parts: tuple[Part, ...]) -> str:
    return ", ".join(map(repr, parts))


def _more(selection: Any) -> dict[str, Any]:
    """What a selection has beside its parts."""
    return {each.name: getattr(selection, each.name) for each in fields(selection) if each.name != "parts"}


def _set(owner: object, **values: object) -> None:
    key = tuple(values.values())
    for name, value in (*values.items(), ("_key", key), ("_hash", hash((type(owner), key)))):
        object.__setattr__(owner, name, value)  # of a frozen dataclass
