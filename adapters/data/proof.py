"""Which part of a conversation is an answer, proved by rendering it turn by turn."""

from __future__ import annotations

from adapters._errors import AdapterError
from adapters.data.example import Example, Skip, Turn, answers
from adapters.data.labels import Piece
from adapters.data.template import REMEDY, Template


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
            hint = "or give it template_options, such as {'enable_thinking': False}"
            raise AdapterError(
                f"row {number}: the chat template's prompt for turn {i} is not how the whole conversation begins, "
                f"{_both(prompt, whole)}; {_remedy(template, example, learn, number, f'{REMEDY}, {hint}')}."
            )
        stop = len(prompt) + _length(template, upto[len(prompt) :], number)
        if upto[:stop] != whole[:stop]:
            raise AdapterError(
                f"row {number}: the chat template writes turn {i} differently once more turns follow, "
                f"{_both(upto[:stop], whole)}; {_remedy(template, example, learn, number, REMEDY)}."
            )
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


def _check_calls(turn: Turn, written: str, number: int) -> None:
    for call in turn.get("tool_calls", ()):
        name = str(call.get("function", call).get("name"))
        if name not in written:
            raise AdapterError(f"row {number}: the chat template does not write the call of {name!r}; {REMEDY}.")


def _both(part: str, whole: str) -> str:
    """Both texts from shortly before where they differ first."""
    pairs = enumerate(zip(part, whole, strict=False))
    same = next((i for i, (mine, theirs) in pairs if mine != theirs), min(len(part), len(whole)))
    near = slice(max(0, same - 24), same + 40)
    return (
        f"so that training would not see what generation sees: {part[near]!r} by itself, {whole[near]!r} in the whole"
    )


def _remedy(template: Template, example: Example, learn: str, number: int, otherwise: str) -> str:
    """To learn the last answer alone, where that works, or what else can be done."""
    if learn == "last":
        return otherwise
    try:
        split(template, example, "last", number)
    except (AdapterError, Skip):
        return otherwise
    return 'pass learn="last", which works here: only the last answer of each row is learned'
