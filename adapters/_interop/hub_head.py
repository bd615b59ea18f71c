"""The head that AdapterHub saves beside an adapter: taken where it is the model's own linear classifier, else told of.

`head_config.json` (src/adapters/loading.py, class PredictionHeadLoader) names the model's class, whose head it is; or,
for AdapterHub's own model classes, describes a head that only they have.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from adapters._heads import base_model, output_embeddings
from adapters._interop.targets import base_modules


def read_head(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module
) -> tuple[dict[str, Tensor], tuple[str, ...], dict[str, str] | None, str]:
    """The head's tensors by our names, its path, its labels, and why it was left out, if it was."""
    where = f"its head of {config.get('model_class')} was left out, and the model's own stays"
    if config.get("config"):
        kind = config["config"].get("head_type") if isinstance(config["config"], Mapping) else None
        return {}, (), None, f"its head, AdapterHub's {str(kind)[:60]!r}, was left out, and the model's own stays."
    modules = base_modules(model)
    own = {f"{path}.{name}": held for path, module in modules.items() for name, held in module._parameters.items()}
    if tensors and all(_equal(own.get(key), tensor) for key, tensor in tensors.items()):
        return {}, (), None, ""  # the base's own, as where the head was not trained
    paths = {key.rpartition(".")[0] for key in tensors}
    if config.get("model_class") not in {cls.__name__ for cls in type(model).__mro__}:
        return {}, (), None, f"{where}: this is a {type(model).__name__}."
    path = paths.pop() if len(paths) == 1 else ""
    head = modules.get(path)
    if not isinstance(head, nn.Linear) or not _classifies(config, head, model):
        return {}, (), None, f"{where}: it is no linear layer that classifies."
    shapes = {f"{path}.{name}": held.shape for name, held in head._parameters.items() if held is not None}
    if shapes != {key: tensor.shape for key, tensor in tensors.items()}:
        return {}, (), None, f"{where}: it has another shape."
    labels = {str(number): str(label) for label, number in (config.get("label2id") or {}).items()}
    renamed = {f"{path}:head.{key.removeprefix(f'{path}.')}": tensor for key, tensor in tensors.items()}
    return renamed, (path,), labels if len(labels) == head.out_features else None, ""


def _equal(own: Tensor | None, tensor: Tensor) -> bool:
    return own is not None and own.shape == tensor.shape and torch.equal(own.detach().to(tensor), tensor)


def _classifies(config: Mapping[str, Any], head: nn.Linear, model: nn.Module) -> bool:
    base = base_model(model)
    outside = base is not None and all(module is not head for module in base.modules())
    return outside and head is not output_embeddings(model) and config.get("num_labels") == head.out_features
