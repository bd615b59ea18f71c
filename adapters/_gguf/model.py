"""A whole model in the form of its base's GGUF file: that file's tokenizer and settings, this model's weights."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adapters._attach import adapters_of, table_paths, unwrapped
from adapters._coded import bits_of
from adapters._errors import AdapterError
from adapters._gguf.layout import layout_of
from adapters._gguf.reading import GgufFile
from adapters._gguf.vocabulary import NewTokens, new_tokens
from adapters._gguf.writing import write_gguf

DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
_OWN = ("GGUF.", "general.architecture", "general.file_type", "general.quantization_version")
_FAR = 0.5  # relative difference of a weight from the base's file, above which it is another model's


@dataclass(frozen=True)
class ModelReport:
    """What was written.

    Args:
        file: its path.
        architecture: llama.cpp's name for the model's.
        tensors: how many.
        difference: between a weight and that of the base's file at most, relative: what the file lost when it was
            quantised, and what was merged.
        copied: tensors that are no parameter of the model, taken from the base's file.
        dtype: of the matrices.
        bytes: of the file.
        tokens: that the base's file lacked.
    """

    file: str
    architecture: str
    tensors: int
    difference: float
    copied: tuple[str, ...]
    dtype: str
    bytes: int
    tokens: tuple[str, ...] = ()

    def __str__(self) -> str:
        more = f", {len(self.tokens)} new tokens" if self.tokens else ""
        copied = f", {', '.join(self.copied)} taken from the base's file" if self.copied else ""
        return (
            f"{self.file}: {self.tensors} tensors for {self.architecture} in {self.dtype}, {self.bytes:,} bytes; they "
            f"differ from the base's file by at most {self.difference:.1%}{copied}{more}"
        )


def export_model(
    model: nn.Module,
    file: str | os.PathLike[str],
    base_gguf: str | os.PathLike[str],
    dtype: str = "bfloat16",
    tokenizer: Any = None,
) -> ModelReport:
    """Writes a model without adapters, such as a merged one, for llama.cpp, and reads it back.

    Tokenizer, chat template and settings are those of the base's file, which also shows how its weights are stored.

    Args:
        model: dense, with nothing attached.
        file: of the model; it must not exist.
        base_gguf: the model that this one was made of, as a GGUF file in any precision.
        dtype: of the matrices, "float32", "float16" or "bfloat16"; vectors are in fp32.
        tokenizer: says what the tokens are that the model has and the base's file lacks, as after `add_tokens`.

    Raises:
        AdapterError: an adapter is attached, weights are in 4 bits, or the file is of another base.
    """
    model = unwrapped(model)
    if adapters_of(model):
        raise AdapterError(f"{', '.join(adapters_of(model))} is attached: merge it first, or detach it.")
    if dtype not in DTYPES:
        raise AdapterError(f"dtype is {dtype!r}; choose one of {', '.join(DTYPES)}.")
    held = _parameters(model)
    base = GgufFile(base_gguf)
    layout = layout_of(model.config, base)
    sources = {layout.name(path): path for path in held}
    tables = table_paths(model)
    added = new_tokens(base, held[tables[0]].shape[0], tokenizer)
    new = dict.fromkeys(tables, added.added)
    missing = sources.keys() - base.tensors.keys()
    if missing:
        raise AdapterError(f"{base.path.name} has no {min(missing)}, which this model has: it is of another base.")
    copied = tuple(sorted(base.tensors.keys() - sources.keys()))
    differences = []

    def made(name: str) -> Tensor:
        path = sources[name]
        tensor, difference = layout.stored_as(path, held[path], _FAR, new.get(path, 0))
        differences.append(difference)
        return tensor

    def fill(writer: Any) -> None:
        _fields(writer, base, dtype, added)
        for name in base.tensors:
            if name in sources:
                _add(writer, name, made(name), dtype)
            else:
                raw = base.tensors[name]
                writer.add_tensor(name, raw.data, raw_dtype=raw.tensor_type)

    def check(written: GgufFile) -> None:
        rounding = torch.finfo(getattr(torch, dtype)).eps
        for name, path in sources.items():
            expected, _ = layout.stored_as(path, held[path], _FAR, new.get(path, 0))
            if not (written.tensor(name) - expected).norm() <= rounding * expected.norm():
                raise AdapterError(f"what was written for {path} does not read back as the model's weight.")

    size = write_gguf(file, layout.architecture, fill, check)
    return ModelReport(
        str(Path(file)), layout.architecture, len(base.tensors), max(differences), copied, dtype, size, added.named
    )


def _parameters(model: nn.Module) -> dict[str, Tensor]:
    """The weights by path, on the CPU; of tied ones the first."""
    found: dict[str, Tensor] = {}
    for path, parameter in model.named_parameters():  # which leaves out what is tied
        if bits := bits_of(parameter):
            raise AdapterError(
                f"{path} is in {bits} bits: adapters.merge makes the model dense, or load the base in 16 bits."
            )
        found[path] = parameter.detach().cpu()
    return found


def _fields(writer: Any, base: GgufFile, dtype: str, added: NewTokens) -> None:
    """The base's own fields, but for those that say how its tensors are stored."""
    import gguf

    for key, field in base.reader.fields.items():
        if key.startswith(_OWN):
            continue
        kind, of_items = field.types[0], field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        value = added.extended(key, field.contents(), base.architecture)
        writer.add_key_value(key, value, kind, sub_type=of_items)
    names = {"float32": "ALL_F32", "float16": "MOSTLY_F16", "bfloat16": "MOSTLY_BF16"}
    writer.add_file_type(int(gguf.LlamaFileType[names[dtype]]))


def _add(writer: Any, name: str, tensor: Tensor, dtype: str) -> None:
    import gguf
    from gguf.quants import quantize

    kind = gguf.GGMLQuantizationType[DTYPES[dtype] if tensor.dim() > 1 else "F32"]
    writer.add_tensor(name, quantize(tensor.numpy(), kind), raw_dtype=kind)
