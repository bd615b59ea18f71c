"""How llama.cpp stores a weight: under which name, and with its rows in which order.

The names are those of the `gguf` package. The order is proved where the base's own GGUF file is given: of the orders
that are known, the one that gives the values in the file. Without it, that of the architectures whose conversion is
known is taken (llama.cpp, convert_hf_to_gguf.py), and all others are refused.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from adapters._errors import AdapterError
from adapters._gguf.reading import GgufFile, require_package

Order = Callable[[Tensor], Tensor]  # of the rows of a weight (n_out, n_in), or of a vector (n_out)

# transformers' model type -> (architecture there, whether rotary halves are interleaved): convert_hf_to_gguf.py's
# LlamaModel, Qwen2Model, Qwen3Model and Gemma2Model. What is not here needs the base's GGUF file, which proves it.
KNOWN = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
    "gemma2": ("gemma2", False),
}
_EXACT, _ROUNDED = 1e-2, 0.2  # relative error of the right order at most: of 16 bits and more; of 4 bits and more


@dataclass(frozen=True)
class Layout:
    """Where the weights of one model are in llama.cpp's files.

    Args:
        architecture: llama.cpp's name for it.
        heads: of the queries and of the keys.
        interleaved: rotary halves are, where no file proves the order.
        base: the base's own file, if it was given.
    """

    architecture: str
    heads: tuple[int, int]
    interleaved: bool
    base: GgufFile | None
    names: Any

    def name(self, path: str) -> str:
        """The name of the parameter at `path`.

        Raises:
            AdapterError: llama.cpp has none.
        """
        found: str | None = self.names.get_name(path, try_suffixes=(".weight", ".bias"))
        if found is None:
            raise AdapterError(f"llama.cpp's architecture {self.architecture!r} has no place for {path}.")
        return found

    def order(self, path: str, weight: Tensor) -> tuple[Order, float | None]:
        """The order of the rows of `weight` (n_out, n_in) in the file, and the relative error that proves it.

        Raises:
            AdapterError: the base's file holds another weight there.
        """
        if self.base is None:
            heads = {"q_proj.weight": self.heads[0], "k_proj.weight": self.heads[1]}
            of_path = next((number for name, number in heads.items() if path.endswith(name)), 0)
            return (partial(interleaved, heads=of_path) if self.interleaved and of_path else torch.clone), None
        orders = self._orders(weight.shape[0])
        limit = _EXACT if self.base.is_exact(self.name(path)) else _ROUNDED
        best, error = self._nearest(self.base, path, [order(weight.float()) for order in orders], limit)
        return orders[best], error

    def stored_as(self, path: str, weight: Tensor, limit: float, new: int = 0) -> tuple[Tensor, float]:
        """A weight as the base's file stores it, in fp32, and its relative difference from the base's there.

        Matrices may have their rows in any order that is known, vectors of norms may be stored as 1 + w (Gemma).

        Args:
            new: rows at the end that the base's file lacks.

        Raises:
            AdapterError: it differs by more than `limit` in every way.
        """
        assert self.base is not None
        w = weight.float()
        if new:
            _, error = self._nearest(self.base, path, [w[:-new]], limit)
            return w.contiguous(), error
        ways = [w, w + 1] if w.dim() == 1 else [order(w) for order in self._orders(w.shape[0])]
        best, error = self._nearest(self.base, path, ways, limit)
        return ways[best].contiguous(), error

    def _nearest(self, base: GgufFile, path: str, ways: list[Tensor], limit: float) -> tuple[int, float]:
        """Which of the ways is nearest to what the base's file holds for `path`, and its relative difference."""
        name = self.name(path)
        held = base.tensor(name)
        if held.shape != ways[0].shape:
            raise AdapterError(
                f"{name} is {list(held.shape)} in {base.path.name}, and {path} is {list(ways[0].shape)}: the file is "
                "of another base."
            )
        errors = [float((way - held).norm() / held.norm().clamp(min=1e-12)) for way in ways]
        best = min(range(len(ways)), key=errors.__getitem__)
        if not errors[best] <= limit:
            raise AdapterError(
                f"{name} of {base.path.name} differs from {path} by {errors[best]:.0%} in whatever order its rows are "
                "taken: the file is of another base."
            )
        return best, errors[best]

    def _orders(self, rows: int) -> list[Order]:
        whole: list[Order] = [torch.clone]
        return whole + [partial(interleaved, heads=heads) for heads in self.heads if rows % (2 * heads) == 0]


def interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows with the two rotary halves of each head interleaved: LlamaModel.permute of convert_hf_to_gguf.py."""
    rows = weight.shape[0]
    return weight.reshape(heads, 2, rows // heads // 2, *weight.shape[1:]).transpose(1, 2).reshape(weight.shape)


def layout_of(config: Any, base: GgufFile | None) -> Layout:
    """The layout of a model with this configuration.

    Raises:
        AdapterError: it is not known, and no file of the base was given.
    """
    require_package()
    import gguf

    text = config.get_text_config()
    if base is not None:
        architecture, turned = base.architecture, False
    elif text.model_type in KNOWN:
        architecture, turned = KNOWN[text.model_type]
    else:
        raise AdapterError(
            f"how llama.cpp stores a {text.model_type!r} model is not known here: pass base_gguf=, the base as a GGUF "
            "file, which shows it."
        )
    kinds = {name: kind for kind, name in gguf.MODEL_ARCH_NAMES.items()}
    if architecture not in kinds:
        raise AdapterError(f"the gguf package knows no architecture {architecture!r}: update it.")
    heads = int(text.num_attention_heads)
    keys = int(getattr(text, "num_key_value_heads", None) or heads)
    names = gguf.get_tensor_name_map(kinds[architecture], int(text.num_hidden_layers))
    return Layout(architecture, (heads, keys), turned, base, names)
