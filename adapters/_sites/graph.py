"""The dataflow of one forward: values, uses of weights, calls of modules and attentions. Records only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias

from adapters._contract import NOWHERE, Key, Rows

Slot: TypeAlias = Key | tuple[int | str, int]  # an argument, or an element of an argument that is a tuple


@dataclass(eq=False, slots=True)
class Value:
    """A tensor at one moment: an in-place operation makes a new value.

    `weights` are the parameters this value is a pure function of; `live` means that it depends on parameters and on
    the input, which tells activations from masks and positions. `flipped` says that the last two axes of a weight
    are swapped against its storage.
    """

    index: int
    op: str
    parents: tuple[Value, ...]
    shape: tuple[int, ...]
    floating: bool
    weights: frozenset[str] = frozenset()
    live: bool = False
    flipped: bool = False
    use: Use | None = None

    @property
    def active(self) -> tuple[Value, ...]:
        """The parents that are activations."""
        return tuple(p for p in self.parents if p.floating and p.live)


@dataclass(eq=False, slots=True)
class Use:
    """A product of an activation `x` with weights, or a lookup of `x` in a table.

    `inner` is the storage axis it sums over, -1 or -2, if known, and `units` the number of its outputs. `whole` says
    that the operand is the parameter as it is stored. `rows` is the layout of the batch's rows in `x`.
    """

    weights: frozenset[str]
    op: str
    module: str
    x: Value
    out: Value
    inner: int | None
    whole: bool = True
    rows: Rows = NOWHERE
    units: int = 0
    spread: bool = False  # a convolution whose kernel covers more than one position

    @property
    def index(self) -> int:
        return self.out.index

    @property
    def linear(self) -> bool:
        return not self.op.startswith("conv")

    @property
    def lookup(self) -> bool:
        return self.op == "embedding"


@dataclass(eq=False, slots=True)
class Call:
    """A call of the module at `path`, inside `depth` others; values with an index from `start` to `end` are its own."""

    path: str
    start: int
    end: int = -1
    depth: int = 0
    inputs: dict[Slot, Value] = field(default_factory=dict)
    outputs: dict[Key, Value] = field(default_factory=dict)
    rows: dict[Key, Rows] = field(default_factory=dict)  # of the outputs

    @property
    def order(self) -> tuple[int, int, int]:
        """By start, an outer call before those inside it."""
        return self.start, -self.end, self.depth

    def holds(self, index: int) -> bool:
        return self.start <= index < self.end


@dataclass(eq=False, slots=True)
class Attention:
    """One attention; `path` is empty where it did not go through transformers' attention interface."""

    query: Value
    key: Value
    value: Value
    path: str = ""
    causal: bool = True
    rows: Rows = NOWHERE


@dataclass(eq=False, slots=True)
class WrittenOut:
    """An attention in a model's own code: `out` = f(`scores`) times `value`, `scores` = `query` times `key`.

    f is a softmax, or something else.
    """

    query: Value
    key: Value
    value: Value
    scores: Value
    out: Value
    softmax: bool


@dataclass(eq=False)
class Graph:
    values: list[Value] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    lookups: list[Use] = field(default_factory=list)  # kept apart: what a table gives is where the stream starts
    touched: set[str] = field(default_factory=set)  # parameters that anything at all was made from
    calls: list[Call] = field(default_factory=list)
    products: list[tuple[Value, tuple[Value, ...]]] = field(default_factory=list)  # of two activations
    pairs: list[int] = field(default_factory=list)  # indices of products of two batches of matrices
    attentions: list[Attention] = field(default_factory=list)
    written: list[WrittenOut] = field(default_factory=list)
    results: list[Value] = field(default_factory=list)  # what the model returned

    @cached_property
    def producers(self) -> dict[int, list[tuple[Call, Key]]]:
        """Which calls returned a value, and as which of their outputs, by the value's index."""
        found: dict[int, list[tuple[Call, Key]]] = defaultdict(list)
        for call in self.calls:
            for key, value in call.outputs.items():
                found[value.index].append((call, key))
        return found

    @cached_property
    def _in_order(self) -> tuple[list[Call], list[int], dict[int, Call | None]]:
        """The calls by their start, an outer one before those inside it; their starts; and who encloses each."""
        calls = sorted(self.calls, key=lambda call: call.order)
        enclosing: dict[int, Call | None] = {}
        stack: list[Call] = []
        for call in calls:
            while stack and stack[-1].end < call.end:
                stack.pop()
            enclosing[id(call)] = stack[-1] if stack else None
            stack.append(call)
        return calls, [call.start for call in calls], enclosing

    def calls_between(self, first: int, last: int) -> list[Call]:
        """The calls that start at an index from `first` to `last`, an outer one before those inside it."""
        calls, starts, _ = self._in_order
        return calls[bisect_left(starts, first) : bisect_right(starts, last)]

    def enclosing(self, index: int) -> Iterator[Call]:
        """The calls in which the value with this index was made, from the inside out."""
        calls, starts, enclosing = self._in_order
        at = bisect_right(starts, index)
        call: Call | None = calls[at - 1] if at else None
        while call is not None:
            if call.holds(index):
                yield call
            call = enclosing[id(call)]

    def around(self, value: Value) -> Call:
        """The innermost call in which a value was made; one without a path is the model's own."""
        return next(self.enclosing(value.index), Call("", 0, len(self.values)))

    @cached_property
    def calls_of(self) -> dict[str, list[Call]]:
        found: dict[str, list[Call]] = defaultdict(list)
        for call in self.calls:
            found[call.path].append(call)
        return found

    @cached_property
    def uses_of(self) -> dict[str, list[Use]]:
        """The uses of each weight, weights in order of first use."""
        found: dict[str, list[Use]] = defaultdict(list)
        for use in self.uses:
            for weight in sorted(use.weights):
                found[weight].append(use)
        return found

    @cached_property
    def lookups_of(self) -> dict[str, list[Use]]:
        found: dict[str, list[Use]] = defaultdict(list)
        for use in self.lookups:
            for weight in sorted(use.weights):
                found[weight].append(use)
        return found

    @cached_property
    def slices(self) -> Counter[int]:
        """How often a value was indexed to one of a dimension less, by the value's index."""
        return Counter(
            value.parents[0].index
            for value in self.values
            if value.op in ("__getitem__", "select") and len(value.shape) == len(value.parents[0].shape) - 1
        )

    @cached_property
    def softmax_attentions(self) -> frozenset[int]:
        """Indices of the results of attentions that are written out with a softmax."""
        return frozenset(each.out.index for each in self.written if each.softmax)

    @cached_property
    def mixers(self) -> frozenset[int]:
        """Indices of the values in which activations of different tokens meet through a product."""
        return frozenset(value.index for value, _ in self.products)


def ancestors(values: Value | Iterable[Value], floor: int = 0) -> dict[int, Value]:
    """The values themselves and all they were made from, down to index `floor`."""
    seen: dict[int, Value] = {}
    todo = [values] if isinstance(values, Value) else list(values)
    while todo:
        value = todo.pop()
        if value.index >= floor and value.index not in seen:
            seen[value.index] = value
            todo.extend(value.parents)
    return seen
