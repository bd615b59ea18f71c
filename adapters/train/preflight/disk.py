"""Whether what a run will write fits on the disk."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from adapters.train.preflight.places import Place
from adapters.train.preflight.report import Check, count, failed, ok

MOMENTS = 2 * 4  # bytes a value: Adam's two, in fp32


def disk_check(places: Sequence[Place], output: str | os.PathLike[str], checkpoints: int) -> Check:
    """Compares the free bytes at `output` with the adapter's and those of so many checkpoints."""
    tensors = [tensor for place in places for tensor in place.tensors.values()]
    adapter = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    one = adapter + sum(MOMENTS * tensor.numel() for tensor in tensors)
    needed, there = adapter + checkpoints * one, _existing(Path(output))
    free = shutil.disk_usage(there).free
    parts = f"an adapter of {_size(adapter)}" + (
        f" and {count(checkpoints, 'checkpoint')} of {_size(one)}" if checkpoints else ""
    )
    if not os.access(there, os.W_OK):
        return failed(
            f"nothing can be written at {os.fspath(output)}: no permission for {there}", "choose another output"
        )
    if free < needed:
        what = f"{parts} need {_size(needed)}, and {_size(free)} are free at {os.fspath(output)}"
        return failed(what, "make room, keep fewer checkpoints, or choose another output")
    return ok(f"disk: {parts} need {_size(needed)}; {_size(free)} are free")


def _existing(path: Path) -> Path:
    """The nearest folder that is there already."""
    path = path.absolute()
    return next(each for each in (path, *path.parents) if each.is_dir())


def _size(number: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number /= 1000
    return f"{number:.3g} TB"
