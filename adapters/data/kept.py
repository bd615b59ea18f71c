"""The rows that are kept, as flat arrays, and what became of the others."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from adapters.data.labels import Labelled
from adapters.data.tokens import IGNORED


class Kept:
    """Collects rows one by one.

    Args:
        max_tokens: the longest row, or None.
        too_long: "drop" or "cut".
    """

    def __init__(self, max_tokens: int | None, too_long: str) -> None:
        self.max_tokens, self.too_long = max_tokens, too_long
        self.ids, self.labels = array("i"), array("i")
        self.lengths: list[int] = []
        self.learned: list[int] = []
        self.dropped: Counter[str] = Counter()
        self.remarks: Counter[str] = Counter()
        self.columns: dict[str, None] = {}
        self.cut = self.ended = self.apart = self.ends = 0

    def add(self, row: Labelled, remarks: Sequence[str]) -> None:
        """Keeps a row or cuts it, or counts why not."""
        limit = len(row.input_ids) if self.max_tokens is None else self.max_tokens
        long = len(row.input_ids) > limit
        if long and self.too_long == "drop":
            self.dropped[f"longer than {limit:,} tokens"] += 1
            return
        row = row.cut(limit)
        learned = sum(label != IGNORED for label in row.labels)
        if not learned:
            self.dropped[f"no answer within the first {limit:,} tokens"] += 1
            return
        self.ids.extend(row.input_ids)
        self.labels.extend(row.labels)
        self.lengths.append(len(row.input_ids))
        self.learned.append(learned)
        self.remarks.update(remarks)
        self.cut += long
        self.ended += bool(row.ends)
        self.ends += len(row.ends)
        self.apart += not row.together

    def dataset(self) -> Any:
        """The rows as a `datasets.Dataset`."""
        import datasets
        import pyarrow  # type: ignore[import-untyped]  # it ships no annotations

        starts = pyarrow.array([0, *accumulate(self.lengths)], type=pyarrow.int64())
        columns = {
            name: pyarrow.LargeListArray.from_arrays(starts, pyarrow.array(values, type=pyarrow.int32()))
            for name, values in (("input_ids", self.ids), ("labels", self.labels))
        }
        return datasets.Dataset(pyarrow.table(columns))
