"""Grows a model's tables of tokens. The new rows depend on the base alone, and not on chance or on its precision.

Rows are rounded to bfloat16 before their mean is taken, and their mean after: the same base in float32 and in bfloat16
gets the same new rows, and an adapter that is made on one is recognised on the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters._attach import owners, table_of, table_paths
from adapters._errors import AdapterError
from adapters._heads import output_embeddings

PART = 4096  # rows of a table that are summed at once


def resize(model: nn.Module, paths: Sequence[str], size: int, pieces: Sequence[Sequence[int]]) -> None:
    """Grows the tables to `size` rows, the output's bias with them; undone where anything fails.

    Args:
        pieces: for each of the last rows, the old rows whose mean it starts as; for none, the mean of all.
    """
    starts = {path: _starts(_table(model, path).detach(), size, pieces) for path in paths}
    bias = _bias(model)
    shift = _starts(bias.detach()[:, None], size, pieces).squeeze(1) if bias is not None else None
    tied, undo = [owners(model, path) for path in paths], remembered(model)
    devices = {_table(model, path).device for path in paths}
    try:
        # its own start of the new rows is random; they are overwritten, and nobody's random numbers move
        with torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            cast(Any, model).resize_token_embeddings(size, mean_resizing=False)
        if table_paths(model) != tuple(paths) or [owners(model, path) for path in paths] != tied:
            raise AdapterError("resizing the embeddings changed which weights are tied.")
        for path, start in starts.items():
            _fill(_table(model, path), start, size)
        grown = _bias(model)
        if grown is not None and shift is not None:
            _fill(grown, shift, size)
    except BaseException as error:
        undo()
        if isinstance(error, Exception) and not isinstance(error, AdapterError):
            raise AdapterError(f"transformers could not resize this model's embeddings: {error}.") from error
        raise


def _bias(model: nn.Module) -> Tensor | None:
    """What the output embeddings add to the logits."""
    head = output_embeddings(model)
    return head._parameters.get("bias") if head is not None else None


@torch.no_grad()
def _fill(grown: Tensor, start: Tensor, size: int) -> None:
    if grown.shape[0] != size:
        raise AdapterError(f"transformers has left an embedding at {grown.shape[0]:,} rows instead of {size:,}.")
    grown[size - start.shape[0] :] = start.to(grown.dtype)


def _starts(table: Tensor, size: int, pieces: Sequence[Sequence[int]]) -> Tensor:
    """The rows that the table lacks, (size - rows, width): each the mean of its pieces, or of the whole table."""
    missing = pieces[len(pieces) - (size - table.shape[0]) :]
    whole = None if all(missing) else _sum(table) / table.shape[0]
    rows = [
        _sum(table[torch.tensor(ids, device=table.device)]) / len(ids) if ids else cast(Tensor, whole)
        for ids in missing
    ]
    return torch.stack(rows).to(torch.bfloat16) if rows else table[:0]


def _sum(rows: Tensor) -> Tensor:
    # float64 holds sums of bfloat16 to more places than the result has, so their order does not matter
    parts = (rows[first : first + PART] for first in range(0, rows.shape[0], PART))
    return torch.stack([part.to(torch.bfloat16).double().sum(0) for part in parts]).sum(0)


def remembered(model: nn.Module) -> Callable[[], None]:
    """What puts every module, parameter and setting back as it is now."""
    modules = [
        (module, dict(module.__dict__), dict(module._modules), dict(module._parameters)) for module in model.modules()
    ]
    data = [(parameter, parameter.data, parameter.requires_grad) for parameter in model.parameters()]
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    parts: list[Any] = [config for config in configs.values() if hasattr(config, "get_text_config")]
    settings = [(config, dict(config.__dict__)) for each in parts for config in (each, each.get_text_config())]

    def undo() -> None:
        for module, fields, children, parameters in modules:
            module.__dict__.clear()
            module.__dict__.update(fields)
            for held, old in ((module._modules, children), (module._parameters, parameters)):
                held.clear()
                cast(dict[str, Any], held).update(old)
        for parameter, values, flag in data:
            parameter.data = values
            parameter.requires_grad_(flag)
        for config, fields in settings:
            config.__dict__.clear()
            config.__dict__.update(fields)

    return undo


def _table(model: nn.Module, path: str) -> nn.Parameter:
    return cast(nn.Parameter, table_of(model, path))
