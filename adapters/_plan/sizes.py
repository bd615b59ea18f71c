"""Amounts of memory as people write them."""

from __future__ import annotations

import re

from adapters._errors import AdapterError

_UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}


def bytes_in(memory: str | int | float) -> int:
    """Bytes of "24GB" (10^9 each), "22.5 GiB" (2^30 each), or of a number of bytes.

    Raises:
        AdapterError: it is no positive amount, or its unit is unknown.

    Example:
        >>> bytes_in("24GB"), bytes_in("1.5 MiB")
        (24000000000, 1572864)
    """
    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]+)?\s*", str(memory))
    unit = _UNITS.get((found[2] or "B").upper()) if found is not None else None
    size = round(float(found[1]) * unit) if found is not None and unit is not None else 0
    if size <= 0:
        raise AdapterError(
            f"memory is {memory!r}; write a number and a unit, such as 24GB (10^9 bytes each) or 22.5GiB (2^30 each)."
        )
    return size


def shown(size: int) -> str:
    """Bytes in the unit that fits, of 1000 steps: `16.37 GB`."""
    for name, unit in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if size >= unit:
            return f"{size / unit:,.2f} {name}"
    return f"{size} B"
