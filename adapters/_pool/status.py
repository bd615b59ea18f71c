"""What a pool holds, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Where = Literal["memory", "ram", "disk"]


@dataclass(frozen=True)
class PoolEntry:
    """One adapter of a pool: `nbytes` of tensors, in memory beside the model, in RAM, or in their folder alone."""

    name: str
    nbytes: int
    where: Where
    pinned: bool


@dataclass(frozen=True)
class PoolStatus:
    """The adapters of a pool, the most recently used first, and the budgets in bytes (None: no limit)."""

    entries: tuple[PoolEntry, ...]
    memory: int | None
    ram: int | None

    def used(self, where: Where) -> int:
        """Bytes of the adapters there."""
        return sum(entry.nbytes for entry in self.entries if entry.where == where)

    def __str__(self) -> str:
        budgets = {"memory": self.memory, "ram": self.ram}
        lines = [
            f"{key}: {self.used(key):,} bytes" + ("" if budget is None else f" of {budget:,}")  # type: ignore[arg-type]
            for key, budget in budgets.items()
        ]
        width = max((len(entry.name) for entry in self.entries), default=0)
        lines += [
            f"  {entry.name:<{width}} {entry.nbytes:>14,} bytes  {entry.where}{', pinned' if entry.pinned else ''}"
            for entry in self.entries
        ]
        return "\n".join(lines)
