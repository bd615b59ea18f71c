"""How sure a difference measured on few rows is."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from adapters._errors import AdapterError


def paired_interval(
    base: Sequence[bool], adapted: Sequence[bool], resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """The 95 % interval of `mean(adapted) - mean(base)`, by resampling rows (Efron, 1979: percentile bootstrap).

    Paired: both models answered the same rows, so a row is drawn with both of its answers.

    >>> paired_interval([False] * 4, [True] * 4)
    (1.0, 1.0)
    """
    if len(base) != len(adapted) or not base:
        raise AdapterError(f"a paired interval needs equally many rows, found {len(base)} and {len(adapted)}.")
    difference = torch.tensor(adapted, dtype=torch.float64) - torch.tensor(base, dtype=torch.float64)
    draws = torch.randint(len(base), (resamples, len(base)), generator=torch.Generator().manual_seed(seed))
    means = difference[draws].mean(1).sort().values
    return float(means[int(0.025 * resamples)]), float(means[int(0.975 * resamples) - 1])
