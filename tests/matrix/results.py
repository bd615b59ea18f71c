"""The results file: one row a law, readable after any interruption, and the versions that it was made with."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from tests.matrix import versioned
from tests.matrix.pairs import Pair

LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")
DONE = "done"  # the last row of a pair: whoever resumes need not run it again


@dataclass(frozen=True)
class Row:
    """What one law said of one method on one pair; `law` is empty where no law was asked."""

    type: str
    head: str
    cls: str
    method: str  # or "build", or "done"
    law: str
    result: str  # "pass", "no object", "refused", "not run" or "fail"
    reason: str
    seconds: float

    @property
    def pair(self) -> Pair:
        return Pair(self.head, self.type, self.cls)


NAMES = [field.name for field in fields(Row)]


def versions() -> str:
    """The versions of the libraries that decide the results."""
    return versioned.versions(LIBRARIES)


def read(path: Path) -> list[Row]:
    """The rows of the pairs that were finished; those of one that was interrupted are left out.

    Raises:
        ValueError: the file was made with other versions.
    """
    found = [Row(*row[:-1], float(row[-1])) for row in versioned.lines(path, LIBRARIES, NAMES)]
    done = {row.pair for row in found if row.method == DONE}
    return [row for row in found if row.pair in done]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Starts the file anew with `rows`."""
    versioned.start(path, LIBRARIES, NAMES, map(astuple, rows))


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds the rows of one pair; a reader ignores them until its last is there."""
    versioned.add(path, map(astuple, rows))
