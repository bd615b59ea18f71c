"""The results file: one row a case, readable after any interruption, and the versions that it was made with."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

from tests.matrix import versioned
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


NAMES = [field.name for field in fields(Row)]


def versions() -> str:
    """The versions of the libraries that decide the results."""
    return versioned.versions(LIBRARIES)


def read(path: Path) -> list[Row]:
    """The rows of the cases that were finished.

    Raises:
        ValueError: the file was made with other versions.
    """
    return [Row(*row[:-2], float(row[-2])) for row in versioned.lines(path, LIBRARIES, NAMES) if row[-1] == DONE]


def write(path: Path, rows: Iterable[Row]) -> None:
    """Starts the file anew with `rows`."""
    versioned.start(path, LIBRARIES, NAMES, map(astuple, rows))


def append(path: Path, row: Row) -> None:
    """Adds one row."""
    versioned.add(path, [astuple(row)])
