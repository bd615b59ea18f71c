"""Which of the known shapes the rows of a data set have."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from adapters._errors import AdapterError, nearest
from adapters.data.shapes import FIELDS, SHAPES, Row, Shape, is_filled


@dataclass(frozen=True)
class Recognised:
    """The shape of a data set, and the column that each of its fields is read from."""

    shape: Shape
    columns: Mapping[str, str]

    def fields(self, row: Row) -> Row:
        """The cells of a row by the names of the fields."""
        return {field: row[column] for field, column in self.columns.items() if column in row}


def recognise(rows: Iterable[Row], columns: Mapping[str, str] | None = None) -> Recognised:
    """The first shape whose columns are all there and, in some row, filled.

    Args:
        rows: at least one row.
        columns: field -> column, by hand; only shapes with all of these fields are then considered.

    Raises:
        AdapterError: no known shape fits, or `columns` names what is not there.
    """
    by_hand = dict(columns or {})
    known = [shape for shape in SHAPES if by_hand.keys() <= {*shape.needs, *shape.takes}]
    first: Row = {}
    second_best = None
    for number, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise AdapterError(f"row {number} is a {type(row).__name__}, expected a mapping of columns to values.")
        first = first or row
        named = _named(row, by_hand)
        best = next((shape for shape in known if shape.may_fit(named)), None)
        if best is not None and best.fits(named):
            return _recognised(best, by_hand)
        second_best = second_best or next((shape for shape in known if shape.fits(named)), best)
    if second_best is None:
        raise AdapterError(_unknown(first))
    return _recognised(second_best, by_hand)


def check_row(number: int, row: Row, found: Recognised) -> None:
    """Refuses a row of another shape than the data set's; cells that are only empty are no other shape.

    Raises:
        AdapterError: the row has another shape, or lacks a column.
    """
    shape = found.shape
    fields = found.fields(row)
    if shape.fits(fields):
        return
    empty = not any(is_filled(fields.get(name)) for name in shape.needs)
    other = next((shape for shape in SHAPES if shape.fits(row)), None)
    if other is not None and (empty or set(other.needs) == set(shape.needs)):
        raise AdapterError(
            f"row {number} has the shape {other.name} ({', '.join(other.needs)}), other rows have {shape.name} "
            f"({', '.join(shape.needs)}); prepare rows of different shapes apart."
        )
    missing = [found.columns[name] for name in shape.needs if name not in fields]
    if missing:
        raise AdapterError(
            f"row {number} has no {', '.join(missing)}, which the shape {shape.name} of the other rows needs; "
            f"its columns are {', '.join(map(str, row)) or 'none'}."
        )


def _recognised(shape: Shape, by_hand: Mapping[str, str]) -> Recognised:
    taken = set(by_hand.values())
    fields = [field for field in (*shape.needs, *shape.takes) if field in by_hand or field not in taken]
    return Recognised(shape, {field: by_hand.get(field, field) for field in fields})


def _named(row: Row, by_hand: Mapping[str, str]) -> Row:
    """`row` with its columns under the names given by hand."""
    for field, column in by_hand.items():
        if field not in FIELDS:
            raise AdapterError(f"columns has no field {field!r}{nearest(field, FIELDS)} Fields: {', '.join(FIELDS)}.")
        if column not in row:
            raise AdapterError(
                f"columns maps {field!r} to {column!r}, which is no column{nearest(column, map(str, row))} "
                f"Columns: {', '.join(map(str, row))}."
            )
    rest = {name: value for name, value in row.items() if name not in by_hand.values() and name not in by_hand}
    return {**rest, **{field: row[column] for field, column in by_hand.items()}}


def _unknown(row: Row) -> str:
    found = ", ".join(f"{name} ({type(value).__name__})" for name, value in row.items()) or "none"
    known = "; ".join(dict.fromkeys(f"{shape.name} ({', '.join(shape.needs)})" for shape in SHAPES))
    hint = "map them by hand, such as columns={'question': 'my_column', 'answer': 'other_column'}"
    if {"chosen", "rejected"} <= set(row):
        hint = "chosen and rejected are preferences, which need another kind of training"
    return f"no known shape fits the columns {found}; {hint}. Shapes: {known}."
