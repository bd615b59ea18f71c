"""The one form that every shape of row is read into."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adapters._errors import AdapterError

Turn = dict[str, Any]


class Skip(Exception):
    """This row cannot be learned from; the text is the reason under which it is counted."""


@dataclass(frozen=True)
class Example:
    """One row: a conversation, and the same as plain text where the shape has a usual one.

    Args:
        turns: each with `role` and `content`, and whatever else a template may use; none for plain text.
        tools: the functions that the conversation may call, as JSON schemas.
        plain: prompt and answer for a tokenizer without a chat template; the prompt of plain text is empty.
        start: answers among `turns[:start]` are context and never learned.
        remarks: what was assumed on reading this row.
    """

    turns: Sequence[Turn] = ()
    tools: Sequence[Any] | None = None
    plain: tuple[str, str] | None = None
    start: int = 0
    remarks: tuple[str, ...] = ()


def answers(turns: Sequence[Turn], start: int, learn: str) -> list[int]:
    """Which turns are learned: the assistant's from `start` on that answer a user, all of them or the last one.

    A turn of `weight: 0` is context.

    Raises:
        Skip: there is none, or one of them is empty.
    """
    asked = next((i for i, turn in enumerate(turns) if turn["role"] in ("user", "tool")), len(turns))
    found = [i for i, turn in enumerate(turns) if turn["role"] == "assistant" and i >= max(start, asked)]
    found = [i for i in found if not is_context(turns[i])]
    if not found:
        raise Skip("no answer of an assistant")
    learned = found if learn == "all" else found[-1:]
    if any(is_empty(turns[i]) for i in learned):
        raise Skip("empty answer")
    return learned


def is_context(turn: Turn) -> bool:
    """Whether a turn says of itself that it is not to be learned: `weight: 0`, as OpenAI's format has it."""
    return bool(turn.get("weight", 1) == 0)


def is_empty(turn: Turn) -> bool:
    """Whether a turn says nothing and calls nothing."""
    content = turn.get("content")
    return not turn.get("tool_calls") and not (content.strip() if isinstance(content, str) else content)


def as_text(value: Any, column: str) -> tuple[str, tuple[str, ...]]:
    """The text of a cell, and a remark where it held a number; a missing one is empty."""
    if value is None:
        return "", ()
    if isinstance(value, str):
        return value, ()
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value), (f"a number in {column!r} was taken as text",)
    raise AdapterError(f"column {column!r} holds {type(value).__name__}, expected text.")


def as_turns(value: Any, column: str) -> tuple[list[Turn], tuple[str, ...]]:
    """The turns of a cell in the role and content form, and remarks; Nones that Arrow filled in are left out."""
    if not isinstance(value, list | tuple):
        raise AdapterError(f"column {column!r} holds {type(value).__name__}, expected a list of turns.")
    read = [_as_turn(turn, f"{column}[{i}]") for i, turn in enumerate(value)]
    return [turn for turn, _ in read], tuple(remark for _, remarks in read for remark in remarks)


def _as_turn(value: Any, where: str) -> tuple[Turn, tuple[str, ...]]:
    if not isinstance(value, Mapping):
        raise AdapterError(f"{where} holds {type(value).__name__}, expected a turn with role and content.")
    turn = {key: without_nones(field) for key, field in value.items() if field is not None}
    role = turn.pop("from", None) if "role" not in turn else turn["role"]
    content = turn.pop("value", None) if "content" not in turn else turn["content"]
    if not isinstance(role, str):
        raise AdapterError(
            f"{where} says no role: its keys are {', '.join(map(str, value))}; expected role and content."
        )
    remarks: tuple[str, ...] = ()
    if isinstance(content, list):
        content = _joined(content, where)
    else:
        content, remarks = as_text(content, where.partition("[")[0])
    calls = turn.pop("tool_calls", None)
    more = {key: field for key, field in turn.items() if key not in ("role", "content")}
    called = {"tool_calls": [_call(call) for call in calls]} if calls else {}
    return {"role": role, "content": content, **more, **called}, remarks


def _joined(parts: list[Any], where: str) -> str:
    texts = [part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None for part in parts]
    if not all(isinstance(text, str) for text in texts):
        raise AdapterError(f"{where} holds more than text, such as an image; only text can be prepared here.")
    return "".join(map(str, texts))


def _call(call: Any) -> Any:
    """A call with its arguments as a mapping: templates write them as JSON, and JSON text would be quoted twice."""
    if not isinstance(call, Mapping):
        raise AdapterError(f"tool_calls holds {type(call).__name__}, expected a function with name and arguments.")
    function = call.get("function", call)
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        try:
            function = {**function, "arguments": json.loads(arguments)}
        except ValueError:
            return dict(call)
    return {**call, "function": function} if "function" in call else function


def as_tools(value: Any) -> list[Any] | None:
    """The tools of a cell, which may be JSON text."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise AdapterError(f"column 'tools' holds text that is not JSON: {error}.") from error
    if not value:
        return None
    if not isinstance(value, list | tuple):
        raise AdapterError(f"column 'tools' holds {type(value).__name__}, expected a list of functions.")
    return [without_nones(tool) for tool in value]


def without_nones(value: Any) -> Any:
    """`value` without the Nones that Arrow writes where another row has a key."""
    if isinstance(value, Mapping):
        return {key: without_nones(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list | tuple):
        return [without_nones(inner) for inner in value]
    return value
