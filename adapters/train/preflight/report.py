"""What a preflight found: one line a check, and what to do about it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from adapters._errors import AdapterError

Status = Literal["ok", "warning", "failed"]
_SHOWN = {"ok": "ok", "warning": "WARNING", "failed": "FAILED"}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: how it stands, what was found, and what to do where something is wrong."""

    status: Status
    what: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{_SHOWN[self.status]:<8} {self.what}"
        return f"{line}\n{'':<9}-> {self.remedy}" if self.remedy else line


@dataclass(frozen=True)
class Preflight:
    """All checks of one preflight, in the order in which they were made."""

    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed; warnings pass."""
        return not self.failures

    @property
    def failures(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "failed")

    @property
    def warnings(self) -> tuple[Check, ...]:
        return tuple(check for check in self.checks if check.status == "warning")

    def require(self) -> None:
        """Goes on only if nothing failed.

        Raises:
            AdapterError: with every failed line and its remedy.
        """
        if self.failures:
            raise AdapterError("\n".join([f"{self._verdict()}:", *map(str, self.failures)]))

    def _verdict(self) -> str:
        counts = [(self.failures, "failed"), (self.warnings, "warned")]
        found = ", ".join(f"{len(checks)} {word}" for checks, word in counts if checks)
        return f"preflight: {found or 'passed'} of {len(self.checks)} checks"

    def __str__(self) -> str:
        return "\n".join([self._verdict(), *(f"  {line}" for check in self.checks for line in str(check).split("\n"))])


def ok(what: str) -> Check:
    return Check("ok", what)


def warning(what: str, remedy: str) -> Check:
    return Check("warning", what, remedy)


def failed(what: str, remedy: str) -> Check:
    return Check("failed", what, remedy)


def some(names: Iterable[str], most: int = 3) -> str:
    """The first few of many names, and how many more there are."""
    every = list(names)
    left = len(every) - most
    return ", ".join(every[:most]) + (f" and {left} more" if left > 0 else "")


def count(number: int, one: str, many: str = "") -> str:
    """`1 row`, `2 rows`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def numbered(which: Sequence[int], of: int) -> str:
    """`batch 2 of 3`, `batches 1, 3 of 3`; `which` counts from 0."""
    return f"{'batch' if len(which) == 1 else 'batches'} {some(str(i + 1) for i in which)} of {of}"
