"""Writes a single file whole or not at all; an adapter's several files are `_store.commit`'s to write together."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: str | os.PathLike[str], content: bytes) -> None:
    """Replaces a file in one step: whoever reads it finds the old content or the new.

    Raises:
        OSError: the folder is missing or cannot be written to; nothing was changed.
    """
    target = Path(path)
    staged = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        with staged.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(staged, target)
    finally:
        staged.unlink(missing_ok=True)
