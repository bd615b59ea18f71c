"""From rows of any usual shape to token ids and labels, with a report of everything that happened on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from adapters._errors import AdapterError, nearest
from adapters.data.example import Example, Skip
from adapters.data.kept import Kept
from adapters.data.labels import Labelled, speller
from adapters.data.recognition import Recognised, check_row, recognise
from adapters.data.report import DataReport
from adapters.data.roles import map_roles
from adapters.data.shapes import FINISHED, TEXT, Row
from adapters.data.sources import read_rows
from adapters.data.summary import summarise
from adapters.data.template import probe
from adapters.data.writing import Writing, ending, finished

_SHOWN = 1000  # rows from which on progress is shown
_Write = Callable[[Row, int], tuple[Labelled, list[str]]]


@dataclass(frozen=True)
class Prepared:
    """Rows to train on, a `datasets.Dataset` with just `input_ids` and `labels`, and the report about them."""

    dataset: Any
    report: DataReport


def prepare(
    rows: Any,
    tokenizer: Any,
    *,
    learn: str = "all",
    max_tokens: int | None = None,
    too_long: str = "drop",
    system: str | None = None,
    columns: Mapping[str, str] | None = None,
    roles: Mapping[str, str] | None = None,
    tools: Sequence[Any] | None = None,
    mask_prompt: bool = True,
    use_template: bool = True,
    template_options: Mapping[str, Any] | None = None,
) -> Prepared:
    """Token ids and labels for rows of any usual shape: answers are learned with their end of turn, prompts are not.

    Args:
        rows: a `datasets.Dataset`, a list or other iterable of mappings, or a path to .jsonl, .json, .csv or .parquet.
        tokenizer: a transformers tokenizer, with the chat template that the model will be served with.
        learn: "all" answers of the assistant, or only the "last" of each row.
        max_tokens: the longest row, in tokens.
        too_long: "drop" longer rows, or "cut" them; a row whose answers are all cut away is dropped.
        system: a system turn for conversations that have none.
        columns: field of a shape -> column, by hand, such as `{"instruction": "my_column"}`.
        roles: role name in the rows -> system, user, assistant or tool.
        tools: functions, or their JSON schemas, for conversations that bring none.
        mask_prompt: False learns prompts as well.
        use_template: False writes requests and answers as plain text although there is a chat template.
        template_options: passed to the chat template, such as `{"enable_thinking": False}`.

    Raises:
        AdapterError: the rows or the template cannot be used as they are, or nothing is left to learn.
    """
    _check_options(learn, max_tokens, too_long)
    rows = read_rows(rows)
    found = recognise(rows, columns)
    kept = Kept(max_tokens, too_long)
    if found.shape in (FINISHED, TEXT):
        _refuse_options(found, system=system, roles=roles, tools=tools)
    if found.shape is FINISHED:
        writing, write = None, partial(finished, tokenizer=tokenizer)
    else:
        names = map_roles(_roles(rows, found), roles)
        chat = use_template and found.shape is not TEXT and bool(getattr(tokenizer, "chat_template", None))
        template = probe(tokenizer, template_options) if chat else None
        end = ending(tokenizer, template)
        writing = Writing(speller(tokenizer), template, end, learn, mask_prompt, system, tools, names)
        write = partial(_write, found=found, writing=writing)
    for number, row in enumerate(_shown(rows)):
        check_row(number, row, found)
        kept.columns.update(dict.fromkeys(map(str, row)))
        try:
            kept.add(*write(found.fields(row), number))
        except Skip as reason:
            kept.dropped[str(reason)] += 1
    return Prepared(kept.dataset(), summarise(kept, found, writing, len(rows)))


def _write(row: Row, number: int, found: Recognised, writing: Writing) -> tuple[Labelled, list[str]]:
    return writing.write(_read(row, number, found), number)


def _read(row: Row, number: int, found: Recognised) -> Example:
    try:
        return found.shape.read(row)
    except AdapterError as error:
        raise AdapterError(f"row {number}: {error}") from error


def _roles(rows: Any, found: Recognised) -> Iterator[list[str]]:
    """The role names of each conversation, as the rows write them."""
    for number, row in enumerate(rows):
        check_row(number, row, found)
        try:
            yield [turn["role"] for turn in _read(found.fields(row), number, found).turns]
        except Skip:
            continue


def _shown(rows: Any) -> Iterator[Row]:
    from rich.console import Console
    from rich.progress import track

    console = Console(stderr=True)
    return iter(track(rows, "preparing rows", len(rows), console=console, transient=True, disable=len(rows) < _SHOWN))


def _check_options(learn: str, max_tokens: int | None, too_long: str) -> None:
    for name, value, known in (("learn", learn, ("all", "last")), ("too_long", too_long, ("drop", "cut"))):
        if value not in known:
            raise AdapterError(f"{name} is {value!r}{nearest(str(value), known)} It is one of {', '.join(known)}.")
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 2):
        raise AdapterError(f"max_tokens is {max_tokens!r}; it must be a whole number of at least 2.")


def _refuse_options(found: Recognised, **options: Any) -> None:
    given = [name for name, value in options.items() if value]
    if given:
        raise AdapterError(f"{given[0]} is for conversations, and these rows have the shape {found.shape.name}.")
