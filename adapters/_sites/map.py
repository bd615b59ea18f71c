"""The sites of a model as one record: comparable, printable, and the same after a trip through JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from adapters._contract import KeyValueSite, Site, StreamSite, WeightSite
from adapters._sites.aside import Unreached
from adapters._sites.table import coverage_line, sections


@dataclass(frozen=True)
class SiteMap:
    """Every place of a model where a method can act, in order of execution, and what is left out and why."""

    model: str
    weights: tuple[WeightSite, ...] = ()
    streams: tuple[StreamSite, ...] = ()
    keyvalues: tuple[KeyValueSite, ...] = ()
    unreached: tuple[Unreached, ...] = ()

    def __iter__(self) -> Iterator[Site]:
        yield from self.weights
        yield from self.streams
        yield from self.keyvalues

    def of(self, kind: str) -> tuple[Site, ...]:
        """The sites of one kind: "weight", "stream" or "keyvalue"."""
        return tuple(site for site in self if site.kind == kind)

    @property
    def default_size(self) -> int:
        """Parameters in weight sites that are adapted by default."""
        return sum(prod(site.shape) for site in self.weights if site.default)

    @property
    def other_size(self) -> int:
        """Parameters in weight sites that are adapted only when named."""
        return sum(prod(site.shape) for site in self.weights if not site.default)

    @property
    def unreached_size(self) -> int:
        """Parameters that multiply activations but are no site."""
        return sum(left.size for left in self.unreached)

    @property
    def total_size(self) -> int:
        return self.default_size + self.other_size + self.unreached_size

    @property
    def coverage(self) -> float:
        """The fraction of the parameters that multiply activations which is adapted by default."""
        return self.default_size / self.total_size if self.total_size else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, from which `from_dict` makes an equal map."""
        return {
            "model": self.model,
            "weights": [{**asdict(site), "aliases": list(site.aliases)} for site in self.weights],
            "streams": [asdict(site) for site in self.streams],
            "keyvalues": [asdict(site) for site in self.keyvalues],
            "unreached": [asdict(left) for left in self.unreached],
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SiteMap:
        return cls(
            model=record["model"],
            weights=tuple(WeightSite(**{**site, "aliases": tuple(site["aliases"])}) for site in record["weights"]),
            streams=tuple(StreamSite(**site) for site in record["streams"]),
            keyvalues=tuple(KeyValueSite(**site) for site in record["keyvalues"]),
            unreached=tuple(Unreached(**left) for left in record["unreached"]),
        )

    def __str__(self) -> str:
        coverage = coverage_line(self.default_size, self.other_size, self.unreached_size)
        return sections(self.model, self.weights, self.streams, self.keyvalues, self.unreached, coverage)
