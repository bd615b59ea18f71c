"""The label map of a trained head: while its adapter is the active one, the model's configuration has its labels."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from adapters._attach.state import Acting, State


def labels_of(model: nn.Module) -> dict[str, str] | None:
    """The model's labels by number, as JSON keys, or None where its configuration has none."""
    found = getattr(getattr(model, "config", None), "id2label", None)
    return {str(key): str(value) for key, value in found.items()} if found else None


def show_labels(model: nn.Module, state: State, active: Acting) -> None:
    """Gives the configuration, and the model's `num_labels`, the labels of the head that acts, or the base's own."""
    if state.labels is None:
        if not any(adapter.labels for adapter in active):
            return
        state.labels = labels_of(model)
    wanted = next((adapter.labels for adapter in active if adapter.labels), state.labels)
    if wanted is not None and wanted != labels_of(model):
        set_labels(model, wanted)


def put_labels(config: Any, labels: Mapping[str, str]) -> None:
    """The same for a configuration alone."""
    config.id2label = {int(key): value for key, value in labels.items()}
    config.label2id = {value: int(key) for key, value in labels.items()}


def set_labels(model: nn.Module, labels: Mapping[str, str]) -> None:
    """Gives the configuration these labels, and the model their number."""
    put_labels(model.config, labels)
    if hasattr(model, "num_labels"):
        model.num_labels = len(labels)  # type: ignore[assignment]
