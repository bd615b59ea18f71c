"""The checkpoints of a run that has not ended yet, beside its adapter, and what they were made with."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from adapters._errors import AdapterError
from adapters._trainers import newest_checkpoint
from adapters._whole import write_whole
from adapters.train import processes
from adapters.train.recipe import Recipe

FOLDER, RECORD = "checkpoints", "recipe.json"
# change what is written on the way, and not what is learned
_FREE = ("training.save_steps", "training.keep_checkpoints", "training.report_to")


def values_of(recipe: Recipe) -> dict[str, Any]:
    """Whatever in a recipe decides what is learned, by dotted key."""
    method = {"name": recipe.method.name, **asdict(recipe.method)}
    held_out = {"rows": recipe.evaluation.rows}  # rows that are held out are not trained on
    nested = {**asdict(recipe), "method": method, "evaluation": held_out, "output": None}
    flat: dict[str, Any] = json.loads(json.dumps(_flat(nested), default=str))
    return {key: value for key, value in flat.items() if key not in _FREE}


def digest(rows: Any) -> str:
    """Of the rows of a `datasets.Dataset`, in their order."""
    found = hashlib.sha256()
    for batch in rows.with_format(None).iter(batch_size=1000):
        found.update(json.dumps(batch, sort_keys=True).encode())
    return found.hexdigest()


def begin(folder: Path, recipe: Recipe, resume: bool, restart: bool) -> tuple[str | None, str]:
    """The checkpoint to go on from, and a line that says where training starts if that has to be said.

    Raises:
        AdapterError: there are checkpoints and nobody said what to do with them, or they are of another recipe.
    """
    if resume and restart:
        raise AdapterError("--resume goes on with the checkpoints and --restart removes them: give one of the two.")
    newest = processes.agreed(newest_checkpoint(folder))
    if newest is None:
        return None, f"no complete checkpoint in {folder}: training starts from the beginning" if resume else ""
    if restart:
        return None, f"starting over: the checkpoints in {folder} are removed"
    if not resume:
        raise AdapterError(
            f"{folder} holds checkpoints of a run up to step {step_of(newest)}: go on with --resume, start over with "
            "--restart, or choose another --output."
        )
    require_same(folder, values_of(recipe))
    return newest, f"resuming from step {step_of(newest)}: {newest}"


def require_same(folder: Path, values: Mapping[str, Any]) -> None:
    """Refuses to go on where `values` are not those that the checkpoints were made with.

    Raises:
        AdapterError: the sentence names the first that differs.
    """
    try:
        recorded = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"{folder} does not say what its checkpoints were made with ({RECORD} cannot be read): start over with "
            "--restart, or choose another --output."
        ) from error
    for key, value in values.items():
        if recorded.get(key) != value:
            raise AdapterError(
                f"the checkpoints in {folder} were made with {key} {_shown(recorded.get(key))}, and now it is "
                f"{_shown(value)}: set it back to resume, start over with --restart, or choose another --output."
            )


def record(folder: Path, values: Mapping[str, Any]) -> None:
    """Empties the folder and says what the checkpoints that will be made there are made with."""
    if processes.is_first():
        remove(folder)
        folder.mkdir(parents=True)
        write_whole(folder / RECORD, (json.dumps(values, indent=1, sort_keys=True) + "\n").encode())
    processes.wait()


def remove(folder: Path) -> None:
    if folder.is_dir():
        shutil.rmtree(folder)


def step_of(checkpoint: str) -> int:
    return int(checkpoint.rpartition("-")[2])


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        nested = isinstance(value, dict) and value
        found.update(_flat(value, f"{prefix}{key}.") if nested else {f"{prefix}{key}": value})
    return found


def _shown(value: Any) -> str:
    if isinstance(value, str) and len(value) == 64:  # a digest says nothing to a reader
        return value[:12]
    return "not set" if value is None else repr(value)
