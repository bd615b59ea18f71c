"""Every refusal of this library: one sentence that says what was found, what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class AdapterError(ValueError):
    """An operation was refused; the model and the files are as they were."""


class WrongBase(AdapterError):
    """The adapter was trained on another base model than the one it is being loaded on."""


class DamagedAdapter(AdapterError):
    """An adapter folder is incomplete, was altered after it was written, or holds values that are not finite."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`did you mean 'x'?` with a leading space and a semicolon before it, or nothing when no known word is close."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
