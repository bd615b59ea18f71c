"""The report about prepared rows, or the refusal where they would teach nothing."""

from __future__ import annotations

from adapters._errors import AdapterError
from adapters.data.kept import Kept
from adapters.data.recognition import Recognised
from adapters.data.report import DataReport
from adapters.data.shapes import FINISHED, TEXT
from adapters.data.writing import Writing


def summarise(kept: Kept, found: Recognised, writing: Writing | None, rows: int) -> DataReport:
    """What was read, kept and assumed.

    Args:
        writing: how the rows were written, or None where they came finished.

    Raises:
        AdapterError: no row is left, or no answer has its end.
    """
    if not kept.lengths:
        reasons = "; ".join(f"{count:,} {reason}" for reason, count in kept.dropped.most_common())
        hint = _hint(kept)
        raise AdapterError(f"there is nothing to learn in these {rows:,} rows: {reasons}; {hint}.")
    if not kept.ended and found.shape not in (TEXT, FINISHED):
        raise AdapterError(
            f"max_tokens={kept.max_tokens} cuts the end of turn off every row, so that the model would never learn to "
            'stop; raise max_tokens, or pass too_long="drop".'
        )
    end, end_id = writing.end if writing else ("", None)
    used = {field: column for field, column in found.columns.items() if column in kept.columns}
    fields = (*found.shape.needs, *found.shape.takes)
    return DataReport(
        shape=found.shape.name,
        columns=used,
        parts={used[field]: part for field, part in zip(fields, found.shape.parts, strict=True) if field in used},
        unused=tuple(column for column in kept.columns if column not in used.values()),
        roles={name: role for name, role in writing.roles.items() if name != role} if writing else {},
        rows=rows,
        kept=len(kept.lengths),
        cut=kept.cut,
        dropped=dict(kept.dropped),
        tokens=len(kept.ids),
        learned_tokens=sum(kept.learned),
        lengths=tuple(kept.lengths),
        learned=tuple(kept.learned),
        learns=_learns(found, writing),
        end_of_turn=end,
        end_of_turn_id=end_id,
        ended=kept.ended,
        proof=_proof(kept, found, writing),
        apart=kept.apart,
        assumed=(*_assumed(found, writing, kept), *(f"{text} ({n:,} rows)" for text, n in kept.remarks.items())),
    )


def _hint(kept: Kept) -> str:
    if kept.max_tokens is not None and any(f"{kept.max_tokens:,} tokens" in reason for reason in kept.dropped):
        return "raise max_tokens"
    if any(reason.startswith("refused by the chat template") for reason in kept.dropped):
        return "change the rows to what the template accepts, or set another tokenizer.chat_template"
    return "check which columns and roles hold the answers, and map them with columns= and roles="


def _learns(found: Recognised, writing: Writing | None) -> str:
    if writing is None:
        return "as labelled in the rows"
    if found.shape is TEXT or not writing.mask_prompt:
        return "the whole text"
    return "every answer" if writing.learn == "all" else "the last answer of each row"


def _proof(kept: Kept, found: Recognised, writing: Writing | None) -> str:
    if writing is None:
        return "every label is -100 or the token at its place"
    if found.shape is TEXT:
        return "none needed, the whole text is learned"
    if writing.template is None:
        return "prompt and answer are separate columns, tokenised apart"
    return f"rendered turn by turn, the template writes all {kept.ends:,} answers as in the whole conversation"


def _assumed(found: Recognised, writing: Writing | None, kept: Kept) -> list[str]:
    if writing is None:
        unended = kept.ended < len(kept.lengths)
        return ["in some rows no special token is learned: does an answer there have its end?"] if unended else []
    template = writing.template
    if found.shape is TEXT:
        return [f"{writing.end[0]!r} was appended to every text that does not end in it"]
    if template is None:
        form = "Alpaca's prompt" if "instruction" in found.shape.needs else "plain text"
        return [f"no chat template is used: rows are written as {form}, ended by {writing.end[0]!r}; serve the same"]
    said = []
    if template.appended:
        later = ", which the prompts of later turns will not show" if kept.ends > len(kept.lengths) else ""
        said.append(f"the chat template ends no answer with a token: {template.end!r} was appended to each{later}")
    if template.lead:
        said.append(f"the template begins an answer with {template.lead!r}, which is learned as part of it")
    if template.end_id != writing.speller.tokenizer.eos_token_id:
        said.append(f"{template.end!r} is not the tokenizer's end token: generation has to stop at it as well")
    return said
