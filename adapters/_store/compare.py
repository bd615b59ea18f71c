"""Whether two samples are of one weight, across fp32, bf16, fp16, int8 and nf4: compares codes, never distances.

The more precise side is brought to the coarser format and the codes are counted that differ. nf4 rounds so coarsely
that a distance says nothing (its own noise is 7.7 % of a weight; noise and a 1 % change together are 7.9 %), but its
codes do: the same weight gives the same codes, and a 1 % change moves 3 % of them over a boundary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from adapters._eightbit import LARGEST
from adapters._store.sample import BLOCK, Sample

# the 16 levels of nf4: QLoRA, arXiv 2305.14314, appendix E
NF4 = torch.tensor(
    [
        *[-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453],
        *[-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0],
        *[0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224],
        *[0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0],
    ]
)
EDGES = (NF4[1:] + NF4[:-1]) / 2
ROUNDED_FIRST = 256  # rounding to bf16 first moves a number by a part of up to this, and its int8 code by as much
BESIDE_CODES = 0.04  # of fp16 values, may be no number that int8 codes made by way of bf16 stand for
VAGUE = 0.1  # of nf4 codes, may be others after rounding to int8
MANTISSA = {"float64": 52, "float32": 23, "bfloat16": 7, "float16": 10}


@dataclass(frozen=True)
class Difference:
    """What two samples of one parameter differ in: `moved` of `count` values, and `scale`, the median ratio less 1.

    `coarse` says that nf4 codes were compared, of which a few may differ after another rounding path. `explained`: how
    many at most, where that is known. `vague`: so many that they would hide a change of 1 %.
    """

    path: str
    count: int
    moved: int
    scale: float = 0.0
    coarse: bool = False
    explained: float | None = None
    vague: bool = False

    @property
    def rate(self) -> float:
        return self.moved / self.count if self.count else 0.0


def compare(path: str, a: Sample, b: Sample) -> Difference | None:
    """How far two samples of the same blocks differ, or None where their formats cannot be compared."""
    if not (a.comparable and b.comparable):
        return Difference(path, 1, int(not torch.equal(a.values, b.values))) if a.dtype == b.dtype else None
    if a.values.shape != b.values.shape:
        return None
    if "int8" in (a.dtype, b.dtype):
        return _rowwise(path, *((a, b) if a.dtype == "int8" else (b, a)))
    if a.floating and b.floating:
        return _floats(path, a, b)
    if a.dtype == b.dtype:
        return _codes(path, a.values, a.absmax, b.values, b.absmax)
    fine, coarse = (a, b) if a.floating else (b, a)
    # which 16-bit format the weight passed through on its way to 4 bits is not known: the closest one counts
    paths = [fine.values.float(), fine.values.bfloat16().float(), fine.values.half().float()]
    found = [_quantised(path, values, coarse) for values in paths if torch.isfinite(values).all()]
    return min(found, key=lambda difference: difference.moved) if found else Difference(path, 1, 1)


def _floats(path: str, a: Sample, b: Sample) -> Difference:
    """Counts the values that no single number rounds to; in one format, all that differ beyond a double rounding."""
    x, y = a.values.double(), b.values.double()
    apart = (x - y).abs() > 1.13 * (_half(x, a.dtype) + _half(y, b.dtype)) + 2**-25  # 1.13: by way of fp16
    moved = int((apart | (x.isfinite() != y.isfinite())).sum())
    if a.dtype == b.dtype:
        # rounding first to fp16 and then to bf16 differs from rounding once in 1 value of 16, give or take 6 deviations
        twice = x.numel() / 16
        explained = a.dtype == "bfloat16" and int((x != y).sum()) <= twice + 6 * twice**0.5 + 2
        moved = moved if explained else int((x != y).sum())
    return Difference(path, x.numel(), moved)


def _rowwise(path: str, a: Sample, b: Sample) -> Difference:
    """`a` in 8 bits beside the same in any format."""
    assert a.absmax is not None
    x, half = a.values.double() * a.absmax.double() / LARGEST, a.absmax.double() / (2 * LARGEST)
    if b.dtype == "int8":
        return _rowwise_codes(path, a, b)
    if not b.floating:
        found = _quantised(path, x.float(), b)
        return replace(found, explained=VAGUE * found.count, vague=True)
    # by way of which 16-bit format its codes were made of it is not known: the closest one counts
    paths = [b.values.double(), b.values.bfloat16().double(), b.values.half().double()]
    apart = [(x - y).abs() > half + _half(y, "float16") + 1.13 * _half(y, b.dtype) + 2**-25 for y in paths]
    moved = min(int((each | ~y.isfinite()).sum()) for each, y in zip(apart, paths, strict=True))
    return Difference(path, x.numel(), moved, explained=BESIDE_CODES * x.numel())


def _rowwise_codes(path: str, a: Sample, b: Sample) -> Difference:
    assert a.absmax is not None
    assert b.absmax is not None
    live = (a.absmax > 0) & (b.absmax > 0)
    if not live.any():
        return Difference(path, 0, 0, explained=0.0)
    one, other = a.values[live].short(), b.values[live].short()
    ratio = float((a.absmax[live] / b.absmax[live]).median())
    usual = float(one.abs().sum()) / ROUNDED_FIRST
    moved = int((one != other).sum())
    return Difference(path, one.numel(), moved, abs(ratio - 1), explained=usual + 3 * usual**0.5 + 4)


def _half(x: Tensor, dtype: str) -> Tensor:
    """Half the distance between neighbours of `x` in a format: how far the number may be that was rounded to `x`."""
    _, exponent = torch.frexp(x)
    smallest = -14 if dtype == "float16" else -126
    exponent = torch.where(x == 0, smallest, exponent - 1).clamp(min=smallest)
    return torch.ldexp(torch.ones_like(x), exponent - MANTISSA[dtype] - 1)


def _quantised(path: str, values: Tensor, coarse: Sample) -> Difference:
    absmax = values.abs().amax(-1)
    # blocks larger than ours cannot be rebuilt from a sample; their recorded scale then stands in
    scale = absmax if coarse.blocksize == BLOCK or coarse.absmax is None else coarse.absmax
    codes = torch.bucketize(values / scale[:, None].clamp(min=1e-30), EDGES)
    return _codes(path, codes, scale, coarse.values, coarse.absmax)


def _codes(path: str, a: Tensor, a_max: Tensor | None, b: Tensor, b_max: Tensor | None) -> Difference:
    assert a_max is not None
    assert b_max is not None
    live = (a_max > 1e-12) & (b_max > 1e-12)  # a block of zeros has no codes
    if not live.any():
        return Difference(path, 0, 0, coarse=True)
    moved = int((a[live].long() != b[live].long()).sum())
    ratio = float((a_max[live] / b_max[live]).median())
    return Difference(path, a[live].numel(), moved, abs(ratio - 1), coarse=True)
