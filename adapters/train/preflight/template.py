"""Whether tokenizer, chat template and embeddings agree."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from adapters.train.preflight.report import Check, count, failed, ok, some, warning
from adapters.train.preflight.rows import embedding_rows

REPLY = "Reply"
MARKER = re.compile(r"<\|[^|<>\s]+\|>|</?[a-z_]+>")  # `<|im_end|>`, `</s>`, `<start_of_turn>`


@dataclass(frozen=True)
class Turn:
    """What ends an assistant's turn, and where generation stops, as token ids."""

    ends: tuple[int, ...]
    stops: frozenset[int]
    names: dict[int, str]
    text: str = ""  # the rendered conversation
    tail: str = ""  # what the template writes after a reply
    error: str = ""

    def name(self, token: int) -> str:
        return repr(self.names.get(token, str(token)))


def turn_of(model: nn.Module, tokenizer: Any) -> Turn:
    """Renders a short conversation and reads off how it ends."""
    text, error = _rendered(tokenizer)
    tail = text.rpartition(REPLY)[2]
    special = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", {})}
    after = [token for token in _ids(tokenizer, tail) if token in special]
    eos = tokenizer.eos_token_id
    given = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {eos, *(given if isinstance(given, list | tuple) else [given])} - {None}
    ends = tuple(dict.fromkeys(token for token in (*after[:1], eos) if token is not None))
    names = {token: str(tokenizer.convert_ids_to_tokens(token)) for token in (*ends, *stops)}
    return Turn(ends, frozenset(stops), names, text, tail, error)


def _rendered(tokenizer: Any) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        return "", ""
    conversation = [{"role": "user", "content": "Question"}, {"role": "assistant", "content": REPLY}]
    try:
        return str(tokenizer.apply_chat_template(conversation, tokenize=False)), ""
    except Exception as error:  # a template is a program of its own, and raises what it likes
        return "", f"{type(error).__name__}: {error}"


def _ids(tokenizer: Any, text: str) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    return found


def tokenizer_checks(model: nn.Module, tokenizer: Any, turn: Turn, batches: Sequence[Any]) -> list[Check]:
    return [*_sizes(model, tokenizer, turn), *_markers(tokenizer, turn), *_padding(tokenizer, batches)]


def _sizes(model: nn.Module, tokenizer: Any, turn: Turn) -> list[Check]:
    rows, length = embedding_rows(model), len(tokenizer)
    if rows is None:
        return []
    used = {*tokenizer.all_special_ids, *_ids(tokenizer, turn.text)}
    beyond = sorted(token for token in used if token >= rows)
    sizes = f"the tokenizer has {count(length, 'token')}, the embeddings {count(rows, 'row')}"
    if beyond:
        words = some(repr(str(tokenizer.convert_ids_to_tokens(token))) for token in beyond)
        return [failed(f"{sizes}: none for {words}", "use the base's own tokenizer, or resize the embeddings first")]
    if length > rows:
        what = f"{sizes}: tokens from id {rows:,} on would fail"
        return [warning(what, "use the base's own tokenizer, or resize the embeddings before attaching")]
    return [ok(sizes)]


def _markers(tokenizer: Any, turn: Turn) -> list[Check]:
    """Markers of the template that the tokenizer does not know are split into pieces of text."""
    if turn.error:
        return [warning(f"the chat template cannot be rendered: {turn.error}", "look at tokenizer.chat_template")]
    if not turn.text:
        return [ok("the tokenizer has no chat template")]
    found = list(dict.fromkeys(MARKER.findall(turn.text)))
    split = [marker for marker in found if len(_ids(tokenizer, marker)) != 1]
    end = next(iter(MARKER.findall(turn.tail)), None)
    remedy = "use the tokenizer that the template was made for, or another template"
    if end in split:
        return [failed(f"the template ends a turn with {end!r}, which the tokenizer splits into pieces", remedy)]
    if split:  # some published models do so on purpose, and learned it
        return [warning(f"the tokenizer splits {some(map(repr, split))} of the chat template into pieces", remedy)]
    tokens = [str(tokenizer.convert_ids_to_tokens(token)) for token in _ids(tokenizer, turn.text)]
    special = [token for token in dict.fromkeys(tokens) if token in set(tokenizer.all_special_tokens) or token in found]
    return [
        ok(f"the chat template's markers are single tokens: {some(map(repr, special)) if special else 'it has none'}")
    ]


def _padding(tokenizer: Any, batches: Sequence[Any]) -> list[Check]:
    pad, eos = tokenizer.pad_token_id, tokenizer.eos_token_id
    if pad is None:
        return [warning("the tokenizer has no padding token", "set tokenizer.pad_token; labels are masked by position")]
    name = f"the padding token is {tokenizer.pad_token!r}, id {pad}"
    if pad != eos:
        return [ok(name)]
    masked = shown = 0
    for batch in batches:
        ids, labels, mask = (batch.get(key) for key in ("input_ids", "labels", "attention_mask"))
        if not isinstance(ids, Tensor) or not isinstance(labels, Tensor) or labels.shape != ids.shape:
            continue
        real = ids == eos if not isinstance(mask, Tensor) or mask.shape != ids.shape else (ids == eos) & mask.bool()
        shown += int(real.sum())
        masked += int((labels[real] == -100).sum())
    if shown and masked == shown:
        what = f"{name}, which also ends a turn, and the labels leave out all {shown} of it: they are masked by id"
        return [warning(what, "mask padding by position")]
    return [ok(f"{name}, which also ends a turn; the labels tell them apart by position")]
