"""Reads a few blocks of a base parameter exactly as they are stored, without dequantising or copying the rest.

Matrices are read in the orientation `(n_out, n_in)`, flattened, in blocks of 64 that coincide with nf4's, so that a
weight and its 4- or 8-bit form give the same elements.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adapters._eightbit import codes_and_scales, in_eight_bits
from adapters._errors import AdapterError, DamagedAdapter
from adapters._layers import is_conv1d
from adapters._sharded import whole

BLOCK = 64
FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}


@dataclass(frozen=True)
class Sample:
    """Blocks of one parameter: `values (blocks, 64)` in a floating-point dtype, or codes with their `absmax`.

    nf4 has an absmax for each block, int8 for each row of the matrix: `absmax (blocks, 64)` is then each code's own.
    Any other storage (`dtype` none of these) keeps its bytes as `values`, which compare only for equality.
    """

    shape: tuple[int, ...]
    dtype: str
    values: Tensor
    absmax: Tensor | None = None
    blocksize: int = BLOCK

    @property
    def floating(self) -> bool:
        return self.dtype in FLOATS

    @property
    def comparable(self) -> bool:
        return self.floating or self.absmax is not None

    def record(self) -> dict[str, Any]:
        found: dict[str, Any] = {"shape": list(self.shape), "dtype": self.dtype, "data": _text(_packed(self))}
        if self.dtype == "int8" and self.absmax is not None:
            found |= {"absmax": _text(_of_rows(self))}
        elif self.absmax is not None:
            found |= {"absmax": _text(self.absmax), "blocksize": self.blocksize}
        return found


def blocks(numel: int, count: int) -> list[int]:
    """Which blocks are read: evenly spread, each shifted within its stretch so that no column is always the same."""
    total = numel // BLOCK
    stretch = max(1, total // count) if count else 1
    chosen = {min(i * total // count + i * 2654435761 % stretch, total - 1) for i in range(count)} if total else set()
    return sorted(chosen)


def sample(module: nn.Module, parameter: nn.Parameter, count: int, path: str) -> Sample:
    """Reads up to `count` blocks of 64 elements of a parameter of `module`.

    Raises:
        AdapterError: the weight is on the meta device, or bitsandbytes has repacked it in place.
    """
    if parameter.device.type == "meta":
        raise AdapterError(f"{path} has no values (it is on the meta device), so the base cannot be recognised.")
    state = getattr(parameter, "quant_state", None)
    if state is not None and hasattr(state, "quant_type"):
        return _quantised(parameter.detach(), state, count, path)
    if in_eight_bits(parameter):
        return _rowwise(module, count)
    stored = whole(parameter.detach())
    name = str(stored.dtype).removeprefix("torch.")
    if name not in FLOATS:
        flat = stored.reshape(-1).view(torch.uint8)[: count * BLOCK]
        return Sample(tuple(stored.shape), name, flat.cpu().clone())
    if is_conv1d(module) and stored.dim() == 2:
        stored = stored.mT  # Conv1D stores (n_in, n_out)
    return Sample(tuple(stored.shape), name, _gather(stored, count).cpu())


def _gather(stored: Tensor, count: int) -> Tensor:
    numel = stored.numel()
    if numel < BLOCK:
        return stored.reshape(-1, max(1, numel)).clone()
    starts = torch.tensor(blocks(numel, count), dtype=torch.long, device=stored.device) * BLOCK
    index = starts[:, None] + torch.arange(BLOCK, device=stored.device)
    matrix = stored.reshape(-1, stored.shape[-1]) if stored.dim() != 2 else stored
    return matrix[index // matrix.shape[1], index % matrix.shape[1]]


def _quantised(packed: Tensor, state: Any, count: int, path: str) -> Sample:
    if getattr(state, "packing_format_for_cpu", False):
        raise AdapterError(
            f"{path} was repacked in place by a bitsandbytes forward on this CPU; load the base again with "
            "adapters.load_base, which turns that off."
        )
    shape = tuple(int(n) for n in state.shape)
    chosen = torch.tensor(blocks(torch.Size(shape).numel(), count), dtype=torch.long, device=packed.device)
    data = packed.contiguous().view(torch.uint8).reshape(-1)
    data = data[chosen[:, None] * (BLOCK // 2) + torch.arange(BLOCK // 2, device=packed.device)]
    if state.quant_type != "nf4":
        return Sample(shape, str(state.quant_type), data.cpu().reshape(-1))
    return Sample(shape, "nf4", _unpack(data).cpu(), _absmax(state, chosen), int(state.blocksize))


def _rowwise(layer: nn.Module, count: int) -> Sample:
    codes, scales = codes_and_scales(layer)
    values, rows = _gather(codes, count).cpu(), _rows(codes.shape, count)
    return Sample(tuple(codes.shape), "int8", values, scales.float().cpu()[rows])


def _rows(shape: Sequence[int], count: int) -> Tensor:
    """The row of each sampled element, in the shape of the samples."""
    numel = shape[0] * shape[1]
    if numel < BLOCK:
        return torch.arange(numel).reshape(-1, max(1, numel)) // max(1, shape[1])
    starts = torch.tensor(blocks(numel, count), dtype=torch.long) * BLOCK
    return (starts[:, None] + torch.arange(BLOCK)) // shape[1]


def _of_rows(found: Sample) -> Tensor:
    """The scales of the sampled rows, each once, in their order."""
    assert found.absmax is not None
    return found.absmax.reshape(-1)[_first(_rows(found.shape, len(found.values)))]


def _restored_rows(shape: tuple[int, ...], codes: Tensor, scales: Tensor) -> Sample:
    values = codes.view(torch.int8).reshape(-1, max(1, min(BLOCK, codes.numel())))
    index = _first(_rows(shape, len(values))).cumsum(0) - 1
    return Sample(shape, "int8", values, scales[index].reshape(values.shape))


def _first(rows: Tensor) -> Tensor:
    """Where each row is met first, among the flattened elements of the samples."""
    rows = rows.reshape(-1)
    return torch.cat([torch.ones_like(rows[:1], dtype=torch.bool), rows[1:] != rows[:-1]])


def _absmax(state: Any, chosen: Tensor) -> Tensor:
    """The scales of the chosen blocks, fp32; with double quantisation only those are dequantised."""
    index = (chosen * BLOCK // state.blocksize).to(state.absmax.device)
    found: Tensor = state.absmax[index]
    if state.nested:
        inner = state.state2
        found = inner.code[found.long()].float() * inner.absmax[index // inner.blocksize].float() + state.offset
    return found.float().cpu()


def _unpack(data: Tensor) -> Tensor:
    return torch.stack([data >> 4, data & 15], -1).reshape(data.shape[0], -1)


def _packed(found: Sample) -> Tensor:
    return found.values[:, 0::2] << 4 | found.values[:, 1::2] if found.dtype == "nf4" else found.values


def _text(values: Tensor) -> str:
    return base64.b64encode(values.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).decode()


def restore(entry: Mapping[str, Any], path: str) -> Sample:
    """The sample that `record` wrote.

    Raises:
        DamagedAdapter: the record is not one.
    """
    try:
        shape, dtype = tuple(int(n) for n in entry["shape"]), str(entry["dtype"])
        raw = _bytes(entry["data"])
        if dtype in FLOATS:
            values = raw.view(FLOATS[dtype])
            return Sample(shape, dtype, values.reshape(-1, max(1, min(BLOCK, values.numel()))))
        if dtype == "int8" and "absmax" in entry:
            return _restored_rows(shape, raw, _bytes(entry["absmax"]).view(torch.float32))
        if dtype != "nf4":
            return Sample(shape, dtype, raw)
        absmax = _bytes(entry["absmax"]).view(torch.float32)
        return Sample(shape, dtype, _unpack(raw.reshape(-1, BLOCK // 2)), absmax, int(entry["blocksize"]))
    except (KeyError, IndexError, TypeError, ValueError, RuntimeError, binascii.Error) as error:
        raise DamagedAdapter(f"the record of the base's {path} cannot be read.") from error


def _bytes(text: str) -> Tensor:
    found = bytearray(base64.b64decode(text, validate=True))
    return torch.frombuffer(found, dtype=torch.uint8) if found else torch.empty(0, dtype=torch.uint8)
