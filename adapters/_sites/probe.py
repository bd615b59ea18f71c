"""Tiny example inputs for a model, by what its forward accepts."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from adapters._errors import AdapterError
from adapters._sites.rows import ALIKE, COUNT, OTHER

Example: TypeAlias = Mapping[str, Any] | Sequence[Any] | Tensor | None
TOKENS, CHOICES = 12, 2  # tokens differ in number from rows and from usual widths and head counts


@dataclass(frozen=True)
class Probe:
    """Arguments of one forward. `rows` counts its rows, where the first and the third are the same, else it is 0."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: int = 0


def probes(model: nn.Module, example: Example) -> Iterator[Probe]:
    """Forwards to try in turn: the caller's, or made up from the signature of the model's forward.

    Raises:
        AdapterError: The model takes neither `input_ids` nor `pixel_values` and no example was given.
    """
    names = inspect.signature(model.forward).parameters
    quiet: dict[str, Any] = {"use_cache": False} if "use_cache" in names else {}
    if example is not None:
        args, kwargs = _arguments(example)
        kwargs = {**quiet, **kwargs}
        alike = _with_alike_rows(args, kwargs)
        if alike is not None:
            yield alike
        yield Probe(args, kwargs)
        return
    books = setting(model, "num_codebooks")  # audio decoders take a row of ids per codebook
    many = COUNT * books if isinstance(books, int) else COUNT
    # classifiers without a way to pad take a single row; multiple choice takes three axes
    for rows, choices in ((COUNT, 0), (1, 0), (COUNT, CHOICES), (many, 0)):
        yield Probe((), {**quiet, **_invented(model, set(names), rows, choices)}, COUNT if rows >= COUNT else 0)


@contextmanager
def padded(model: nn.Module) -> Iterator[None]:
    """Gives a model without a padding token one meanwhile: classifiers that read the last token refuse to guess it."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    without = [part for part in {id(text): text, id(config): config}.values() if _lacks_padding(part)]
    try:
        for part in without:
            part.pad_token_id = 0
        yield
    finally:
        for part in without:
            part.pad_token_id = None


def _lacks_padding(config: Any) -> bool:
    return hasattr(config, "pad_token_id") and config.pad_token_id is None


def _arguments(example: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Mapping):
        return (), dict(example)
    return ((example,) if isinstance(example, Tensor) else tuple(example)), {}


def _with_alike_rows(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Probe | None:
    """The caller's example with its first row, its second and its first again, where it has two rows."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and t.dim() > 0]
    rows = Counter(t.shape[0] for t in tensors).most_common(1)[0][0] if tensors else 0
    if rows < 2:
        return None
    order = torch.tensor([0 if row in ALIKE else 1 for row in range(COUNT)])

    def picked(value: Any) -> Any:
        fits = isinstance(value, Tensor) and value.dim() > 0 and value.shape[0] == rows
        return value.index_select(0, order.to(value.device)) if fits else value

    return Probe(tree_map(picked, args), tree_map(picked, kwargs), COUNT)


def _invented(model: nn.Module, names: set[str], rows: int, choices: int) -> dict[str, Any]:
    device, dtype = _placement(model)
    main = getattr(model, "main_input_name", "input_ids")
    if main == "pixel_values" or ("pixel_values" in names and "input_ids" not in names):
        return {"pixel_values": _pixels(model, rows).to(device, dtype)}
    tokens = next((name for name in ("input_ids", "inputs") if name in names), None)
    if tokens is None:
        raise AdapterError(
            f"the sites of {type(model).__name__} are found by running it once, and its forward takes neither "
            "input_ids nor pixel_values; pass a small example, as in sites(model, example={'x': tensor})"
        )
    ids = _ids(model, rows).to(device)
    if choices:  # (rows, choices, tokens): multiple choice
        ids = torch.stack([ids, *(ids.roll(choice + 1, -1) for choice in range(choices - 1))], 1)
    made: dict[str, Any] = {tokens: ids}
    if "attention_mask" in names:
        made["attention_mask"] = torch.ones_like(ids)
    if "decoder_input_ids" in names and _two_towers(model):
        made["decoder_input_ids"] = ids  # of full length: classifiers mask the decoder's states by the input's ids
    if "bbox" in names:
        made["bbox"] = _boxes(ids)
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
    """Distinct small token ids, `(rows, TOKENS)`, none of them a usual padding, start or end token but the last.

    The first row and the third are the same.
    """
    vocabulary = setting(model, "vocab_size")
    span = max(1, min(int(vocabulary), 1000) - 5) if isinstance(vocabulary, int) else 90
    two = 5 + (torch.arange(2 * TOKENS) * 7) % span if span > 1 else torch.zeros(2 * TOKENS)
    two = two.long().view(2, TOKENS)
    ids = _alike(two, rows)
    end = setting(model, "eos_token_id")
    if isinstance(end, int) and _two_towers(model):
        ids[:, -1] = end  # sequence classifiers of this kind read the state at the end token
    return ids


def _pixels(model: nn.Module, rows: int) -> Tensor:
    size = setting(model, "image_size")
    height, width = size if isinstance(size, tuple | list) else (size, size)
    sides = [side if isinstance(side, int) else 64 for side in (height, width)]
    channels = setting(model, "num_channels")
    count = 2 * (channels if isinstance(channels, int) else 3) * sides[0] * sides[1]
    noise = torch.sin(torch.arange(count, dtype=torch.float64) ** 2).float()  # no picture that a norm could level
    return _alike(noise.view(2, -1, *sides), rows)


def _boxes(ids: Tensor) -> Tensor:
    """A box per token, (..., 4): those of the odd row out are others."""
    boxes = torch.tensor([1, 1, 3, 3], device=ids.device).repeat(*ids.shape, 1)
    if len(ids) == COUNT:
        boxes[OTHER] += 2
    return boxes


def _alike(two: Tensor, rows: int) -> Tensor:
    """Rows of two kinds in the order that tells them apart: the first and the third are the same."""
    return torch.stack([two[1 if row * COUNT // max(rows, COUNT) == OTHER else 0] for row in range(rows)])


def _two_towers(model: nn.Module) -> bool:
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def setting(model: nn.Module, name: str) -> Any:
    """A field of the model's configuration, or of the text part's, or None."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (text, config):
        if getattr(part, name, None) is not None:
            return getattr(part, name)
    return None
