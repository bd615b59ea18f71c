"""Writes what is written whole or not at all; an adapter's several files are `_store.commit`'s to write together."""

from __future__ import annotations

import os
from pathlib import Path

from adapters._errors import AdapterError


def require_new(folder: Path) -> None:
    """Refuses a folder that is there already, unless it is empty."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise AdapterError(f"{folder} exists already: give a new folder, or an empty one.")


def settle(written: Path, target: Path) -> None:
    """Gives a file its name once it is on the disk."""
    with written.open("rb+") as file:
        os.fsync(file.fileno())
    os.replace(written, target)


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
