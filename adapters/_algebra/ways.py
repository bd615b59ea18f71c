"""Ways to make one change out of several weighted ones, at one site.

The first three work on the factors of low-rank changes and never form a dense matrix; the others, PEFT's own functions,
choose among the elements of dense changes W' - W, so that their result has no low rank until it is approximated.
"""

from __future__ import annotations

import hashlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from adapters._algebra.thin import summed, wide
from adapters._contract import Factors, require
from adapters._errors import AdapterError, nearest

Terms: TypeAlias = Sequence[tuple[float, Factors]]
Majority = Literal["total", "frequency"]
OF_FACTORS = ("cat", "svd", "linear")
OF_ELEMENTS = ("ties", "dare_linear", "dare_ties", "magnitude_prune")
HOWS = (*OF_FACTORS, *OF_ELEMENTS)


@dataclass(frozen=True)
class Way:
    """How to combine, every setting checked against what this way takes."""

    how: str = "cat"
    rank: int | None = None
    density: float | None = None
    majority: str = "total"
    seed: int = 0

    def __post_init__(self) -> None:
        known = f"ways here: {', '.join(HOWS)}."
        require(self.how in HOWS, f"how is {self.how!r}{nearest(str(self.how), HOWS)} {known}")
        exact = self.how in ("cat", "linear")
        require(self.rank is None or not exact, f"how={self.how!r} decides the rank itself; how='svd' takes rank=.")
        whole = self.rank is None or (isinstance(self.rank, int) and self.rank >= 1)
        require(whole, f"rank is {self.rank!r}; it must be a whole number, at least 1.")
        drops, d = self.how in OF_ELEMENTS, self.density
        require(drops or d is None, f"how={self.how!r} keeps every element, so density= means nothing to it.")
        require(not drops or d is not None, f"how={self.how!r} needs density=, the share of elements it keeps: 0.2.")
        require(d is None or 0 < d <= 1, f"density is {d!r}; it is a share of elements, above 0 and at most 1.")
        require(self.majority in ("total", "frequency"), f"majority is {self.majority!r}, not 'total' or 'frequency'.")

    @property
    def settings(self) -> dict[str, Any]:
        """What decided the result, for the record."""
        used: dict[str, Any] = {"rank": self.rank, "density": self.density}
        used |= {"majority": self.majority} if self.how in ("ties", "dare_ties") else {}
        used |= {"seed": self.seed} if self.how.startswith("dare") else {}
        return {"how": self.how, **{key: value for key, value in used.items() if value is not None}}


def linear(terms: Terms, path: str) -> Factors:
    """(sum_i sqrt|v_i| B_i) (sum_i sgn(v_i) sqrt|v_i| A_i), v_i = w_i s_i: PEFT's "linear", with its products of one
    adapter's B and another's A, and therefore not the sum of the changes.
    """
    ranks = {low.left.shape[-1] for _, low in terms}
    require(len(ranks) == 1, f"how='linear' adds factors, which have the ranks {sorted(ranks)} at {path}: use 'svd'.")
    values = [weight * low.scale for weight, low in terms]
    roots = [math.sqrt(abs(value)) for value in values]
    lefts = [root * wide(low.left) for root, (_, low) in zip(roots, terms, strict=True)]
    rights = [math.copysign(r, v) * wide(low.right) for r, v, (_, low) in zip(roots, values, terms, strict=True)]
    return Factors(torch.stack(lefts).sum(0), torch.stack(rights).sum(0), bias=summed(terms).bias)


def of_elements(way: Way, path: str, weights: Sequence[float], changes: Sequence[Tensor]) -> Tensor:
    """TIES (Yadav et al., 2023, arXiv 2306.01708), DARE (Yu et al., 2024, arXiv 2311.03099) and pruning by magnitude.

    Applied site by site, as PEFT does; masks are drawn from `seed` and the path, and nobody's random numbers move.
    """
    function, narrow = _of_peft(way.how), [change.float() for change in changes]  # as PEFT does, in half the time
    given = torch.tensor(weights, dtype=torch.float32, device=narrow[0].device)
    options: dict[str, Any] = {"density": way.density}
    options |= {"majority_sign_method": way.majority} if way.how in ("ties", "dare_ties") else {}
    drawn = hashlib.sha256(f"{way.seed} {path}".encode()).digest()[:7]
    with _Drawing(int.from_bytes(drawn, "big")), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The density .* no pruning", UserWarning)  # a density of 1 was asked for
        return wide(function(narrow, given, **options))


def _of_peft(name: str) -> Callable[..., Tensor]:
    try:
        from peft.utils import merge_utils
    except ImportError as error:
        raise AdapterError(f"how={name!r} is one of PEFT's functions: pip install peft.") from error
    found: Callable[..., Tensor] = getattr(merge_utils, name)
    return found


class _Drawing(TorchFunctionMode):
    """Draws come from a generator of their own, in this thread."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.generators: dict[torch.device, torch.Generator] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is not torch.bernoulli:
            return func(*args, **(kwargs or {}))
        device = args[0].device
        if device not in self.generators:
            self.generators[device] = torch.Generator(device).manual_seed(self.seed)
        return func(*args, **{**(kwargs or {}), "generator": self.generators[device]})
