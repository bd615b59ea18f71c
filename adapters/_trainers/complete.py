"""Which checkpoints are whole. A checkpoint's last file says that all others are there, and how long they are."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path

from adapters._errors import AdapterError
from adapters._whole import write_whole

SEAL = "checkpoint.json"
STATE = "trainer_state.json"
# what a resumed run would silently start afresh without: any name of a group will do
NEEDED = {
    "the optimizer's state": r"optimizer(\.pt|\.bin|_\d+)",
    "the schedule's state": r"scheduler\.pt",
    "the random numbers' state": r"rng_state(_\d+)?\.pth",
    "the trainer's state": r"trainer_state\.json",
}


_SEALED = (".safetensors", ".pt", ".pth", ".bin", ".distcp")


def seal(folder: str | os.PathLike[str]) -> None:
    """Says of a checkpoint that it is whole, once every file in it is on the disk.

    Cards and what is JSON may be edited by callbacks later; what a resumed run reads as tensors and states may not.
    """
    sizes = {name: size for name, size in _sizes(Path(folder)) if Path(name).suffix in _SEALED}
    for name, _ in _sizes(Path(folder)):
        with open(os.path.join(folder, name), "rb") as file:
            os.fsync(file.fileno())
    text = json.dumps({"files": sizes}, indent=1, sort_keys=True) + "\n"
    write_whole(os.path.join(folder, SEAL), text.encode())


def unseal(folder: str | os.PathLike[str]) -> None:
    """Says of a checkpoint that is about to be written again that it is not whole."""
    Path(folder, SEAL).unlink(missing_ok=True)


def missing(folder: str | os.PathLike[str]) -> str | None:
    """What a checkpoint lacks, in a few words; None if it is whole.

    One without a seal, as other programs write them, is whole if it has every file that a resumed run needs.
    """
    here = {name.split("/")[0] for name in dict(_sizes(Path(folder)))}
    for what, pattern in NEEDED.items():
        if not any(re.fullmatch(pattern, name) for name in here):
            return what
    try:
        json.loads(Path(folder, STATE).read_text(encoding="utf-8"))
    except ValueError:
        return f"the end of {STATE}"
    if SEAL not in here:
        return None
    try:
        sealed = json.loads(Path(folder, SEAL).read_text(encoding="utf-8"))["files"]
    except (ValueError, KeyError, TypeError):
        return f"a readable {SEAL}"
    sizes = dict(_sizes(Path(folder)))
    return next((name for name, size in sealed.items() if sizes.get(name) != size), None)


def newest_checkpoint(folder: str | os.PathLike[str]) -> str | None:
    """The newest complete checkpoint of a run, or None where there is none yet.

    A checkpoint that was being written when its process died is passed over, as is one whose files have changed.

    Args:
        folder: the run's `output_dir`, with subfolders `checkpoint-STEP`.
    """
    found = {int(name.rpartition("-")[2]): path for name, path in _checkpoints(Path(folder))}
    for step in sorted(found, reverse=True):
        if (found[step] / SEAL).is_file() and missing(found[step]) is None:
            return str(found[step])
    return None


def require_whole(folder: str | os.PathLike[str]) -> None:
    """Refuses a checkpoint from which a run would go on differently than it would have.

    Raises:
        AdapterError: something is missing; the sentence says what.
    """
    if not os.path.isdir(folder):
        raise AdapterError(f"there is no checkpoint {folder}.")
    lacks = missing(folder)
    if lacks is not None:
        raise AdapterError(
            f"{folder} lacks {lacks}: training would go on, but not as it would have. Resume from another checkpoint "
            "(adapters.train.newest_checkpoint finds the newest complete one), or load the adapter and train afresh."
        )


def _checkpoints(folder: Path) -> Iterator[tuple[str, Path]]:
    for path in folder.iterdir() if folder.is_dir() else ():
        if re.fullmatch(r"checkpoint-\d+", path.name) and path.is_dir():
            yield path.name, path


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield path.relative_to(folder).as_posix(), path.stat().st_size
