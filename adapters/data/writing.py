"""How one row becomes tokens and labels: finished, through the chat template, or as plain text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from adapters._errors import AdapterError
from adapters.data import plain
from adapters.data.example import Example, Skip, is_context
from adapters.data.labels import Labelled, Piece, Speller, label
from adapters.data.proof import split
from adapters.data.template import Template, end_of_text
from adapters.data.tokens import IGNORED


@dataclass(frozen=True)
class Writing:
    """How rows are written.

    Args:
        speller: the tokenizer.
        template: the chat template, or None for plain text.
        end: text and id of the token that ends an answer.
        learn: "all" answers or the "last".
        mask_prompt: whether only answers are learned.
        system: added to conversations that have no system turn.
        tools: for conversations that bring none.
        roles: role name in the rows -> role for the template.
    """

    speller: Speller
    template: Template | None
    end: tuple[str, int]
    learn: str
    mask_prompt: bool
    system: str | None
    tools: Sequence[Any] | None
    roles: Mapping[str, str]

    def write(self, example: Example, number: int) -> tuple[Labelled, list[str]]:
        """Tokens and labels of a row, and what was remarkable about it.

        Raises:
            Skip: the row cannot be learned from.
            AdapterError: the template does not do what it must.
        """
        example = self._complete(example)
        if not example.turns and example.plain is None:
            raise Skip("no answer of an assistant")
        if self.template is None or not example.turns:
            pieces = self._plain(example, number)
        else:
            pieces = split(self.template, example, self.learn, number)
        if not self.mask_prompt:
            pieces = [replace(piece, learned=True) for piece in pieces]
        rendered = self.template is not None and bool(example.turns)
        text = "".join(piece.text for piece in pieces)
        return label(self.speller, pieces, rendered), [*example.remarks, *self._remarks(example, text, rendered)]

    def _complete(self, example: Example) -> Example:
        """With roles mapped, and the system turn and tools that are added to every row."""
        turns = [{**turn, "role": self.roles.get(turn["role"], turn["role"])} for turn in example.turns]
        start, written = example.start, example.plain
        if self.system and turns and not any(turn["role"] == "system" for turn in turns):
            turns, start = [{"role": "system", "content": self.system}, *turns], start + 1 if start else 0
            written = plain.with_system(self.system, written) if written else None
        return replace(example, turns=turns, start=start, plain=written, tools=example.tools or self.tools)

    def _plain(self, example: Example, number: int) -> list[Piece]:
        if example.plain is None:
            raise AdapterError(
                f"row {number} is a conversation, and the tokenizer has no chat template to write it with; "
                "set tokenizer.chat_template, or use the instruct version of the model."
            )
        if example.tools:
            raise AdapterError(f"row {number} has tools, which need a chat template; set tokenizer.chat_template.")
        prompt, answer = example.plain
        then = () if answer.endswith(self.end[0]) else (self.end[1],)
        return [Piece(prompt, False), Piece(answer, True, True, then)]

    def _remarks(self, example: Example, text: str, rendered: bool) -> list[str]:
        found = []
        said = [str(turn["content"]) for turn in example.turns] or list(example.plain or ())
        if any(token in content for content in said for token in self.speller.tokenizer.all_special_tokens):
            found.append("the text itself holds special tokens, which were taken as such")
        if not rendered:
            return found
        last = max(i for i, turn in enumerate(example.turns) if turn["role"] == "assistant")
        if last + 1 < len(example.turns):
            found.append("turns after the last answer were left out: nothing is learned from them")
        if next((turn["role"] for turn in example.turns if turn["role"] != "system"), "") == "assistant":
            found.append("the assistant speaks first: what it says before a question is context, not learned")
        if any(is_context(turn) for turn in example.turns):
            found.append("turns of weight 0 are context, not learned")
        opening = self.template.opening.strip() if self.template else ""
        if opening and not any(turn["role"] == "system" for turn in example.turns):
            found.append(f"without a system turn the chat template begins with {opening!r}")
        for turn in example.turns[: last + 1]:
            if turn["content"].strip() not in text:
                found.append(f"the chat template leaves out or rewrites a turn of the role {turn['role']}")
        return list(dict.fromkeys(found))


def finished(row: Mapping[str, Any], number: int, tokenizer: Any) -> tuple[Labelled, list[str]]:
    """A row that came with token ids and labels, checked.

    Raises:
        AdapterError: lengths differ, an id is no token, or a label is not the token at its place.
        Skip: nothing is learned in it.
    """
    ids, labels = (row[name] if row.get(name) is not None else [] for name in ("input_ids", "labels"))
    where = f"row {number}"
    if len(ids) != len(labels):
        raise AdapterError(f"{where} has {len(ids)} input_ids and {len(labels)} labels; expected equally many.")
    known = len(tokenizer)
    for i, (token, said) in enumerate(zip(ids, labels, strict=True)):
        if type(token) is not int or not 0 <= token < known:
            raise AdapterError(
                f"{where}: input_ids[{i}] is {token!r}, which is none of the tokenizer's {known} tokens."
            )
        if said not in (IGNORED, token):
            raise AdapterError(
                f"{where}: labels[{i}] is {said!r}, expected -100 or {token}, the token at the same place: "
                "the model shifts labels by itself."
            )
    learned = [i for i, said in enumerate(labels) if said != IGNORED]
    if not learned:
        raise Skip("no label")
    special = set(tokenizer.all_special_ids)
    ends = tuple(i for i in learned if ids[i] in special)
    return Labelled(list(ids), list(labels), ends, True), []


def ending(tokenizer: Any, template: Template | None) -> tuple[str, int]:
    """The token that ends an answer: the template's, else the tokenizer's end of text."""
    if template is not None:
        return template.end, template.end_id
    return end_of_text(tokenizer, "the rows are written as plain text,")
