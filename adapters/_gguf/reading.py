"""A GGUF file, read through the `gguf` package."""

from __future__ import annotations

import importlib.util
import os
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adapters._errors import AdapterError


def require_package() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise AdapterError('GGUF files need the package gguf: pip install "adapter-registry[models]".')


class GgufFile:
    """Fields and tensors of a file, which stays on the disk.

    Raises:
        AdapterError: it is no GGUF file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        require_package()
        from gguf import GGUFReader

        self.path = Path(path)
        try:
            self.reader = GGUFReader(self.path)
        except (OSError, ValueError, IndexError, KeyError) as error:
            raise AdapterError(f"{self.path} cannot be read as a GGUF file: {error}") from error

    @cached_property
    def tensors(self) -> dict[str, Any]:
        return {tensor.name: tensor for tensor in self.reader.tensors}

    def field(self, key: str) -> Any:
        """The value of a field, or None."""
        found = self.reader.get_field(key)
        return None if found is None else found.contents()

    @property
    def architecture(self) -> str:
        return str(self.field("general.architecture"))

    def is_exact(self, name: str) -> bool:
        """Whether a tensor has 16 bits an element or more."""
        from gguf import GGMLQuantizationType as Kind

        return self.tensors[name].tensor_type in (Kind.F32, Kind.F16, Kind.BF16)

    def tensor(self, name: str) -> Tensor:
        """A tensor in fp32, in torch's order of axes.

        Raises:
            AdapterError: the file has none of this name.
        """
        from gguf.quants import dequantize

        if name not in self.tensors:
            raise AdapterError(f"{self.path.name} holds no {name}: the file is of another base.")
        held = self.tensors[name]
        return torch.from_numpy(dequantize(held.data, held.tensor_type).copy()).float()
