"""A tokenizer's chat template: what it writes around an answer and how it ends a turn, found by trying it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters._errors import AdapterError
from adapters.data.example import Skip, Turn

REMEDY = "set tokenizer.chat_template to one that fits"
_ASKED, _SAID = "Zebraquestion", "Zebraanswer"  # words that no template writes by itself


@dataclass(frozen=True)
class Template:
    """What a chat template writes around answers.

    Args:
        tokenizer: a transformers tokenizer.
        options: passed to the template, such as `enable_thinking`.
        opening: what it writes before the first turn of a conversation that has no system turn.
        lead: text between the prompt for generation and the answer, nearly always empty.
        tail: text after the last answer.
        closing: the part of `tail` up to the end of turn.
        end: text of the token that ends a turn.
        end_id: its id.
        appended: the template writes no such token; it is the tokenizer's end token, appended to each answer.
        special: matches the text of any added token.
    """

    tokenizer: Any
    options: Mapping[str, Any]
    opening: str = ""
    lead: str = ""
    tail: str = ""
    closing: str = ""
    end: str = ""
    end_id: int = -1
    appended: bool = False
    special: re.Pattern[str] = field(default=re.compile(r"(?!)"), repr=False)

    def render(self, turns: Sequence[Turn], tools: Sequence[Any] | None, prompt: bool) -> str:
        """The text of a conversation, with the start of an answer where `prompt` is set.

        Raises:
            Skip: the template refuses the conversation.
        """
        from jinja2 import TemplateError

        copied = [dict(turn) for turn in turns]  # templates may write into the turns
        options = {**self.options, "tokenize": False, "add_generation_prompt": prompt}
        try:
            return str(self.tokenizer.apply_chat_template(copied, tools=list(tools) if tools else None, **options))
        except (TemplateError, TypeError, KeyError, IndexError, ValueError) as error:
            said = " ".join(str(error).split()).rstrip(".")
            raise Skip(f"refused by the chat template ({said[:120] or type(error).__name__})") from error


def probe(tokenizer: Any, options: Mapping[str, Any] | None = None) -> Template:
    """Learns from one question and one answer how a tokenizer's template ends a turn.

    Raises:
        AdapterError: the template cannot render them, leaves the answer out, or nothing could end a turn.
    """
    special = _special(tokenizer)
    bare = Template(tokenizer, dict(options or {}), special=special)
    asked, said = {"role": "user", "content": _ASKED}, {"role": "assistant", "content": _SAID}
    try:
        prompt, whole = bare.render([asked], None, True), bare.render([asked, said], None, False)
    except Skip as error:
        raise AdapterError(f"one question and one answer are {error}; {REMEDY}.") from error
    if _SAID not in whole or _ASKED not in prompt:
        raise AdapterError(f"the chat template leaves out what is said: it renders {whole[-80:]!r}; {REMEDY}.")
    before, _, tail = whole.rpartition(_SAID)
    again = _between(bare, [asked, said, asked])
    closing, end, end_id = _ending(tokenizer, tail, again, special)
    appended = end_id is None
    if end_id is None:
        end, end_id = end_of_text(tokenizer, "the chat template writes no token after an answer")
    # where the prompt is not how an answer begins, rows decide: some templates agree only on answers that think
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    opening = _opening(prompt.partition(_ASKED)[0], again)
    opening = "" if opening == tokenizer.bos_token else opening
    return Template(tokenizer, bare.options, opening, lead, tail, closing, end, end_id, appended, special)


def _between(template: Template, turns: Sequence[Turn]) -> str:
    """What the template writes between an answer and the next question."""
    try:
        return template.render(turns, None, False).partition(_SAID)[2].rpartition(_ASKED)[0]
    except Skip:
        return ""


def _opening(before: str, again: str) -> str:
    """What comes before the first question but not before a later one."""
    same = next((n for n in range(min(len(before), len(again)), 0, -1) if before.endswith(again[-n:])), 0)
    return before[: len(before) - same] if again else ""


def end_of_text(tokenizer: Any, found: str) -> tuple[str, int]:
    """The tokenizer's end token and its id.

    Raises:
        AdapterError: it has none; `found` says why one is needed.
    """
    if tokenizer.eos_token_id is None:
        raise AdapterError(
            f"{found} and the tokenizer has no end token (eos_token), so that an answer would never end; "
            "set tokenizer.eos_token."
        )
    return str(tokenizer.eos_token), int(tokenizer.eos_token_id)


def _ending(tokenizer: Any, tail: str, again: str, special: re.Pattern[str]) -> tuple[str, str, int | None]:
    """What follows an answer up to the end of turn, the text of the token that ends it, and its id or None.

    Where several tokens follow at once, the last of those that also come before a next question ends the turn.
    """
    found = special.search(tail)
    if found is None:
        text = tail.strip()
        ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
        return tail.rstrip(), text, int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None
    after = special.match(tail, found.end())
    while after is not None and again.startswith(tail[: after.end()]):
        found, after = after, special.match(tail, after.end())
    return tail[: found.end()], found[0], int(tokenizer.convert_tokens_to_ids(found[0]))


def _special(tokenizer: Any) -> re.Pattern[str]:
    """Matches every added token, the longer first."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    alternatives = "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text)) if text)
    return re.compile(alternatives or r"(?!)")
