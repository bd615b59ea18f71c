"""A base and a saved adapter as one model, of the kind that the adapter was trained as."""

from __future__ import annotations

from typing import Any

import adapters


def load_adapted(model: str, adapter: str, quantize: str | None = None) -> tuple[Any, Any]:
    """The base `model` with `adapter` attached as "default", and its tokenizer.

    Raises:
        AdapterError: the adapter is damaged, or belongs to another base.
    """
    info = adapters.inspect(adapter)  # before the base, which takes longer to load
    more: dict[str, Any] = {}
    if info.head and info.labels:
        names = {int(key): value for key, value in info.labels.items()}
        more = {"kind": "classifier", "num_labels": len(names), "id2label": names}
        more["label2id"] = {name: key for key, name in names.items()}
    loaded, tokenizer = adapters.load_base(model, quantize=quantize, **more)
    adapters.load(loaded, adapter, name="default", tokenizer=tokenizer)
    return loaded, tokenizer
