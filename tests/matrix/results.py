"""The results file: one row a law, readable after any interruption, and the versions that it was made with."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path

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


def versions() -> str:
    """The versions of the libraries that decide the results."""
    return ", ".join(f"{library} {version(library)}" for library in LIBRARIES)


def read(path: Path) -> list[Row]:
    """The rows of the pairs that were finished; those of one that was interrupted are left out.

    Raises:
        ValueError: the file was made with other versions.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        head, _, *rows = csv.reader(file)
    if head != ["versions", versions()]:
        raise ValueError(f"{path} was made with {head[-1]}, and {versions()} is installed: remove it, or name another.")
    found = [Row(*row[:-1], float(row[-1])) for row in rows if len(row) == len(fields(Row))]
    done = {row.pair for row in found if row.method == DONE}
    return [row for row in found if row.pair in done]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Starts the file anew with `rows`."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["versions", versions()])
        out.writerow([field.name for field in fields(Row)])
        out.writerows(astuple(row) for row in rows)


def append(path: Path, rows: Iterable[Row]) -> None:
    """Adds the rows of one pair; a reader ignores them until its last is there."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(astuple(row) for row in rows)
