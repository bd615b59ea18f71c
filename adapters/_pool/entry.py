"""What a pool knows of one of its adapters."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

from torch import Tensor

from adapters._attach.bank import Layout, Row
from adapters._pool.status import Where


@dataclass(eq=False)
class Entry:
    """`folder` is where the adapter can be read again, "" if nowhere; `digest` is that of what was read there."""

    name: str
    row: weakref.ref[Row]
    folder: str
    digest: str
    pinned: bool = False
    where: Where = "memory"
    parked: list[Tensor] | None = None  # its blocks, in RAM
    held: int = 0  # how many `using` blocks it acts in
    used: int = 0  # when it acted last, by the pool's clock

    @property
    def layout(self) -> Layout:
        row = self.row()
        assert row is not None, "an attached adapter has its row"
        return row.layout

    @property
    def nbytes(self) -> int:
        return self.layout.nbytes
