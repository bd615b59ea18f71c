"""The results file: one row a case, readable after any interruption, and the versions that it was made with."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.trainers.cases import Case

LIBRARIES = ("torch", "transformers", "trl", "peft", "accelerate", "sentence-transformers", "bitsandbytes")
CHECKS = ("learns", "moved", "checkpoint", "one_base", "like_peft", "recomputed", "apart")
DONE = "done"  # a row's last word: without it, it was being written when its process died


@dataclass(frozen=True)
class Row:
    """What was found of one case: of each check a number or "pass", "fail", or "-" where it is not asked."""

    loop: str
    method: str
    checkpointing: str
    rows: str
    base: str
    join: str
    learns: str
    moved: str
    checkpoint: str
    one_base: str
    like_peft: str
    recomputed: str
    apart: str
    result: str  # "pass", "refused" or "fail"
    reason: str
    seconds: float
    done: str = DONE

    @classmethod
    def of(cls, case: Case, found: Mapping[str, Any], result: str, reason: str, seconds: float) -> Row:
        return cls(*astuple(case), *(str(found[name]) for name in CHECKS), result, reason, round(seconds, 2))

    @property
    def case(self) -> Case:
        return Case(self.loop, self.method, self.checkpointing, self.rows, self.base, self.join)


def versions() -> str:
    """The versions of the libraries that decide the results."""
    return ", ".join(f"{library} {version(library)}" for library in LIBRARIES)


def read(path: Path) -> list[Row]:
    """The rows of the cases that were finished.

    Raises:
        ValueError: the file was made with other versions.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        head, _, *rows = csv.reader(file)
    if head != ["versions", versions()]:
        raise ValueError(f"{path} was made with {head[-1]}, and {versions()} is installed: remove it, or name another.")
    whole = [row for row in rows if len(row) == len(fields(Row)) and row[-1] == DONE]
    return [Row(*row[:-2], float(row[-2])) for row in whole]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Starts the file anew with `rows`."""
    with path.open("w", newline="") as file:
        out = csv.writer(file)
        out.writerow(["versions", versions()])
        out.writerow([field.name for field in fields(Row)])
        out.writerows(astuple(row) for row in rows)


def append(path: Path, row: Row) -> None:
    """Adds one row."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerow(astuple(row))
