"""Rows from what the caller has: a data set, a list, any iterable, or a file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from adapters._errors import AdapterError

_BUILDERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def read_rows(rows: Any) -> Any:
    """Rows with a length that can be iterated more than once.

    Raises:
        AdapterError: there is none, the file cannot be read, or `rows` is a whole collection of data sets.
    """
    if isinstance(rows, str | Path):
        rows = _read_file(Path(rows))
    if isinstance(rows, Mapping):
        raise AdapterError(f"rows is a mapping of {', '.join(map(str, rows))}; pass one of them, a list or a Dataset.")
    if not isinstance(rows, Iterable):
        raise AdapterError(f"rows is a {type(rows).__name__}; expected a Dataset, a list of mappings or a path.")
    if hasattr(rows, "with_format") and hasattr(rows, "column_names"):
        rows = rows.with_format(None)  # Python values, whatever the data set was formatted for
    if not hasattr(rows, "__len__") or not hasattr(rows, "__getitem__"):
        rows = list(rows)
    if not len(rows):
        raise AdapterError("there are no rows; expected at least one to train on.")
    return rows


def _read_file(path: Path) -> Any:
    if path.suffix not in _BUILDERS:
        raise AdapterError(f"{path} is no file of rows; expected one ending in {', '.join(_BUILDERS)}.")
    if not path.is_file():
        raise AdapterError(f"there is no file {path}.")
    if not path.stat().st_size:
        raise AdapterError(f"{path} is empty; expected at least one row to train on.")
    import datasets

    try:
        with _without_bars(datasets):
            return datasets.load_dataset(_BUILDERS[path.suffix], data_files=str(path), split="train")
    except (datasets.exceptions.DatasetsError, ValueError, TypeError, KeyError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        if "corresponds to no data" in reason:
            raise AdapterError(f"{path} holds no rows; expected at least one to train on.") from error
        raise AdapterError(f"{path} cannot be read: {reason[:300]}.") from error


@contextmanager
def _without_bars(datasets: Any) -> Iterator[None]:
    shown = not datasets.utils.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
