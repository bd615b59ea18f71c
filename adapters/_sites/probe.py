"""Tiny example inputs for a model, by what its forward accepts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from adapters._errors import AdapterError

Example: TypeAlias = Mapping[str, Any] | Sequence[Any] | Tensor | None
ROWS, TOKENS = 2, 12  # rows and tokens differ from each other and from usual widths and head counts


def examples(model: nn.Module, example: Example) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Arguments to try in turn: the caller's, or made up from the signature of the model's forward.

    Raises:
        AdapterError: The model takes neither `input_ids` nor `pixel_values` and no example was given.
    """
    names = inspect.signature(model.forward).parameters
    quiet: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if isinstance(example, Mapping):
        yield (), {**quiet, **example}
    elif example is not None:
        yield (example,) if isinstance(example, Tensor) else tuple(example), quiet
    else:
        # classifiers that read the last token take a single row where the model has no padding token
        single = _setting(model, "pad_token_id") is None and hasattr(model, "num_labels") and hasattr(model, "score")
        for rows in (1,) if single else (ROWS, 1):
            yield (), {**quiet, **_invented(model, set(names), rows)}


def example_inputs(model: nn.Module, example: Example = None) -> dict[str, Any]:
    """Keyword arguments of a tiny forward: the batch with which sites are looked for first."""
    args, kwargs = next(examples(model, example))
    names = list(inspect.signature(model.forward).parameters)
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _invented(model: nn.Module, names: set[str], rows: int) -> dict[str, Any]:
    device, dtype = _placement(model)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or ("pixel_values" in names and "input_ids" not in names):
        return {"pixel_values": _pixels(model, rows).to(device, dtype)}
    if "input_ids" not in names:
        raise AdapterError(
            f"the sites of {type(model).__name__} are found by running it once, and its forward takes neither "
            "input_ids nor pixel_values; pass a small example, as in sites(model, example={'x': tensor})"
        )
    ids = _ids(model, rows).to(device)
    made: dict[str, Any] = {"input_ids": ids}
    if "attention_mask" in names:
        made["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in names and _two_towers(model):
        made["decoder_input_ids"] = ids  # of full length: classifiers mask the decoder's states by the input's ids
    if "bbox" in names:
        made["bbox"] = torch.tensor([1, 1, 3, 3], device=device).expand(rows, TOKENS, 4).clone()
    return made


def _placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device of the input embeddings, and the floating-point type of the first weight that has one."""
    parameters = list(model.parameters())
    try:
        embeddings: Any = getattr(model, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        embeddings = None
    entry = list(embeddings.parameters()) if isinstance(embeddings, nn.Module) else []
    device = next((p.device for p in entry + parameters if p.device.type != "meta"), torch.device("cpu"))
    dtype = next((p.dtype for p in parameters if p.is_floating_point()), torch.float32)
    return device, dtype


def _ids(model: nn.Module, rows: int) -> Tensor:
    """Distinct small token ids, `(rows, TOKENS)`, none of them a usual padding, start or end token but the last."""
    vocabulary = _setting(model, "vocab_size")
    span = max(1, min(int(vocabulary), 1000) - 5) if isinstance(vocabulary, int) else 90
    ids = 5 + (torch.arange(rows * TOKENS) * 7) % span if span > 1 else torch.zeros(rows * TOKENS)
    ids = ids.long().view(rows, TOKENS)
    end = _setting(model, "eos_token_id")
    if isinstance(end, int) and _two_towers(model):
        ids[:, -1] = end  # sequence classifiers of this kind read the state at the end token
    return ids


def _pixels(model: nn.Module, rows: int) -> Tensor:
    size = _setting(model, "image_size")
    height, width = size if isinstance(size, tuple | list) else (size, size)
    sides = [side if isinstance(side, int) else 64 for side in (height, width)]
    channels = _setting(model, "num_channels")
    count = rows * (channels if isinstance(channels, int) else 3) * sides[0] * sides[1]
    return torch.linspace(-1.0, 1.0, count).view(rows, -1, *sides)


def _two_towers(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def _setting(model: nn.Module, name: str) -> Any:
    """A field of the model's configuration, or of the text part's, or None."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (text, config):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    return None
