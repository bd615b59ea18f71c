"""How the rows of a micro-batch are laid out: what was asked for, what stands against it, and what the probe says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from adapters._errors import AdapterError
from adapters.train.adopt import is_peft
from adapters.train.batches import CheaperRows, OneRow, PaddedRows, Row
from adapters.train.options import split_sequences
from adapters.train.packing import Packing, probe_packing

Collator = Callable[[Sequence[Row]], dict[str, Tensor]]


def choose_packing(model: Any, layout: str, args: Any, against: str | None, only_without_mask: str | None) -> Packing:
    """Packed where that was asked for or may be, and nothing stands against it.

    Args:
        against: why rows cannot be shared whatever the model can do.
        only_without_mask: why a mask of ours cannot be used.

    Raises:
        AdapterError: packing was asked for, and the documents would not stay apart.
    """
    if layout == "padded":
        return Packing("padded", "asked for with layout='padded'")
    asked = "packing=True" if args.packing else "padding_free=True" if args.padding_free else "layout='packed'"
    demanded = layout == "packed" or args.packing or args.padding_free
    found = Packing("padded", against) if against is not None else probe_packing(model)
    if found.kind == "masked" and only_without_mask is not None:
        found = replace(found, kind="padded", reason=f"only a mask keeps documents apart, and {only_without_mask}")
    if demanded and found.kind == "padded":
        raise AdapterError(f"{asked} was asked for, but documents cannot share a row here: {found.reason}.")
    return found


def obstacle(model: Any, args: Any, own_collator: Any, parallel: Any) -> str | None:
    """What makes a shared row impossible, or another computation than rows of their own."""
    if is_peft(model):
        return "the model is PEFT's own"
    if own_collator is not None:
        return "a data_collator of the caller's makes the batches"
    if args.neftune_noise_alpha is not None:
        return "the noise of NEFTune grows smaller with the length of the row"
    if args.pad_to_multiple_of is not None:
        return f"pad_to_multiple_of={args.pad_to_multiple_of} asks for padded rows"
    if split_sequences(parallel):
        return "sequences are split over processes"
    return None


def make_collator(packing: Packing, layout: str, args: Any, model: Any, padded: PaddedRows) -> Collator:
    """The collator of a run; rows that TRL packed, and rows for an attention without a dense mask, are never padded."""
    if packing.kind == "padded":
        return padded
    config = model.config.get_text_config()
    flash = "flash" in str(getattr(config, "_attn_implementation", None))
    width = getattr(config, "hidden_size", None)
    demanded = layout == "packed" or args.packing or args.padding_free
    if demanded or packing.by_document or flash or not isinstance(width, int):
        return OneRow()
    return CheaperRows(padded, width)


def pack(dataset: Any, args: Any) -> Any:
    """Documents sorted into rows of at most `args.max_length` tokens, each with the lengths of its documents."""
    from trl import pack_dataset

    return pack_dataset(dataset.select_columns(["input_ids", "labels"]), args.max_length, args.packing_strategy)
