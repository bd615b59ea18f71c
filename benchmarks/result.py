"""What was measured, and the table made of it."""

from __future__ import annotations

import platform
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from statistics import median
from typing import Any

from adapters.train.machine import processor

LIMIT = 1.05  # times PEFT's, for rows that do the same work
COLUMNS = ("row", "unit", "ours", "peer", "beside", "ours / peer", "min", "max", "verdict")
PACKAGES = ("adapter-registry", "torch", "transformers", "peft", "bitsandbytes")


@dataclass(frozen=True)
class Line:
    """One line of the table: a value a pair for each side, in `unit`."""

    row: str
    unit: str
    ours: tuple[float, ...]
    theirs: tuple[float, ...]
    beside: str
    gated: bool
    limit: float = LIMIT

    @property
    def ratios(self) -> tuple[float, ...]:
        """Ours divided by the peer's, pair by pair; for imports the smallest of each, which disturbances only raise."""
        if self.unit == "import ms" and self.theirs:
            return (min(self.ours) / min(self.theirs),)
        return tuple(a / b for a, b in zip(self.ours, self.theirs, strict=bool(self.theirs)))

    @property
    def ratio(self) -> float | None:
        return median(self.ratios) if self.ratios else None

    @property
    def verdict(self) -> str:
        """ "ok" or "over" where ours must not take more than `limit` times the peer's; otherwise why there is none."""
        if self.ratio is None:
            return "no peer"
        if not self.gated:
            return {"PEFT": "more work", "AdapterHub": "other release"}.get(self.beside, "no peer")
        asked = "" if self.limit == LIMIT else f" ({self.limit:g})"
        return f"ok{asked}" if self.ratio <= self.limit else f"over{asked}"

    def shown(self, values: tuple[float, ...]) -> float | None:
        if not values:
            return None
        return min(values) if self.unit == "import ms" else median(values)

    def cells(self) -> tuple[str, ...]:
        low, high = (min(self.ratios), max(self.ratios)) if self.ratios else (None, None)
        numbers = [_number(x) for x in (self.shown(self.ours), self.shown(self.theirs))]
        ratios = [_ratio(x) for x in (self.ratio, low, high)]
        return (self.row, self.unit, *numbers, self.beside, *ratios, self.verdict)

    def record(self) -> dict[str, Any]:
        low, high = (min(self.ratios), max(self.ratios)) if self.ratios else (None, None)
        return {
            "row": self.row,
            "unit": self.unit,
            "ours": self.shown(self.ours),
            "peer": self.shown(self.theirs),
            "beside": self.beside,
            "ratio": self.ratio,
            "min": low,
            "max": high,
            "pairs": len(self.ours),
            "verdict": self.verdict,
        }


def facts(seconds: float, pairs: int) -> dict[str, Any]:
    """Where and with what the table was made; nothing that names a machine."""
    return {
        "date": datetime.now(UTC).date().isoformat(),
        "cpu": processor(),
        "python": platform.python_version(),
        **{name: found for name in PACKAGES if (found := _version(name))},
        "pairs": pairs,
        "seconds": round(seconds),
    }


def markdown(lines: Iterable[Line], about: dict[str, Any], preface: str) -> str:
    """The whole of RESULTS.md."""
    rows = [COLUMNS, tuple("---:" if i in (2, 3, 5, 6, 7) else "---" for i in range(len(COLUMNS)))]
    rows += [line.cells() for line in lines]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    made = ", ".join(f"{key} {value}" for key, value in about.items())
    return f"# Benchmarks\n\n{preface.strip()}\n\nMade by `python -m benchmarks`: {made}.\n\n{table}\n"


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _number(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value >= 0.01 else f"{value:.1g}"
