"""The user's own rows, from a file or the Hub, in two parts: to train on, and held out."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adapters._errors import AdapterError
from adapters.data.sources import read_rows
from adapters.train.recipe import FILES, Data

SEED = 0  # of the split; not the training's, so that runs with other seeds are compared on the same rows


@dataclass(frozen=True)
class OwnRows:
    """Rows as they were read, and in words how they were parted."""

    training: Any
    held_out: Any
    parted: str


def read_own(data: Data, most: int) -> OwnRows:
    """Reads and parts the rows of a recipe.

    Args:
        most: held-out rows.

    Raises:
        AdapterError: they cannot be read, or are too few to part.
    """
    rows = _read(data.path, data.split)
    if isinstance(data.evaluation, str):
        file = Path(data.evaluation).suffix in FILES
        others = _read(data.evaluation, None) if file else _read(data.path, data.evaluation)
        taken = min(most, len(others))
        where = data.evaluation if file else f"the split {data.evaluation} of {data.path}"
        return OwnRows(rows, _some(others, range(taken)), f"the first {taken:,} of {len(others):,} rows of {where}")
    if len(rows) < 2:
        raise AdapterError(
            f"{data.path} has {len(rows)} row, of which none can be held out: give more, or data.evaluation as a file."
        )
    taken = min(most, max(1, round(len(rows) * data.evaluation)), len(rows) - 1)
    order = list(range(len(rows)))
    random.Random(SEED).shuffle(order)
    training, held_out = sorted(order[taken:]), sorted(order[:taken])
    parted = f"{taken:,} of {len(rows):,} rows of {data.path}, drawn with a fixed seed"
    return OwnRows(_some(rows, training), _some(rows, held_out), parted)


def _some(rows: Any, which: Any) -> Any:
    return rows.select(which) if hasattr(rows, "select") else [rows[i] for i in which]


def _read(path: str, split: str | None) -> Any:
    if Path(path).suffix in FILES:
        return read_rows(Path(path))
    import datasets

    try:
        return read_rows(datasets.load_dataset(path, split=split or "train"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        said = " ".join(str(error).split())[:300].rstrip(".")
        raise AdapterError(
            f"data.path is {path!r}, which is no file ending in {', '.join(FILES)}, and as a data set of the Hub it "
            f"cannot be read: {said}."
        ) from error
