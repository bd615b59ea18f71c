"""The one text that a record has: a line a field, keys sorted, ASCII; read line by line, so that lines which siblings
share byte for byte are parsed once.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from typing import Any

from adapters._errors import DamagedAdapter
from adapters._store.bundle import RECORD
from adapters._store.frozen import thaw

ALTERED = f"{RECORD} was altered after it was written: its text is not the canonical one."
FIRST, LAST = b"{\n", b"\n}\n"
ENDS = (b",", b"")  # of a line, and of the last one
TENSOR_DIGEST = re.compile(rb'"sha256": "[0-9a-f]{64}"')  # quotes in a string are escaped: this is always a member
NO_DIGEST = b'"sha256": ""'


def text(record: Mapping[str, Any]) -> bytes:
    """One line a field: json's fast encoder knows no indentation, and the slow one takes half of a load's time."""
    lines = [_key(key) + _text(record[key]) for key in sorted(record)]
    return FIRST + b",\n".join(lines) + LAST


def split(raw: bytes) -> dict[str, bytes] | None:
    """The text of each field's value, or None where `raw` has not the form of `text`."""
    if not (raw.startswith(FIRST) and raw.endswith(LAST)):
        return None
    keys, found = [], {}
    start, end = len(FIRST), len(raw) - len(LAST)
    while start <= end:  # by position: a record of a megabyte is not copied more than once
        stop = raw.find(b"\n", start, end)
        stop, comma = (stop, stop - 1) if stop >= 0 else (end, end)
        colon = raw.find(b": ", start, comma)
        key = raw[start : max(colon, start)]
        if not (key.isascii() and key[:1] == key[-1:] == b'"' and key[1:-1].isalpha() and raw[comma:stop] in ENDS):
            return None
        keys.append(key[1:-1].decode())
        found[keys[-1]] = raw[colon + 2 : comma]
        start = stop + 1
    return found if keys and len(found) == len(keys) and keys == sorted(keys) else None


def value_of(line: bytes) -> Any:
    """The value whose text a line is.

    Raises:
        DamagedAdapter: it is not JSON, or not the text that this module writes of it.
    """
    try:
        value = json.loads(line.decode("ascii"))
        if _text(value) == line:
            return value
    except (ValueError, RecursionError) as error:  # a number too large for a float was read as infinity
        raise DamagedAdapter(ALTERED) from error
    raise DamagedAdapter(ALTERED)


def without_digests(line: bytes) -> bytes:
    """The text of the tensors without what differs between adapters that are alike."""
    return TENSOR_DIGEST.sub(NO_DIGEST, line)


def digest(raw: bytes, written: bytes) -> str:
    """The SHA-256 of a record's text with the text of its own digest, `written`, replaced by that of an empty one."""
    before, _, after = raw.partition(b"\n" + _key("digest") + written)
    found = hashlib.sha256(before)
    found.update(b"\n" + _key("digest") + _text(""))
    found.update(after)
    return found.hexdigest()


def sealed(raw: bytes, found: str) -> bytes:
    """A record's text with the digest `found` in the place of the empty one."""
    line = b"\n" + _key("digest")
    before, empty, after = raw.partition(line + _text(""))
    assert empty, "a record has a digest, empty until it is sealed"
    return before + line + _text(found) + after


def _key(key: str) -> bytes:
    return f"{json.dumps(key)}: ".encode("ascii")


def _text(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, allow_nan=False, default=thaw).encode("ascii")
