"""A tokenizer's chat template: how it ends a turn, found by trying it, and which part of a row is an answer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from adapters._errors import AdapterError
from adapters.data.example import Example, Skip, Turn, answers
from adapters.data.labels import Piece

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
    if not before.startswith(prompt):
        mine, theirs = _differing(prompt, whole)
        raise AdapterError(
            f"the chat template's prompt for generation is not how it starts an answer: {mine!r} becomes {theirs!r}; "
            f"{REMEDY}, or pass the template an option."
        )
    closing, end, end_id = _ending(tokenizer, tail, special)
    appended = end_id is None
    if end_id is None:
        end, end_id = end_of_text(tokenizer, "the chat template writes no token after an answer")
    lead = before[len(prompt) :]
    opening = _opening(bare, [asked, said, asked], prompt.partition(_ASKED)[0])
    return Template(tokenizer, bare.options, opening, lead, tail, closing, end, end_id, appended, special)


def _opening(template: Template, turns: Sequence[Turn], before: str) -> str:
    """What comes before the first turn but not before a later one of the same role."""
    try:
        again = template.render(turns, None, False).partition(_SAID)[2].rpartition(_ASKED)[0]
    except Skip:
        return ""
    same = next((n for n in range(min(len(before), len(again)), 0, -1) if before.endswith(again[-n:])), 0)
    opening = before[: len(before) - same]
    return "" if opening == template.tokenizer.bos_token else opening


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


def split(template: Template, example: Example, learn: str, number: int) -> list[Piece]:
    """A conversation as pieces, proved turn by turn: what is learned is what follows the prompt for generation.

    For each learned answer the rendering of the turns before it, with the start of an answer, and the rendering up to
    its end of turn must both be how the rendering of the whole conversation begins.

    Args:
        learn: "all" answers or the "last" one; turns after the last answer are left out.
        number: of the row, for errors.

    Raises:
        AdapterError: the renderings disagree, or a call is not written.
        Skip: there is nothing to learn, or the template refuses the conversation.
    """
    learned = answers(example.turns, example.start, learn)
    turns, tools = example.turns[: learned[-1] + 1], example.tools
    whole = template.render(turns, tools, False)
    if tools and whole == template.render(turns, None, False):
        raise AdapterError(
            f"row {number} has tools, but the chat template does not write them; {REMEDY}, or leave them out."
        )
    pieces: list[Piece] = []
    cursor = 0
    for i in learned:
        prompt = template.render(turns[:i], tools, True)
        upto = whole if i == learned[-1] else template.render(turns[: i + 1], tools, False)
        if not whole.startswith(prompt) or len(prompt) < cursor:
            raise AdapterError(_disagreement(template, example, learn, number, i, prompt, whole))
        stop = len(prompt) + _length(template, upto[len(prompt) :], number)
        if upto[:stop] != whole[:stop]:
            raise AdapterError(_disagreement(template, example, learn, number, i, upto[:stop], whole))
        _check_calls(turns[i], whole[len(prompt) : stop], number)
        then = (template.end_id,) if template.appended else ()
        pieces += [Piece(whole[cursor : len(prompt)], False), Piece(whole[len(prompt) : stop], True, True, then)]
        cursor = stop
    return [*pieces, Piece(whole[cursor:], False)]


def _length(template: Template, rest: str, number: int) -> int:
    """How much of the text after a prompt is the answer with its end of turn."""
    if rest.endswith(template.tail):
        return len(rest) - len(template.tail) + len(template.closing)
    # some templates end a call in another way than an answer
    last = next(reversed(list(template.special.finditer(rest))), None)
    if last is not None and not rest[last.end() :].strip():
        return last.end()
    if template.appended:
        return len(rest.rstrip())
    raise AdapterError(f"row {number}: the chat template writes no end of turn after the answer: {rest[-60:]!r}.")


def _ending(tokenizer: Any, tail: str, special: re.Pattern[str]) -> tuple[str, str, int | None]:
    """What follows an answer up to the end of turn, the text of the token that ends it, and its id or None."""
    first = special.search(tail)
    if first is not None:
        return tail[: first.end()], first[0], int(tokenizer.convert_tokens_to_ids(first[0]))
    text = tail.strip()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return tail.rstrip(), text, int(ids[0]) if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def _special(tokenizer: Any) -> re.Pattern[str]:
    """Matches every added token, the longer first."""
    texts = {str(token) for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    alternatives = "|".join(re.escape(text) for text in sorted(texts, key=lambda text: (-len(text), text)) if text)
    return re.compile(alternatives or r"(?!)")


def _check_calls(turn: Turn, written: str, number: int) -> None:
    for call in turn.get("tool_calls", ()):
        name = str(call.get("function", call).get("name"))
        if name not in written:
            raise AdapterError(f"row {number}: the chat template does not write the call of {name!r}; {REMEDY}.")


def _differing(one: str, other: str) -> tuple[str, str]:
    """Both texts from shortly before where they differ first."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - 24)
    return one[start : same + 40], other[start : same + 40]


def _disagreement(
    template: Template, example: Example, learn: str, number: int, turn: int, part: str, whole: str
) -> str:
    mine, theirs = _differing(part, whole)
    remedy = REMEDY
    if learn == "all":
        try:
            split(template, example, "last", number)
            remedy = 'pass learn="last", which works here: only the last answer of each row is learned'
        except (AdapterError, Skip):
            pass
    return (
        f"row {number}: the chat template writes turn {turn} differently once more turns follow, so that training "
        f"would not see what generation sees: {mine!r} alone, {theirs!r} in the whole conversation; {remedy}."
    )
