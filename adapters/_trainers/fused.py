"""TRL multiplies with the head's weight itself, past the head's module, and would never train an adapter there."""

from __future__ import annotations

from typing import Any

from torch import nn

from adapters._attach.container import CHILD
from adapters._attach.state import State, selection
from adapters._errors import AdapterError
from adapters._heads import output_embeddings

Call = tuple[tuple[Any, ...], dict[str, Any]]


def refuse_unseen_head(model: nn.Module, state: State, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """Raises before a forward with TRL's fused head where an adapter acts on the head (`add_fused_lm_head`)."""
    if kwargs.get("fused_lm_head"):
        head = output_embeddings(model)
        held = head._modules.get(CHILD) if head is not None else None
        for adapter in selection(state):
            if held is not None and any(key.split("-")[0] == adapter.slot for key in held._modules):
                raise AdapterError(
                    f"{adapter.name!r} acts on the output embeddings, whose weight this trainer multiplies with by "
                    "itself: the adapter would never be trained there. Leave the head out of targets= and head=, and "
                    "tokens= out, or use adapters.train.SFTTrainer, which runs the head."
                )
    return args, kwargs
