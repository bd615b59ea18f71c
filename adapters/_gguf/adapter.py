"""An attached LoRA as the GGUF adapter that llama.cpp adds to a base (`--lora FILE`).

llama.cpp computes W + (alpha / rank) B A with one alpha for the file and the rank of each tensor (llama-adapter.cpp,
get_scale). Where the scales of our sites differ from that, what is left of them goes into B.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from adapters._attach import Adapter, base_weight, tensors_of, unwrapped
from adapters._contract import WeightMethod, WeightSite
from adapters._errors import AdapterError
from adapters._gguf.layout import Layout, Order, layout_of
from adapters._gguf.reading import GgufFile
from adapters._gguf.writing import write_gguf
from adapters._interop.low_rank import low_rank_adapter
from adapters.methods.lora import LoRA
from adapters.methods.qlora import QLoRA

_TOLERANCE = 1e-5  # of what is read back, relative


@dataclass(frozen=True)
class GgufReport:
    """What was written.

    Args:
        file: its path.
        architecture: llama.cpp's name for the base's.
        tensors: pairs of A and B.
        alpha: the file's.
        bytes: of the file.
        proof: how far the base's own file is from this base at most, relative; None: it was not given.
        notes: what was converted, and what was assumed.
    """

    file: str
    architecture: str
    tensors: int
    alpha: float
    bytes: int
    proof: float | None
    notes: tuple[str, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.file}: {self.tensors} pairs for {self.architecture}, alpha {self.alpha:g}, {self.bytes:,} bytes"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export_gguf(
    model: nn.Module,
    name: str,
    file: str | os.PathLike[str],
    base_gguf: str | os.PathLike[str] | None = None,
) -> GgufReport:
    """Writes the adapter `name` of `model` as a GGUF adapter in fp32, and reads it back.

    Args:
        name: an attached LoRA (or QLoRA) on linear layers that are called.
        file: of the adapter; it must not exist.
        base_gguf: the base as a GGUF file, in any precision: names and orders of rows are then proved by its values,
            and a file of another base is refused.

    Raises:
        AdapterError: llama.cpp cannot express the adapter, or the base's layout there is not known.
    """
    model = unwrapped(model)
    adapter = low_rank_adapter(model, name, "llama.cpp")
    base = GgufFile(base_gguf) if base_gguf is not None else None
    layout = layout_of(model.config, base)
    tensors = tensors_of(model, name)
    alphas = (_scale_of(adapter, site) * _rank(tensors, site) for site in adapter.sites)
    alpha = next((each for each in alphas if each), 1.0)  # llama.cpp takes an alpha of 0 for none, and a scale of 1
    pairs = [_pair(model, adapter, site, tensors, layout, alpha) for site in adapter.sites]
    keys = Counter(pair.key for pair in pairs)
    if keys.most_common(1)[0][1] > 1:
        raise AdapterError(f"two adapted weights would be {keys.most_common(1)[0][0]} in llama.cpp's file: merge it.")

    def fill(writer: Any) -> None:
        import gguf

        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
        writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
        writer.add_name(name)
        for pair in pairs:
            writer.add_tensor(f"{pair.key}.lora_a", pair.a.numpy())
            writer.add_tensor(f"{pair.key}.lora_b", pair.b.numpy())

    def check(written: GgufFile) -> None:
        for pair in pairs:
            _check(written, adapter, pair, tensors)

    size = write_gguf(file, layout.architecture, fill, check)
    proof = max((pair.error for pair in pairs if pair.error is not None), default=None)
    return GgufReport(
        str(Path(file)), layout.architecture, len(pairs), alpha, size, proof, _notes(adapter, tensors, alpha, base)
    )


def _scale_of(adapter: Adapter, site: Any) -> float:
    method = adapter.method.at(site)
    assert isinstance(method, LoRA | QLoRA)
    return method.scale if isinstance(method, LoRA) else method.lora().scale


def _rank(tensors: Mapping[str, Tensor], site: Any) -> int:
    return tensors[f"{site.path}:a"].shape[0]


@dataclass(frozen=True)
class _Pair:
    """A and B of a site under their name in the file, in fp32; `error`: how far the base's file is from the base."""

    site: WeightSite
    key: str
    a: Tensor
    b: Tensor
    order: Order
    error: float | None


def _pair(
    model: nn.Module, adapter: Adapter, site: Any, tensors: Mapping[str, Tensor], layout: Layout, alpha: float
) -> _Pair:
    a, b = (tensors[f"{site.path}:{part}"].detach().float().cpu() for part in "ab")
    order, error = layout.order(site.path, base_weight(model, site).dense().detach().cpu())
    rest = _scale_of(adapter, site) * a.shape[0] / alpha
    return _Pair(site, layout.name(site.path), a.contiguous(), (order(b) * rest).contiguous(), order, error)


def _check(written: GgufFile, adapter: Adapter, pair: _Pair, tensors: Mapping[str, Tensor]) -> None:
    """What llama.cpp will add for a site is the method's own change, in that file's order of rows."""
    a, b = (written.tensor(f"{pair.key}.lora_{part}") for part in "ab")
    theirs = float(written.field("adapter.lora.alpha")) / b.shape[1] * (b @ a)
    method = cast(WeightMethod, adapter.method.at(pair.site))
    p = {part: tensors[f"{pair.site.path}:{part}"].detach().float().cpu() for part in "ab"}
    ours = pair.order(method.weight(torch.zeros(pair.site.shape), p))
    if not (theirs - ours).norm() <= _TOLERANCE * ours.norm():
        raise AdapterError(f"what was written for {pair.site.path} does not read back as the adapter's change.")


def _notes(adapter: Adapter, tensors: Mapping[str, Tensor], alpha: float, base: GgufFile | None) -> tuple[str, ...]:
    notes = []
    others = sum(_scale_of(adapter, site) * _rank(tensors, site) != alpha for site in adapter.sites)
    if others:
        notes.append(f"{others} of {len(adapter.sites)} sites have another scale, which is in their B now")
    if base is None:
        notes.append("the order of rows is llama.cpp's for this type of model; base_gguf= would prove it")
    if isinstance(adapter.method, QLoRA):
        notes.append("trained on a base in 4 bits: llama.cpp's base differs from it by what quantising took")
    return tuple(notes)
