"""A small batch for a model of a pair: two rows of unlike tokens, or two pictures."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import nn

from tests.matrix.pairs import Pair

ROWS, TOKENS, CHOICES = 2, 12, 3


def batch_for(pair: Pair, model: nn.Module) -> dict[str, Any]:
    """Keyword arguments of one forward, without labels."""
    generator = torch.Generator().manual_seed(0)
    names = inspect.signature(model.forward).parameters
    config: Any = model.config
    if pair.type in _UNUSUAL:
        return _UNUSUAL[pair.type](generator)
    if pair.head == "image" or ("pixel_values" in names and "input_ids" not in names):
        return _pictures(model, generator)
    low, high = 5, max(6, min(_vocabulary(config), 100))
    books = getattr(config, "num_codebooks", 1) if pair.type in _CODEBOOKS else 1
    shape = (ROWS, CHOICES, TOKENS) if pair.head == "choice" else (ROWS * books, TOKENS)
    ids = torch.randint(low, high, shape, generator=generator)
    if pair.head in ("sequence", "encoder") and getattr(config, "is_encoder_decoder", False):
        ids[..., -1] = _end(config)  # these classifiers read the state at the end token
    made: dict[str, Any] = {"input_ids" if "input_ids" in names else "inputs": ids}
    if "attention_mask" in names:
        made["attention_mask"] = torch.ones(shape, dtype=torch.long)
    if "use_cache" in names or hasattr(config, "use_cache"):
        made["use_cache"] = False
    if getattr(config, "is_encoder_decoder", False) and "decoder_input_ids" in names:
        length = TOKENS // 2 if pair.head == "seq2seq" else TOKENS
        made["decoder_input_ids"] = ids[:, :length].clone()
    if "bbox" in names:
        made["bbox"] = torch.tensor([1, 1, 3, 3]).expand(*shape, 4).clone()
    if pair.type == "longformer" and pair.head == "question":
        ids[:, [3, 5, 11]] = config.sep_token_id  # the question ends at the first separator
    return made


def _pictures(model: nn.Module, generator: torch.Generator) -> dict[str, Any]:
    config: Any = model.config
    size = getattr(config, "image_size", None) or 64
    size = size[0] if isinstance(size, list | tuple) else size
    size = size if isinstance(size, int) else 64
    channels = getattr(config, "num_channels", 3) or 3
    return {"pixel_values": torch.randn(ROWS, channels, size, size, generator=generator)}


def _vocabulary(config: Any) -> int:
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for part in (text, config):
        for name in ("vocab_size", "src_vocab_size", "tgt_vocab_size"):
            if isinstance(getattr(part, name, None), int):
                return int(getattr(part, name))
    return 128


def _end(config: Any) -> int:
    end = getattr(config, "eos_token_id", None)
    return end if isinstance(end, int) else 2


def _patches(generator: torch.Generator) -> dict[str, Any]:
    return {
        "pixel_values": torch.randn(ROWS, 16, 768, generator=generator),
        "pixel_attention_mask": torch.ones(ROWS, 16, dtype=torch.long),
        "spatial_shapes": torch.tensor([[4, 4]] * ROWS),
    }


def _colours(generator: torch.Generator) -> dict[str, Any]:
    return {"input_ids": torch.randint(0, 100, (ROWS, 16), generator=generator)}


_CODEBOOKS = ("musicgen", "musicgen_melody")  # a row of ids per codebook
# inputs that the signature does not tell, by type
_UNUSUAL = {"siglip2": _patches, "imagegpt": _colours}
