"""The usual shapes of rows for instruction training, and how each is read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from adapters.data import plain
from adapters.data.example import Example, Skip, Turn, as_text, as_tools, as_turns

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Shape:
    """Columns that are needed and that may be there, a test of the first one's value, and how to read a row.

    `parts` tells for each column, needed ones first, what it becomes.
    """

    name: str
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    parts: tuple[str, ...]
    holds: Callable[[Any], bool]
    read: Callable[[Row], Example]

    def fits(self, row: Row) -> bool:
        """Whether every needed column is there and filled."""
        return self.may_fit(row) and all(is_filled(row[name]) for name in self.needs)

    def may_fit(self, row: Row) -> bool:
        """Whether every needed column is there, filled or not."""
        first = row.get(self.needs[0])
        return all(name in row for name in self.needs) and (not is_filled(first) or self.holds(first))


def is_filled(value: Any) -> bool:
    return value is not None and not (isinstance(value, list | tuple) and not value)


def _says(*keys: str) -> Callable[[Any], bool]:
    """A test for a list whose first turn has these keys."""
    return lambda value: (
        isinstance(value, list | tuple) and isinstance(value[0], Mapping) and all(key in value[0] for key in keys)
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str | int | float)


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple)


def _is_list_of_text(value: Any) -> bool:
    return isinstance(value, list | tuple) and isinstance(value[0], str)


def _conversation(column: str) -> Callable[[Row], Example]:
    def read(row: Row) -> Example:
        turns, remarks = as_turns(row.get(column) or [], column)
        system, _ = as_text(row.get("system"), "system")
        if system.strip() and not (turns and turns[0]["role"] == "system"):
            turns = [{"role": "system", "content": system}, *turns]
        return Example(turns, as_tools(row.get("tools")), remarks=remarks)

    return read


def _messages_completion(row: Row) -> Example:
    """Only the completion is learned, whoever speaks in the prompt."""
    prompt, remarks = as_turns(row.get("prompt") or [], "prompt")
    said = row.get("completion")
    if _is_list(said):
        completion, more = as_turns(said, "completion")
    else:
        text, more = as_text(said, "completion")
        completion = [{"role": "assistant", "content": text}]
    return Example([*prompt, *completion], as_tools(row.get("tools")), None, len(prompt), remarks + more)


def _pair(ask: str, reply: str, before: str, after: str, form: plain.Form) -> Callable[[Row], Example]:
    """One request and its answer; `before` and `after` are columns with material that surrounds the request."""

    def read(row: Row) -> Example:
        cells = {name: as_text(row.get(name), name) for name in (ask, reply, before, after, "system") if name}
        texts = {name: text for name, (text, _) in cells.items()}
        request, answer, system = texts[ask], texts[reply], texts["system"]
        if not request.strip():
            raise Skip(f"empty {ask}")
        if not answer.strip():
            raise Skip("empty answer")
        first, last = texts.get(before, ""), texts.get(after, "")
        user = "\n\n".join(part for part in (first, request, last) if part.strip())
        turns: list[Turn] = [{"role": "user", "content": user}, {"role": "assistant", "content": answer}]
        if system.strip():
            turns = [{"role": "system", "content": system}, *turns]
        remarks = tuple(remark for _, said in cells.values() for remark in said)
        written = plain.with_system(system, form(request, first or last, answer))
        return Example(turns, as_tools(row.get("tools")), written, remarks=remarks)

    return read


def _alternating(row: Row) -> Example:
    said = [as_text(value, "data") for value in row.get("data") or []]
    turns: list[Turn] = [{"role": ("user", "assistant")[i % 2], "content": text} for i, (text, _) in enumerate(said)]
    return Example(turns, remarks=tuple(remark for _, remarks in said for remark in remarks))


def _text(row: Row) -> Example:
    text, remarks = as_text(row.get("text"), "text")
    if not text.strip():
        raise Skip("empty text")
    return Example(plain=("", text), remarks=remarks)


def _pairs() -> Iterable[Shape]:
    takes, parts = ("system", "tools"), ("user", "assistant", "system", "tools")
    beside = ("user", "assistant", "user", "system", "tools")
    ends = [("prompt", "completion"), ("prompt", "response")]
    turns = ("turns", "learned turns", "tools")
    yield Shape("prompt/completion of turns", ends[0], ("tools",), turns, _is_list, _messages_completion)
    for pair in ends:
        yield Shape("prompt/completion", pair, takes, parts, _is_text, _pair(*pair, "", "", plain.continued))
    alpaca = _pair("instruction", "output", "", "input", plain.alpaca)
    yield Shape("alpaca", ("instruction", "output"), ("input", *takes), beside, _is_text, alpaca)
    dolly = _pair("instruction", "response", "", "context", plain.alpaca)
    yield Shape("instruction/response", ("instruction", "response"), ("context", *takes), beside, _is_text, dolly)
    for pair in (("question", "answer"), ("question", "response"), ("query", "response"), ("input", "output")):
        read = _pair(*pair, "context", "", plain.question)
        yield Shape("/".join(pair), pair, ("context", *takes), beside, _is_text, read)


def _conversations() -> Iterable[Shape]:
    parts = ("turns", "tools", "system")
    for column in ("messages", "conversations", "conversation"):
        for name, keys in (("messages", ("role",)), ("sharegpt", ("from", "value"))):
            yield Shape(name, (column,), ("tools", "system"), parts, _says(*keys), _conversation(column))


FINISHED = Shape("finished", ("input_ids", "labels"), (), ("tokens", "labels"), _is_list, lambda row: Example())
TEXT = Shape("text", ("text",), (), ("text",), _is_text, _text)
SHAPES = (
    FINISHED,
    *_conversations(),
    *_pairs(),
    Shape("ultrachat", ("data",), (), ("turns, user first",), _is_list_of_text, _alternating),
    TEXT,
)
FIELDS = tuple(dict.fromkeys(name for shape in SHAPES for name in (*shape.needs, *shape.takes)))
