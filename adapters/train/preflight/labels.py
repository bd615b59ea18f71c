"""Whether there is something to learn in the first batches, and the end of a turn among it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adapters.train.preflight.report import Check, count, failed, numbered, ok, warning
from adapters.train.preflight.rows import Head, documents, embedding_rows, head_of, learned
from adapters.train.preflight.template import Turn

Batch = Mapping[str, Any]


def label_checks(model: nn.Module, batches: Sequence[Batch], own_loss: bool) -> tuple[list[int], list[Check]]:
    """The batches that may go through the model, by number, and what is wrong with the others."""
    head = head_of(model)
    if own_loss and not any("labels" in batch for batch in batches):
        note = ok("labels: none in these batches; what is learned is up to the loss that was given")
        return [*range(len(batches))], [note, *_ids(model, batches)[1]]
    rows = [learned(batch, head) for batch in batches]
    empty = [i for i, found in enumerate(rows) if not sum(row.numel() for row in found)]
    apart, checks = _ids(model, batches)
    beyond, outside = _classes(rows, head)
    usable = [i for i in range(len(batches)) if i not in {*empty, *apart, *beyond}]
    return usable, [_present(batches, rows, empty), *checks, *outside]


def _present(batches: Sequence[Batch], rows: Sequence[Sequence[Tensor]], empty: Sequence[int]) -> Check:
    every = [row for found in rows for row in found]
    tokens, without = sum(row.numel() for row in every), sum(not row.numel() for row in every)
    if empty:
        none = [i for i in empty if "labels" not in batches[i]]
        what = "has no labels" if none else "has no label other than -100"
        remedy = "every token is masked: look at what is masked, and whether rows are cut before the answer starts"
        return failed(
            f"{numbered(none or empty, len(batches))} {what}: nothing is learned there",
            "give each batch a tensor `labels`" if none else remedy,
        )
    if without:
        what = f"{without} of {count(len(every), 'row')} have no label: they are computed and teach nothing"
        return warning(what, "leave such rows out, or raise max_length so that their answers are not cut off")
    return ok(f"labels: {count(tokens, 'value')} in {count(len(every), 'row')}, some in every row")


def _ids(model: nn.Module, batches: Sequence[Batch]) -> tuple[list[int], list[Check]]:
    """Token ids that the embeddings have no row for; on a GPU they would end the process."""
    rows = embedding_rows(model)
    given = {i: ids for i, batch in enumerate(batches) if isinstance(ids := batch.get("input_ids"), Tensor)}
    if rows is None:
        return [], []
    beyond = [i for i, ids in given.items() if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) >= rows)]
    if not beyond:
        return [], []
    largest = max(int(given[i].max()) for i in beyond)
    what = f"{numbered(beyond, len(batches))} has token ids outside the embedding's {rows:,} rows, such as {largest:,}"
    return beyond, [failed(what, "use the base's own tokenizer, or resize the embeddings before attaching")]


def _classes(rows: Sequence[Sequence[Tensor]], head: Head) -> tuple[list[int], list[Check]]:
    if head.classes is None:
        return [], []
    values = {i: [row for row in found if row.numel() and not row.is_floating_point()] for i, found in enumerate(rows)}
    beyond = {
        i: [int(v) for row in found for v in (row.min(), row.max()) if not 0 <= int(v) < (head.classes or 0)]
        for i, found in values.items()
    }
    wrong = [i for i, found in beyond.items() if found]
    if not wrong:
        return [], []
    what = f"the {head.classes:,} {'tokens of the vocabulary' if head.language else 'classes of the head'}"
    sentence = f"{numbered(wrong, len(rows))} has labels outside {what}, such as {beyond[wrong[0]][0]:,}"
    remedy = "use the base's own tokenizer; -100 is the only other label" if head.language else "set num_labels"
    return wrong, [failed(sentence, remedy)]


def turn_check(model: nn.Module, batches: Sequence[Batch], turn: Turn) -> list[Check]:
    """Whether the token that ends a turn is learned, and stops a generation."""
    head = head_of(model)
    batches = [batch for batch in batches if isinstance(batch.get("labels"), Tensor)]
    if not head.generates or not batches:
        return []
    if not turn.ends:
        return [failed("the tokenizer has no end-of-text token, and its template no end of turn", "set eos_token")]
    rows = [row for batch in batches for row in learned(batch, head)]
    found = {end for end in turn.ends for row in rows if bool((row == end).any())}
    name = " or ".join(turn.name(end) for end in turn.ends)
    if not any(row.numel() for row in rows):
        return []  # nothing at all is learned, which another line says
    if not found:
        return [_unlearned(batches, turn, name)]
    having = sum(any(bool((row == end).any()) for end in found) for row in rows)
    learnt = " and ".join(turn.name(end) for end in turn.ends if end in found)
    if not found & turn.stops:
        stops = " or ".join(turn.name(stop) for stop in sorted(turn.stops)) or "nothing"
        what = f"{learnt} ends the turns that are learned, and generation stops only at {stops}"
        return [warning(what, "add its id to model.generation_config.eos_token_id")]
    return [ok(f"the end of the turn, {learnt}, is learned in {having} of {count(len(rows), 'row')}")]


def _unlearned(batches: Sequence[Batch], turn: Turn, name: str) -> Check:
    rows = [row for batch in batches if "input_ids" in batch for row in documents(batch, "input_ids")]
    masks = [row for batch in batches if "input_ids" in batch for row in documents(_mask(batch), "attention_mask")]
    seen = sum(
        int(((row == end) & mask.bool()).sum()) for end in turn.ends for row, mask in zip(rows, masks, strict=True)
    )
    if seen:
        what = f"the end of the turn, {name}, is never learned: it is there {count(seen, 'time')}, always masked"
        return failed(what, "mask padding by position, not by token id: the padding token may be the end of the turn")
    what = f"the end of the turn, {name}, is never learned: no row has it, and generation would not stop"
    return failed(what, "append it to every answer, and do not cut it off")


def _mask(batch: Batch) -> dict[str, Any]:
    mask = batch.get("attention_mask")
    usable = isinstance(mask, Tensor) and mask.shape == batch["input_ids"].shape
    return {**batch, "attention_mask": mask if usable else batch["input_ids"].new_ones(batch["input_ids"].shape)}
