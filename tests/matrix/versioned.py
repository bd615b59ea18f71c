"""A CSV of results, readable after any interruption, that knows the versions of the libraries it was made with."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any


def versions(libraries: Sequence[str]) -> str:
    """The versions of the libraries that decide the results."""
    return ", ".join(f"{library} {version(library)}" for library in libraries)


def lines(path: Path, libraries: Sequence[str], names: Sequence[str]) -> list[list[str]]:
    """The rows that were written whole.

    Raises:
        ValueError: the file was made with other versions.
    """
    if not path.exists():
        return []
    with path.open(newline="") as file:
        head, _, *rows = csv.reader(file)
    here = versions(libraries)
    if head != ["versions", here]:
        raise ValueError(f"{path} was made with {head[-1]}, and {here} is installed: remove it, or name another.")
    return [row for row in rows if len(row) == len(names)]


def start(path: Path, libraries: Sequence[str], names: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Starts the file anew with `rows`."""
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["versions", versions(libraries)], names, *rows])


def add(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    """Adds rows."""
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)
