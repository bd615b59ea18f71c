"""Adapters of which only those that are used take memory: the least recently used give way, to RAM and to disk."""

from __future__ import annotations

import os
import threading
import weakref
from collections import Counter
from collections.abc import Iterable

from torch import nn

from adapters._attach import adapters_of, check_attachable, detach, state_of, unwrapped, use_tables
from adapters._attach.bank import Row, key_of
from adapters._attach.state import Acting, Adapter, State
from adapters._errors import AdapterError, nearest
from adapters._pool.entry import Entry
from adapters._pool.room import bring, leave, who_leaves
from adapters._pool.status import PoolEntry, PoolStatus
from adapters._store import LoadReport, load, read
from adapters._store.basecheck import check_base


class Pool:
    """Holds adapters of one model within budgets, under names that `activate`, `using` and mixed batches take.

    An adapter whose turn it is comes into memory, beside the model's weights, and the least recently used that neither
    act nor are pinned leave it: into RAM while its budget lasts, else they are left in their folders, from which they
    are read again, checked, when they are wanted. Adapters with a head or tokens of their own are not pooled.

    Args:
        model: the model that the adapters are for.
        memory: the budget beside the model's weights, in bytes; None for no limit.
        ram: the budget for those that had to leave, in bytes; None for no limit where the model is on an accelerator,
            and for none where the model itself is in RAM.
        slots: for torch.compile: how many adapters of one kind (method, rank, sites) can be in memory. They are then in
            tables of this size, from which compiled code picks by number, so that no choice, exchange or mixture of
            them compiles anew.

    Example:
        >>> import adapters, tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        ...     num_attention_heads=4, num_key_value_heads=2, vocab_size=160))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = adapters.attach(model, "lora", name="fr", rank=4)
        ...     _ = adapters.save(model, "fr", folder)
        ...     adapters.detach(model, "fr")
        ...     pool = adapters.Pool(model, memory=10_000_000)
        ...     _ = pool.add(folder)
        >>> print(pool.status())
        memory: 29,696 bytes of 10,000,000
        ram: 0 bytes of 0
          fr         29,696 bytes  memory
    """

    def __init__(
        self, model: nn.Module, memory: int | None = None, ram: int | None = None, slots: int | None = None
    ) -> None:
        for name, value in (("memory", memory), ("ram", ram), ("slots", slots)):
            if value is not None and value < (1 if name == "slots" else 0):
                raise AdapterError(f"{name} is {value}; a pool needs a positive number, or None.")
        self._model = weakref.ref(unwrapped(model))
        here = next((p.device.type for p in model.parameters()), "cpu")
        self.memory, self.ram = memory, 0 if ram is None and here == "cpu" else ram
        self.slots = slots
        self._entries: dict[str, Entry] = {}
        self._lock = threading.RLock()
        self._clock = 0
        self._join()

    @property
    def model(self) -> nn.Module:
        """The model; it is not kept alive by its pool."""
        found = self._model()
        if found is None:
            raise AdapterError("the model of this pool is gone.")
        return found

    def add(self, folder: str | os.PathLike[str], name: str | None = None, pin: bool = False) -> LoadReport:
        """Adds a saved adapter, inactive, and checks it as `load` does.

        Raises:
            AdapterError: there is no room for it, it cannot be pooled, or as `load`.
        """
        with self._lock:
            bundle = read(folder, self.model)
            if bundle.head or bundle.tokens is not None:
                raise AdapterError(f"{bundle.name!r} has a head or tokens of its own: use adapters.load for it.")
            check_attachable(self.model, name or bundle.name)
            check_base(self.model, bundle, None)
            size = sum(tensor.nbytes for tensor in bundle.tensors.values())
            layout = self._join().layouts.get(key_of(bundle.method, bundle.sites, bundle.tensors))
            self._make_room(size, Counter({id(layout): 1}), keep=(), what=f"{name or bundle.name!r}")
            found = load(self.model, bundle, name, activate=False)
            row = self._join().adapters[found.name].row
            assert row is not None, "an adapter without a head and tokens is loaded into a row"
            row.keeper = self
            self._entries[found.name] = Entry(found.name, weakref.ref(row), bundle.folder, bundle.digest, pin)
            self._touch(self._entries[found.name])
            return found

    def pin(self, name: str) -> None:
        """Brings an adapter into memory and keeps it there.

        Raises:
            AdapterError: it is not in the pool, or there is no room for it.
        """
        with self._lock:
            entry = self._entry(name)
            self.admit([self._join().adapters[name]])
            entry.pinned = True

    def unpin(self, name: str) -> None:
        """Lets an adapter leave the memory again when others need it."""
        with self._lock:
            self._entry(name).pinned = False

    def remove(self, name: str) -> None:
        """Takes an adapter out of the pool and off the model."""
        with self._lock:
            self._entry(name)
            detach(self.model, name)
            del self._entries[name]

    def status(self) -> PoolStatus:
        """What the pool holds, and where."""
        with self._lock:
            entries = sorted(self._known(), key=lambda entry: -entry.used)
            shown = tuple(PoolEntry(e.name, e.nbytes, e.where, e.pinned) for e in entries)
            return PoolStatus(shown, self.memory, self.ram)

    # -- asked by the engine

    def admit(self, adapters: Iterable[Adapter]) -> None:
        """Brings what is about to act into memory.

        Raises:
            AdapterError: it does not fit, together with what is pinned or acts; nothing has moved.
        """
        rows = {id(adapter.row) for adapter in adapters if adapter.row is not None}
        with self._lock:
            wanted = [entry for entry in self._known() if id(entry.row()) in rows]
            missing = [entry for entry in wanted if entry.where != "memory"]
            names = ", ".join(repr(entry.name) for entry in wanted)
            if missing:
                kinds = Counter(id(entry.layout) for entry in missing)
                self._make_room(sum(entry.nbytes for entry in missing), kinds, keep=wanted, what=names)
            for entry in missing:
                self._bring(entry)
            for entry in wanted:
                self._touch(entry)

    def hold(self, acting: Acting) -> tuple[Entry, ...]:
        """Counts who acts inside a `using`, and gives them back to be counted off: they stay in memory."""
        with self._lock:
            rows = {id(adapter.row) for adapter in acting}
            found = tuple(entry for entry in self._known() if id(entry.row()) in rows)
            for entry in found:
                entry.held += 1
            return found

    def reading(self, acting: Acting) -> tuple[Row, ...]:
        """Counts the rows that a forward reads in tables, whose slots nobody else gets before it ends."""
        rows = tuple(adapter.row for adapter in acting if adapter.row is not None and adapter.row.number is not None)
        if rows:
            with self._lock:
                for row in rows:
                    row.readers += 1
        return rows

    def read(self, rows: tuple[Row, ...]) -> None:
        """Such a forward has ended."""
        with self._lock:
            for row in rows:
                row.readers -= 1
                row.give_back()

    def room_for(self, old: Row, size: int) -> None:
        """Before an adapter of this pool is exchanged for one of `size` bytes."""
        with self._lock:
            entry = next((entry for entry in self._known() if entry.row() is old), None)
            if entry is not None:
                here = entry.nbytes if entry.where == "memory" else 0
                self._make_room(max(0, size - here), Counter(), keep=[entry], what=repr(entry.name))

    def bring(self, row: Row) -> None:
        """For a forward that was under way when its row left the memory: whatever the budget."""
        with self._lock:
            entry = next((entry for entry in self._known() if entry.row() is row), None)
            if entry is None:
                raise AdapterError("an adapter was taken out of its pool while it was in use.")
            if entry.where != "memory":
                self._bring(entry)

    def follow(self, old: Row, new: Row) -> None:
        """An adapter was exchanged: the pool goes on with the new version, which stays in memory."""
        with self._lock:
            for entry in self._entries.values():
                if entry.row() is old:
                    entry.row, entry.where, entry.parked, entry.folder = weakref.ref(new), "memory", None, ""
                    new.keeper = self

    def came_from(self, name: str, folder: str, digest: str) -> None:
        """Where the new version of an exchanged adapter can be read again, "" for nowhere."""
        with self._lock:
            if name in self._entries:
                self._entries[name].folder, self._entries[name].digest = folder, digest

    # -- inside

    def _join(self) -> State:
        """The model's State, which knows the pool; it is a new one whenever the model had no adapters."""
        state = state_of(self.model)
        if state is None:
            return State()
        if state.pool is not None and state.pool is not self and state.pool.status().entries:
            raise AdapterError("this model has a pool already, with adapters in it: add to that one.")
        state.pool = self
        if self.slots is not None:
            use_tables(self.model, state, self.slots)
        return state

    def _known(self) -> list[Entry]:
        """The entries whose adapters are still attached."""
        attached = adapters_of(self.model)
        rows = {name: entry.row() for name, entry in self._entries.items()}
        gone = [
            name for name, row in rows.items() if row is None or name not in attached or attached[name].row is not row
        ]
        for name in gone:
            del self._entries[name]
        return list(self._entries.values())

    def _entry(self, name: str) -> Entry:
        self._known()
        if name not in self._entries:
            raise AdapterError(f"no adapter {name!r} in this pool{nearest(name, self._entries)}")
        return self._entries[name]

    def _touch(self, entry: Entry) -> None:
        self._clock += 1
        entry.used = self._clock

    def _make_room(self, size: int, kinds: Counter[int], keep: Iterable[Entry], what: str) -> None:
        """Moves the least recently used out until `size` bytes more fit, and so many rows of each kind of layout.

        Raises:
            AdapterError: they cannot; nothing has moved.
        """
        state, kept = state_of(self.model), set(map(id, keep))
        acting = {id(adapter.row) for adapter in state.active} if state is not None else set()
        inside = sorted((entry for entry in self._known() if entry.where == "memory"), key=lambda entry: entry.used)
        free = size if self.memory is None else self.memory - sum(entry.nbytes for entry in inside)
        tables = {id(e.layout): e.layout.table for e in self._known() if e.layout.table is not None}
        held = Counter(id(row.layout) for row in state.rows() if not row.away) if state is not None else Counter[int]()
        rooms = Counter({kind: tables[kind].slots - held[kind] - n for kind, n in kinds.items() if kind in tables})

        def may_leave(entry: Entry) -> bool:
            acts = entry.held or id(entry.row()) in acting
            return not acts and not entry.pinned and id(entry) not in kept and self._can_leave(entry)

        going, free = who_leaves(inside, may_leave, size, free, rooms)
        if free < size or min(rooms.values(), default=0) < 0:
            slots = "" if free < size else f" and one slot more of {self.slots}"
            budget = "no limit" if self.memory is None else f"a budget of {self.memory:,}"
            raise AdapterError(
                f"{what} needs {size:,} bytes of memory{slots}, and of the pool's, with {budget}, only {free:,} can be "
                "freed: the others act or are pinned."
            )
        for entry in going:
            leave(entry, self._known(), self.ram)

    def _can_leave(self, entry: Entry) -> bool:
        return bool(entry.folder) or self.ram is None or entry.nbytes <= self.ram

    def _bring(self, entry: Entry) -> None:
        bring(entry, self.model)
        state = state_of(self.model)
        if state is not None:
            state.moves += 1  # compiled code must be told its new number
