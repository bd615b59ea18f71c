"""Writes a GGUF file whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adapters._errors import AdapterError
from adapters._gguf.reading import GgufFile, require_package
from adapters._whole import settle


def write_gguf(
    path: str | os.PathLike[str],
    architecture: str,
    fill: Callable[[Any], None],
    check: Callable[[GgufFile], None],
) -> int:
    """`fill` adds fields and tensors to a GGUFWriter, `check` looks at the file that came of it; bytes are returned.

    The file appears under its name when it is on the disk and was read back.

    Raises:
        AdapterError: `path` exists already, or cannot be written.
    """
    require_package()
    from gguf import GGUFWriter

    target = Path(path)
    if target.exists():
        raise AdapterError(f"{target} exists already: give a new name.")
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{target.name}-", dir=target.parent)
    os.close(handle)
    work = Path(name)
    try:
        writer = GGUFWriter(work, architecture)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        check(GgufFile(work))
        settle(work, target)
    finally:
        work.unlink(missing_ok=True)
    return target.stat().st_size
