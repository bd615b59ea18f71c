"""An attached LoRA or DoRA as the folder that mlx-lm reads: `mlx_lm.load(BASE, adapter_path=FOLDER)`.

mlx-lm computes y + scale (x A) B, A (n_in, rank), B (rank, n_out), with one rank and one scale for the folder
(mlx_lm/tuner/lora.py), and scales the rows by m / ||W + scale (A B)^T|| for DoRA (mlx_lm/tuner/dora.py). Smaller ranks
are filled up with zeros, and what is left of another scale goes into B: neither changes what is computed.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from adapters._attach import Adapter, base_parameters, base_weight, tensors_of, unwrapped
from adapters._coded import bits_of
from adapters._contract import WeightSite
from adapters._errors import AdapterError
from adapters._finite import finite
from adapters._interop.low_rank import low_rank_adapter
from adapters._mlx.layout import Chosen, chosen
from adapters._whole import require_new, write_whole
from adapters.methods.dora import DoRA
from adapters.methods.lora import LoRA
from adapters.methods.qlora import QLoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"
_LEAVES = {"a": "lora_a", "b": "lora_b", "magnitude": "m"}  # our names of a site's tensors, and mlx-lm's
_TOLERANCE = 1e-5  # of what is read back, relative


@dataclass(frozen=True)
class MlxReport:
    """What was written.

    Args:
        folder: its path.
        sites: linear layers that change.
        layers: the last so many of the model's layers hold them.
        rank, scale: the folder's.
        bytes: of the tensors' file.
        notes: what was converted, and what was assumed.
    """

    folder: str
    sites: int
    layers: int
    rank: int
    scale: float
    bytes: int
    notes: tuple[str, ...]

    def __str__(self) -> str:
        where = f"{self.folder}: {self.sites} sites in the last {self.layers} layers"
        lines = [f"{where}, rank {self.rank}, scale {self.scale:g}, {self.bytes:,} bytes"]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])


def export_mlx(model: nn.Module, name: str, folder: str | os.PathLike[str]) -> MlxReport:
    """Writes the adapter `name` of `model` as an adapter folder of mlx-lm in fp32, and reads it back.

    The layout is that of mlx_lm/tuner/utils.py, load_adapters.

    Args:
        name: an attached LoRA, QLoRA or DoRA on linear layers that are called.
        folder: of `adapters.safetensors` and `adapter_config.json`; it must not exist, or be empty.

    Raises:
        AdapterError: mlx-lm cannot express the adapter, or its names for this type of model are not known.
    """
    model, target = unwrapped(model), Path(folder)
    require_new(target)
    adapter = low_rank_adapter(model, name, "mlx-lm", dora=True)
    sites = cast("tuple[WeightSite, ...]", tuple(adapter.sites))
    where = chosen(model, sites)
    parts = [_part(model, adapter, site, tensors_of(model, name)) for site in sites]
    rank = max(part.rank for part in parts)
    scale = next((part.lora.scale for part in parts if part.lora.scale), 1.0)
    tensors = {
        f"{path}.{leaf}": tensor
        for path, part in zip(where.paths, parts, strict=True)
        for leaf, tensor in part.stored(rank, scale).items()
    }
    files = {CONFIG: _config(adapter, where, rank, scale), WEIGHTS: safetensors.torch.save(tensors, {"format": "mlx"})}
    _write(target, files, where, parts)
    notes = tuple(_notes(model, where, parts, rank, scale))
    return MlxReport(str(target), len(parts), where.last, rank, scale, len(files[WEIGHTS]), notes)


@dataclass(frozen=True)
class _Part:
    """A site with A (rank, n_in), B (n_out, rank) and DoRA's magnitude (n_out), in fp32, and the low-rank method."""

    site: WeightSite
    lora: LoRA
    p: Mapping[str, Tensor]

    @property
    def rank(self) -> int:
        return self.p["a"].shape[0]

    def stored(self, rank: int, scale: float) -> dict[str, Tensor]:
        """The tensors by mlx-lm's names."""
        more = rank - self.rank
        a = pad(self.p["a"].mT, (0, more))
        b = pad(self.p["b"].mT * (self.lora.scale / scale), (0, 0, 0, more))
        return {_LEAVES[key]: tensor.contiguous() for key, tensor in {**self.p, "a": a, "b": b}.items()}

    def check(self, scale: float, read: Mapping[str, Tensor]) -> None:
        """What mlx-lm will add to the weight, and scale it by, is the method's own; `read` has our names."""
        theirs = scale * (read["a"] @ read["b"]).mT
        ours = self.lora.weight(torch.zeros(self.site.shape), self.p)
        same = (theirs - ours).norm() <= _TOLERANCE * ours.norm()
        if not same or any(not torch.equal(read[key], self.p[key]) for key in self.p.keys() - {"a", "b"}):
            raise AdapterError(f"what was written for {self.site.path} does not read back as the adapter's change.")


def _part(model: nn.Module, adapter: Adapter, site: WeightSite, tensors: Mapping[str, Tensor]) -> _Part:
    keys = ("a", "b", "magnitude") if isinstance(adapter.method, DoRA) else ("a", "b")
    p = {key: tensors[f"{site.path}:{key}"].detach().float().cpu() for key in keys}
    damaged = next((key for key in keys if not finite(p[key])), None)
    if damaged:
        raise AdapterError(f"{adapter.name!r}: the tensor {site.path}:{damaged} holds values that are not finite.")
    method = cast("LoRA | QLoRA | DoRA", adapter.method.at(site))
    part = _Part(site, method if isinstance(method, LoRA) else method.lora(), p)
    if isinstance(method, DoRA):
        changed = part.lora.weight(base_weight(model, site).dense().detach().float().cpu(), p)
        if not changed.any(-1).all():
            raise AdapterError(
                f"{site.path} has a row of zeros, by whose length mlx-lm's DoRA would divide: merge {adapter.name!r}, "
                "and save the model."
            )
    return part


def _config(adapter: Adapter, where: Chosen, rank: int, scale: float) -> bytes:
    low_rank: dict[str, Any] = {"rank": rank, "scale": scale, "dropout": 0.0, "keys": list(where.keys)}
    kind = "dora" if isinstance(adapter.method, DoRA) else "lora"
    content = {"fine_tune_type": kind, "num_layers": where.last, "lora_parameters": low_rank}
    return (json.dumps(content, indent=2) + "\n").encode()


def _write(target: Path, files: Mapping[str, bytes], where: Chosen, parts: list[_Part]) -> None:
    """Everything in a folder beside `target`, read back there, then one rename."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent, ignore_cleanup_errors=True) as work:
        staged = Path(work) / "adapter"
        staged.mkdir()
        for file, content in files.items():
            write_whole(staged / file, content)
        read = safetensors.torch.load_file(staged / WEIGHTS)
        scale = json.loads((staged / CONFIG).read_text())["lora_parameters"]["scale"]
        for path, part in zip(where.paths, parts, strict=True):
            part.check(scale, {key: read[f"{path}.{_LEAVES[key]}"] for key in part.p})
        if target.is_dir():
            target.rmdir()  # empty; a rename onto it is refused on Windows
        os.replace(staged, target)


def _notes(model: nn.Module, where: Chosen, parts: list[_Part], rank: int, scale: float) -> list[str]:
    notes = []
    others = sum(part.lora.scale != scale for part in parts)
    if others:
        notes.append(f"{others} of {len(parts)} sites have another scale, which is in their B now")
    smaller = sum(part.rank < rank for part in parts)
    if smaller:
        notes.append(f"{smaller} of {len(parts)} sites have a smaller rank, filled up with zeros to {rank}")
    if where.rooted:
        notes.append("the layers differ in what is adapted: keys are paths from the model's root, which mlx-lm reads")
    bits = max(map(bits_of, base_parameters(model).values()), default=0)
    if bits:
        notes.append(f"the base here is in {bits} bits: mlx-lm's differs from it by what quantising took")
    return notes
